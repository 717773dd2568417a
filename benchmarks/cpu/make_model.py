"""Writes the 129 M-parameter Llama 4 of the CPU table: hidden 512, 8 layers, 8 experts, chunk 256.

python benchmarks/cpu/make_model.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from l4core.testing.models.checkpoints import BENCH, make_tiny_checkpoint
from l4core.testing.models.tokenizers import make_byte_tokenizer


def main() -> None:
    out = Path(sys.argv[1])
    tokenizer = out.with_name(out.name + "-tokenizer")
    make_byte_tokenizer(tokenizer, BENCH["vocab"])
    make_tiny_checkpoint(out, tokenizer=tokenizer, **{key: value for key, value in BENCH.items() if key != "vocab"})


if __name__ == "__main__":
    main()
