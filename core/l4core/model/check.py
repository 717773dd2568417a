"""`l4 check MODEL`: is this folder a whole Llama 4 checkpoint that L4 can serve? Answered from config.json and shard headers, in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from l4core.chat.folder import jinja_source
from l4core.chat.tokenizer import TOKENIZER_FILE, has_tokenizer
from l4core.errors import CheckpointError, NotBuiltError
from l4core.model.config import ModelConfig
from l4core.model.layout_quant import with_folder_scheme
from l4core.model.safetensors_index import FolderIndex, Problem, read_folder
from l4core.model.weight_plan import WeightPlan, plan_weights

MAX_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """problems: everything found wrong.  not_built: why a whole checkpoint cannot be served by this version, None when it can.

    bytes_per_rank: the parameters of one of `tp` ranks, in the checkpoint's dtypes; file_bytes: all shards read.
    mapped: tensors that have their place; vision, tied: tensors known and skipped.
    """

    folder: str
    architecture: str | None = None
    dtype: str | None = None
    quantisation: str | None = None
    tp: int = 1
    shards: int = 0
    file_bytes: int = 0
    mapped: int = 0
    vision: int = 0
    tied: int = 0
    bytes_per_rank: int = 0
    has_tokenizer: bool = False
    has_chat_template: bool = False
    problems: tuple[Problem, ...] = ()
    not_built: str | None = None

    @property
    def ok(self) -> bool:
        """True iff this version of L4 can serve the folder."""
        return not self.problems and self.not_built is None

    def as_json(self) -> dict[str, Any]:
        """Plain data: every field, and `ok`."""
        return {"ok": self.ok, **asdict(self)}

    def text(self) -> str:
        """The report for a person: facts, problems by name (the first 20), verdict."""
        return "\n".join([*self._facts(), *self._named_problems(), self._verdict()])

    def _facts(self) -> Iterator[str]:
        yield f"{self.folder}"
        if self.architecture is None:
            return
        yield f"  model      {self.architecture}, {self.dtype}, quantisation: {self.quantisation or 'none'}"
        yield f"  shards     {self.shards}, {_size(self.file_bytes)}"
        skipped = f", {self.vision} vision tensors skipped (image input is not built yet)" if self.vision else ""
        skipped += f", {self.tied} skipped (head tied to the embedding)" if self.tied else ""
        yield f"  tensors    {self.mapped} mapped{skipped}"
        yield f"  memory     {_size(self.bytes_per_rank)} of weights{f' on each of {self.tp} ranks' if self.tp > 1 else ''}"
        template = "own" if self.has_chat_template else "none (llama-4 is used)"
        yield f"  tokenizer  {'yes' if self.has_tokenizer else 'missing'}, chat template: {template}"

    def _named_problems(self) -> Iterator[str]:
        for problem in self.problems[:MAX_SHOWN]:
            yield f"  {problem.kind:<12} {problem.text}"
        if len(self.problems) > MAX_SHOWN:
            yield f"  and {len(self.problems) - MAX_SHOWN} more"

    def _verdict(self) -> str:
        if self.problems:
            return f"verdict: not servable, {len(self.problems)} problem(s)"
        if self.not_built is not None:
            return f"verdict: whole, but not servable yet: {self.not_built}"
        return "verdict: servable"


def check_folder(folder: Path, *, tp: int = 1) -> CheckReport:
    """Checks a checkpoint folder for `tp` ranks. Never raises for what is wrong with the folder: the report names it.

    Raises ConfigError when `tp` ranks cannot share the model evenly.
    """
    try:
        config = with_folder_scheme(ModelConfig.from_folder(folder), folder)
    except CheckpointError as error:
        return CheckReport(folder=str(folder), tp=tp, problems=(_problem("config", "config.json", error),))
    facts, problems = _small_files(folder)
    facts |= {"folder": str(folder), "architecture": config.architecture, "dtype": config.dtype, "tp": tp}
    try:
        index = read_folder(folder)
    except CheckpointError as error:
        return CheckReport(**facts, problems=(*problems, _problem("shard", str(folder), error)))
    try:
        plan = plan_weights(index.tensors, config, rank=0, world=tp)
    except CheckpointError as error:
        return CheckReport(**facts, problems=(*problems, *index.problems, _problem("config", "config.json", error)))
    except NotBuiltError as error:
        return CheckReport(**facts, problems=tuple(problems), not_built=str(error))
    return CheckReport(**facts, **_weights(index, plan, problems))


def _small_files(folder: Path) -> tuple[dict[str, Any], list[Problem]]:
    """What is known of tokenizer and chat template without reading the tokenizer."""
    facts: dict[str, Any] = {"has_tokenizer": has_tokenizer(folder)}
    problems = [] if facts["has_tokenizer"] else [_no_tokenizer(folder)]
    try:
        facts["has_chat_template"] = jinja_source(folder) is not None
    except CheckpointError as error:
        problems.append(_problem("template", "chat_template", error))
    return facts, problems


def _weights(index: FolderIndex, plan: WeightPlan, problems: list[Problem]) -> dict[str, Any]:
    return {
        "quantisation": plan.scheme,
        "shards": len(index.shards),
        "file_bytes": index.file_bytes,
        "mapped": len(plan.used),
        "vision": len(plan.vision),
        "tied": len(plan.tied),
        "bytes_per_rank": plan.num_bytes,
        "problems": (*problems, *index.problems, *plan.problems),
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _no_tokenizer(folder: Path) -> Problem:
    return Problem(
        kind="tokenizer",
        name=TOKENIZER_FILE,
        text=f"{TOKENIZER_FILE} is missing from {folder}: copy it from the original model",
    )


def _problem(kind: str, name: str, error: CheckpointError) -> Problem:
    return Problem(kind=kind, name=name, text=str(error))
