"""Pools from a byte budget, for shapes from the demo model to Scout on an H200."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from l4core.errors import CapacityError, ConfigError
from l4core.kv.blocks import KVGroup
from l4core.kv.manager import KVManager
from l4core.kv.planner import KVPlan, plan_kv

GIB = 1 << 30
SCOUT = (
    KVGroup(name="global", layer_ids=tuple(range(3, 48, 4)), chunk_size=None),
    KVGroup(name="local", layer_ids=tuple(i for i in range(48) if i % 4 != 3), chunk_size=8192),
)


def plan(**changed: Any) -> KVPlan:
    """One rank of eight of Scout in bfloat16: 6,144 B a global token, 18,432 B a local one."""
    given_: dict[str, Any] = {
        "groups": SCOUT,
        "page_size": 64,
        "num_kv_heads": 1,
        "head_dim": 128,
        "bytes_per_element": 2,
        "budget_bytes": 42 * GIB,
        "context_length": None,
        "model_limit": 10_485_760,
        "max_running": 256,
        "max_total_tokens": None,
    }
    given_.update(changed)
    return plan_kv(given_.pop("groups"), **given_)


def test_bytes_per_page_come_from_the_layer_counts() -> None:
    assert plan().bytes_per_page == {"global": 64 * 6_144, "local": 64 * 18_432}
    assert plan(bytes_per_element=1).bytes_per_page == {"global": 64 * 3_072, "local": 64 * 9_216}


def test_both_uses_keep_half_of_what_the_whole_budget_could_give_them() -> None:
    made = plan()
    budget = 42 * GIB
    assert made.num_tokens["local"] >= 0.499 * budget / (6_144 + 18_432)
    assert made.num_tokens["global"] >= 0.62 * budget / 6_144
    assert made.max_context == made.num_tokens["global"]


def test_the_largest_context_is_all_memory_but_one_chunk() -> None:
    largest = plan().largest_context
    assert abs(largest - (42 * GIB - 8_192 * 18_432) / 6_144) < 4 * 64 + 1
    exact = plan(context_length=largest)
    assert exact.max_context == largest
    assert exact.num_tokens["local"] >= 8_192
    with pytest.raises(CapacityError, match=str(largest)) as error:
        plan(context_length=largest + 64)
    assert f"--context-length {largest}" in error.value.fix
    assert "--mem-fraction-static" in error.value.fix


def test_contexts_within_a_chunk_get_equal_pools() -> None:
    """A local page then is used whenever a global one is, so any other split wastes one of them."""
    tokens = plan(context_length=8_192).num_tokens
    assert tokens["global"] - tokens["local"] in range(0, 4 * 64)


def test_a_context_of_a_few_chunks_gets_the_local_pages_it_needs() -> None:
    tokens = plan(context_length=16_384).num_tokens
    assert tokens["local"] * 2 == pytest.approx(tokens["global"], rel=0.01)


def test_few_requests_cap_the_local_pool_and_the_rest_is_context() -> None:
    made = plan(max_running=4)
    assert made.num_tokens["local"] == 4 * 8_192
    assert made.max_context == pytest.approx((42 * GIB - 4 * 8_192 * 18_432) / 6_144, rel=0.001)


def test_no_pool_is_larger_than_the_requests_can_fill() -> None:
    made = plan(max_running=3, context_length=20_000)
    assert made.num_pages == {"global": 1 + 3 * 313, "local": 1 + 3 * 128}
    assert made.bytes_total == made.num_pages["global"] * 64 * 6_144 + made.num_pages["local"] * 64 * 18_432
    assert made.bytes_total < GIB


def test_the_context_stops_at_the_models_limit() -> None:
    made = plan(model_limit=1_048_576, budget_bytes=80 * GIB)
    assert made.max_context == made.largest_context == 1_048_576
    with pytest.raises(ConfigError, match="1048577 is above the model's limit of 1048576"):
        plan(model_limit=1_048_576, context_length=1_048_577)


def test_a_context_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="context length is 0; wanted at least 1"):
        plan(context_length=0)


def test_a_context_without_whole_pages_is_honoured() -> None:
    assert plan(context_length=100_001, max_running=1).num_pages == {"global": 1 + 1_563, "local": 1 + 128}
    assert plan(context_length=100_001).max_context == 100_001


def test_max_total_tokens_caps_the_global_pool() -> None:
    made = plan(max_total_tokens=100_000)
    assert made.num_tokens["global"] == 99_968
    assert made.max_context == 99_968
    assert made.num_tokens["local"] <= 99_968
    with pytest.raises(CapacityError, match="above --max-total-tokens 100000; the largest that fits is 99968"):
        plan(max_total_tokens=100_000, context_length=200_000)
    with pytest.raises(CapacityError, match="less than one page"):
        plan(max_total_tokens=63)


@pytest.mark.parametrize("budget_bytes", [-5, 0, 64 * 24_576, 2 * 64 * 24_576 - 1])
def test_a_budget_without_a_page_is_refused(budget_bytes: int) -> None:
    with pytest.raises(CapacityError, match=f"KV memory of {budget_bytes} bytes holds no context") as error:
        plan(budget_bytes=budget_bytes)
    assert "--mem-fraction-static" in error.value.fix


def test_two_pages_of_each_group_are_the_least() -> None:
    made = plan(budget_bytes=2 * 64 * 24_576)
    assert made.num_pages == {"global": 2, "local": 2}
    assert made.max_context == 64
    assert made.max_running == 1


def test_models_of_one_group() -> None:
    full = plan(groups=SCOUT[:1])
    assert set(full.num_pages) == {"global"}
    assert full.max_context == pytest.approx(42 * GIB / 6_144, abs=200)
    local = plan(groups=SCOUT[1:], budget_bytes=GIB)
    assert local.num_pages == {"local": GIB // (64 * 18_432)}
    assert local.max_context == 10_485_760
    narrow = plan(groups=SCOUT[1:], budget_bytes=GIB // 16)
    assert narrow.max_context == (GIB // 16 // (64 * 18_432) - 1) * 64


def attempt(**options: Any) -> KVPlan | CapacityError:
    try:
        return plan(**options)
    except CapacityError as error:
        return error


@st.composite
def questions(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a small model and a small budget; context_length is not among them."""
    num_global, num_local = draw(st.sampled_from([(1, 3), (3, 9), (2, 1), (1, 0), (0, 2)]))
    full = KVGroup(name="global", layer_ids=tuple(range(num_global)), chunk_size=None)
    local = KVGroup(name="local", layer_ids=tuple(range(10, 10 + num_local)), chunk_size=draw(st.sampled_from([4, 8])))
    return {
        "groups": [group for group in (full, local) if group.layer_ids],
        "page_size": draw(st.sampled_from([1, 2, 4])),
        "num_kv_heads": 1,
        "head_dim": 4,
        "model_limit": 300,
        "budget_bytes": draw(st.integers(1, 200_000)),
        "max_running": draw(st.integers(1, 40)),
        "max_total_tokens": draw(st.one_of(st.none(), st.integers(1, 500))),
    }


