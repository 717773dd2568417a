"""From one step's logits to one step's tokens: forbidden ids, each row's sampler, the draw, log-probabilities, errors row by row.

Knows nothing of requests' lives, stops or KV. The draw's law stands in draw.py; what a sampler may change, in plugin_api.Sampler.
"""

from __future__ import annotations

import difflib
import logging
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from l4core.errors import RequestError
from l4core.plugin_api import Sampler, SamplerRow, SamplingParams
from l4core.plugin_ops.sampling import UNCHANGED, has_penalty
from l4core.plugin_ops.upload import upload
from l4core.sampling.blocks import Outbox, blocks, rows_per_block
from l4core.sampling.draw import argmax_lowest, draw
from l4core.sampling.logprobs import collect, measure, prompt_logprobs
from l4core.sampling.records import Draw, DrawKey, DrawRow

__all__ = ["Draw", "DrawRow", "Drawing", "SamplingPipeline", "model_fault", "prompt_logprobs"]

_log = logging.getLogger(__name__)

_NO_SAMPLER = ""
"""Group of rows whose logits no sampler changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One call of `sample`. tokens: int64 [R], first the greedy choice, then what is drawn.  raw, allowed, changed: float32 [R], the best logit of
    the model, after forbidding, and after the transform (not finite = the row fails there).  failures: row → text."""

    logits: torch.Tensor
    rows: Sequence[DrawRow]
    tokens: torch.Tensor
    raw: torch.Tensor
    allowed: torch.Tensor
    changed: torch.Tensor
    failures: dict[int, str] = field(default_factory=dict)


class Drawing:
    """A draw under way. tokens: int64 [R] on the device; a row that fails has some id in range there."""

    def __init__(self, step: _Step) -> None:
        """Asks for everything the host wants to know, in one transfer."""
        self.tokens = step.tokens
        self._step = step
        self._outbox = outbox = Outbox()
        for tensor in (step.tokens, step.raw, step.allowed, step.changed):
            outbox.add(tensor)
        self._asking = [i for i, row in enumerate(step.rows) if row.params.logprobs is not None]
        self._tops = [step.rows[i].params.logprobs or 0 for i in self._asking]
        for block in blocks(self._asking, rows_per_block(step.logits)):
            index = upload(block, torch.int64, step.logits.device)
            measure(step.logits.index_select(0, index), step.tokens[index], max(self._tops), outbox)
        outbox.send()

    def finish(self) -> list[Draw]:
        """Waits for the transfer. One Draw a row, in order."""
        step = self._step
        tokens, raw, allowed, changed, *parts = self._outbox.fetch()
        logprobs = dict(zip(self._asking, collect(parts, self._tops), strict=True))
        errors = [
            step.failures.get(i) or _fault(step.rows[i], raw[i], allowed[i], changed[i]) for i in range(len(tokens))
        ]
        return [
            Draw(token_id=None, error=error) if error else Draw(token_id=int(token), logprobs=logprobs.get(i))
            for i, (token, error) in enumerate(zip(tokens, errors, strict=True))
        ]


