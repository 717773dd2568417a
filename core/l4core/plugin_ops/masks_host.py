"""Top-k, top-p and min-p of one row on a CPU, in place: the twin of masks.py, same result bit for bit, without sorting the vocabulary."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from l4core.plugin_ops.masks import share, weights

__all__ = ["keep_min_p", "keep_top_k", "keep_top_p", "scale"]

Row = npt.NDArray[np.float32]


def scale(row: Row, temperature: float) -> Row:
    """(row − best) / temperature, float32 [V]."""
    with np.errstate(
        invalid="ignore", over="ignore"
    ):  # a row without a finite logit gives NaN, which core reports for that row
        distance: Row = row - row.max()
        distance /= np.float32(temperature)
    return distance


def keep_top_k(row: Row, top_k: int) -> None:
    """1 ≤ top_k ≤ V."""
    cut = np.partition(row, len(row) - top_k)[len(row) - top_k]
    _keep(row, row, cut, top_k)


def keep_top_p(row: Row, top_p: float, temperature: float) -> None:
    """Sorts only tokens that can be in the nucleus: all tokens from one inside it to the last make more than total − target together, so
    it has more than a V-th of that."""
    distance = scale(row, temperature)
    weight = _weights(distance)
    total = int(weight.sum(dtype=np.float64))
    target = max(1, (total * share(top_p)) >> 30)
    candidates = np.flatnonzero(weight >= 0.99 * (total - target) / len(row))
    ranked = -np.sort(-distance[candidates])
    last = int(np.searchsorted(_weights(ranked).cumsum(dtype=np.float64), target))
    last = min(last, len(ranked) - 1)
    _keep(row, distance, ranked[last], last + 1)


def keep_min_p(row: Row, log_min_p: float, temperature: float) -> None:
    """log_min_p ≤ 0."""
    _keep_only(row, np.flatnonzero(scale(row, temperature) >= np.float32(log_min_p)))


def _weights(distance: Row) -> Row:
    weight: Row = weights(torch.from_numpy(distance)).numpy()  # torch's exp, to have the bits of masks.py
    return weight


def _keep(row: Row, values: Row, cut: np.float32, num_kept: int) -> None:
    """Keeps the num_kept best by (value, lowest id); cut is the value of the last of them."""
    ids = np.flatnonzero(values >= cut)
    if len(ids) > num_kept:
        ties = np.flatnonzero(values[ids] == cut)
        ids = np.delete(ids, ties[num_kept - len(ids) :])
    _keep_only(row, ids)


def _keep_only(row: Row, ids: npt.NDArray[np.intp]) -> None:
    kept = row[ids]
    row.fill(-np.inf)
    row[ids] = kept
