"""Fake machines: plain `Platform` records for tests of probes and for `l4 backends --platform`. Imports neither torch nor pytest."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence

from packaging.version import InvalidVersion, Version

from l4core.errors import ConfigError
from l4core.plugin_api import AttentionRequirements, Platform

__all__ = ["FAKE_PLATFORMS", "fake_platform", "parse_libraries", "requirement_grid"]

TORCH = Version("2.13.0")
GIB = 1 << 30

# name → device_type, vendor, arch, device_name, GiB, runtime
_MACHINES: Mapping[str, tuple[str, str, str, str, int, str]] = {
    "cpu": ("cpu", "cpu", "x86_64", "x86_64", 64, ""),
    "sm80": ("cuda", "nvidia", "sm80", "NVIDIA A100", 80, "cuda 13.0"),
    "sm89": ("cuda", "nvidia", "sm89", "NVIDIA L40S", 48, "cuda 13.0"),
    "sm90": ("cuda", "nvidia", "sm90", "NVIDIA H100", 80, "cuda 13.0"),
    "sm100": ("cuda", "nvidia", "sm100", "NVIDIA B200", 180, "cuda 13.0"),
    "sm103": ("cuda", "nvidia", "sm103", "NVIDIA B300", 270, "cuda 13.0"),
    "sm120": ("cuda", "nvidia", "sm120", "NVIDIA RTX PRO 6000", 96, "cuda 13.0"),
    "gfx942": ("cuda", "amd", "gfx942", "AMD Instinct MI300X", 192, "hip 7.0"),
    "gfx950": ("cuda", "amd", "gfx950", "AMD Instinct MI355X", 288, "hip 7.0"),
    "gfx1100": ("cuda", "amd", "gfx1100", "AMD Radeon RX 7900 XTX", 24, "hip 7.0"),
    "xpu": ("xpu", "intel", "bmg_g21", "Intel Arc B580", 12, "xpu"),
    "privateuse1": ("vnpu", "vnpu", "vnpu", "a vendor's device behind torch's PrivateUse1", 64, "vnpu"),
}
FAKE_PLATFORMS = tuple(_MACHINES)
"""Names that `fake_platform` knows."""


def fake_platform(name: str, libraries: Mapping[str, Version | str] | None = None) -> Platform:
    """A machine that need not exist.

    libraries: import name → version of all that is "installed" there; None = what is really installed here (`l4 backends --installed`).
    ConfigError names the nearest known platform, or the version that cannot be read.
    """
    if name not in _MACHINES:
        near = difflib.get_close_matches(name, FAKE_PLATFORMS, n=1)
        raise ConfigError(
            f"unknown platform {name!r}; there are {', '.join(FAKE_PLATFORMS)}",
            fix=f"--platform {near[0]}" if near else "",
        )
    device_type, vendor, arch, device_name, gib, runtime = _MACHINES[name]
    return Platform(
        device_type=device_type,
        vendor=vendor,
        arch=arch,
        device_name=device_name,
        memory_bytes=gib * GIB,
        torch_version=TORCH,
        runtime=runtime,
        libraries=None if libraries is None else {key: _version(key, value) for key, value in libraries.items()},
    )


def parse_libraries(items: Sequence[str]) -> dict[str, Version]:
    """("flashinfer==0.7.2", "aiter") → import name → version; without a version it is 0, "installed, version unknown"."""
    found: dict[str, Version] = {}
    for item in items:
        name, _, version = item.partition("==")
        if not name.strip():
            raise ConfigError(f"--with is {item!r}; wanted IMPORT_NAME==VERSION")
        found[name.strip()] = _version(name, version.strip() or "0")
    return found


def _version(name: str, value: Version | str) -> Version:
    try:
        return value if isinstance(value, Version) else Version(value)
    except InvalidVersion as error:
        raise ConfigError(f"version {value!r} of {name!r} cannot be read", fix=f"--with {name}==1.2.3") from error


def requirement_grid() -> Iterator[AttentionRequirements]:
    """Requirements a probe may meet: released and odd head counts, dtypes, page sizes, chunks, graphs, trees."""
    heads = ((40, 8, 128), (5, 1, 128), (9, 3, 64), (4, 4, 24), (7, 3, 80))
    dtypes = (("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32"), ("bfloat16", "float8_e4m3fn"))
    pages = ((None, 8192), (64, 8192), (16, None), (1, 64), (48, 96), (128, 512), (256, 8192))
    flags = ((False, False, 0), (True, False, 0), (False, True, 7), (True, True, 7))
    for num_q_heads, num_kv_heads, head_dim in heads:
        for q_dtype, kv_dtype in dtypes:
            for page_size, chunk_size in pages:
                for needs_graph, needs_tree, num_draft_tokens in flags:
                    yield AttentionRequirements(
                        num_q_heads=num_q_heads,
                        num_kv_heads=num_kv_heads,
                        head_dim=head_dim,
                        q_dtype=q_dtype,
                        kv_dtype=kv_dtype,
                        page_size=page_size,
                        chunk_size=chunk_size,
                        max_num_seqs=256,
                        max_num_tokens=8192,
                        num_draft_tokens=num_draft_tokens,
                        needs_tree=needs_tree,
                        needs_graph=needs_graph,
                    )
