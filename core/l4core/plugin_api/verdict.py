"""What probes of attention backends and of expert kernels share: how good, or why not."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["Tier", "Unusable"]


class Tier(IntEnum):
    """How good a backend is on a platform. The highest usable tier wins, then the name; a tie is logged."""

    REFERENCE = 0  # right, slow, never chosen while anything else is usable
    PORTABLE = 10  # right everywhere, no tuning for this hardware
    TUNED = 20  # kernels tuned for this family of devices
    NATIVE = 30  # the vendor's own kernels on the hardware they are made for


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """Verdict: it cannot, and why. reason: what was found and what was wanted.  fix: a command or flag, may be empty."""

    reason: str
    fix: str = ""
