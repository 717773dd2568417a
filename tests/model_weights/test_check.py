from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_folder import TINY, Tensors, hf_tensors, prefixed, tiny_config, write_checkpoint

from l4core.errors import ConfigError
from l4core.model.check import CheckReport, check_folder

NORM = "language_model.model.norm.weight"
VISION = {"vision_model.class_embedding": torch.ones(3)}


def tensors() -> Tensors:
    return prefixed(hf_tensors(tiny_config()), wrapped=True)


def test_a_whole_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tensors() | VISION, shards=2)
    report = check_folder(folder)
    assert report.ok
    assert report.problems == ()
    assert (report.shards, report.mapped, report.vision) == (2, len(tensors()), 1)
    assert report.bytes_per_rank == sum(t.nbytes for t in tensors().values())
    text = report.text()
    assert text.endswith("verdict: servable")
    assert "Llama4ForCausalLM, float32, quantisation: none" in text
    assert "1 vision tensors skipped (image input is not built yet)" in text
    assert "tokenizer  yes, chat template: none (llama-4 is used)" in text


def test_bytes_of_one_of_eight_ranks(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tensors())
    whole = {name: t.nbytes for name, t in tensors().items()}
    replicated = sum(size for name, size in whole.items() if name.endswith(("norm.weight", "router.weight")))
    kv = sum(size for name, size in whole.items() if name.endswith(("k_proj.weight", "v_proj.weight")))
    want = replicated + kv // 2 + (sum(whole.values()) - replicated - kv) // 8
    report = check_folder(folder, tp=8)
    assert report.bytes_per_rank == want
    assert "of weights on each of 8 ranks\n" in report.text()


def test_a_world_that_does_not_divide(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="5 tensor-parallel ranks"):
        check_folder(write_checkpoint(tmp_path, tensors()), tp=5)


def test_only_headers_are_read(tmp_path: Path) -> None:
    """A shard whose data are a hole of 200 GB is checked at once: nobody can read it, and no disk holds it."""
    folder = write_checkpoint(tmp_path, {})
    name, rows = "model.embed_tokens.weight", 10**9
    size = rows * 50 * 4
    header = json.dumps({name: {"dtype": "F32", "shape": [rows, 50], "data_offsets": [0, size]}}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with path.open("r+b") as file:
        file.truncate(8 + len(header) + size)
    report = check_folder(folder)
    assert report.file_bytes > 200 * 10**9
    assert f"{name} is [1000000000, 50]; wanted [56, 16]" in report.text()


Break = Callable[[Path], object]


def drop(*names: str) -> Break:
    return lambda folder: write_checkpoint(folder, {k: v for k, v in tensors().items() if not k.endswith(names)})


def change(name: str, tensor: torch.Tensor) -> Break:
    return lambda folder: write_checkpoint(folder, tensors() | {f"language_model.{name}": tensor})


def set_config(**changes: Any) -> Break:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**TINY, **changes}))


@pytest.mark.parametrize(
    ("damage", "kind", "text"),
    [
        (drop("3.self_attn.k_proj.weight"), "missing", "language_model.model.layers.3.self_attn.k_proj.weight is missing; wanted [8, 16]"),
        (change("model.layers.9.bias", torch.ones(1)), "unknown", "language_model.model.layers.9.bias is no weight of this model"),
        (change("model.norm.weight", torch.ones(3)), "shape", "language_model.model.norm.weight is [3]; wanted [16]"),
        (change("model.norm.weight", torch.ones(16).int()), "dtype", "language_model.model.norm.weight is I32; wanted BF16 or F16 or F32"),
        (lambda folder: save_file({NORM: torch.ones(16)}, folder / "b.safetensors"), "duplicate", "model.norm.weight is stored twice"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer", "tokenizer.json is missing from"),
        (lambda folder: (folder / "config.json").unlink(), "config", "config.json does not exist"),
        (set_config(architectures=["LlamaForCausalLM"]), "config", "architectures is ['LlamaForCausalLM']"),
        (lambda folder: (folder / "model.safetensors").unlink(), "shard", "holds no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 9), "shard", "no sensible header length"),
        (set_config(dtype="int8"), "config", "dtype is 'int8'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_listed_by_name(tmp_path: Path, damage: Break, kind: str, text: str) -> None:
    damage(write_checkpoint(tmp_path, tensors()))
    report = check_folder(tmp_path)
    assert not report.ok
    assert [p.kind for p in report.problems if text in p.text][:1] == [kind]
    assert text in report.text()
    assert "verdict: not servable" in report.text()


def test_everything_wrong_is_in_the_json_and_the_first_twenty_in_the_text(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, {"language_model.model.norm.weight": torch.ones(16)})
    report = check_folder(folder)
    data = json.loads(json.dumps(report.as_json()))
    assert data["ok"] is False
    assert len(data["problems"]) == len(tensors()) - 1
    assert data["problems"][0]["name"] == "language_model.model.embed_tokens.weight"
    assert f"and {len(tensors()) - 21} more\n" in report.text()


def quantised(folder: Path, method: dict[str, Any]) -> CheckReport:
    made = tensors()
    for x in "qkv":
        at = f"language_model.model.layers.0.self_attn.{x}_proj."
        made[at + "weight"] = made[at + "weight"].to(torch.float8_e4m3fn)
        made[at + "weight_scale"] = torch.ones(())
    return check_folder(write_checkpoint(folder, made, config={**TINY, "quantization_config": method}))


def test_a_whole_quantised_folder_is_servable(tmp_path: Path) -> None:
    report = quantised(tmp_path, {"quant_method": "modelopt", "quant_algo": "FP8"})
    assert report.ok
    assert "quantisation: ModelOpt FP8" in report.text()


def test_a_quantisation_that_is_not_known(tmp_path: Path) -> None:
    report = quantised(tmp_path, {"quant_method": "awq", "bits": 4})
    assert not report.ok
    assert report.not_built is not None
    assert "quantised with awq (4)" in report.text()


def test_a_chat_template_is_seen(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tensors())
    assert not check_folder(folder).has_chat_template
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert check_folder(folder).has_chat_template
    assert "chat template: own" in check_folder(folder).text()


def test_a_damaged_chat_template_is_a_problem(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tensors())
    (folder / "tokenizer_config.json").write_text('{"chat_template": 3}')
    report = check_folder(folder)
    assert [problem.kind for problem in report.problems] == ["template"]
    assert "tokenizer_config.json is a int; wanted a string" in report.text()
