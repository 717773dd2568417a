"""The base weights: SmolLM2-135M-Instruct as a GGUF file, dequantised on demand.

GGUF stores q and k rows in interleaved-pair RoPE order, which is Llama 4's own order, so nothing is permuted here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from l4core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from gguf import GGUFReader


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLayer:
    """One layer of the base, float32. qkv [960, 576] rows q|k|v, o [576, 576], gate and up [1536, 576], down [576, 1536], norms [576]."""

    attn_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class BaseModel:
    """A GGUF file, memory-mapped. Raises ConfigError without the gguf package and CheckpointError for a file that is not GGUF."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _open(path)
        self._tensors = {t.name: t for t in self._reader.tensors}

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its GGUF name, float32."""
        from gguf.quants import dequantize

        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}; wanted the GGUF of SmolLM2-135M-Instruct")
        found = self._tensors[name]
        # np.array copies: tensors that are stored as float32 come back as a read-only view of the mapped file
        return torch.from_numpy(np.array(dequantize(found.data, found.tensor_type), dtype=np.float32))

    def layer(self, index: int) -> DenseLayer:
        def part(name: str) -> torch.Tensor:
            return self.tensor(f"blk.{index}.{name}.weight")

        return DenseLayer(
            attn_norm=part("attn_norm"),
            qkv=torch.cat([part("attn_q"), part("attn_k"), part("attn_v")]),
            o=part("attn_output"),
            mlp_norm=part("ffn_norm"),
            gate=part("ffn_gate"),
            up=part("ffn_up"),
            down=part("ffn_down"),
        )

    def embed(self) -> torch.Tensor:
        """[49152, 576]; also the head, which the base ties to it."""
        return self.tensor("token_embd.weight")

    def norm(self) -> torch.Tensor:
        return self.tensor("output_norm.weight")

    def vocabulary(self) -> tuple[list[str], list[int], list[str]]:
        """Tokens, kind of each (3 = special), and merges "left right", as the GGUF lists them."""
        tokens, kinds, merges = (self._field(name) for name in ("tokens", "token_type", "merges"))
        return tokens, kinds, merges

    def _field(self, name: str) -> Any:
        field = self._reader.fields.get(f"tokenizer.ggml.{name}")
        if field is None:
            raise CheckpointError(
                f"{self.path} has no tokenizer field {name!r}; wanted the GGUF of SmolLM2-135M-Instruct"
            )
        return field.contents()


def _open(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the demo checkpoint is built from a GGUF file, and the package gguf is not installed",
            fix="pip install 'l4core[demo]'",
        ) from error
    try:
        return GGUFReader(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable GGUF file: {error}", fix="fetch it again: l4 demo-model"
        ) from error
