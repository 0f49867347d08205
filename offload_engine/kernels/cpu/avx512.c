/* AVX512 with BF16 and VNNI: pairs of bf16 into float32 (vdpbf16ps); fours of bytes into int32 (vpdpbusd).
 *
 * vpdpbusd multiplies unsigned bytes with signed ones. Weights become unsigned by adding 128; an activation q is split
 * into two signed bytes, q = 256 high + low. So w q = 256 (w + 128) high + (w + 128) low - 128 q, exactly, and int8
 * weights are multiplied as they lie in memory.
 */
#include "prefetch.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#define WIDE /* it knows no such word */
#else
#define WIDE ",prefer-vector-width=512"
#endif
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma" WIDE)))
#define DMOE_VECTOR 64
#define ROUTED_ROWS 8
#define ROUTED_GROUPS 2
#include "vectorised.h"

/* A register holds a group of four tokens, each in a lane of 128 bits, with which four neighbouring products of a row are
 * summed apart. With six rows: 24 sums, four groups of activations and one row of weights, of 32 registers.
 */
#define LANES 4
#define PIECE 16 /* bytes of a lane */
#define ROWS 6
#define GROUPS 4
#define ASKING 64 /* bytes of a row after which the next are asked for: of longer bursts the processor drops more */
#define UNROLL _Pragma("GCC unroll 6")

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

TARGET static void pack(const float *row, int64_t cols, int64_t padded, struct lane lane)
{
    for (int64_t k = 0; k < padded; k += 16, lane.at += 2 * lane.step) {
        __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first_floats(cols - k), row + k));
        _mm_storeu_si128((__m128i *)lane.at, _mm256_castsi256_si128(half));
        _mm_storeu_si128((__m128i *)(lane.at + lane.step), _mm256_extracti128_si256(half, 1));
    }
}

/* High bytes, and a register further low bytes. */
TARGET static struct rounded quantise(
    const float *row, int64_t cols, int64_t padded, int32_t limit, struct lane lane)
{
    struct rounding rounding = row_rounding(row, cols, limit);
    __m512i sums = _mm512_setzero_si512();
    for (int64_t k = 0; k < padded; k += 16, lane.at += lane.step) {
        __mmask16 mask = rounding.inverse != 0.0f ? first_floats(cols - k) : 0;
        __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, row + k), _mm512_set1_ps(rounding.inverse));
        __m512i q = _mm512_cvtps_epi32(scaled);
        __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
        __m512i low = _mm512_sub_epi32(q, _mm512_slli_epi32(high, 8));
        _mm_storeu_si128((__m128i *)lane.at, _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128((__m128i *)(lane.at + LANES * PIECE), _mm512_cvtepi32_epi8(low));
        sums = _mm512_add_epi32(sums, q);
    }
    return (struct rounded){rounding.worth, _mm512_reduce_add_epi32(sums)};
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
    if (matrix->format != DMOE_INT4)
        return stored_row(matrix, row, padded, scratch);
    decode_int4(matrix, row, padded, scratch);
    return scratch;
}

TARGET DMOE_INLINE __m512 pairs(__m512 a, __m512 b)
{
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

TARGET DMOE_INLINE __m512i pairs_integer(__m512i a, __m512i b)
{
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

/* A token's sums with six rows: four in its lane of the one register, two in the other's. */
#define STORE_LANE(out, four, two, lane)                                        \
    do {                                                                        \
        _mm_storeu_ps(out, _mm512_extractf32x4_ps(four, lane));                 \
        _mm_storel_pi((__m64 *)((out) + 4), _mm512_extractf32x4_ps(two, lane)); \
    } while (0)

/* The sums of a group's tokens with six rows: in each lane the four of one row, always added in the same order. */
TARGET DMOE_INLINE void store_totals(const __m512 *sums, float *out, int64_t stride)
{
    __m512 ab = pairs(sums[0], sums[1]), cd = pairs(sums[2], sums[3]), ef = pairs(sums[4], sums[5]);
    __m512 four = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m512 two = _mm512_add_ps(ef, _mm512_shuffle_ps(ef, ef, 0xEE));
    STORE_LANE(out, four, two, 0);
    STORE_LANE(out + stride, four, two, 1);
    STORE_LANE(out + 2 * stride, four, two, 2);
    STORE_LANE(out + 3 * stride, four, two, 3);
}

TARGET DMOE_INLINE __m512i load(const char *at)
{
    return _mm512_loadu_si512(at);
}

/* The same piece of a row of weights in every lane. */
TARGET DMOE_INLINE __m512i load_piece(const void *row, int64_t byte)
{
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)((const char *)row + byte)));
}

/* Written out because compilers, given the intrinsics, move the sums through the stack: half the speed. */
#define DOT_BF16(sum, a, b) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))
#define DOT_BYTES(sum, unsigned_, signed_) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_), "v"(signed_))

/* Whether weights are asked for past the outer caches, of which a layer's experts are a multiple. Measured on AMD's cores:
 * what the rest of the program had there is then still there. Where such lines go to the first level alone, they might be
 * gone before they are used.
 */
DMOE_INLINE int weights_pass(void)
{
    return __builtin_cpu_is("amd");
}

