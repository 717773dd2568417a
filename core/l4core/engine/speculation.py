"""Which drafter, and how far it guesses: the `--speculative-…` flags made one record, and the drafter they name."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from l4core.config import EngineConfig
from l4core.engine.drafter import PluginSpeculation
from l4core.engine.key_values import parse_key_values
from l4core.errors import ConfigError, NotBuiltError
from l4core.plugin_api import DraftContext, Drafter, DrafterEntry
from l4core.plugin_entries import Plugins, Provided, create_object, quote_failures

DEFAULT_STEPS = 3
"""What published EAGLE3 drafts of Llama 4 are served with."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationPlan:
    """num_drafts: guesses verified per sequence and step."""

    algorithm: str
    num_drafts: int
    drafter: Provided[DrafterEntry]

    def describe(self) -> str:
        """For the start-up report."""
        return f"{self.algorithm} ({self.drafter.source}) · {self.num_drafts} guesses a step, verified by the target's own draws"


def plan_speculation(config: EngineConfig, plugins: Plugins, chunk_size: int | None) -> SpeculationPlan | None:
    """None without `--speculative-algorithm`. ConfigError for flags that contradict each other, or a drafter nobody offers."""
    if config.speculative_algorithm is None:
        _refuse_orphans(config)
        return None
    num_drafts = _num_drafts(config)
    if chunk_size is not None and num_drafts >= chunk_size:
        raise ConfigError(
            f"{num_drafts} guesses a step do not fit the model's attention chunk of {chunk_size} tokens",
            fix=f"--speculative-num-steps {chunk_size - 1}",
        )
    return SpeculationPlan(
        algorithm=config.speculative_algorithm,
        num_drafts=num_drafts,
        drafter=_find(config.speculative_algorithm, plugins),
    )


def create_speculation(
    plan: SpeculationPlan, config: EngineConfig, *, vocab_size: int, device: str
) -> PluginSpeculation:
    """The drafter, made and wrapped. ConfigError for an option it does not have; PluginError when it cannot be made."""
    options = parse_key_values("--speculative-option", config.speculative_option)
    unknown = sorted(options.keys() - plan.drafter.entry.options.keys())
    if unknown:
        known = ", ".join(sorted(plan.drafter.entry.options)) or "none"
        raise ConfigError(f"--speculative-option {unknown[0]!r} is unknown to {plan.algorithm}; its options: {known}")
    context = DraftContext(
        vocab_size=vocab_size, num_draft_tokens=plan.num_drafts, device=device, options=options, logger=logger
    )
    drafter = create_object(plan.drafter, Drafter, context)  # type: ignore[type-abstract]
    return PluginSpeculation(plan.algorithm, drafter, num_drafts=plan.num_drafts, vocab_size=vocab_size)


def _refuse_orphans(config: EngineConfig) -> None:
    for name in ("num_steps", "eagle_topk", "num_draft_tokens", "draft_model_path", "option"):
        if getattr(config, f"speculative_{name}"):
            flag = f"--speculative-{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} is given without --speculative-algorithm, so there is no speculation to set up",
                fix=f"add --speculative-algorithm NGRAM, or drop {flag}",
            )


def _num_drafts(config: EngineConfig) -> int:
    """A chain of n steps is verified in n + 1 rows, so the two flags say the same thing."""
    if (config.speculative_eagle_topk or 1) > 1:
        raise NotBuiltError(
            f"--speculative-eagle-topk {config.speculative_eagle_topk}: trees are not built yet in this version of L4",
            fix="--speculative-eagle-topk 1",
        )
    steps, verified = config.speculative_num_steps, config.speculative_num_draft_tokens
    if steps is None:
        return DEFAULT_STEPS if verified is None else verified - 1
    if verified is not None and verified != steps + 1:
        raise ConfigError(
            f"--speculative-num-steps {steps} with --speculative-num-draft-tokens {verified}; a chain (topk 1) verifies steps + 1 tokens",
            fix=f"--speculative-num-draft-tokens {steps + 1}, or leave it out",
        )
    return steps


def _find(name: str, plugins: Plugins) -> Provided[DrafterEntry]:
    for provided in plugins.drafters:
        if provided.entry.name == name:
            return provided
    known = ", ".join(provided.entry.name for provided in plugins.drafters)
    raise ConfigError(
        f"--speculative-algorithm {name!r} is unknown; there are {known}{quote_failures(plugins.failures)}",
        fix="l4 plugins",
    )
