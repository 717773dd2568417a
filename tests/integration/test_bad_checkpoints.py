"""A folder that cannot be served ends the start with one clear line on the terminal, and no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

L4 = Path(sys.executable).with_name("l4").as_posix()


def truncated_shard(folder: Path) -> str:
    (shard,) = folder.glob("*.safetensors")
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1000)
    return shard.name


def edit_config(folder: Path, **changes: object) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


def unknown_architecture(folder: Path) -> str:
    edit_config(folder, architectures=["MistralForCausalLM"])
    return "MistralForCausalLM"


def missing_tokenizer(folder: Path) -> str:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return "tokenizer"


def wrong_dtype(folder: Path) -> str:
    """A weight stored as integers."""
    import torch
    from safetensors.torch import load_file, save_file

    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, shard)
    return "model.norm.weight"


def mis_shaped(folder: Path) -> str:
    edit_config(folder, intermediate_size=384)
    return "gate_up_proj"


@pytest.mark.parametrize("damage", [truncated_shard, unknown_architecture, missing_tokenizer, wrong_dtype, mis_shaped])
def test_a_bad_checkpoint_is_named_before_anything_is_served(
    tiny: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    named = damage(folder)
    done = subprocess.run(
        [L4, "serve", folder.as_posix(), "--device", "cpu", "--port", "0"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error:" in done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
