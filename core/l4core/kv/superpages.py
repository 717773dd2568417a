"""One pool for all KV groups: superpages of equal bytes, each cut into pages of whichever group needs it now. Torch-free.

A local page holds more layers than a global one, so fewer fit in the same bytes: Scout's 36 local and 12 global layers give one local page or
three global ones. A superpage belongs to one group from the moment it is taken until nobody needs a page of it.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from l4core.kv.blocks import KVGroup

MAX_WASTE = 0.10
"""Of a superpage's bytes, in either use."""
LARGEST_CUT = 16
NULL_SUPERPAGE = 0
"""Holds page 0 of every group, the null page, and is never handed out."""
NOBODY = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperpageShape:
    """pages: group name → pages of that group in one superpage.  units: its size; a unit is one page of one layer's keys or values."""

    pages: Mapping[str, int]
    units: int

    def page_stride(self, group: str) -> int:
        """Units from one page of the group to the next; a whole number, also from superpage to superpage."""
        return self.units // self.pages[group]

    def waste(self, group: KVGroup) -> float:
        """Share of the bytes that this use leaves empty."""
        return 1 - self.pages[group.name] * 2 * len(group.layer_ids) / self.units


def superpage_shape(groups: Sequence[KVGroup]) -> SuperpageShape:
    """The smallest superpage that wastes at most MAX_WASTE in every group's use; where none does, the one of least waste."""
    sizes = [2 * len(group.layer_ids) for group in groups]
    shapes = [
        SuperpageShape(pages=dict(zip((g.name for g in groups), cut, strict=True)), units=_units(sizes, cut))
        for cut in itertools.product(range(1, LARGEST_CUT + 1), repeat=len(groups))
    ]

    def worst(shape: SuperpageShape) -> float:
        return max(shape.waste(group) for group in groups)

    fitting = [shape for shape in shapes if worst(shape) <= MAX_WASTE]
    return min(fitting, key=lambda shape: shape.units) if fitting else min(shapes, key=worst)


