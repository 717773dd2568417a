"""Operators are bound by their own schema; what does not fit is refused with its name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from l4_fa3.operators import NEEDED, bind, find_library
from l4core.plugin_api import BackendUnavailable
from l4core.testing import contracts, doubles

CONTRACTS = Path(__file__).parents[3] / "tests" / "data" / "contracts"
LIBRARIES = {
    "flash_attn_interface": "tokenspeed-fa3-3.0.0.post20260810.json",
    "sgl_kernel": "sglang-kernel-0.4.10.json",
    "vllm": "vllm-0.33.0.json",
}


def contract(provider: str) -> contracts.Contract:
    return contracts.load(CONTRACTS / LIBRARIES[provider])


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the libraries, whatever this one has."""
    for name in ("flash_attn_interface", "sgl_kernel", "vllm"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("provider", LIBRARIES)
def test_every_recorded_schema_is_bound_whole(provider: str) -> None:
    """Each argument has its place and a neutral value; `arguments` puts a value where the schema has it."""
    for name, text in contract(provider).schemas.items():
        schema = torch._C.parse_schema(f"{name.partition('::')[0]}::{text}")
        operator = bind(schema, None)
        assert list(operator.places) == [argument.name for argument in schema.arguments]
        arguments = operator.arguments(num_splits=7, is_causal=True)
        assert len(arguments) == len(schema.arguments)
        assert arguments[operator.places["num_splits"]] == 7
        assert arguments[operator.places["window_size_left"]] == -1


@pytest.mark.parametrize("provider", LIBRARIES)
def test_the_option_names_the_library(provider: str) -> None:
    with doubles.fa3(contract(provider)):
        library = find_library(provider, "sm90")
        assert library.provider == provider
        assert library.fwd.places.keys() >= NEEDED
        assert library.metadata is not None
        assert find_library(None, "sm90").provider == provider


def test_libraries_are_tried_in_order() -> None:
    with doubles.fa3(contract("vllm")), doubles.fa3(contract("sgl_kernel")):
        assert find_library(None, "sm90").provider == "sgl_kernel"
        assert find_library("vllm", "sm90").provider == "vllm"


def test_an_unknown_provider_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        BackendUnavailable, match="provider is 'fa2'; wanted on sm90 one of flash_attn_interface, sgl_kernel"
    ):
        find_library("fa2", "sm90")


def test_a_build_without_kernels_for_the_device_is_not_taken() -> None:
    with pytest.raises(BackendUnavailable, match="wanted on sm80 one of sgl_kernel"):
        find_library("flash_attn_interface", "sm80")


@pytest.mark.usefixtures("nothing_installed")
def test_without_any_library_each_says_why() -> None:
    with pytest.raises(BackendUnavailable, match=r"flash_attn_interface: .*; sgl_kernel: .*; vllm: ") as error:
        find_library(None, "sm90")
    assert error.value.fix == "pip install tokenspeed-fa3"


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.library.Library]:
    """A library whose operators each test defines, under upstream's names."""
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    library = torch.library.Library("flash_attn_3", "FRAGMENT")
    yield library
    library._destroy()


def test_a_build_without_an_argument_that_is_needed_is_refused(operator: torch.library.Library) -> None:
    operator.define("fwd(Tensor q, Tensor k, Tensor v, Tensor? page_table = None, int num_splits = 0) -> Tensor")
    with pytest.raises(BackendUnavailable, match="has no argument cu_seqlens_q, is_causal"):
        find_library("flash_attn_interface", "sm90")


def test_an_argument_that_nobody_can_fill_is_refused(operator: torch.library.Library) -> None:
    known = contract("flash_attn_interface").schemas["flash_attn_3::fwd"]
    operator.define(known.replace("Tensor v,", "Tensor v, int block_shape,"))
    with pytest.raises(
        BackendUnavailable, match=r"wants block_shape \(int\), which this version of l4-fa3 does not"
    ) as e:
        find_library("flash_attn_interface", "sm90")
    assert "no build" in e.value.reason


def test_a_build_that_cannot_prepare_a_schedule_is_used_without(operator: torch.library.Library) -> None:
    operator.define(contract("flash_attn_interface").schemas["flash_attn_3::fwd"])
    assert find_library("flash_attn_interface", "sm90").metadata is None
