"""What comes into a step from outside. Of plain values only: the server's process, which has neither torch nor numpy, makes it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l4core.engine.schedule.step_costs import StepCosts
from l4core.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Inbox:
    """What came in since the last step. The scheduler reads no clock: deadlines arrive here as aborts.

    flush_cache: forget all cached prefixes, before the requests are taken in.  step_costs: what steps cost, and may cost, from now on; None = no
    change.  num_drafts: guesses wanted for each sequence from now on, None = no change.  draft_reads: where none are, whether the draft reads what
    steps compute; once it has not, it can guess only for sequences that come later.
    """

    requests: Sequence[Request] = ()
    aborts: Sequence[str] = ()
    flush_cache: bool = False
    step_costs: StepCosts | None = None
    num_drafts: int | None = None
    draft_reads: bool = True
