// A layer's experts: rows sorted by expert, both products with SwiGLU between them, the shared expert as one more group.
#pragma once
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "api.h"
#include "simd.h"
#include "threads.h"

namespace {

inline int64_t columns_of(int64_t panel, int64_t num_out) { return std::min<int64_t>(PANEL, num_out - panel * PANEL); }

// ---------------------------------------------------------------- packing

// Matrices that lie one behind the other, each put in panels where it is.
struct Packing {
    void* weight;
    int64_t count, num_out, num_in;
    int halves, num_threads;
    std::atomic<int64_t> next{0};
};

template <class T>
void pack_matrix(T* weight, const Packing& p, std::vector<T>& source) {
    constexpr int PAIR = sizeof(T) == 2 ? 2 : 1;
    source.assign(weight, weight + p.num_out * p.num_in);
    for (int64_t begin = 0; begin < p.num_out; begin += PANEL) {
        const int64_t width = std::min<int64_t>(PANEL, p.num_out - begin), half = width / 2;
        for (int64_t block = 0; block < p.num_in; block += 16)  // of inputs, so that what is written stays in the cache
            for (int64_t c = 0; c < width; c++) {
                const int64_t row = !p.halves ? begin + c : c < half ? begin / 2 + c : (p.num_out + begin) / 2 + c - half;
                const T* from = source.data() + row * p.num_in;
                T* to = weight + begin * p.num_in + c * PAIR;
                for (int64_t k = block; k < std::min(block + 16, p.num_in); k++) to[k / PAIR * width * PAIR + k % PAIR] = from[k];
            }
    }
}

template <class T>
void pack_thread(void* context) {
    Packing& p = *(Packing*)context;
    std::vector<T> source;
    for (int64_t i; (i = p.next.fetch_add(1)) < p.count;) pack_matrix((T*)p.weight + i * p.num_out * p.num_in, p, source);
}

// ---------------------------------------------------------------- one call

// Rows that meet one expert: rows[0 … count) of x; their activations are `first` … in the order of all groups.
struct Group {
    const int32_t* rows;
    int64_t count, first;
    const void *gate_up, *down;
    bool routed;
};

template <class T>
struct Call {
    const Experts* e;
    std::vector<Group> groups;
    std::vector<int32_t> order;
    std::unique_ptr<T, void (*)(void*)> hidden{nullptr, free};  // [groups' rows, inter]
    int64_t up_panels, down_panels;
};

// Calls use(first, rows, block, blocks) for `count` rows in blocks of at most ROWS, as equal as they can be.
template <class Use>
inline void for_blocks(int64_t count, Use use) {
    const int64_t blocks = (count + ROWS - 1) / ROWS;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t begin = b * count / blocks;
        use(begin, (b + 1) * count / blocks - begin, b, blocks);
    }
}

template <int M, int NV, class T>
__attribute__((noinline)) void gate_up_block(const T* const* rows, const float* score, const T* panel, int64_t num_in, T* const* out,
                                             const char* next, int64_t lines) {
    Vec acc[M][NV];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < NV; v++) acc[m][v] = zero();
    product<M, NV>(rows, panel, num_in, acc, next, lines);
    for (int m = 0; m < M; m++) {
        const Vec s = all(score[m]);
        for (int v = 0; v < NV / 2; v++) {
            const Vec gate = mul(acc[m][v], s), up = mul(acc[m][v + NV / 2], s);
            const Vec silu = divide(gate, add(all(1.0f), exponential(sub(zero(), gate))));
            store(out[m] + v * LANES, mul(silu, up));
        }
    }
}

template <int M, int NV, class T>
__attribute__((noinline)) void down_block(const T* const* rows, const T* panel, int64_t num_in, T* const* out, bool adds, const char* next,
                                          int64_t lines) {
    Vec acc[M][NV];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < NV; v++) acc[m][v] = zero();
    product<M, NV>(rows, panel, num_in, acc, next, lines);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < NV; v++) {
            T* to = out[m] + v * LANES;
            store(to, adds ? add(acc[m][v], load(to)) : acc[m][v]);
        }
}

