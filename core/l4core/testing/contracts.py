"""Contracts of vendors' libraries as data: what a function takes, what an operator's schema says, recorded per library version.

The records are JSON facts (tests/data/contracts in the repository); tests bind L4's calls against them, so a call that a library of that
version would refuse fails on a machine without it.

    python -m l4core.testing.contracts derive SOURCE NAME... > contract.json     NAME: module:function or namespace::operator
    python -m l4core.testing.contracts check SOURCE contract.json                 derives again and compares; exit status 1 on a difference

SOURCE is a wheel (`pip download --no-deps LIBRARY`), a folder that holds the package, or an installed distribution's name. Nothing of it is
imported. `--library`, `--version` and `--origin` name a folder's contents.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4core.errors import ConfigError, L4Error
from l4core.testing.contract_sources import Source, find_function, find_schema, open_source

if TYPE_CHECKING:
    import torch

__all__ = ["Contract", "derive", "differences", "load"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """functions: "module:function" → its parameters, "(q, k, causal=False)".  schemas: "namespace::op" → the operator's schema.
    origin: what it was derived from.  note: what a reader should know."""

    library: str
    version: str
    origin: str
    functions: Mapping[str, str] = field(default_factory=dict)
    schemas: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def signature(self, name: str) -> inspect.Signature:
        """The recorded parameters; a default that is not a literal (torch.bfloat16) is Ellipsis. ConfigError for a name that is not recorded."""
        return parse_signature(self._recorded(self.functions, name))

    def bind(self, name: str, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        """The call as this version would take it. TypeError, with library and version, where it would not."""
        try:
            return self.signature(name).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name} of {self.library} {self.version}: {error}") from None

    def schema(self, name: str) -> torch._C.FunctionSchema:
        """The operator's schema as torch parses it. Imports torch."""
        import torch

        namespace, _, _ = name.rpartition("::")
        return torch._C.parse_schema(f"{namespace}::{self._recorded(self.schemas, name)}")

    def _recorded(self, table: Mapping[str, str], name: str) -> str:
        if name not in table:
            raise ConfigError(f"{name} is not recorded for {self.library} {self.version}; recorded: {', '.join(table)}")
        return table[name]


def load(path: Path) -> Contract:
    """ConfigError when the file is no contract."""
    try:
        return Contract(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path.name} is no contract: {error}") from error


def parse_signature(text: str) -> inspect.Signature:
    """ "(q, *, causal=False, dtype=torch.bfloat16)" → Signature, nothing evaluated but literals."""
    function = ast.parse(f"def _{text}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    args, kinds = function.args, inspect.Parameter
    positional: list[tuple[ast.arg, Any]] = [(a, kinds.POSITIONAL_ONLY) for a in args.posonlyargs]
    positional += [(a, kinds.POSITIONAL_OR_KEYWORD) for a in args.args]
    missing = [None] * (len(positional) - len(args.defaults))
    parameters = [
        _parameter(arg, kind, default)
        for (arg, kind), default in zip(positional, [*missing, *args.defaults], strict=True)
    ]
    if args.vararg:
        parameters.append(_parameter(args.vararg, kinds.VAR_POSITIONAL, None))
    parameters += [
        _parameter(arg, kinds.KEYWORD_ONLY, default)
        for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    if args.kwarg:
        parameters.append(_parameter(args.kwarg, kinds.VAR_KEYWORD, None))
    return inspect.Signature(parameters)


def _parameter(arg: ast.arg, kind: Any, default: ast.expr | None) -> inspect.Parameter:
    if default is None:
        return inspect.Parameter(arg.arg, kind)
    try:
        value = ast.literal_eval(default)
    except ValueError:
        value = ...
    return inspect.Parameter(arg.arg, kind, default=value)


# ---------------------------------------------------------------- derive and compare


def derive(source: Source, names: Sequence[str]) -> Contract:
    """names: "module:function" and "namespace::op". ConfigError when one of them is not in the source."""
    return Contract(
        library=source.library,
        version=source.version,
        origin=source.origin,
        functions={name: find_function(source, name) for name in names if "::" not in name},
        schemas={name: find_schema(source, name) for name in names if "::" in name},
    )


def differences(recorded: Contract, source: Source) -> list[str]:
    """What the source says otherwise, one line each; empty when the record holds."""
    found = []
    for name, old in {**recorded.functions, **recorded.schemas}.items():
        try:
            new = find_schema(source, name) if "::" in name else find_function(source, name)
        except ConfigError as error:
            found.append(f"{name}: {error.message}")
            continue
        if new != old:
            found.append(f"{name}: {_changes(old, new)}")
    return found


def _changes(old: str, new: str) -> str:
    lines = difflib.ndiff(old.split(", "), new.split(", "))
    return "; ".join(line for line in lines if line[:1] in "+-")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m l4core.testing.contracts", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    deriving = commands.add_parser("derive", help="print a contract as JSON")
    deriving.add_argument("source")
    deriving.add_argument("names", nargs="+", metavar="NAME", help="module:function or namespace::operator")
    for label in ("library", "version", "origin", "note"):
        deriving.add_argument(f"--{label}")
    checking = commands.add_parser("check", help="compare a recorded contract with a library")
    checking.add_argument("source")
    checking.add_argument("contract", type=Path)
    options = parser.parse_args(argv)
    try:
        return _derive(options) if options.command == "derive" else _check(options)
    except (L4Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _derive(options: argparse.Namespace) -> int:
    given = {key: value for key in ("library", "version", "origin", "note") if (value := getattr(options, key))}
    print(json.dumps(asdict(replace(derive(open_source(options.source), options.names), **given)), indent=2))
    return 0


def _check(options: argparse.Namespace) -> int:
    recorded, source = load(options.contract), open_source(options.source)
    found = differences(recorded, source)
    for line in found:
        print(line)
    total = len(recorded.functions) + len(recorded.schemas)
    print(
        f"{recorded.library} {recorded.version} against {source.library} {source.version}: {total - len(found)} of {total} hold"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
