"""L4 and its peers on one warm GPU machine: the same shapes, one after the other, in one table.

    python benchmarks/peers/table.py [--kit DIR] [--runs l4,vllm,l4-fa3,l4,start] [--limit SECONDS] [--out FILE.json] [--logs DIR]
                                     [--l4-option NAME=VALUE …]

8 of Scout's 48 layers, bfloat16, random weights, each run a process of its own. Runs, in the order given:

    l4        on l4-triton. Given twice, the faster time of each row counts; that both are close says that the machine held still
    l4-fa3    on l4-fa3 (FlashAttention-3)
    start     `startup.py`: L4's seconds until ready, with an empty kernel cache and a warm one
    vllm, sglang
    l4-tp2, vllm-tp2, l4-tp4, vllm-tp4    the same shapes on so many GPUs (`gpu/tp.py`); all other runs see the first one alone

--kit: a folder with packed peers (vLLM as vk.00, vk.01, …; FlashAttention-3 as tsfa3.tar.xz), unpacked once into --site; without it they must be
importable. A run that is not there, fails or takes too long is a line of the table, not the end of it; rows that were measured before are kept,
and --out is written again after every run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from side_process import end_children_when_terminated, run, unpack

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT_SECONDS = {"l4": 80, "l4-fa3": 70, "vllm": 220, "sglang": 240, "start": 110}
LIMIT_SECONDS |= {f"{engine}-tp{tp}": limit for tp in (2, 4) for engine, limit in (("l4", 120), ("vllm", 240))}
ONE_GPU_LAYERS = 28
"""Scout's layers in bfloat16 that one GPU of 141 GB holds with what else it needs; with more, ranks are measured without one GPU beside them."""
LEAST_SECONDS = 12
"""With less left, nothing is begun."""
BATCHES, CONTEXT, PREFILLS = "1,8,32,128", 1024, "8x2048,4x4000,1x2048"
OURS = ("l4", "l4-fa3", "l4-tp2", "l4-tp4")