class SamplingPipeline:
    """samplers: name → sampler, `default` among them.  vocab_size: columns of the logits."""

    def __init__(self, samplers: Mapping[str, Sampler], vocab_size: int) -> None:
        self._samplers = dict(samplers)
        self._vocab_size = vocab_size
        self._prompts: dict[int, tuple[Sequence[int], array[int]]] = {}

    def check(self, params: SamplingParams) -> object:
        """What DrawRow.parsed wants. RequestError: unknown sampler, a token id outside the vocabulary, or the sampler refuses the request."""
        sampler = self._samplers.get(params.sampler)
        if sampler is None:
            raise self._unknown(params.sampler)
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            outside = [token_id for token_id in ids if token_id >= self._vocab_size]
            if outside:
                limit = self._vocab_size - 1
                raise RequestError(f"{name} names token id {outside[0]}; wanted ids from 0 to {limit}", param=name)
        try:
            return sampler.parse(params)
        except RequestError:
            raise
        except ValueError as error:
            raise RequestError(str(error), param="sampler_args") from error

    def looks_back(self, params: SamplingParams, parsed: object) -> bool:
        """Whether what a row may draw depends on the tokens drawn before it. A plugin's sampler is given them, so it may."""
        return parsed is not UNCHANGED and (params.sampler != "default" or has_penalty(params))

    def sample(self, logits: torch.Tensor, rows: Sequence[DrawRow]) -> list[Draw]:
        """logits: float32 [len(rows), vocab_size], left as they are. One Draw a row, in order. One transfer to the host (samplers apart)."""
        self._check_shape(logits, rows)
        return self.start(logits, rows).finish() if rows else []

    def start(self, logits: torch.Tensor, rows: Sequence[DrawRow]) -> Drawing:
        """The same for at least one row, without waiting for the device: `Drawing.finish` does."""
        self._check_shape(logits, rows)
        logits = logits.detach()
        best = argmax_lowest(logits)
        raw = logits.gather(1, best[:, None])[:, 0]
        step = _Step(logits=logits, rows=rows, tokens=best, raw=raw, allowed=raw.clone(), changed=raw.clone())
        self._forget_prompts(rows)
        for sampler, members in _groups(rows).items():
            for block in blocks(members, rows_per_block(logits)):
                self._draw_block(step, sampler, block)
        return Drawing(step)

    def _draw_block(self, step: _Step, sampler: str, block: Sequence[int]) -> None:
        index = upload(block, torch.int64, step.logits.device)
        work = step.logits.index_select(0, index)
        _forbid(work, [step.rows[i].forbidden for i in block])
        step.allowed[index] = allowed = work.amax(dim=1)
        if sampler != _NO_SAMPLER:
            _blank(work, ~allowed.isfinite())
            try:
                work = self._transform(sampler, work, [step.rows[i] for i in block])
            except Exception as error:  # noqa: BLE001  (whatever a plugin raises ends the request that met it, nothing else)
                self._isolate(step, sampler, block, error)
                return
        step.tokens[index] = draw(work, [_key(step.rows[i]) for i in block])
        step.changed[index] = work.amax(dim=1)

    def _isolate(self, step: _Step, sampler: str, block: Sequence[int], error: Exception) -> None:
        """Finds the rows that make a sampler raise by trying each alone."""
        if len(block) > 1:
            for i in block:
                self._draw_block(step, sampler, [i])
            return
        _log.error("sampler %r raised", sampler, exc_info=error)
        step.failures[block[0]] = f"sampler {sampler!r} raised {type(error).__name__}: {error}"

    def _transform(self, sampler: str, logits: torch.Tensor, rows: Sequence[DrawRow]) -> torch.Tensor:
        changed = self._samplers[sampler].transform(logits, [self._sampler_row(row) for row in rows])
        if changed.shape != logits.shape or changed.dtype != logits.dtype:
            found, wanted = (f"{t.dtype} {list(t.shape)}" for t in (changed, logits))
            raise ValueError(f"transform returned {found}; wanted {wanted}")
        return changed.detach()

    def _sampler_row(self, row: DrawRow) -> SamplerRow:
        return SamplerRow(
            params=row.params,
            parsed=row.parsed,
            prompt_token_ids=self._prompt(row.prompt_token_ids),
            output_token_ids=row.output_token_ids,
            position=row.position,
        )

    def _prompt(self, prompt: Sequence[int]) -> Sequence[int]:
        """The prompt as an array, made once: a long list costs milliseconds to convert in every step."""
        if id(prompt) not in self._prompts:
            self._prompts[id(prompt)] = (prompt, array("i", prompt))
        return self._prompts[id(prompt)][1]

    def _forget_prompts(self, rows: Sequence[DrawRow]) -> None:
        """Keeps the arrays of this step's prompts. Each is kept beside its prompt, whose id can therefore not be another's."""
        present = {id(row.prompt_token_ids) for row in rows}
        self._prompts = {key: entry for key, entry in self._prompts.items() if key in present}

    def _unknown(self, sampler: str) -> RequestError:
        near = difflib.get_close_matches(sampler, self._samplers, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "install the plugin that brings it, or leave the field out"
        known = ", ".join(sorted(self._samplers))
        return RequestError(f"unknown sampler {sampler!r}; known: {known}; {hint}", param="sampler")

    def _check_shape(self, logits: torch.Tensor, rows: Sequence[DrawRow]) -> None:
        wanted = (len(rows), self._vocab_size)
        if tuple(logits.shape) != wanted or logits.dtype != torch.float32:
            raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}; wanted float32 {list(wanted)}")


def _groups(rows: Sequence[DrawRow]) -> dict[str, list[int]]:
    """Sampler → its rows. Greedy rows that nothing changes are in no group: their token is known already."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row.parsed is not UNCHANGED:
            groups.setdefault(row.params.sampler, []).append(i)
        elif row.params.temperature > 0 or row.forbidden:
            groups.setdefault(_NO_SAMPLER, []).append(i)
    return groups


def _key(row: DrawRow) -> DrawKey:
    temperature, seed = row.params.temperature, row.params.seed
    if temperature > 0 and seed is None:
        raise ValueError(
            f"a row at position {row.position} has temperature {temperature} and no seed; the front end sets one"
        )
    return DrawKey(temperature=temperature, seed=seed or 0, position=row.position)


def _forbid(logits: torch.Tensor, forbidden: Sequence[Sequence[int]]) -> None:
    rows = [row for row, ids in enumerate(forbidden) for _ in ids]
    if rows:
        columns = [token_id for ids in forbidden for token_id in ids]
        where = upload(np.array([rows, columns]), torch.int64, logits.device)
        logits[where[0], where[1]] = -math.inf


def _blank(logits: torch.Tensor, bad: torch.Tensor) -> None:
    """Rows that have failed become zeros, so that a sampler never meets a NaN or a row without a token. bad: bool [R]."""
    if logits.device.type != "cpu" or bool(bad.any()):  # elsewhere looking would mean waiting for the device
        logits.masked_fill_(bad[:, None], 0.0)


def model_fault(position: int, best: float) -> str:
    """Why a row whose largest logit is `best` has no token, or nothing. position: of the token being drawn."""
    if math.isfinite(best):
        return ""
    found = {math.inf: "+inf", -math.inf: "no finite number"}.get(best, "NaN")
    return f"the model's logits at position {position} hold {found}; wanted finite numbers"


def _fault(row: DrawRow, raw: float, allowed: float, changed: float) -> str:
    """Why this row has no token, or nothing. Arguments as in _Step."""
    if not math.isfinite(raw):
        return model_fault(row.position, raw)
    if not math.isfinite(allowed):
        return f"every token is forbidden at position {row.position}; min_tokens leaves none to draw"
    if not math.isfinite(changed):
        found = {math.inf: "+inf", -math.inf: "no token that may be drawn"}.get(changed, "NaN")
        return f"sampler {row.params.sampler!r} left {found} at position {row.position}"
    return ""
