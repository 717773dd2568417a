"""How each weight of a model is kept: what `--quantization` asks for, or what the checkpoint declares."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from l4core.config import EngineConfig
from l4core.errors import ConfigError
from l4core.model.config import ModelConfig
from l4core.model.layout import parameters
from l4core.model.layout_quant import with_folder_scheme
from l4core.model.safetensors_index import read_folder
from l4core.model.weight_plan import plan_weights
from l4core.model.weights import raise_problems
from l4core.quant.formats import ONLINE, PLAIN, format_of


def weight_formats(config: EngineConfig, model: ModelConfig, folder: Path) -> Mapping[str, str]:
    """Weights that are not plain → their format (quant.formats). Reads headers of shards only.

    Raises NotBuiltError naming a scheme that is not known, CheckpointError for one that its tensors do not bear out, ConfigError when
    `--quantization` asks for another format than the checkpoint has.
    """
    if config.load_format == "dummy":
        return _online(config, model)
    model = with_folder_scheme(model, folder)
    if not model.quantization_config:
        return _online(config, model)
    index = read_folder(folder)
    plan = plan_weights(index.tensors, model)
    raise_problems(folder, [*index.problems, *plan.problems])
    found = set(plan.formats.values())
    if config.quantization is not None and found != {ONLINE[config.quantization]}:
        raise ConfigError(
            f"--quantization {config.quantization} is asked for and {folder} holds {plan.scheme} weights, which are served as they are",
            fix="leave --quantization out, or name the bfloat16 checkpoint of this model",
        )
    return plan.formats


def _online(config: EngineConfig, model: ModelConfig) -> dict[str, str]:
    names = (parameter.name for parameter in parameters(model, ()))
    kept = {name: format_of(name, config.quantization) for name in names}
    return {name: fmt for name, fmt in kept.items() if fmt != PLAIN}
