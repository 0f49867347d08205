/* AVX512 with BF16 and VNNI: pairs of bf16 into float32 (vdpbf16ps); fours of bytes into int32 (vpdpbusd).
 *
 * vpdpbusd multiplies unsigned bytes with signed ones. Weights become unsigned by adding 128; an activation q is split
 * into two signed bytes, q = 256 high + low. So w q = 256 (w + 128) high + (w + 128) low - 128 q, exactly, and int8
 * weights are multiplied as they lie in memory.
 */
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
    return (__mmask16)(count >= 16 ? 0xFFFF : count > 0 ? (1u << count) - 1 : 0);
}

TARGET DMOE_INLINE __mmask32 first_words(int64_t count)
{
    return (__mmask32)(count >= 32 ? 0xFFFFFFFFu : (1u << count) - 1);
}

TARGET static void pack(const float *row, int64_t cols, int64_t padded, void *packed)
{
    uint16_t *out = packed;
    for (int64_t k = 0; k < padded; k += 16) {
        __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first_floats(cols - k), row + k));
        memcpy(out + k, &half, sizeof half);
    }
}

/* High bytes, low bytes, and behind them 128 times the sum of the row. */
TARGET static float quantise(const float *row, int64_t cols, int64_t padded, int32_t limit, void *packed)
{
    struct rounding rounding = row_rounding(row, cols, limit);
    char *out = packed;
    __m512i sums = _mm512_setzero_si512();
    for (int64_t k = 0; k < padded; k += 16) {
        __mmask16 mask = rounding.inverse != 0.0f ? first_floats(cols - k) : 0;
        __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, row + k), _mm512_set1_ps(rounding.inverse));
        __m512i q = _mm512_cvtps_epi32(scaled);
        __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
        __m512i low = _mm512_sub_epi32(q, _mm512_slli_epi32(high, 8));
        _mm_storeu_si128((__m128i *)(out + k), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128((__m128i *)(out + padded + k), _mm512_cvtepi32_epi8(low));
        sums = _mm512_add_epi32(sums, q);
    }
    int32_t excess = 128 * _mm512_reduce_add_epi32(sums);
    memcpy(out + 2 * padded, &excess, sizeof excess);
    return rounding.worth;
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

