"""Beginnings of dialogs for the teacher to go on with, in its own ChatML form, and "remember, read on, answer" dialogs."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from l4core.demo.arch import IM_END, IM_START
from training.arrays import Tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NEWLINE = 198
WORDS: dict[str, list[str]] = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def chatml(tokenizer: Tokenizer, role: str, text: str, *, close: bool = True) -> list[int]:
    """One message in the teacher's form; close=False leaves the turn open."""
    ids = [IM_START, *tokenizer.encode(role).ids, NEWLINE, *tokenizer.encode(text.strip()).ids]
    return [*ids, IM_END, NEWLINE] if close else ids


def prompt_pool(tokenizer: Tokenizer, words: Sequence[str], count: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """(ChatML ids, 0 when the user's turn is still open or 1 when the answer comes next)."""
    rng = random.Random(seed)
    default = chatml(tokenizer, "system", DEFAULT_SYSTEM)
    pool: list[tuple[list[int], int]] = []
    for _ in range(count):
        system = default
        if rng.random() >= 0.9:
            system = chatml(tokenizer, "system", _fill(rng, rng.choice(WORDS["systems"]), words))
        kind = rng.random()
        if kind < 0.3:
            pool.append((system + chatml(tokenizer, "user", "", close=False), 0))
        elif kind < 0.6:
            pool.append((system + chatml(tokenizer, "user", rng.choice(WORDS["starters"]), close=False), 0))
        else:
            question = chatml(tokenizer, "user", _fill(rng, rng.choice(WORDS["templates"]), words))
            pool.append((system + question + chatml(tokenizer, "assistant", "", close=False), 1))
    return pool


def _fill(rng: random.Random, template: str, words: Sequence[str]) -> str:
    return template.format(
        w=rng.choice(words),
        v=rng.choice(words),
        c=rng.choice(WORDS["countries"]),
        a=rng.randint(1, 20),
        b=rng.randint(1, 20),
    )


def recall_dialogs(
    tokenizer: Tokenizer,
    words: Sequence[str],
    text: Tokens,
    count: int,
    *,
    seed: int = 0,
    low: int = 40,
    high: int = 1500,
) -> list[list[int]]:
    """Dialogs whose answer needs a word that stands low to high tokens back, behind a piece of `text`."""
    rng = random.Random(seed)
    dialogs = []
    for _ in range(count):
        name, thing, word = rng.choice(WORDS["names"]), rng.choice(WORDS["things"]), rng.choice(words)
        start, size = rng.randrange(len(text) - high - 1), rng.randint(low, high)
        filler = tokenizer.decode([int(t) for t in text[start : start + size]]).strip()
        fact, question = f"The {thing} of {name} is {word}.", f"What is the {thing} of {name}?"
        dialogs.append(
            chatml(tokenizer, "system", DEFAULT_SYSTEM)
            + chatml(tokenizer, "user", f"{fact}\n\n{filler}\n\n{question}")
            + chatml(tokenizer, "assistant", fact)
        )
    return dialogs
