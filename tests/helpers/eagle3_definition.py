"""An EAGLE3 draft written from its definition: whole sequences, no cache, names of the files as they are. What the engine's draft is held to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


class Definition:
    """A draft folder, computed in float64."""

    def __init__(self, folder: Path, embed: torch.Tensor) -> None:
        """embed: of the target, [V, H]."""
        raw = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors")
        self.t = {name: x.double() if x.is_floating_point() else x for name, x in stored.items()}
        self.shape: dict[str, Any] = raw.get("transformer_layer_config", raw)
        self.flags: dict[str, Any] = {**raw, **raw.get("eagle_config", {})}
        self.layer = "layers.0." if "speculators_model_type" in raw else "midlayer."
        self.embed = self.t.get("embed_tokens.weight", embed.double())

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.shape["rms_norm_eps"]).sqrt() * self.t[f"{name}.weight"]

    def combine(self, aux: torch.Tensor) -> torch.Tensor:
        """aux [L, n · H] → [L, H]."""
        aux = aux.double()
        if self.flags.get("norm_before_fc"):
            aux = self.norm(aux, "input_norm")
        if self.flags.get("fc_norm"):
            parts = aux.split(self.embed.shape[1], dim=-1)
            aux = torch.cat([self.norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)], -1)
        return aux @ self.t["fc.weight"].T

    def run(self, ids: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
        """ids: the token after each position.  hidden [L, H].  → [L, H], what the recursion is fed with."""
        x_norm = self.norm(self.embed[torch.tensor(ids)], f"{self.layer}input_layernorm")
        h_norm = self.norm(hidden, f"{self.layer}hidden_norm")
        residual = h_norm if self.flags.get("norm_before_residual") else hidden
        x = torch.cat((x_norm, h_norm), -1)
        hidden = residual + self.attention(x)
        y = self.norm(hidden, f"{self.layer}post_attention_layernorm")
        gate, up = (y @ self.t[f"{self.layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        hidden = hidden + (F.silu(gate) * up) @ self.t[f"{self.layer}mlp.down_proj.weight"].T
        return self.norm(hidden, "norm") if self.flags.get("norm_output") else hidden

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        dim, length = self.shape["head_dim"], x.shape[0]
        heads = {"q": self.shape["num_attention_heads"]} | dict.fromkeys("kv", self.shape["num_key_value_heads"])
        q, k, v = (
            (x @ self.t[f"{self.layer}self_attn.{name}_proj.weight"].T).view(length, heads[name], dim).transpose(0, 1)
            for name in "qkv"
        )
        angles = torch.outer(
            torch.arange(length, dtype=torch.float64),
            self.shape["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim),
        )
        q, k = (_turn(x, angles) for x in (q, k))
        k, v = (x.repeat_interleave(heads["q"] // heads["k"], 0) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(0, 1).reshape(length, -1) @ self.t[f"{self.layer}self_attn.o_proj.weight"].T

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, H] → [R, draft vocabulary]."""
        return (hidden if self.flags.get("norm_output") else self.norm(hidden, "norm")) @ self.t["lm_head.weight"].T

    def chain(self, ids: Sequence[int], aux: torch.Tensor, count: int) -> list[int]:
        """Greedy guesses after the tokens `ids`. aux: [at least len(ids) − 1, n · H], of the target."""
        following, hidden = list(ids[1:]), self.combine(aux[: len(ids) - 1])
        guesses: list[int] = []
        for _ in range(count):
            last = self.run(following, hidden)[-1:]
            draft_id = int(self.logits(last).argmax())
            guesses.append(draft_id + int(self.t["d2t"][draft_id]) if "d2t" in self.t else draft_id)
            following.append(guesses[-1])
            hidden = torch.cat((hidden, last))
        return guesses


def _turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RoPE in Llama's order: first half with second half."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
