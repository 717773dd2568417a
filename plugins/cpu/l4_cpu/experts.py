"""The expert kernel: one call a layer. Imported only when it was chosen."""

from __future__ import annotations

import ctypes

import torch

from l4_cpu.library import Experts, NormRoute, load
from l4core.plugin_api import ExpertContext, ExpertKernel, ExpertWeights


class CpuExperts(ExpertKernel):
    """Weights are packed in panels of columns, which are read from one end to the other at a memory's speed. The score scales what the products
    of gate and up have summed, in float32; each sum has its terms in one order, whatever the number of rows."""

    def __init__(self, kernels: ctypes.CDLL, num_threads: int) -> None:
        self._kernels, self._num_threads = kernels, num_threads

    def prepare(self, weights: ExpertWeights) -> None:
        """In place; a thread copies one expert meanwhile."""
        gate_up, down = (weights.gate_up, weights.shared_gate_up), (weights.down, weights.shared_down)
        for matrices, halves in ((gate_up, 1), (down, 0)):
            for matrix in matrices:
                if matrix is None:
                    continue
                if not matrix.is_contiguous():
                    raise ValueError(f"a weight has strides {matrix.stride()}; wanted {list(matrix.shape)} contiguous")
                *_, num_out, num_in = matrix.shape
                is_bf16 = int(matrix.dtype == torch.bfloat16)
                count = matrix.numel() // (num_out * num_in)
                self._kernels.l4_pack(matrix.data_ptr(), count, num_out, num_in, is_bf16, halves, self._num_threads)

    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        num_experts, hidden, inter = weights.down.shape
        out = torch.empty(x.shape[0], hidden, dtype=x.dtype)
        ids, scale = expert_ids.contiguous(), score.float().contiguous()
        shared_gate_up, shared_down = weights.shared_gate_up, weights.shared_down
        call = Experts(
            x.data_ptr(),
            weights.gate_up.data_ptr(),
            weights.down.data_ptr(),
            None if shared_gate_up is None else shared_gate_up.data_ptr(),
            None if shared_down is None else shared_down.data_ptr(),
            ids.data_ptr(),
            scale.data_ptr(),
            out.data_ptr(),
            x.stride(0),
            x.shape[0],
            num_experts,
            hidden,
            inter,
            x.dtype == torch.bfloat16,
            self._num_threads,
        )
        self._kernels.l4_experts(ctypes.byref(call))
        return out

    def norm_route(
        self, stream: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float, router: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_rows, hidden = stream.shape
        normed = torch.empty(num_rows, hidden, dtype=stream.dtype)
        expert_ids, score = torch.empty(num_rows, dtype=torch.int32), torch.empty(num_rows)
        added = update if update.stride(1) == 1 else update.contiguous()
        call = NormRoute(
            stream.data_ptr(),
            added.data_ptr(),
            weight.data_ptr(),
            router.data_ptr(),
            normed.data_ptr(),
            expert_ids.data_ptr(),
            score.data_ptr(),
            stream.stride(0),
            added.stride(0),
            num_rows,
            router.shape[0],
            hidden,
            eps,
            stream.dtype == torch.bfloat16,
            self._num_threads,
        )
        self._kernels.l4_norm_route(ctypes.byref(call))
        return normed, expert_ids, score


def create(context: ExpertContext) -> CpuExperts:
    """Raises BackendUnavailable when the library does not load."""
    return CpuExperts(load(context.platform.runtime), torch.get_num_threads())
