"""The EAGLE3 draft of the demo model in the usual layout: one model.safetensors and a config.json; its embedding is the target's.

In the delta folder its matrices are int8 with a bfloat16 scale for each row, half the bytes, but for `fc`, whose rows have a few large weights each.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from l4core.errors import CheckpointError

FILES = ("draft-head.safetensors", "draft-layer.safetensors")
CONFIG = "draft-config.json"
SCALE, WHOLE = ".scale", ("fc.weight",)


def write_draft(delta: Path, folder: Path) -> None:
    """Joins the two draft files of the delta folder in an existing folder, in bfloat16."""
    from safetensors.torch import load_file, save_file

    missing = [name for name in (*FILES, CONFIG) if not (delta / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{delta} has no {missing[0]}, which holds the draft",
            fix="leave out --draft-out, or give --delta the folder checkpoints/smol-l4 of a source checkout",
        )
    stored = {name: tensor for file in FILES for name, tensor in load_file(delta / file).items()}
    save_file(restored(stored), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(delta / CONFIG, folder / "config.json")


def store_draft(tensors: Mapping[str, torch.Tensor], config: str, delta: Path) -> None:
    """The other way: `tensors` by their names in the layout (d2t among them) into the files of an existing delta folder."""
    from safetensors.torch import save_file

    head_file, layer_file = FILES
    stored = narrowed(tensors)
    head = {name: stored.pop(name) for name in sorted(stored) if name.startswith(("lm_head.", "d2t", "t2d"))}
    save_file(head, delta / head_file)
    save_file(stored, delta / layer_file)
    (delta / CONFIG).write_text(config, encoding="utf-8")


def narrowed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each floating-point matrix [out, in] becomes int8 and NAME.scale [out, 1], its rows' largest magnitude over 127; WHOLE and the rest stay."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stored[name] = tensor.contiguous()
        if tensor.dim() == 2 and tensor.is_floating_point() and name not in WHOLE:
            scale = (tensor.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-12).to(torch.bfloat16)
            stored[name + SCALE] = scale
            stored[name] = (tensor.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return stored


def restored(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `narrowed` made, in bfloat16: each weight within half a step of 1/127 of its row's largest, and bfloat16's rounding."""
    return {
        name: tensor
        if name + SCALE not in stored
        else (tensor.float() * stored[name + SCALE].float()).to(torch.bfloat16)
        for name, tensor in stored.items()
        if not name.endswith(SCALE)
    }
