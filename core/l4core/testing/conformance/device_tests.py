"""The kit's tests that need an accelerator: graphs replayed with other lengths, no hidden host sync, memory as claimed, offsets past 2³²."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from l4core.platform import free_memory
from l4core.plugin_api import AttentionBackend, Tier
from l4core.testing.conformance.cases import Case
from l4core.testing.conformance.device import (
    can_capture,
    can_find_syncs,
    capture,
    is_accelerator,
    no_host_sync,
    peak_bytes,
)
from l4core.testing.conformance.problem import LAYERS, Problem
from l4core.testing.conformance.setup import Combination, KitSetup

__all__ = ["DeviceTests"]

GRAPHED = ("decode at page borders", "chain verify", "local decode", "verify at a border", "tree verify")
SYNCED = (*GRAPHED, "ragged prefill on a prefix", "local prefill, a piece a chunk", "local tree over a border")
WORKSPACE_SLACK = 1 << 20
"""Bytes beyond the claim that are the allocator's rounding, not the backend's."""
FAR = 5 << 30
"""Elements from the first to the last of a layer's keys: past 2³² by a quarter."""
RELEASED_CHUNK = 8192


class DeviceTests(KitSetup):
    """Skipped, with the reason, where the machine or the verdict has no such thing."""

    # ------------------------------------------------------------ graphs

    @pytest.mark.parametrize("case", GRAPHED)
    def test_a_captured_graph_replays_other_lengths(self, case: str) -> None:
        """Plan and attend are captured once and replayed on tables, lengths and memory of other sequences: right, and as the eager run."""
        if not can_capture(self.device):
            pytest.skip(f"device {self.device} has no graphs")
        first, second = self.case(case), _other_lengths(self.case(case))
        for c in self.dealt(first, needs_graph=True):
            backend = self.make(c.req)
            captured, later = self._same_shapes(first, second, c)
            out = torch.full_like(captured.q, torch.nan, memory_format=torch.contiguous_format)

            def step(b: AttentionBackend = backend, p: Problem = captured, o: torch.Tensor = out) -> None:
                b.attend(p.q, p.kv, b.plan(p.meta), o)

            replay = capture(self.device, step)
            replay()
            self.check(out, captured, c, f"{case}, captured")
            _copy_into(captured, later)
            replay()
            replayed = out.clone()
            self.check(replayed, later, c, f"{case}, replayed with other lengths")
            eager = self.run(backend, captured, c, case)
            off = (replayed.double() - eager.double())[later.owned].abs().amax().item()
            assert off <= self.limit(c), f"{self.who(c)}, case {case!r}: replay and eager differ by {off:.3g}, for {c}"

    def _same_shapes(self, first: Case, second: Case, c: Combination) -> tuple[Problem, Problem]:
        """Two problems of the same shapes and host bounds."""
        page_size = c.layout.page_size
        columns = max(-(-max(case.seq_lens) // page_size) for case in (first, second))
        pages = 8 + sum(-(-length // page_size) for case in (first, second) for length in case.seq_lens)
        layout = replace(c.layout, columns=columns, num_pages=pages, max_seqlen_k=columns * page_size)
        return self.problem(first, c, layout=layout), self.problem(second, c, layout=layout, seed=1)

    # ------------------------------------------------------------ host syncs

    @pytest.mark.parametrize("case", SYNCED)
    def test_no_host_sync(self, case: str) -> None:
        """After one warm-up call plan and attend wait for nothing."""
        if not is_accelerator(self.device) or not can_find_syncs(self.device):
            pytest.skip(f"device {self.device} cannot tell a host sync")
        wanted = self.case(case)
        for c in self.dealt(wanted):
            if c.verdict.tier == Tier.REFERENCE and not c.verdict.graph:
                pytest.skip(f"{self.who(c)}: a reference that declares no graph may read lengths on the host")
            backend, problem = self.make(c.req), self.problem(wanted, c)
            out = self.run(backend, problem, c, case)
            try:
                with no_host_sync(self.device):
                    backend.attend(problem.q, problem.kv, backend.plan(problem.meta), out)
            except RuntimeError as error:
                raise AssertionError(f"{self.who(c)}, case {case!r}: host sync, for {c}: {error}") from error

    # ------------------------------------------------------------ memory

    @pytest.mark.parametrize("case", ["decode", "prefill"])
    def test_workspace_is_as_claimed(self, case: str) -> None:
        """Creating it, planning and attending once at the largest size asked for take at most `workspace_bytes`."""
        if not is_accelerator(self.device):
            pytest.skip("memory is counted on accelerators only")
        c = self.simplest()
        req, sizes = c.req, Case(name=case, seq_lens=(), q_lens=(), phase="decode")
        if case == "decode":
            lens = tuple(257 + 31 * i for i in range(req.max_num_seqs))
            sizes = replace(sizes, seq_lens=lens, q_lens=(1,) * len(lens))
        else:
            part = req.max_num_tokens // 4
            sizes = replace(sizes, seq_lens=(part,) * 3 + (part + 99,), q_lens=(part,) * 4, phase="prefill")
        problem = self.problem(sizes, c)
        out = torch.empty_like(problem.q, memory_format=torch.contiguous_format)

        def whole() -> object:
            backend = self.make(req)
            backend.attend(problem.q, problem.kv, plan := backend.plan(problem.meta), out)
            return backend, plan

        self.run(self.make(req), problem, c, case)  # what the vendor's library keeps for itself is there before
        taken = peak_bytes(self.device, whole)
        claimed = c.verdict.workspace_bytes
        assert taken <= claimed + WORKSPACE_SLACK, (
            f"{self.who(c)}: {case} of {req.max_num_seqs} sequences or {req.max_num_tokens} tokens takes {taken} bytes; workspace_bytes is {claimed}"
        )

    @pytest.mark.parametrize("case", ["decode at page borders", "ragged prefill on a prefix", "local decode"])
    def test_offsets_past_32_bits(self, case: str) -> None:
        """Pages so far into the memory that their element offset exceeds 2³². On a CPU such memory is reserved, not touched: only where
        `far_on_cpu` says that the backend does not walk through all of it."""
        if not is_accelerator(self.device) and not self.far_on_cpu:
            pytest.skip("a test for accelerators; on a CPU only with far_on_cpu")
        wanted = self.case(case)
        c = _smallest_stored(self.usable(wanted))
        req = c.req
        assert req.page_size is not None
        page = LAYERS * 2 * req.page_size * req.num_kv_heads * req.head_dim
        num_pages = -(-FAR // page)
        needed = num_pages * page * getattr(torch, req.kv_dtype).itemsize
        free = free_memory(self.platform()) if self.platform().libraries is None else 0
        if needed > 0.8 * free:
            pytest.skip(f"{needed >> 30} GiB are needed, {free >> 30} GiB free on a real device")
        problem = self.problem(wanted, c, layout=replace(c.layout, num_pages=num_pages, fill=False))
        what = f"{case}, offsets past 2³²"
        self.check(self.run(self.make(req), problem, c, what), problem, c, what)

    # ------------------------------------------------------------ the released chunk

    @pytest.mark.parametrize("case", ["local decode", "verify at a border", "local tree over a border"])
    def test_the_released_chunk(self, case: str) -> None:
        """Chunks of 8192 tokens, as Scout and Maverick have them; other cases use smaller ones."""
        if not is_accelerator(self.device):
            pytest.skip("long sequences are for accelerators; the same cases run at a smaller chunk")
        released = type(self)()
        released.chunk = RELEASED_CHUNK  # type: ignore[misc]  # this one instance
        wanted = released.case(case)
        for c in released.dealt(wanted)[:2]:
            problem = released.problem(wanted, c)
            what = f"{case}, chunk {RELEASED_CHUNK}"
            self.check(self.run(self.make(c.req), problem, c, what), problem, c, what)


def _smallest_stored(found: list[Combination]) -> Combination:
    """The combination whose memory takes the fewest bytes an element, the first of those."""
    return min(found, key=lambda c: getattr(torch, c.req.kv_dtype).itemsize)


def _other_lengths(case: Case) -> Case:
    """The same number of rows and queries, every length another one (shorter or longer, order reversed), on both sides of a border."""
    prefixes = [length - n for length, n in zip(case.seq_lens, case.q_lens, strict=True)]
    moved = [max(0, prefix + (5 if i % 2 else -3)) for i, prefix in enumerate(reversed(prefixes))]
    return replace(case, seq_lens=tuple(prefix + n for prefix, n in zip(moved, case.q_lens, strict=True)))


def _tensors(problem: Problem) -> Iterator[torch.Tensor]:
    meta = problem.meta
    yield from (problem.q, problem.memory, meta.cu_seqlens_q, meta.seq_lens, meta.block_table)
    if meta.tree is not None:
        yield meta.tree.ancestors
        if meta.tree.sees_prefix is not None:
            yield meta.tree.sees_prefix


def _copy_into(captured: Problem, later: Problem) -> None:
    for x, y in zip(_tensors(captured), _tensors(later), strict=True):
        assert x.shape == y.shape, f"the kit made problems of shapes {tuple(x.shape)} and {tuple(y.shape)}"
        x.copy_(y)
