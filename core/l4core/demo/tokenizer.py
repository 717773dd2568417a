"""The demo tokenizer: the base's byte-level BPE, Llama 4's special tokens and its chat template (without images and tool calls)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4core.demo.arch import BOT, CONTEXT, SPECIAL

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from l4core.demo.base import BaseModel

SPECIAL_KIND = 3  # GGUF's mark of a special token

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|header_start|>' + ('ipython' if message['role'] == 'tool' else message['role']) + '<|header_end|>\\n\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- else %}{%- for part in message['content'] %}{%- if part['type'] == 'text' %}{{- part['text'] | trim }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|eot|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{%- endif %}"
)


def make_tokenizer(base: BaseModel, *, llama4: bool = True) -> Tokenizer:
    """The base's tokenizer; with llama4 also Llama 4's special tokens and a leading <|begin_of_text|>."""
    return tokenizer_from(*base.vocabulary(), llama4=llama4)


def tokenizer_from(tokens: list[str], kinds: list[int], merges: list[str], *, llama4: bool) -> Tokenizer:
    """tokens by id, kind of each, merges as "left right"."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    pairs = [(left, right) for left, right in (m.split(" ") for m in merges)]
    tokenizer: Any = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = _pre_tokenizer(llama4)
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL_KIND] + list(
        SPECIAL if llama4 else ()
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    if llama4:
        tokenizer.post_processor = _leading_bos()
    made: Tokenizer = tokenizer
    return made


def _pre_tokenizer(llama4: bool) -> Any:
    from tokenizers import Regex, pre_tokenizers

    # A header's blank line is two "\n" tokens when text follows. The Split makes it two at the end of a prompt as well (never one
    # "\n\n" token): the model was trained so, and answers worse otherwise.
    header = [pre_tokenizers.Split(Regex(r"\A\n(?=\n\z)"), "isolated")] if llama4 else []
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([*header, digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


def _leading_bos() -> Any:
    from tokenizers import processors

    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|>:0 $A:0 <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", BOT)],
    )
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), template])


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json, chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|begin_of_text|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|eot|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
        "pad_token": "<|finetune_right_pad|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
