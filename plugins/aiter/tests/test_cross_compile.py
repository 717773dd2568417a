"""AITER's own kernels compiled for both architectures without one of them (level X). Opt in, in a process without the interpreter:

    L4_AITER_SOURCE=amd-aiter-0.1.7.post2.dev18 pytest plugins/aiter/tests/test_cross_compile.py

Our backend makes the call; Triton compiles what AITER launches and launches nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from l4_aiter.backend import create
from l4_aiter.probe import FP8
from l4core.plugin_api import AttentionContext, AttentionMetadata, AttentionRequirements, KVView
from l4core.testing.platforms import fake_platform

FOLDER = os.environ.get("L4_AITER_SOURCE", "")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MATRIX = {"gfx942": "v_mfma_f32_", "gfx950": "v_mfma_f32_"}
LONG, SHORT = 100_000, 128
"""Keys: enough to be split, and too few for that."""

pytestmark = [
    pytest.mark.skipif(not FOLDER or INTERPRETED, reason="L4_AITER_SOURCE names no AITER, or TRITON_INTERPRET is 1"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]


@pytest.mark.parametrize("rows", [1, 300], ids=["decode", "prefill"])
@pytest.mark.parametrize("keys", [SHORT, LONG], ids=["whole", "split"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("arch", list(FP8))
def test_compiles(
    arch: str,
    fp8: bool,
    keys: int,
    rows: int,
    enter_aiter: Callable[[Path, str], AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, warmup=True, **kwargs))
        return compiled[-1]

    with enter_aiter(Path(FOLDER), arch):
        monkeypatch.setattr(JITFunction, "run", compile_only)
        _attend(arch, FP8[arch] if fp8 else "bfloat16", keys, rows)
    assert compiled
    for kernel in compiled:
        assert kernel.metadata.target.arch == arch
        assert kernel.asm["hsaco"][:4] == b"\x7fELF"
    assert MATRIX[arch] in compiled[0].asm["amdgcn"]


def _attend(arch: str, kv_dtype: str, keys: int, rows: int) -> None:
    req = AttentionRequirements(
        num_q_heads=5, num_kv_heads=1, head_dim=128, q_dtype="bfloat16", kv_dtype=kv_dtype, page_size=64
    )
    platform = fake_platform(arch, {"aiter": "0"})
    logger = logging.getLogger(__name__)
    backend = create(
        AttentionContext(requirements=req, platform=platform, device="cpu", page_size=64, options={}, logger=logger)
    )
    k = torch.zeros(2, 64, 1, 128, dtype=getattr(torch, kv_dtype))
    q = torch.zeros(rows, 5, 128, dtype=torch.bfloat16)
    meta = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, rows], dtype=torch.int32),
        seq_lens=torch.tensor([keys], dtype=torch.int32),
        block_table=torch.ones(1, -(-keys // 64), dtype=torch.int32),
        max_seqlen_q=rows,
        max_seqlen_k=keys,
        num_seqs=1,
        phase="decode" if rows == 1 else "prefill",
    )
    backend.attend(q, KVView(k=k, v=k), backend.plan(meta), torch.empty_like(q))