/* A tile of `groups`, a constant at every call, so that the sums stay in registers; `passing`, likewise, of its weights. */
TARGET DMOE_INLINE void tile(const struct product *p, int64_t first, const int groups, const int passing)
{
    const char *x = p->packed + first / LANES * p->group_bytes;
    struct stream stream = tile_stream(p, first, LANES * groups, ASKING / 2, passing);
    __m512 sums[GROUPS][ROWS];
    UNROLL for (int g = 0; g < groups; g++)
        UNROLL for (int row = 0; row < ROWS; row++)
            sums[g][row] = _mm512_setzero_ps();
    for (int64_t byte = 0; byte < 2 * p->padded; byte += PIECE, x += groups * LANES * PIECE) {
        if (byte % ASKING == 0)
            prefetch_step(&stream);
        __m512i activations[GROUPS];
        UNROLL for (int g = 0; g < groups; g++)
            activations[g] = load(x + g * LANES * PIECE);
        UNROLL for (int row = 0; row < ROWS; row++) {
            __m512i weights = load_piece(p->weights[row], byte);
            UNROLL for (int g = 0; g < groups; g++)
                DOT_BF16(sums[g][row], activations[g], weights);
        }
    }
    UNROLL for (int g = 0; g < groups; g++)
        store_totals(sums[g], p->out + (first + LANES * g) * p->out_stride, p->out_stride);
}

#define INTEGER_GROUPS 2 /* high and low sums take twice the registers */

TARGET DMOE_INLINE void store_integer_totals(
    const __m512i *high, const __m512i *low, const int32_t *excess, float *out, int64_t stride)
{
    __m512i sums[ROWS];
    UNROLL for (int row = 0; row < ROWS; row++)
        sums[row] = _mm512_add_epi32(_mm512_slli_epi32(high[row], 8), low[row]);
    __m512i ab = pairs_integer(sums[0], sums[1]), cd = pairs_integer(sums[2], sums[3]);
    __m512i ef = pairs_integer(sums[4], sums[5]);
    uint32_t fours[4 * LANES], twos[4 * LANES];
    _mm512_storeu_si512(fours, _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd)));
    _mm512_storeu_si512(twos, _mm512_add_epi32(ef, _mm512_unpackhi_epi64(ef, ef)));
    UNROLL for (int t = 0; t < LANES; t++) {
        uint32_t totals[ROWS];
        UNROLL for (int row = 0; row < ROWS; row++)
            totals[row] = (row < 4 ? fours[4 * t + row] : twos[4 * t + row - 4]) - 128 * (uint32_t)excess[t];
        memcpy(out + t * stride, totals, sizeof totals);
    }
}

TARGET DMOE_INLINE void tile_integer(const struct product *p, int64_t first, const int groups, const int passing)
{
    const char *x = p->packed + first / LANES * p->group_bytes;
    struct stream stream = tile_stream(p, first, LANES * groups, ASKING, passing);
    const __m512i sign = _mm512_set1_epi8((char)0x80); /* w + 128, as an unsigned byte */
    __m512i high[INTEGER_GROUPS][ROWS], low[INTEGER_GROUPS][ROWS];
    UNROLL for (int g = 0; g < groups; g++)
        UNROLL for (int row = 0; row < ROWS; row++)
            high[g][row] = low[g][row] = _mm512_setzero_si512();
    for (int64_t byte = 0; byte < p->padded; byte += PIECE, x += groups * 2 * LANES * PIECE) {
        if (byte % ASKING == 0)
            prefetch_step(&stream);
        __m512i activations[2 * INTEGER_GROUPS];
        UNROLL for (int g = 0; g < 2 * groups; g++)
            activations[g] = load(x + g * LANES * PIECE);
        UNROLL for (int row = 0; row < ROWS; row++) {
            __m512i weights = _mm512_xor_si512(load_piece(p->weights[row], byte), sign);
            UNROLL for (int g = 0; g < groups; g++) {
                DOT_BYTES(high[g][row], weights, activations[2 * g]);
                DOT_BYTES(low[g][row], weights, activations[2 * g + 1]);
            }
        }
    }
    UNROLL for (int g = 0; g < groups; g++) {
        int64_t t = first + LANES * g;
        store_integer_totals(high[g], low[g], p->sums + t, p->out + t * p->out_stride, p->out_stride);
    }
}

/* Macros, since clang takes no other object's value as a constant. */
#define TILING {LANES, PIECE, GROUPS, 1}
#define INTEGER_TILING {LANES, PIECE, INTEGER_GROUPS, 2}

/* Groups of the tile that begins at token `t`, of tiles of `width`. */
DMOE_INLINE int64_t groups_at(const struct product *p, int64_t t, int64_t width)
{
    int64_t left = (p->tokens - t + LANES - 1) / LANES;
    return left < width ? left : width;
}

TARGET DMOE_INLINE void multiply_tiles(const struct product *p, const int passing)
{
    int64_t width = tile_groups(&(struct tiling)TILING, p->tokens);
    for (int64_t t = 0; t < p->tokens; t += LANES * width)
        switch (groups_at(p, t, width)) {
        case 1: tile(p, t, 1, passing); break;
        case 2: tile(p, t, 2, passing); break;
        case 3: tile(p, t, 3, passing); break;
        default: tile(p, t, 4, passing);
        }
}

TARGET static void multiply(const struct product *p)
{
    if (weights_pass())
        multiply_tiles(p, 1);
    else
        multiply_tiles(p, 0);
}

TARGET DMOE_INLINE void multiply_integer_tiles(const struct product *p, const int passing)
{
    int64_t width = tile_groups(&(struct tiling)INTEGER_TILING, p->tokens);
    for (int64_t t = 0; t < p->tokens; t += LANES * width)
        if (groups_at(p, t, width) == 1)
            tile_integer(p, t, 1, passing);
        else
            tile_integer(p, t, 2, passing);
}

TARGET static void multiply_integer(const struct product *p)
{
    if (weights_pass())
        multiply_integer_tiles(p, 1);
    else
        multiply_integer_tiles(p, 0);
}

const struct variant dmoe_avx512 = {
    "avx512_bf16", supported, sizeof(uint16_t), ROWS, TILING, INTEGER_TILING, pack, quantise, decode, multiply,
    multiply_integer, VECTORISED,
};
#endif
