"""L4 and its peers on one warm GPU machine: the same shapes, one after the other, in one table.

    python benchmarks/peers/table.py [--kit DIR] [--out FILE.json] [--engines l4,vllm,sglang] [--l4-path DIR] [--l4-option NAME=VALUE …]

8 of Scout's 48 layers, bfloat16, random weights. L4 runs twice: with an empty kernel cache before the peers, and with a warm one after them; the
faster time of each row counts, and both times until ready. --kit: a folder with the packed peer (vk.00, vk.01), unpacked once into
--site; without it vLLM must be importable. An engine that is not there, fails or takes too long is a line of the table, not the end of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT_SECONDS = {"l4": 90, "vllm": 180, "sglang": 240}
BATCHES, CONTEXT, PREFILLS = "1,8,32,128", 1024, "8x2048,4x4000,1x2048"


def unpack(kit: Path, site: Path) -> str:
    """The peer's packages into `site`, if they are not there → "" or what went wrong."""
    if (site / "vllm").is_dir():
        return ""
    pieces = sorted(kit.glob("vk.0?"))
    if not pieces:
        return f"no vk.00, vk.01 in {kit}"
    site.mkdir(parents=True, exist_ok=True)
    names = " ".join(map(str, pieces))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; cat {names} | xz -d | tar x -C {site}"], capture_output=True, text=True
    )
    return done.stderr.strip()[-300:] if done.returncode else ""


def run(name: str, command: Sequence[str], env: dict[str, str], log: Path) -> tuple[float | None, str]:
    """→ (seconds from its start until it printed that it is ready, "" or why it did not end well). Its output goes to `log`."""
    began, ready = time.perf_counter(), list[float]()
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            env={**env, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        timer = threading.Timer(LIMIT_SECONDS[name], process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if line.startswith("ready") and not ready:
                ready.append(time.perf_counter() - began)
            if not line.startswith(("INFO", "WARNING", "(EngineCore", "DEBUG")) and len(line) < 200:
                print(f"{name:>7} | {line}", end="", flush=True)
        status = process.wait()
        timer.cancel()
    seconds = time.perf_counter() - began
    if status:
        tail = " ".join(log.read_text(errors="replace").split())[-300:]
        why = "took too long" if seconds >= LIMIT_SECONDS[name] - 1 else f"exit {status}: …{tail}"
        return (ready or [None])[0], f"{why} after {seconds:.0f} s"
    return (ready or [None])[0], ""


def l4_side(label: str, args: argparse.Namespace, folder: Path, cache: Path) -> dict[str, Any]:
    out = folder / f"{label}.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu/decode.py"), "--layers", str(args.layers)]
    command += ["--batches", BATCHES, "--contexts", str(CONTEXT), "--prefills", PREFILLS, "--json", str(out)]
    paths = [*args.l4_path, str(ROOT / "core"), *(str(p) for p in (ROOT / "plugins").iterdir() if p.is_dir())]
    paths.append(str(metadata(folder / "metadata")))
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": _path(*paths)}
    ready, error = run("l4", [*command, *args.l4_option], env, args.logs / f"{label}.log")
    return _result("l4", out, ready, error)


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


def peer_side(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    problem = unpack(args.kit, args.site) if name == "vllm" and args.kit else ""
    if problem:
        return {"engine": name, "error": f"the kit could not be unpacked: {problem}", "rows": []}
    paths = [str(args.site)] if name == "vllm" and args.kit else []
    env = {**os.environ, "PYTHONPATH": _path(*paths), "VLLM_CACHE_ROOT": str(folder / "vllm")}
    if subprocess.run([sys.executable, "-c", f"import {name}"], env=env, capture_output=True).returncode:
        return {"engine": name, "error": f"{name} is not installed here", "rows": []}
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(scout(args.layers)))
    out = folder / f"{name}.json"
    command = [sys.executable, str(HERE / f"{name}_side.py"), str(model), str(out), "--batches", BATCHES]
    command += ["--context", str(CONTEXT), "--prefills", PREFILLS]
    ready, error = run(name, command, env, args.logs / f"{name}.log")
    return _result(name, out, ready, error)


def _path(*paths: str) -> str:
    return ":".join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def _result(name: str, out: Path, ready: float | None, error: str) -> dict[str, Any]:
    found = json.loads(out.read_text()) if out.exists() else {"rows": []}
    return {**found, "engine": name, "ready_s": ready, "error": error}


