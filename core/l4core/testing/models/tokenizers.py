"""A small tokenizer in the layout of a Hugging Face folder, for tests: byte-level BPE, Llama 4's special tokens, BOS, a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from l4core.chat.byte_tokenizer import BOS, build_byte_tokenizer
from l4core.chat.specials import LLAMA4_TOKENS

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = {'developer': 'system', 'tool': 'ipython'}.get(message['role'], message['role']) %}
    {%- set content = message['content'] %}
    {%- set text = content if content is string else content | map(attribute='text') | join %}
    {{- '<|header_start|>' + role + '<|header_end|>\\n\\n' }}
    {%- if role == 'ipython' %}
        {{- content | tojson }}
    {%- else %}
        {{- text | trim if loop.first and role == 'system' else text }}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""

CORPUS = (
    "The quick brown fox jumps over the lazy dog. The river was wide, and the old bridge had been closed for the winter; so they waited.",
    "A server takes many requests at once: each asks for some text, and the engine gives every one of them the next token of its answer.",
    "What is the capital of France? The capital of France is Paris. And of Spain? The capital of Spain is Madrid, as everybody knows.",
    "def add(left, right):\n    return left + right\n\n\nfor i in range(10):\n    print(i, add(i, 1))\n",
    "In 1997 there were 1,024 pages; by 2024 there were 65,536 of them, and nobody had read more than 12.5 per cent.",
    "Être ou ne pas être; über, größer, señor, Здравствуй, 東京, 🙂.",
)
DEFAULT_VOCABULARY = 512


def make_byte_tokenizer(
    out: Path,
    vocab_size: int = DEFAULT_VOCABULARY,
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    extra_specials: Sequence[str] = (),
) -> dict[str, int]:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja (None: no such file) into folder `out`, which is made if needed.

    vocab_size: exactly so many ids, the special tokens last.  extra_specials: put before Llama 4's, for templates that need others.
    Returns special token → id. The same arguments give the same files.
    """
    out.mkdir(parents=True, exist_ok=True)
    specials = (*extra_specials, *LLAMA4_TOKENS)
    tokenizer = build_byte_tokenizer(vocab_size, CORPUS, specials)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": "<|eot|>",
        "pad_token": "<|finetune_right_pad|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if chat_template is not None:
        (out / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return {token: vocab_size - len(specials) + i for i, token in enumerate(specials)}
