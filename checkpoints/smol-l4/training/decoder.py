"""Batched decoding, one token a step, with a static key/value cache and a position for each row."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from l4core.demo.arch import HEAD_DIM, HEADS, KV_HEADS, LAYERS, Q_ROWS, Arch
from l4core.demo.merge import Weights
from training.forward import after_attention, before_attention, place, rms_norm


class Decoder:
    """rows sequences of at most `length` tokens."""

    def __init__(
        self, weights: Weights, arch: Arch, *, rows: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.weights, self.arch, self.rows, self.length = weights, arch, rows, length
        shape = (LAYERS, rows, KV_HEADS, length, HEAD_DIM)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self._row = torch.arange(rows, device=device)
        self._column = torch.arange(length, device=device)

    def logits(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """ids, position [rows] → float32 [rows, vocabulary]. Writes the cache at `position`."""
        arch, places = self.arch, place(position, self.arch)
        whole = self._column[None] <= position[:, None]
        local = whole & (self._column[None] >= (position // arch.chunk * arch.chunk)[:, None]) if arch.chunk else whole
        x = F.embedding(ids, self.weights.embed)
        for index, layer in enumerate(self.weights.layers):
            nope = arch.is_nope(index)
            q, k, v = before_attention(x, layer, places, rope=not nope, eps=arch.eps)
            self.k[index, self._row, :, position] = k
            self.v[index, self._row, :, position] = v
            attended = self._attend(index, q, whole if nope and not arch.nope_chunked else local)
            x, _ = after_attention(x, attended, layer, mode=arch.router, eps=arch.eps)
        return (rms_norm(x, self.weights.norm, arch.eps) @ self.weights.head.T).float()

    def _attend(self, index: int, q: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        grouped = q.view(self.rows, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        scores = (grouped @ self.k[index].transpose(-1, -2)).float() * (1 / math.sqrt(HEAD_DIM))
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        return (scores.softmax(-1).to(q.dtype) @ self.v[index]).reshape(self.rows, Q_ROWS)
