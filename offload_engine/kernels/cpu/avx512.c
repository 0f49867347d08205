/* AVX512 with BF16 and VNNI: pairs of bf16 into float32 (vdpbf16ps), pairs of int16 into int32 (vpdpwssd). */
#include "variant.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma")))
#define TOKENS 6 /* with four rows: 24 sums, four rows of weights and one of activations, of 32 registers */

static int supported(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

TARGET DMOE_INLINE __mmask16 first_floats(int64_t count)
{
    return (__mmask16)(count >= 16 ? 0xFFFF : (1u << count) - 1);
}

TARGET DMOE_INLINE __mmask32 first_words(int64_t count)
{
    return (__mmask32)(count >= 32 ? 0xFFFFFFFFu : (1u << count) - 1);
}

TARGET static void pack(const float *row, int64_t cols, int64_t padded, void *packed)
{
    uint16_t *out = packed;
    for (int64_t k = 0; k < padded; k += 16) {
        int64_t left = cols > k ? cols - k : 0;
        __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first_floats(left), row + k));
        memcpy(out + k, &half, sizeof half);
    }
}

TARGET static float quantise(const float *row, int64_t cols, int64_t padded, int32_t limit, int16_t *packed)
{
    return quantise_inline(row, cols, padded, limit, packed);
}

/* int4 to bf16: a group has sixteen values, so a table of them answers 32 nibbles at a time. */
TARGET static void decode_int4(const struct matrix *matrix, int64_t row, int64_t padded, uint16_t *out)
{
    const unsigned char *values = row_values(matrix, row), *scales = int4_scales(matrix, row);
    const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    int64_t half = matrix->group / 2;
    for (int64_t start = 0; start < matrix->cols; start += matrix->group, values += half, scales += 2) {
        __m256bh sixteen = _mm512_cvtneps_pbh(_mm512_mul_ps(levels, _mm512_set1_ps(load_bf16(scales))));
        /* Twice over: the look-up reads five bits of its index, and the fifth belongs to the other nibble. */
        __m512i table = _mm512_broadcast_i64x4((__m256i)sixteen);
        for (int64_t i = 0; i < half; i += 32) {
            __mmask32 mask = first_words(half - i);
            __m512i both = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, values + i));
            __m512i low = _mm512_permutexvar_epi16(both, table);
            __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), table);
            _mm512_mask_storeu_epi16(out + start + i, mask, low);
            _mm512_mask_storeu_epi16(out + start + half + i, mask, high);
        }
    }
    memset(out + matrix->cols, 0, (size_t)(padded - matrix->cols) * sizeof *out);
}

TARGET static const void *decode(const struct matrix *matrix, int64_t row, int64_t padded, void *scratch)
{
    const unsigned char *values = row_values(matrix, row);
    if (matrix->format == DMOE_INT8) {
        decode_int8_inline(values, matrix->cols, padded, scratch);
    } else if (matrix->format == DMOE_INT4) {
        decode_int4(matrix, row, padded, scratch);
    } else {
        if (padded == matrix->cols)
            return values;
        memcpy(scratch, values, (size_t)matrix->cols * 2);
        memset((uint16_t *)scratch + matrix->cols, 0, (size_t)(padded - matrix->cols) * 2);
    }
    return scratch;
}

/* The four sums over lanes, always in the same order: pairs within a 128-bit lane, then halves. */
TARGET DMOE_INLINE __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d)
{
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xEE);
    __m512 all = _mm512_add_ps(low, high);
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

TARGET DMOE_INLINE __m128i totals_integer(__m512i a, __m512i b, __m512i c, __m512i d)
{
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

TARGET DMOE_INLINE __m512i load(const void *row, int64_t k)
{
    return _mm512_loadu_si512((const uint16_t *)row + k);
}

/* Written out because compilers, given the intrinsics, move the sums through the stack: half the speed. */
#define DOT_BF16(sum, a, b) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))
#define DOT_INT16(sum, a, b) __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))

/* `tokens` is a constant at every call, so that the sums stay in registers. */
TARGET DMOE_INLINE void tile(const struct product *p, int64_t first, const int tokens)
{
    const char *x = p->packed + first * p->stride;
    __m512 sums[TOKENS][DMOE_ROWS];
    for (int t = 0; t < tokens; t++)
        for (int row = 0; row < DMOE_ROWS; row++)
            sums[t][row] = _mm512_setzero_ps();
    for (int64_t k = 0; k < p->padded; k += DMOE_PAD) {
        if (first == 0)
            prefetch_inline(p, k);
        __m512i w[DMOE_ROWS];
        for (int row = 0; row < DMOE_ROWS; row++)
            w[row] = load(p->weights[row], k);
        for (int t = 0; t < tokens; t++) {
            __m512i activations = load(x + t * p->stride, k);
            for (int row = 0; row < DMOE_ROWS; row++)
                DOT_BF16(sums[t][row], activations, w[row]);
        }
    }
    for (int t = 0; t < tokens; t++)
        _mm_storeu_ps(p->out + (first + t) * p->out_stride, totals(sums[t][0], sums[t][1], sums[t][2], sums[t][3]));
}

TARGET DMOE_INLINE void tile_integer(const struct product *p, int64_t first, const int tokens)
{
    const char *x = p->packed + first * p->stride;
    __m512i sums[TOKENS][DMOE_ROWS];
    for (int t = 0; t < tokens; t++)
        for (int row = 0; row < DMOE_ROWS; row++)
            sums[t][row] = _mm512_setzero_si512();
    for (int64_t k = 0; k < p->padded; k += DMOE_PAD) {
        if (first == 0)
            prefetch_inline(p, k);
        __m512i w[DMOE_ROWS];
        for (int row = 0; row < DMOE_ROWS; row++)
            w[row] = load(p->weights[row], k);
        for (int t = 0; t < tokens; t++) {
            __m512i activations = load(x + t * p->stride, k);
            for (int row = 0; row < DMOE_ROWS; row++)
                DOT_INT16(sums[t][row], activations, w[row]);
        }
    }
    for (int t = 0; t < tokens; t++) {
        __m128i four = totals_integer(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
        _mm_storeu_si128((__m128i *)(p->out + (first + t) * p->out_stride), four);
    }
}

/* Tiles of six tokens at most and, where six don't divide them, as even as can be. */
#define EVERY_TILE(kind)                                                                                               \
    for (int64_t t = 0, tiles = (p->tokens + TOKENS - 1) / TOKENS, size; tiles > 0; t += size, tiles--) {               \
        size = (p->tokens - t + tiles - 1) / tiles;                                                                    \
        switch (size) {                                                                                                \
        case 1: kind(p, t, 1); break;                                                                                  \
        case 2: kind(p, t, 2); break;                                                                                  \
        case 3: kind(p, t, 3); break;                                                                                  \
        case 4: kind(p, t, 4); break;                                                                                  \
        case 5: kind(p, t, 5); break;                                                                                  \
        default: kind(p, t, 6);                                                                                        \
        }                                                                                                              \
    }

TARGET static void multiply(const struct product *p)
{
    EVERY_TILE(tile)
}

TARGET static void multiply_integer(const struct product *p)
{
    EVERY_TILE(tile_integer)
}

TARGET static void silu_times(float *gate, const float *up, int64_t count)
{
    silu_times_inline(gate, up, count);
}

const struct variant dmoe_avx512 = {
    "avx512_bf16", supported, sizeof(uint16_t), pack, quantise, decode, multiply, multiply_integer, silu_times,
};
#endif
