"""The kit for attention backends: every case against float64 answers from the definition, and the promises about plans, state and inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from l4core.platform import detect
from l4core.plugin_api import Usable
from l4core.testing.conformance.cases import CASE_NAMES, Heads
from l4core.testing.conformance.device_tests import DeviceTests
from l4core.testing.conformance.problem import OUR_LAYER
from l4core.testing.conformance.setup import LEVELS, Combination

__all__ = ["AttentionConformance", "QuickAttentionConformance"]


HUGE_BYTE = 0x7F
"""Repeated it is 3e38 in float32 and bfloat16, NaN in float16 and fp8."""


class AttentionConformance(DeviceTests):
    """Attributes: see KitSetup."""

    def test_something_is_usable_here(self) -> None:
        platform, entry = self.platform(), self.entry
        answers = [entry.probe(platform, req) for req in self.grid()]
        assert any(isinstance(answer, Usable) for answer in answers), (
            f"no combination is usable on {platform}; the first answer: {answers[0]}"
        )

    def test_the_level_is_one_and_is_true(self) -> None:
        """R and S are for real machines; whoever probes a platform of another is a double (D), an interpreter (V) or less."""
        assert self.level in LEVELS, f"level is {self.level!r}; wanted one of {', '.join(LEVELS)}"
        if self.level in "RS":
            real, probed = detect(self.device), self.platform()
            assert probed == real, f"level {self.level} on a fake platform: probed {probed}, found {real}"

    @pytest.mark.parametrize("case", CASE_NAMES)
    def test_equals_the_definition(self, case: str) -> None:
        """Each case in `combinations` of the usable combinations of heads, dtypes and page sizes; NaN in all slots that no sequence owns."""
        wanted = self.case(case)
        for combination in self.dealt(wanted):
            problem = self.problem(wanted, combination)
            self.check(self.run(self.make(combination.req), problem, combination, case), problem, combination, case)

    def test_plans_outlive_later_plans(self) -> None:
        """Plan n + 1 may be made before attend n, and one plan serves many layers."""
        c = self.simplest()
        backend = self.make(c.req)
        decode, prefill = self.case("decode at page borders"), self.case("ragged prefill on a prefix")
        first, second = self.problem(decode, c), self.problem(prefill, c, seed=1)
        layer = self.problem(decode, c)  # the same tables, as another layer has them
        layer.memory[
            :, OUR_LAYER, 1
        ].neg_()  # in place, since some backends need the strides of the keys; a dense view would span all layers
        layer = replace(layer, expected=-layer.expected)
        plans = [backend.plan(first.meta), backend.plan(second.meta)]
        for problem, plan in ((first, plans[0]), (second, plans[1]), (layer, plans[0])):
            out = self.run(backend, problem, c, "plans made ahead", plan=plan)
            self.check(out, problem, c, "plans made ahead")

    def test_two_backends_share_nothing(self) -> None:
        """Two engines in one process, of different page sizes where the backend takes several."""
        found = self.usable()
        x, y = found[0], found[-1]
        a, b = self.make(x.req), self.make(y.req)
        one = self.problem(self.case("ragged prefill on a prefix"), x)
        two = self.problem(self.case("decode at page borders"), y, seed=1)
        plan_a, plan_b = a.plan(one.meta), b.plan(two.meta)
        out_b = self.run(b, two, y, "second of two backends", plan=plan_b)
        out_a = self.run(a, one, x, "first of two backends", plan=plan_a)
        self.check(out_a, one, x, "first of two backends")
        self.check(out_b, two, y, "second of two backends")

    def test_inputs_are_only_read(self) -> None:
        """Keys, values, queries and metadata are the same bits afterwards."""
        c = self.simplest()
        problem = self.problem(self.case("ragged prefill on a prefix"), c)
        meta = problem.meta
        inputs = (problem.q, problem.memory, meta.cu_seqlens_q, meta.seq_lens, meta.block_table)
        before = [_bits(x) for x in inputs]
        self.run(self.make(c.req), problem, c, "inputs are only read")
        for x, old in zip(inputs, before, strict=True):
            assert torch.equal(_bits(x), old), f"{self.who(c)} wrote to its inputs, for {c}"

    @pytest.mark.parametrize("case", ["decode at page borders", "ragged prefill on a prefix"])
    def test_a_row_is_the_same_alone(self, case: str) -> None:
        """A sequence gets the same answer in a batch and by itself, within the tolerance of its dtype."""
        c = self.simplest()
        whole = self.problem(self.case(case), c)
        together = self.run(self.make(c.req), whole, c, case)
        bounds, lens = whole.meta.cu_seqlens_q.tolist(), whole.meta.seq_lens.tolist()
        for b, length in enumerate(lens):
            rows = slice(bounds[b], bounds[b + 1])
            alone = replace(
                whole.meta,
                cu_seqlens_q=whole.meta.cu_seqlens_q[b : b + 2] - bounds[b],
                seq_lens=whole.meta.seq_lens[b : b + 1],
                block_table=whole.meta.block_table[b : b + 1],
                max_seqlen_q=bounds[b + 1] - bounds[b],
                max_seqlen_k=length,
                num_seqs=1,
            )
            row = replace(
                whole,
                meta=alone,
                q=whole.q[rows],
                expected=together[rows].cpu().double(),
                owned=whole.owned[rows],
            )
            what = f"{case}: sequence {b} alone"
            self.check(self.run(self.make(c.req), row, c, what), row, c, what)

    def test_neighbours_do_not_leak(self) -> None:
        """What other sequences hold changes nothing, bit for bit: their keys, values and queries are replaced by huge ones."""
        c = self.simplest()
        problem = self.problem(self.case("prefill and decode mixed"), c)
        backend = self.make(c.req)
        bounds = problem.meta.cu_seqlens_q.tolist()
        mine = slice(bounds[1], bounds[2])
        before = self.run(backend, problem, c, "neighbours")[mine].clone()
        pages = self._pages_of_others(problem.meta.block_table, 1, c, problem.meta.seq_lens.tolist())
        problem.memory.view(torch.uint8)[pages] = HUGE_BYTE
        q = problem.q.clone()
        q[: mine.start], q[mine.stop :] = 3.0, -2.0
        after = self.run(backend, replace(problem, q=q), c, "neighbours")[mine]
        assert torch.equal(before, after), f"{self.who(c)}: a sequence's output depends on its neighbours, for {c}"

    def _pages_of_others(self, table: torch.Tensor, b: int, c: Combination, lens: list[int]) -> torch.Tensor:
        """Pages of memory (not of a dense view) that sequences other than b use."""
        assert c.req.page_size is not None
        used = [row[: -(-length // c.req.page_size)] for row, length in zip(table.tolist(), lens, strict=True)]
        pages = torch.tensor([page for i, row in enumerate(used) if i != b for page in row])
        return (pages // 4 if c.page_stride == "dense" else pages).to(self.device)


class QuickAttentionConformance(AttentionConformance):
    """The same cases at sizes an interpreter can bear: one combination a case, two head counts, chunks of 64, pages of 16 and 64."""

    combinations = 1
    chunk = 64
    heads = (
        Heads(num_q_heads=5, num_kv_heads=1, head_dim=128),
        Heads(num_q_heads=4, num_kv_heads=2, head_dim=64),
    )
    page_sizes = (16, 64)


def _bits(x: torch.Tensor) -> torch.Tensor:
    """A copy of the bytes: NaN included, whatever the dtype."""
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)
