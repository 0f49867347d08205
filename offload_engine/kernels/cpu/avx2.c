/* AVX2 with FMA: float32 products eight at a time, of bf16 weights widened on their way to the registers; integers by pairs
 * (vpmaddwd).
 */
#include "prefetch.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))
#define DMOE_VECTOR 32
#define ROUTED_ROWS 6
#define ROUTED_GROUPS 1
#include "vectorised.h"

#define ROWS 4
#define TOKENS 3         /* with four rows: twelve sums, three activations and one row of weights fill the registers */
#define INTEGER_TOKENS 2 /* their products need a register before they are added */

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

/* The nibbles of sixteen bytes, the low ones in one lane, by a table of their low and one of their high bytes. */
TARGET DMOE_INLINE void look_up(__m256i nibbles, __m256i lows, __m256i highs, uint16_t *of_low, uint16_t *of_high)
{
    __m256i low = _mm256_shuffle_epi8(lows, nibbles), high = _mm256_shuffle_epi8(highs, nibbles);
    __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
    _mm256_storeu_si256((__m256i *)of_low, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_storeu_si256((__m256i *)of_high, _mm256_permute2x128_si256(first, second, 0x31));
}

TARGET DMOE_INLINE __m256i rounded_halves(__m256 values)
{
    __m256i bits = _mm256_castps_si256(values), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
}

/* What the sixteen values of an int4 group with this scale stand for, as bf16, in their order. */
TARGET DMOE_INLINE __m256i levels_of(float scale)
{
    __m256 below = _mm256_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1), above = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i first = rounded_halves(_mm256_mul_ps(below, _mm256_set1_ps(scale)));
    __m256i second = rounded_halves(_mm256_mul_ps(above, _mm256_set1_ps(scale)));
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xD8);
}

/* Sixteen bytes, which lie in as many halves, in both lanes. */
TARGET DMOE_INLINE __m256i table_of(__m256i halves)
{
    __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(halves, halves), 0x08);
    return _mm256_broadcastsi128_si256(_mm256_castsi256_si128(bytes));
}

/* Bytes [from, half) of a group: byte i holds column i in its low nibble and column i + half in its high one. */
TARGET DMOE_INLINE void look_up_one_by_one(
    __m256i levels, const unsigned char *values, int64_t from, int64_t half, uint16_t *to)
{
    uint16_t stored[16];
    _mm256_storeu_si256((__m256i *)stored, levels);
    for (int64_t i = from; i < half; i++) {
        to[i] = stored[values[i] & 15];
        to[half + i] = stored[values[i] >> 4];
    }
}

/* int4 to bf16: a group has sixteen values, so two tables of bytes answer 32 nibbles at a time. */
TARGET static void decode_int4(const struct matrix *matrix, int64_t row, int64_t padded, uint16_t *out)
{
    const unsigned char *values = row_values(matrix, row), *scales = int4_scales(matrix, row);
    const __m256i nibble = _mm256_set1_epi8(15), byte = _mm256_set1_epi16(0xFF);
    int64_t half = matrix->group / 2;
    for (int64_t start = 0; start < matrix->cols; start += matrix->group, values += half, scales += 2) {
        __m256i levels = levels_of(load_bf16(scales));
        __m256i lows = table_of(_mm256_and_si256(levels, byte)), highs = table_of(_mm256_srli_epi16(levels, 8));
        int64_t i = 0;
        for (; i + 16 <= half; i += 16) { /* all of a group of 32, which int4 has unless told otherwise */
            __m128i both = _mm_loadu_si128((const __m128i *)(values + i));
            __m256i nibbles = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), nibble);
            look_up(nibbles, lows, highs, out + start + i, out + start + half + i);
        }
        if (i < half)
            look_up_one_by_one(levels, values, i, half, out + start);
    }
    memset(out + matrix->cols, 0, (size_t)(padded - matrix->cols) * sizeof *out);
}

