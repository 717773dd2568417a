"""AITER's own kernel under Triton's interpreter (level V). Opt in: AITER is no dependency, and its wheel on PyPI is 40 MB.

    pip download --no-deps --pre amd-aiter && unzip -d amd-aiter-0.1.7.post2.dev18 amd_aiter-*.whl
    TRITON_INTERPRET=1 L4_AITER_SOURCE=amd-aiter-0.1.7.post2.dev18 pytest plugins/aiter/tests/test_vendor_kernel.py

L4_AITER_SOURCE is a folder with `aiter/` in it, an unpacked wheel or a source tree; what its name ends in is taken for the version. In float16: the
interpreter multiplies bfloat16 matrices wrongly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from l4core.plugin_api import AttentionMetadata, AttentionRequirements, KVView, Platform
from l4core.testing.conformance import QuickAttentionConformance
from l4core.testing.platforms import fake_platform

FOLDER = os.environ.get("L4_AITER_SOURCE", "")
VERSION = Path(FOLDER).name.rpartition("-")[2] or "0"
READY = bool(FOLDER) and os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = [
    pytest.mark.skipif(not READY, reason="L4_AITER_SOURCE names no AITER, or TRITON_INTERPRET is not 1"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


class OnInterpreter(QuickAttentionConformance):
    __test__ = False
    plugin, backend, level = "l4_aiter", "aiter", "V"
    page_sizes = (64, 128)
    chunk = 128
    arch: ClassVar[str]

    def platform(self) -> Platform:
        return replace(fake_platform(self.arch, {"aiter": VERSION}), device_name="a CPU, by Triton's interpreter")

    @pytest.mark.parametrize("keys", [100, 600], ids=["whole", "split"])
    def test_the_tail_must_be_finite(self, keys: int) -> None:
        """Why `finite_tail` is declared: a tile that is a page is read without a mask."""
        assert self._decode([keys], max_keys=640, tail=torch.nan).isnan().all()
        assert self._decode([keys], max_keys=640, tail=1e4).isfinite().all()

    def test_an_empty_row_is_spoilt_when_keys_are_split(self) -> None:
        """Why `empty_rows` is not declared: the reduction divides by a number of tiles."""
        assert self._decode([0, 600], max_keys=640, tail=0.0)[0].isnan().all()

    def _decode(self, lengths: list[int], max_keys: int, tail: float) -> torch.Tensor:
        """One row a sequence on pages of 64 whose slots past the keys hold `tail` → float16 [sequences, 2, 64]"""
        req = AttentionRequirements(
            num_q_heads=2, num_kv_heads=1, head_dim=64, q_dtype="float16", kv_dtype="float16", page_size=64
        )
        width = max_keys // 64
        memory = torch.randn(len(lengths), width * 64, 1, 64).half()
        for b, length in enumerate(lengths):
            memory[b, length:] = tail
        k = memory.view(-1, 64, 1, 64)
        meta = AttentionMetadata(
            cu_seqlens_q=torch.arange(len(lengths) + 1, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=torch.arange(len(k), dtype=torch.int32).view(-1, width),
            max_seqlen_q=1,
            max_seqlen_k=max_keys,
            num_seqs=len(lengths),
            phase="decode",
        )
        q = torch.randn(len(lengths), 2, 64).half()
        backend, out = self.make(req), torch.empty_like(q)
        backend.attend(q, KVView(k=k, v=k), backend.plan(meta), out)
        return out

    @pytest.fixture(autouse=True)
    def _aiter(self, enter_aiter: Callable[[Path, str], AbstractContextManager[None]]) -> Iterator[None]:
        with enter_aiter(Path(FOLDER), self.arch):
            yield


class TestGfx942(OnInterpreter):
    __test__ = True
    arch = "gfx942"
    dtypes = (("float16", "float16"), ("float16", "float8_e4m3fnuz"))


class TestGfx950(OnInterpreter):
    __test__ = True
    arch = "gfx950"
    dtypes = (("float16", "float16"), ("float16", "float8_e4m3fn"))
