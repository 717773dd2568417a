"""The whole backend on a CPU, through the real operator schema of each library: level D. What the operators check, the doubles check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from l4_fa3.backend import Fa3Backend
from l4core.plugin_api import Platform
from l4core.testing import contracts, doubles
from l4core.testing.conformance import QuickAttentionConformance
from l4core.testing.platforms import fake_platform

CONTRACTS = Path(__file__).parents[3] / "tests" / "data" / "contracts"


class OnDouble(QuickAttentionConformance):
    plugin, backend, level = "l4_fa3", "fa3", "D"
    dtypes = (("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn"), ("float16", "float16"))
    contract: ClassVar[str]
    library: ClassVar[tuple[str, str]]

    def platform(self) -> Platform:
        return fake_platform("sm90", dict([self.library]))

    @pytest.fixture(autouse=True)
    def double(self) -> Iterator[doubles.Double]:
        with doubles.fa3(contracts.load(CONTRACTS / self.contract)) as double:
            yield double

    def test_the_schedule_is_made_once_a_step(self, double: doubles.Double) -> None:
        """Each layer's call carries it; one made for another call would be refused by the double."""
        c = self.simplest()
        problem = self.problem(self.case("ragged prefill on a prefix"), c)
        backend = self.make(c.req)
        plan = backend.plan(problem.meta)
        for _ in range(3):
            backend.attend(problem.q, problem.kv, plan, problem.q.clone())
        schedules = [call["scheduler_metadata"] for call in double.calls]
        assert len(schedules) == 3
        assert schedules[0] is not None
        assert all(schedule.data_ptr() == schedules[0].data_ptr() for schedule in schedules)

    def test_nothing_else_is_asked_of_the_kernel(self, double: doubles.Double) -> None:
        """No window, no chunk, no soft cap; output written in place."""
        c = self.simplest()
        problem = self.problem(self.case("decode at page borders"), c)
        backend = self.make(c.req)
        backend.attend(problem.q, problem.kv, backend.plan(problem.meta), problem.q.clone())
        call = double.calls[-1]
        assert (call["window_size_left"], call["window_size_right"], call["softcap"]) == (-1, -1, 0.0)
        assert call.get("attention_chunk", 0) == 0
        assert call["is_causal"] is True
        assert call["out"] is not None

    def test_no_prefix_is_no_prefix_whichever_infinity_says_so(self) -> None:
        """Builds differ in the log-sum-exp of a row without keys; a tree at a sequence's start has such rows."""
        case = self.case("tree verify")
        assert any(length == n for length, n in zip(case.seq_lens, case.q_lens, strict=True))
        c = self.usable(case)[0]
        problem = self.problem(case, c)
        backend = self.make(c.req)
        assert isinstance(backend, Fa3Backend)
        fwd = backend.library.fwd

        def positive(*arguments: object) -> list[torch.Tensor]:
            out, lse, *rest = fwd.call(*arguments)
            return [out, torch.where(lse.isneginf(), torch.inf, lse), *rest]

        backend.library = replace(backend.library, fwd=replace(fwd, call=positive))
        out = torch.full_like(problem.q, torch.nan, memory_format=torch.contiguous_format)
        backend.attend(problem.q, problem.kv, backend.plan(problem.meta), out)
        self.check(out, problem, c, "+inf for no keys")


class TestTokenspeed(OnDouble):
    contract, library = "tokenspeed-fa3-3.0.0.post20260810.json", ("flash_attn_interface", "3.0.0.post20260810")


class TestSglKernel(OnDouble):
    contract, library = "sglang-kernel-0.4.10.json", ("sgl_kernel", "0.4.10")


class TestVllm(OnDouble):
    contract, library = "vllm-0.33.0.json", ("vllm", "0.33.0")
