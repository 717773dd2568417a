"""What must be the same on all ranks of one engine, by name: versions and options before they start, the checkpoint before it is loaded, and
what was chosen before the first step. Ranks that differ would not compute one model together, or not the same steps."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from l4core import __version__
from l4core.config import EngineConfig
from l4core.model.repository import resolve_model
from l4core.platform import detect
from l4core.plugin_api import PROJECT

OWN_OPTIONS = frozenset({
    "model",
    "revision",
    "download_dir",
    "served_model_name",
    "chat_template",
    "sampling_defaults",
    "speculative_draft_model_path",
})  # fmt: skip
"""May differ: paths of one machine, and what only the HTTP server reads. What the paths lead to is compared by its content."""
CHOICES = ("attention", "experts", "page size", "KV tokens", "largest context", "dtype", "speculation", "loop")
"""Lines of the start-up report that must be the same."""
TEXTS = ("config.json", "hf_quant_config.json")
WEIGHTS = (".safetensors", ".safetensors.index.json")
SAMPLE_BYTES = 4096
DIGEST_BYTES = 8


def program_identity(config: EngineConfig) -> dict[str, str]:
    """Versions, plugins' among them, and options."""
    options = {
        f"--{field.name.replace('_', '-')}": str(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in OWN_OPTIONS
    }
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    points = importlib.metadata.entry_points(group=PROJECT)  # not loaded: half of them are for other devices
    plugins = {f"plugin {point.dist.name}": point.dist.version for point in points if point.dist is not None}
    return {"l4core": __version__, "Python": platform.python_version(), **versions, **plugins, **options}


def device_identity(config: EngineConfig) -> dict[str, str]:
    """What `--device auto` stands for. Raises ConfigError as `platform.detect` does."""
    return {"the device": detect(config.device).device_type}


def checkpoint_identity(config: EngineConfig) -> dict[str, str]:
    """A digest of each file of the checkpoint and the draft that the engine reads: of small ones whole, of safetensors their size, header, first
    and last weights. Fetches what is a hub id. Raises CheckpointError."""
    found = digests(resolve_model(config), "checkpoint")
    draft = config.speculative_draft_model_path
    return (
        found if draft is None else found | digests(resolve_model(replace(config, model=draft, revision=None)), "draft")
    )


def digests(folder: Path, name: str) -> dict[str, str]:
    """By "name file"."""
    files = [path for path in sorted(folder.iterdir()) if path.name in TEXTS or path.name.endswith(WEIGHTS)]
    return {f"{name} {path.name}": _digest(_samples(path)) for path in files}


def choices(report: Sequence[str]) -> Mapping[str, str]:
    """What the ranks chose, each for itself."""
    return {label: line for label in CHOICES for line in report if line.startswith(f"{label} ")}


def _samples(path: Path) -> Iterator[bytes]:
    if path.suffix != ".safetensors":
        yield path.read_bytes()
        return
    size = path.stat().st_size
    yield struct.pack("<Q", size)
    with path.open("rb") as file:
        header = file.read(8)
        yield header
        length = struct.unpack("<Q", header)[0] if len(header) == 8 else 0
        yield file.read(min(length, size))
        yield file.read(SAMPLE_BYTES)
        file.seek(max(0, size - SAMPLE_BYTES))
        yield file.read()


def _digest(parts: Iterator[bytes]) -> str:
    made = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        made.update(part)
    return made.hexdigest()
