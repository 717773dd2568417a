// Paged attention with an online softmax in float32. Query tokens × the query heads of one KV head are the rows of a tile; keys are taken 64 at a
// time, straight out of their pages, from the sequence's first on. A row's result does not depend on the rows beside it.
#pragma once
#include <math.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "api.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int KEYS = 64;                   // of a block
constexpr int64_t TILE_ROWS = 64;          // at most, unless one token's heads are more
constexpr int64_t PART_KEYS = 64 * KEYS;   // a few rows over more keys than this are dealt to several threads
constexpr int SCORE_ROWS = 4, SUM_ROWS = 6;  // rows of one product, for scores and for sums of values

// Rows [first, first + tokens) of a sequence at one KV head, over keys [begin, end). part: where its unfinished result goes, -1 = finish it.
struct Tile {
    int64_t seq, kv_head, first, tokens, begin, end, part;
};

// What is known of a row while its keys pass.
struct Softmax {
    float largest, sum;
};

template <class T>
struct Attending {
    const Attention* a;
    std::vector<Tile> tiles;
    std::vector<int64_t> splits;  // first tile of each that was split into parts
    std::unique_ptr<float, void (*)(void*)> parts{nullptr, free};  // [parts, rows, head_dim + 2]
    int64_t group, max_rows;
    std::atomic<int64_t> next{0}, next_split{0};
};

inline std::unique_ptr<float, void (*)(void*)> new_floats(int64_t count) {
    return {(float*)aligned_alloc(64, (size_t)(count * 4 + 127) / 64 * 64), free};
}

template <int M, class T>
__attribute__((noinline)) void score_rows(const float* rows, const T* const* keys, int count, int64_t dim, float* scores) {
    for (int j = 0; j < count; j += 4) dots<M>(rows, keys + j, dim, scores + j, KEYS);
}

