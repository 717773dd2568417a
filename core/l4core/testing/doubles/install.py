"""Makes a double importable and its operators callable for the time of a `with` block; both are gone afterwards."""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch

from l4core.testing.contracts import Contract
from l4core.testing.doubles import aiter_function, fa3_operators, xpu_sgl, xpu_vllm

__all__ = ["Arguments", "Double", "aiter", "fa3", "xpu"]

Arguments: TypeAlias = dict[str, Any]
Body: TypeAlias = Callable[[Arguments], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Double:
    """calls: of the attention operator, arguments by name, oldest first."""

    contract: Contract
    calls: list[Arguments] = field(default_factory=list)


@contextlib.contextmanager
def fa3(contract: Contract) -> Iterator[Double]:
    """FlashAttention-3 as this contract's library offers it. KeyError when the contract is of no such library."""
    namespace = next(name.partition("::")[0] for name in contract.schemas)
    with _installed(contract, fa3_operators.BODIES, fa3_operators.MODULES[namespace], "fwd") as double:
        yield double


@contextlib.contextmanager
def xpu(contract: Contract, not_compiled: str = "", source: Path | None = None) -> Iterator[Double]:
    """Attention for Intel GPUs. not_compiled: a dtype name for which the operator raises, as a build without that kernel does; the library's own
    function then falls back to slow Python with a warning.  source: a folder with the library's own Python files (an unpacked wheel), run in place
    of the thin functions; only the compiled operators are doubled then."""
    namespace = next(name.partition("::")[0] for name in contract.schemas)
    library = {"_vllm_fa2_C": xpu_vllm, "sgl_kernel": xpu_sgl}[namespace]
    modules = library.modules(contract) if source is None else {library.COMPILED: {}}
    bodies = library.bodies(not_compiled)
    with _installed(contract, bodies, modules, library.OPERATOR) as double, _found_in(source):
        yield double


@contextlib.contextmanager
def aiter(contract: Contract) -> Iterator[Double]:
    """AMD's AITER."""
    double = Double(contract=contract)
    with _importable(aiter_function.modules(contract, double.calls)):
        yield double


@contextlib.contextmanager
def _installed(
    contract: Contract, bodies: Mapping[str, Body], modules: Mapping[str, Mapping[str, object]], main: str
) -> Iterator[Double]:
    """Operators registered and modules importable inside the block; both gone afterwards."""
    double = Double(contract=contract)
    with contextlib.ExitStack() as stack:
        for name in contract.schemas:
            namespace, _, op = name.partition("::")
            if op in bodies:
                record = double.calls if op == main else []
                stack.enter_context(_registered(contract, name, namespace, bodies[op], record))
        stack.enter_context(_importable(modules))
        yield double


@contextlib.contextmanager
def _registered(contract: Contract, name: str, namespace: str, body: Body, calls: list[Arguments]) -> Iterator[None]:
    schema = contract.schema(name)
    names = [argument.name for argument in schema.arguments]

    def kernel(*values: object, **more: object) -> Any:
        arguments = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        arguments |= dict(zip(names, values, strict=False)) | more
        calls.append(arguments)
        return body(arguments)

    library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    try:
        library.define(contract.schemas[name])
        library.impl(schema.name.partition("::")[2], kernel, "CPU")
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def _found_in(source: Path | None) -> Iterator[None]:
    """Modules of `source` come first, and are forgotten afterwards."""
    if source is None:
        yield
        return
    before, place = set(sys.modules), str(source)
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
        own = (name for name in set(sys.modules) - before if _lies_in(sys.modules[name], source))
        for name in own:
            del sys.modules[name]


def _lies_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).is_relative_to(folder)


@contextlib.contextmanager
def _importable(modules: Mapping[str, Mapping[str, object]]) -> Iterator[None]:
    """modules: dotted name → attributes; parents first. RuntimeError when the real library was imported before."""
    taken = [name for name in modules if name in sys.modules]
    if taken:
        raise RuntimeError(f"{', '.join(taken)} imported already; a double never replaces a real library")
    try:
        for name, attributes in modules.items():
            module = ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
            module.__dict__.update(attributes, __path__=[])
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent in sys.modules:
                setattr(sys.modules[parent], child, module)
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
