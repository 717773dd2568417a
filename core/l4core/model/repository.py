"""MODEL as a user writes it, a folder or a hub id, becomes a folder on disk.

A hub id is fetched by huggingface_hub, which reads HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT itself. Only weights in safetensors,
JSON, chat templates and tokenizer files of the top folder are fetched: never pickled weights, never code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from l4core.config import EngineConfig
from l4core.errors import CheckpointError, ConfigError

WEIGHTS = ("*.safetensors",)
TEXT_FILES = ("*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
NEVER = ("*/*", "*.py", "*.bin", "*.pt", "*.pth", "*.gguf")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model(config: EngineConfig, *, what: str = "MODEL") -> Path:
    """Folder of config.model. A hub id is downloaded, or taken from the cache, at config.revision into config.download_dir.

    what: the option or argument that named it, for errors.
    Raises CheckpointError with the command that helps: no such folder, no such model or revision, access to be asked for, offline and
    not cached. Raises ConfigError for a revision of a local folder.
    """
    if is_local(config):
        return _local(Path(config.model).expanduser(), config, what)
    if not HUB_ID.fullmatch(config.model) or config.model.split("/")[0] in (".", ".."):
        raise CheckpointError(
            f"{what} {config.model!r} is no folder on this machine, and no hub id (owner/name) either",
            fix="check the path, or give a hub id such as meta-llama/Llama-4-Scout-17B-16E-Instruct",
        )
    return _download(config)


def is_local(config: EngineConfig) -> bool:
    """Whether config.model is something on this machine's disk."""
    return bool(config.model) and Path(config.model).expanduser().exists()


def _local(path: Path, config: EngineConfig, what: str) -> Path:
    if not path.is_dir():
        raise CheckpointError(
            f"{what} {config.model!r} is a file; wanted the folder with config.json and *.safetensors",
            fix=f"give its folder: {path.parent}",
        )
    if config.revision is not None:
        raise ConfigError(
            f"--revision {config.revision} names a revision of a hub id, but {what} {config.model!r} is a folder here",
            fix="leave --revision out, or rename the folder so that the hub id is meant",
        )
    return path


def _download(config: EngineConfig) -> Path:
    import huggingface_hub as hub

    wanted = TEXT_FILES if config.load_format == "dummy" else WEIGHTS + TEXT_FILES
    with explained(config):
        folder = hub.snapshot_download(
            config.model,
            revision=config.revision,
            cache_dir=config.download_dir,
            allow_patterns=list(wanted),
            ignore_patterns=list(NEVER),
        )
    return Path(folder)


@contextmanager
def explained(config: EngineConfig) -> Iterator[None]:
    """What huggingface_hub raises while it fetches config.model becomes a CheckpointError with the command that helps."""
    # Imported here: it reads its environment at import, and a local folder must not need it.
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise _gated(config.model) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"the hub has {config.model}, but not its revision {config.revision!r}",
            fix="leave --revision out for the newest, or give a branch, tag or commit of that model",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no model {config.model}, or it is private and you are not logged in",
            fix=f"check the spelling of {config.model}; for a private model: hf auth login (or set HF_TOKEN)",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as error:
        raise _not_fetched(config, error, offline=hub.constants.HF_HUB_OFFLINE) from error
    except (OSError, errors.HTTPError) as error:
        raise CheckpointError(
            f"{config.model} could not be fetched: {type(error).__name__}: {error}",
            fix="check the network and the free space of the cache (--download-dir, HF_HOME), then start again: what is there is kept",
        ) from error


def _gated(model: str) -> CheckpointError:
    return CheckpointError(
        f"{model} is gated: its licence must be accepted by the account whose token is used"
        + ("" if os.environ.get("HF_TOKEN") else " (HF_TOKEN is not set)"),
        fix=f"open the hub page of {model}, accept the licence, then: hf auth login (or set HF_TOKEN)",
    )


def _not_fetched(config: EngineConfig, error: Exception, *, offline: bool) -> CheckpointError:
    status = _http_status(error) or _http_status(error.__cause__)
    if status in (401, 403):
        return _gated(config.model)
    version = f" at revision {config.revision}" if config.revision else ""
    where = f"in {config.download_dir}" if config.download_dir else "in the cache (HF_HOME)"
    what = f"{config.model}{version} is not complete {where}"
    revision = f" --revision {config.revision}" if config.revision else ""
    folder = f" --cache-dir {config.download_dir}" if config.download_dir else ""
    fetch = f"hf download {config.model}{revision}{folder}"
    if offline:
        return CheckpointError(
            f"{what}, and HF_HUB_OFFLINE forbids to fetch it",
            fix=f"unset HF_HUB_OFFLINE, or on a machine with a network: {fetch}",
        )
    if status:
        return CheckpointError(f"{what}, and the hub answered HTTP {status}", fix=f"later: {fetch}")
    return CheckpointError(
        f"{what}, and the hub cannot be reached ({type(error.__cause__ or error).__name__})",
        fix=f"check the network (and HF_ENDPOINT, if you set it), then: {fetch}",
    )


def _http_status(error: BaseException | None) -> int | None:
    """Status of the hub's answer, None for an error without one. The error's text holds addresses and is never shown."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
