"""Compiles core's Triton kernels for an architecture that need not be here: `python -m l4core.testing.compiled.ops sm90`.

Prints one JSON object a kernel: variant, kernel, bytes of shared memory, size of the binary. A compiler that dislikes something may end the process,
so tests run one process a target.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from l4core.engine.speculation.draft_draw_triton import _pick_kernel, _share_kernel
from l4core.ops.device import COMPILE
from l4core.ops.heads_triton import _heads_kernel
from l4core.ops.norm_route_triton import _norm_route_kernel
from l4core.ops.norm_triton import _add_norm_kernel
from l4core.ops.pair_norm_triton import _pair_norm_kernel
from l4core.ops.silu_mul_triton import _silu_mul_kernel
from l4core.ops.skinny_triton import FEW_ROWS, MORE_ROWS, ONE_ROW, SkinnyTile, _skinny_kernel
from l4core.testing.compiled import ARCHITECTURES

__all__ = ["CoreKernel", "compile_kernels"]

STARTS_EARLY = ("sm90", "sm100", "sm120")
"""Where kernels are launched before the one ahead of them has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreKernel:
    """One way a kernel is launched. pointers: argument → element type.  scalars: argument → type, i32 where not named.
    constants: compile-time arguments, None for what is absent.  stages: of the pipelined loop, None = Triton's default.
    descriptors: arguments that are tensor descriptors → (element type, block).  archs: where it is launched, empty = everywhere.
    registers: of a thread, at most, on NVIDIA's devices."""

    name: str
    kernel: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    scalars: Mapping[str, str]
    warps: int
    stages: int | None = None
    descriptors: Mapping[str, tuple[str, Sequence[int]]] = field(default_factory=dict)
    archs: tuple[str, ...] = ()
    registers: int | None = None


def _norm(name: str, dtype: str, **absent: None) -> CoreKernel:
    pointers = {x: dtype for x in ("stream", "update", "weight", "out", "kept") if x not in absent}
    constants = {"BLOCK": 8192, **absent}
    return CoreKernel(
        name=name, kernel=_add_norm_kernel, pointers=pointers, constants=constants, scalars={"eps": "fp32"}, warps=8
    )


def _heads(name: str, dtype: str, pages: str, *absent: str, few: bool = True) -> CoreKernel:
    pointers = {"qkv": dtype, "positions": "i64", "slots": "i64", "table": "fp32", "pages": pages}
    pointers |= {"k_scale": "fp32", "v_scale": "fp32"}
    constants: dict[str, Any] = {
        "NUM_Q": 40,
        "NUM_KV": 8,
        "HEAD_DIM": 128,
        "PAGE": 64,
        "NUM_ANGLES": 8192,
        "FLOOR_SCALE": 8192 if "table" in absent else 0,
        "MANTISSA": 3 if pages == "u8" else 0,
        "BIAS": 7,
        "LARGEST": 448.0,
        "BLOCK_HEADS": 2 if few else 8,
        "BLOCK_DIM": 128,
    }
    return CoreKernel(
        name=name,
        kernel=_heads_kernel,
        pointers={x: y for x, y in pointers.items() if x not in absent},
        constants=constants | dict.fromkeys(absent),
        scalars={"attn_scale": "fp32", "eps": "fp32"},
        warps=1 if few else 4,
    )


def _skinny(name: str, tile: SkinnyTile, *, even: bool = True) -> CoreKernel:
    return CoreKernel(
        name=name,
        kernel=_skinny_kernel,
        pointers={"x": "bf16", "weight": "bf16", "out": "bf16"},
        constants={
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "DEPTH": tile.depth,
            "EVEN": even,
            "DOT_TYPE": tl.bfloat16,
        },
        scalars={},
        warps=tile.warps,
        stages=tile.stages,
        archs=("sm90", "sm100"),
    )


def _draft_shares(name: str, **absent: None) -> CoreKernel:
    pointers = {"logits": "bf16", "offsets": "i64", "temperature": "fp32", "seeds": "i64", "positions": "i64"}
    pointers |= {"values": "fp32", "ids": "i32"}
    return CoreKernel(
        name=name,
        kernel=_share_kernel,
        pointers={key: kind for key, kind in pointers.items() if key not in absent},
        constants={"BLOCK": 1024, **absent},
        scalars={},
        warps=4,
    )


