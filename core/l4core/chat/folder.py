"""The small JSON and text files of a checkpoint folder that concern chat: tokenizer_config.json, chat_template.jinja, generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from l4core.errors import CheckpointError

TEMPLATE_FILE = "chat_template.jinja"


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in folder/name, {} when there is no such file. CheckpointError when it is not a JSON object."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", fix="fetch the file again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; wanted a JSON object")
    return found


def read_text(path: Path) -> str:
    """The file's text. CheckpointError when it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix="fetch the file again") from error


def named_tokens(folder: Path) -> dict[str, str]:
    """Every `*_token` of special_tokens_map.json and tokenizer_config.json (which wins) → its text, as templates know them: bos_token, …"""
    found = {**read_json(folder, "special_tokens_map.json"), **read_json(folder, "tokenizer_config.json")}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in found.items() if k.endswith("_token")}
    return {k: v for k, v in texts.items() if isinstance(v, str)}


def jinja_source(folder: Path) -> tuple[str, str] | None:
    """(template text, the file it is from), None when the checkpoint brings none.

    chat_template.jinja is first, as in transformers; then the `chat_template` of tokenizer_config.json and of chat_template.json (a string,
    or a list of named templates of which "default" counts).
    """
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return read_text(path), str(path)
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read_json(folder, name).get("chat_template")
        if isinstance(found, list):
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default")
            if not isinstance(found, str):
                raise CheckpointError(
                    f"{folder / name} names the chat templates {', '.join(map(str, named)) or 'none'}; wanted one called default",
                    fix="--chat-template FILE.jinja",
                )
        if isinstance(found, str):
            return found, str(folder / name)
        if found is not None:
            raise CheckpointError(f"chat_template in {folder / name} is a {type(found).__name__}; wanted a string")
    return None
