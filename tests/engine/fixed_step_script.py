"""Decodes by steps of fixed shape on a CPU, uncaptured, the draw's kernels under Triton's interpreter: `python fixed_step_script.py FOLDER`.

Prints the number of fixed steps that were taken. Tokens must be those of batches planned tensor by tensor, padded shapes and all.
"""

from __future__ import annotations

import sys

from l4core import LLM, SamplingParams
from l4core.engine.run.fixed_step import Computed, FixedStep, StepShape
from l4core.engine.run.runner import Runner

SIZES = (2, 5, 8)


class Uncaptured:
    """Stands where the graphs would: runs a step instead of replaying it."""

    def __init__(self, runner: Runner) -> None:
        self._steps = {size: runner.fixed_step(StepShape(size, 1)) for size in SIZES}
        self.num_steps = 0

    def find(self, num_seqs: int, num_tokens: int) -> FixedStep:
        return next(step for size, step in self._steps.items() if size >= num_seqs)

    def replay(self, step: FixedStep) -> Computed:
        self.num_steps += 1
        return step.run()


def params(i: int) -> SamplingParams:
    kinds = [
        {},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 9},
        {"frequency_penalty": 0.5},
        {"logprobs": 1},
        {"min_tokens": 9},
    ]
    return SamplingParams(temperature=(0.9, 0.0, 1.4)[i % 3], seed=i, max_tokens=9 + 5 * i, **kinds[i % len(kinds)])


def main(folder: str) -> int:
    prompts = [[(7 * i + j) % 256 for j in range(3 + 19 * i)] for i in range(7)]
    answers, taken = [], 0
    for overlap, fixed in ((False, False), (False, True), (True, True)):
        llm = LLM(folder, dtype="float32", device="cpu", max_running_requests=8, max_total_tokens=4000, progress=False)
        engine = llm._built.engine
        engine.overlap, engine.scheduler.max_in_flight = overlap, 1 + overlap
        if fixed:
            engine.runner.graphs = steps = Uncaptured(engine.runner)  # type: ignore[assignment]
        found = llm.generate(prompts, [params(i) for i in range(7)], use_tqdm=False)
        answers.append([o.outputs[0].token_ids for o in found])
        taken += steps.num_steps if fixed else 0
    assert answers[0] == answers[1] == answers[2], answers
    return taken


if __name__ == "__main__":
    print(main(sys.argv[1]))