KERNELS = (
    _skinny("one row", ONE_ROW),
    _skinny("one short row", ONE_ROW, even=False),
    _skinny("few rows", FEW_ROWS),
    _skinny("more rows", MORE_ROWS),
    _norm("add and norm", "bf16", kept=None),
    _norm("add, norm and keep", "bf16"),
    _norm("norm", "bf16", update=None, kept=None),
    _norm("add and norm, float32", "fp32", kept=None),
    CoreKernel(
        name="norm and router",
        kernel=_norm_route_kernel,
        pointers=dict.fromkeys(("stream", "update", "weight", "router", "out"), "bf16")
        | {"expert_ids": "i32", "score": "fp32"},
        constants={"SIZE": 5120, "BLOCK": 8192, "PIECE": 1024, "E": 16, "BLOCK_E": 16},
        scalars={"eps": "fp32"},
        warps=16,
    ),
    _heads("local heads", "bf16", "bf16", "k_scale", "v_scale"),
    _heads("local heads, prefill", "bf16", "bf16", "k_scale", "v_scale", few=False),
    _heads("global heads", "bf16", "bf16", "table", "eps", "k_scale", "v_scale"),
    _heads("local heads, fp8 KV", "bf16", "u8"),
    _heads("local heads, float32", "fp32", "fp32", "eps", "k_scale", "v_scale"),
    CoreKernel(
        name="SwiGLU",
        kernel=_silu_mul_kernel,
        pointers={"gate_up": "bf16", "out": "bf16"},
        constants={"BLOCK": 1024},
        scalars={},
        warps=4,
    ),
    CoreKernel(
        name="two norms",
        kernel=_pair_norm_kernel,
        pointers=dict.fromkeys(("a", "b", "weight_a", "weight_b", "out"), "bf16"),
        constants={"BLOCK": 8192},
        scalars={"eps": "fp32"},
        warps=8,
    ),
    _draft_shares("a draft's draw"),
    _draft_shares("a draft's greedy draw", temperature=None),
    CoreKernel(
        name="a draft's pick",
        kernel=_pick_kernel,
        pointers={"values": "fp32", "ids": "i32", "offsets": "i64", "drawn": "i64"},
        constants={"SHARES": 32},
        scalars={},
        warps=4,
    ),
)


def compile_kernels(arch: str, kernels: Sequence[CoreKernel] = KERNELS) -> Iterator[dict[str, Any]]:
    """arch: one of ARCHITECTURES. One record a kernel; Triton's own error where one does not compile."""
    target = GPUTarget("cuda", int(arch[2:]), 32) if arch.startswith("sm") else GPUTarget("hip", arch, 64)
    for one in kernels:
        if one.archs and arch not in one.archs:
            continue
        signature, constexprs, divisible = {}, {}, {}
        constants, options = {**one.constants}, {"num_warps": one.warps, **COMPILE}
        if "PDL" in one.kernel.arg_names:
            constants["PDL"] = arch in STARTS_EARLY
            options |= {"launch_pdl": True} if arch in STARTS_EARLY else {}
        for index, name in enumerate(one.kernel.arg_names):
            if name in constants:
                signature[name], constexprs[name] = "constexpr", constants[name]
            elif name in one.descriptors:
                element, block = one.descriptors[name]
                signature[name] = f"tensordesc<{element}[{','.join(map(str, block))}]>"
            elif name in one.pointers:
                signature[name] = "*" + one.pointers[name]
            else:
                signature[name] = one.scalars.get(name, "i32")
            pointer = name in one.pointers and name not in one.descriptors
            if pointer or (name.startswith("stride_") and name not in constants):
                divisible[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(one.kernel, signature, constexprs, divisible)
        options |= {} if one.stages is None else {"num_stages": one.stages}
        options |= {"maxnreg": one.registers} if one.registers is not None and target.backend == "cuda" else {}
        done = triton.compile(source, target=target, options=options)
        binary = done.asm["cubin" if target.backend == "cuda" else "hsaco"]
        yield {
            "variant": one.name,
            "kernel": one.kernel.__name__.strip("_"),
            "shared": done.metadata.shared,
            "binary": len(binary),
        }


def main() -> int:
    arch = sys.argv[1] if len(sys.argv) == 2 else ""
    if arch not in ARCHITECTURES:
        print(f"usage: python -m l4core.testing.compiled.ops ARCH\nARCH: {', '.join(ARCHITECTURES)}", file=sys.stderr)
        return 2
    for record in compile_kernels(arch):
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
