"""Which drafter, and how far it guesses: the `--speculative-…` flags made one record, and what they name made ready."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l4core.config import EngineConfig
from l4core.engine.key_values import parse_key_values
from l4core.engine.speculation.draft_model import DraftModel
from l4core.engine.speculation.draft_pace import TRAINED, UNTRAINED, DraftPace
from l4core.engine.speculation.draft_tree import TreeShape
from l4core.engine.speculation.drafter import PluginSpeculation, Speculation
from l4core.engine.speculation.step_times import VerifyCosts
from l4core.errors import ConfigError, NotBuiltError
from l4core.model.config import ModelConfig
from l4core.model.draft_size import rank_draft
from l4core.model.eagle3_config import OPTIONS, DraftConfig, Target
from l4core.model.eagle3_weights import DraftPlan, plan_draft, stored_shapes
from l4core.model.repository import resolve_model
from l4core.plugin_api import DraftContext, Drafter, DrafterEntry
from l4core.plugin_entries import Plugins, Provided, create_object, quote_failures

if TYPE_CHECKING:
    from l4core.engine.run.runner import Runner

EAGLE3 = "EAGLE3"
MAX_GUESSES = 63
"""A tree's rows are bits of an int64, the last committed token among them."""
DEFAULT_STEPS = 3
"""What published EAGLE3 drafts of Llama 4 are served with."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationPlan:
    """num_drafts: guesses verified per sequence and step.  drafter: a plugin's, or None for EAGLE3, whose model is `draft`; tree: None = chains."""

    algorithm: str
    num_drafts: int
    drafter: Provided[DrafterEntry] | None = None
    draft: DraftModel | None = None
    tree: TreeShape | None = None

    @property
    def num_levels(self) -> int:
        """Tokens guessed ahead."""
        return self.num_drafts if self.tree is None else self.tree.num_steps

    @property
    def trees(self) -> bool:
        """Whether more than chains may have to be verified."""
        return self.tree is not None or (self.drafter is not None and self.drafter.entry.trees)

    def describe(self) -> str:
        """For the start-up report."""
        source = f" ({self.drafter.source})" if self.drafter is not None else ""
        shape = "" if self.tree is None else f" in a tree of {self.tree.num_steps} levels, topk {self.tree.topk}"
        line = f"{self.algorithm}{source} · {self.num_drafts} guesses a step{shape}, verified by the target's own draws"
        return line if self.draft is None else f"{line} · {self.draft.describe()}"


def plan_speculation(config: EngineConfig, plugins: Plugins, model: ModelConfig) -> SpeculationPlan | None:
    """None without `--speculative-algorithm`. ConfigError for flags that contradict each other, a drafter nobody offers or an option that it does not
    have, CheckpointError for a draft that does not fit the target."""
    if config.speculative_algorithm is None:
        _refuse_orphans(config)
        return None
    drafter = None if config.speculative_algorithm == EAGLE3 else _find(config.speculative_algorithm, plugins)
    num_drafts = _num_drafts(config)
    chunk_size = model.attention_chunk_size if any(model.chunked_layers) else None
    if chunk_size is not None and num_drafts >= chunk_size:
        is_tree = (config.speculative_eagle_topk or 1) > 1
        raise ConfigError(
            f"{num_drafts} guesses a step do not fit the model's attention chunk of {chunk_size} tokens",
            fix=f"--speculative-num-draft-tokens {chunk_size}"
            if is_tree
            else f"--speculative-num-steps {chunk_size - 1}",
        )
    _options(config, drafter)
    if config.speculative_algorithm == EAGLE3:
        tree = _tree(config) if (config.speculative_eagle_topk or 1) > 1 else None
        return SpeculationPlan(algorithm=EAGLE3, num_drafts=num_drafts, draft=_read_draft(config, model), tree=tree)
    if config.speculative_draft_model_path is not None:
        raise ConfigError(
            f"--speculative-draft-model-path is for EAGLE3; --speculative-algorithm is {config.speculative_algorithm}",
            fix="drop one of the two",
        )
    return SpeculationPlan(algorithm=config.speculative_algorithm, num_drafts=num_drafts, drafter=drafter)


def create_speculation(
    plan: SpeculationPlan, config: EngineConfig, runner: Runner, *, max_context: int, device: str
) -> Speculation:
    """The drafter, made ready. PluginError when it cannot be made."""
    if plan.draft is not None:
        from l4core.engine.speculation.eagle3 import create_eagle3

        return create_eagle3(
            plan.draft,
            runner,
            num_drafts=plan.num_drafts,
            tree=plan.tree,
            max_context=max_context,
            dummy_seed=_dummy_seed(config),
        )
    assert plan.drafter is not None
    vocab_size = runner.model.config.vocab_size
    context = DraftContext(
        vocab_size=vocab_size,
        num_draft_tokens=plan.num_drafts,
        device=device,
        options=_options(config, plan.drafter),
        logger=logger,
    )
    drafter = create_object(plan.drafter, Drafter, context)  # type: ignore[type-abstract]
    return PluginSpeculation(
        plan.algorithm,
        drafter,
        num_drafts=plan.num_drafts,
        vocab_size=vocab_size,
        trees=plan.drafter.entry.trees,
    )


