"""Creation turns whatever AITER's import raises into a refusal, binds both signatures, and the calls keep the kernel's rules."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from l4_aiter.backend import create
from l4core.attention.smoke import smoke_check
from l4core.plugin_api import (
    AttentionContext,
    AttentionMetadata,
    AttentionRequirements,
    BackendUnavailable,
    ChunkInfo,
    KVView,
    Tier,
    Usable,
)
from l4core.testing import contracts, doubles
from l4core.testing.platforms import fake_platform

CONTRACTS = Path(__file__).parents[3] / "tests/data/contracts"
OLD = contracts.load(CONTRACTS / "amd-aiter-0.1.7.post2.dev18.json")
NEW = contracts.load(CONTRACTS / "amd-aiter-0.1.20.json")
REQUIREMENTS = AttentionRequirements(
    num_q_heads=5, num_kv_heads=1, head_dim=128, q_dtype="bfloat16", kv_dtype="bfloat16", page_size=64, chunk_size=8192
)
FP8 = replace(REQUIREMENTS, kv_dtype="float8_e4m3fnuz")
BOTH = pytest.mark.parametrize("recorded", [OLD, NEW], ids=lambda contract: contract.version)


def context(req: AttentionRequirements = REQUIREMENTS) -> AttentionContext:
    return AttentionContext(
        requirements=req,
        platform=fake_platform("gfx942", {"aiter": "0.1.20"}),
        device="cpu",
        page_size=64,
        options={},
        logger=logging.getLogger(__name__),
    )


def decode(lengths: list[int], rows: int) -> AttentionMetadata:
    """One row a sequence, page b + 1 for sequence b."""
    count = len(lengths)
    return AttentionMetadata(
        cu_seqlens_q=torch.arange(count + 1, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=torch.arange(1, count + 1, dtype=torch.int32)[:, None],
        max_seqlen_q=rows,
        max_seqlen_k=64,
        num_seqs=count,
        phase="decode",
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package `aiter`, forgotten afterwards."""
    (tmp_path / "aiter").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "aiter"
    sys.modules.pop("aiter", None)


# ---------------------------------------------------------------- creation


@BOTH
@pytest.mark.parametrize("req", [REQUIREMENTS, FP8], ids=["bfloat16", "fp8"])
def test_core_s_smoke_check_passes(recorded: contracts.Contract, req: AttentionRequirements) -> None:
    verdict = Usable(tier=Tier.NATIVE, page_sizes=(64, 128), empty_rows=False, finite_tail=True)
    with doubles.aiter(recorded):
        smoke_check(create(context(req)), verdict, context(req))


def test_nothing_installed() -> None:
    with pytest.raises(BackendUnavailable) as refusal:
        create(context())
    assert "aiter.ops.triton.attention.unified_attention: ModuleNotFoundError" in refusal.value.reason
    assert "aiter.ops.triton.unified_attention: ModuleNotFoundError" in refusal.value.reason
    assert "github.com/ROCm/aiter" in refusal.value.fix


@pytest.mark.parametrize(
    "line", ["raise RuntimeError('ROCm version file not found')", "{}['ROCM_PATH']", "assert False, 'no GPU'"]
)
def test_an_import_that_fails_in_its_own_way_is_a_refusal(line: str, folder: Path) -> None:
    (folder / "__init__.py").write_text(line)
    with pytest.raises(BackendUnavailable, match=r"aiter cannot be used: .*(RuntimeError|KeyError|AssertionError)"):
        create(context())


def test_the_other_aiter_on_pypi_is_a_refusal(folder: Path) -> None:
    """A toolbox for asynchronous iterators goes by the same import name."""
    (folder / "__init__.py").write_text("def map_aiter(f, it): ...")
    with pytest.raises(BackendUnavailable, match=r"No module named 'aiter\.ops'"):
        create(context())


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ("(q, k, v, out, cu_seqlens_q, max_seqlen_q)", "seqused_k"),
        (OLD.functions["aiter.ops.triton.unified_attention:unified_attention"].replace("q_descale", "q_descale, plan"), "plan"),
    ],
)  # fmt: skip
def test_an_unknown_signature_is_refused_by_name(parameters: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "aiter.ops.triton.attention.unified_attention"
    for parent in ("aiter", "aiter.ops", "aiter.ops.triton", "aiter.ops.triton.attention", name):
        module = ModuleType(parent)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, parent, module)
    module.unified_attention = lambda **given: None  # type: ignore[attr-defined]
    module.unified_attention.__signature__ = contracts.parse_signature(parameters)
    with pytest.raises(BackendUnavailable, match=f"version that is not known: .*{words}"):
        create(context())


# ---------------------------------------------------------------- calls


@BOTH
def test_padding_rows_of_a_decode_are_left_out(recorded: contracts.Contract) -> None:
    """The reduction runs over the rows of q, and looks for the sequence of each."""
    q, out = torch.randn(4, 5, 128, dtype=torch.bfloat16), torch.full((4, 5, 128), 7.0, dtype=torch.bfloat16)
    k = torch.randn(3, 64, 1, 128, dtype=torch.bfloat16)
    with doubles.aiter(recorded) as double:
        backend = create(context())
        backend.attend(q, KVView(k=k, v=k), backend.plan(decode([9, 64], rows=4)), out)
    assert double.calls[-1]["q"].shape[0] == 2
    assert double.calls[-1]["max_seqlen_q"] == 1  # the kernel's way of decoding goes by it
    for row, keys in enumerate((9, 64)):
        seen = k[row + 1, :keys, 0].float()
        expected = torch.softmax(q[row].float() @ seen.T * 128**-0.5, dim=-1) @ seen
        torch.testing.assert_close(out[row].float(), expected, atol=2e-2, rtol=0)
    assert (out[2:] == 7.0).all()


@BOTH
def test_both_scales_are_always_given_for_fp8(recorded: contracts.Contract) -> None:
    q, out = torch.randn(1, 5, 128, dtype=torch.bfloat16), torch.empty(1, 5, 128, dtype=torch.bfloat16)
    k = torch.randn(2, 64, 1, 128).to(torch.float8_e4m3fnuz)
    with doubles.aiter(recorded) as double:
        backend = create(context(FP8))
        plan = backend.plan(decode([5], rows=1))
        backend.attend(q, KVView(k=k, v=k, v_scale=torch.tensor(0.5)), plan, out)
    keys = k[1, :5, 0].float()
    expected = torch.softmax(q[0].float() @ keys.T * 128**-0.5, dim=-1) @ (keys * 0.5)
    torch.testing.assert_close(out[0].float(), expected, atol=2e-2, rtol=0)
    assert double.calls[-1]["q_descale"] is None  # refused by older versions


@BOTH
def test_no_scales_without_fp8(recorded: contracts.Contract) -> None:
    q, k = torch.randn(1, 5, 128, dtype=torch.bfloat16), torch.randn(2, 64, 1, 128, dtype=torch.bfloat16)
    with doubles.aiter(recorded) as double:
        backend = create(context())
        backend.attend(q, KVView(k=k, v=k), backend.plan(decode([5], rows=1)), torch.empty_like(q))
    assert double.calls[-1]["k_descale"] is None


def test_what_was_not_declared_is_an_error() -> None:
    with doubles.aiter(NEW):
        backend = create(context())
    with pytest.raises(ValueError, match="neither tree_mask nor native_chunk"):
        backend.plan(replace(decode([5], rows=1), chunk=ChunkInfo(size=8192)))
