"""The kit for attention backends: every case against float64 answers from the definition."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from l4core.attention.verdicts import choose_page_size, hold_to
from l4core.platform import detect
from l4core.plugin_api import (
    AttentionBackend,
    AttentionBackendEntry,
    AttentionContext,
    AttentionRequirements,
    Platform,
    Usable,
)
from l4core.plugin_entries import import_object
from l4core.testing.conformance_cases import Case, Heads, Problem, build
from l4core.testing.conformance_entry import find_entry

__all__ = ["AttentionConformance"]

CHUNK = 128

PLAIN = (
    Case(name="one token", seq_lens=(1,), q_lens=(1,), phase="decode"),
    Case(name="decode at page borders", seq_lens=(1, 15, 16, 17, 63, 64, 65, 130), q_lens=(1,) * 8, phase="decode"),
    Case(name="long decode", seq_lens=(700, 3, 513), q_lens=(1, 1, 1), phase="decode"),
    Case(name="whole prefill", seq_lens=(77, 1, 64), q_lens=(77, 1, 64), phase="prefill"),
    Case(name="ragged prefill on a prefix", seq_lens=(90, 128, 66, 17), q_lens=(13, 64, 1, 16), phase="prefill"),
    Case(name="chain verify", seq_lens=(66, 5, 130), q_lens=(5, 5, 5), phase="verify"),
)
CHUNKED = (
    Case(name="local decode", seq_lens=(127, 128, 129, 256, 257, 3), q_lens=(1,) * 6, phase="decode", chunk=CHUNK),
    Case(
        name="local prefill, a piece a chunk",
        seq_lens=(150, 128, 300),
        q_lens=(22, 128, 9),
        phase="prefill",
        chunk=CHUNK,
    ),
    Case(
        name="prefill over a border",
        seq_lens=(150, 132, 128, 40, 259),
        q_lens=(50, 10, 30, 40, 3),
        phase="prefill",
        chunk=CHUNK,
        virtual=2,
    ),
    Case(
        name="verify at a border",
        seq_lens=(128, 129, 130, 133, 9),
        q_lens=(5, 5, 5, 5, 5),
        phase="verify",
        chunk=CHUNK,
        virtual=2,
    ),
)
EMPTY = Case(name="empty rows", seq_lens=(0, 40, 0, 64), q_lens=(1, 1, 1, 1), phase="decode")


class AttentionConformance:
    """Set `plugin` and `backend`; device: torch device string of the machine the tests run on.  options: as from --attention-option.
    heads, dtypes, page_sizes: what is tried; the probe says which combinations count, and one of each must be usable.
    tolerance: largest |error| by query dtype, outputs being of size 1."""

    plugin: ClassVar[str]
    backend: ClassVar[str]
    device: ClassVar[str] = "cpu"
    options: ClassVar[Mapping[str, str]] = {}
    heads: ClassVar[tuple[Heads, ...]] = (
        Heads(num_q_heads=5, num_kv_heads=1, head_dim=128),
        Heads(num_q_heads=8, num_kv_heads=2, head_dim=64),
        Heads(num_q_heads=3, num_kv_heads=3, head_dim=128),
    )
    dtypes: ClassVar[tuple[tuple[str, str], ...]] = (
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("bfloat16", "float8_e4m3fn"),
    )
    page_sizes: ClassVar[tuple[int, ...]] = (1, 16, 32, 64, 128)
    tolerance: ClassVar[Mapping[str, float]] = {
        "float32": 2e-5,
        "bfloat16": 2.5e-2,
        "float16": 4e-3,
        "float8_e4m3fn": 0.1,
    }

    # ------------------------------------------------------------ what the tests are made of

    @property
    def entry(self) -> AttentionBackendEntry:
        return find_entry(self.plugin, "l4_attention_backends", self.backend, AttentionBackendEntry)

    def platform(self) -> Platform:
        """The machine probed; override it to test on a double of another device."""
        return detect(self.device)

    def grid(self) -> Iterator[AttentionRequirements]:
        """Every page size with every dtype, the head counts taking turns, so that all pairs meet."""
        for i, page_size in enumerate(self.page_sizes):
            for j, (q_dtype, kv_dtype) in enumerate(self.dtypes):
                yield self._requirements(self.heads[(i + j) % len(self.heads)], q_dtype, kv_dtype, page_size)

    def _requirements(self, heads: Heads, q_dtype: str, kv_dtype: str, page_size: int | None) -> AttentionRequirements:
        return AttentionRequirements(
            num_q_heads=heads.num_q_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
            page_size=page_size,
            chunk_size=CHUNK,
            max_num_seqs=16,
            max_num_tokens=1024,
        )

    def usable(self) -> list[tuple[AttentionRequirements, Usable]]:
        """All combinations the probe accepts."""
        platform, entry = self.platform(), self.entry
        pairs = [(req, hold_to(entry.probe(platform, req), req)) for req in self.grid()]
        return [(req, verdict) for req, verdict in pairs if isinstance(verdict, Usable)]

    def simplest(self) -> tuple[AttentionRequirements, Usable]:
        """The first usable combination at the backend's own page size."""
        req, verdict = self.usable()[0]
        free = replace(req, page_size=None)
        return replace(req, page_size=choose_page_size(verdict, free)), verdict

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

    def problem(self, case: Case, req: AttentionRequirements, verdict: Usable, seed: int = 0) -> Problem:
        assert req.page_size is not None
        return build(
            case,
            Heads(num_q_heads=req.num_q_heads, num_kv_heads=req.num_kv_heads, head_dim=req.head_dim),
            page_size=req.page_size,
            q_dtype=getattr(torch, req.q_dtype),
            kv_dtype=getattr(torch, req.kv_dtype),
            verdict=verdict,
            device=self.device,
            seed=seed,
        )

    def check(self, found: torch.Tensor, problem: Problem, req: AttentionRequirements, what: str) -> None:
        key = req.kv_dtype if req.kv_dtype.startswith("float8") else req.q_dtype
        error = (found.cpu().double() - problem.expected)[problem.owned].abs().max().item()
        assert error <= self.tolerance[key], (
            f"{what}: largest error {error:.3g}, wanted {self.tolerance[key]:g}, for {req}"
        )

    def run(self, backend: AttentionBackend, problem: Problem) -> torch.Tensor:
        out = torch.full_like(problem.q, torch.nan, memory_format=torch.contiguous_format)
        backend.attend(problem.q, problem.kv, backend.plan(problem.meta), out)
        return out

    # ------------------------------------------------------------ the tests

    def test_something_is_usable_here(self) -> None:
        req = self._requirements(self.heads[0], *self.dtypes[0], None)
        assert self.usable(), (
            f"no combination is usable on {self.platform()}; the first answer: {self.entry.probe(self.platform(), req)}"
        )

    @pytest.mark.parametrize("case", [*PLAIN, *CHUNKED], ids=lambda case: case.name)
    def test_equals_the_definition(self, case: Case) -> None:
        """Every usable combination of heads, dtypes and page sizes; NaN in all slots that no sequence owns."""
        for req, verdict in self.usable():
            problem = self.problem(case, req, verdict)
            self.check(self.run(self.make(req), problem), problem, req, case.name)

    def test_empty_rows_harm_nobody(self) -> None:
        """Where empty rows are declared: decode rows without keys (padding) leave their neighbours right. What they hold afterwards is free."""
        for req, verdict in self.usable():
            if verdict.empty_rows:
                problem = self.problem(EMPTY, req, verdict)
                self.check(self.run(self.make(req), problem), problem, req, EMPTY.name)

    def test_plans_outlive_later_plans(self) -> None:
        """Plan n + 1 may be made before attend n, and one plan serves many layers."""
        req, verdict = self.simplest()
        backend = self.make(req)
        first, second = (self.problem(case, req, verdict, seed) for seed, case in enumerate((PLAIN[1], PLAIN[4])))
        layer = self.problem(PLAIN[1], req, verdict, seed=0)  # the same tables, as another layer has them
        layer = replace(layer, kv=replace(layer.kv, v=-layer.kv.v), expected=-layer.expected)
        plans = [backend.plan(first.meta), backend.plan(second.meta)]
        for problem, plan in ((first, plans[0]), (second, plans[1]), (layer, plans[0])):
            out = torch.empty_like(problem.q)
            backend.attend(problem.q, problem.kv, plan, out)
            self.check(out, problem, req, "plans made ahead")

    def test_two_backends_share_nothing(self) -> None:
        """Two engines in one process, of different page sizes where the backend takes several."""
        pairs = self.usable()
        (req_a, verdict_a), (req_b, verdict_b) = pairs[0], pairs[-1]
        a, b = self.make(req_a), self.make(req_b)
        one, two = self.problem(PLAIN[4], req_a, verdict_a), self.problem(PLAIN[1], req_b, verdict_b, seed=1)
        plan_a, plan_b = a.plan(one.meta), b.plan(two.meta)
        outs = torch.empty_like(one.q), torch.empty_like(two.q)
        b.attend(two.q, two.kv, plan_b, outs[1])
        a.attend(one.q, one.kv, plan_a, outs[0])
        self.check(outs[0], one, req_a, "first of two backends")
        self.check(outs[1], two, req_b, "second of two backends")

    def test_inputs_are_only_read(self) -> None:
        """Keys, values, queries and metadata are the same bits afterwards."""
        req, verdict = self.simplest()
        problem = self.problem(PLAIN[4], req, verdict)
        meta = problem.meta
        inputs = (problem.q, problem.kv.k, problem.kv.v, meta.cu_seqlens_q, meta.seq_lens, meta.block_table)
        before = [x.clone() for x in inputs]
        self.run(self.make(req), problem)
        for x, old in zip(inputs, before, strict=True):
            assert torch.equal(x.nan_to_num(7.0), old.nan_to_num(7.0))
            assert torch.equal(x.isnan(), old.isnan())

    def test_a_row_is_the_same_alone(self) -> None:
        """A sequence gets the same answer in a batch and by itself, within the tolerance of its dtype."""
        req, verdict = self.simplest()
        case = PLAIN[1]
        whole = self.problem(case, req, verdict)
        together = self.run(self.make(req), whole)
        for b in range(len(case.seq_lens)):
            alone = replace(
                whole.meta,
                cu_seqlens_q=whole.meta.cu_seqlens_q[:2],
                seq_lens=whole.meta.seq_lens[b : b + 1],
                block_table=whole.meta.block_table[b : b + 1],
                max_seqlen_k=case.seq_lens[b],
                num_seqs=1,
            )
            row = replace(
                whole,
                meta=alone,
                q=whole.q[b : b + 1],
                expected=together[b : b + 1].cpu().double(),
                owned=whole.owned[b : b + 1],
            )
            self.check(self.run(self.make(req), row), row, req, f"row {b} alone")
