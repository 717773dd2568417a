"""The EAGLE3 draft: one Llama layer over the target's hidden states, unrolled as in training-time test."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from l4core.demo.arch import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, KV_ROWS, Q_ROWS, STUDENT
from l4core.demo.merge import Weights
from training.forward import rms_norm, rope_tables

AUX_LAYERS = (1, 14, 26)
"""Counted from 0; the outputs of these layers are the draft's input."""

DRAFT_VOCAB, DRAFT_FF = 8192, 2304
Draft = Mapping[str, torch.Tensor]
ATTENTION, MLP = "midlayer.self_attn.", "midlayer.mlp."


def init_draft(
    target: Weights, counts: npt.NDArray[np.float64], seed: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """counts: how often each target token occurs. → (tensors, float32, on the CPU; kept target ids, ascending)."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (0.5 / math.sqrt(columns)) * scale

    keep = torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:DRAFT_VOCAB]))
    last_layer = torch.cat([torch.zeros(HIDDEN, 2 * HIDDEN), torch.eye(HIDDEN)], 1)
    draft = {
        "fc.weight": last_layer + random(HIDDEN, 3 * HIDDEN, 0.1),
        "norm.weight": target.norm.float().cpu().clone(),
        "lm_head.weight": target.head[keep.to(target.head.device)].float().cpu().clone(),
        f"{ATTENTION}q_proj.weight": random(Q_ROWS, 2 * HIDDEN),
        f"{ATTENTION}k_proj.weight": random(KV_ROWS, 2 * HIDDEN),
        f"{ATTENTION}v_proj.weight": random(KV_ROWS, 2 * HIDDEN),
        f"{ATTENTION}o_proj.weight": random(HIDDEN, Q_ROWS, 0.3),
        f"{MLP}gate_proj.weight": random(DRAFT_FF, HIDDEN),
        f"{MLP}up_proj.weight": random(DRAFT_FF, HIDDEN),
        f"{MLP}down_proj.weight": random(HIDDEN, DRAFT_FF, 0.3),
    }
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        draft[f"midlayer.{name}.weight"] = torch.ones(HIDDEN)
    return draft, keep


def unroll(draft: Draft, aux: torch.Tensor, embeds: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """aux [B, L, 3·576]: the target's hidden states.  embeds [B, L + steps, 576]: embedding of the token after position i, then i + 1, …

    Yields for every step s the hidden states [B, L, 576] before the final norm: the guess at token i + 2 + s. In step s a position sees the
    whole prefix of step 0 and its own earlier guesses.
    """
    length = aux.shape[1]
    hidden = aux @ draft["fc.weight"].T
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    causal = torch.ones(length, length, dtype=torch.bool, device=aux.device).tril()
    own = torch.eye(length, dtype=torch.bool, device=aux.device)
    for step in range(steps):
        mask = torch.cat([causal, *[own] * step], 1)
        hidden = _layer(draft, hidden, embeds[:, step : step + length], step, keys, values, mask)
        yield hidden


def _layer(
    draft: Draft,
    hidden: torch.Tensor,
    embeds: torch.Tensor,
    step: int,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    mask: torch.Tensor,
) -> torch.Tensor:
    """One step of the layer; appends its keys and values."""
    tables = rope_tables(torch.arange(hidden.shape[1], device=hidden.device) + step, STUDENT.theta)
    cos, sin = (table[:, 0] for table in tables)
    normed = (
        rms_norm(embeds, draft["midlayer.input_layernorm.weight"]),
        rms_norm(hidden, draft["midlayer.hidden_norm.weight"]),
    )
    x = torch.cat(normed, -1)
    q, k, v = (
        (x @ draft[f"{ATTENTION}{name}_proj.weight"].T).unflatten(-1, (heads, HEAD_DIM)).transpose(1, 2)  # type: ignore[no-untyped-call]
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    )
    keys.append(rotate_half(k, cos, sin).repeat_interleave(HEADS // KV_HEADS, 1))
    values.append(v.repeat_interleave(HEADS // KV_HEADS, 1))
    attended = F.scaled_dot_product_attention(
        rotate_half(q, cos, sin), torch.cat(keys, 2), torch.cat(values, 2), attn_mask=mask
    )
    hidden = hidden + attended.transpose(1, 2).flatten(2) @ draft[f"{ATTENTION}o_proj.weight"].T
    y = rms_norm(hidden, draft["midlayer.post_attention_layernorm.weight"])
    gate, up = (y @ draft[f"{MLP}{name}_proj.weight"].T for name in ("gate", "up"))
    return hidden + (F.silu(gate) * up) @ draft[f"{MLP}down_proj.weight"].T


def rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in the order of Llama (first half with second half), which EAGLE3 drafts have: x [B, heads, L, 64], cos and sin [L, 32]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def draft_loss(
    hidden: torch.Tensor,
    draft: Draft,
    wanted: torch.Tensor,
    best: torch.Tensor,
    keep: torch.Tensor,
    in_draft: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """wanted [B, L, 8192]: the target's distribution over the draft vocabulary; best [B, L]: its arg max over the whole; mask: answer positions.

    → (soft cross-entropy where the arg max is in the draft vocabulary, how often the arg maxes agree).
    """
    log_q = F.log_softmax((rms_norm(hidden, draft["norm.weight"]) @ draft["lm_head.weight"].T).float(), -1)
    inside = in_draft[best] & mask
    loss = -(wanted.float() * log_q).sum(-1)
    hit = (keep[log_q.detach().argmax(-1)] == best) & mask
    return (loss * inside).sum() / inside.sum().clamp(min=1), hit.sum() / mask.sum().clamp(min=1)
