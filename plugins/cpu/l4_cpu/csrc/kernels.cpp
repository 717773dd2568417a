// The library's functions. It is compiled once for each instruction set (build.py), and Python loads the one that fits the CPU.
#include "api.h"
#include "attention.h"
#include "experts.h"
#include "norm_route.h"
#include "threads.h"

extern "C" {

// What it was built from (sources.py).
const char* l4_sources(void) { return L4_SOURCES; }

// Whether torch's OpenMP runtime has what on_threads needs.
int l4_has_threads(void) { return GOMP_parallel && GOMP_barrier && omp_get_thread_num && omp_get_num_threads; }

// Weights [count, num_out, num_in] → panels, each matrix in place. halves: rows are gate's, then up's; each panel gets as many of both.
void l4_pack(void* weights, int64_t count, int64_t num_out, int64_t num_in, int is_bf16, int halves, int num_threads) {
    Packing packing{weights, count, num_out, num_in, halves, num_threads};
    void (*body)(void*) = is_bf16 ? pack_thread<bf16> : pack_thread<float>;
    if (num_threads > 1 && count > 1)
        on_threads(body, &packing, num_threads);
    else
        body(&packing);
}

void l4_experts(const Experts* e) {
    if (e->is_bf16)
        run_experts<bf16>(e);
    else
        run_experts<float>(e);
}

void l4_norm_route(const NormRoute* n) {
    if (n->is_bf16)
        run_norm_route<bf16>(n);
    else
        run_norm_route<float>(n);
}

void l4_attend(const Attention* a) {
    if (a->is_bf16)
        run_attention<bf16>(a);
    else
        run_attention<float>(a);
}
}
