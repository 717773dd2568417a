"""The keys and values themselves: one lazily committed buffer of superpages, seen by attention as one paged view a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from l4core.kv.blocks import NULL_PAGE, KVGroup
from l4core.plugin_api import KVView

if TYPE_CHECKING:
    from l4core.kv.planner import KVPlan


NO_SCALES: Mapping[int, tuple[float, float]] = MappingProxyType({})


class KVMemory:
    """Paged KV of every layer on one rank, in one buffer that all groups share.

    The buffer is made of units [page_size, num_kv_heads, head_dim]: one page of one layer's keys or values. A superpage is `plan.shape.units` of
    them, and any group's pages lie in it at a whole stride (kv.superpages): page i of a group begins at unit i · page_stride, its layer n keeps
    keys at + 2n and values at + 2n + 1. A layer's view therefore has a page stride larger than a page; element offsets pass 2³² and are 64-bit
    everywhere. A draft's layers are layers of the global group like any other (ModelConfig.kv_groups).

    For a backend that wants its pages back to back (`page_stride` "dense") the same bytes are shown as units: the layer is the view's base offset,
    and block tables count units (`table_scale`).

    Memory is reserved, not touched: only the null superpage, where page 0 of every group lies, is written here, with zeros.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        plan: KVPlan,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        dense: bool = False,
        clear: bool = False,
        scales: Mapping[int, tuple[float, float]] = NO_SCALES,
    ) -> None:
        """plan: page_size, shape and num_superpages (the null one included).  num_kv_heads: of this rank.
        clear: zero all of it, for backends that need what lies past a sequence's end to be finite; else only the null superpage is.
        scales: of fp8 memory, layer → (k, v) that readers multiply with; a layer without an entry stores its values as they are."""
        self.page_size = plan.page_size
        strides = {g.name: plan.shape.page_stride(g.name) for g in groups}
        self.table_scale: dict[str, int] = {name: stride if dense else 1 for name, stride in strides.items()}
        num_units = plan.num_superpages * plan.shape.units
        self._units = torch.empty(num_units, plan.page_size, num_kv_heads, head_dim, dtype=dtype, device=device)
        (self._units if clear else self._units[: plan.shape.units]).view(torch.uint8).zero_()
        self.dtype = dtype
        self._strides = strides
        self._group_names: dict[int, str] = {}
        self._pages: dict[int, torch.Tensor] = {}
        self._views: dict[int, KVView] = {}
        for group in groups:
            stride = strides[group.name]
            by_page = self._units.view(-1, stride, *self._units.shape[1:])  # [num_pages, stride, P, Hkv, D]
            for index, layer_id in enumerate(group.layer_ids):
                self._group_names[layer_id] = group.name
                pages = by_page[:, 2 * index : 2 * index + 2]
                self._pages[layer_id] = pages
                k, v = (self._units[2 * index + i :] if dense else pages[:, i] for i in (0, 1))
                k_scale, v_scale = _scalars(scales.get(layer_id), device) if dtype.itemsize == 1 else (None, None)
                self._views[layer_id] = KVView(k=k, v=v, k_scale=k_scale, v_scale=v_scale)

    def group_of(self, layer_id: int) -> str:
        """Name of the KV group that holds this layer."""
        return self._group_names[layer_id]

    def pages(self, layer_id: int) -> torch.Tensor:
        """[num_pages, 2, page_size, num_kv_heads, head_dim] of one layer, keys at index 0, values at 1: what ops.kv_write writes."""
        return self._pages[layer_id]

    def view(self, layer_id: int) -> KVView:
        """The layer as an attention backend reads it: page i of a block table is row i · table_scale of the view."""
        return self._views[layer_id]

    def move(self, layer_ids: Sequence[int], source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies keys and values from slots to slots, page · page_size + offset; int64 on the device, read before any is written."""
        size = self.page_size
        for layer_id in layer_ids:
            pages = self._pages[layer_id]
            pages[target // size, :, target % size] = pages[source // size, :, source % size]

    def poison(self, group: str, pages: Sequence[int]) -> None:
        """Fills freed pages with NaN, so that a test sees whoever still reads them. Raises ValueError for the null page, which stays finite."""
        if NULL_PAGE in pages:
            raise ValueError("page 0 is the null page; it is read through padded block tables and must stay finite")
        by_page = self._units.view(-1, self._strides[group], *self._units.shape[1:])
        rows = torch.tensor(list(pages), dtype=torch.int64, device=by_page.device)
        nan = torch.full((1,), torch.nan).to(self.dtype)
        if self.dtype.itemsize == 1:  # not every device indexes fp8
            by_page, nan = by_page.view(torch.uint8), nan.view(torch.uint8)
        by_page[rows] = nan.to(rows.device)

    @property
    def num_bytes(self) -> int:
        """Reserved bytes."""
        return self._units.numel() * self._units.element_size()


def _scalars(
    scales: tuple[float, float] | None, device: torch.device | str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """float32 [] each; none for (1, 1)."""
    if scales is None or scales == (1.0, 1.0):
        return None, None
    k, v = torch.tensor(scales, dtype=torch.float32, device=device)
    return k, v
