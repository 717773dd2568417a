"""What all tests of the attention kit are made of: which combinations are tried, a backend made as core makes it, a problem, a comparison."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pytest
import torch

from l4core.attention.verdicts import choose_page_size, hold_to
from l4core.platform import Platform, detect
from l4core.plugin_api import (
    AttentionBackend,
    AttentionBackendEntry,
    AttentionContext,
    AttentionRequirements,
    Plan,
    Usable,
)
from l4core.plugin_entries import import_object
from l4core.testing.conformance.cases import Case, Heads, all_cases
from l4core.testing.conformance.device import is_accelerator, oracle_device
from l4core.testing.conformance.entry import find_entry, version_of
from l4core.testing.conformance.problem import Layout, Problem, build

__all__ = ["LEVELS", "Combination", "KitSetup"]

LEVELS: Mapping[str, str] = {
    "R": "ran on its hardware",
    "S": "ran on sibling hardware",
    "V": "vendor kernel executed on a CPU",
    "X": "cross-compiled for the target",
    "D": "double with the vendor's real schema",
    "P": "parsed signature only",
}
CPU_CHUNK, DEVICE_CHUNK = 128, 1024

RELEASED = tuple(Heads(num_q_heads=40 // tp, num_kv_heads=8 // tp, head_dim=128) for tp in (1, 2, 4, 8))
"""Scout and Maverick on one rank under TP 1, 2, 4, 8."""
ODD = (
    Heads(num_q_heads=8, num_kv_heads=2, head_dim=64),
    Heads(num_q_heads=3, num_kv_heads=3, head_dim=128),
    Heads(num_q_heads=7, num_kv_heads=1, head_dim=32),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """Requirements with a page size that the backend accepts, its verdict, and how memory is laid out."""

    req: AttentionRequirements
    verdict: Usable
    page_stride: Literal["free", "dense"]
    table: Literal["ring", "full"]

    @property
    def heads(self) -> Heads:
        req = self.req
        return Heads(num_q_heads=req.num_q_heads, num_kv_heads=req.num_kv_heads, head_dim=req.head_dim)

    @property
    def layout(self) -> Layout:
        req = self.req
        assert req.page_size is not None
        return Layout(
            page_size=req.page_size,
            q_dtype=getattr(torch, req.q_dtype),
            kv_dtype=getattr(torch, req.kv_dtype),
            page_stride=self.page_stride,
            table=self.table,
        )

    def __str__(self) -> str:
        req = self.req
        return (
            f"{req.num_q_heads}/{req.num_kv_heads} heads of {req.head_dim}, queries {req.q_dtype}, KV {req.kv_dtype}, page {req.page_size}, "
            f"{self.page_stride} pages"
            + (f", chunk {req.chunk_size}, {self.table} table" if self.verdict.native_chunk else "")
        )


class KitSetup:
    """Set `plugin` and `backend`; device: torch device string of the machine the tests run on.  options: as from --attention-option.
    heads, dtypes, page_sizes: what is tried; the probe says which combinations count, and one must be usable.
    combinations: at most so many for each case, dealt so that different cases meet different ones; None = all.
    chunk: tokens, a multiple of every page size; None = 128 on a CPU, 1024 on an accelerator.
    tolerance: largest |error| / (1 + |expected|) by dtype of KV if that is fp8, else of queries; outputs are of size 1.
    far_on_cpu: try element offsets past 2³² on a CPU too; a backend that copies all of KV would take all of the machine's memory.
    level: what a green run proves, one of LEVELS."""

    plugin: ClassVar[str]
    backend: ClassVar[str]
    device: ClassVar[str] = "cpu"
    options: ClassVar[Mapping[str, str]] = {}
    level: ClassVar[str] = "R"
    heads: ClassVar[tuple[Heads, ...]] = (*RELEASED, *ODD)
    dtypes: ClassVar[tuple[tuple[str, str], ...]] = (
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("bfloat16", "float8_e4m3fn"),
        ("bfloat16", "float8_e4m3fnuz"),
    )
    page_sizes: ClassVar[tuple[int, ...]] = (1, 2, 4, 8, 16, 32, 64, 128)
    combinations: ClassVar[int | None] = 4
    chunk: ClassVar[int | None] = None
    far_on_cpu: ClassVar[bool] = False
    tolerance: ClassVar[Mapping[str, float]] = {
        "float32": 2e-5,
        "bfloat16": 2e-2,
        "float16": 3e-3,
        "float8_e4m3fn": 0.1,
        "float8_e4m3fnuz": 0.1,
    }

    # ------------------------------------------------------------ the backend

    @property
    def entry(self) -> AttentionBackendEntry:
        return find_entry(self.plugin, "l4_attention_backends", self.backend, AttentionBackendEntry)

    def platform(self) -> Platform:
        """The machine probed; override it to test on a double of another device."""
        return detect(self.device)

    def make(self, req: AttentionRequirements) -> AttentionBackend:
        assert req.page_size is not None
        context = AttentionContext(
            requirements=req,
            platform=self.platform(),
            device=self.device,
            page_size=req.page_size,
            options=self.options,
            logger=logging.getLogger(__name__),
        )
        backend = import_object(self.entry.create)(context)
        assert isinstance(backend, AttentionBackend), f"create returned {type(backend).__name__}"
        return backend

    # ------------------------------------------------------------ what is tried

    @property
    def chunk_size(self) -> int:
        return self.chunk or (DEVICE_CHUNK if is_accelerator(self.device) else CPU_CHUNK)

    def case(self, name: str) -> Case:
        return all_cases(self.chunk_size)[name]

    def grid(self) -> Iterator[AttentionRequirements]:
        """Every page size with every dtype, the head counts taking turns, so that all pairs meet."""
        rounds = max(1, -(-len(self.heads) // len(self.page_sizes)))
        for i, page_size in enumerate(self.page_sizes * rounds):
            for j, (q_dtype, kv_dtype) in enumerate(self.dtypes):
                yield self.requirements(self.heads[(i + j) % len(self.heads)], q_dtype, kv_dtype, page_size)

    def requirements(self, heads: Heads, q_dtype: str, kv_dtype: str, page_size: int | None) -> AttentionRequirements:
        return AttentionRequirements(
            num_q_heads=heads.num_q_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
            page_size=page_size,
            chunk_size=self.chunk_size,
            max_num_seqs=64,
            max_num_tokens=max(1024, 4 * self.chunk_size),
        )

    def usable(self, case: Case | None = None, *, needs_graph: bool = False) -> list[Combination]:
        """All combinations the probe accepts for what `case` needs. Skips the test, with the backend's reason, when there is none."""
        drafts, trees = (case.num_draft_tokens, case.trees is not None) if case else (0, False)
        platform, entry = self.platform(), self.entry
        found: list[Combination] = []
        refusals: list[str] = []
        for req in self.grid():
            asked = replace(req, num_draft_tokens=drafts, needs_tree=trees, needs_graph=needs_graph)
            verdict = hold_to(entry.probe(platform, asked), asked)
            if not isinstance(verdict, Usable):
                refusals.append(verdict.reason)
                continue
            if case and case.has_empty_rows and not case.virtual and not verdict.empty_rows:
                refusals.append("empty_rows is not declared")
                continue
            dense = verdict.page_stride == "dense" or len(found) % 3 == 2  # who takes any stride takes that one too
            table: Literal["ring", "full"] = "ring" if len(found) % 2 == 0 else "full"
            found.append(Combination(req=asked, verdict=verdict, page_stride="dense" if dense else "free", table=table))
        if not found:
            pytest.skip(f"{self.who()}: {_most_telling(refusals)}")
        return found

    def dealt(self, case: Case, *, needs_graph: bool = False) -> list[Combination]:
        """At most `combinations` of the usable ones, evenly spread, beginning where the case's name says."""
        found = self.usable(case, needs_graph=needs_graph)
        count = len(found) if self.combinations is None else min(self.combinations, len(found))
        first = zlib.crc32(case.name.encode())
        return [found[(first + i * len(found) // count) % len(found)] for i in range(count)]

    def simplest(self, *, needs_graph: bool = False) -> Combination:
        """The first usable combination, at the backend's own page size."""
        first = self.usable(needs_graph=needs_graph)[0]
        free = replace(first.req, page_size=None)
        return replace(first, req=replace(first.req, page_size=choose_page_size(first.verdict, free)))

    # ------------------------------------------------------------ running and comparing

    def problem(self, case: Case, combination: Combination, *, seed: int = 0, layout: Layout | None = None) -> Problem:
        return build(
            case,
            combination.heads,
            layout or combination.layout,
            combination.verdict,
            self.device,
            oracle=oracle_device(self.device),
            seed=seed,
        )

    def run(
        self,
        backend: AttentionBackend,
        problem: Problem,
        combination: Combination,
        what: str,
        *,
        plan: Plan | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output of plan and attend (of attend, where `plan` is given), NaN where nothing was written. Whatever the backend raises becomes
        an AssertionError that names it and the case."""
        if out is None:
            out = torch.full_like(problem.q, torch.nan, memory_format=torch.contiguous_format)
        try:
            backend.attend(problem.q, problem.kv, backend.plan(problem.meta) if plan is None else plan, out)
        except Exception as error:
            raise AssertionError(
                f"{self.who(combination)}, case {what!r}: {type(error).__name__}: {error}, for {combination}"
            ) from error
        return out

    def check(self, found: torch.Tensor, problem: Problem, combination: Combination, what: str) -> None:
        """AssertionError that names backend, version, provider, case and combination when any owned row is off."""
        wanted = problem.expected
        error = ((found.cpu().double() - wanted).abs() / (1 + wanted.abs()))[problem.owned].amax().item()
        limit = self.limit(combination)
        assert error <= limit, (
            f"{self.who(combination)}, case {what!r}: largest error {error:.3g}, wanted {limit:g}, for {combination}"
        )

    def limit(self, combination: Combination) -> float:
        req = combination.req
        return self.tolerance[req.kv_dtype if req.kv_dtype.startswith("float8") else req.q_dtype]

    def who(self, combination: Combination | None = None) -> str:
        """Backend, version and provider, as failures quote them."""
        provider = combination.verdict.provider if combination else ""
        return f"{self.backend} ({version_of(self.plugin)}{', ' if provider else ''}{provider})"


def _most_telling(refusals: list[str]) -> str:
    """The commonest reason: most combinations are refused for what the case needs."""
    return max(refusals, key=refusals.count) if refusals else "nothing was tried"
