"""Dialogs as padded rows for the draft, with the tokens of answers marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from l4core.demo.arch import EOT, HEADER_END, HEADER_START, PAD
from training.acceptance import Rows, concatenate
from training.arrays import Tokens, load_dialogs
from training.dialogs import PROMPT, Pairs

SHORTEST = 24


def read_rows(files: Iterable[Path], pairs: Pairs, length: int, *, llama4: bool) -> list[Rows]:
    """One set of rows a file. llama4: the dialogs are in the student's form already."""
    return [dialog_rows(load_dialogs([file]), pairs, length, llama4=llama4) for file in files]


def dialog_rows(dialogs: Iterable[Tokens], pairs: Pairs, length: int, *, llama4: bool) -> Rows:
    """Cut at `length`; dialogs shorter than 24 tokens are left out."""
    ids, lengths, answers = [], [], []
    for dialog in dialogs:
        tokens, marks = mark_llama4(dialog, pairs.assistant) if llama4 else mark_chatml(dialog, pairs)
        count = min(len(tokens), length)
        if count >= SHORTEST:
            ids.append(tokens[:count] + [PAD] * (length - count))
            answers.append(marks[:count] + [0] * (length - count))
            lengths.append(count)
    return Rows(ids=np.array(ids, np.int64), lengths=np.array(lengths, np.int64), answer=np.array(answers, np.uint8))


def mark_llama4(dialog: Sequence[int] | Tokens, assistant: list[int]) -> tuple[list[int], list[int]]:
    """→ (ids, 1 where a token belongs to an assistant's message)."""
    ids = [int(t) for t in dialog]
    marks, at, inside = [0] * len(ids), 0, False
    while at < len(ids):
        if ids[at] == HEADER_START:
            end = ids.index(HEADER_END, at) if HEADER_END in ids[at:] else len(ids)
            inside, at = ids[at + 1 : end] == assistant, end + 3  # behind the header's blank line
            continue
        marks[at] = int(inside)
        inside = inside and ids[at] != EOT
        at += 1
    return ids, marks


def mark_chatml(dialog: Sequence[int] | Tokens, pairs: Pairs) -> tuple[list[int], list[int]]:
    """A teacher's dialog in the student's form, marked the same way, but for the end of a user's turn, which is marked too."""
    pair = pairs.dialog(dialog)
    marks = [0] * len(pair.student)
    for place, kind in zip(pair.at_student, pair.kind, strict=True):
        if kind != PROMPT and place + 1 < len(marks):
            marks[place + 1] = 1
    return pair.student, marks


def split_held_out(parts: Sequence[Rows]) -> tuple[Rows, Rows]:
    """→ (training rows, the first part's held-out 2 %)."""
    train = [part[slice(len(part) // 50, None)] for part in parts]
    return concatenate(train), parts[0][slice(None, len(parts[0]) // 50)]
