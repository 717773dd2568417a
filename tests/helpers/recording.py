"""A Runner that also keeps the logits of every row it computed: what is compared with transformers is what production computed."""

from __future__ import annotations

import torch

from l4core import LLM, SamplingParams
from l4core.engine.batch import ScheduledBatch
from l4core.engine.run.fixed_step import Computed
from l4core.engine.run.runner import Forward, Runner


class Recorder:
    """Wraps one engine's `runner.execute` results. logits[request number][position] → row."""

    def __init__(self, llm: LLM) -> None:
        runner: Runner = llm._built.engine.runner
        self.logits: dict[str, dict[int, torch.Tensor]] = {}
        build, execute = runner.build, runner.execute
        last: list[ScheduledBatch] = []

        def recording_build(batch: ScheduledBatch) -> Forward:
            last[:] = [batch]
            return build(batch)

        def recording_execute(forward: Forward) -> Computed:
            computed = execute(forward)
            self._keep(last[0], runner.model.logits(computed.hidden).cpu())
            return computed

        runner.build, runner.execute = recording_build, recording_execute  # type: ignore[method-assign]

    def _keep(self, batch: ScheduledBatch, logits: torch.Tensor) -> None:
        row = 0
        for seq in batch.sequences:
            kept = self.logits.setdefault(seq.request.request_id.split(":")[0], {})
            for offset in range(len(seq.token_ids)):
                kept[seq.start + offset] = logits[row].detach().clone()
                row += 1

    def stacked(self, number: int) -> torch.Tensor:
        """float32 [positions, vocab] of the number-th request, every position exactly once."""
        kept = self.logits[str(number)]
        return torch.stack([kept[p] for p in range(len(kept))])


class HiddenRecorder:
    """Keeps the hidden states of one request: where logits of all positions would not fit, a few can be computed from these."""

    def __init__(self, llm: LLM) -> None:
        runner: Runner = llm._built.engine.runner
        self._parts: list[torch.Tensor] = []
        execute = runner.execute

        def recording_execute(forward: Forward) -> Computed:
            computed = execute(forward)
            self._parts.append(computed.hidden.clone())
            return computed

        runner.execute = recording_execute  # type: ignore[method-assign]

    def hidden(self) -> torch.Tensor:
        """[positions, hidden_size] after the final norm."""
        return torch.cat(self._parts)


def greedy(max_tokens: int, **changes: object) -> SamplingParams:
    """Greedy, never ending early."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **changes)  # type: ignore[arg-type]
