"""The demo checkpoint as tests open it: in float32 on the CPU, as it is or under a changed config.json."""

from __future__ import annotations

import json
from pathlib import Path

from l4core import LLM
from l4core.demo.ask import long_text


def variant(base: Path, folder: Path, **changes: object) -> Path:
    """The same weights under a changed config.json."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).symlink_to(file)
    config = folder / "config.json"
    raw = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps({**raw, **changes}))
    return folder


def cut_nope(base: Path, folder: Path) -> Path:
    """Its global layers see the current chunk only."""
    return variant(base, folder, layer_types=["chunked_attention"] * 30)


def open_llm(folder: Path) -> LLM:
    return LLM(folder.as_posix(), dtype="float32", device="cpu", max_running_requests=4, progress=False)


def encode(llm: LLM, text: str) -> list[int]:
    """Token ids, nothing added."""
    return llm._frontend.tokenizer.encode_text(text, allow_special=False)


def token_stream(llm: LLM) -> list[int]:
    return encode(llm, long_text() * 4)
