"""Text ↔ token ids. User text never becomes a special token; templates and prompts get theirs by splitting before encoding.

Uses the `tokenizers` library alone; transformers (seconds to import) only for a folder without tokenizer.json. After construction nothing
is changed, so one object serves many threads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from l4core.chat.folder import named_tokens
from l4core.chat.specials import SpecialFlags, SpecialTokens
from l4core.errors import CheckpointError, RequestError
from l4core.plugin_api import Image, Piece, Special, Text

TOKENIZER_FILE = "tokenizer.json"
CONVERTIBLE_FILES = ("tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
FETCH_AGAIN = "copy tokenizer.json and tokenizer_config.json from the model's repository into the folder"


class Tokenizer:
    """One checkpoint's tokenizer. vocab_size: highest id + 1.  specials, special_ids: its special tokens.  bos_id: None when it
    has no such token.  is_byte_level: tokens are runs of bytes.  longest_token: most characters of text that one token can stand for, None
    where that is not known (a normaliser, or a special token that eats white space, lets text vanish)."""

    def __init__(self, backend: tokenizers.Tokenizer, *, source: str, bos_token: str | None = None) -> None:
        """backend: taken over and changed (no truncation, no padding, spelled special tokens stay text).  source: named in errors."""
        self._backend, self._source = backend, source
        backend.no_truncation()
        backend.no_padding()
        self._prefix, self._suffix = _surrounding_ids(backend)
        special = {i: t for i, t in backend.get_added_tokens_decoder().items() if t.special and t.content}
        self._special_ids = {t.content: i for i, t in special.items()}
        self._check_segments()
        backend.encode_special_tokens = True
        self.specials = SpecialTokens(
            {
                t.content: SpecialFlags(lstrip=t.lstrip, rstrip=t.rstrip, single_word=t.single_word)
                for t in special.values()
            }
        )
        self.special_ids = frozenset(self._special_ids.values())
        self.is_byte_level = _decoder_types(backend) - {"Fuse"} == {"ByteLevel"}
        self._token_bytes: dict[int, bytes] = {}
        self._token_texts: dict[int, str] = {}
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        keeps_all = (
            self.is_byte_level
            and backend.normalizer is None
            and not any(t.lstrip or t.rstrip for t in special.values())
        )
        self.longest_token = max(map(len, vocabulary), default=1) if keeps_all else None
        known_bos = self._special_ids.get(bos_token) if bos_token is not None else None
        self.bos_id = self._prefix[0] if self._prefix else known_bos

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Raises CheckpointError naming the file when there is no tokenizer or it is damaged."""
        path = folder / TOKENIZER_FILE
        backend = _read_backend(path) if path.is_file() else _convert(folder)
        return cls(backend, source=str(folder), bos_token=named_tokens(folder).get("bos_token"))

    def encode_text(self, text: str, *, allow_special: bool) -> list[int]:
        """Ids of `text` without a leading BOS. allow_special: special tokens spelled in it become those tokens; else they stay text.

        Raises RequestError for text that is not Unicode (lone surrogates).
        """
        if allow_special:
            return self.encode_pieces(self.specials.split(text))
        ids = self._encode(text)
        pieces = self.specials.split(text)
        if {self._special_ids[p.token] for p in pieces if isinstance(p, Special)}.isdisjoint(ids):
            return ids
        # A model whose own vocabulary holds the token as a word (BPE with ignore_merges, WordLevel): cut the word.
        return [i for part in _cut(pieces) for i in self._encode(part)]

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of a rendered template. Neighbouring texts are encoded as one, as they would be in a rendered string.

        Raises CheckpointError for a special token this tokenizer lacks, RequestError for an image.
        """
        ids: list[int] = []
        text = ""
        for piece in pieces:
            if isinstance(piece, Text):
                text += piece.text
                continue
            if text:
                ids += self.encode_text(text, allow_special=False)
                text = ""
            ids.append(self._id_of(piece))
        return ids + self.encode_text(text, allow_special=False)

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a completion prompt: special tokens spelled in it are meant, and BOS is put first unless the text begins with it."""
        ids = self.encode_text(text, allow_special=True)
        begun = self._prefix == ids[: len(self._prefix)]
        return [*([] if begun else self._prefix), *ids, *self._suffix]

    def special_id(self, token: str) -> int:
        """Id of a special token by its exact text. Raises CheckpointError when there is none."""
        if token not in self._special_ids:
            raise CheckpointError(
                f"the tokenizer in {self._source} has no special token {token!r}",
                fix="choose the template the model was trained with: --chat-template NAME or FILE.jinja",
            )
        return self._special_ids[token]

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of `ids`; ids beyond the vocabulary give nothing, bytes that are not UTF-8 give U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling (bytes as printable characters, ▁ for a space …), None for an unknown id."""
        return self._backend.id_to_token(token_id)

    def token_text(self, token_id: int) -> str:
        """`decode` of one token, special or not. Logprobs name the same few thousand tokens again and again: each is spelled once."""
        if token_id not in self._token_texts:
            self._token_texts[token_id] = self.decode([token_id], skip_special=False)
        return self._token_texts[token_id]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, which need not be whole characters; none for an unknown id."""
        if token_id not in self._token_bytes:
            token = self._backend.id_to_token(token_id)
            self._token_bytes[token_id] = b"" if token is None else self._bytes_of(token, token_id)
        return self._token_bytes[token_id]

    def _bytes_of(self, token: str, token_id: int) -> bytes:
        if self.is_byte_level:
            known = all(
                c in BYTE_OF for c in token
            )  # an added token may hold other characters; the library then takes it as text
            return bytes(BYTE_OF[c] for c in token) if known else token.encode()
        if is_byte_token(token):
            return bytes([int(token[1:-1], 16)])
        return self.decode([token_id], skip_special=False).encode()

    def _check_segments(self) -> None:
        """Text after a special token must get the ids it gets alone (SentencePiece's "prefix space at the first word only" breaks that)."""
        for token, token_id in list(self._special_ids.items())[:1]:
            alone, after = (self._backend.encode(t, add_special_tokens=False).ids for t in ("a", token + "a"))
            if token_id in after and after != [token_id, *alone]:
                raise CheckpointError(
                    f"the tokenizer in {self._source} encodes text after {token!r} otherwise than alone; L4 serves byte-level BPE tokenizers"
                )

    def _id_of(self, piece: Special | Image) -> int:
        if isinstance(piece, Image):
            raise RequestError("image input is not built yet in this version of L4", param="messages")
        return self.special_id(piece.token)

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
        # The batch call, for it lets other threads run meanwhile: one long prompt must not stall a server.
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds any file a tokenizer can be made of."""
    return any((folder / name).is_file() for name in (TOKENIZER_FILE, *CONVERTIBLE_FILES))


def is_byte_token(token: str) -> bool:
    """Whether a vocabulary entry is a byte-fallback token such as <0xE2>."""
    return re.fullmatch("<0x[0-9A-Fa-f]{2}>", token) is not None


def _byte_alphabet() -> dict[str, int]:
    """The printable character byte-level BPE writes for each byte → the byte: itself where printable in Latin-1, else U+0100 onwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()


