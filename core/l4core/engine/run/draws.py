"""Draws under way: what was asked of the device for one batch, and what becomes tokens when it has arrived.

A row whose request has a temperature, top-p and min-p at most is drawn by the kernels of the law (inside a graph, where the step is one). The others
(penalties, top-k, bias, log-probabilities, a sampler of a plugin, tokens forbidden for now) go through the sampling pipeline, from the same logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from l4core.engine.batch import PENDING, DrawnTokens, ScheduledBatch, ScheduledSequence, StepTokens
from l4core.engine.run.verify_rows import Verified, verified
from l4core.plugin_ops.masks import share
from l4core.plugin_ops.sampling import UNCHANGED, has_penalty
from l4core.plugin_ops.upload import Download
from l4core.request import Request, TokenLogprobs
from l4core.sampling.pipeline import Draw, Drawing, model_fault

_UNKNOWN = -1
_NEVER = np.iinfo(np.int64).max


class RowParams:
    """How the request of each block-table row draws, as arrays: noted once when the row gets its request, read by every step.

    temperature, log_min_p: float64.  seed: int64, modulo 2^64.  top_p: int64, shares as in plugin_ops.masks.  Padding's row comes last, greedy.
    """

    def __init__(self, num_rows: int, *, masks: bool = True) -> None:
        """masks: whether the kernels draw with top-p and min-p."""
        self._masks = masks
        self.temperature = np.zeros(num_rows, dtype=np.float64)
        self.seed = np.zeros(num_rows, dtype=np.int64)
        self.top_p = np.full(num_rows, share(1.0), dtype=np.int64)
        self.log_min_p = np.full(num_rows, -np.inf, dtype=np.float64)
        self._plain_from = np.full(num_rows, _UNKNOWN, dtype=np.int64)
        self._owners: list[Request | None] = [None] * num_rows

    def enter(self, sequences: Sequence[ScheduledSequence]) -> None:
        """Note the requests that are new in their rows."""
        owners = self._owners
        for seq in sequences:
            if owners[seq.row] is not seq.request:
                params, row = seq.request.params, seq.row
                owners[row] = seq.request
                self.temperature[row] = params.temperature
                self.seed[row] = ((params.seed or 0) + 2**63) % 2**64 - 2**63
                is_default = params.sampler == "default"  # what another makes of these fields is its own affair
                self.top_p[row] = share(params.top_p) if is_default else share(1.0)
                self.log_min_p[row] = math.log(params.min_p) if is_default and params.min_p > 0 else -math.inf
                self._plain_from[row] = _UNKNOWN

    def are_plain(
        self,
        request_of: Callable[[int], Request],
        rows: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        parsed: Mapping[str, object],
    ) -> npt.NDArray[np.bool_]:
        """Of sequences that draw: whether the kernels' draw is theirs. request_of: index → its request.  rows, positions: of each, position of its
        first draw.  parsed: request id → what its sampler parsed."""
        start = self._plain_from[rows]
        for i in np.flatnonzero(start == _UNKNOWN).tolist():
            request = request_of(i)
            start[i] = self._plain_from[rows[i]] = _first_plain(request, parsed[request.request_id], masks=self._masks)
        return positions >= start

    def are_masked(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether top-p or min-p bears on what the rows draw."""
        masked = (self.top_p[rows] < share(1.0)) | (self.log_min_p[rows] > -np.inf)
        return masked & (self.temperature[rows] > 0)


def _first_plain(request: Request, parsed: object, *, masks: bool) -> int:
    """Position from which on the kernels can draw for the request."""
    params = request.params
    wants_more = params.logprobs is not None or (params.temperature > 0 and params.seed is None)
    only_masks = (
        masks and params.sampler == "default" and params.top_k < 1 and not params.logit_bias and not has_penalty(params)
    )
    if wants_more or not (parsed is UNCHANGED or only_masks):
        return _NEVER
    return len(request.prompt_token_ids) + params.min_tokens if params.min_tokens else 0


