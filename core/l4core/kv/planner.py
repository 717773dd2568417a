"""How much KV memory holds: one pure function of shapes and a byte budget; `l4 plan` and the engine's start-up both call it. Torch-free."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from l4core.errors import CapacityError, ConfigError
from l4core.kv.blocks import KVGroup, check_page_size
from l4core.kv.superpages import SuperpageShape, superpage_shape

LOCAL = "local"
MORE_MEMORY = "more memory for KV (--kv-cache-dtype fp8_e4m3, --quantization, --mem-fraction-static)"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPlan:
    """shape: how a superpage is cut.  num_superpages: in memory, the null one among them.  superpage_bytes: K and V of one, on this rank.

    max_context: tokens (prompt + output) one request may have.  largest_context: the most that --context-length could ask of the same budget.
    max_running: sequences in one step.  bytes_total: all superpages.  waste: group name → share of a superpage's bytes its use leaves empty.
    max_local: superpages of local pages at most, None = no cap.
    """

    page_size: int
    shape: SuperpageShape
    num_superpages: int
    superpage_bytes: int
    max_context: int
    largest_context: int
    max_running: int
    waste: Mapping[str, float]
    max_local: int | None = None

    @property
    def bytes_total(self) -> int:
        return self.num_superpages * self.superpage_bytes

    @property
    def num_tokens(self) -> dict[str, int]:
        """Group name → tokens it could hold, had it all superpages that it may have."""
        usable = self.num_superpages - 1
        cap = usable if self.max_local is None else self.max_local
        return {
            name: (min(usable, cap) if name == LOCAL else usable) * per * self.page_size
            for name, per in self.shape.pages.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Superpages that sequences of given lengths take. max_local: of all sequences together, None = no cap."""

    groups: Sequence[KVGroup]
    shape: SuperpageShape
    page_size: int
    max_local: int | None = None

    def superpages(self, tokens: int) -> int:
        """Most that one sequence holds while its KV grows to `tokens` tokens."""
        return self._sum(tokens, 1)

    def superpages_of_all(self, tokens: int, max_running: int) -> int:
        """What `tokens` tokens take in sum, however many of at most `max_running` sequences they belong to (but for the last, partial pages)."""
        return self._sum(tokens, max_running)

    def at_once(self, superpages: int, tokens: int) -> int:
        """Sequences of `tokens` tokens that so many superpages hold together."""
        count = superpages // self.superpages(tokens)
        local = sum(self._of(group, tokens, 1) for group in self.groups if group.chunk_size is not None)
        return count if self.max_local is None or not local else min(count, self.max_local // local)

    def _sum(self, tokens: int, sequences: int) -> int:
        return sum(self._of(group, tokens, sequences) for group in self.groups)

    def _of(self, group: KVGroup, tokens: int, sequences: int) -> int:
        kept = tokens if group.lifetime is None else min(tokens, sequences * group.lifetime)
        return math.ceil(math.ceil(kept / self.page_size) / self.shape.pages[group.name])

    def largest(self, superpages: int, limit: int) -> int:
        """Most tokens, at most `limit`, of one sequence that holds so many superpages; 0 when there is no room for one."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.superpages(middle) <= superpages else (low, middle - 1)
        return low


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
    local_ratio: float | None = None,
) -> KVPlan:
    """Size KV memory. num_kv_heads: on this rank.  context_length: tokens the user asked for, None = min(model_limit, what fits).
    max_total_tokens: cap on the tokens of all requests together.  local_ratio: see `local_cap`, None = no cap.

    Nothing is split between groups: a superpage goes to whichever needs it, at run time. So one request may use all of it but a chunk's local
    pages, and many short ones as many local as global tokens. There is never more memory than `max_running` requests of the full context fill.

    Raises ConfigError for a context above the model's limit, a page size that does not divide the chunk or a ratio whose local pages hold no chunk,
    CapacityError when the budget does not hold the context (or not one page); it names the largest context and the flag that helps.
    """
    check_page_size(groups, page_size)
    shape = superpage_shape(groups)
    size = shape.units * page_size * num_kv_heads * head_dim * bytes_per_element
    footprint = Footprint(groups=groups, shape=shape, page_size=page_size)
    usable = budget_bytes // size - 1
    if max_total_tokens is not None:
        usable = min(usable, footprint.superpages_of_all(max_total_tokens, max_running))
    largest = footprint.largest(usable, model_limit)
    if max_total_tokens is not None:
        largest = min(largest, max_total_tokens)
    if largest < 1:
        raise _no_page(page_size, size * (1 + len(groups)), budget_bytes, max_total_tokens)
    if context_length is not None:
        _check_context(context_length, largest, model_limit, budget_bytes, max_total_tokens)
    context = context_length or largest
    usable = min(usable, max_running * footprint.superpages(context))
    max_local = None if local_ratio is None else local_cap(footprint, usable, local_ratio, context)
    most_running = min(max_running, usable // len(groups))
    return KVPlan(
        page_size=page_size,
        shape=shape,
        num_superpages=usable + 1,
        superpage_bytes=size,
        max_context=context,
        largest_context=largest,
        max_running=most_running if max_local is None else min(most_running, max_local),
        waste={g.name: shape.waste(g) for g in groups},
        max_local=max_local,
    )


def local_cap(footprint: Footprint, usable: int, ratio: float, context: int) -> int:
    """Superpages that local pages may take of `usable` under `--swa-full-tokens-ratio`, by SGLang's arithmetic (0.5.23): in its pools split by ratio

        global tokens = bytes / (bytes of a token's global layers + ratio · bytes of its local layers), local tokens = ratio · global tokens,

    each rounded down to whole pages. Here the local share is a cap, and what it leaves free is global pages' all the same: a long request gains
    nothing, short ones lose. Raises ConfigError where no layer is local or a request of `context` tokens would not find its chunk's pages.
    """
    group = next((g for g in footprint.groups if g.lifetime is not None), None)
    if group is None or group.chunk_size is None:
        raise ConfigError(
            f"--swa-full-tokens-ratio is {ratio:g}, but no layer drops its local pages: nothing to cap",
            fix="leave out --swa-full-tokens-ratio",
        )
    page, per = footprint.page_size, footprint.shape.pages[group.name]
    units = 2 * sum(len(g.layer_ids) * (ratio if g is group else 1) for g in footprint.groups)
    full = int(usable * footprint.shape.units / units)  # pages
    cap = min(usable, int(full * ratio) // per)
    least = math.ceil(math.ceil(min(context, group.chunk_size) / page) / per)
    if cap < least:
        raise ConfigError(
            f"--swa-full-tokens-ratio {ratio:g} caps local KV at {cap * per * page} tokens; a request of {context} tokens needs "
            f"{min(context, group.chunk_size)}",
            fix=f"--swa-full-tokens-ratio {_least_ratio(footprint, usable, group, least)} or more, or none: all memory then serves both",
        )
    return cap


def _least_ratio(footprint: Footprint, usable: int, group: KVGroup, least: int) -> float:
    """The smallest ratio, to four decimals, whose cap is `least` superpages: `local_cap` solved for it."""
    units = 2 * (
        least * footprint.shape.pages[group.name] + 1
    )  # of one layer; a page more than needed, for the rounding down
    others = sum(len(g.layer_ids) for g in footprint.groups if g is not group)
    exact = units * others / max(1, usable * footprint.shape.units - units * len(group.layer_ids))
    return min(1.0, math.ceil(exact * 10_000) / 10_000)


def ratio_cost(plan: KVPlan, groups: Sequence[KVGroup]) -> str:
    """One line on what the cap on local KV costs, "" without one."""
    if plan.max_local is None:
        return ""
    free = Footprint(groups=groups, shape=plan.shape, page_size=plan.page_size)
    capped = dataclasses.replace(free, max_local=plan.max_local)
    usable, tokens = plan.num_superpages - 1, min(1_000, plan.max_context)
    return (
        f"--swa-full-tokens-ratio caps local KV at {plan.num_tokens[LOCAL]:,} tokens: memory holds {capped.at_once(usable, tokens):,} requests of "
        f"{tokens:,} tokens at once, without it {free.at_once(usable, tokens):,}; the largest context is the same"
    )


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
