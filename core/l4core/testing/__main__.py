"""`python -m l4core.testing NAME`: the conformance kits for one installed attention backend, and conformance.json with what they proved.

    python -m l4core.testing fa3 --device cuda --out benchmarks/results/conformance/fa3-h100.json
    python -m l4core.testing triton --device cuda --combinations all
    python -m l4core.testing intel_xpu --tests plugins/intel_xpu/tests/test_conformance.py --out results/     a double's own kit classes

The same classes that plugin authors subclass (docs/plugins/testing.md). Exit status: pytest's, 0 when nothing failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from l4core.errors import ConfigError, L4Error
from l4core.testing.conformance.entry import module_of

__all__ = ["main"]

_KITS = """
from l4core.testing.conformance import AttentionConformance, ProbeConformance, QuickAttentionConformance

class TestProbe(ProbeConformance):
    plugin, backend = {plugin!r}, {backend!r}

class TestAttention({base}):
    plugin, backend, device, level = {plugin!r}, {backend!r}, {device!r}, {level!r}
    options = {options!r}
{combinations}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kits; → exit status."""
    args = _parser().parse_args(arguments)
    try:
        return _run(args)
    except L4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m l4core.testing", description="Conformance of one attention backend."
    )
    parser.add_argument("name", metavar="NAME", help="the backend's name, as `l4 backends` prints it")
    parser.add_argument("--device", default="cpu", help="torch device string (default cpu)")
    parser.add_argument(
        "--out", type=Path, default=Path("conformance.json"), help="a .json file, or a folder for one a kit"
    )
    parser.add_argument("--level", default="R", help="what a green run proves: R, S, V, X, D or P (default R)")
    parser.add_argument("--attention-option", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--combinations", default="", help="of heads, dtypes and pages for each case: a number or all")
    parser.add_argument("--quick", action="store_true", help="small heads and chunks, for an interpreter")
    parser.add_argument("--tests", type=Path, help="run the kit classes of this file instead (their attributes count)")
    parser.add_argument("--commit", default="", help="where this tree has no .git: what the file shall say")
    return parser


def _run(args: argparse.Namespace) -> int:
    import pytest

    from l4core.testing.record import Recorder, write_records

    recorder = Recorder(commit=args.commit)
    with tempfile.TemporaryDirectory() as folder:
        tests = args.tests or _write_tests(args, Path(folder))
        (Path(folder) / "pytest.ini").write_text("[pytest]\n")
        quiet = [
            "-q",
            "-p",
            "no:cacheprovider",
            "--import-mode=importlib",
            "-c",
            f"{folder}/pytest.ini",
            "--rootdir",
            folder,
        ]
        status = int(pytest.main([*quiet, str(tests)], plugins=[recorder]))
    records = [record for record in recorder.records() if record.backend == args.name]
    if not records:
        raise ConfigError(f"{tests} ran no attention kit of the backend {args.name!r}")
    if args.out.suffix == ".json" and len(records) == 1:
        paths = write_records(records, args.out.parent, name=args.out.name)
    else:
        paths = write_records(records, args.out)
    for record, path in zip(records, paths, strict=True):
        found = ", ".join(f"{number} {outcome}" for outcome, number in record.counts.items())
        print(
            f"{record.backend} ({record.package} {record.version}, {record.provider}) on {record.card}: {found} → {path}"
        )
    return status


def _write_tests(args: argparse.Namespace, folder: Path) -> Path:
    """A test file as a plugin author writes it."""
    combinations = _combinations(args.combinations)
    text = _KITS.format(
        plugin=module_of(args.name),
        backend=args.name,
        device=args.device,
        level=args.level,
        options=_options(args.attention_option),
        base="QuickAttentionConformance" if args.quick else "AttentionConformance",
        combinations=f"    combinations = {combinations}" if args.combinations else "",
    )
    path = folder / "test_conformance.py"
    path.write_text(text)
    return path


def _combinations(text: str) -> int | None:
    if text in ("", "all"):
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--combinations is {text!r}; wanted a positive number or all")
    return int(text)


def _options(items: Sequence[str]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not (key and equals):
            raise ConfigError(f"--attention-option is {item!r}; wanted KEY=VALUE")
        found[key] = value
    return found


if __name__ == "__main__":
    sys.exit(main())
