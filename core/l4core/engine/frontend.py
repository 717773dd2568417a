"""The door to the engine: text and messages become checked Requests, updates become text again. Torch-free; the server's process has one."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4core.chat.assemble import Assembler
from l4core.chat.byte_tokenizer import BOS, SMALLEST_VOCABULARY, build_byte_tokenizer
from l4core.chat.messages import NO_TOOLS, check_messages, text_of
from l4core.chat.templates import choose_template
from l4core.chat.tokenizer import Tokenizer, has_tokenizer
from l4core.config import EngineConfig
from l4core.engine.generation_defaults import read_defaults
from l4core.errors import RequestError
from l4core.plugin_api import ChatTemplateEntry
from l4core.plugin_entries import Plugins, Provided
from l4core.request import Request, SamplingParams

if TYPE_CHECKING:
    from l4core.model.config import ModelConfig

MAX_STOP_CHARACTERS = 4096
SEED_MASK = (1 << 64) - 1

logger = logging.getLogger(__name__)


class Frontend:
    """tokenizer, template (with its source) and eos_token_ids of one checkpoint. Its methods may be called from several threads."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        folder: Path,
        chat_templates: Sequence[Provided[ChatTemplateEntry]],
    ) -> None:
        """Raises CheckpointError, ConfigError or PluginError: whatever is wrong with tokenizer, template or defaults shows at start-up."""
        self._config, self._vocab_size = config, model_config.vocab_size
        self.tokenizer = load_tokenizer(config, model_config, folder)
        self.template = choose_template(config.chat_template, folder, self.tokenizer, chat_templates)
        ends = {*model_config.eos_token_ids, *self.template.stop_ids}
        self.eos_token_ids = tuple(sorted(i for i in ends if i < self._vocab_size))  # the model cannot draw any other
        self._defaults = read_defaults(folder) if config.sampling_defaults == "model" else {}
        self._draws = itertools.count()

    @classmethod
    def from_plugins(cls, config: EngineConfig, model_config: ModelConfig, folder: Path, plugins: Plugins) -> Frontend:
        """The usual way: chat templates as installed."""
        return cls(config, model_config, folder, plugins.chat_templates)

    def default_params(self) -> dict[str, Any]:
        """Keyword arguments of SamplingParams for what a request leaves out (`--sampling-defaults`, `--sampler`); a new dict each time."""
        return {"sampler": self._config.sampler, **self._defaults}

    def check_length(self, num_characters: int, context_length: int, *, param: str) -> None:
        """Refuse a text that no tokenising can make fit: it takes seconds for megabytes. RequestError (400) names the field `param`.

        A prompt that passes may still be too long; `requests` counts its tokens.
        """
        longest = self.tokenizer.longest_token
        if longest is not None and num_characters >= context_length * longest:
            least = -(-num_characters // longest)
            raise RequestError(
                f"the prompt has {num_characters} characters, at least {least} tokens; the context is {context_length} and must hold the "
                f"answer too: send at most {context_length - 1} tokens, or start the engine with a larger context_length",
                param=param,
                code="context_length_exceeded",
            )

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] = (),
        *,
        add_generation_prompt: bool = True,
        context_length: int | None = None,
    ) -> list[int]:
        """Prompt ids of a conversation. context_length: what cannot fit is refused before it is rendered, None = take anything.

        RequestError for whatever the template or we cannot take.
        """
        if tools:
            raise RequestError(NO_TOOLS, param="tools")
        checked = _checked(messages)
        if context_length is not None:
            self.check_length(sum(len(text_of(m["content"])) for m in checked), context_length, param="messages")
        try:
            pieces = self.template.template.render(checked, add_generation_prompt=add_generation_prompt)
        except RequestError:
            raise
        except ValueError as error:
            raise RequestError(str(error), param="messages") from error
        return self.tokenizer.encode_pieces(pieces)

    def text_ids(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        """Prompt ids of a completion: special tokens spelled in the text are meant, BOS is put first unless it is there or
        add_special_tokens is False."""
        if add_special_tokens:
            return self.tokenizer.prompt_ids(prompt)
        return self.tokenizer.encode_text(prompt, allow_special=True)

    def requests(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        context_length: int,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[Request]:
        """The params.n sequences of one prompt, "{request_id}:{k}" with seed + k, checked. context_length: largest prompt + answer, tokens.

        Raises RequestError for a prompt or parameter that this model cannot serve.
        """
        prompt = list(prompt_token_ids)
        self._check_prompt(prompt, context_length)
        self._check_params(params)
        eos_token_ids = () if params.ignore_eos else self.eos_token_ids
        if params.min_tokens and len({*eos_token_ids, *params.stop_token_ids}) >= self._vocab_size:
            raise RequestError(
                "every token of the vocabulary would end the answer, so min_tokens leaves none to draw",
                param="min_tokens",
            )
        max_tokens = _max_tokens(len(prompt), params.max_tokens, context_length)
        seed = self._draw_seed() if params.seed is None else params.seed
        return [
            Request(
                request_id=f"{request_id}:{k}",
                prompt_token_ids=prompt,
                params=dataclasses.replace(params, n=1, seed=(seed + k) & SEED_MASK, max_tokens=max_tokens),
                eos_token_ids=eos_token_ids,
                max_total_tokens=len(prompt) + max_tokens,
                priority=priority,
                cache_salt=cache_salt,
            )
            for k in range(params.n)
        ]

    def assembler(self, request: Request, params: SamplingParams | None = None) -> Assembler:
        """Turns this request's updates into text. params: the request's own unless others are given."""
        return Assembler(self.tokenizer, request.params if params is None else params)

    def _draw_seed(self) -> int:
        """Differs from request to request, the same in every run with the same --random-seed."""
        text = f"{self._config.random_seed}:{next(self._draws)}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def _check_prompt(self, prompt: list[int], context_length: int) -> None:
        if not prompt:
            raise RequestError("the prompt is empty; wanted at least one token", param="prompt")
        if set(map(type, prompt)) != {int}:
            raise RequestError("the prompt holds something that is not a token id", param="prompt")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            wrong = next(i for i in prompt if not 0 <= i < self._vocab_size)
            raise RequestError(
                f"token id {wrong} in the prompt; the vocabulary is 0 to {self._vocab_size - 1}", param="prompt"
            )
        if len(prompt) >= context_length:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; the context is {context_length} and must hold the answer too: "
                f"send at most {context_length - 1} tokens, or start the engine with a larger context_length",
                param="prompt",
                code="context_length_exceeded",
            )

    def _check_params(self, params: SamplingParams) -> None:
        if any(len(stop) > MAX_STOP_CHARACTERS for stop in params.stop):
            raise RequestError(f"a stop string has over {MAX_STOP_CHARACTERS} characters", param="stop")
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if max(ids, default=0) >= self._vocab_size:
                raise RequestError(
                    f"token id {max(ids)} in {name}; the vocabulary is 0 to {self._vocab_size - 1}", param=name
                )


def _checked(messages: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
    try:
        return check_messages(messages)
    except ValueError as error:
        raise RequestError(str(error), param="messages") from error


def _max_tokens(num_prompt: int, wanted: int | None, context_length: int) -> int:
    room = context_length - num_prompt
    if wanted is not None and wanted > room:
        raise RequestError(
            f"the prompt has {num_prompt} tokens and max_tokens is {wanted}, {num_prompt + wanted} in all; the context is "
            f"{context_length}: lower max_tokens to {room}, or start the engine with a larger context_length",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return room if wanted is None else wanted


def load_tokenizer(config: EngineConfig, model_config: ModelConfig, folder: Path) -> Tokenizer:
    """The folder's tokenizer; under `--load-format dummy` a folder without one gets a byte tokenizer, with a warning."""
    if config.load_format != "dummy" or has_tokenizer(folder):
        return Tokenizer.from_folder(folder)
    logger.warning("%s has no tokenizer; dummy weights get one of bytes and Llama 4's special tokens", folder)
    size = max(SMALLEST_VOCABULARY, min(model_config.vocab_size, 1024))
    return Tokenizer(build_byte_tokenizer(size), source="the byte tokenizer", bos_token=BOS)
