"""Contracts: the recorded ones parse, and `derive` and `check` find in a wheel what is there, and say what is not."""

from __future__ import annotations

import inspect
import json
import zipfile
from pathlib import Path

import pytest

from l4core.errors import ConfigError
from l4core.testing import contract_sources, contracts
from l4core.testing.contract_sources import find_function, find_schema, open_source

RECORDED = sorted((Path(__file__).parents[1] / "data/contracts").glob("*.json"))
SCHEMA = "fwd(Tensor q, Tensor(out!)? out=None, int window=-1, float? scale=None) -> (Tensor(out!), Tensor)"
BINARY = b"\x7fELF\0fwd(junk\xff\0" + SCHEMA.replace(", ", ",\n      ").encode() + b"\0must be fwd(q)\0a_vendor\0"
PYTHON = '''
import torch

def helper(x): ...

@torch.inference_mode()
def attend(
    q: torch.Tensor, /, k, *more, causal: bool = False, window=(-1, -1), dtype=torch.bfloat16, **options
) -> torch.Tensor:
    """What it does."""
'''


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "some_vendor-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_vendor/__init__.py", "")
        archive.writestr("some_vendor/attention.py", PYTHON)
        archive.writestr("some_vendor/_C.abi3.so", BINARY)
    return path


# ---------------------------------------------------------------- the recorded ones


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_contracts_parse(path: Path) -> None:
    contract = contracts.load(path)
    assert path.stem == f"{contract.library}-{contract.version}"
    assert contract.origin
    for name in contract.functions:
        assert contract.signature(name).parameters
    for name in contract.schemas:
        schema = contract.schema(name)
        assert schema.name == name
        assert schema.arguments


def test_every_library_that_a_backend_calls_is_recorded() -> None:
    libraries = {contracts.load(path).library for path in RECORDED}
    assert libraries == {
        "amd-aiter",
        "flashinfer-python",
        "sgl-kernel-xpu",
        "sglang-kernel",
        "tokenspeed-fa3",
        "vllm",
        "vllm-xpu-kernels",
    }


# ---------------------------------------------------------------- signatures and calls


def test_a_signature_keeps_kinds_and_literal_defaults(wheel: Path) -> None:
    text = find_function(open_source(str(wheel)), "some_vendor.attention:attend")
    assert text == "(q, /, k, *more, causal=False, window=(-1, -1), dtype=torch.bfloat16, **options)"
    parameters = contracts.parse_signature(text).parameters
    kinds = inspect.Parameter
    assert [p.kind for p in parameters.values()] == [
        kinds.POSITIONAL_ONLY,
        kinds.POSITIONAL_OR_KEYWORD,
        kinds.VAR_POSITIONAL,
        kinds.KEYWORD_ONLY,
        kinds.KEYWORD_ONLY,
        kinds.KEYWORD_ONLY,
        kinds.VAR_KEYWORD,
    ]
    assert parameters["window"].default == (-1, -1)
    assert parameters["dtype"].default is ...
    assert parameters["q"].default is inspect.Parameter.empty


def test_bind_names_library_and_version() -> None:
    contract = contracts.Contract(library="some", version="1.0", origin="", functions={"m:f": "(q, k=None)"})
    assert contract.bind("m:f", 1, k=2).arguments == {"q": 1, "k": 2}
    with pytest.raises(TypeError, match=r"m:f of some 1\.0: got an unexpected keyword argument 'v'"):
        contract.bind("m:f", 1, v=2)
    with pytest.raises(ConfigError, match="m:g is not recorded for some"):
        contract.bind("m:g")


# ---------------------------------------------------------------- finding


def test_a_schema_over_many_lines_is_found_among_other_strings(wheel: Path) -> None:
    assert find_schema(open_source(str(wheel)), "a_vendor::fwd") == SCHEMA


@pytest.mark.parametrize("size", [7, 64, len(BINARY) - 5])
def test_a_schema_across_two_blocks_of_a_large_file(wheel: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract_sources, "BLOCK", size)
    assert find_schema(open_source(str(wheel)), "a_vendor::fwd") == SCHEMA


def test_a_library_that_names_the_namespace_comes_before_one_that_does_not(wheel: Path) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("some_vendor/other.so", b"\0fwd(Tensor k) -> Tensor\0another\0")
    source = open_source(str(wheel))
    assert find_schema(source, "a_vendor::fwd") == SCHEMA
    assert find_schema(source, "another::fwd") == "fwd(Tensor k) -> Tensor"
    with pytest.raises(ConfigError, match="2 schemas"):
        find_schema(source, "dissolved_into_code::fwd")


def test_a_schema_in_cpp_source(tmp_path: Path) -> None:
    (tmp_path / "ops.cc").write_text(
        'm.def(\n  "fwd(Tensor   q,"\n  "    int[] sizes) -> Tensor");\n m.def("fwd_other(Tensor q) -> Tensor")'
    )
    assert find_schema(open_source(str(tmp_path)), "v::fwd") == "fwd(Tensor q, int[] sizes) -> Tensor"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("some_vendor.absent:f", "has no module some_vendor.absent"),
        ("some_vendor.attention:f", "defines no function f"),
        ("a_vendor::bwd", "holds no schema of a_vendor::bwd"),
    ],
)
def test_what_is_not_there(wheel: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        contracts.derive(open_source(str(wheel)), [name])


def test_an_installed_distribution_is_a_source() -> None:
    source = open_source("packaging")
    assert source.version
    assert find_function(source, "packaging.version:parse") == "(version)"


def test_a_source_that_is_none() -> None:
    with pytest.raises(ConfigError, match="no wheel, no folder and no installed distribution"):
        open_source("no-such-library-at-all")


# ---------------------------------------------------------------- the command


def test_derive_then_check(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert contracts.main(["derive", str(wheel), "some_vendor.attention:attend", "a_vendor::fwd"]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path) not in printed
    record = tmp_path / "record.json"
    record.write_text(printed)
    assert contracts.load(record).version == "1.2.3"
    assert contracts.main(["check", str(wheel), str(record)]) == 0
    assert capsys.readouterr().out == "some-vendor 1.2.3 against some-vendor 1.2.3: 2 of 2 hold\n"


def test_check_says_what_changed(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = contracts.derive(open_source(str(wheel)), ["some_vendor.attention:attend", "a_vendor::fwd"])
    functions = {
        "some_vendor.attention:attend": "(q, /, k, *more, causal=True, window=(-1, -1), **options)",
        "x:y": "()",
    }
    record = tmp_path / "record.json"
    fields = {
        "library": "some-vendor",
        "version": "1.1",
        "origin": "",
        "functions": functions,
        "schemas": dict(old.schemas),
    }
    record.write_text(json.dumps(fields))
    assert contracts.main(["check", str(wheel), str(record)]) == 1
    printed = capsys.readouterr().out
    assert "+ causal=False" in printed
    assert "+ dtype=torch.bfloat16" in printed
    assert "x:y: some-vendor 1.2.3 has no module x" in printed
    assert "1 of 3 hold" in printed


def test_errors_of_the_command_are_one_line_and_status_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "record.json"
    record.write_text('{"no": "contract"}')
    assert contracts.main(["check", str(tmp_path), str(record)]) == 2
    assert "record.json is no contract" in capsys.readouterr().err