// One panel of gate and up for all rows of a group.
template <class T, int NV>
void gate_up_panel(const Call<T>& call, const Group& group, int64_t panel, int64_t next_bytes) {
    const Experts& e = *call.e;
    const T* weight = (const T*)group.gate_up + panel * PANEL * e.hidden;
    const char* next = (const char*)(weight + NV * LANES * e.hidden);
    T* hidden = call.hidden.get() + group.first * e.inter + panel * PANEL / 2;
    for_blocks(group.count, [&](int64_t begin, int64_t m, int64_t block, int64_t blocks) {
        const T* rows[ROWS];
        T* out[ROWS];
        float score[ROWS];
        for (int64_t i = 0; i < m; i++) {
            const int64_t row = group.routed ? group.rows[begin + i] : begin + i;
            rows[i] = (const T*)e.x + row * e.x_row;
            score[i] = group.routed ? e.score[row] : 1.0f;
            out[i] = hidden + (begin + i) * e.inter;
        }
        const int64_t lines = next_bytes / 64, from = lines * block / blocks, share = lines * (block + 1) / blocks - from;
#define L4_CALL(M) gate_up_block<M, NV>(rows, score, weight, e.hidden, out, next + 64 * from, share)
        L4_BY_ROWS(m, L4_CALL)
#undef L4_CALL
    });
}

template <class T, int NV>
void down_panel(const Call<T>& call, const Group& group, int64_t panel, bool adds, const char* next, int64_t next_bytes) {
    const Experts& e = *call.e;
    const T* weight = (const T*)group.down + panel * PANEL * e.inter;
    const T* hidden = call.hidden.get() + group.first * e.inter;
    for_blocks(group.count, [&](int64_t begin, int64_t m, int64_t block, int64_t blocks) {
        const T* rows[ROWS];
        T* out[ROWS];
        for (int64_t i = 0; i < m; i++) {
            const int64_t row = group.routed ? group.rows[begin + i] : begin + i;
            rows[i] = hidden + (begin + i) * e.inter;
            out[i] = (T*)e.out + row * e.hidden + panel * PANEL;
        }
        const int64_t lines = next_bytes / 64, from = lines * block / blocks, share = lines * (block + 1) / blocks - from;
#define L4_CALL(M) down_block<M, NV>(rows, weight, e.inter, out, adds, next + 64 * from, share)
        L4_BY_ROWS(m, L4_CALL)
#undef L4_CALL
    });
}

// Calls use<NV>() with the vectors of this panel: all but the last are full.
#define L4_BY_WIDTH(columns, USE)                        \
    switch ((columns) / LANES) {                         \
        case 1: USE(1);                                  \
            break;                                       \
        case 2: USE(2);                                  \
            break;                                       \
        case 3: if constexpr (PANEL_VECTORS > 2) USE(3); \
            break;                                       \
        default: if constexpr (PANEL_VECTORS > 2) USE(4); \
    }

