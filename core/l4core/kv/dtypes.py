"""What `--kv-cache-dtype` means on a machine. Torch-free: dtypes are torch's names."""

from __future__ import annotations

FP8_FORMATS = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""Option → format. fp8 is e4m3: 3 bits of mantissa, up to 448; e5m2 has 2 bits, up to 57,344."""

FNUZ_ARCHS = ("gfx940", "gfx941", "gfx942")
"""Matrix units of MI300 read the formats without infinities: e4m3fnuz ends at 240, and the same bits mean half of e4m3fn's value."""


def kv_dtype_name(asked: str, compute: str, arch: str) -> str:
    """Name of the stored dtype. asked: the option.  compute: the compute dtype, which "auto" takes.  arch: as in Platform."""
    if asked == "auto":
        return compute
    name = FP8_FORMATS.get(asked, asked)
    return f"{name.removesuffix('fn')}fnuz" if asked in FP8_FORMATS and arch in FNUZ_ARCHS else name


def stored_scale(scale: float, dtype: str) -> float:
    """A checkpoint's scale, made for e4m3fn's range of 448, for the dtype it is used with: e4m3fnuz reaches 240, so values are stored half as
    large. Numbers that doubling a scale brings are exact."""
    return 2 * scale if dtype == "float8_e4m3fnuz" else scale
