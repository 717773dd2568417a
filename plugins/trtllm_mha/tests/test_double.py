"""The whole backend on a CPU, FlashInfer's two functions doubled: its recorded signatures (two versions), the rules of its source, plain torch.

The double does as the kernels do with what lies past a sequence's end: it multiplies it by zero. Level D.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from l4core.plugin_api import Platform
from l4core.testing import contracts
from l4core.testing.conformance import Heads, QuickAttentionConformance
from l4core.testing.doubles.attention import Mask, check, paged_attention
from l4core.testing.platforms import fake_platform

CONTRACTS = Path(__file__).parents[3] / "tests" / "data" / "contracts"
DECODE = "flashinfer.decode:trtllm_batch_decode_with_kv_cache"
CONTEXT = "flashinfer.prefill:trtllm_batch_context_with_kv_cache"
COUNTERS = "multi_ctas_kv_counter_buffer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Double:
    """calls: (function, arguments by name), oldest first."""

    contract: contracts.Contract
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def decode(self, **given: object) -> torch.Tensor:
        a = self._arguments(DECODE, given)
        ragged = a["q_len_per_req"] is None
        check(ragged == (a["cum_seq_lens_q"] is not None) == (a["max_q_len"] is not None), "ragged rows want both")
        if a["backend"] == "xqa":
            check(not ragged and a["q_len_per_req"] == 1 and not a.get("return_lse"), "XQA: one row, no LSE")
            check(a["query"].is_contiguous() and a["out"].is_contiguous(), "XQA ignores strides of query and out")
            check(a["query"].dtype.itemsize == 2, "XQA takes 16-bit queries")
        else:
            check(a["backend"] == "trtllm-gen", f"backend {a['backend']} chooses for itself")
            check(a["query"].dtype == a["kv_cache"][0].dtype, "queries and keys of one dtype")
        rows = a["query"].shape[0]
        bounds = a["cum_seq_lens_q"].tolist() if ragged else list(range(0, rows + 1))
        safe = a["backend"] == "xqa" and a["kv_cache"][0].dtype.itemsize == 2
        return self._attention(a, bounds, Mask(causal=True), leaks=not safe)

    def context(self, **given: object) -> torch.Tensor:
        a = self._arguments(CONTEXT, given)
        check(a["query"].dtype == a["kv_cache"][0].dtype, "queries and keys of one dtype")
        lengths = a["seq_lens"].cumsum(0)
        check(torch.equal(a["cum_seq_lens_kv"][1:].long(), lengths) and a["cum_seq_lens_kv"][0] == 0, "cum_seq_lens_kv")
        check(a["batch_size"] == len(a["seq_lens"]) == len(a["cum_seq_lens_q"]) - 1, "batch_size")
        return self._attention(a, a["cum_seq_lens_q"].tolist(), Mask(causal=a["causal"]), leaks=True)

    def _arguments(self, name: str, given: dict[str, object]) -> dict[str, Any]:
        bound = self.contract.bind(name, **given)
        bound.apply_defaults()
        a = dict(bound.arguments)
        self.calls.append((name, a))
        k, v = a["kv_cache"]
        check(k.stride() == v.stride() and k.stride(-1) == 1, "the strides of the keys are taken for the values")
        check(a["kv_layout"] == "NHD", "memory is [pages, page size, KV heads, head dim]")
        check(a["seq_lens"].dtype == torch.int32 and bool((a["seq_lens"] > 0).all()), "seq_lens: int32, none empty")
        check(a["block_tables"].dtype == torch.int32 and a["block_tables"].dim() == 2, "block_tables: int32 [B, W]")
        check(a["out"].dtype in (torch.bfloat16, torch.float16), "out is 16-bit")
        check(a["workspace_buffer"].dtype == torch.uint8, "workspace: bytes")
        check(not a["workspace_buffer"].any(), "the workspace must be zero at first use")
        if a.get(COUNTERS) is not None:
            check(not a[COUNTERS].any(), "counters must be zero")
        for scale in (a["bmm1_scale"], a["bmm2_scale"]):
            check(isinstance(scale, float) or scale.dtype == torch.float32, "scales: float or float32")
        return a

    def _attention(self, a: dict[str, Any], bounds: list[int], mask: Mask, *, leaks: bool) -> torch.Tensor:
        k, v = a["kv_cache"]
        lengths = a["seq_lens"].tolist()
        out, lse = paged_attention(
            a["query"],
            k,
            v,
            bounds=bounds,
            lengths=lengths,
            table=a["block_tables"],
            scale=float(a["bmm1_scale"]),
            mask=mask,
        )
        for b, length in enumerate(lengths if leaks else ()):
            page, slot = divmod(length, k.shape[1])
            if slot:
                tail = v[int(a["block_tables"][b, page]), slot:].float().sum() * 0.0
                out[bounds[b] : bounds[b + 1]] += tail
        a["out"].copy_(out * float(a["bmm2_scale"]))
        if a.get("lse") is not None:
            check(a["lse"].dtype == torch.float32 and a["lse"].shape == out.shape[:2], "lse: float32 [T, Hq]")
            a["lse"].copy_(lse.transpose(0, 1) / math.log(2.0))
        result: torch.Tensor = a["out"]
        return result


def _signed(name: str, function: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    def call(**given: object) -> Any:
        return function(**given)

    call.__name__ = name.partition(":")[2]
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


@pytest.fixture
def double(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Double:
    """FlashInfer of the version that the test class names, importable."""
    made = Double(contract=contracts.load(CONTRACTS / f"flashinfer-python-{request.cls.version}.json"))
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    for name, function in ((DECODE, made.decode), (CONTEXT, made.context)):
        module = ModuleType(name.partition(":")[0])
        signed = _signed(name, function, made.contract.signature(name))
        setattr(module, signed.__name__, signed)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


@pytest.mark.usefixtures("double")
class OnDouble(QuickAttentionConformance):
    plugin, backend, level = "l4_trtllm_mha", "trtllm_mha", "D"
    heads = (
        Heads(num_q_heads=5, num_kv_heads=1, head_dim=128),
        Heads(num_q_heads=4, num_kv_heads=2, head_dim=128),
    )
    dtypes = (("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn"), ("float16", "float16"))
    options: ClassVar[Mapping[str, str]] = {"workspace_mb": "32"}
    version: ClassVar[str]
    arch: ClassVar[str] = "sm100"

    def platform(self) -> Platform:
        return fake_platform(self.arch, {"flashinfer": self.version})


class TestBlackwell(OnDouble):
    version = "0.7.2.post1"

    def test_newer_versions_get_counters_of_their_own(self, double: Double) -> None:
        c = self.simplest()
        problem = self.problem(self.case("decode at page borders"), c)
        backend = self.make(c.req)
        backend.attend(problem.q, problem.kv, backend.plan(problem.meta), problem.q.clone())
        assert double.calls[-1][1][COUNTERS] is not None


class TestBlackwellOlderVersion(OnDouble):
    version = "0.6.14"


class TestSibling(OnDouble):
    version, arch = "0.6.14", "sm90"
    options: ClassVar[Mapping[str, str]] = {"workspace_mb": "32", "sibling": "xqa"}


class TestCalls:
    """Which function each phase reaches, and what is static in it."""

    version = "0.7.2.post1"

    @pytest.fixture
    def kit(self, double: Double) -> TestBlackwell:
        return TestBlackwell()

    @pytest.mark.parametrize(
        ("case", "function", "rows"),
        [
            ("decode at page borders", DECODE, 1),
            ("chain verify", DECODE, None),
            ("whole prefill", CONTEXT, None),
            ("tree verify", CONTEXT, None),
        ],
    )
    def test_phases(self, kit: TestBlackwell, double: Double, case: str, function: str, rows: int | None) -> None:
        wanted = kit.case(case)
        c = kit.usable(wanted)[0]
        problem = kit.problem(wanted, c)
        backend = kit.make(c.req)
        backend.attend(problem.q, problem.kv, backend.plan(problem.meta), problem.q.clone())
        ((name, call),) = double.calls
        assert name == function
        if function == DECODE:
            assert call["q_len_per_req"] == rows
            assert call["max_seq_len"] == problem.meta.max_seqlen_k  # a host bound: the same at every replay
        else:
            assert call["causal"] is (problem.meta.tree is None)
            assert (call["max_q_len"], call["max_kv_len"]) == (problem.meta.max_seqlen_q, problem.meta.max_seqlen_k)

    def test_values_of_other_strides_are_refused(self, kit: TestBlackwell) -> None:
        c = kit.simplest()
        problem = kit.problem(kit.case("decode at page borders"), c)
        backend = kit.make(c.req)
        kv = replace(problem.kv, v=problem.kv.v.contiguous())
        with pytest.raises(ValueError, match="keys have strides"):
            backend.attend(problem.q, kv, backend.plan(problem.meta), problem.q.clone())
