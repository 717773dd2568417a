"""What the scheduler counts of a step, for the gauges of `/metrics`. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from l4core.engine.batch import ScheduledBatch, ScheduledSequence
from l4core.engine.schedule.step_costs import piece_scores
from l4core.kv.manager import KVManager
from l4core.request import StepStats
from l4core.sampling.verify import depths


class StepCounts:
    """Counts of one step, from zero."""

    def __init__(self, groups: Iterable[str]) -> None:
        """groups: names of the KV groups."""
        self._num_prefill = self._num_decode = 0
        self._scores = 0.0
        self._hits = dict.fromkeys(groups, 0)
        self._num_drafted = 0
        self._drafted: list[int] = []
        self._accepted: list[int] = []

    def computed(self, batch: ScheduledBatch) -> None:
        """Pieces of prompts, and decodes, were computed."""
        pieces = [entry for entry in batch.others if not entry.is_decode]
        self._num_decode += len(batch.sequences) - len(pieces)
        self._num_prefill += sum(len(piece.token_ids) for piece in pieces)
        self._scores += sum(piece_scores(piece.start, len(piece.token_ids)) for piece in pieces)

    def hit(self, group: str, num_tokens: int) -> None:
        """Tokens of a prefix whose pages were there."""
        self._hits[group] += num_tokens

    def verified(self, entry: ScheduledSequence, num_right: int, *, is_judged: bool) -> None:
        """The first `num_right` guesses of `entry` were right; the others wrong, or not judged since the sequence ended before. Counted by depth."""
        depth = max(depths(entry.num_drafts, entry.parents)) if entry.parents else entry.num_drafts
        self._num_drafted += entry.num_drafts
        for counts in (self._drafted, self._accepted):
            counts += [0] * (depth - len(counts))
        for i in range(depth if is_judged else num_right):
            self._drafted[i] += 1
            self._accepted[i] += i < num_right

    def stats(self, *, num_running: int, num_waiting: int, num_preemptions: int, kv: KVManager) -> StepStats:
        """The record that leaves the engine. num_running, num_waiting, and what is read from `kv`, are gauges after the step."""
        return StepStats(
            num_running=num_running,
            num_waiting=num_waiting,
            num_preemptions=num_preemptions,
            num_prefill_tokens=self._num_prefill,
            num_decode_tokens=self._num_decode,
            num_prefill_scores=self._scores,
            pages_used=kv.pages_used,
            pages_total=kv.pages_total,
            pages_cached=kv.pages_cached,
            num_prefix_hits=self._hits,
            drafted_at=tuple(self._drafted),
            accepted_at=tuple(self._accepted),
            num_drafted_tokens=self._num_drafted,
            num_guesses=len(self._drafted) if self._num_decode else None,
        )
