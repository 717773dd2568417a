"""Compiles kernel variants for an architecture that need not be here: `python -m l4_triton.crosscompile sm90 [VARIANT …]`, all variants by default.

Prints one JSON object a kernel: variant, kernel, what it spills, bytes of shared memory, size of the binary. A compiler that dislikes something may
end the process, so tests run one process a target.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from l4_triton.kernels.decode import decode_kernel
from l4_triton.kernels.merge import merge_kernel
from l4_triton.kernels.prefill import prefill_kernel
from l4_triton.launch import COMPILE, dot_type, merge_block
from l4_triton.tiles import ARCHITECTURES, Tile, converts_fp8, starts_early, tiles_for

_POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
_FIXED = {
    "lse": "*fp32",
    "part_out": "*fp32",
    "part_lse": "*fp32",
    "cu_seqlens_q": "*i32",
    "seq_lens": "*i32",
    "block_table": "*i32",
    "ancestors": "*i64",
    "sees_prefix": "*i1",
    "k_scale": "*fp32",
    "v_scale": "*fp32",
    "scale_log2": "fp32",
}
_OPTIONAL = ("lse", "ancestors", "sees_prefix", "k_scale", "v_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way the kernels are launched. rows: query rows a sequence, 0 = prefill."""

    name: str
    q_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    group: int = 5
    head_dim: int = 128
    page: int = 64
    chunk: int = 0
    tree: bool = False
    rows: int = 1


VARIANTS = (
    Variant(name="decode"),
    Variant(name="local decode", chunk=8192),
    Variant(name="fp8 decode", kv_dtype="float8_e4m3fn"),
    Variant(name="float16 decode, page 16, head_dim 64", q_dtype="float16", kv_dtype="float16", page=16, head_dim=64),
    Variant(name="float32 decode", q_dtype="float32", kv_dtype="float32"),
    Variant(name="chain verify", rows=4),
    Variant(name="tree verify", rows=8, tree=True),
    Variant(name="prefill", rows=0),
    Variant(name="local prefill", rows=0, chunk=8192),
    Variant(name="fp8 prefill", rows=0, kv_dtype="float8_e4m3fn"),
    Variant(name="prefill, page 1", rows=0, page=1),
    Variant(name="tree of many nodes", rows=0, tree=True),
    Variant(name="prefill, head_dim 256", rows=0, head_dim=256),
    Variant(name="float32 prefill", rows=0, q_dtype="float32", kv_dtype="float32"),
)


def target_of(arch: str) -> GPUTarget:
    """arch: one of ARCHITECTURES."""
    if arch.startswith("sm"):
        return GPUTarget("cuda", int(arch[2:]), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def compile_all(arch: str, variants: Sequence[Variant] = VARIANTS) -> Iterator[dict[str, Any]]:
    """One record a kernel; Triton's own error where one does not compile. The merge depends on few things, so it is compiled once for each."""
    target = target_of(arch)
    merged: set[tuple[object, ...]] = set()
    for variant in variants:
        tiles = tiles_for(arch, variant.q_dtype, variant.head_dim, variant.kv_dtype)
        if variant.rows:
            tile = tiles.split(variant.rows * variant.group)
            shape = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "MIN_TILES": tiles.min_tiles, "START": 0}
            yield _compile(decode_kernel, variant, shape, arch, target, tile)
            key = (variant.q_dtype, variant.head_dim, variant.chunk > 0)
            if key not in merged:
                yield _compile(merge_kernel, variant, shape | merge_block(1, variant.head_dim), arch, target, None)
            merged.add(key)
        else:
            shape = {"BLOCK_M": tiles.prefill.block_m, "BLOCK_N": tiles.prefill.block_n}
            yield _compile(prefill_kernel, variant, shape, arch, target, tiles.prefill)


def _compile(
    kernel: Any, variant: Variant, shape: dict[str, int], arch: str, target: GPUTarget, tile: Tile | None
) -> dict[str, Any]:
    source = _source(kernel, variant, shape, arch)
    options: dict[str, Any] = {"launch_pdl": True} if starts_early(arch) and kernel is not prefill_kernel else {}
    options |= COMPILE | ({} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages})
    done = triton.compile(source, target=target, options=options)
    binary = done.asm["cubin" if target.backend == "cuda" else "hsaco"]
    return {
        "variant": variant.name,
        "kernel": kernel.__name__,
        "spills": _spills(done, target),
        "shared": done.metadata.shared,
        "binary": len(binary),
    }


def _source(kernel: Any, variant: Variant, shape: dict[str, int], arch: str) -> ASTSource:
    """The kernel with the argument types a launch would give it; pointers and strides are multiples of 16, as core's are."""
    fp8 = variant.kv_dtype == "float8_e4m3fn"
    pairs = fp8 and variant.q_dtype != "float32"
    constants: dict[str, Any] = shape | {
        "GROUP": variant.group,
        "HEAD_DIM": variant.head_dim,
        "PAGE": variant.page,
        "CHUNK": variant.chunk,
        "TREE": variant.tree,
        "PAIRS": pairs,
        "CONVERTS": converts_fp8(arch),
        "PDL": starts_early(arch),
        "DOT_TYPE": dot_type(getattr(tl, variant.q_dtype), fp8),
        "SEQS": 128,
    }
    given = {"ancestors", "sees_prefix"} if variant.tree else set()
    given |= {"k_scale", "v_scale"} if fp8 else set()
    q, stored = _POINTERS[variant.q_dtype], ("*u16" if pairs else "*u8") if fp8 else _POINTERS[variant.kv_dtype]
    types = _FIXED | {"q": q, "out": q, "k": stored, "v": stored}
    signature, constexprs, divisible = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants or (name in _OPTIONAL and name not in given):
            signature[name], constexprs[name] = "constexpr", constants.get(name)
            continue
        signature[name] = types.get(name, "i32")
        if signature[name].startswith("*") or name.startswith("stride_"):
            divisible[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, divisible)


def _spills(done: Any, target: GPUTarget) -> int:
    """What did not fit the registers: on AMD registers, as the assembly states; on NVIDIA bytes of stack a thread, as the binary does."""
    if target.backend == "hip":
        return sum(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", done.asm["amdgcn"])))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(map(int, re.findall(r"STACK:(\d+)", usage)))


def main() -> int:
    names = {variant.name: variant for variant in VARIANTS}
    arch, *wanted = sys.argv[1:] or [""]
    if arch not in ARCHITECTURES or not names.keys() >= set(wanted):
        print(
            f"usage: python -m l4_triton.crosscompile ARCH [VARIANT …]\nARCH: {', '.join(ARCHITECTURES)}",
            file=sys.stderr,
        )
        print(f"VARIANT: {'; '.join(names)}", file=sys.stderr)
        return 2
    for record in compile_all(arch, [names[name] for name in wanted or names]):
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
