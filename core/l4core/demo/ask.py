"""The demo's two questions, asked through the official openai client as any user would ask them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from l4core.errors import ConfigError

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import CompletionUsage

CAPITAL = "What is the capital of France?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One streamed answer. first_seconds: until the first piece.  token_seconds: from the first piece to the last."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    first_seconds: float
    token_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: the first token belongs to the prompt's pass."""
        return (self.completion_tokens - 1) / self.token_seconds if self.token_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A piece of a stream; the counts come with the last one."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


def connect(url: str) -> OpenAI:
    """A client for a server without a key, past any proxy of the environment. ConfigError without the openai package."""
    try:
        from openai import DefaultHttpxClient, OpenAI
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the demo asks through the openai package, which is not installed", fix="pip install 'l4core[demo]'"
        ) from error
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=DefaultHttpxClient(trust_env=False))


def ask_capital(client: OpenAI, model: str) -> Reply:
    """A chat question with a short, known answer."""

    def pieces() -> Iterator[Piece]:
        for event in client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": CAPITAL}],
            max_tokens=40,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ):
            yield piece((event.choices[0].delta.content or "") if event.choices else "", event.usage)

    return show_stream(pieces())


def continue_text(client: OpenAI, model: str, text: str, max_tokens: int) -> Reply:
    """A plain completion of a long text."""

    def pieces() -> Iterator[Piece]:
        for event in client.completions.create(
            model=model,
            prompt=text,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ):
            yield piece(event.choices[0].text if event.choices else "", event.usage)

    return show_stream(pieces())


def piece(text: str, usage: CompletionUsage | None) -> Piece:
    if usage is None:
        return Piece(text=text)
    return Piece(text=text, prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)


def show_stream(pieces: Iterable[Piece]) -> Reply:
    """Print pieces as they come and measure. pieces: lazy, so that the request is sent by the first look at it and its time counts."""
    began = time.perf_counter()
    text, counts, times = "", Piece(), []
    for found in pieces:
        if found.text:
            times.append(time.perf_counter())
            print(found.text, end="", flush=True)
            text += found.text
        if found.prompt_tokens:
            counts = found
    print(flush=True)
    return Reply(
        text=text,
        prompt_tokens=counts.prompt_tokens,
        completion_tokens=counts.completion_tokens,
        first_seconds=(times[0] if times else time.perf_counter()) - began,
        token_seconds=times[-1] - times[0] if times else 0.0,
    )


def long_text() -> str:
    """The start of Alice's Adventures in Wonderland (Lewis Carroll, 1865, public domain): 1,241 tokens of the demo model."""
    return resources.files("l4core.demo").joinpath("alice.txt").read_text(encoding="utf-8")
