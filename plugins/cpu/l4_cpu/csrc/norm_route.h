// The residual stream gets its update, its RMS norm is what the experts read, and the router chooses one for each row. Sums are float32.
#pragma once
#include <math.h>

#include <algorithm>
#include <vector>

#include "api.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t ROWS_A_THREAD = 16;  // fewer are not worth waking another one
constexpr int ROUTED_ROWS = 4;         // of one product with the router

// normed = norm of stream + update; wide: the same in float32, as it was rounded.
template <class T>
void norm_row(const NormRoute& n, int64_t row, float* wide) {
    T* stream = (T*)n.stream + row * n.stream_row;
    const T *update = (const T*)n.update + row * n.update_row, *weight = (const T*)n.weight;
    T* normed = (T*)n.normed + row * n.hidden;
    Vec squares = zero();
    for (int64_t d = 0; d < n.hidden; d += LANES) {
        store(stream + d, add(load(stream + d), load(update + d)));
        const Vec x = load(stream + d);
        squares = fma(x, x, squares);
    }
    const Vec scale = all(1.0f / sqrtf(sum(squares) / (float)n.hidden + n.eps));
    for (int64_t d = 0; d < n.hidden; d += LANES) {
        store(normed + d, mul(mul(load(stream + d), scale), load(weight + d)));
        store(wide + d, load(normed + d));
    }
}

// The expert of the largest logit, the lowest of several.
inline void choose(const NormRoute& n, int64_t row, const float* logits) {
    int64_t best = 0;
    for (int64_t e = 1; e < n.num_experts; e++)
        if (logits[e] > logits[best]) best = e;
    n.expert_ids[row] = (int32_t)best;
    n.score[row] = 1.0f / (1.0f + expf(-logits[best]));
}

template <class T>
void norm_route_rows(const NormRoute& n, int64_t begin, int64_t end) {
    const int64_t stride = (n.num_experts + 3) / 4 * 4;
    std::vector<float> wide(ROUTED_ROWS * n.hidden), logits(ROUTED_ROWS * stride);
    for (int64_t row = begin; row < end; row += ROUTED_ROWS) {
        const int64_t some = std::min<int64_t>(ROUTED_ROWS, end - row);
        for (int64_t i = 0; i < some; i++) norm_row<T>(n, row + i, wide.data() + i * n.hidden);
        for (int64_t e = 0; e < n.num_experts; e += 4) {
            const T* keys[4];
            for (int64_t j = 0; j < 4; j++) keys[j] = (const T*)n.router + std::min(e + j, n.num_experts - 1) * n.hidden;
            switch (some) {
                case 1: dots<1>(wide.data(), keys, n.hidden, logits.data() + e, stride);
                    break;
                case 2: dots<2>(wide.data(), keys, n.hidden, logits.data() + e, stride);
                    break;
                case 3: dots<3>(wide.data(), keys, n.hidden, logits.data() + e, stride);
                    break;
                default: dots<4>(wide.data(), keys, n.hidden, logits.data() + e, stride);
            }
        }
        for (int64_t i = 0; i < some; i++) choose(n, row + i, logits.data() + i * stride);
    }
}

template <class T>
void norm_route_thread(void* context) {
    const NormRoute& n = *(const NormRoute*)context;
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    norm_route_rows<T>(n, n.num_rows * thread / threads, n.num_rows * (thread + 1) / threads);
}

template <class T>
void run_norm_route(const NormRoute* n) {
    const int64_t threads = std::min<int64_t>(n->num_threads, n->num_rows / ROWS_A_THREAD);
    if (threads > 1)
        on_threads(norm_route_thread<T>, (void*)n, (int)threads);
    else
        norm_route_rows<T>(*n, 0, n->num_rows);
}

}  // namespace
