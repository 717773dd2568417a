"""A real HTTP load on `l4 serve`: Scout's true shapes with random weights, one process serving and this one asking.

    python benchmarks/gpu/serve_load.py [--layers 48] [--concurrency 1,16,64] [--rates …] [--input 1000] [--output 200] [--prompts 64]
                                        [--intrude TOKENS] [--bandwidth GB/s] [--out FILE] [-- SERVER OPTIONS, say --quantization int4]

The folder it serves has a tokenizer in which each of the 202,048 ids is a word of its own, so every token of an answer is an event.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from l4core.bench.client import Target
from l4core.bench.datasets import Lengths
from l4core.bench.report import notes, serve_table
from l4core.bench.serve import Plan, as_json, parse_limits, parse_loads, sweep, with_floor
from l4core.cli.table import text_table

sys.path.append(Path(__file__).resolve().parents[1].as_posix())
from where import where

READY_SECONDS = 240
FIRST_SPECIAL = 200_000
SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>")


def write_folder(folder: Path, layers: int, **changes: Any) -> None:
    """config.json of the text half and a tokenizer. changes: of the config, for a try on a small machine."""
    raw = json.loads((files("l4core.model") / "presets" / "scout.json").read_text())
    text = raw["text_config"] | {"num_hidden_layers": layers, "torch_dtype": "bfloat16"} | changes
    (folder / "config.json").write_text(json.dumps({**text, "architectures": ["Llama4ForCausalLM"]}))
    alphabet = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
    alphabet += [chr(256 + i) for i in range(256 - len(alphabet))]  # as byte-level BPE spells the others
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary |= {f"w{index}": index for index in range(256, text["vocab_size"])}
    first = min(FIRST_SPECIAL, text["vocab_size"] - len(SPECIALS))
    for offset, token in enumerate(SPECIALS):
        del vocabulary[f"w{first + offset}"]
        vocabulary[token] = first + offset
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": first + i, "content": token, **flags} for i, token in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[0], "eos_token": SPECIALS[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


@contextmanager
def serving(folder: Path, options: list[str]) -> Iterator[tuple[str, float]]:
    """→ (address, seconds until it was ready) of a server on a free port; its output goes on to this one's."""
    program = "from l4core.cli import main; main()"
    command = [sys.executable, "-u", "-c", program, "serve", str(folder), "--load-format", "dummy", "--port", "0"]
    began, found = time.perf_counter(), threading.Event()
    address = [""]

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print("  |", line, end="", flush=True)
            if match := re.search(r"http://127\.0\.0\.1:\d+", line):
                address[0] = match[0]
                found.set()
        found.set()

    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        reader = threading.Thread(target=read)
        reader.start()
        try:
            if not found.wait(READY_SECONDS) or not address[0]:
                raise SystemExit("the server did not come up")
            yield address[0], time.perf_counter() - began
        finally:
            process.terminate()
            reader.join(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--concurrency", default="1,16,64")
    parser.add_argument("--rates")
    parser.add_argument("--input", type=int, default=1000)
    parser.add_argument("--output", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--intrude", type=int, default=0)
    parser.add_argument("--sla")
    parser.add_argument("--bandwidth", type=float, help="GB/s: adds the floor")
    parser.add_argument("--floor-weights", default="bfloat16")
    parser.add_argument("--config", type=json.loads, default={}, help="changes of the config, JSON")
    parser.add_argument("--out", type=Path)
    parser.add_argument("options", nargs="*", help="of l4 serve, behind --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_folder(folder, args.layers, **args.config)
        plan = Plan(
            loads=parse_loads(args.rates, args.concurrency),
            lengths=Lengths(input=args.input, output=args.output),
            num_prompts=args.prompts,
            limits=parse_limits(args.sla),
            intrude=args.intrude,
        )
        points = list[Mapping[str, Any]]()

        def told(point: Mapping[str, Any]) -> None:
            """Kept at once: whatever comes later, this was measured."""
            points.append(point)
            print(text_table(*serve_table(points)), flush=True)
            if args.out:
                args.out.write_text(
                    json.dumps({**where(), "ready_s": ready_s, "options": args.options, "points": points})
                )

        with serving(folder, args.options) as (url, ready_s):
            result = sweep(Target(url=url), plan, told)
        if args.bandwidth:
            with_floor(result, text, args.bandwidth * 1e9, args.floor_weights)
    result |= {**where(), "ready_s": ready_s, "layers": args.layers, "options": args.options}
    print(text_table(*serve_table(result["points"])))  # once more, with the floor
    print(*notes(result["points"]), f"ready after {ready_s:.1f} s", sep="\n")
    if args.out:
        args.out.write_text(as_json(result))


if __name__ == "__main__":
    main()
