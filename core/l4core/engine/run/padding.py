"""Sequences with unequally many rows in a step where all have the same number.

A sequence's rows come last in its share, padding before them: so lengths, positions and what a row sees stay as they are, and nothing lies behind the
sequence's slots. A padding row stands at the position before, computes token 0, is given a slot of the null page (attention.step_tables), and nobody
asks what came out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from l4core.engine.batch import Ints
from l4core.plugin_ops.upload import upload_many

if TYPE_CHECKING:
    from l4core.engine.run.graphs import Graphs, Step

    S = TypeVar("S", bound=Step)


def find_padded(graphs: Graphs[S], starts: Ints, lengths: Ints) -> S | None:
    """The captured step that holds these sequences, int64 [B] each: the first position and the rows of each. None = none does, or some sequence
    is shorter than its share: positions before its first do not exist."""
    step = graphs.find(len(lengths), int(lengths.max()))
    return step if step is not None and (starts + lengths >= step.shape.num_tokens).all() else None


def places_in(num_tokens: int, lengths: Ints) -> Ints:
    """int64 [sum of lengths]: where the rows of sequences lie that have a share of `num_tokens` each, in order."""
    behind = np.cumsum(lengths)
    padding = np.arange(1, len(lengths) + 1) * num_tokens - behind  # rows of padding up to each one's
    return np.arange(int(lengths.sum())) + np.repeat(padding, lengths)


def spread(values: Ints, num_tokens: int, lengths: Ints) -> Ints:
    """values: int64 [sum of lengths] → [B, num_tokens], padding 0."""
    if len(values) == len(lengths) * num_tokens:
        return values.reshape(-1, num_tokens)
    padded = np.zeros((len(lengths), num_tokens), dtype=np.int64)
    padded.reshape(-1)[places_in(num_tokens, lengths)] = values
    return padded


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxRows:
    """Outputs of the target's aux layers, a row for each of a step's. values: [T, n · H].  num_tokens: each sequence's share, where some of it may be
    padding; None = there is none. Rows behind the last sequence's are nobody's."""

    values: torch.Tensor
    num_tokens: int | None = None

    def kept(self) -> AuxRows:
        """In memory of their own: the next step overwrites what a captured one left."""
        return AuxRows(values=self.values.clone(), num_tokens=self.num_tokens)

    def packed(self, lengths: Sequence[int] | Ints) -> torch.Tensor:
        """[sum of lengths, n · H], without padding."""
        own = np.asarray(lengths, dtype=np.int64)
        if self.num_tokens is None or (own == self.num_tokens).all():
            return self.values[: int(own.sum())]
        return self.values.index_select(0, self._places(self.num_tokens, own))

    def write_to(self, out: torch.Tensor, num_tokens: int, lengths: Ints) -> None:
        """out: [at least B · num_tokens, n · H]. Padding gets what padding had, or is left as it is."""
        count = len(lengths) * num_tokens
        rows = self.values[:count] if self.num_tokens == num_tokens else self.packed(lengths)
        if len(rows) == count:
            out[:count].copy_(rows)
        else:
            out.index_copy_(0, self._places(num_tokens, lengths), rows)

    def _places(self, num_tokens: int, lengths: Ints) -> torch.Tensor:
        (places,) = upload_many([places_in(num_tokens, lengths)], torch.int64, self.values.device)
        return places
