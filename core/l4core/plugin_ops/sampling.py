"""Steps of a logit transform that sampler plugins compose: penalties, bias, top-k, top-p, min-p, and all of them as `default_transform`.

Every function changes `logits` (float32 [R, V], R = number of rows) in place and returns it; row i depends on row i alone; −inf forbids a token.
Rows for which a step is off are not touched and cost nothing. Ties are broken by token id, lowest first. The draw itself is not here: core adds
the noise after the transform.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from l4core.plugin_api import SamplerRow, SamplingParams
from l4core.plugin_ops import masks, masks_host
from l4core.plugin_ops.philox import key_words, philox_4x32, seed_tensor, split_64
from l4core.plugin_ops.upload import upload

__all__ = [
    "UNCHANGED",
    "Unchanged",
    "apply_logit_bias",
    "apply_penalties",
    "changes_logits",
    "coins",
    "default_transform",
    "mask_min_p",
    "mask_top_k",
    "mask_top_p",
    "scaled_logits",
]


class Unchanged(Enum):
    """Type of `UNCHANGED`."""

    UNCHANGED = "unchanged"


UNCHANGED: Final = Unchanged.UNCHANGED
"""A sampler's `parse` may return this for a request whose logits its `transform` would leave as they are: core then skips the call."""

Ids: TypeAlias = npt.NDArray[np.int64]
Amounts: TypeAlias = npt.NDArray[Any]
Row: TypeAlias = npt.NDArray[np.float32]

_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)


def changes_logits(params: SamplingParams) -> bool:
    """Whether `default_transform` does anything for this request. Masks never remove the best token, so they do nothing to a greedy one."""
    masks = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return has_penalty(params) or bool(params.logit_bias) or (masks and params.temperature > 0)


