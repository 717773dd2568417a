"""What the demo model is: sizes, the tokens it adds to its base, and which features are on. Plain data, no torch.

The base is SmolLM2-135M-Instruct (a dense Llama). The demo model is the same network in the whole Llama 4 text architecture, healed by
distillation (checkpoints/smol-l4/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from l4core.chat.specials import LLAMA4_TOKENS

LAYERS = 30
HIDDEN = 576
HEADS = 9
KV_HEADS = 3
HEAD_DIM = 64
Q_ROWS = HEADS * HEAD_DIM
KV_ROWS = KV_HEADS * HEAD_DIM
DENSE_FF = 1536
EXPERTS = 4
EXPERT_FF = 768
SLOTS = EXPERTS + 1  # slot 0 is the shared expert
CONTEXT = 8192

BASE_VOCAB = 49152
SPECIAL = LLAMA4_TOKENS
ID = {token: BASE_VOCAB + i for i, token in enumerate(SPECIAL)}
BOT, HEADER_START, HEADER_END, EOT = (
    ID[t] for t in ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>")
)
PAD = ID["<|finetune_right_pad|>"]
STOP_IDS = (ID["<|end_of_text|>"], ID["<|eom|>"], EOT)
VOCAB = -(-(BASE_VOCAB + len(SPECIAL)) // 64) * 64  # 49216: the new tokens, padded to a multiple of 64
END_OF_TEXT, IM_START, IM_END = 0, 1, 2  # the base's own special tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """Which features are on. chunk: tokens a RoPE layer sees (0 = the whole document).  nope: every 4th layer has no RoPE and sees everything.
    nope_chunked: those layers are cut to the chunk as well.  router: "top1" as trained, "off" = expert 0 at weight 0.5, "shift" = the next
    expert instead.  The last two exist for ablations only."""

    chunk: int = 512
    nope: bool = True
    nope_chunked: bool = False
    temperature: bool = True
    attn_scale: float = 0.1
    floor_scale: int = 512
    router: Literal["top1", "off", "shift"] = "top1"
    theta: float = 100000.0
    eps: float = 1e-5

    def is_nope(self, layer: int) -> bool:
        return self.nope and is_nope_layer(layer)


def is_nope_layer(layer: int) -> bool:
    """Layers 3, 7, …, 27: no RoPE, global attention."""
    return layer % 4 == 3


STUDENT = Arch()
TEACHER = Arch(chunk=0, nope=False, temperature=False)
