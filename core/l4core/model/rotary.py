"""What a position does to a token: RoPE angles and the temperature of layers without RoPE."""

from __future__ import annotations

import math

import torch

from l4core.model.config import ModelConfig, RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Radians per token of each pair, float64 [head_dim / 2].

    llama3 scaling divides the frequencies whose wavelength exceeds original/low by `factor`, keeps those below original/high and blends
    linearly, in original/wavelength, between the two.
    """
    plain = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if scaling is None:
        return plain
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # original / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low == high:
        keep = (turns >= low).to(torch.float64)
    else:
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (keep + (1 - keep) / scaling.factor)


def rope_table(config: ModelConfig, num_positions: int, dtype: torch.dtype) -> torch.Tensor:
    """cos and sin of positions 0 … num_positions−1: [num_positions, head_dim / 2, 2], computed in float64, stored in `dtype`."""
    return rope_rows(config.head_dim, config.rope_theta, config.rope_scaling, num_positions, dtype)


def rope_rows(
    head_dim: int, theta: float, scaling: RopeScaling | None, num_positions: int, dtype: torch.dtype
) -> torch.Tensor:
    """`rope_table` from its parts."""
    frequencies = inverse_frequencies(head_dim, theta, scaling)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float64, device="cpu"), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).to(dtype)


def temperature(positions: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> torch.Tensor:
    """Factor on q in layers without RoPE: log1p(⌊(p + 1) / floor_scale⌋) · attn_scale + 1, [T] in `dtype`. The floor is taken on integers."""
    steps = torch.div(positions + 1, config.floor_scale, rounding_mode="floor")
    return torch.log1p(steps.to(dtype)).mul_(config.attn_scale).add_(1.0)


class Rotary:
    """The tables of one model, made on first use on the device where they are used.

    Chunked layers compare positions inside one chunk only, and scores depend on position differences: their angles are those of p mod chunk,
    a table of `chunk` rows that is exact at any length. Only a RoPE layer with full attention needs absolute positions.
    """

    def __init__(self, config: ModelConfig, max_positions: int) -> None:
        self._config = config
        self._max_positions = max_positions
        self._tables: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}

    def rows(self, positions: torch.Tensor, *, chunked: bool, dtype: torch.dtype) -> torch.Tensor:
        """cos and sin of each token, [T, 1, head_dim / 2, 2]; positions: int64 [T], absolute."""
        table = self.table(chunked=chunked, device=positions.device, dtype=dtype)
        return table[positions % table.shape[0] if chunked else positions].unsqueeze(1)

    def table(self, *, chunked: bool, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """[rows, head_dim / 2, 2]: row p mod rows belongs to position p."""
        chunk = self._config.attention_chunk_size
        num_positions = chunk if chunked and chunk is not None else self._max_positions
        key = (num_positions, device, dtype)
        if key not in self._tables:
            self._tables[key] = rope_table(self._config, num_positions, dtype).to(device)
        return self._tables[key]
