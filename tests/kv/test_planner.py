"""Memory from a byte budget, for shapes from the demo model to Scout on an H200."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given

from l4core.errors import CapacityError, ConfigError
from l4core.kv.blocks import KVGroup
from l4core.kv.manager import KVManager
from l4core.kv.planner import Footprint, KVPlan, plan_kv, ratio_cost
from l4core.kv.superpages import superpage_shape

GIB = 1 << 30
PAGE = 64 * 18_432
"""Bytes of a superpage: one local page of 36 layers, or three global ones of 12."""
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


def test_a_superpage_is_one_local_page_or_three_global_ones() -> None:
    made = plan()
    assert made.superpage_bytes == PAGE
    assert dict(made.shape.pages) == {"global": 3, "local": 1}
    assert dict(made.waste) == {"global": 0.0, "local": 0.0}
    assert made.num_superpages == 42 * GIB // PAGE
    assert plan(bytes_per_element=1).superpage_bytes == PAGE // 2


def test_one_long_request_may_use_all_memory_but_a_chunk() -> None:
    made = plan()
    largest = (42 * GIB // PAGE - 1 - 128) * 3 * 64
    assert made.max_context == made.largest_context == largest
    assert largest == pytest.approx((42 * GIB - 8_192 * 18_432) / 6_144, rel=1e-4)
    assert plan(context_length=largest).max_context == largest
    with pytest.raises(CapacityError, match=str(largest)) as error:
        plan(context_length=largest + 1)
    assert f"--context-length {largest}" in error.value.fix
    assert "--mem-fraction-static" in error.value.fix


def test_there_is_no_more_than_the_requests_can_fill() -> None:
    made = plan(max_running=3, context_length=20_000)
    assert made.num_superpages == 1 + 3 * (105 + 128)
    assert made.bytes_total == made.num_superpages * PAGE < GIB
    assert made.num_tokens == {"global": 3 * 233 * 3 * 64, "local": 3 * 233 * 64}


def test_the_context_stops_at_the_models_limit() -> None:
    made = plan(model_limit=1_048_576, budget_bytes=80 * GIB)
    assert made.max_context == made.largest_context == 1_048_576
    with pytest.raises(ConfigError, match="1048577 is above the model's limit of 1048576"):
        plan(model_limit=1_048_576, context_length=1_048_577)


def test_a_context_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="context length is 0; wanted at least 1"):
        plan(context_length=0)


def test_a_context_without_whole_pages_is_honoured() -> None:
    made = plan(context_length=100_001, max_running=1)
    assert made.max_context == 100_001
    assert made.num_superpages == 1 + -(-1_563 // 3) + 128


def test_max_total_tokens_caps_memory() -> None:
    """One request of all the tokens fits; so do short ones that share them out, but for partial pages."""
    one = plan(max_total_tokens=100_000, max_running=1)
    assert one.num_superpages == 1 + -(-1_563 // 3) + 128
    assert one.max_context == 100_000
    many = plan(max_total_tokens=100_000, max_running=100)
    assert many.num_superpages == 1 + -(-1_563 // 3) + 1_563
    with pytest.raises(CapacityError, match="above --max-total-tokens 100000; the largest that fits is 100000"):
        plan(max_total_tokens=100_000, context_length=200_000)
    with pytest.raises(CapacityError, match="less than one page"):
        plan(max_total_tokens=0)
    assert plan(max_total_tokens=63).max_context == 63


@pytest.mark.parametrize(("ratio", "bytes_per_token"), [(1.0, 24_576), (0.8, 20_890), (0.1, 7_987), (0.04, 6_881)])
def test_a_ratio_caps_local_kv_by_sglangs_arithmetic(ratio: float, bytes_per_token: int) -> None:
    """Its bytes a token (peers' figures at eight ranks) give the global tokens of its split, and ratio times those are the cap."""
    made = plan(local_ratio=ratio, max_running=100_000)
    full = made.num_superpages * PAGE / bytes_per_token
    assert made.num_tokens["local"] == pytest.approx(full * ratio, rel=2e-3)
    assert made.num_tokens["global"] == plan(max_running=100_000).num_tokens["global"]
    assert made.largest_context == plan().largest_context, "a long request needs one chunk, which the cap holds"


def test_what_a_ratio_costs_is_said() -> None:
    made = plan(local_ratio=0.1)
    free, capped = made.num_superpages - 1, made.max_local
    assert capped is not None
    line = ratio_cost(made, SCOUT)
    assert f"memory holds {capped // 16:,} requests of 1,000 tokens at once, without it {free // 22:,}" in line
    assert ratio_cost(plan(), SCOUT) == ""


def test_a_ratio_that_holds_no_chunk_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"caps local KV at .* tokens; a request of .* tokens needs 8192") as error:
        plan(local_ratio=0.0001)
    least = float(error.value.fix.split()[1])
    assert 128 <= (plan(local_ratio=least).max_local or 0) < 150
    with pytest.raises(ConfigError, match="caps local KV"):
        plan(local_ratio=least - 0.0001)
    assert plan(local_ratio=0.001, context_length=500, max_running=1_000).max_local is not None
    with pytest.raises(ConfigError, match="no layer drops its local pages"):
        plan(local_ratio=0.5, groups=SCOUT[:1])


