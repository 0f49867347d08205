/* AVX2 with FMA: float32 products eight at a time; integers by pairs (vpmaddwd). */
#define DMOE_VECTOR 32
#include "likeliest.h"
#include "norms.h"
#include "prefetch.h"
#include "router.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))
#define ROWS 4
#define TOKENS 3 /* with four rows: twelve sums, three activations and one row of weights fill the sixteen registers */

static int supported(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

TARGET static void pack(const float *row, int64_t cols, int64_t padded, struct lane lane)
{
    pack_float_inline(row, cols, padded, lane.at);
}

TARGET static struct rounded quantise(
    const float *row, int64_t cols, int64_t padded, int32_t limit, struct lane lane)
{
    return quantise_inline(row, cols, padded, limit, lane.at);
}

TARGET static const void *decode(const struct matrix *matrix, int64_t row, int64_t padded, void *scratch)
{
    return decode_inline(matrix, row, padded, scratch);
}

TARGET DMOE_INLINE float total(__m256 sums)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

TARGET DMOE_INLINE int32_t total_integer(__m256i sums)
{
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}

/* `tokens` is a constant at every call, so that the sums stay in registers. */
TARGET DMOE_INLINE void tile(const struct product *p, int64_t first, const int tokens)
{
    struct stream stream = tile_stream(p, first, tokens, DMOE_PAD, 0);
    __m256 sums[ROWS][TOKENS];
    for (int row = 0; row < ROWS; row++)
        for (int t = 0; t < tokens; t++)
            sums[row][t] = _mm256_setzero_ps();
    for (int64_t k = 0; k < p->padded; k += 8) {
        if (k % DMOE_PAD == 0)
            prefetch_step(&stream);
        __m256 x[TOKENS];
        for (int t = 0; t < tokens; t++)
            x[t] = _mm256_loadu_ps((const float *)(p->packed + (first + t) * p->group_bytes) + k);
        for (int row = 0; row < ROWS; row++) {
            __m256 w = _mm256_loadu_ps((const float *)p->weights[row] + k);
            for (int t = 0; t < tokens; t++)
                sums[row][t] = _mm256_fmadd_ps(w, x[t], sums[row][t]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int row = 0; row < ROWS; row++)
            p->out[(first + t) * p->out_stride + row] = total(sums[row][t]);
}

TARGET DMOE_INLINE void tile_integer(const struct product *p, int64_t first, const int tokens)
{
    struct stream stream = tile_stream(p, first, tokens, DMOE_PAD, 0);
    __m256i sums[ROWS][TOKENS];
    for (int row = 0; row < ROWS; row++)
        for (int t = 0; t < tokens; t++)
            sums[row][t] = _mm256_setzero_si256();
    for (int64_t k = 0; k < p->padded; k += 16) {
        if (k % DMOE_PAD == 0)
            prefetch_step(&stream);
        for (int row = 0; row < ROWS; row++) {
            __m256i w = _mm256_loadu_si256((const __m256i *)((const int16_t *)p->weights[row] + k));
            for (int t = 0; t < tokens; t++) {
                const int16_t *x = (const int16_t *)(p->packed + (first + t) * p->group_bytes) + k;
                __m256i pairs = _mm256_madd_epi16(w, _mm256_loadu_si256((const __m256i *)x));
                sums[row][t] = _mm256_add_epi32(sums[row][t], pairs);
            }
        }
    }
    int32_t *out = (int32_t *)p->out;
    for (int t = 0; t < tokens; t++)
        for (int row = 0; row < ROWS; row++)
            out[(first + t) * p->out_stride + row] = total_integer(sums[row][t]);
}

TARGET static void multiply(const struct product *p)
{
    int64_t t = 0;
    for (; t + 3 <= p->tokens; t += 3)
        tile(p, t, 3);
    if (p->tokens - t == 2)
        tile(p, t, 2);
    else if (p->tokens - t == 1)
        tile(p, t, 1);
}

TARGET static void multiply_integer(const struct product *p)
{
    int64_t t = 0;
    for (; t + 3 <= p->tokens; t += 3)
        tile_integer(p, t, 3);
    if (p->tokens - t == 2)
        tile_integer(p, t, 2);
    else if (p->tokens - t == 1)
        tile_integer(p, t, 1);
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

TARGET static float exponentials(float *row, int64_t count, int64_t padded, float scale)
{
    return exponentials_inline(row, count, padded, scale);
}

TARGET static void weighted_sum(const struct choices *choices, int64_t h, uint16_t *to)
{
    weighted_sum_inline(choices, h, to);
}

TARGET static void norm(
    const unsigned char *row, const unsigned char *weight, int64_t cols, float eps, uint16_t *out)
{
    norm_inline(row, weight, cols, eps, out);
}

TARGET static void turn(uint16_t *head, const struct turning *turning, const unsigned char *weight, int64_t token)
{
    turn_inline(head, turning, weight, token);
}

TARGET static struct likeliest find_likeliest(const float *logits, int64_t count, int64_t barred)
{
    return find_likeliest_inline(logits, count, barred);
}

TARGET static void route(const struct routed_product *product, int64_t row, int64_t count, float *out)
{
    route_inline(product, row, count, 6, 1, out);
}

const struct variant dmoe_avx2 = {
    "avx2", supported, sizeof(float), ROWS, DMOE_ROW_BY_ROW, DMOE_ROW_BY_ROW, pack, quantise, decode, multiply,
    multiply_integer, scale, silu_times, round_bf16, exponentials, weighted_sum, norm, turn, find_likeliest, route,
};
#endif
