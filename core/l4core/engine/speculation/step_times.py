"""What steps take, with and without guesses: measured where there was such a step, else predicted by counting bytes.

Batches are told apart by powers of two. Verifying k + 1 tokens reads the experts that so many tokens hit, and each guess reads the draft once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

FEW, LAST = 3, 15
"""Steps of a kind that must have been timed before their time is believed, and those that count."""
READING, FREE = -1, -2
"""Plain steps, beside numbers of guesses: in which the draft reads along, and in which it does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyCosts:
    """Bytes that a step reads. fixed: whatever its tokens.  expert: one routed expert in all layers that have some.  num_experts: of a layer, 0 =
    none.  draft: one pass of the drafter."""

    fixed: float
    expert: float
    num_experts: int
    draft: float

    def ratio(self, batch: int, num_drafts: int) -> float:
        """Of a step with `num_drafts` guesses for each of `batch` sequences to a plain one. The draft's pass over the rows just verified makes the
        first guess, and each further guess takes one pass."""
        return (self._read(batch * (num_drafts + 1)) + num_drafts * self.draft) / self._read(batch)

    def share_of_target(self, batch: int) -> float:
        """Of a plain step in which the draft reads along."""
        return self._read(batch) / (self._read(batch) + self.draft)

    def share_of_prompt(self) -> float:
        """What the draft adds to a prompt, whose tokens each go through as many weights, as a part of it."""
        return self.draft / (self.fixed + self.expert)

    def distinct(self, num_tokens: int) -> float:
        """Experts that so many tokens hit in a layer, each as likely as another."""
        if not self.num_experts:
            return 0.0
        return self.num_experts * (1.0 - (1.0 - 1.0 / self.num_experts) ** num_tokens)

    def _read(self, num_tokens: int) -> float:
        return self.fixed + self.expert * self.distinct(num_tokens)


class StepTimes:
    """Of batches of all sizes. A bucket holds batches of [2 ** (bucket − 1), 2 ** bucket) sequences."""

    def __init__(self, costs: VerifyCosts, max_drafts: int) -> None:
        self._costs, self._max = costs, max_drafts
        self._sizes: dict[int, _Size] = {}

    def learn(self, bucket: int, kind: int, ms: float) -> None:
        """kind: guesses made, READING or FREE.  ms: of one step among several of its kind."""
        self._of(bucket).learn(kind, ms)

    def knows_plain(self, bucket: int) -> bool:
        """Whether plain steps were timed, with the draft reading along or without."""
        return self._of(bucket).plain.count >= FEW

    def knows_free(self, bucket: int) -> bool:
        """Whether plain steps without the draft were timed."""
        return self._of(bucket).free.count >= FEW

    def plain_steps(self, bucket: int, ms: float) -> float:
        """Plain steps that would have taken as long."""
        return ms / self._of(bucket).plain.value

    def known(self, bucket: int) -> list[int]:
        """Numbers of guesses whose steps were timed."""
        return [k for k, times in self._of(bucket).guessing.items() if times.count >= FEW]

    def known_nearby(self, bucket: int) -> list[int]:
        """The same; where there are none, those of batches half as large, in which guesses cost less as a rule."""
        return self.known(bucket) or self.known(bucket - 1)

    def slowdown(self, bucket: int, num_drafts: int) -> float:
        """Time of a step with so many guesses as a multiple of a plain one: measured, or from its neighbours, or by counting bytes. It does more, so
        less than one is noise."""
        known = self.known(bucket)
        if num_drafts in known:
            return max(1.0, self._of(bucket).guessing[num_drafts].value)
        return max(1.0, self._near(bucket, num_drafts, known) if known else self._beside(bucket, num_drafts))

    def _near(self, bucket: int, num_drafts: int, known: list[int]) -> float:
        """From other numbers of guesses: what steps take beyond a plain one is in proportion."""
        near, batch = min(known, key=lambda k: abs(k - num_drafts)), batch_of(bucket)
        share = (self._costs.ratio(batch, num_drafts) - 1.0) / max(self._costs.ratio(batch, near) - 1.0, 1e-9)
        return 1.0 + (self._of(bucket).guessing[near].value - 1.0) * share

    def _beside(self, bucket: int, num_drafts: int) -> float:
        """From batches half as large, where there were some."""
        predicted, half = self._costs.ratio(batch_of(bucket), num_drafts), bucket - 1
        if not self.known(half):
            return predicted
        return self.slowdown(half, num_drafts) * predicted / self._costs.ratio(batch_of(half), num_drafts)

    def _of(self, bucket: int) -> _Size:
        if bucket not in self._sizes:
            self._sizes[bucket] = _Size(self._costs.share_of_target(batch_of(bucket)), self._max)
        return self._sizes[bucket]


def bucket_of(batch: int) -> int:
    return batch.bit_length()


def batch_of(bucket: int) -> int:
    """One in the middle of it."""
    return max(1, 3 << bucket >> 2)


class _Size:
    """Times of one bucket. plain, reading, free: ms.  guessing: multiples of a plain step, by number of guesses."""

    def __init__(self, share: float, max_drafts: int) -> None:
        """share: of a step without the draft in one in which it reads along, by counting bytes."""
        self.plain, self.reading, self.free = Recent(), Recent(), Recent()
        self.guessing = {k: Recent() for k in range(1, max_drafts + 1)}
        self._share = share

    def learn(self, kind: int, ms: float) -> None:
        if kind == READING:
            self.reading.add(ms)
            self.plain.add(ms * self._share)
        elif kind == FREE:
            self.free.add(ms)
            self.plain.add(ms)
            if self.free.count == FEW:
                self._compare()
        elif self.plain.count:
            self.guessing[kind].add(ms / self.plain.value)

    def _compare(self) -> None:
        """Steps with and without the draft were timed one after the other: now their proportion is known, and guesses are compared with what a plain
        step takes indeed."""
        if self.reading.count >= FEW:
            self._share = min(1.0, self.free.value / self.reading.value)
        scale = self.plain.value / self.free.value
        for times in self.guessing.values():
            times.scale(scale)
        self.plain = Recent(self.free)


class Recent:
    """The median of the last values, which a stalled machine or a kernel being compiled does not move. count: of all values."""

    def __init__(self, other: Recent | None = None) -> None:
        """other: to begin like it."""
        self._last: deque[float] = deque(() if other is None else other._last, maxlen=LAST)
        self._median: float | None = None
        self.count = len(self._last)

    @property
    def value(self) -> float:
        """StatisticsError while there is none."""
        if self._median is None:
            self._median = median(self._last)
        return self._median

    def add(self, value: float) -> None:
        self.count += 1
        self._last.append(value)
        self._median = None

    def scale(self, factor: float) -> None:
        """All of them were measured with another yardstick."""
        self._last = deque((factor * value for value in self._last), maxlen=LAST)
        self._median = None
