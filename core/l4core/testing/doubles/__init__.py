"""Doubles of vendors' libraries: the vendor's real operator schema under its real name, with a body in plain torch for the CPU.

    contract = contracts.load(Path("tests/data/contracts/tokenspeed-fa3-3.0.0.post20260810.json"))
    with doubles.fa3(contract) as double:                 # `import flash_attn_interface`, torch.ops.flash_attn_3.fwd work inside
        backend = create(context)                         # context.device = "cpu", a platform that lists the library
        ...
    double.calls[-1]["num_splits"]                        # every call's arguments by name

In a pytest module the kit runs inside one when a fixture opens it (`@pytest.fixture(autouse=True)`; override `platform()` with a fake machine).

What that proves (level D): PyTorch's dispatcher accepts each call under the recorded schema, the arguments keep the rules of dtype, shape, stride,
page and device that the library checks itself, and what is asked for is the right attention. What it cannot prove: anything about the vendor's
kernel, its speed, or a rule that nobody recorded. Rows of the output that no sequence owns come back NaN.

fa3: contracts of tokenspeed-fa3 and upstream (`flash_attn_3`), sglang-kernel (`sgl_kernel`) and vLLM (`_vllm_fa3_C`).
xpu: contracts of vllm-xpu-kernels (`_vllm_fa2_C`) and sgl-kernel-xpu (`sgl_kernel`).
aiter: contracts of amd-aiter, a function without an operator of its own.
"""

from __future__ import annotations

from l4core.testing.doubles.install import Arguments, Double, aiter, fa3, xpu

__all__ = ["Arguments", "Double", "aiter", "fa3", "xpu"]
