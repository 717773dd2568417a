"""The draft as it is trained: one layer, unrolled over its own outputs (training-time test), and the files it is served from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from target import Teacher
from torch import nn

LAYER, ATTENTION, MLP = "midlayer.", "midlayer.self_attn.", "midlayer.mlp."


class Draft(nn.Module):
    """tensors: by their names in the file, float32.  keep: int64 [draft vocabulary], target id of each draft id, ascending."""

    def __init__(self, config: dict, tensors: dict[str, torch.Tensor], keep: torch.Tensor) -> None:
        super().__init__()
        self.config, self.keep = config, keep
        self.tensors = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(t.float()) for name, t in tensors.items()}
        )

    @classmethod
    def new(cls, teacher: Teacher, keep: torch.Tensor, *, width: int, seed: int = 0) -> Draft:
        """It begins as a model that hands the target's highest layer through to a copy of its head."""
        c, target = teacher.config, teacher.model
        size, rows = c.hidden_size, (c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim)
        draw = torch.Generator().manual_seed(seed)

        def random(out: int, into: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(out, into, generator=draw) * (0.5 * scale / into**0.5)

        through = torch.cat([torch.zeros(size, 2 * size), torch.eye(size)], 1)
        tensors = {
            "fc.weight": through + random(size, 3 * size, 0.1),
            "norm.weight": target.norm.weight.detach().float().cpu().clone(),
            "lm_head.weight": _rows(teacher.head, keep),
            f"{ATTENTION}q_proj.weight": random(rows[0], 2 * size),
            f"{ATTENTION}k_proj.weight": random(rows[1], 2 * size),
            f"{ATTENTION}v_proj.weight": random(rows[1], 2 * size),
            f"{ATTENTION}o_proj.weight": random(size, rows[0], 0.3),
            f"{MLP}gate_proj.weight": random(width, size),
            f"{MLP}up_proj.weight": random(width, size),
            f"{MLP}down_proj.weight": random(size, width, 0.3),
            **{
                f"{LAYER}{name}.weight": torch.ones(size)
                for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")
            },
        }
        config = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "hidden_size": size,
            "intermediate_size": width,
            "num_hidden_layers": 1,
            "num_attention_heads": c.num_q_heads,
            "num_key_value_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "rms_norm_eps": c.rms_norm_eps,
            "rope_theta": c.rope_theta,
            "max_position_embeddings": c.max_position_embeddings,
            "vocab_size": c.vocab_size,
            "draft_vocab_size": len(keep),
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(teacher.layers)},
        }
        return cls(config, tensors, keep)

    @classmethod
    def load(cls, folder: Path) -> Draft:
        """To train further."""
        tensors = load_file(folder / "model.safetensors")
        tensors.pop("t2d", None)
        offsets = tensors.pop("d2t")
        config = json.loads((folder / "config.json").read_text())
        return cls(config, tensors, offsets + torch.arange(len(offsets)))

    def widen(self, keep: torch.Tensor, head: torch.Tensor) -> None:
        """Learn to guess more tokens: `keep` beside those it has. head: the target's [V, H], whose rows the new ones begin as."""
        old, self.keep = self.keep, torch.cat([self.keep, keep]).unique()
        rows = _rows(head, self.keep)
        rows[torch.searchsorted(self.keep, old)] = self._t("lm_head").detach()
        self.tensors["lm_head/weight"] = nn.Parameter(rows)
        self.config["draft_vocab_size"] = len(self.keep)

    def save(self, folder: Path) -> None:
        """In the layout of EAGLE, SGLang and NVIDIA."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            n.replace("/", "."): t.detach().cpu().to(torch.bfloat16).contiguous() for n, t in self.tensors.items()
        }
        tensors["d2t"] = self.keep.cpu() - torch.arange(len(self.keep))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))

    def unroll(self, aux: torch.Tensor, embeds: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
        """aux [B, L, 3 · H]; embeds [B, at least L + steps − 1, H], of the token after each position. Yields for every step s hidden states
        [B, L, H]: `logits` of position i's speak of token i + 2 + s. In step s a position sees the first step up to itself, and its own earlier
        guesses."""
        length = aux.shape[1]
        hidden = aux @ self._t("fc").T
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for step in range(steps):
            hidden = self._layer(hidden, embeds[:, step : step + length], step, keys, values)
            yield hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] → [..., draft vocabulary]."""
        return self._norm(hidden, "norm") @ self._t("lm_head").T

    def _layer(
        self,
        hidden: torch.Tensor,
        embeds: torch.Tensor,
        step: int,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> torch.Tensor:
        c = self.config
        heads, kv_heads, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        x = torch.cat([self._norm(embeds, f"{LAYER}input_layernorm"), self._norm(hidden, f"{LAYER}hidden_norm")], -1)
        q, k, v = (
            (x @ self._t(f"{ATTENTION}{name}_proj").T).unflatten(-1, (count, dim)).transpose(1, 2)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        positions = torch.arange(hidden.shape[1], device=hidden.device) + step
        keys.append(_turn(k, positions, c["rope_theta"]).repeat_interleave(heads // kv_heads, 1))
        values.append(v.repeat_interleave(heads // kv_heads, 1))
        seen = _attend(_turn(q, positions, c["rope_theta"]), keys, values)
        hidden = hidden + seen.transpose(1, 2).flatten(2) @ self._t(f"{ATTENTION}o_proj").T
        y = self._norm(hidden, f"{LAYER}post_attention_layernorm")
        gate, up = (y @ self._t(f"{MLP}{name}_proj").T for name in ("gate", "up"))
        return hidden + (F.silu(gate) * up) @ self._t(f"{MLP}down_proj").T

    def _t(self, name: str) -> torch.Tensor:
        return self.tensors[f"{name}.weight".replace(".", "/")]

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self._t(name), self.config["rms_norm_eps"]).to(x.dtype)


def _rows(head: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return head.detach()[keep.to(head.device)].float().cpu().clone()


def _attend(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """[B, heads, L, D]: all of the first step's keys up to the query's position, and of the later steps' the one at it."""
    length, scale = q.shape[2], q.shape[3] ** -0.5
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    first = (q @ keys[0].transpose(2, 3) * scale).masked_fill(later, -torch.inf)
    own = [(q * key).sum(-1, keepdim=True) * scale for key in keys[1:]]
    weights = torch.cat([first, *own], -1).softmax(-1, dtype=torch.float32).to(q.dtype)
    seen = weights[..., :length] @ values[0]
    for step, value in enumerate(values[1:]):
        seen = seen + weights[..., length + step, None] * value
    return seen


def _turn(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE, first half with second half: x [B, heads, L, D]."""
    dim = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angles = torch.outer(positions.float(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
