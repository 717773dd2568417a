// The threads of torch's own OpenMP runtime, so that no second pool of threads waits beside it. The library is not linked with one: the
// functions are those of the runtime that torch has loaded, and absent where there is none.
#pragma once

extern "C" {
void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
void GOMP_barrier(void) __attribute__((weak));
int omp_get_thread_num(void) __attribute__((weak));
int omp_get_num_threads(void) __attribute__((weak));
}

namespace {

// Runs body(context) on that many threads, at once.
inline void on_threads(void (*body)(void*), void* context, int num_threads) {
    GOMP_parallel(body, context, (unsigned)num_threads, 0);
}

}  // namespace
