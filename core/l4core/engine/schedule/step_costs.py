"""How much prompt fits into a step that others wait for. Torch-free, reads no clock: what steps cost arrives with the inbox (engine/pace.py)."""

from __future__ import annotations

from dataclasses import dataclass

MIN_PREFILL_TOKENS = 16
"""The least that is worth a piece. One prompt gets that many a step, whatever the target: it would starve where a decode step alone takes longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """A step takes base_ms + decode_ms · decodes + token_ms · prompt tokens + score_ms · scores, a score being one prompt token looking at one
    token before it. target_ms: what it may take while anyone decodes.  max_prefill_tokens: beyond it the costs were never seen.
    """

    target_ms: float
    base_ms: float = 0.0
    decode_ms: float = 0.0
    token_ms: float = 0.0
    score_ms: float = 0.0
    max_prefill_tokens: int

    def __post_init__(self) -> None:
        for name in ("target_ms", "base_ms", "decode_ms", "token_ms", "score_ms"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted at least 0")
        if self.max_prefill_tokens < MIN_PREFILL_TOKENS:
            raise ValueError(f"max_prefill_tokens is {self.max_prefill_tokens}; wanted at least {MIN_PREFILL_TOKENS}")


class StepBudget:
    """What is left of one step for pieces of prompts. False when no further piece should start."""

    def __init__(self, num_tokens: int, costs: StepCosts | None = None, num_decodes: int = 0) -> None:
        """num_tokens: a hard limit.  costs: apply when there are decodes; a step without any keeps nobody waiting."""
        self._costs = costs if num_decodes else None
        self._tokens, self._untouched, self._anyone_waits = num_tokens, True, num_decodes > 0
        self._ms = 0.0
        if self._costs is not None:
            self._tokens = min(num_tokens, self._costs.max_prefill_tokens)
            self._ms = self._costs.target_ms - self._costs.base_ms - self._costs.decode_ms * num_decodes

    def __bool__(self) -> bool:
        if self._tokens <= 0:
            return False
        costs = self._costs
        return costs is None or self._untouched or _fitting(costs, self._ms, 0) >= MIN_PREFILL_TOKENS

    def piece(self, start: int, border: int, unit: int = 1) -> int:
        """Length of the next piece of a prompt, from position `start` to `border` at most; at least 1. unit: see `even_piece`."""
        costs, most = self._costs, self._tokens
        if costs is not None:
            most = min(most, max(MIN_PREFILL_TOKENS, _fitting(costs, self._ms, start)))
        rest = border - start
        return even_piece(rest, most, unit) if self._anyone_waits else min(rest, most)

    def spend(self, start: int, num_tokens: int) -> None:
        """Take a piece of `num_tokens` tokens from position `start` on."""
        self._tokens -= num_tokens
        self._untouched = False
        if self._costs is not None:
            costs = self._costs
            self._ms -= num_tokens * costs.token_ms + piece_scores(start, num_tokens) * costs.score_ms


def even_piece(rest: int, most: int, unit: int) -> int:
    """Of `rest` tokens up to a border, what one piece takes so that all pieces are of one length, in as few steps as pieces of `most` tokens need.

    Beside 31 decodes a step of 8,192 tokens would take 8,161 of a chunk and leave 31 for a step of their own; two of 4,096 take as many steps and
    keep everyone waiting half as long. unit: a length is a multiple of it where that costs no step.
    """
    if most >= rest:
        return rest
    even = -(-rest // -(-rest // most))
    return min(most, -(-even // unit) * unit)


def piece_scores(start: int, num_tokens: int) -> float:
    """Tokens that the piece's tokens look at, summed; of a layer without chunks."""
    return num_tokens * (start + num_tokens / 2)


def _fitting(costs: StepCosts, ms: float, start: int) -> int:
    """The largest n ≤ max_prefill_tokens with token_ms · n + score_ms · (n · start + n²/2) ≤ ms: the root of a parabola."""
    most = costs.max_prefill_tokens
    if ms <= 0:
        return 0
    if most * costs.token_ms + piece_scores(start, most) * costs.score_ms <= ms:
        return most
    linear = costs.token_ms + costs.score_ms * start
    return int(2 * ms / (linear + (linear * linear + 2 * costs.score_ms * ms) ** 0.5))