def _decoder_types(backend: tokenizers.Tokenizer) -> set[str]:
    """Kinds of the decoder's parts as tokenizer.json names them, {"ByteLevel"} for Llama 4; empty when it has no decoder."""
    decoder: Any = backend.decoder
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {part["type"] for part in state.get("decoders", [state])}


def _cut(pieces: Sequence[Piece]) -> list[str]:
    """The texts of `pieces`, each special token cut after its first character."""
    parts: list[str] = []
    for piece in pieces:
        if isinstance(piece, Text):
            parts.append(piece.text)
        elif isinstance(piece, Special):
            parts += [piece.token[:1], piece.token[1:]]
    return parts


def _surrounding_ids(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """(ids put before, ids put after) by ordinary encoding, found by encoding one letter."""
    bare, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    for begin in range(len(full) - len(bare) + 1):
        if full[begin : begin + len(bare)] == bare:
            return full[:begin], full[begin + len(bare) :]
    return [], []


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong
        raise CheckpointError(f"{path} is not a tokenizer: {error}", fix=FETCH_AGAIN) from error


def _convert(folder: Path) -> tokenizers.Tokenizer:
    if not has_tokenizer(folder):
        raise CheckpointError(f"{folder} has no {TOKENIZER_FILE}", fix=FETCH_AGAIN)
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        backend: object = made.backend_tokenizer
    except Exception as error:  # conversions of all kinds of files: no common base class
        raise CheckpointError(
            f"{folder} has no {TOKENIZER_FILE}, and transformers cannot make one of its files: {error}", fix=FETCH_AGAIN
        ) from error
    if not isinstance(backend, tokenizers.Tokenizer):
        raise CheckpointError(f"{folder} has no {TOKENIZER_FILE}; its files give no fast tokenizer", fix=FETCH_AGAIN)
    return backend