class Table:
    """What the command line asked for. folder: for this call's own files."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.deadline = time.perf_counter() + args.limit
        self.counts: dict[str, int] = {}

    def measure(self, engine: str) -> dict[str, Any]:
        """One run → its rows, seconds until ready, and why it did not end well ("" if it did)."""
        self.counts[engine] = self.counts.get(engine, 0) + 1
        label = f"{engine}-{self.counts[engine]}" if self.args.runs.split(",").count(engine) > 1 else engine
        began, out = time.perf_counter(), self.args.logs / f"{label}.json"
        out.unlink(missing_ok=True)
        ready, error = None, self._missing(engine)
        left = self.deadline - time.perf_counter()
        if not error and left < LEAST_SECONDS:
            error = "no time was left"
        if not error:
            command, env = self._command(engine, out)
            limit_s = min(LIMIT_SECONDS[engine], left)
            ready, error = run(label, command, env, self.args.logs / f"{label}.log", limit_s)
        found = {"rows": []} | _read(out)
        if _is_ours(engine) and _tp(engine) > 1:
            found = rows_of_ranks(found, _tp(engine))
        seconds = time.perf_counter() - began
        return found | {"engine": engine, "label": label, "ready_s": ready, "error": error, "seconds": seconds}

    def _missing(self, engine: str) -> str:
        """Unpacks what the run needs → "" or what is not there."""
        if engine.startswith("vllm") and self.args.kit:
            return self._unpacked("vk.0?", "vllm")
        if engine == "l4-fa3" and self.args.kit:
            why = self._unpacked("tsfa3.tar.xz", "fa3")
            return "" if (self.args.site / "vllm").is_dir() else why  # vLLM brings a build of it too
        module = {"l4-fa3": "flash_attn_interface"}.get(engine, engine.split("-")[0])
        if module == "l4" or engine == "start" or importlib.util.find_spec(module):
            return ""
        return f"{module} is not installed here"

    def _unpacked(self, pattern: str, name: str) -> str:
        pieces = sorted(self.args.kit.glob(pattern))
        if not pieces and not (self.args.site / name).is_dir():
            return f"no {pattern} in {self.args.kit}"
        problem = unpack(pieces, self.args.site / name)
        return problem and f"the kit could not be unpacked: {problem}"

    def _command(self, engine: str, out: Path) -> tuple[list[str], dict[str, str]]:
        if not _is_ours(engine):
            return self._peer(engine, out)
        paths = [str(ROOT / "core"), *(str(p) for p in (ROOT / "plugins").iterdir() if p.is_dir())]
        paths.append(str(metadata(self.folder / "metadata")))
        options = list(self.args.l4_option)
        if engine == "l4-fa3":
            options.append("attention_backend=fa3")
            paths += [str(site) for name in ("fa3", "vllm") if (site := self.args.site / name).is_dir()][:1]
        cache = os.environ.get("TRITON_CACHE_DIR", str(self.folder / "cache"))
        env = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": _path(*paths), **_devices(engine)}
        gpu = ROOT / "benchmarks" / "gpu"
        if engine == "start":
            command = [str(gpu / "startup.py"), str(out), "--layers", str(self.args.layers)]
            return [sys.executable, *command, *(f"--option={option}" for option in options)], env
        if (tp := _tp(engine)) > 1:
            command = [str(gpu / "tp.py"), "--ranks", str(tp), "--parts", "speed", "--layers", str(self.args.layers)]
            command += ["--batches", BATCHES, "--prefills", PREFILLS, "--json", str(out)]
            command += ["--skip-one"] * (self.args.layers > ONE_GPU_LAYERS)
            return [sys.executable, *command], env
        command = [str(gpu / "decode.py"), "--layers", str(self.args.layers), "--json", str(out)]
        command += ["--batches", BATCHES, "--contexts", str(CONTEXT), "--prefills", PREFILLS]
        return [sys.executable, *command, *options], env

    def _peer(self, engine: str, out: Path) -> tuple[list[str], dict[str, str]]:
        name = engine.split("-")[0]
        paths = [str(self.args.site / name)] if name == "vllm" and self.args.kit else []
        caches = {"VLLM_CACHE_ROOT": "vllm", "TRITON_CACHE_DIR": "peer-triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
        env = {**os.environ, "PYTHONPATH": _path(*paths), **_devices(engine)}
        env |= {variable: str(self.folder / part) for variable, part in caches.items()}
        model = self.folder / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(scout(self.args.layers)))
        command = [str(HERE / f"{name}_side.py"), str(model), str(out), "--batches", BATCHES]
        command += ["--context", str(CONTEXT), "--prefills", PREFILLS]
        return [sys.executable, *command, *(["--tp", str(tp)] if (tp := _tp(engine)) > 1 else [])], env


def _is_ours(engine: str) -> bool:
    return engine in OURS or engine == "start"


def _tp(engine: str) -> int:
    """GPUs of a run."""
    return int(engine.rpartition("-tp")[2]) if "-tp" in engine else 1


def _devices(engine: str) -> dict[str, str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3").split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[: _tp(engine)])}


def rows_of_ranks(found: dict[str, Any], tp: int) -> dict[str, Any]:
    """What `gpu/tp.py` wrote, as the other runs write it. Floors: bytes a rank reads, without sums."""
    rows, prefix = [], f"{tp} GPUs, nccl, "
    for what, row in ((key.removeprefix(prefix), row) for key, row in found.items() if key.startswith(prefix)):
        name = f"decode bs {what.split()[1]} at {CONTEXT}" if what.startswith("decode") else what
        rows.append({"name": name, "ms": row["ms"], "floor_ms": row["bytes_ms"], "experts": row.get("experts")})
    return {**found, "rows": rows}


def _read(out: Path) -> dict[str, Any]:
    """What a run has written so far; nothing where it was ended while writing."""
    try:
        found: dict[str, Any] = json.loads(out.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found


def metadata(folder: Path) -> Path:
    """What an installation of this clone would say of its packages, so that plugins are found on a machine where nothing can be installed."""
    for project_file in (ROOT / "pyproject.toml", *(ROOT / "plugins").glob("*/pyproject.toml")):
        project = tomllib.loads(project_file.read_text())["project"]
        name, version = project["name"], project["version"]
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        groups = project.get("entry-points", {})
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in found.items()) for group, found in groups.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def _path(*paths: str) -> str:
    return ":".join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def scout(layers: int) -> dict[str, Any]:
    """config.json of the text half with fewer layers, as both engines read it."""
    raw = json.loads((ROOT / "core/l4core/model/presets/scout.json").read_text())
    text = raw["text_config"] | {"num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    text["no_rope_layers"] = [int((layer + 1) % 4 != 0) for layer in range(layers)]  # 1 = has RoPE
    return {**text, "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}


def join(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a shape and number of GPUs: each engine's best time, the floor, each engine's distinct experts a layer."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for one in runs:
        gpus = _tp(one["engine"])
        for found in one["rows"]:
            fresh = {"name": found["name"], "gpus": gpus, "ms": {}, "floor": None, "experts": {}}
            row = rows.setdefault((gpus, found["name"]), fresh)
            engine = one["engine"]
            if found["ms"] < row["ms"].get(engine, float("inf")):
                row["ms"][engine] = found["ms"]
            row["floor"] = row["floor"] or found.get("floor_ms")
            if found.get("experts") is not None:
                row["experts"].setdefault(engine, found["experts"])
    return list(rows.values())


def show(result: dict[str, Any]) -> str:
    """A table for each number of GPUs, then what is to be said about the runs."""
    engines = list(dict.fromkeys(one["engine"] for one in result["runs"] if one["rows"]))
    lines = []
    for gpus in sorted({row["gpus"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["gpus"] == gpus]
        lines += [*_table(rows, [name for name in engines if _tp(name) == gpus]), ""]
    ready = [f"{one['label']} {one['ready_s']:.1f} s" for one in result["runs"] if one.get("ready_s")]
    for one in result["runs"]:
        ready += [f"L4 {kind} {one[kind]['ready_s']:.1f} s" for kind in ("cold", "warm") if kind in one]
    lines.append(f"Ready, dummy weights, from the process's start: {', '.join(ready) or '–'}.")
    lines += [f"{one['label']}: {one['error']}" for one in result["runs"] if one["error"]]
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]], engines: Sequence[str]) -> list[str]:
    """The first of L4's engines stands beside the floor, every other column beside it."""
    ours = next((name for name in engines if _is_ours(name)), "l4")
    others = [name for name in engines if name != ours]
    head = ["ms", "floor", ours, f"{ours} / floor", *(cell for name in others for cell in (name, f"{name} / {ours}"))]
    head.append("experts a layer: " + ", ".join([ours, *others]))
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for row in rows:
        mine, floor = row["ms"].get(ours), row["floor"]
        cells = [row["name"], _ms(floor), _ms(mine), _ratio(mine, floor)]
        for name in others:
            cells += [_ms(row["ms"].get(name)), _ratio(row["ms"].get(name), mine)]
        counts = [row["experts"].get(name) for name in (ours, *others)]
        cells.append(", ".join("–" if count is None else f"{count:.2f}" for count in counts))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _ratio(value: float | None, beside: float | None) -> str:
    return f"{value / beside:.2f}" if value and beside else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, help="folder with vk.00, …, tsfa3.tar.xz")
    parser.add_argument("--site", type=Path, default=Path(tempfile.gettempdir()) / "l4-peers")
    parser.add_argument("--runs", default="l4,vllm,l4-fa3,l4,start")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="for all runs together")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--l4-option", action="append", default=[], help="engine option, NAME=VALUE")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()) / "l4-peers-logs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if unknown := set(args.runs.split(",")) - LIMIT_SECONDS.keys():
        parser.error(f"--runs names {', '.join(sorted(unknown))}; there are {', '.join(LIMIT_SECONDS)}")
    end_children_when_terminated()
    args.logs.mkdir(parents=True, exist_ok=True)
    began, runs = time.perf_counter(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as text:
        table = Table(args, Path(text))
        for engine in args.runs.split(","):
            runs.append(table.measure(engine))
            print(f"{runs[-1]['label']}: {runs[-1]['seconds']:.0f} s {runs[-1]['error']}", flush=True)
            result = summary(runs, args.layers, time.perf_counter() - began)
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + show(result))
    print(f"all of it took {result['seconds']:.0f} s; logs in {args.logs}")


def summary(runs: Sequence[dict[str, Any]], layers: int, seconds: float) -> dict[str, Any]:
    def first(key: str) -> Any:
        return next((one[key] for one in runs if one.get(key)), None)

    return {
        **where(),
        **{key: found for key in ("card", "torch") if (found := first(key))},
        "python": platform.python_version(),
        "shape": f"{layers} of 48 Scout layers, bfloat16, random weights, {CONTEXT} tokens of context and growing",
        "rows": join(runs),
        "runs": list(runs),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
