"""Verifications in steps of fixed shape on a CPU, uncaptured, under Triton's interpreter: `python padded_step_script.py TARGET DRAFT`.

Every sequence has 1 to 4 rows in a step of four each. Beside each such step the same batch is planned tensor by tensor, on the same memory: logits of
the real rows must be the same, and so must the memory but for the null page. Freed pages hold NaN. Prints how many steps were padded, and of those
how many had guesses that the host did not know, padding in the chunk before, sequences without guesses; and how many batches had no such step, as
a sequence was too short for it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from l4core import LLM, SamplingParams
from l4core.engine.batch import PENDING, ScheduledBatch
from l4core.engine.engine import EMPTY
from l4core.engine.inbox import Inbox
from l4core.engine.run.fixed_step import Computed, FixedStep, StepShape
from l4core.engine.run.fixed_step_triton import Unpacked
from l4core.engine.run.runner import Forward, Runner
from l4core.engine.speculation.drafter import PluginSpeculation
from l4core.model.batch import ForwardBatch
from l4core.plugin_api import DraftRow
from l4core.request import RequestOutput, StepOutput
from l4core.sampling.draw_shards import draw_over_ranks
from l4core.testing.recorded_drafter import RecordedDrafter

CHUNK, STEPS, COUNT, TOKENS = 32, 3, 14, 40
SHAPES = [StepShape(size, rows) for size in (3, 5) for rows in (1, STEPS + 1)]
PROMPTS = [[(7 * i + i // 9) % 250 for i in range(13 * (n + 1) % 52)] + [n % 250] for n in range(COUNT)]
PLAIN: Sequence[Mapping[str, Any]] = ({"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 1.3, "top_p": 0.7})
MODES: Sequence[Mapping[str, Any]] = (
    *PLAIN,
    {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 0.0, "min_tokens": 12},
)


class Checked:
    """Stands where the graphs would: runs a step instead of replaying it, and its batch tensor by tensor before."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self._steps = runner, {shape: runner.fixed_step(shape) for shape in SHAPES}
        for shape, step in self._steps.items():
            if shape.num_tokens > 1:  # the kernels' twin, fifty times as fast here
                step._draw = self.draw  # type: ignore[method-assign]
        self._build = runner.build
        self._batch: ScheduledBatch | None = None
        self._beside: ForwardBatch | None = None
        runner.build = self.build  # type: ignore[method-assign]
        self.met = Counter[str]()

    def find(self, num_seqs: int, num_tokens: int) -> FixedStep | None:
        fitting = [(s.num_tokens, s) for s in self._steps if s.num_tokens >= num_tokens and s.num_seqs >= num_seqs]
        return self._steps[min(fitting)[1]] if fitting else None

    def build(self, batch: ScheduledBatch) -> Forward:
        forward = self._build(batch)
        self._batch, self._beside = batch, None
        if isinstance(forward, FixedStep) and forward.shape.num_tokens > 1:
            self._beside = self._runner._plan(batch)
        elif 0 < batch.num_verified == len(batch.sequences) - batch.num_decodes:
            self.met["too short"] += 1
        return forward

    def draw(self, logits: torch.Tensor, given: Unpacked) -> torch.Tensor:
        model = self._runner.model
        law = (given.temperature, given.seeds, given.draw_positions)
        return draw_over_ranks(logits, *law, model.first_id, model.ranks)

    def replay(self, step: FixedStep) -> Computed:
        if self._beside is None:
            return step.run()
        assert (step.inputs[2] >= 0).all()
        runner, units = self._runner, self._runner.memory._units
        before = units.clone()
        aux = runner.model.new_aux(len(self._beside.token_ids))
        hidden = runner.model(self._beside, runner.memory, runner.backend, aux)
        wanted, wanted_units = runner.model.head(hidden), units.clone()
        units.copy_(before)
        computed = step.run()
        self._count(step)
        rows = self._rows(step.shape.num_tokens)
        torch.testing.assert_close(computed.logits[rows], wanted, atol=1e-4, rtol=1e-4)  # type: ignore[index]
        assert computed.hidden.isfinite().all()
        self._same_memory(before, wanted_units, units)
        return computed

    def _rows(self, num_tokens: int) -> list[int]:
        """The last ones of each share."""
        assert self._batch is not None
        counts = [len(seq.token_ids) for seq in self._batch.sequences]
        return [(i + 1) * num_tokens - n + j for i, n in enumerate(counts) for j in range(n)]

    def _same_memory(self, before: torch.Tensor, wanted: torch.Tensor, found: torch.Tensor) -> None:
        """But for the null page, which stays finite."""
        null = max(self._runner.memory._strides.values())
        assert found[:null].isfinite().all()
        before, wanted, found = before[null:], wanted[null:], found[null:]
        written = (before.view(torch.int32) != wanted.view(torch.int32)).any(-1)
        torch.testing.assert_close(found[written], wanted[written], atol=1e-4, rtol=1e-4)
        assert torch.equal(found[~written].view(torch.int32), before[~written].view(torch.int32))

    def _count(self, step: FixedStep) -> None:
        assert self._batch is not None
        columns = self._batch.columns
        padding = step.shape.num_tokens - columns.lengths
        self.met["padded"] += bool(padding.any())
        self.met["late"] += bool(padding.any() and (columns.token_ids == PENDING).any())
        before = (columns.starts - padding) // CHUNK < columns.starts // CHUNK
        self.met["over a border"] += bool(before.any())
        self.met["without guesses"] += bool((columns.lengths == 1).any())