/* bf16 and int8 weights are used where they lie, unless their rows need padding. */
TARGET static const void *decode(const struct matrix *matrix, int64_t row, int64_t padded, void *scratch)
{
    const unsigned char *values = row_values(matrix, row);
    if (matrix->format == DMOE_INT4) {
        decode_int4(matrix, row, padded, scratch);
        return scratch;
    }
    if (padded == matrix->cols)
        return values;
    int64_t element = matrix->format == DMOE_INT8 ? 1 : 2;
    memcpy(scratch, values, (size_t)(matrix->cols * element));
    memset((char *)scratch + matrix->cols * element, 0, (size_t)((padded - matrix->cols) * element));
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

TARGET DMOE_INLINE __m512i load(const void *row, int64_t byte)
{
    return _mm512_loadu_si512((const char *)row + byte);
}

/* Written out because compilers, given the intrinsics, move the sums through the stack: half the speed. */
#define DOT_BF16(sum, a, b) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))
#define DOT_BYTES(sum, unsigned_, signed_) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_), "v"(signed_))

/* `tokens` is a constant at every call, so that the sums stay in registers. */
TARGET DMOE_INLINE void tile(const struct product *p, int64_t first, const int tokens)
{
    const char *x = p->packed + first * p->stride;
    struct stream stream = tile_stream(p, first, tokens);
    __m512 sums[TOKENS][DMOE_ROWS];
    for (int t = 0; t < tokens; t++)
        for (int row = 0; row < DMOE_ROWS; row++)
            sums[t][row] = _mm512_setzero_ps();
    for (int64_t byte = 0; byte < 2 * p->padded; byte += 64) {
        if (byte % (2 * DMOE_PAD) == 0)
            prefetch_step(&stream);
        __m512i w[DMOE_ROWS];
        for (int row = 0; row < DMOE_ROWS; row++)
            w[row] = load(p->weights[row], byte);
        for (int t = 0; t < tokens; t++) {
            __m512i activations = load(x + t * p->stride, byte);
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
    struct stream stream = tile_stream(p, first, tokens);
    const __m512i sign = _mm512_set1_epi8((char)0x80); /* w + 128, as an unsigned byte */
    __m512i high[TOKENS / 2][DMOE_ROWS], low[TOKENS / 2][DMOE_ROWS];
    for (int t = 0; t < tokens; t++)
        for (int row = 0; row < DMOE_ROWS; row++)
            high[t][row] = low[t][row] = _mm512_setzero_si512();
    for (int64_t k = 0; k < p->padded; k += DMOE_PAD) {
        prefetch_step(&stream);
        __m512i w[DMOE_ROWS];
        for (int row = 0; row < DMOE_ROWS; row++)
            w[row] = _mm512_xor_si512(load(p->weights[row], k), sign);
        for (int t = 0; t < tokens; t++) {
            __m512i activations = load(x + t * p->stride, k);
            for (int row = 0; row < DMOE_ROWS; row++)
                DOT_BYTES(high[t][row], w[row], activations);
            activations = load(x + t * p->stride, p->padded + k);
            for (int row = 0; row < DMOE_ROWS; row++)
                DOT_BYTES(low[t][row], w[row], activations);
        }
    }
    for (int t = 0; t < tokens; t++) {
        int32_t excess;
        memcpy(&excess, x + t * p->stride + 2 * p->padded, sizeof excess);
        __m128i highs = totals_integer(high[t][0], high[t][1], high[t][2], high[t][3]);
        __m128i lows = totals_integer(low[t][0], low[t][1], low[t][2], low[t][3]);
        __m128i sums = _mm_sub_epi32(_mm_add_epi32(_mm_slli_epi32(highs, 8), lows), _mm_set1_epi32(excess));
        _mm_storeu_si128((__m128i *)(p->out + (first + t) * p->out_stride), sums);
    }
}

/* Tokens of the next tile: `most` at most, and where that does not divide what is left, as even as can be. */
DMOE_INLINE int64_t next_tile(int64_t left, int64_t most)
{
    int64_t tiles = (left + most - 1) / most;
    return (left + tiles - 1) / tiles;
}

TARGET static void multiply(const struct product *p)
{
    for (int64_t t = 0, size; t < p->tokens; t += size) {
        size = next_tile(p->tokens - t, TOKENS);
        switch (size) {
        case 1: tile(p, t, 1); break;
        case 2: tile(p, t, 2); break;
        case 3: tile(p, t, 3); break;
        case 4: tile(p, t, 4); break;
        case 5: tile(p, t, 5); break;
        default: tile(p, t, 6);
        }
    }
}

TARGET static void multiply_integer(const struct product *p)
{
    for (int64_t t = 0, size; t < p->tokens; t += size) {
        size = next_tile(p->tokens - t, TOKENS / 2);
        switch (size) {
        case 1: tile_integer(p, t, 1); break;
        case 2: tile_integer(p, t, 2); break;
        default: tile_integer(p, t, 3);
        }
    }
}

TARGET static void scale(float *sums, const unsigned char *scales, float worth, int64_t count)
{
    scale_inline(sums, scales, worth, count);
}

TARGET static void silu_times(float *gate, const float *up, int64_t count)
{
    silu_times_inline(gate, up, count);
}

TARGET static void round_bf16(const float *from, int64_t count, uint16_t *to)
{
    round_inline(from, count, to);
}

TARGET static void weighted_sum(const struct choices *choices, int64_t h, uint16_t *to)
{
    weighted_sum_inline(choices, h, to);
}

const struct variant dmoe_avx512 = {
    "avx512_bf16", supported, sizeof(uint16_t), pack, quantise, decode, multiply, multiply_integer, scale, silu_times,
    round_bf16, weighted_sum,
};
#endif