def create_pace(
    plan: SpeculationPlan | None,
    config: EngineConfig,
    model: ModelConfig,
    weight_bytes: int,
    routed_bytes: int,
    itemsize: int,
    *,
    max_running: int,
) -> DraftPace | None:
    """None without speculation. weight_bytes: of the target, the draft's own among them.
    routed_bytes: of the routed experts of all layers, as they are stored here."""
    if plan is None:
        return None
    num_experts = model.num_experts if any(model.moe_layers) else 0
    embedding = model.vocab_size * model.hidden_size * itemsize * (not model.tie_word_embeddings)
    draft = 0 if plan.draft is None else plan.draft.elements_on(config.tp) * itemsize
    fixed = max(weight_bytes - draft - routed_bytes - embedding, 0)
    costs = VerifyCosts(fixed=fixed, expert=routed_bytes / max(num_experts, 1), num_experts=num_experts, draft=draft)
    return DraftPace(
        plan.algorithm,
        plan.num_levels,
        costs,
        max_running=max_running,
        reads=plan.draft is not None,
        fixed=config.speculative_adaptive == "off",
        advice=UNTRAINED if plan.draft is None else TRAINED,
    )


def _dummy_seed(config: EngineConfig) -> int | None:
    return config.random_seed if config.load_format == "dummy" else None


def _options(config: EngineConfig, drafter: Provided[DrafterEntry] | None) -> Mapping[str, str]:
    options = parse_key_values("--speculative-option", config.speculative_option)
    known = OPTIONS if drafter is None else drafter.entry.options
    for name in sorted(options.keys() - known.keys()):
        names = ", ".join(sorted(known)) or "none"
        raise ConfigError(
            f"--speculative-option {name!r} is unknown to {config.speculative_algorithm}; its options: {names}"
        )
    return options


def _refuse_orphans(config: EngineConfig) -> None:
    for name in ("num_steps", "eagle_topk", "num_draft_tokens", "draft_model_path", "option"):
        if getattr(config, f"speculative_{name}"):
            flag = f"--speculative-{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} is given without --speculative-algorithm, so there is no speculation to set up",
                fix=f"add --speculative-algorithm EAGLE3 or NGRAM, or drop {flag}",
            )


def _num_drafts(config: EngineConfig) -> int:
    """A chain of n steps is verified in n + 1 rows, so the two flags say the same thing; a tree's are independent."""
    steps, verified = config.speculative_num_steps, config.speculative_num_draft_tokens
    if (config.speculative_eagle_topk or 1) > 1:
        return _tree(config).num_guesses
    if steps is None:
        return DEFAULT_STEPS if verified is None else verified - 1
    if verified is not None and verified != steps + 1:
        raise ConfigError(
            f"--speculative-num-steps {steps} with --speculative-num-draft-tokens {verified}; a chain (topk 1) verifies steps + 1 tokens",
            fix=f"--speculative-num-draft-tokens {steps + 1}, or leave it out",
        )
    return steps


def _tree(config: EngineConfig) -> TreeShape:
    """Of EAGLE3 with topk > 1."""
    steps, topk = config.speculative_num_steps or DEFAULT_STEPS, config.speculative_eagle_topk or 1
    most = topk + (steps - 1) * topk * topk
    guesses = (config.speculative_num_draft_tokens or min(2 * topk * steps, most, MAX_GUESSES) + 1) - 1
    if config.speculative_algorithm != EAGLE3:
        raise ConfigError(
            f"--speculative-eagle-topk {topk} is for EAGLE3; --speculative-algorithm is {config.speculative_algorithm}",
            fix="drop --speculative-eagle-topk",
        )
    if guesses > most or guesses > MAX_GUESSES or topk * (steps - 1) > MAX_GUESSES:
        raise ConfigError(
            f"a tree of {steps} steps and topk {topk} sees {most} guesses and grows {topk * (steps - 1)} nodes, and {guesses} are to be verified; "
            f"at most {MAX_GUESSES} of each can be",
            fix=f"--speculative-num-draft-tokens {min(most, MAX_GUESSES) + 1} or less, or a smaller topk",
        )
    return TreeShape(num_steps=steps, topk=topk, num_guesses=guesses)


def _read_draft(config: EngineConfig, model: ModelConfig) -> DraftModel:
    path = config.speculative_draft_model_path
    if path is None:
        raise ConfigError(
            "--speculative-algorithm EAGLE3 needs a draft",
            fix="--speculative-draft-model-path DIR, or --speculative-algorithm NGRAM, which needs none",
        )
    folder = resolve_model(replace(config, model=path, revision=None), what="--speculative-draft-model-path")
    target = Target(num_layers=model.num_layers, hidden_size=model.hidden_size, vocab_size=model.vocab_size)
    options = parse_key_values("--speculative-option", config.speculative_option)
    draft = DraftConfig.from_folder(folder, target=target, options=options)
    mine, theirs = ((c.num_q_heads, c.num_kv_heads, c.head_dim) for c in (draft, model))
    if mine != theirs:
        raise NotBuiltError(
            f"the draft has {mine[0]} query and {mine[1]} KV heads of {mine[2]}, the target {theirs[0]} and {theirs[1]} of {theirs[2]}: "
            "drafts with heads of their own are not built yet in this version of L4",
            fix="a draft with the target's heads, as all published ones of Llama 4 have",
        )
    if config.load_format == "dummy":
        plan = DraftPlan(pieces=(), own_embed=False, own_head=draft.draft_vocab_size != model.vocab_size)
    else:
        plan = plan_draft(draft, target, stored_shapes(folder))
    rank_draft(draft, config.tp)
    return DraftModel(folder=folder, config=draft, plan=plan)


def _find(name: str, plugins: Plugins) -> Provided[DrafterEntry]:
    for provided in plugins.drafters:
        if provided.entry.name == name:
            return provided
    known = (EAGLE3, *(provided.entry.name for provided in plugins.drafters))
    meant = next((each for each in known if each.casefold() == name.casefold()), None)
    raise ConfigError(
        f"--speculative-algorithm {name!r} is unknown; there are {', '.join(known)}{quote_failures(plugins.failures)}",
        fix=f"--speculative-algorithm {meant}" if meant else "l4 plugins",
    )
