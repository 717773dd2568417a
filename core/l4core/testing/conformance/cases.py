"""Attention cases: which sequences, how many queries, chunked or not, tree or not. Plain data; the lengths follow from the chunk's size.

What becomes of a case as tensors is in `problem`, what it must give in `expected`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["CASE_NAMES", "Case", "Heads", "Parents", "all_cases", "random_tree"]

Parents: TypeAlias = tuple[int, ...]
"""A tree by its nodes' parents: Parents[i] < i, −1 for a node that follows the last committed token."""

MAX_NODES = 64
DRAFTS = 4
"""Tokens verified per sequence in the chain cases, so DRAFTS + 1 rows each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sequences of `seq_lens` keys whose last `q_lens` slots are queried. chunk: tokens; position p then sees keys p // chunk * chunk … p.
    virtual: core splits sequences at chunk borders into that many virtual batches each; 0 = each sequence's queries lie in one chunk.
    trees: a tree per sequence, whose nodes are its last q_lens slots.  null_rows: padding, further rows of one key on the null page.
    loose: the host bounds are larger than any length, as they are under graphs."""

    name: str
    seq_lens: tuple[int, ...]
    q_lens: tuple[int, ...]
    phase: Literal["decode", "prefill", "verify"]
    chunk: int | None = None
    virtual: int = 0
    trees: tuple[Parents, ...] | None = None
    null_rows: int = 0
    loose: bool = False

    @property
    def num_draft_tokens(self) -> int:
        """What the requirements of a backend for this case say."""
        return max(self.q_lens) - 1 if self.phase == "verify" else 0

    @property
    def has_empty_rows(self) -> bool:
        """Rows without keys, or virtual batches without queries: only for backends that declare `empty_rows`."""
        return self.virtual > 0 or 0 in self.seq_lens


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


def all_cases(chunk: int) -> Mapping[str, Case]:
    """Every case by its name, for chunks of `chunk` tokens (at least 16)."""
    return {case.name: case for case in (*_plain(), *_chunked(chunk), *_trees(chunk))}


def random_tree(num_nodes: int, seed: int, *, width: int = 3) -> Parents:
    """A tree of `num_nodes` nodes in order of depth, as drafters give them; width: most children of a node."""
    draw = random.Random(seed)
    levels: list[list[int]] = [[-1]]
    parents: list[int] = []
    while len(parents) < num_nodes:
        level: list[int] = []
        for parent in levels[-1]:
            for _ in range(draw.randint(1, width) if parent >= 0 else 1):
                if len(parents) < num_nodes:
                    level.append(len(parents))
                    parents.append(parent)
        levels.append(draw.sample(level, min(len(level), 4)))
        levels[-1].sort()
    return tuple(parents)


CHAIN: Parents = (-1, 0, 1, 2, 3)
STAR: Parents = (-1, 0, 0, 0, 0)
BINARY: Parents = (-1, 0, 0, 1, 1, 2, 2)


def _plain() -> Iterator[Case]:
    yield Case(name="one token", seq_lens=(1,), q_lens=(1,), phase="decode")
    borders = (1, 15, 16, 17, 63, 64, 65, 130)
    yield Case(name="decode at page borders", seq_lens=borders, q_lens=(1,) * 8, phase="decode")
    yield Case(name="long decode", seq_lens=(700, 3, 513), q_lens=(1, 1, 1), phase="decode")
    yield Case(name="whole prefill", seq_lens=(77, 1, 64), q_lens=(77, 1, 64), phase="prefill")
    prefix = (90, 128, 66, 17)
    yield Case(name="ragged prefill on a prefix", seq_lens=prefix, q_lens=(13, 64, 1, 16), phase="prefill")
    mixed = (40, 97, 1, 130, 16)
    yield Case(name="prefill and decode mixed", seq_lens=mixed, q_lens=(1, 33, 1, 1, 16), phase="prefill")
    yield Case(name="chain verify", seq_lens=(66, 5, 130), q_lens=(DRAFTS + 1,) * 3, phase="verify")
    yield Case(name="loose bounds", seq_lens=(33, 7, 128), q_lens=(1, 1, 1), phase="decode", loose=True)
    yield Case(name="padded rows", seq_lens=(40, 64), q_lens=(1, 1), phase="decode", null_rows=3)
    yield Case(name="empty rows", seq_lens=(0, 40, 0, 64), q_lens=(1, 1, 1, 1), phase="decode")


def _chunked(c: int) -> Iterator[Case]:
    piece = c // 4
    lengths = (c - 1, c, c + 1, 2 * c - 1, 2 * c, 2 * c + 1, 3)
    yield Case(name="local decode", seq_lens=lengths, q_lens=(1,) * 7, phase="decode", chunk=c)
    yield Case(
        name="local prefill, a piece a chunk",
        seq_lens=(c - 1, c, c + 1, 2 * c - 1, 2 * c, 2 * c + 1, 3 * c - 7),
        q_lens=(c - 1, c, 1, piece, 5, 1, 9),
        phase="prefill",
        chunk=c,
    )
    yield Case(
        name="prefill over a border",
        seq_lens=(c + piece, c + 4, c, 40, 2 * c + 3, 2 * c + 1),
        q_lens=(2 * piece, 10, piece, min(40, c), 3, 2),
        phase="prefill",
        chunk=c,
        virtual=2,
    )
    two, three = (2 * c + 10, c + 5), (3 * c + 5, c + 1)
    yield Case(name="prefill over two borders", seq_lens=two, q_lens=(c + 20, 6), phase="prefill", chunk=c, virtual=3)
    yield Case(
        name="prefill over three borders", seq_lens=three, q_lens=(2 * c + 15, 2), phase="prefill", chunk=c, virtual=4
    )
    yield Case(
        name="verify at a border",
        seq_lens=(c, c + 1, c + 2, c + 5, 2 * c + 3, 9),
        q_lens=(DRAFTS + 1,) * 6,
        phase="verify",
        chunk=c,
        virtual=2,
    )


def _trees(c: int) -> Iterator[Case]:
    shapes = (CHAIN, STAR, BINARY, random_tree(11, 1))
    yield _tree_case("tree verify", (0, 5, 64, 130), shapes)
    yield _tree_case("tree of 64 nodes", (17, 40), (random_tree(MAX_NODES, 2), random_tree(30, 3)))
    prefixes = (c + 9, 2, c)
    yield _tree_case("local tree inside a chunk", prefixes, (BINARY, STAR, CHAIN), chunk=c)
    deep = random_tree(12, 4, width=2)
    at_border = (c - 2, c - 1, 2 * c - 3, c - 1, 2 * c - 1, c - 4)
    yield _tree_case("local tree over a border", at_border, (CHAIN, STAR, BINARY, deep, CHAIN, deep), chunk=c)


def _tree_case(name: str, prefixes: tuple[int, ...], trees: tuple[Parents, ...], chunk: int | None = None) -> Case:
    nodes = tuple(len(tree) for tree in trees)
    lengths = tuple(prefix + n for prefix, n in zip(prefixes, nodes, strict=True))
    return Case(name=name, seq_lens=lengths, q_lens=nodes, phase="verify", chunk=chunk, trees=trees)


CASE_NAMES = tuple(all_cases(128))
"""The names, which do not depend on the chunk's size."""
