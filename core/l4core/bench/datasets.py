"""What is asked: prompts of random tokens, of one beginning, or of recorded conversations. A seed gives the same prompts on every machine."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from l4core.errors import ConfigError

BYTES_PER_TOKEN = 4
"""Of English text, about; used only where a recorded answer tells how long ours may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request. prompt: token ids, or text.  max_tokens: of the answer."""

    prompt: str | Sequence[int]
    max_tokens: int

    @property
    def text(self) -> str:
        """For an endpoint that takes only text: random ids become as many words."""
        return self.prompt if isinstance(self.prompt, str) else " ".join(f"w{i}" for i in self.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of prompt and answer. spread: each length is drawn evenly from [n · (1 − spread), n · (1 + spread)]."""

    input: int = 1000
    output: int = 1000
    spread: float = 0.0

    def draw(self, source: random.Random) -> tuple[int, int]:
        return self._one(self.input, source), self._one(self.output, source)

    def _one(self, middle: int, source: random.Random) -> int:
        return max(1, source.randint(round(middle * (1 - self.spread)), round(middle * (1 + self.spread))))


def random_tokens(count: int, lengths: Lengths, ids: range, seed: int) -> list[Sample]:
    """Prompts that share nothing. ids: token ids to draw from."""
    source = random.Random(seed)
    samples = []
    for _ in range(count):
        num_input, num_output = lengths.draw(source)
        samples.append(Sample(prompt=_tokens(source, ids, num_input), max_tokens=num_output))
    return samples


def shared_prefix(
    count: int, lengths: Lengths, ids: range, seed: int, *, prefix: int, num_prefixes: int
) -> list[Sample]:
    """`num_prefixes` beginnings of `prefix` tokens, each before own tokens of `lengths`; requests take them in turn."""
    source = random.Random(seed)
    beginnings = [_tokens(source, ids, prefix) for _ in range(num_prefixes)]
    samples = random_tokens(count, lengths, ids, source.randrange(1 << 32))
    return [
        Sample(prompt=[*beginnings[i % num_prefixes], *sample.prompt], max_tokens=sample.max_tokens)
        for i, sample in enumerate(samples)
        if not isinstance(sample.prompt, str)
    ]


def conversations(path: Path, count: int, seed: int, *, max_tokens: int | None = None) -> list[Sample]:
    """First turns of a ShareGPT-like file: a JSON list of {"conversations": [{"from": "human" | "user", "value": text}, answer, …]}.

    max_tokens: of every answer; None = as long as the recorded one, at four bytes a token. Entries without a question and an answer are left
    out; when fewer than `count` remain they are taken again from the start. Raises ConfigError for a file that is none of this.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--dataset-path {path}: {error}", fix="a JSON list of conversations, as ShareGPT's"
        ) from error
    pairs = [pair for entry in entries if (pair := _first_turn(entry))] if isinstance(entries, list) else []
    if not pairs:
        raise ConfigError(
            f"--dataset-path {path} has no entry with a question and an answer",
            fix='a JSON list of {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}',
        )
    random.Random(seed).shuffle(pairs)
    chosen = [pairs[i % len(pairs)] for i in range(count)]
    return [
        Sample(prompt=question, max_tokens=max_tokens or max(1, len(answer.encode()) // BYTES_PER_TOKEN))
        for question, answer in chosen
    ]


def _first_turn(entry: object) -> tuple[str, str] | None:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
        return None
    question, answer = turns[0], turns[1]
    texts = question.get("value"), answer.get("value")
    if question.get("from") not in ("human", "user") or not all(isinstance(text, str) and text for text in texts):
        return None
    return str(texts[0]), str(texts[1])


def _tokens(source: random.Random, ids: range, count: int) -> list[int]:
    return source.choices(ids, k=count)