def _units(sizes: Sequence[int], cut: Sequence[int]) -> int:
    """The least size that holds each group's pages at a whole stride."""
    step = math.lcm(*cut)
    return -(-max(size * count for size, count in zip(sizes, cut, strict=True)) // step) * step


class SuperpagePool:
    """Hands out superpages and counts the users of their pages. O(1) a call and page, deterministic.

    A page is held (it has users), cached (none, but its contents can still be found by their hash) or empty. A superpage with held pages is
    taken; without, it is evictable while it has cached pages, and free otherwise. `take` prefers a free one, then evicts one that was left behind
    (see `release`), then the one that has been evictable longest.
    """

    def __init__(
        self,
        num_superpages: int,
        pages_per_superpage: Sequence[int],
        on_empty: Callable[[int, list[int]], None],
        most: Sequence[int | None] = (),
    ) -> None:
        """num_superpages: the null one among them; at least 2.  pages_per_superpage: by group number.  on_empty(group number, pages) is told of
        every page whose contents nobody can reach any more.  most: by group number, superpages it may have in all, cached ones among them; None,
        or no entry: as many as there are."""
        if num_superpages < 2:
            raise ValueError(
                f"a pool of {num_superpages} superpages holds nothing; wanted the null one and at least one more"
            )
        self.num_superpages = num_superpages
        self.pages_per_superpage = tuple(pages_per_superpage)
        self._on_empty = on_empty
        self._free = list(
            range(num_superpages - 1, NULL_SUPERPAGE, -1)
        )  # a stack: the one freed last is the warmest in cache
        self._num_groups = len(self.pages_per_superpage)
        self._evictable: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(self._num_groups)]  # → when
        self._left_behind: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(self._num_groups)]
        self._now = 0
        self._was_found = [False] * num_superpages
        self._most = [num_superpages if cap is None else cap for cap in (*most, *[None] * self._num_groups)]
        self._taken = [0] * self._num_groups
        self._group = [NOBODY] * num_superpages
        self._users: list[list[int]] = [[] for _ in range(num_superpages)]
        self._cached: list[set[int]] = [set() for _ in range(num_superpages)]
        self._held = [0] * num_superpages
        self.held_pages = [0] * len(self.pages_per_superpage)
        self.cached_pages = [0] * len(self.pages_per_superpage)

    @property
    def num_usable(self) -> int:
        """Superpages that can be taken in all."""
        return self.num_superpages - 1

    @property
    def num_available(self) -> int:
        """Superpages that can be taken now: free or evictable."""
        return len(self._free) + sum(map(len, self._evictable)) + sum(map(len, self._left_behind))

    def allowance(self, group: int) -> int:
        """Superpages that this group may still take, cached ones of its own in their place, however many are available."""
        return self._most[group] - self._taken[group] + len(self._evictable[group]) + len(self._left_behind[group])

    def most(self, group: int) -> int:
        """Superpages that this group can ever have."""
        return min(self.num_usable, self._most[group])

    def take(self, group: int) -> int | None:
        """A superpage for pages of this group, all of them empty; None when every one has a held page, or the group has its most in use."""
        if not (self.num_available and self.allowance(group)):
            return None
        if self._taken[group] < self._most[group] and self._free:
            superpage = self._free.pop()
        else:
            of = [group] if self._taken[group] >= self._most[group] else range(self._num_groups)
            superpage = self._evict([self._left_behind[g] for g in of]) or self._evict([self._evictable[g] for g in of])
            self._forget(superpage)
        self._was_found[superpage] = False
        self._group[superpage] = group
        self._taken[group] += 1
        self._users[superpage] = [0] * self.pages_per_superpage[group]
        return superpage

    def retain(self, group: int, page: int) -> None:
        """One more user of a page: the writer of an empty one, or a reader of a held or cached one."""
        superpage, slot = divmod(page, self.pages_per_superpage[group])
        if self._group[superpage] != group:
            raise ValueError(f"page {page} of group {group} lies in superpage {superpage}, which is not that group's")
        users = self._users[superpage]
        users[slot] += 1
        self._was_found[superpage] |= slot in self._cached[superpage]
        if users[slot] == 1:
            self._held[superpage] += 1
            self.held_pages[group] += 1
            self._evictable[group].pop(superpage, None)
            self._left_behind[group].pop(superpage, None)
            if slot in self._cached[superpage]:
                self.cached_pages[group] -= 1

    def release(self, group: int, page: int, *, left_behind: bool = False) -> None:
        """One user less. left_behind: its request goes on without it. If nobody ever found it, it is evicted before all others: a long prompt would
        else fill memory with the local pages of its chunks, at the cost of every other prefix. Raises ValueError for a page that nobody holds.
        """
        superpage, slot = divmod(page, self.pages_per_superpage[group])
        if self._group[superpage] != group or not self._users[superpage][slot]:
            raise ValueError(f"page {page} of group {group} is not held by anyone")
        users = self._users[superpage]
        users[slot] -= 1
        if users[slot]:
            return
        self._held[superpage] -= 1
        self.held_pages[group] -= 1
        if slot in self._cached[superpage]:
            self.cached_pages[group] += 1
        else:
            self._on_empty(group, [page])
        self._settle(superpage, first=left_behind and not self._was_found[superpage])

    def keep(self, group: int, page: int) -> None:
        """From now on a held page's contents are findable: when its last user goes it stays until its memory is needed."""
        superpage, slot = divmod(page, self.pages_per_superpage[group])
        assert self._users[superpage][slot], "only a held page can be kept"
        self._cached[superpage].add(slot)

    def flush(self) -> int:
        """Forget all cached pages that nobody holds → how many superpages that freed. Held ones stay findable."""
        queues = [*self._evictable, *self._left_behind]
        evicted = [superpage for queue in queues for superpage in queue]
        for queue in queues:
            queue.clear()
        for superpage in evicted:
            self._forget(superpage)
            self._free.append(superpage)
        return len(evicted)

    def users(self, group: int, page: int) -> int:
        """How many hold this page."""
        superpage, slot = divmod(page, self.pages_per_superpage[group])
        return self._users[superpage][slot] if self._group[superpage] == group else 0

    def check_integrity(self, group: int, counted: Mapping[int, int]) -> None:
        """Compare the books with `counted`: page → users in the tables. Raises RuntimeError naming the first difference."""
        per = self.pages_per_superpage[group]
        for superpage in range(1, self.num_superpages):
            mine = self._group[superpage] == group
            for page in range(superpage * per, (superpage + 1) * per):
                users = self._users[superpage][page % per] if mine else 0
                if users != counted.get(page, 0):
                    raise RuntimeError(
                        f"page {page} of group {group} has {users} users in the books and {counted.get(page, 0)} in the tables"
                    )
        evictable = {superpage for queue in (*self._evictable, *self._left_behind) for superpage in queue}
        free = set(self._free)
        for superpage in range(1, self.num_superpages):
            state = (self._held[superpage] > 0, superpage in evictable, superpage in free)
            if sum(state) != 1 or (superpage in evictable) != (
                not self._held[superpage] and bool(self._cached[superpage])
            ):
                raise RuntimeError(f"superpage {superpage} is (held, evictable, free) {state}; wanted just one of them")
        if len(free) != len(self._free) or NULL_SUPERPAGE in free | evictable:
            raise RuntimeError("the free list holds a superpage twice, or the null one")
        taken = self._group.count(group)
        if taken != self._taken[group] or taken > self._most[group]:
            raise RuntimeError(
                f"group {group} has {taken} superpages and {self._taken[group]} in the books; at most {self._most[group]}"
            )

    def _settle(self, superpage: int, *, first: bool) -> None:
        """Where a superpage without held pages belongs. first: to be evicted before those that are not."""
        if self._held[superpage]:
            return
        group = self._group[superpage]
        if self._cached[superpage]:
            self._now += 1
            (self._left_behind if first else self._evictable)[group][superpage] = self._now
        else:
            self._group[superpage] = NOBODY
            self._taken[group] -= 1
            self._free.append(superpage)

    def _evict(self, queues: Sequence[OrderedDict[int, int]]) -> int:
        """Takes out the superpage that has been in any of the queues longest; NULL_SUPERPAGE when all are empty."""
        longest = min((queue for queue in queues if queue), key=lambda queue: next(iter(queue.values())), default=None)
        return NULL_SUPERPAGE if longest is None else longest.popitem(last=False)[0]

    def _forget(self, superpage: int) -> None:
        group = self._group[superpage]
        first = superpage * self.pages_per_superpage[group]
        pages = [first + slot for slot in sorted(self._cached[superpage])]
        self.cached_pages[group] -= len(pages)
        self._cached[superpage].clear()
        self._group[superpage] = NOBODY
        self._taken[group] -= 1
        self._on_empty(group, pages)
