"""Endless packed batches for healing: half real text, half dialogs, in both models' forms at once."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from training.arrays import Tokens
from training.dialogs import Pair, Pairs, text_pair

SOURCE_WEIGHT = {"python": 5, "wordnet": 2, "kjv": 2}
RECALL_SHARE = 0.03
LONG, SHORT = (8192, 4096, 4096), (2048, 2048, 1024, 640)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """teacher [teacher_tokens], student [n]: packed ids, padded at the end.  The next four have one entry per student token: positions in
    both streams, kind of position, weight (0 = padding)."""

    teacher: torch.Tensor
    student: torch.Tensor
    teacher_lengths: list[int]
    student_lengths: list[int]
    at_teacher: torch.Tensor
    at_student: torch.Tensor
    kind: torch.Tensor
    weight: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        names = ("teacher", "student", "at_teacher", "at_student", "kind", "weight")
        moved: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)


@dataclass(slots=True)
class _Stream:
    """A batch being filled."""

    teacher_room: int
    student_room: int
    pair: Pair = field(default_factory=lambda: Pair(teacher=[], student=[], at_teacher=[], at_student=[], kind=[]))
    teacher_lengths: list[int] = field(default_factory=list)
    student_lengths: list[int] = field(default_factory=list)

    def add(self, more: Pair) -> bool:
        """False when it does not fit."""
        full, teacher, student = self.pair, len(self.pair.teacher), len(self.pair.student)
        if teacher + len(more.teacher) > self.teacher_room or student + len(more.student) > self.student_room:
            return False
        full.at_teacher.extend(teacher + i for i in more.at_teacher)
        full.at_student.extend(student + i for i in more.at_student)
        full.kind.extend(more.kind)
        full.teacher.extend(more.teacher)
        full.student.extend(more.student)
        self.teacher_lengths.append(len(more.teacher))
        self.student_lengths.append(len(more.student))
        return True

    def finish(self) -> Batch:
        for ids, lengths, room in (
            (self.pair.teacher, self.teacher_lengths, self.teacher_room),
            (self.pair.student, self.student_lengths, self.student_room),
        ):
            if len(ids) < room:
                lengths.append(room - len(ids))
                ids.extend([0] * (room - len(ids)))
        used, empty = len(self.pair.kind), self.student_room - len(self.pair.kind)
        return Batch(
            teacher=torch.tensor(self.pair.teacher),
            student=torch.tensor(self.pair.student),
            teacher_lengths=self.teacher_lengths,
            student_lengths=self.student_lengths,
            at_teacher=torch.tensor(self.pair.at_teacher + [0] * empty),
            at_student=torch.tensor(self.pair.at_student + [0] * empty),
            kind=torch.tensor(self.pair.kind + [0] * empty),
            weight=torch.tensor([1.0] * used + [0.0] * empty),
        )


class Batches:
    """n: student tokens a batch.  teacher_tokens: at most so many tokens of the teacher's (longer) form."""

    def __init__(
        self,
        pairs: Pairs,
        dialogs: Sequence[Tokens],
        recall: Sequence[Tokens],
        sources: Mapping[str, Tokens],
        *,
        n: int,
        teacher_tokens: int,
        seed: int,
        text_share: float = 0.5,
        long_share: float = 0.5,
    ) -> None:
        self._pairs, self._dialogs, self._recall, self._sources = pairs, dialogs, recall, sources
        self._n, self._teacher_tokens = n, teacher_tokens
        self._text_share, self._long_share = text_share, long_share
        self._rng = random.Random(seed)
        self._order: list[int] = []

    def next(self) -> Batch:
        stream = _Stream(self._teacher_tokens, self._n)
        budget = self._text_share * self._n
        while (room := budget - len(stream.pair.student)) > 0:
            if not stream.add(text_pair(self._slice(self._rng.choice(self._sizes(room))))):
                break
        misses = 0
        while misses < 4:
            misses += not stream.add(self._pairs.dialog(self._next_dialog()))
        return stream.finish()

    def _sizes(self, room: float) -> list[int]:
        long = [size for size in LONG if size <= room] if self._rng.random() < self._long_share else []
        return long or [size for size in SHORT if size <= max(room, min(SHORT))]

    def _next_dialog(self) -> Tokens:
        if self._recall and self._rng.random() < RECALL_SHARE:
            return self._rng.choice(self._recall)
        if not self._order:
            self._order = list(range(len(self._dialogs)))
            self._rng.shuffle(self._order)
        return self._dialogs[self._order.pop()]

    def _slice(self, size: int) -> Tokens:
        """A piece of one source; of the longer ones, three in ten repeat an earlier passage later on."""
        name = self._rng.choices(list(self._sources), [SOURCE_WEIGHT.get(k, 1) for k in self._sources])[0]
        flat = self._sources[name]
        start = self._rng.randrange(max(1, len(flat) - size))
        piece: npt.NDArray[np.uint16] = np.array(flat[start : start + size])
        if size >= 1024 and self._rng.random() < 0.3:
            length = self._rng.randint(48, min(320, (size - 420) // 2))
            first = self._rng.randrange(0, size - 2 * length - 400)
            second = self._rng.randrange(first + length, size - length)
            piece[second : second + length] = piece[first : first + length]
        return piece


class Loader:
    """Batches prepared by worker processes; started before the accelerator is touched."""

    def __init__(self, make: Callable[[int], Batches], workers: int = 6, depth: int = 12) -> None:
        context: Any = multiprocessing.get_context("fork")
        self._queue: Queue[Batch] = context.Queue(depth)
        for index in range(workers):
            context.Process(target=_work, args=(make(index), self._queue), daemon=True).start()

    def next(self) -> Batch:
        return self._queue.get(timeout=120)


def _work(batches: Batches, queue: Queue[Batch]) -> None:
    while True:
        queue.put(batches.next())