def open_llm(folder: str, **options: Any) -> LLM:
    given = {"dtype": "float32", "device": "cpu", "page_size": 16, "max_running_requests": 5, "max_total_tokens": 4000}
    given |= {"disable_radix_cache": True, "progress": False, "speculative_adaptive": "off"}
    llm = LLM(folder, **{**given, **options})
    engine = llm._built.engine
    engine.scheduler.kv._on_empty = engine.runner.memory.poison
    return llm


def answers(llm: LLM, modes: Sequence[Mapping[str, Any]]) -> list[RequestOutput]:
    params = [
        SamplingParams(seed=n, max_tokens=TOKENS - 2 * (n % 5), ignore_eos=True, **modes[n % len(modes)])
        for n in range(COUNT)
    ]
    return llm.generate(PROMPTS, params, use_tqdm=False)


def vary(llm: LLM) -> None:
    """Three guesses are wanted, then one, then two."""
    engine, count = llm._built.engine, 0
    step = engine.step

    def stepped(inbox: Inbox = EMPTY) -> StepOutput:
        nonlocal count
        count += 1
        return step(replace(inbox, num_drafts=(3, 1, 2, 3)[count % 4]))

    engine.step = stepped  # type: ignore[method-assign]


def record(llm: LLM, plain: Sequence[RequestOutput]) -> None:
    """Guesses are right half of the time, and one request in four gets none."""
    known = {tuple(o.prompt_token_ids): o.outputs[0].token_ids for o in plain}

    def answer(row: DraftRow) -> Sequence[int]:
        return () if (row.params.seed or 0) % 4 == 3 else known[tuple(row.prompt_token_ids)]

    vocab_size = llm._built.model_config.vocab_size
    drafter = RecordedDrafter(answer, lambda row: 0.5, num_draft_tokens=STEPS, vocab_size=vocab_size)
    llm._built.engine.speculation = PluginSpeculation("recorded", drafter, num_drafts=STEPS, vocab_size=vocab_size)


def recorded(folder: str) -> Counter[str]:
    """The simple loop, guesses of the host, every way to draw."""
    plain = answers(open_llm(folder), MODES)
    llm = open_llm(folder, speculative_algorithm="NGRAM", speculative_num_steps=STEPS)
    record(llm, plain)
    return check(llm, MODES, plain)


def drafted(folder: str, draft: str) -> Counter[str]:
    """The relay, guesses that stay on the device, none for sequences that have grown long."""
    plain = answers(open_llm(folder), PLAIN)
    given = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": draft, "speculative_num_steps": STEPS}
    llm = open_llm(folder, speculative_option=("longest_context=60",), **given)
    engine = llm._built.engine
    engine.overlap, engine.scheduler.max_in_flight = True, 2
    return check(llm, PLAIN, plain)


def check(llm: LLM, modes: Sequence[Mapping[str, Any]], plain: Sequence[RequestOutput]) -> Counter[str]:
    vary(llm)
    runner = llm._built.engine.runner
    runner.graphs = checked = Checked(runner)  # type: ignore[assignment]
    for mine, theirs in zip(answers(llm, modes), plain, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids, (mine.outputs[0], theirs.outputs[0])
    return checked.met


if __name__ == "__main__":
    print(dict(recorded(sys.argv[1]) + drafted(sys.argv[1], sys.argv[2])))