def default_transform(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
    """What the sampler `default` does: penalties, logit bias, then top-k, top-p and min-p of what the step before left."""
    params = [row.params for row in rows]
    temperature = [p.temperature for p in params]
    apply_penalties(logits, rows)
    apply_logit_bias(logits, rows)
    mask_top_k(logits, [p.top_k if p.temperature > 0 else 0 for p in params])
    mask_top_p(logits, [p.top_p for p in params], temperature)
    return mask_min_p(logits, [p.min_p for p in params], temperature)


def apply_penalties(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
    """repetition_penalty r: a token of the prompt or the output has its logit divided by r if positive, else multiplied by r (Keskar et al. 2019,
    as transformers does). Then, over output tokens only (OpenAI's definition): minus frequency_penalty × count, minus presence_penalty."""
    repeated, spent = [], []
    for i, row in enumerate(rows):
        params = row.params
        output = _ids(row.output_token_ids if has_penalty(params) else ())
        if params.repetition_penalty != 1.0:
            seen = np.concatenate((_ids(row.prompt_token_ids), output))
            repeated.append((i, seen, np.full(len(seen), params.repetition_penalty)))
        if len(output) and (params.frequency_penalty != 0.0 or params.presence_penalty != 0.0):
            ids, counts = np.unique(output, return_counts=True)
            spent.append((i, ids, -(params.frequency_penalty * counts + params.presence_penalty)))
    _change(logits, repeated, lambda logit, r: torch.where(logit > 0, logit / r, logit * r))
    return _change(logits, spent, torch.add)


def apply_logit_bias(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
    """Adds each request's logit_bias. Ids must lie in the vocabulary (core checks this before a request is admitted)."""
    biases = [(i, row.params.logit_bias) for i, row in enumerate(rows) if row.params.logit_bias]
    return _change(logits, [(i, _ids(list(b)), np.array(list(b.values()))) for i, b in biases], torch.add)


def mask_top_k(logits: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    """Keeps the k largest logits of each row, exactly k; k < 1 or k ≥ V is off. top_k: one a row."""
    wanted = [i for i, k in enumerate(top_k) if 0 < k < logits.shape[1]]
    if _on_host(logits):
        return _each_row(logits, wanted, lambda row, i: masks_host.keep_top_k(row, top_k[i]))
    k = [top_k[i] for i in wanted]
    return _on_rows(logits, wanted, lambda part: masks.keep_top_k(part, upload(k, torch.int64, part.device), max(k)))


def mask_top_p(logits: torch.Tensor, top_p: Sequence[float], temperature: Sequence[float]) -> torch.Tensor:
    """Keeps the smallest set of most likely tokens whose probability under softmax(logits / temperature) is at least p, the token that
    crosses p included. p ≥ 1 and greedy rows (temperature 0) are off. top_p, temperature: one a row."""
    wanted = [i for i, (p, t) in enumerate(zip(top_p, temperature, strict=True)) if p < 1 and t > 0]
    if _on_host(logits):
        return _each_row(logits, wanted, lambda row, i: masks_host.keep_top_p(row, top_p[i], _divisor(temperature[i])))
    shares = [masks.share(top_p[i]) for i in wanted]
    divisors = [_divisor(temperature[i]) for i in wanted]
    return _on_rows(
        logits,
        wanted,
        lambda part: masks.keep_top_p(part, upload(shares, torch.int64, part.device), _floats(divisors, part.device)),
    )


def mask_min_p(logits: torch.Tensor, min_p: Sequence[float], temperature: Sequence[float]) -> torch.Tensor:
    """Drops tokens less likely than min_p × the best under softmax(logits / temperature); 0 and greedy rows are off. One value a row."""
    wanted = [i for i, (p, t) in enumerate(zip(min_p, temperature, strict=True)) if p > 0 and t > 0]
    if _on_host(logits):
        return _each_row(
            logits, wanted, lambda row, i: masks_host.keep_min_p(row, math.log(min_p[i]), _divisor(temperature[i]))
        )
    floors = [math.log(min_p[i]) for i in wanted]
    divisors = [_divisor(temperature[i]) for i in wanted]
    return _on_rows(
        logits,
        wanted,
        lambda part: masks.keep_min_p(part, _floats(floors, part.device), _floats(divisors, part.device)),
    )


def scaled_logits(logits: torch.Tensor, temperature: Sequence[float]) -> torch.Tensor:
    """(logits − best of the row) / temperature: float32 [R, V], at most 0, a new tensor. temperature: one a row, > 0; below the smallest normal
    float32 it counts as that. exp of it is the probability relative to the best token's."""
    return masks.scale(logits, _floats([_divisor(t) for t in temperature], logits.device))


def coins(rows: Sequence[SamplerRow], stream: str, device: torch.device | str) -> torch.Tensor:
    """A uniform number in (0, 1) for each row, float32 [R] on `device`: a pure function of the request's seed, the position and `stream` (a name of
    the plugin's own). It must not come from a generator with state: a position may be computed more than once (preemption, verification of
    drafts), in any batch, and has to meet the same coin each time. Independent of the noise of the draw (fourth counter word not 0)."""
    seeds = [row.params.seed for row in rows]
    missing = [row.position for row, seed in zip(rows, seeds, strict=True) if seed is None]
    if missing:
        raise ValueError(
            f"a request without a seed asks for a coin at position {missing[0]}; core sets params.seed before it samples"
        )
    low, high = split_64(upload([row.position for row in rows], torch.int64, device))
    name = torch.full_like(low, max(1, zlib.crc32(stream.encode())))
    key = key_words(seed_tensor([seed for seed in seeds if seed is not None], device))
    word = philox_4x32((torch.zeros_like(low), low, high, name), key)[0]
    return word.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1.0 - 2.0**-24)


# ---------------------------------------------------------------- one step, for the rows that want it


def has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def _on_host(logits: torch.Tensor) -> bool:
    """On a CPU a row at a time is faster: reading values back is free there, and only tokens that matter are sorted."""
    return logits.device.type == "cpu"


def _each_row(logits: torch.Tensor, wanted: list[int], step: Callable[[Row, int], None]) -> torch.Tensor:
    for i in wanted:
        step(logits[i].numpy(), i)
    return logits


def _on_rows(logits: torch.Tensor, wanted: list[int], step: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Runs `step` on the wanted rows together, in place."""
    if len(wanted) == len(logits) and wanted:
        return step(logits)
    if wanted:
        index = upload(wanted, torch.int64, logits.device)
        logits[index] = step(logits[index])
    return logits


def _divisor(temperature: float) -> float:
    return max(temperature, _SMALLEST_TEMPERATURE)


def _floats(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return upload(values, torch.float32, device)


def _ids(token_ids: Sequence[int]) -> Ids:
    return np.asarray(token_ids, dtype=np.int64)


def _change(
    logits: torch.Tensor,
    entries: Sequence[tuple[int, Ids, Amounts]],
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """entries: (row, token ids, an amount each; an id may come twice with one amount). Replaces each of these logits by change(logit, amount), all
    rows at once: read first, then written, so that an id that comes twice is changed once."""
    if not entries:
        return logits
    rows = np.repeat([row for row, _, _ in entries], [len(ids) for _, ids, _ in entries])
    ids = np.concatenate([ids for _, ids, _ in entries])
    amounts = np.concatenate([amounts for _, _, amounts in entries])
    where = (upload(rows, torch.int64, logits.device), upload(ids, torch.int64, logits.device))
    logits[where] = change(logits[where], upload(amounts, torch.float32, logits.device))
    return logits
