"""A byte-level BPE with Llama 4's special tokens, made on the spot: for tests, and for `--load-format dummy` where no tokenizer is at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from l4core.chat.specials import LLAMA4_TOKENS

BOS = LLAMA4_TOKENS[0]
NUM_BYTES = 256
SMALLEST_VOCABULARY = NUM_BYTES + len(LLAMA4_TOKENS)


def build_byte_tokenizer(
    vocab_size: int, corpus: Iterable[str] = (), specials: Sequence[str] = LLAMA4_TOKENS
) -> Tokenizer:
    """Exactly `vocab_size` ids: 256 bytes, merges learnt from `corpus`, reserved special tokens where it gives too few, `specials` last.

    Ordinary encoding puts <|begin_of_text|> (one of `specials`) first, as Llama 4's does. ValueError when vocab_size is too small.
    """
    if vocab_size < NUM_BYTES + len(specials):
        raise ValueError(f"vocab_size is {vocab_size}; wanted at least {NUM_BYTES + len(specials)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    num_ordinary = vocab_size - len(specials)
    trainer = trainers.BpeTrainer(
        vocab_size=num_ordinary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    missing = num_ordinary - tokenizer.get_vocab_size()
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(missing)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*reserved, *specials)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS}:0 $A:0 {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer
