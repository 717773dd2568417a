"""SGLang's side of the table, by its own one-batch benchmark; only where sglang is installed. `table.py` runs this.

python benchmarks/peers/sglang_side.py MODEL_FOLDER OUT.json [--batches …] [--context …] [--prefills …]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NEW_TOKENS = 96


def one_batch(model: str, batches: list[int], length: int, new: int) -> list[dict[str, Any]]:
    """Rows of `sglang.bench_one_batch`, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "sglang.bench_one_batch", "--model-path", model, "--load-format", "dummy"]
        command += ["--dtype", "bfloat16", "--skip-tokenizer-init", "--result-filename", str(out)]
        command += ["--input-len", str(length), "--output-len", str(new), "--batch-size", *map(str, batches)]
        subprocess.run(command, check=True, timeout=240)
        return [json.loads(line) for line in out.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefills", default="8x2048,4x4000,1x2048")
    args = parser.parse_args()
    found = one_batch(args.model, [int(text) for text in args.batches.split(",")], args.context, NEW_TOKENS)
    rows = [
        {"name": f"decode bs {row['batch_size']} at {args.context}", "ms": row["median_decode_latency"] * 1e3}
        for row in found
    ]
    for text in args.prefills.split(","):
        batch, length = map(int, text.split("x"))
        (row,) = one_batch(args.model, [batch], length, 1)
        rows.append({"name": f"prefill {text}", "ms": row["prefill_latency"] * 1e3})
    version = importlib.metadata.version("sglang")
    args.out.write_text(json.dumps({"engine": "sglang", "version": version, "rows": rows}))


if __name__ == "__main__":
    main()