def scout(layers: int) -> dict[str, Any]:
    """config.json of the text half with fewer layers, as both engines read it."""
    raw = json.loads((ROOT / "core/l4core/model/presets/scout.json").read_text())
    text = raw["text_config"] | {"num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    text["no_rope_layers"] = [int((layer + 1) % 4 != 0) for layer in range(layers)]  # 1 = has RoPE
    return {**text, "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}


def join(cold: dict[str, Any], warm: dict[str, Any], peers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a shape: L4's better time, its floor, each peer's time, distinct experts of each engine."""
    rows = []
    ours = {row["name"]: row for run in (cold, warm) for row in run["rows"]}
    names = [*ours, *(row["name"] for peer in peers for row in peer["rows"] if row["name"] not in ours)]
    for name in dict.fromkeys(names):
        times = [row["ms"] for run in (cold, warm) for row in run["rows"] if row["name"] == name]
        row: dict[str, Any] = {"name": name, "l4": min(times, default=None)}
        row |= {"floor": ours[name]["floor_ms"], "experts": {"l4": ours[name].get("experts")}} if name in ours else {}
        for peer in peers:
            theirs = next((r for r in peer["rows"] if r["name"] == name), {})
            row[peer["engine"]] = theirs.get("ms")
            row.setdefault("experts", {})[peer["engine"]] = theirs.get("experts")
        rows.append(row)
    return rows


def show(result: dict[str, Any]) -> str:
    peers = [run["engine"] for run in result["runs"] if run["engine"] != "l4"]
    head = [
        "ms",
        "floor",
        "L4",
        "L4 / floor",
        *(f"{p} | {p} / L4" for p in peers),
        "experts a layer: L4, " + ", ".join(peers),
    ]
    lines = ["| " + " | ".join(head) + " |", "| --- " * (len(head) + len(peers)) + "|"]
    for row in result["rows"]:
        ours, floor = row["l4"], row.get("floor")
        cells = [row["name"], _ms(floor), _ms(ours), f"{ours / floor:.2f}" if ours and floor else "–"]
        for peer in peers:
            cells += [_ms(row[peer]), f"{row[peer] / ours:.2f}" if row[peer] and ours else "–"]
        experts = row.get("experts", {})
        cells.append(", ".join("–" if experts.get(n) is None else f"{experts[n]:.2f}" for n in ("l4", *peers)))
        lines.append("| " + " | ".join(cells) + " |")
    readiness = [f"{run['label']} {run['ready_s']:.1f} s" for run in result["runs"] if run.get("ready_s")]
    lines.append(f"\nReady, dummy weights, from the process's start: {', '.join(readiness) or '–'}.")
    lines += [f"{run['label']}: {run['error']}" for run in result["runs"] if run.get("error")]
    return "\n".join(lines)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, help="folder with vk.00, vk.01")
    parser.add_argument("--site", type=Path, default=Path(tempfile.gettempdir()) / "l4-peers-site")
    parser.add_argument("--engines", default="l4,vllm,sglang")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--l4-path", action="append", default=[], help="packages for L4 alone, say an unpacked FA3")
    parser.add_argument("--l4-option", action="append", default=[], help="engine option, NAME=VALUE")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    engines = args.engines.split(",")
    args.logs.mkdir(parents=True, exist_ok=True)
    began, nothing = time.perf_counter(), {"engine": "l4", "rows": []}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        cold = {
            **(l4_side("l4-cold", args, folder, folder / "cache") if "l4" in engines else nothing),
            "label": "L4 cold",
        }
        peers = [{**peer_side(name, args, folder), "label": name} for name in ("vllm", "sglang") if name in engines]
        warm = {
            **(l4_side("l4-warm", args, folder, folder / "cache") if "l4" in engines else nothing),
            "label": "L4 warm",
        }
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "card": warm.get("card") or cold.get("card"),
        "torch": warm.get("torch"),
        "python": platform.python_version(),
        "commit": _commit(),
        "shape": f"{args.layers} of 48 Scout layers, bfloat16, random weights, {CONTEXT} tokens of context and growing",
        "rows": join(cold, warm, [peer for peer in peers if peer["rows"] or peer["error"]]),
        "runs": [cold, *peers, warm],
        "seconds": time.perf_counter() - began,
    }
    print("\n" + show(result))
    print(f"all of it took {result['seconds']:.0f} s; logs in {args.logs}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
