"""`create` and `plan`: what is refused, and which kernel a step gets."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from l4_triton.backend import TritonBackend, TritonPlan, create
from l4_triton.launch import Traits
from l4_triton.tiles import tiles_for
from l4core.plugin_api import (
    AttentionContext,
    AttentionMetadata,
    AttentionRequirements,
    BackendUnavailable,
    ChunkInfo,
)
from l4core.testing.platforms import fake_platform

pytestmark = pytest.mark.skipif(os.environ.get("L4_TEST_DEVICE", "cpu") != "cpu", reason="host logic, seen on a CPU")

CONTEXT = AttentionContext(
    requirements=AttentionRequirements(
        num_q_heads=40, num_kv_heads=8, head_dim=128, q_dtype="bfloat16", kv_dtype="bfloat16"
    ),
    platform=fake_platform("sm90", {"triton": "3.6.0"}),
    device="cpu",
    page_size=64,
    options={},
    logger=logging.getLogger(__name__),
)

_WITHOUT_INTERPRETER = """
import sys
sys.path[:0] = {path!r}
import test_backend
try:
    test_backend.create(test_backend.CONTEXT)
except test_backend.BackendUnavailable as error:
    print(error.reason, "|", error.fix)
"""


def backend_of_an_h100() -> TritonBackend:
    return TritonBackend(
        CONTEXT,
        tiles_for("sm90", "bfloat16", 128, "bfloat16"),
        processors=132,
        traits=Traits(converts_fp8=False, starts_early=False, interpreted=True),
    )


def plan(max_seqlen_q: int, num_seqs: int) -> TritonPlan:
    meta = AttentionMetadata(
        cu_seqlens_q=torch.zeros(num_seqs + 1, dtype=torch.int32),
        seq_lens=torch.zeros(num_seqs, dtype=torch.int32),
        block_table=torch.zeros(num_seqs, 1, dtype=torch.int32),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=1 << 20,
        num_seqs=num_seqs,
        phase="decode" if max_seqlen_q == 1 else "prefill",
        chunk=ChunkInfo(size=8192),
    )
    made = backend_of_an_h100().plan(meta)
    assert isinstance(made, TritonPlan)
    assert made.meta is meta
    return made


@pytest.mark.parametrize(("rows", "block_m"), [(1, 16), (4, 32), (8, 64), (12, 64)])
def test_a_step_of_few_rows_shares_out_its_keys(rows: int, block_m: int) -> None:
    """Group 5: one token is 5 rows of 16, a verify of four 20 of 32, of eight 40 of 64."""
    made = plan(rows, num_seqs=1)
    assert made.split
    assert made.tile.block_m == block_m


def test_blocks_that_fill_the_device_are_a_prefill() -> None:
    """One piece of 256 tokens is 160 blocks of 64 rows for 132 multiprocessors; one of 100 tokens is 64 and shares its keys."""
    assert not plan(256, num_seqs=1).split
    assert plan(100, num_seqs=1).split
    assert not plan(16, num_seqs=64).split


def test_no_plan_is_kept() -> None:
    """Two plans live at once; neither is on the backend."""
    backend = backend_of_an_h100()
    before = dict(vars(backend))
    first, second = plan(1, 2), plan(64, 3)
    assert first.meta is not second.meta
    assert dict(vars(backend)) == before


def test_a_graph_cannot_hold_the_interpreter() -> None:
    requirements = replace(CONTEXT.requirements, needs_graph=True)
    with pytest.raises(BackendUnavailable, match="interpreter"):
        create(replace(CONTEXT, requirements=requirements))


def test_a_cpu_without_the_interpreter_is_refused_with_the_variable_to_set() -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    path = [os.path.dirname(__file__), *(entry for entry in sys.path if entry)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = _WITHOUT_INTERPRETER.format(path=path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "TRITON_INTERPRET=1" in done.stdout, done.stdout + done.stderr