def test_a_plain_cache_pays_for_all_layers_in_every_token() -> None:
    groups = (SCOUT[0], replace(SCOUT[1], keep_all=True))
    made = plan(groups=groups)
    assert made.largest_context == pytest.approx(42 * GIB / 24_576, rel=1e-3)
    with pytest.raises(ConfigError, match="no layer drops its local pages"):
        plan(local_ratio=0.5, groups=groups)


@pytest.mark.parametrize("budget_bytes", [-5, 0, PAGE, 3 * PAGE - 1])
def test_a_budget_without_room_for_a_token_is_refused(budget_bytes: int) -> None:
    with pytest.raises(CapacityError, match=f"KV memory of {budget_bytes} bytes holds no context") as error:
        plan(budget_bytes=budget_bytes)
    assert "--mem-fraction-static" in error.value.fix
    assert plan(budget_bytes=3 * PAGE).max_context == 64


@st.composite
def models(draw: st.DrawFn) -> list[KVGroup]:
    num_global, num_local = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    full = KVGroup(name="global", layer_ids=tuple(range(num_global)), chunk_size=None)
    local = KVGroup(
        name="local",
        layer_ids=tuple(range(num_local)),
        chunk_size=4 * draw(st.integers(1, 5)),
        keep_all=draw(st.integers(0, 3)) == 0,
    )
    return [group for group in (full, local) if group.layer_ids] or [
        KVGroup(name="global", layer_ids=(0,), chunk_size=None)
    ]


@given(groups=models(), superpages=st.integers(3, 60), page_size=st.sampled_from([1, 2, 4]), limit=st.integers(1, 300))
def test_the_largest_context_is_what_the_manager_can_hold_and_no_more(
    groups: list[KVGroup], superpages: int, page_size: int, limit: int
) -> None:
    shape = superpage_shape(groups)
    made = plan(
        groups=groups,
        page_size=page_size,
        head_dim=1,
        bytes_per_element=1,
        budget_bytes=superpages * shape.units * page_size,
        model_limit=limit,
        max_running=1000,
    )
    kv = KVManager(groups, page_size, made.num_superpages)
    assert kv.could_finish_alone(made.max_context + 1)  # the last token needs no slot
    assert made.bytes_total <= superpages * shape.units * page_size
    if made.max_context < limit:
        footprint = Footprint(groups=groups, shape=shape, page_size=page_size)
        assert footprint.superpages(made.max_context + 1) > superpages - 1


@given(
    superpages=st.integers(6, 60),
    page_size=st.sampled_from([1, 2, 4]),
    limit=st.integers(1, 300),
    ratio=st.floats(0.01, 1.0),
    layers=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_a_cap_that_is_accepted_holds_the_largest_context(
    superpages: int, page_size: int, limit: int, ratio: float, layers: tuple[int, int]
) -> None:
    groups = [
        KVGroup(name="global", layer_ids=tuple(range(layers[0])), chunk_size=None),
        KVGroup(name="local", layer_ids=tuple(range(10, 10 + layers[1])), chunk_size=8),
    ]
    asked = {
        "groups": groups,
        "page_size": page_size,
        "head_dim": 1,
        "bytes_per_element": 1,
        "budget_bytes": superpages * superpage_shape(groups).units * page_size,
        "model_limit": limit,
        "max_running": 1000,
    }
    try:
        made = plan(local_ratio=ratio, **asked)
    except ConfigError:
        assume(False)
    assert made.max_context == plan(**asked).max_context
    kv = KVManager(groups, page_size, made.num_superpages, max_local=made.max_local)
    assert kv.could_finish_alone(made.max_context + 1)
    assert kv.pages_total == {name: tokens // page_size for name, tokens in made.num_tokens.items()}


def test_published_contexts_fit() -> None:
    """Scout in bfloat16 on eight H100s of 80 GB, 41.9 GiB of KV a rank: 7.27 million tokens (SGLang publishes 5 with its pools split by ratio)."""
    made = plan(budget_bytes=int(41.9 * GIB))
    assert made.max_context == pytest.approx(7_270_000, rel=0.01)
