"""Queries as fp8: saturating, row by row, NaN kept; the kernel against its torch twin."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from l4core.plugin_ops import quantize_q

FP8 = torch.float8_e4m3fn


def test_large_values_saturate_and_nan_stays() -> None:
    q = torch.tensor([[[1.0, -3.0, 448.0, 1e4, -torch.inf, torch.nan]]])
    assert quantize_q(q).float()[0, 0, :5].tolist() == [1.0, -3.0, 448.0, 448.0, -448.0]
    assert quantize_q(q).float()[0, 0, 5].isnan()


def test_values_keep_three_bits_of_mantissa() -> None:
    q = torch.randn(16, 5, 128).bfloat16()
    off = (quantize_q(q).float() - q.float()).abs()
    assert (off <= q.float().abs() * 2**-4 + 2**-10).all()


@pytest.mark.parametrize("descale", [None, torch.tensor(0.25)])
def test_a_row_does_not_depend_on_its_neighbours(descale: torch.Tensor | None) -> None:
    q = torch.randn(6, 4, 16).bfloat16()
    alone = torch.cat([quantize_q(row[None], descale=descale) for row in q])
    q[1] *= 300
    assert torch.equal(quantize_q(q, descale=descale)[2:].float(), alone[2:].float())


def test_the_descale_is_what_the_kernel_multiplies_back() -> None:
    q = torch.randn(4, 4, 16) * 2000
    back = quantize_q(q, descale=torch.tensor(16.0)).float() * 16.0
    torch.testing.assert_close(back, q, rtol=2**-4, atol=0.05)


def test_a_strided_slice_becomes_contiguous() -> None:
    packed = torch.randn(5, 8, 16).bfloat16()
    found = quantize_q(packed[:, :4])
    assert found.is_contiguous()
    assert torch.equal(found.float(), quantize_q(packed[:, :4].contiguous()).float())


def test_only_eight_bit_floats() -> None:
    with pytest.raises(ValueError, match=r"torch\.bfloat16; wanted an 8-bit float"):
        quantize_q(torch.zeros(1, 1, 8), torch.bfloat16)


INTERPRETED = """
import torch
from l4core.plugin_ops.quantize import quantize_q_torch
from l4core.plugin_ops.quantize_triton import quantize_q_triton
packed = torch.randint(-16, 17, (7, 13, 96)).bfloat16()  # numbers that fp8 holds: the interpreter rounds others its own way
packed[3, 2, :3] = torch.tensor([1e6, -1e6, 448.0])
for q in (packed[:, :5], packed[:0, :5], packed[:1], packed):
    for descale in (None, torch.tensor(2.0)):
        found, wanted = (f(q, torch.float8_e4m3fn, descale) for f in (quantize_q_triton, quantize_q_torch))
        assert found.is_contiguous() and torch.equal(found.float(), wanted.float())
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_reads_and_writes_where_it_should() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel's own rounding is the device's")
def test_the_kernel_is_its_twin_bit_for_bit() -> None:
    from l4core.plugin_ops.quantize import quantize_q_torch
    from l4core.plugin_ops.quantize_triton import quantize_q_triton

    q = torch.randn(512, 56, 128, device="cuda").bfloat16() * torch.logspace(-5, 3, 512, device="cuda")[:, None, None]
    q = q.bfloat16()[:, :40]
    for descale in (None, torch.tensor(0.37, device="cuda")):
        found, wanted = (f(q, FP8, descale).view(torch.uint8) for f in (quantize_q_triton, quantize_q_torch))
        assert torch.equal(found, wanted)
