"""Pages and the memory behind them, in any order of admitting, computing, verifying guesses, giving up and evicting: whoever holds a page reads what
was computed for exactly its tokens. Real KVMemory, so a byte that two pages share shows; what nobody can reach any more is NaN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from zlib import crc32

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import event, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from l4core.kv.blocks import KVGroup
from l4core.kv.manager import KVManager
from l4core.kv.memory import KVMemory
from l4core.kv.planner import plan_kv
from l4core.kv.prefix import PageHashes
from l4core.kv.tables import PageTables
from l4core.ops.kv_write import kv_write

DRAFT_LAYER = 5
GUESS = -1.0
"""What stands in the slot of a guess that was not accepted."""


@dataclass(eq=False)
class Holder:
    """A request of known tokens; the first num_computed have their keys and values in the pages of `tables`."""

    tokens: list[int]
    salt: str
    hashes: PageHashes
    tables: PageTables
    num_computed: int = 0


class MemoryMachine(RuleBasedStateMachine):
    @initialize(
        page=st.sampled_from([1, 2]),
        chunk_pages=st.integers(1, 3),
        spare=st.integers(0, 6),
        local=st.integers(1, 4),
        hybrid=st.sampled_from([True, True, False]),
        cached=st.sampled_from([True, True, False]),
        capped=st.booleans(),
    )
    def build(
        self, page: int, chunk_pages: int, spare: int, local: int, hybrid: bool, cached: bool, capped: bool
    ) -> None:
        """One global layer and a draft's beside it; `local` local ones. Memory for one request of twelve tokens and a little more."""
        self.page, self.chunk = page, page * chunk_pages
        self.groups = (
            KVGroup(name="global", layer_ids=(4, DRAFT_LAYER), chunk_size=None),
            KVGroup(name="local", layer_ids=tuple(range(local)), chunk_size=self.chunk, keep_all=not hybrid),
        )
        made = plan_kv(
            self.groups,
            page_size=page,
            num_kv_heads=1,
            head_dim=1,
            bytes_per_element=4,
            budget_bytes=1 << 20,
            context_length=12,
            model_limit=12,
            max_running=1,
            max_total_tokens=None,
        )
        superpages = made.num_superpages + spare
        self.memory = KVMemory(
            self.groups, replace(made, num_superpages=superpages), 1, 1, torch.float32, "cpu", dense=bool(spare % 2)
        )
        assert self.memory.num_bytes == superpages * made.superpage_bytes
        self.kv = KVManager(
            self.groups,
            page,
            superpages,
            prefix_cache=cached,
            max_local=chunk_pages + 1 if capped and hybrid else None,
            on_empty=self.memory.poison,
        )
        self.arrays = {
            layer: self.memory.pages(layer).numpy()[..., 0, 0] for group in self.groups for layer in group.layer_ids
        }  # [pages, 2, P]
        self.live: list[Holder] = []

    # --- what happens ------------------------------------------------------------------------------------------------------------------

    @rule(shared=st.integers(0, 8), own=st.integers(1, 4), which=st.integers(0, 1), salt=st.sampled_from(["", "", "t"]))
    def admit(self, shared: int, own: int, which: int, salt: str) -> None:
        tokens = [*range(shared), *(100 * (which + 1) + i for i in range(own))]
        tokens += [7 * len(tokens) + i for i in range(12 - len(tokens))]
        holder = Holder(tokens, salt, PageHashes(salt, self.page, lambda a, b: tokens[a:b]), self.kv.new_tables())
        length = self.kv.find_prefix(holder.hashes, len(tokens) - 1)
        self.kv.take_prefix(holder.tables, holder.hashes, length)
        if not self.kv.fits_alone(holder.tables, length, len(tokens)):  # too scattered, as the scheduler has it
            self.kv.release(holder.tables)
            length = 0
        holder.num_computed = length
        if length:
            event("a prefix was found")
        self.live.append(holder)

    @rule(data=st.data(), count=st.integers(1, 6))
    def prefill(self, data: st.DataObject, count: int) -> None:
        holder = self.someone(data)
        begin = holder.num_computed
        end = min(begin + count, (begin // self.chunk + 1) * self.chunk, len(holder.tokens))
        if end > begin and self.kv.reserve(holder.tables, end) is not None:
            self.write(holder, begin, end, true_until=end)
            self.commit(holder, end)

    @rule(data=st.data(), guesses=st.integers(1, 4), accepted=st.integers(0, 4), leave=st.integers(0, 2))
    def verify(self, data: st.DataObject, guesses: int, accepted: int, leave: int) -> None:
        """The next token and some guesses behind it, over a border perhaps; then some of them turn out right."""
        holder = self.someone(data)
        begin = holder.num_computed
        border = begin // self.chunk * self.chunk
        end = min(begin + 1 + guesses, border + 2 * self.chunk, len(holder.tokens))
        if end <= begin:
            return
        free = self.kv.num_available
        if self.kv.reserve(holder.tables, end, leave=leave) is None:
            assert self.kv.num_available == free
            return
        assert self.kv.num_available >= min(leave, free)
        kept = min(begin + 1 + accepted, end)
        self.write(holder, begin, end, true_until=kept)
        self.check_reads(holder, begin, "before the guesses are judged")
        if kept < end:
            event("guesses were refused")
        if border + self.chunk < end:
            event("both sides of a border")
        self.commit(holder, kept)

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """An end, an abort or a preemption: the pages go; if it comes back, it comes as a new one."""
        holder = self.someone(data)
        self.live.remove(holder)
        self.kv.release(holder.tables)
        assert holder.tables == self.kv.new_tables()

    @rule()
    def flush(self) -> None:
        self.kv.flush()
        used = sum(
            len({page // self.kv._pages_per[n] for h in self.live for page in h.tables.tables[n].pages}) for n in (0, 1)
        )
        assert self.kv.num_available == self.kv._pool.num_usable - used

    # --- what must hold ----------------------------------------------------------------------------------------------------------------

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "live"):
            self.kv.check_integrity(holder.tables for holder in self.live)

    @invariant()
    def no_byte_has_two_owners(self) -> None:
        """Units of memory under the pages that are held or cached, group by group."""
        if not hasattr(self, "live"):
            return
        owners: dict[int, tuple[str, int]] = {}
        for group, pages in self.pages_in_use():
            stride = self.kv_stride(group)
            for page in pages:
                for unit in range(page * stride, page * stride + 2 * len(group.layer_ids)):
                    assert owners.setdefault(unit, (group.name, page)) == (group.name, page), f"unit {unit}"

    @invariant()
    def everyone_reads_its_own(self) -> None:
        if not hasattr(self, "live"):
            return
        for holder in self.live:
            self.check_reads(holder, holder.num_computed, "between steps")
        for array in self.arrays.values():
            assert not array[0].any(), "the null page was written"

    @invariant()
    def alone_each_could_end(self) -> None:
        """No dead end: were the others gone, every one could grow to its end."""
        if not hasattr(self, "live"):
            return
        for holder in self.live:
            if holder.tables.capacity < (holder.num_computed // self.chunk + 1) * self.chunk and not any(
                self.kv._pool.users(number, page) > 1
                for number, table in enumerate(holder.tables.tables)
                for page in table.pages
            ):
                assert self.kv.fits_alone(holder.tables, holder.num_computed, len(holder.tokens))

    # --- inside ------------------------------------------------------------------------------------------------------------------------

    def someone(self, data: st.DataObject) -> Holder:
        if not self.live:
            self.admit(6, 2, 0, "")
        return data.draw(st.sampled_from(self.live))

    def commit(self, holder: Holder, length: int) -> None:
        self.kv.commit(holder.tables, length, holder.hashes)
        holder.num_computed = length

    def write(self, holder: Holder, begin: int, end: int, *, true_until: int) -> None:
        for number, group in enumerate(self.groups):
            table = holder.tables.tables[number]
            page_ids = [table.pages[p // self.page - table.first_index] for p in range(begin, end)]
            assert all(self.kv._pool.users(number, page) == 1 for page in page_ids), "a shared page was written"
            offsets = torch.tensor([p % self.page for p in range(begin, end)])
            for layer in group.layer_ids:
                values = [
                    [stamp(holder.tokens, p, layer, kv) if p < true_until else GUESS for kv in (0, 1)]
                    for p in range(begin, end)
                ]
                kv_write(
                    self.memory.pages(layer), torch.tensor(values)[..., None, None], torch.tensor(page_ids), offsets
                )

    def check_reads(self, holder: Holder, length: int, when: str) -> None:
        """What a query behind `length` tokens may read: all of them in global layers, those of its chunk in local ones."""
        for number, group in enumerate(self.groups):
            table = holder.tables.tables[number]
            begin = 0 if group.chunk_size is None else length // group.chunk_size * group.chunk_size
            if begin == length:
                continue
            pages = [table.pages[p // self.page - table.first_index] for p in range(begin, length)]
            offsets = [p % self.page for p in range(begin, length)]
            for layer in group.layer_ids:
                found = self.arrays[layer][pages, :, offsets]
                wanted = [[stamp(holder.tokens, p, layer, kv) for kv in (0, 1)] for p in range(begin, length)]
                assert np.array_equal(found, np.array(wanted, dtype=np.float32)), f"{group.name}, {when}"

    def pages_in_use(self) -> Iterator[tuple[KVGroup, set[int]]]:
        for number, group in enumerate(self.groups):
            held = {page for holder in self.live for page in holder.tables.tables[number].pages}
            yield group, held | set(self.kv._index[number]._hash_of)

    def kv_stride(self, group: KVGroup) -> int:
        return self.memory._strides[group.name]

    def teardown(self) -> None:
        if hasattr(self, "live"):
            for holder in self.live:
                self.kv.release(holder.tables)
            self.kv.flush()
            assert self.kv.num_available == self.kv._pool.num_usable, "superpages leaked"


def stamp(tokens: list[int], position: int, layer: int, kv: int) -> float:
    """Keys and values of a token depend on all tokens up to it."""
    return float(crc32(repr((tokens[: position + 1], layer, kv)).encode()) % (1 << 22) + 1)


@pytest.mark.timeout(1800)
def test_whoever_holds_a_page_reads_its_own_tokens() -> None:
    run_state_machine_as_test(MemoryMachine, settings=settings(stateful_step_count=30))
