"""Token lists of different lengths as two flat arrays, and the files that hold them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint16]
Offsets = npt.NDArray[np.int64]


def pack(lists: Iterable[Sequence[int] | Tokens]) -> tuple[Tokens, Offsets]:
    """→ (all tokens, offsets): list i is tokens[offsets[i] : offsets[i + 1]]."""
    arrays = [np.asarray(x, np.uint16) for x in lists]
    return np.concatenate(arrays), np.cumsum([0, *map(len, arrays)])


def unpack(flat: Tokens, offsets: Offsets) -> list[Tokens]:
    return [flat[a:b] for a, b in itertools.pairwise(offsets)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Real text by source (96 % to train on, 4 % held out), recall dialogs, beginnings of dialogs and the role each goes on with (1 = answer)."""

    train: dict[str, Tokens]
    test: dict[str, Tokens]
    recall: list[Tokens]
    prompts: list[Tokens]
    roles: list[int]


def load_corpus(path: Path) -> Corpus:
    with np.load(path) as file:
        parts = {
            part: {name.removeprefix(part): file[name] for name in file.files if name.startswith(part)}
            for part in ("train.", "test.")
        }
        return Corpus(
            train=parts["train."],
            test=parts["test."],
            recall=unpack(file["recall.flat"], file["recall.offsets"]),
            prompts=unpack(file["prompt.flat"], file["prompt.offsets"]),
            roles=file["prompt.role"].tolist(),
        )


def save_dialogs(path: Path, dialogs: Sequence[Tokens]) -> None:
    flat, offsets = pack(dialogs)
    np.savez(path, flat=flat, offsets=offsets)


def load_dialogs(paths: Iterable[Path]) -> list[Tokens]:
    dialogs = []
    for path in paths:
        with np.load(path) as file:
            dialogs += unpack(file["flat"], file["offsets"])
    return dialogs


def held_out(dialogs: Sequence[Tokens]) -> int:
    """How many dialogs at the front of a file are kept for testing: 2 %."""
    return len(dialogs) // 50