// sums[m][0 … NV·LANES) += Σ weights[m][j] · values[j]
template <int M, int NV, class T>
__attribute__((noinline)) void add_values(const float* weights, const T* const* values, int64_t at, int count, int64_t dim, float* out) {
    Vec acc[M][NV];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < NV; v++) acc[m][v] = load(out + m * dim + v * LANES);
    for (int j = 0; j < count; j++) {
        const T* value = values[j] + at;
        Vec b[NV];
        for (int v = 0; v < NV; v++) b[v] = load(value + v * LANES);
        for (int m = 0; m < M; m++) {
            const Vec weight = all(weights[m * KEYS + j]);
            for (int v = 0; v < NV; v++) acc[m][v] = fma(weight, b[v], acc[m][v]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < NV; v++) store(out + m * dim + v * LANES, acc[m][v]);
}

template <int NV, class T>
inline void add_values_of_rows(const float* weights, const T* const* values, int64_t at, int count, int64_t rows, int64_t dim, float* out) {
    for (int64_t r = 0; r < rows; r += SUM_ROWS) {
#define L4_CALL(M) add_values<M, NV>(weights + r * KEYS, values, at, count, dim, out + r * dim + at)
        L4_BY_ROWS(rows - r, L4_CALL)
#undef L4_CALL
    }
}

// Which of the `count` keys from `begin` on a token sees, as bits. index: the token's among the `tokens` of its sequence.
inline uint64_t visible(const Attention& a, int64_t seq, int64_t index, int64_t begin, int64_t count) {
    const int64_t row = a.cu_seqlens_q[seq] + index, tokens = a.cu_seqlens_q[seq + 1] - a.cu_seqlens_q[seq];
    const int64_t prefix = a.seq_lens[seq] - tokens;
    const auto first = [](int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1; };
    if (!a.ancestors) return first(std::min(count, prefix + index + 1 - begin));
    const uint64_t before = !a.sees_prefix || a.sees_prefix[row] ? first(prefix - begin) : 0;
    const uint64_t nodes = (uint64_t)a.ancestors[row];
    const int64_t shift = prefix - begin;  // of node 0 in this block
    const uint64_t own = shift >= 64 || shift <= -64 ? 0 : shift >= 0 ? nodes << shift : nodes >> -shift;
    return (before | own) & first(count);
}

// Scores of a block → weights beside the row's largest score so far; what was summed before is scaled to it.
inline void weigh(float* scores, uint64_t seen, int count, Softmax& row, float* out, int64_t dim) {
    const int padded = (count + 15) / 16 * 16;
    if (seen == 0) {
        memset(scores, 0, padded * sizeof(float));
        return;
    }
    if (seen != ~0ull)
        for (int j = 0; j < padded; j++)
            if (!(seen >> j & 1)) scores[j] = -INFINITY;
    Vec most = load(scores);
    for (int j = LANES; j < padded; j += LANES) most = larger(most, load(scores + j));
    const float highest = std::max(row.largest, largest(most));
    Vec total = zero();
    for (int j = 0; j < padded; j += LANES) {
        const Vec score = load(scores + j), weight = exponential(sub(score, all(highest)));
        store(scores + j, weight);
    }
    if (seen != ~0ull)
        for (int j = 0; j < padded; j++)
            if (!(seen >> j & 1)) scores[j] = 0.0f;
    for (int j = 0; j < padded; j += LANES) total = add(total, load(scores + j));
    if (highest != row.largest && row.sum != 0.0f) {
        const float factor = expf(row.largest - highest);
        for (int64_t d = 0; d < dim; d += LANES) store(out + d, mul(load(out + d), all(factor)));
        row.sum *= factor;
    }
    row.largest = highest;
    row.sum += sum(total);
}

// A tile's rows over its keys. q, out: [rows, dim] float32, out cleared; scores [rows, KEYS].
template <class T>
void pass_keys(const Attention& a, const Tile& tile, int64_t group, const float* q, float* scores, float* out, Softmax* softmax) {
    const int64_t dim = a.head_dim, rows = tile.tokens * group;
    const int32_t* table = a.block_table + tile.seq * a.table_row;
    const T *keys[KEYS], *values[KEYS];
    for (int64_t begin = tile.begin; begin < tile.end; begin += KEYS) {
        const int count = (int)std::min<int64_t>(KEYS, tile.end - begin);
        for (int j = 0; j < count; j++) {
            const int64_t key = begin + j, page = table[key / a.page_size], offset = key % a.page_size;
            keys[j] = (const T*)a.k + page * a.k_page + offset * a.k_token + tile.kv_head * a.k_head;
            values[j] = (const T*)a.v + page * a.v_page + offset * a.v_token + tile.kv_head * a.v_head;
        }
        for (int j = count; j % 4; j++) keys[j] = keys[count - 1];
        for (int64_t r = 0; r < rows; r += SCORE_ROWS) {
            switch (rows - r) {
                case 1: score_rows<1>(q + r * dim, keys, count, dim, scores + r * KEYS);
                    break;
                case 2: score_rows<2>(q + r * dim, keys, count, dim, scores + r * KEYS);
                    break;
                case 3: score_rows<3>(q + r * dim, keys, count, dim, scores + r * KEYS);
                    break;
                default: score_rows<4>(q + r * dim, keys, count, dim, scores + r * KEYS);
            }
        }
        for (int64_t token = 0; token < tile.tokens; token++) {
            const uint64_t seen = visible(a, tile.seq, tile.first + token, begin, count);
            for (int64_t r = token * group; r < (token + 1) * group; r++) weigh(scores + r * KEYS, seen, count, softmax[r], out + r * dim, dim);
        }
        int64_t at = 0;
        for (; at + PANEL <= dim; at += PANEL) add_values_of_rows<PANEL_VECTORS>(scores, values, at, count, rows, dim, out);
        if constexpr (PANEL_VECTORS > 2)
            for (; at < dim; at += LANES) add_values_of_rows<1>(scores, values, at, count, rows, dim, out);
    }
}

template <class T>
void write_row(const Attention& a, const Tile& tile, int64_t group, int64_t r, const float* out, float sum) {
    const int64_t row = a.cu_seqlens_q[tile.seq] + tile.first + r / group, head = tile.kv_head * group + r % group;
    T* to = (T*)a.out + row * a.out_row + head * a.out_head;
    const Vec share = all(sum > 0.0f ? 1.0f / sum : 0.0f);
    for (int64_t d = 0; d < a.head_dim; d += LANES) store(to + d, mul(load(out + d), share));
}

// [rows, head_dim] sums, then each row's largest score and sum.
template <class T>
float* part_of(Attending<T>& call, int64_t part) {
    return call.parts.get() + part * call.max_rows * (call.a->head_dim + 2);
}

template <class T>
void merge_parts(Attending<T>& call, int64_t first) {
    const Attention& a = *call.a;
    const Tile& tile = call.tiles[first];
    const int64_t rows = tile.tokens * call.group, dim = a.head_dim;
    float* into = part_of(call, tile.part);
    Softmax* merged = (Softmax*)(into + call.max_rows * dim);
    for (size_t i = first + 1; i < call.tiles.size() && call.tiles[i].part > tile.part && call.tiles[i].seq == tile.seq &&
                               call.tiles[i].kv_head == tile.kv_head; i++) {
        const float* from = part_of(call, call.tiles[i].part);
        const Softmax* other = (const Softmax*)(from + call.max_rows * dim);
        for (int64_t r = 0; r < rows; r++) {
            if (other[r].sum == 0.0f) continue;
            const float highest = std::max(merged[r].largest, other[r].largest);
            const float mine = merged[r].sum == 0.0f ? 0.0f : expf(merged[r].largest - highest), its = expf(other[r].largest - highest);
            for (int64_t d = 0; d < dim; d += LANES)
                store(into + r * dim + d, fma(load(from + r * dim + d), all(its), mul(load(into + r * dim + d), all(mine))));
            merged[r] = {highest, merged[r].sum * mine + other[r].sum * its};
        }
    }
    for (int64_t r = 0; r < rows; r++) write_row<T>(a, tile, call.group, r, into + r * dim, merged[r].sum);
}

template <class T>
void run_tile(Attending<T>& call, const Tile& tile, float* scratch) {
    const Attention& a = *call.a;
    const int64_t dim = a.head_dim, rows = tile.tokens * call.group;
    float *q = scratch, *scores = q + call.max_rows * dim;
    float* out = tile.part >= 0 ? part_of(call, tile.part) : scores + call.max_rows * KEYS;
    Softmax* softmax = (Softmax*)(out + call.max_rows * dim);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t row = a.cu_seqlens_q[tile.seq] + tile.first + r / call.group, head = tile.kv_head * call.group + r % call.group;
        const T* from = (const T*)a.q + row * a.q_row + head * a.q_head;
        for (int64_t d = 0; d < dim; d += LANES) store(q + r * dim + d, mul(load(from + d), all(a.scale)));
        softmax[r] = {-INFINITY, 0.0f};
    }
    memset(out, 0, rows * dim * sizeof(float));
    pass_keys<T>(a, tile, call.group, q, scores, out, softmax);
    if (tile.part < 0)
        for (int64_t r = 0; r < rows; r++) write_row<T>(a, tile, call.group, r, out + r * dim, softmax[r].sum);
}

