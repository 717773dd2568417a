"""The law: token = argmax((logits − best) / T + g(seed, position, token)), ties to the lowest id; greedy, T = 0, is argmax(logits).

Subtracting the row's best logit changes nothing in exact arithmetic; it keeps float32 fine where the winners are and lets T go to 0 without an
overflow. A row's token depends on its own logits, temperature, seed and position alone: every operation here is elementwise or a maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from l4core.plugin_ops.philox import seed_tensor
from l4core.plugin_ops.sampling import scaled_logits
from l4core.sampling.draw_host import draw_on_host
from l4core.sampling.noise import gumbel_noise

__all__ = ["DrawKey", "argmax_lowest", "draw", "draw_by_law"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawKey:
    """How one row is drawn. temperature: ≥ 0, 0 = greedy.  seed: any size, modulo 2^64.  position: that of the token being drawn."""

    temperature: float
    seed: int
    position: int


def argmax_lowest(logits: torch.Tensor) -> torch.Tensor:
    """logits: [R, V]. Returns int64 [R]: the lowest id among the largest; the first NaN where there is one."""
    if logits.device.type == "cpu":  # numpy's is vectorised, torch's is not: 0.05 against 0.35 ms for 202,048 entries
        return torch.from_numpy(logits.numpy().argmax(axis=1))
    return logits.argmax(dim=1)


def draw(logits: torch.Tensor, keys: Sequence[DrawKey]) -> torch.Tensor:
    """logits: float32 [R, V], left as they are; a row that is not finite at its best gives some id in range. Returns int64 [R] on the device."""
    tokens = argmax_lowest(logits)
    sampled = [i for i, key in enumerate(keys) if key.temperature > 0]
    if not sampled:
        return tokens
    chosen = [keys[i] for i in sampled]
    index = torch.tensor(sampled, device=logits.device)
    rows = logits if len(sampled) == len(keys) else logits[index]
    distance = scaled_logits(rows, [key.temperature for key in chosen])
    seeds, positions = [key.seed for key in chosen], [key.position for key in chosen]
    drawn = draw_on_host if logits.device.type == "cpu" else draw_by_law
    tokens[index] = drawn(distance, seeds, positions)
    return tokens


def draw_by_law(distance: torch.Tensor, seeds: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """The law written out, on any device. distance: float32 [R, V], (logits − best) / T. Returns int64 [R]."""
    device = distance.device
    position_tensor = torch.tensor(list(positions), dtype=torch.int64, device=device)
    noise = gumbel_noise(seed_tensor(seeds, device), position_tensor, distance.shape[1], device)
    return argmax_lowest(noise.add_(distance))