class PendingDraws:
    """A batch's draws on their way to the host.

    plain: for each sequence whether its draws are in `drawn`.  drawn: int64 [2, R] as draw_triton.draw_rows gives it, of all rows that draw.
    places: which of those, in order, None = all, or the first.  others: the draws of the other sequences' rows.  positions: of each sequence's first.
    """

    def __init__(
        self,
        batch: ScheduledBatch,
        *,
        plain: npt.NDArray[np.bool_],
        positions: npt.NDArray[np.int64],
        drawn: Download | None,
        others: Drawing | None,
        prompt_logprobs: Mapping[str, list[TokenLogprobs | None]],
        places: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._batch = batch
        self._plain = plain
        self._positions = positions
        self._drawn = drawn
        self._others = others
        self._prompt_logprobs = prompt_logprobs
        self._places = places

    def wait(self) -> StepTokens:
        """What the batch brought. The only place in a step where the host waits for the device."""
        if self._batch.num_verified:
            return StepTokens(drawn=[one.tokens for one in self.verified()])
        tokens, whole = self._one_each()
        num_decodes = len(self._batch.decodes.states)
        drawn = [self._record(self._batch.sequences[i], [draw]) for i, draw in whole.items() if i < num_decodes]
        number = num_decodes
        for seq in self._batch.others:
            draws = [whole.get(number) or Draw(token_id=tokens[number])] if seq.draws else []
            number += len(draws)
            drawn.append(self._record(seq, draws))
        return StepTokens(decoded=tokens[:num_decodes], drawn=drawn)

    def _one_each(self) -> tuple[list[int], dict[int, Draw]]:
        """Without drafts: the token of each sequence that draws, PENDING for those of which there is more to say, or no token, and these draws."""
        ids, best = self._arrived()
        num = len(self._plain)
        tokens, whole = ids[:num] or [PENDING] * num, dict[int, Draw]()
        is_token = self._plain.copy()
        is_token[: len(best)] &= np.isfinite(best[:num])
        if is_token.all():
            return tokens, whole
        others = iter(() if self._others is None else self._others.finish())
        for i in np.flatnonzero(~is_token).tolist():
            draw = next(others) if not self._plain[i] else self._fault(i, best[i])
            if draw.token_id is not None and draw.logprobs is None:
                tokens[i] = draw.token_id
            else:
                tokens[i], whole[i] = PENDING, draw
        return tokens, whole

    def _fault(self, index: int, best: float) -> Draw:
        return Draw(token_id=None, error=model_fault(int(self._positions[index]), best))

    def _record(self, seq: ScheduledSequence, draws: Sequence[Draw]) -> DrawnTokens:
        return verified(seq, draws, self._prompt_logprobs.get(seq.request.request_id, ())).tokens

    def verified(self, sequences: Sequence[ScheduledSequence] | None = None) -> list[Verified]:
        """The same, with the rows the tokens came from. sequences: the batch's, where guesses were PENDING in it and are known now."""
        ids, best = self._arrived()
        others = iter(() if self._others is None else self._others.finish())
        found, row, number = [], 0, 0
        for seq in self._batch.sequences if sequences is None else sequences:
            own: list[Draw] = []
            if seq.draws:
                end = row + seq.num_drafts + 1
                if self._plain[number]:
                    position = int(self._positions[number])
                    faults = [model_fault(position + i, b) for i, b in enumerate(best[row:end])]
                    own = [
                        Draw(token_id=None if error else token_id, error=error)
                        for token_id, error in zip(ids[row:end], faults, strict=True)
                    ]
                else:
                    own = list(islice(others, end - row))
                row, number = end, number + 1
            found.append(verified(seq, own, self._prompt_logprobs.get(seq.request.request_id, ())))
        return found

    def _arrived(self) -> tuple[list[int], npt.NDArray[np.float32]]:
        if self._drawn is None:
            return [], np.empty(0, dtype=np.float32)
        array = self._drawn.wait().numpy()
        array = array if self._places is None else array[:, self._places]
        return array[0].tolist(), array[1].astype(np.int32).view(np.float32)
