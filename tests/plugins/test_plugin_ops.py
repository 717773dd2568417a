"""The tensor helpers that attention plugins may use."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from l4core.plugin_api import KVView
from l4core.plugin_ops import gather_kv, merge_lse
from l4core.plugin_ops.upload import upload_many


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = q @ k.T
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("split", [1, 5, 12])
def test_merging_parts_is_attention_over_all(split: int) -> None:
    q, k, v = (torch.randn(n, 8, dtype=torch.float64) for n in (4, 13, 13))
    whole, lse = attention(q * 30, k, v)  # scores in the hundreds: exp of them would overflow
    parts = attention(q * 30, k[:split], v[:split]), attention(q * 30, k[split:], v[split:])
    out, merged = merge_lse(*parts[0], *parts[1])
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(merged, lse)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_arrays_uploaded_together_begin_where_kernels_like_memory_to_begin(dtype: torch.dtype) -> None:
    arrays = [np.arange(n, dtype=np.float32 if dtype.is_floating_point else np.int64) for n in (3, 0, 1, 8, 5)]
    moved = upload_many(arrays, dtype, torch.device("cpu"))
    assert [x.tolist() for x in moved] == [x.tolist() for x in arrays]
    assert {x.dtype for x in moved} == {dtype}
    assert all(x.storage_offset() * x.element_size() % 16 == 0 for x in moved)


def test_a_part_without_keys_is_ignored_whatever_it_holds() -> None:
    out, lse = torch.randn(3, 4), torch.randn(3)
    nothing, none = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    for pair in ((out, lse, nothing, none), (nothing, none, out, lse)):
        merged, merged_lse = merge_lse(*pair)
        torch.testing.assert_close(merged, out)
        torch.testing.assert_close(merged_lse, lse)
    empty, empty_lse = merge_lse(nothing, none, nothing, none)
    assert (empty == 0).all()
    assert empty_lse.isneginf().all()


def test_pages_come_in_the_order_given() -> None:
    k = torch.randn(6, 2, 4, 3, 5)[:, 0]  # 6 pages of 4 tokens, pages apart
    kv = KVView(k=k, v=-k)
    keys, values = gather_kv(kv, torch.tensor([4, 1]), torch.float64)
    assert keys.dtype == torch.float64
    torch.testing.assert_close(keys, torch.cat([k[4], k[1]]).double())
    torch.testing.assert_close(values, -keys)


def test_stored_values_are_multiplied_by_their_scale() -> None:
    k = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(2, 2, 1, 1).to(torch.float8_e4m3fn)
    kv = KVView(k=k, v=k, k_scale=torch.tensor(0.5), v_scale=torch.tensor(3.0))
    keys, values = gather_kv(kv, torch.tensor([1, 0]), torch.float32)
    assert keys.flatten().tolist() == [2.0, 4.0, 0.5, 1.0]
    assert values.flatten().tolist() == [12.0, 24.0, 3.0, 6.0]
