// Vectors of float32 for the instruction set this file is compiled for, and products of a few rows with a packed panel.
// Everything is in an anonymous namespace: each .cpp that includes it has its own copy, with its own instructions.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;  // the upper half of a float32

namespace {

#if defined(__AVX512F__)

constexpr int LANES = 16, PANEL_VECTORS = 4;
typedef __m512 Vec;
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline float largest(Vec v) { return _mm512_reduce_max_ps(v); }
inline __m128 sums(Vec a, Vec b, Vec c, Vec d) {  // of each one
    const Vec ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)), cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const Vec all4 = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all4), _mm512_extractf32x8_ps(all4, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
inline Vec nearest(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec n) {  // 2ⁿ for whole n in [-126, 127]
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline Vec load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline void store(bf16* p, Vec v) {  // to the nearest, ties to even; NaN stays one
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(rounded));
}
#if defined(__AVX512BF16__)
typedef __m512bh Pairs;
inline Pairs load_pairs(const bf16* p) { return (Pairs)_mm512_loadu_si512(p); }
inline Pairs all_pairs(const bf16* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return (Pairs)_mm512_set1_epi32(pair);
}
inline Vec fma_pairs(Pairs a, Pairs b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
#else
struct Pairs { Vec even, odd; };
inline Pairs load_pairs(const bf16* p) {
    __m512i bits = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000u)))};
}
#endif

#else  // AVX2 and FMA

constexpr int LANES = 8, PANEL_VECTORS = 2;
typedef __m256 Vec;
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec all(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vec v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
inline float largest(Vec v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}
inline __m128 sums(Vec a, Vec b, Vec c, Vec d) {  // of each one
    const Vec ab = add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)), cd = add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const Vec all4 = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd))),
                                   _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd))));
    return _mm_add_ps(_mm256_castps256_ps128(all4), _mm256_extractf128_ps(all4, 1));
}
inline Vec nearest(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Vec load(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline void store(bf16* p, Vec v) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x88);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
struct Pairs { Vec even, odd; };
inline Pairs load_pairs(const bf16* p) {
    __m256i bits = _mm256_loadu_si256((const __m256i*)p);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32((int)0xffff0000u)))};
}

#endif

inline float wide(float x) { return x; }
inline float wide(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

#if !defined(__AVX512BF16__)
inline Pairs all_pairs(const bf16* p) { return {all(wide(p[0])), all(wide(p[1]))}; }
inline Vec fma_pairs(Pairs a, Pairs b, Vec c) { return fma(a.odd, b.odd, fma(a.even, b.even, c)); }
#endif

// eˣ within 2 ulp; 0 below -87.3, and no more than e⁸⁸.
inline Vec exponential(Vec x) {
    x = smaller(all(88.0f), larger(all(-87.33f), x));  // NaN stays NaN
    Vec n = nearest(mul(x, all(1.44269504f)));
    Vec r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    Vec p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = add(fma(mul(p, r), r, r), all(1.0f));
    return mul(p, power_of_two(n));
}

constexpr int PANEL = LANES * PANEL_VECTORS;  // columns of a panel: what one product of a few rows makes at once
constexpr int ROWS = 6;                        // of such a product: as many as registers hold

// acc[m][v] += rows[m][k] · panel[k][v·LANES …] for all k in their order, so a row's result does not depend on the rows beside it.
// panel: float32 [K][width], bfloat16 [K/2][width][2]; width = NV · LANES.  next: `lines` cache lines from here are fetched meanwhile.
template <int M, int NV>
inline void product(const float* const* rows, const float* panel, int64_t num_in, Vec (&acc)[M][NV], const char* next, int64_t lines) {
    const int per_k = (int)((lines + num_in - 1) / num_in);
    for (int64_t k = 0; k < num_in; k++) {
        for (int i = 0; i < per_k; i++) _mm_prefetch(next + 64 * i, _MM_HINT_T1);
        next += 64 * per_k;
        Vec b[NV];
        for (int v = 0; v < NV; v++) b[v] = load(panel + (k * NV + v) * LANES);
        for (int m = 0; m < M; m++) {
            Vec a = all(rows[m][k]);
            for (int v = 0; v < NV; v++) acc[m][v] = fma(a, b[v], acc[m][v]);
        }
    }
}

template <int M, int NV>
inline void product(const bf16* const* rows, const bf16* panel, int64_t num_in, Vec (&acc)[M][NV], const char* next, int64_t lines) {
    const int64_t pairs = num_in / 2;
    const int per_k = (int)((lines + pairs - 1) / pairs);
    for (int64_t k = 0; k < pairs; k++) {
        for (int i = 0; i < per_k; i++) _mm_prefetch(next + 64 * i, _MM_HINT_T1);
        next += 64 * per_k;
        Pairs b[NV];
        for (int v = 0; v < NV; v++) b[v] = load_pairs(panel + (k * NV + v) * LANES * 2);
        for (int m = 0; m < M; m++) {
            Pairs a = all_pairs(rows[m] + 2 * k);
            for (int v = 0; v < NV; v++) acc[m][v] = fma_pairs(a, b[v], acc[m][v]);
        }
    }
}

// out[m][j] = rows[m] · keys[j] for four keys, rows of `out` `stride` apart; the terms of each are added in one order whatever M.
template <int M, class T>
inline void dots(const float* rows, const T* const* keys, int64_t dim, float* out, int64_t stride) {
    Vec acc[M][4];
    for (int m = 0; m < M; m++)
        for (int j = 0; j < 4; j++) acc[m][j] = zero();
    for (int64_t d = 0; d < dim; d += LANES) {
        Vec k[4];
        for (int j = 0; j < 4; j++) k[j] = load(keys[j] + d);
        for (int m = 0; m < M; m++) {
            const Vec q = load(rows + m * dim + d);
            for (int j = 0; j < 4; j++) acc[m][j] = fma(q, k[j], acc[m][j]);
        }
    }
    for (int m = 0; m < M; m++) _mm_storeu_ps(out + m * stride, sums(acc[m][0], acc[m][1], acc[m][2], acc[m][3]));
}

// CALL(M) for m rows, M at most ROWS, so that how many there are is known when it is compiled.
#define L4_BY_ROWS(m, CALL) \
    switch (m) {            \
        case 1: CALL(1);    \
            break;          \
        case 2: CALL(2);    \
            break;          \
        case 3: CALL(3);    \
            break;          \
        case 4: CALL(4);    \
            break;          \
        case 5: CALL(5);    \
            break;          \
        default: CALL(6);   \
    }

}  // namespace
