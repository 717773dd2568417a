"""`make demo`: build the checkpoint once, serve it, ask it twice, stay up. `python -m l4core.demo.run --once` leaves after the answers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from l4core.demo import ask
from l4core.demo.build import build_target, cached_folder, find_delta
from l4core.demo.server_process import ServerProcess, free_port
from l4core.errors import L4Error

NAME = "smol-l4"
CONTINUE_TOKENS = 48


def main(argv: Sequence[str] | None = None) -> int:
    """→ exit code: 0, or 1 when the demo failed or the answer does not name Paris."""
    parser = argparse.ArgumentParser(prog="python -m l4core.demo.run", description=__doc__)
    parser.add_argument("--once", action="store_true", help="exit after the answers")
    parser.add_argument("--port", type=int, default=30000, help="port; another one is taken when it is busy [30000]")
    args = parser.parse_args(argv)
    try:
        return drive(port=args.port, once=args.once)
    except L4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def drive(*, port: int, once: bool) -> int:
    folder = ready_checkpoint()
    with ServerProcess(folder, name=NAME, port=free_port(port)) as server:
        print(f"ready after {server.wait_ready():.1f} s\n", flush=True)
        answer = put_questions(server, chunk_tokens(folder))
        if "Paris" not in answer:
            print("error: the answer does not name Paris", file=sys.stderr)
            return 1
        if not once:
            stay(server)
    return 0


def ready_checkpoint() -> Path:
    """The demo checkpoint in the cache, built if it is not there yet."""
    delta = find_delta()
    folder = cached_folder(delta)
    if not folder.exists():
        build_target(folder, delta, base=None, dtype=torch.bfloat16, say=lambda line: print(line, flush=True))
    return folder


def chunk_tokens(folder: Path) -> int:
    """How many tokens a chunked attention layer sees."""
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["attention_chunk_size"])


def put_questions(server: ServerProcess, chunk: int) -> str:
    """Ask both, print what was measured → the first answer."""
    client = ask.connect(server.url)
    print(f"> {ask.CAPITAL}", flush=True)
    first = ask.ask_capital(client, NAME)
    text = ask.long_text()
    print(f"\n> (a text of {len(text):,} characters) …{text[-60:]}", flush=True)
    second = ask.continue_text(client, NAME, text, CONTINUE_TOKENS)
    print(f"\nbackend        {server.report_line('attention')}")
    for label, reply in (("question", first), ("long text", second)):
        print(f"{label:<15}{measured(reply, chunk)}", flush=True)
    return first.text


def measured(reply: ask.Reply, chunk: int) -> str:
    """One line of figures: the prompt in tokens and chunks, time to the first token, tokens per second after it."""
    chunks = reply.prompt_tokens / chunk
    return (
        f"prompt {reply.prompt_tokens:,} tokens = {chunks:.2f} chunks of {chunk} · first token after {reply.first_seconds:.2f} s"
        f" · {reply.completion_tokens} tokens at {reply.tokens_per_second:.1f} tok/s"
    )


def stay(server: ServerProcess) -> None:
    """Tell how to go on, and leave the server up until Ctrl-C."""
    print(
        f"\nThe server stays up at {server.url} (Ctrl-C ends it). Try:\n"
        f"  l4 chat --url {server.url}\n"
        f"  curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"""    -d '{{"model": "{NAME}", "messages": [{{"role": "user", "content": "Who are you?"}}]}}'""",
        flush=True,
    )
    server.wait()


if __name__ == "__main__":
    sys.exit(main())
