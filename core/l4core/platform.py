"""What machine this is, as plain data: the only thing a backend's probe may look at.

`detect` is the one place (beside engine/run/graphs.py and Triton files) that asks `torch.cuda`. A `Platform` built by hand is a
fake machine; selection tests use dozens of them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import platform as _host
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from l4core.errors import ConfigError

if TYPE_CHECKING:
    import torch


CPU_INSTRUCTIONS: Mapping[str, tuple[str, ...]] = {
    "avx512_bf16": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "avx512_bf16"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"),
    "avx2": ("avx2", "fma"),
}
"""Name → Linux's flags of a processor that has them, the best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """device_type: torch's device string ("cpu", "cuda", "xpu", or a vendor's PrivateUse1 name).  vendor: "nvidia", "amd", "intel",
    "cpu" or the device type.  arch: "sm90", "gfx942", "x86_64", …  memory_bytes: of one device.  runtime: "cuda 13.0", "hip 6.4"; of a CPU the
    best of `CPU_INSTRUCTIONS`, or "".
    libraries: None on a real machine; on a fake one, import name → version of everything "installed".
    """

    device_type: str
    vendor: str
    arch: str
    device_name: str = ""
    memory_bytes: int = 0
    num_devices: int = 1
    torch_version: Version = Version("0")  # noqa: RUF009  (Version is immutable)
    runtime: str = ""
    libraries: Mapping[str, Version] | None = None

    def library(self, import_name: str, distribution: str | None = None) -> Version | None:
        """Version of an importable library, None when absent; nothing is imported. Unknown version → Version("0")."""
        if self.libraries is not None:
            return self.libraries.get(import_name)
        if importlib.util.find_spec(import_name.partition(".")[0]) is None:
            return None
        names = iter([distribution]) if distribution else _distributions_of(import_name)
        for name in names:
            try:
                return Version(importlib.metadata.version(name))
            except (importlib.metadata.PackageNotFoundError, InvalidVersion):
                continue
        return Version("0")


def _distributions_of(import_name: str) -> Iterator[str]:
    """The one of the same name first: asking which distribution a package is from reads every installed one's files."""
    top = import_name.partition(".")[0]
    yield top
    yield from importlib.metadata.packages_distributions().get(top, [])


def detect(device: str = "auto") -> Platform:
    """The real machine. device: "auto" (an accelerator if torch sees one, else the CPU) or a torch device string.

    Raises ConfigError when the named device is not present.
    """
    import torch

    dev = torch.accelerator.current_accelerator(check_available=True)
    found = dev.type if dev is not None else "cpu"
    wanted = found if device == "auto" else torch.device(device).type
    if wanted not in {found, "cpu"}:
        raise ConfigError(
            f"device {device!r} asked for, but torch {torch.__version__} sees {found!r}", fix="--device auto"
        )
    return (
        _cpu_platform(torch.__version__)
        if wanted == "cpu"
        else _accelerator_platform(torch.device(device if device != "auto" else found))
    )


@functools.cache
def has_triton(device_type: str) -> bool:
    """Whether core's own Triton kernels run on tensors of this device type; elsewhere their torch twins do."""
    return device_type in ("cuda", "xpu") and importlib.util.find_spec("triton") is not None


def copies_ahead(device_type: str) -> bool:
    """Whether the device copies to and from page-locked host memory while the host goes on; elsewhere a copy is done when the call returns."""
    return device_type in ("cuda", "xpu")


def free_memory(platform: Platform) -> int:
    """Bytes that can still be allocated on the device now."""
    if platform.device_type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    import torch

    own = getattr(
        getattr(torch, platform.device_type, None), "mem_get_info", None
    )  # a vendor's device may lack torch's allocator
    free, _ = own() if own is not None else torch.accelerator.get_memory_info()
    return int(free)


def _cpu_platform(torch_version: str) -> Platform:
    import psutil

    return Platform(
        device_type="cpu",
        vendor="cpu",
        arch=_host.machine(),
        device_name=_host.processor() or _host.machine(),
        memory_bytes=psutil.virtual_memory().total,
        torch_version=Version(torch_version),
        runtime=_cpu_instructions(),
    )


def _cpu_instructions() -> str:
    """What all processors of this machine have, as Linux says; "" elsewhere."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return next((name for name, wanted in CPU_INSTRUCTIONS.items() if flags.issuperset(wanted)), "")


def _accelerator_platform(device: torch.device) -> Platform:
    import torch

    kind, num = device.type, torch.accelerator.device_count()
    version = Version(torch.__version__)
    if kind == "cuda":
        props = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            arch, vendor, runtime = props.gcnArchName.split(":")[0], "amd", f"hip {torch.version.hip}"
        else:
            arch, vendor, runtime = f"sm{props.major}{props.minor}", "nvidia", f"cuda {torch.version.cuda}"
        return Platform(
            device_type=kind,
            vendor=vendor,
            arch=arch,
            device_name=props.name,
            memory_bytes=props.total_memory,
            num_devices=num,
            torch_version=version,
            runtime=runtime,
        )
    module = getattr(torch, kind, None)
    properties = getattr(module, "get_device_properties", None)
    found = properties(device) if properties is not None else None
    vendor = "intel" if kind == "xpu" else kind
    return Platform(
        device_type=kind,
        vendor=vendor,
        arch=str(getattr(found, "architecture", kind)),
        device_name=str(getattr(found, "name", kind)),
        memory_bytes=int(getattr(found, "total_memory", 0)),
        num_devices=num,
        torch_version=version,
        runtime=kind,
    )
