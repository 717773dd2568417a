"""The samplers that requests may name, from the plugins."""

from __future__ import annotations

from l4core.config import EngineConfig
from l4core.errors import ConfigError
from l4core.plugin_api import Sampler
from l4core.plugin_manager import Plugins, create_object
from l4core.sampling.pipeline import SamplingPipeline


def sampling_pipeline(config: EngineConfig, plugins: Plugins, vocab_size: int) -> SamplingPipeline:
    """Raises ConfigError where `--sampler` is none of them."""
    samplers = {
        provided.entry.name: create_object(provided, Sampler)  # type: ignore[type-abstract]
        for provided in plugins.samplers
    }
    if config.sampler not in samplers:
        raise ConfigError(
            f"--sampler {config.sampler!r} is unknown; there are {', '.join(sorted(samplers))}", fix="l4 plugins"
        )
    return SamplingPipeline(samplers, vocab_size=vocab_size)
