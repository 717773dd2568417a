"""A vendor's device that needs no hardware and no compiler: torch's PrivateUse1, whose memory is the CPU's and whose kernels are the CPU's.

Tensors on it are of device type `NAME`, carry the PrivateUse1 dispatch key and reach ATen through it; every operator is carried out on the CPU
memory behind them. What a real device would have to wait for (`.item()`, `.tolist()`, `.cpu()`, data-dependent shapes) raises while
`torch.fakedev.set_sync_debug_mode("error")` is set, and always leaves the count in `torch.fakedev.num_syncs()`. So it shows that code reaches a
device torch does not know by name, and that it reads nothing back; it shows nothing about a vendor's kernels.

`register()` changes torch for the whole process (a process has one PrivateUse1 device): use it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

__all__ = ["NAME", "register"]

NAME = "fakedev"
SYNCS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::equal",
    "aten::is_nonzero",
)
"""Operators whose result, or the shape of it, the host must wait for."""


class FakeTensor(torch.Tensor):
    """A tensor of device type fakedev. memory: the CPU tensor that holds its values."""

    memory: torch.Tensor

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> FakeTensor:
        made: FakeTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.size(),
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            layout=memory.layout,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        made.memory = memory
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FakeTensor({tuple(self.shape)}, {self.dtype}, {NAME}:0)"

    def tolist(self) -> Any:
        """torch reads a list out of memory directly; a device has to wait for it."""
        _module().sync("tolist")
        return self.memory.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch.inference_mode(False):  # else a view of an ordinary tensor would be one that inference mode made
            return run_on_memory(func, args, kwargs or {})


class FakeModule(backend_registration._DummyBackendModule):
    """`torch.fakedev`: what torch asks of a device's module, and the part of torch.cuda's that finds syncs."""

    def __init__(self) -> None:
        self._mode = "default"
        self._syncs = 0

    def set_sync_debug_mode(self, mode: str) -> None:
        self._mode = mode

    def get_sync_debug_mode(self) -> str:
        return self._mode

    def num_syncs(self) -> int:
        return self._syncs

    def sync(self, what: str) -> None:
        """Called by whatever reads device memory on the host."""
        self._syncs += 1
        if self._mode == "error":
            raise RuntimeError(f"called a synchronizing operation: {what}")

    def get_device_properties(self, device: object = None) -> Any:
        return _Properties()

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        """Free and all bytes."""
        return _Properties.total_memory // 2, _Properties.total_memory

    def synchronize(self, device: object = None) -> None:
        """Everything is done when it was asked for."""


class _Properties:
    name = "a device behind torch's PrivateUse1"
    architecture = NAME
    total_memory = 1 << 32


def register() -> None:
    """Make `torch.device("fakedev")` one that torch.accelerator reports. Once a process; RuntimeError when another device has the key."""
    if torch._C._get_privateuse1_backend_name() == NAME:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=FakeModule())
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name, make in (("empty.memory_format", _empty), ("empty_strided", _empty_strided)):
        library.impl(name, make, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _LIBRARIES.append(library)


_LIBRARIES: list[Any] = []
"""torch forgets kernels whose library object is gone."""


def _module() -> FakeModule:
    module: FakeModule = getattr(torch, NAME)
    return module


# ---------------------------------------------------------------- every operator, on the memory


def run_on_memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` on the CPU memory of its arguments; results on the device again, in-place ones the very objects that were given."""
    decomposed = func.decompose(*args, **kwargs)  # inference mode hands over composite operators whole
    if decomposed is not NotImplemented:
        return decomposed
    name = func._schema.name
    wanted = kwargs.get("device")
    if name == "aten::_to_copy" and wanted is not None and torch.device(wanted).type == "cpu":
        _module().sync("copy to the host")
        return func(args[0].memory, *args[1:], **{**kwargs, "device": torch.device("cpu")})
    if name in SYNCS or _has_data_dependent_shape(name, args, kwargs):
        _module().sync(name)
    if name == "aten::copy_" and not isinstance(args[0], FakeTensor):
        _module().sync("copy to the host")
    given: dict[int, FakeTensor] = {}

    def lower(x: Any) -> Any:
        if isinstance(x, FakeTensor):
            given[id(x.memory)] = x
            return x.memory
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x

    def lift(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return given[id(x)] if id(x) in given else FakeTensor(x)

    lowered_args, lowered_kwargs = pytree.tree_map(lower, (args, kwargs))
    _refuse_host_tensors(name, lowered_args, given)
    result = func(*lowered_args, **lowered_kwargs)
    if name == "aten::copy_" and not isinstance(args[0], FakeTensor):
        return result
    return pytree.tree_map(lift, result)


def _has_data_dependent_shape(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Indexing by a mask, and repeating without being told how many there will be."""
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    indices = args[1] if name == "aten::index" else ()
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in indices)


def _refuse_host_tensors(name: str, args: tuple[Any, ...], given: dict[int, FakeTensor]) -> None:
    """As a device does: a CPU tensor beside a device's is an error, unless it is a scalar, copied from, or an index."""
    if name in ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_"):
        return
    for x in pytree.tree_leaves(args):
        if isinstance(x, torch.Tensor) and x.dim() > 0 and id(x) not in given:
            raise RuntimeError(f"{name}: expected all tensors to be on {NAME}:0, but found one on the cpu")


def _empty(size: Sequence[int], *, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
    return FakeTensor(torch.empty(size, dtype=dtype, memory_format=kwargs.get("memory_format")))


def _empty_strided(
    size: Sequence[int], stride: Sequence[int], *, dtype: torch.dtype | None = None, **kwargs: Any
) -> torch.Tensor:
    return FakeTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """What `copy_` becomes where torch itself makes a tensor (torch.tensor)."""
    if not isinstance(target, FakeTensor):
        _module().sync("copy to the host")
    source, memory = (x.memory if isinstance(x, FakeTensor) else x for x in (source, target))
    memory.copy_(source)
    return target