@given(asked=questions(), context=st.one_of(st.none(), st.integers(1, 300)))
def test_every_plan_fits_and_holds_what_it_promises(asked: dict[str, Any], context: int | None) -> None:
    made = attempt(**asked, context_length=context)
    if isinstance(made, KVPlan):
        check_plan(made, asked)
        assert context in (None, made.max_context)
        at_most = attempt(**asked, context_length=made.largest_context)
        assert isinstance(at_most, KVPlan)
        check_plan(at_most, asked)
        return
    free = attempt(**asked)
    if isinstance(free, KVPlan):
        assert context is not None
        assert context > free.largest_context
        assert f"the largest that fits is {free.largest_context}" in made.message
    else:
        assert "holds no context" in free.message or "less than one page" in free.message


def check_plan(made: KVPlan, asked: dict[str, Any]) -> None:
    groups, page_size, most_running = asked["groups"], asked["page_size"], asked["max_running"]
    assert made.bytes_total == sum(made.num_pages[name] * made.bytes_per_page[name] for name in made.num_pages)
    assert made.bytes_total <= asked["budget_bytes"]
    assert made.max_context <= made.largest_context <= 300
    assert 1 <= made.max_running <= most_running
    assert KVManager(groups, page_size, made.num_pages).could_finish_alone(made.max_context)
    pages = [made.num_pages[group.name] - 1 for group in groups]
    fillable = [most_running * group.peak_pages(0, made.largest_context, page_size) for group in groups]
    assert all(count <= most for count, most in zip(pages, fillable, strict=True)), "memory that no request can use"
    assert len(pages) == 1 or pages[1] <= pages[0]
    cap = asked["max_total_tokens"]
    assert cap is None or groups[0].chunk_size is not None or pages[0] * page_size <= cap
