"""The attention kit finds what it is for: nine wrong backends fail on a CPU in the case that names their mistake, and the right one passes.

The tenth, a hidden host sync, needs a device that can tell: tests/plugins/test_privateuse1.py.
"""

from __future__ import annotations

import pytest

from l4core.testing.conformance import AttentionConformance
from l4core.testing.conformance.cases import CASE_NAMES, Heads

DEFINITION = "test_equals_the_definition"


class Kit(AttentionConformance):
    __test__ = False
    plugin = "testing.wrong_backends"
    heads = (Heads(num_q_heads=4, num_kv_heads=2, head_dim=32), Heads(num_q_heads=3, num_kv_heads=3, head_dim=16))
    combinations = 2
    page_sizes = (1, 16, 64)
    chunk = 64


class TestRight(Kit):
    __test__ = True
    backend = "right"


def failure(name: str, case: str | None, test: str = DEFINITION, **attributes: object) -> str:
    """The failure's text, "" when the test passes."""
    kit = type("Wrong", (Kit,), {"backend": name, **attributes})()
    try:
        getattr(kit, test)(*([] if case is None else [case]))
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("window instead of chunk", "local decode"),
        ("window instead of chunk", "prefill over a border"),
        ("chunk by slot", "local tree over a border"),
        ("border off by one", "local decode"),
        ("border off by one", "verify at a border"),
        ("reads the next page", "decode at page borders"),
        ("full attention", "local decode"),
        ("full attention", "local prefill, a piece a chunk"),
        ("batch-0 table", "decode at page borders"),
        ("base-2 LSE", "tree verify"),
    ],
)
def test_a_mistake_fails_in_the_case_that_names_it(name: str, case: str, dtype: str) -> None:
    """In the coarsest dtype too; the failure says which backend, version, provider and case."""
    text = failure(name, case, dtypes=((dtype, dtype),))
    assert f"{name} (testing, not installed, torch), case {case!r}: largest error" in text
    assert dtype in text


def test_a_missing_scale_fails_wherever_kv_is_fp8() -> None:
    for case in ("long decode", "whole prefill", "local decode"):
        assert f"case {case!r}" in failure("missing k_scale", case, dtypes=(("bfloat16", "float8_e4m3fn"),))


def test_a_missing_scale_fails_in_the_kit_as_it_comes() -> None:
    """Of its own choice of dtypes."""
    assert any(failure("missing k_scale", case) for case in CASE_NAMES[:8])


def test_a_stale_plan_fails_where_plans_are_made_ahead() -> None:
    assert failure("stale plan", "local decode") == ""
    assert "case 'plans made ahead'" in failure("stale plan", None, "test_plans_outlive_later_plans")


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("window instead of chunk", "long decode"),
        ("chunk by slot", "tree verify"),
        ("chunk by slot", "local decode"),
        ("border off by one", "chain verify"),
        ("full attention", "decode at page borders"),
        ("base-2 LSE", "local decode"),
        ("missing k_scale", "local decode"),
    ],
)
def test_a_mistake_passes_where_it_does_not_matter(name: str, case: str) -> None:
    assert failure(name, case, dtypes=(("float32", "float32"),)) == ""


def test_whatever_a_backend_raises_names_it_and_the_case() -> None:
    text = failure("stale plan", None, "test_two_backends_share_nothing", page_sizes=(16,))
    assert text == ""  # its state is its own: another mistake than sharing it
    text = failure("stale plan", None, "test_plans_outlive_later_plans")
    assert text.startswith("stale plan (testing, not installed, torch), case 'plans made ahead': RuntimeError: ")
