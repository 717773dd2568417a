"""The keys and values themselves: one lazily committed buffer a KV group, seen by attention as one paged view a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from l4core.kv.blocks import NULL_PAGE, KVGroup
from l4core.plugin_api import KVView

if TYPE_CHECKING:
    from l4core.kv.planner import KVPlan


class KVMemory:
    """Paged KV of every layer on one rank.

    A group's buffer is [num_pages, layers of the group, 2 (k, v), page_size, num_kv_heads, head_dim]: one page holds all its layers, so a
    page of 36 local layers and three pages of 12 global ones are the same bytes, and the allocator can later exchange them. A layer's view
    therefore has a page stride larger than a page; element offsets pass 2³² and are 64-bit everywhere.

    For a backend that wants its pages back to back (`page_stride` "dense") the same bytes are shown as units of one page of one layer's keys or
    values: the layer is the view's base offset, and block tables count units (`table_scale`).

    Memory is reserved, not touched: only the null page (page 0, padding of block tables) is written here, with zeros.
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
    ) -> None:
        """plan: page_size and num_pages (group name → pages, the null page included).  num_kv_heads: of this rank.
        clear: zero all of it, for backends that need what lies past a sequence's end to be finite; else only the null page is."""
        self.page_size = plan.page_size
        self.table_scale: dict[str, int] = {g.name: 2 * len(g.layer_ids) if dense else 1 for g in groups}
        self._group_names: dict[int, str] = {}
        self._layers: dict[int, torch.Tensor] = {}
        self._views: dict[int, KVView] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        for group in groups:
            shape = (plan.num_pages[group.name], len(group.layer_ids), 2, plan.page_size, num_kv_heads, head_dim)
            buffer = torch.empty(shape, dtype=dtype, device=device)
            (buffer if clear else buffer[NULL_PAGE]).zero_()
            self._buffers[group.name] = buffer
            for index, layer_id in enumerate(group.layer_ids):
                self._group_names[layer_id] = group.name
                pages = buffer[:, index]
                self._layers[layer_id] = pages
                units = buffer.flatten(0, 2)[2 * index :]
                k, v = (units, units[1:]) if dense else (pages[:, 0], pages[:, 1])
                self._views[layer_id] = KVView(k=k, v=v)

    def group_of(self, layer_id: int) -> str:
        """Name of the KV group that holds this layer."""
        return self._group_names[layer_id]

    def pages(self, layer_id: int) -> torch.Tensor:
        """[num_pages, 2, page_size, num_kv_heads, head_dim] of one layer, keys at index 0, values at 1: what ops.kv_write writes."""
        return self._layers[layer_id]

    def view(self, layer_id: int) -> KVView:
        """The layer as an attention backend reads it: page i of a block table is row i · table_scale of the view."""
        return self._views[layer_id]

    def poison(self, group: str, pages: Sequence[int]) -> None:
        """Fills freed pages with NaN, so that a test sees whoever still reads them. Raises ValueError for the null page, which stays finite."""
        if NULL_PAGE in pages:
            raise ValueError("page 0 is the null page; it is read through padded block tables and must stay finite")
        buffer = self._buffers[group]
        buffer[torch.tensor(list(pages), dtype=torch.int64, device=buffer.device)] = torch.nan

    @property
    def num_bytes(self) -> int:
        """Reserved bytes of all groups."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())
