"""What a command printed and how it ended, for tests of the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """code: exit code."""

    code: int
    out: str
    err: str


RunL4 = Callable[..., Ended]
