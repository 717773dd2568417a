"""How many pages each KV group gets from a byte budget. One pure function; `l4 plan` and the engine's start-up both call it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from l4core.errors import CapacityError, ConfigError
from l4core.kv.blocks import KVGroup, check_page_size

UNLIMITED = 1 << 62
MORE_MEMORY = "more memory for KV (--mem-fraction-static)"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPlan:
    """num_pages: group name → pages in memory, the null page among them.  bytes_per_page: group name → K and V of all its layers.

    max_context: tokens (prompt + output) one request may have.  largest_context: the most that --context-length could ask of the same budget.
    max_running: sequences in one step, no more than there are pages.  bytes_total: all pages.
    """

    page_size: int
    num_pages: Mapping[str, int]
    bytes_per_page: Mapping[str, int]
    max_context: int
    largest_context: int
    max_running: int
    bytes_total: int

    @property
    def num_tokens(self) -> dict[str, int]:
        """Group name → tokens its pages hold."""
        return {name: (pages - 1) * self.page_size for name, pages in self.num_pages.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Budget:
    """What there is to share out, in bytes and pages. full_cost, local_cost: bytes of one page, 0 = the model has no such group.

    chunk: local pages of one chunk, the most a request holds.  running: requests at once.  full_cap: most global pages allowed.
    """

    num_bytes: int
    full_cost: int
    local_cost: int
    chunk: int
    running: int
    full_cap: int

    def largest(self) -> int:
        """Pages of the longest context: one chunk of local pages, all the rest global."""
        together = self.num_bytes // (self.full_cost + self.local_cost)
        if together <= self.chunk:
            return min(together, self.full_cap)
        if not self.full_cost:
            return UNLIMITED
        return min((self.num_bytes - self.chunk * self.local_cost) // self.full_cost, self.full_cap)

    def split(self, context: int) -> tuple[int, int]:
        """→ (global, local) pages when no request has more than `context` pages, by the rule in `plan_kv`."""
        own = min(context, self.chunk)
        most_full = min(self.running * context, self.full_cap) if self.full_cost else 0
        most_local = self.running * own if self.local_cost else 0
        if not self.full_cost:
            return 0, min(self.num_bytes // self.local_cost, most_local)
        local = min(self._local_wanted(context, own), most_local)
        full = min((self.num_bytes - local * self.local_cost) // self.full_cost, most_full)
        if not self.local_cost:
            return full, 0
        return full, min((self.num_bytes - full * self.full_cost) // self.local_cost, most_local, full)

    def split_holding(self, context: int) -> tuple[int, int]:
        """As `split`, but one request of `context` pages must fit, whatever short ones lose by it."""
        full, local = self.split(context)
        if not self.full_cost or full >= context:
            return full, local
        rest = self.num_bytes - context * self.full_cost
        return context, min(local, rest // self.local_cost) if self.local_cost else 0

    def _local_wanted(self, context: int, own: int) -> int:
        """The larger of half of what short requests would like and all that full contexts need, so at least one request's."""
        short = self.num_bytes // (self.full_cost + self.local_cost)
        for_contexts = self.num_bytes * own // (context * self.full_cost + own * self.local_cost)
        return max(short // 2, for_contexts)


def plan_kv(
    groups: Sequence[KVGroup],
    *,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    bytes_per_element: int,
    budget_bytes: int,
    context_length: int | None,
    model_limit: int,
    max_running: int,
    max_total_tokens: int | None,
) -> KVPlan:
    """Size the pools. num_kv_heads: on this rank.  context_length: tokens the user asked for, None = min(model_limit, what the split holds).
    max_total_tokens: cap on the global group's tokens.

    The rule, which needs no ratio. A request of L tokens holds ⌈L/P⌉ global pages and at most C/P local ones. Two uses pull apart: were all
    requests short, equal pools would serve them best (S pages each); had all the full context, local would need C/P pages for every context
    of global ones. Local gets the larger of S/2 and what full contexts need, global the rest. So short requests keep half of what the whole
    budget could give them, or more; and as S/2 local pages take less than half of the bytes, so do long contexts (62 % for Scout).
    A `context_length` beyond that gets its global pages all the same, down to one chunk of local pages.
    No pool is larger than max_running requests of the full context can fill, and local never larger than global.

    Raises ConfigError for a context above the model's limit or a page size that does not divide the chunk, CapacityError when the budget does
    not hold the context (or not one page); it names the largest context and the flag that helps.
    """
    check_page_size(groups, page_size)
    cost = {g.name: 2 * len(g.layer_ids) * page_size * num_kv_heads * head_dim * bytes_per_element for g in groups}
    null_pages = sum(cost.values())
    budget = _Budget(
        num_bytes=max(0, budget_bytes - null_pages),
        full_cost=sum(cost[g.name] for g in groups if g.chunk_size is None),
        local_cost=sum(cost[g.name] for g in groups if g.chunk_size is not None),
        chunk=max((g.chunk_size // page_size for g in groups if g.chunk_size is not None), default=0),
        running=max_running,
        full_cap=UNLIMITED if max_total_tokens is None else max_total_tokens // page_size,
    )
    largest = min(budget.largest() * page_size, model_limit)
    if largest < 1:
        raise _no_page(page_size, null_pages, budget_bytes, max_total_tokens)
    if context_length is not None:
        _check_context(context_length, largest, model_limit, budget_bytes, max_total_tokens)
        full, local = budget.split_holding(-(-context_length // page_size))
    else:
        full, local = budget.split(-(-largest // page_size))
    pages = {g.name: (full if g.chunk_size is None else local) + 1 for g in groups}
    return KVPlan(
        page_size=page_size,
        num_pages=pages,
        bytes_per_page=cost,
        max_context=context_length or min(largest, _reach(budget, full, local) * page_size),
        largest_context=largest,
        max_running=min(max_running, *(count - 1 for count in pages.values())),
        bytes_total=sum(pages[name] * cost[name] for name in cost),
    )


def _reach(budget: _Budget, full: int, local: int) -> int:
    """Pages of the longest context these pools hold."""
    by_full = full if budget.full_cost else UNLIMITED
    by_local = local if budget.local_cost and local < budget.chunk else UNLIMITED
    return min(by_full, by_local)


def _no_page(page_size: int, page_bytes: int, budget_bytes: int, max_total_tokens: int | None) -> CapacityError:
    if max_total_tokens is not None and max_total_tokens < page_size:
        return CapacityError(
            f"--max-total-tokens {max_total_tokens} is less than one page of {page_size} tokens",
            fix=f"--max-total-tokens {page_size} or more, or a smaller --page-size",
        )
    return CapacityError(
        f"KV memory of {budget_bytes} bytes holds no context: a page of {page_size} tokens takes {page_bytes} bytes, and two are the least",
        fix=f"{MORE_MEMORY}, or a smaller --page-size",
    )


def _check_context(
    context_length: int, largest: int, model_limit: int, budget_bytes: int, max_total_tokens: int | None
) -> None:
    if context_length < 1:
        raise ConfigError(
            f"context length is {context_length}; wanted at least 1 token", fix=f"--context-length {largest}"
        )
    if context_length > model_limit:
        raise ConfigError(
            f"context length {context_length} is above the model's limit of {model_limit} tokens",
            fix=f"--context-length {largest}",
        )
    if context_length <= largest:
        return
    if max_total_tokens is not None and context_length > max_total_tokens:
        raise CapacityError(
            f"a context of {context_length} tokens is above --max-total-tokens {max_total_tokens}; the largest that fits is {largest}",
            fix=f"--max-total-tokens {context_length}, or --context-length {largest}",
        )
    raise CapacityError(
        f"a context of {context_length} tokens does not fit in {budget_bytes / 1e9:.2f} GB of KV memory; the largest that fits is {largest}",
        fix=f"--context-length {largest}, or {MORE_MEMORY}",
    )