template <class T>
void run_thread(void* context) {
    Call<T>& call = *(Call<T>*)context;
    const Experts& e = *call.e;
    const int64_t thread = e.num_threads > 1 ? omp_get_thread_num() : 0, threads = e.num_threads > 1 ? omp_get_num_threads() : 1;
    // gate and up: (group, panel) pairs, by what they cost
    const int64_t ups = call.up_panels;
    int64_t total = 0, done = 0;
    for (const Group& g : call.groups) total += ups * std::max<int64_t>(g.count, 12);
    const int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
    for (const Group& g : call.groups) {
        const int64_t cost = std::max<int64_t>(g.count, 12);
        for (int64_t p = 0; p < ups; p++, done += cost) {
            if (done < begin || done >= end) continue;
            const int64_t columns = columns_of(p, 2 * e.inter);
            const int64_t next = p + 1 < ups ? columns_of(p + 1, 2 * e.inter) * e.hidden * (int64_t)sizeof(T) : 0;
#define L4_USE(NV) gate_up_panel<T, NV>(call, g, p, next)
            if (columns == LANES * PANEL_VECTORS) L4_USE(PANEL_VECTORS); else if constexpr (PANEL_VECTORS > 2) L4_USE(2);
#undef L4_USE
        }
    }
    if (threads > 1) GOMP_barrier();
    // down: a thread makes some columns of the output from every group in turn, so what is added to is its own
    const int64_t downs = call.down_panels, first = downs * thread / threads, last = downs * (thread + 1) / threads;
    for (int64_t p = first; p < last; p++) {
        const int64_t columns = columns_of(p, e.hidden);
        const int64_t bytes = columns * e.inter * (int64_t)sizeof(T);
        for (size_t i = 0; i < call.groups.size(); i++) {
            const Group& g = call.groups[i];
            const bool more = i + 1 < call.groups.size() || p + 1 < last;
            const Group& then = call.groups[i + 1 < call.groups.size() ? i + 1 : 0];
            const char* next = (const char*)((const T*)then.down + (i + 1 < call.groups.size() ? p : p + 1) * PANEL * e.inter);
#define L4_USE(NV) down_panel<T, NV>(call, g, p, !g.routed, next, more ? bytes : 0)
            L4_BY_WIDTH(columns, L4_USE)
#undef L4_USE
        }
    }
}

// Groups of rows by expert, those of no expert left out; the shared expert last.
template <class T>
void make_groups(Call<T>& call) {
    const Experts& e = *call.e;
    std::vector<int32_t> ends(e.num_experts + 1, 0);
    for (int64_t t = 0; t < e.num_rows; t++)
        if (e.expert_ids[t] >= 0) ends[e.expert_ids[t] + 1]++;
    for (int64_t i = 0; i < e.num_experts; i++) ends[i + 1] += ends[i];
    const int64_t routed = ends[e.num_experts];
    call.order.resize(e.num_rows);
    std::vector<int32_t> place(ends.begin(), ends.end() - 1);
    for (int64_t t = 0; t < e.num_rows; t++)
        if (e.expert_ids[t] >= 0) call.order[place[e.expert_ids[t]]++] = (int32_t)t;
    for (int64_t i = 0; i < e.num_experts; i++) {
        const int64_t count = ends[i + 1] - ends[i];
        if (count == 0) continue;
        const T* gate_up = (const T*)e.gate_up + i * 2 * e.inter * e.hidden;
        const T* down = (const T*)e.down + i * e.inter * e.hidden;
        call.groups.push_back({call.order.data() + ends[i], count, ends[i], gate_up, down, true});
    }
    if (e.shared_gate_up) call.groups.push_back({nullptr, e.num_rows, routed, e.shared_gate_up, e.shared_down, false});
    if (routed < e.num_rows)
        for (int64_t t = 0; t < e.num_rows; t++)
            if (e.expert_ids[t] < 0) memset((T*)e.out + t * e.hidden, 0, e.hidden * sizeof(T));
    const size_t bytes = (routed + (e.shared_gate_up ? e.num_rows : 0)) * e.inter * sizeof(T);
    call.hidden.reset((T*)aligned_alloc(64, (bytes + 127) / 64 * 64));
}

template <class T>
void run_experts(const Experts* e) {
    Call<T> call;
    call.e = e;
    call.up_panels = (2 * e->inter + PANEL - 1) / PANEL;
    call.down_panels = (e->hidden + PANEL - 1) / PANEL;
    make_groups(call);
    if (e->num_threads > 1)
        on_threads(run_thread<T>, &call, e->num_threads);
    else
        run_thread<T>(&call);
}

}  // namespace
