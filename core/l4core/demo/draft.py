"""The EAGLE3 draft of the demo model in the usual layout: one model.safetensors and a config.json; its embedding is the target's."""

from __future__ import annotations

import shutil
from pathlib import Path

from l4core.errors import CheckpointError

FILES = ("draft-head.safetensors", "draft-layer.safetensors")
CONFIG = "draft-config.json"


def write_draft(delta: Path, folder: Path) -> None:
    """Joins the two draft files of the delta folder in an existing folder."""
    from safetensors.torch import load_file, save_file

    missing = [name for name in (*FILES, CONFIG) if not (delta / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{delta} has no {missing[0]}, which holds the draft",
            fix="leave out --draft-out, or give --delta the folder checkpoints/smol-l4 of a source checkout",
        )
    tensors = {name: tensor for file in FILES for name, tensor in load_file(delta / file).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(delta / CONFIG, folder / "config.json")