TARGET static const void *decode(const struct matrix *matrix, int64_t row, int64_t padded, void *scratch)
{
    if (matrix->format != DMOE_INT4)
        return stored_row(matrix, row, padded, scratch);
    decode_int4(matrix, row, padded, scratch);
    return scratch;
}

/* Of each of four rows, the sum over all lanes. */
TARGET DMOE_INLINE __m128 totals(const __m256 *sums)
{
    __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

TARGET DMOE_INLINE __m128i integer_totals(const __m256i *sums)
{
    __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

TARGET DMOE_INLINE __m256 widened(const void *row, int64_t k)
{
    __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + k));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* Compilers unroll the short loops over columns, and then have more in flight than there are registers. */
#define COLUMNS _Pragma("GCC unroll 1")

/* `tokens` is a constant at every call, so that the sums stay in registers. */
TARGET DMOE_INLINE void tile(const struct product *p, int64_t first, const int tokens)
{
    struct stream stream = tile_stream(p, first, tokens, DMOE_PAD, 0);
    const float *packed[TOKENS];
    __m256 sums[TOKENS][ROWS];
    for (int t = 0; t < tokens; t++) {
        packed[t] = (const float *)(p->packed + (first + t) * p->group_bytes);
        for (int row = 0; row < ROWS; row++)
            sums[t][row] = _mm256_setzero_ps();
    }
    for (int64_t from = 0; from < p->padded; from += DMOE_PAD) {
        prefetch_step(&stream);
        COLUMNS for (int64_t k = from; k < from + DMOE_PAD; k += 8) {
            __m256 x[TOKENS];
            for (int t = 0; t < tokens; t++)
                x[t] = _mm256_loadu_ps(packed[t] + k);
            for (int row = 0; row < ROWS; row++) {
                __m256 w = widened(p->weights[row], k);
                for (int t = 0; t < tokens; t++)
                    sums[t][row] = _mm256_fmadd_ps(w, x[t], sums[t][row]);
            }
        }
    }
    for (int t = 0; t < tokens; t++)
        _mm_storeu_ps(p->out + (first + t) * p->out_stride, totals(sums[t]));
}

TARGET DMOE_INLINE void tile_integer(const struct product *p, int64_t first, const int tokens)
{
    struct stream stream = tile_stream(p, first, tokens, DMOE_PAD, 0);
    const int16_t *packed[INTEGER_TOKENS];
    __m256i sums[INTEGER_TOKENS][ROWS];
    for (int t = 0; t < tokens; t++) {
        packed[t] = (const int16_t *)(p->packed + (first + t) * p->group_bytes);
        for (int row = 0; row < ROWS; row++)
            sums[t][row] = _mm256_setzero_si256();
    }
    for (int64_t from = 0; from < p->padded; from += DMOE_PAD) {
        prefetch_step(&stream);
        COLUMNS for (int64_t k = from; k < from + DMOE_PAD; k += 16) {
            __m256i x[INTEGER_TOKENS];
            for (int t = 0; t < tokens; t++)
                x[t] = _mm256_loadu_si256((const __m256i *)(packed[t] + k));
            for (int row = 0; row < ROWS; row++) {
                const __m128i *at = (const __m128i *)((const char *)p->weights[row] + k);
                __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(at));
                for (int t = 0; t < tokens; t++)
                    sums[t][row] = _mm256_add_epi32(sums[t][row], _mm256_madd_epi16(w, x[t]));
            }
        }
    }
    int32_t *out = (int32_t *)p->out;
    for (int t = 0; t < tokens; t++)
        _mm_storeu_si128((__m128i *)(out + (first + t) * p->out_stride), integer_totals(sums[t]));
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
    for (; t + 2 <= p->tokens; t += 2)
        tile_integer(p, t, 2);
    if (t < p->tokens)
        tile_integer(p, t, 1);
}

const struct variant dmoe_avx2 = {
    "avx2", supported, sizeof(float), ROWS, DMOE_ROW_BY_ROW, DMOE_ROW_BY_ROW, pack, quantise, decode, multiply,
    multiply_integer, VECTORISED,
};
#endif
