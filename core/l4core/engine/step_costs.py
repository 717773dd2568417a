"""How much prompt fits into a step that others wait for. Torch-free, reads no clock: what steps cost arrives with the inbox (engine/pace.py)."""

from __future__ import annotations

from dataclasses import dataclass

MIN_PREFILL_TOKENS = 16
"""A prompt gets at least that many a step, whatever the target: otherwise it would starve where a decode step alone takes longer than the target."""


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
        self._tokens, self._untouched = num_tokens, True
        self._ms = 0.0
        if self._costs is not None:
            self._tokens = min(num_tokens, self._costs.max_prefill_tokens)
            self._ms = self._costs.target_ms - self._costs.base_ms - self._costs.decode_ms * num_decodes

    def __bool__(self) -> bool:
        if self._tokens <= 0:
            return False
        costs = self._costs
        return costs is None or self._untouched or self._ms >= costs.token_ms * MIN_PREFILL_TOKENS

    def piece(self, start: int) -> int:
        """The longest piece from position `start` on; at least 1, and at least MIN_PREFILL_TOKENS where the hard limit has them."""
        costs = self._costs
        if costs is None:
            return self._tokens
        return min(self._tokens, max(MIN_PREFILL_TOKENS, _fitting(costs, self._ms, start)))

    def spend(self, start: int, num_tokens: int) -> None:
        """Take a piece of `num_tokens` tokens from position `start` on."""
        self._tokens -= num_tokens
        self._untouched = False
        if self._costs is not None:
            costs = self._costs
            self._ms -= num_tokens * costs.token_ms + piece_scores(start, num_tokens) * costs.score_ms


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
