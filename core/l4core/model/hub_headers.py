"""A hub id as a folder that can be checked in seconds: small files whole, and of each shard the header only.

A shard becomes a file of its true size whose tensors are a hole, so whoever reads headers and sizes cannot tell the difference.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from l4core.config import EngineConfig
from l4core.errors import CheckpointError
from l4core.model.repository import explained, is_local, resolve_model
from l4core.model.safetensors_index import MAX_HEADER_BYTES, shards_of_index

FIRST_BYTES = 1 << 19
"""Holds nearly every header whole, so that a shard takes one request."""
NUM_CONNECTIONS = 8


@contextmanager
def folder_of_headers(config: EngineConfig) -> Iterator[Path]:
    """The folder of a local model as it is; of a hub id a temporary one, made of the cache where that has the shards and of the hub where not.

    Offline the cache must have all. Raises what `resolve_model` raises.
    """
    from huggingface_hub import constants

    if is_local(config) or constants.HF_HUB_OFFLINE:
        yield resolve_model(config)
        return
    small = resolve_model(dataclasses.replace(config, load_format="dummy"))
    with TemporaryDirectory(prefix="l4-check-") as made:
        folder = Path(made)
        for file in small.iterdir():
            (folder / file.name).symlink_to(file.resolve())
        missing = [shard for shard in _shards(config, small) if not (folder / shard).exists()]
        with explained(config), ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            list(pool.map(lambda shard: _fetch_header(config.model, small.name, folder / shard), missing))
        yield folder


def _shards(config: EngineConfig, small: Path) -> list[str]:
    """Those the index names; without an index, all safetensors files at the top of the repository."""
    from huggingface_hub import list_repo_files

    named = shards_of_index(small)
    if named is not None:
        return named
    with explained(config):
        files = list_repo_files(config.model, revision=small.name)
    return sorted(file for file in files if file.endswith(".safetensors") and "/" not in file)


def _fetch_header(model: str, commit: str, out: Path) -> None:
    from huggingface_hub import errors, hf_hub_url

    url = hf_hub_url(model, out.name, revision=commit)
    try:
        head, size = _fetch_start(url, FIRST_BYTES)
    except errors.EntryNotFoundError:
        return  # the index names it, the hub has it not: it is missing from this folder too
    wanted = 8 + min(int.from_bytes(head[:8], "little"), MAX_HEADER_BYTES)
    if len(head) < min(wanted, size):
        head, size = _fetch_start(url, wanted)
    out.write_bytes(head[:wanted])
    os.truncate(out, size)


def _fetch_start(url: str, count: int) -> tuple[bytes, int]:
    """(the file's first `count` bytes, or all if it is shorter; its size)."""
    from huggingface_hub import utils

    headers = {**utils.build_hf_headers(), "range": f"bytes=0-{count - 1}", "accept-encoding": "identity"}
    with utils.get_session().stream("GET", url, headers=headers) as response:
        utils.hf_raise_for_status(response)
        size = response.headers.get("content-range", "").rpartition("/")[2]
        if response.status_code != 206 or not size.isdecimal():
            raise CheckpointError(
                "the hub sends whole files only, so the weights cannot be checked without fetching them",
                fix="hf download MODEL, then: l4 check FOLDER",
            )
        return response.read(), int(size)
