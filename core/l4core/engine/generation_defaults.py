"""generation_config.json: the checkpoint's own sampling defaults (its end-of-sequence ids are ModelConfig's)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l4core.chat.folder import read_json
from l4core.errors import CheckpointError, RequestError
from l4core.request import SamplingParams

FILE = "generation_config.json"
FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Names that generation_config.json and SamplingParams share. The file's lengths are left out: how long an answer may be follows from the
request and the context, and a default that does not fit beside a long prompt would refuse it."""


def read_defaults(folder: Path) -> dict[str, Any]:
    """Keyword arguments of SamplingParams. `do_sample: false` means greedy, as it does in transformers.

    Raises CheckpointError for a value that SamplingParams refuses.
    """
    raw = read_json(folder, FILE)
    found = {name: raw[name] for name in FIELDS if raw.get(name) is not None}
    if raw.get("do_sample") is False:
        found["temperature"] = 0.0
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise CheckpointError(
            f"{folder / FILE}: {error.message}", fix="correct the file, or start with --sampling-defaults openai"
        ) from error
    return found
