"""What engine.compile_ahead does with Triton's compiler, for an sm_90 that need not be here: nothing is launched. Prints one JSON line.

python tests/engine/compile_ahead_script.py all | warm | broken | missing | ranks
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from l4core.engine.start.compile_ahead import _place, compile_ahead
from l4core.engine.start.rehearsal import WithoutMemory
from l4core.parallel.ranks import ALONE, Ranks

DEVICE = torch.device("cuda")
BLOCKS = (16, 32, 64)


class Driver:
    """Of a machine with such a card, as far as a compiler asks."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@triton.jit
def _double(x, y, num, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < num) * 2, mask=at < num)


class Located:
    """What Triton looks at of a tensor that has memory."""

    def __init__(self, address: int) -> None:
        self.dtype, self._address = torch.float32, address

    def data_ptr(self) -> int:
        return self._address


def launch(x: Any, y: Any, warmup: bool = False) -> None:
    for block in BLOCKS:
        _double.run(x, y, 1000, grid=(4,), warmup=warmup, BLOCK=block)


def sample() -> None:
    with WithoutMemory(DEVICE):
        x = torch.empty(1001, device=DEVICE)
        _double.run(x, x, 1000, grid=(4,), warmup=True, BLOCK=BLOCKS[0])


def rehearse() -> None:
    """Twice, and with an output that begins at no multiple of 16 bytes."""
    with WithoutMemory(DEVICE):
        x = torch.empty(1001, device=DEVICE)
        launch(x, torch.empty_like(x))
        launch(x, torch.empty_like(x))
        launch(x, x[1:])


def broken() -> None:
    rehearse()
    raise NotImplementedError("a vendor's kernel\nand more")


class Elsewhere(Ranks):
    """Rank 2 of four, two on each of two machines by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size = 2, 4

    def _gather(self, x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(torch.stack([x, x + 1, x, x + 1]))


def main(case: str) -> dict[str, Any]:
    triton.runtime.driver.set_active(Driver())
    if case == "ranks":
        return {"place": _place(Elsewhere(), torch.device("cpu")), "alone": _place(ALONE, torch.device("cpu"))}
    if case == "missing":
        sys.modules["triton.runtime._async_compile"] = None  # type: ignore[assignment]
    compiled: list[str] = []
    triton.knobs.compilation.listener = lambda src, cache_hit, **_: None if cache_hit else compiled.append(src.name)
    run, everything = JITFunction.run, broken if case == "broken" else rehearse
    if case == "warm":
        sample()
        _double.device_caches.clear()  # as in a new process
        compiled.clear()
    line = compile_ahead(sample, everything, ALONE, DEVICE, progress=False)
    ahead = len(compiled)
    launch(Located(256), Located(512), warmup=True)
    launch(Located(256), Located(516), warmup=True)
    return {"line": line, "ahead": ahead, "later": len(compiled) - ahead, "restored": JITFunction.run is run}


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        print(json.dumps(main(sys.argv[1])))