template <class T>
void attend_thread(void* context) {
    Attending<T>& call = *(Attending<T>*)context;
    const int64_t dim = call.a->head_dim, count = (int64_t)call.tiles.size();
    const auto scratch = new_floats(call.max_rows * (2 * dim + KEYS + 2));
    for (int64_t i; (i = call.next.fetch_add(1)) < count;) run_tile(call, call.tiles[i], scratch.get());
    if (call.splits.empty()) return;
    if (call.a->num_threads > 1) GOMP_barrier();
    for (int64_t i; (i = call.next_split.fetch_add(1)) < (int64_t)call.splits.size();) merge_parts(call, call.splits[i]);
}

template <class T>
void make_tiles(Attending<T>& call) {
    const Attention& a = *call.a;
    call.group = a.num_q_heads / a.num_kv_heads;
    const int64_t most = std::max<int64_t>(1, TILE_ROWS / call.group);
    call.max_rows = 0;
    int64_t parts = 0;
    for (int64_t seq = 0; seq < a.num_seqs; seq++) {
        const int64_t tokens = a.cu_seqlens_q[seq + 1] - a.cu_seqlens_q[seq], keys = a.seq_lens[seq];
        if (tokens <= 0 || keys <= 0) continue;
        for (int64_t head = 0; head < a.num_kv_heads; head++)
            for (int64_t first = 0; first < tokens; first += most) {
                const int64_t some = std::min(most, tokens - first);
                const int64_t end = a.ancestors ? keys : std::min(keys, keys - tokens + first + some);  // of what they see
                call.max_rows = std::max(call.max_rows, some * call.group);
                if (tokens > most || end <= PART_KEYS) {
                    call.tiles.push_back({seq, head, first, some, 0, end, -1});
                    continue;
                }
                call.splits.push_back((int64_t)call.tiles.size());
                for (int64_t begin = 0; begin < end; begin += PART_KEYS)
                    call.tiles.push_back({seq, head, first, some, begin, std::min(end, begin + PART_KEYS), parts++});
            }
    }
    call.parts = new_floats(parts * call.max_rows * (a.head_dim + 2));
}

template <class T>
void run_attention(const Attention* a) {
    Attending<T> call;
    call.a = a;
    make_tiles(call);
    if (a->num_threads > 1 && call.tiles.size() > 1)
        on_threads(attend_thread<T>, &call, a->num_threads);
    else if (!call.tiles.empty()) {
        attend_thread<T>(&call);
    }
}

}  // namespace
