"""The trained part: low-rank adapters, routers, norms and the new tokens' rows, as stored in checkpoints/smol-l4/delta-*.safetensors.

An adapter is B @ A, added to the frozen base. Tensors of one kind are stacked over layers; RoPE and NoPE layers have stacks of their own,
because their attention adapters differ in rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from l4core.demo.arch import (
    BASE_VOCAB,
    EXPERT_FF,
    EXPERTS,
    HIDDEN,
    KV_ROWS,
    LAYERS,
    Q_ROWS,
    SLOTS,
    VOCAB,
    is_nope_layer,
)
from l4core.errors import CheckpointError

FILES = ("delta-experts.safetensors", "delta-rest.safetensors")
RANK_ROPE, RANK_NOPE, RANK_EXPERT = 16, 64, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """a [..., rank, in], b [..., out, rank]."""

    a: torch.Tensor
    b: torch.Tensor

    def product(self) -> torch.Tensor:
        """[..., out, in]"""
        return self.b @ self.a


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDelta:
    """One layer's share. gate_up and down have the slots (shared expert first) in front; router [4, 576]; the norms replace the base's."""

    q: Adapter
    k: Adapter
    v: Adapter
    o: Adapter
    gate_up: Adapter
    down: Adapter
    router: torch.Tensor
    attn_norm: torch.Tensor
    mlp_norm: torch.Tensor


def shapes() -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a delta."""
    nope = sum(is_nope_layer(i) for i in range(LAYERS))
    found: dict[str, tuple[int, ...]] = {}
    for group, layers, rank in (("rope", LAYERS - nope, RANK_ROPE), ("nope", nope, RANK_NOPE)):
        for name, out in (("q", Q_ROWS), ("k", KV_ROWS), ("v", KV_ROWS), ("o", HIDDEN)):
            found[f"{group}.{name}.A"] = (layers, rank, HIDDEN)
            found[f"{group}.{name}.B"] = (layers, out, rank)
    found["gate_up.A"] = (LAYERS, SLOTS, 2, RANK_EXPERT, HIDDEN)
    found["gate_up.B"] = (LAYERS, SLOTS, 2, EXPERT_FF, RANK_EXPERT)
    found["down.A"] = (LAYERS, SLOTS, RANK_EXPERT, EXPERT_FF)
    found["down.B"] = (LAYERS, SLOTS, HIDDEN, RANK_EXPERT)
    found["router"] = (LAYERS, EXPERTS, HIDDEN)
    found["attn_norm"] = found["mlp_norm"] = (LAYERS, HIDDEN)
    found["norm"] = (HIDDEN,)
    found["new_embed"] = found["new_head"] = (VOCAB - BASE_VOCAB, HIDDEN)
    return found


def load_delta(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the delta, float32. CheckpointError names a file or tensor that is missing, unknown or of the wrong shape."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for name in FILES:
        try:
            tensors.update(load_file(folder / name))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder / name} cannot be read: {error}",
                fix="give --delta the folder checkpoints/smol-l4 of a source checkout",
            ) from error
    check_shapes(tensors, folder)
    return {name: tensor.float() for name, tensor in tensors.items()}


def check_shapes(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    wanted = shapes()
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{folder}: tensor {name!r} has shape {found.get(name, 'none')}; wanted {wanted.get(name, 'no such tensor')}"
            )


def layer_deltas(tensors: Mapping[str, torch.Tensor]) -> list[LayerDelta]:
    """The stacks cut into layers. Each stack is unbound once, so that gradients flow back in one piece."""
    rows = {name: iter(t.unbind(0)) for name, t in tensors.items() if name not in {"norm", "new_embed", "new_head"}}

    def adapter(name: str) -> Adapter:
        return Adapter(a=next(rows[f"{name}.A"]), b=next(rows[f"{name}.B"]))

    deltas = []
    for index in range(LAYERS):
        group = "nope" if is_nope_layer(index) else "rope"
        q, k, v, o = (adapter(f"{group}.{name}") for name in "qkvo")
        deltas.append(
            LayerDelta(
                q=q,
                k=k,
                v=v,
                o=o,
                gate_up=adapter("gate_up"),
                down=adapter("down"),
                router=next(rows["router"]),
                attn_norm=next(rows["attn_norm"]),
                mlp_norm=next(rows["mlp_norm"]),
            )
        )
    return deltas
