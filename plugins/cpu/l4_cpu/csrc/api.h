// What Python hands over (library.py has the same records). All pointers are to tensors of the caller.
#pragma once
#include <stdint.h>

// One layer's experts on T rows, as ExpertKernel.forward. x: [T, hidden], x_row elements apart; out: contiguous.  expert_ids: [T], -1 = none.  score: [T].
// gate_up, down: packed by `pack`, all experts one behind the other; shared_*: null where there is no shared expert.
struct Experts {
    const void *x, *gate_up, *down, *shared_gate_up, *shared_down;
    const int32_t* expert_ids;
    const float* score;
    void* out;
    int64_t x_row, num_rows, num_experts, hidden, inter;
    int32_t is_bf16, num_threads;
};

// The norm ahead of the experts, and their router, as ExpertKernel.norm_route. stream: [T, hidden], gets update added, rows stream_row and
// update_row elements apart; router: [num_experts, hidden].  normed: contiguous.  expert_ids, score: [T].
struct NormRoute {
    void* stream;
    const void *update, *weight, *router;
    void* normed;
    int32_t* expert_ids;
    float* score;
    int64_t stream_row, update_row, num_rows, num_experts, hidden;
    float eps;
    int32_t is_bf16, num_threads;
};

// One layer's attention, as AttentionBackend.attend. Strides are in elements; q, out: [rows, q_heads, head_dim], k, v: [pages, page_size,
// kv_heads, head_dim], last stride 1, all float32 or all bfloat16.  cu_seqlens_q [num_seqs + 1], seq_lens [num_seqs], block_table
// [num_seqs, ...].  ancestors [rows], sees_prefix [rows]: null unless there is a tree; the latter also where all see it.
struct Attention {
    const void *q, *k, *v;
    void* out;
    const int32_t *cu_seqlens_q, *seq_lens, *block_table;
    const int64_t* ancestors;
    const uint8_t* sees_prefix;
    int64_t q_row, q_head, out_row, out_head, k_page, k_token, k_head, v_page, v_token, v_head, table_row;
    int64_t num_seqs, page_size, num_q_heads, num_kv_heads, head_dim;
    float scale;
    int32_t is_bf16, num_threads;
};
