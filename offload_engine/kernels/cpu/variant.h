/* What an instruction set has to bring, and the arithmetic that all of them share.
 *
 * Two paths: bf16 and int4 weights are multiplied in the variant's own float type (bf16 pairs on AVX512-BF16, float32
 * elsewhere) and summed in float32; int8 weights are multiplied with activations rounded to 16-bit integers, and summed
 * exactly in int32. Every variant therefore agrees bit for bit on int8.
 *
 * Rows are padded with zeros to a multiple of DMOE_PAD columns, so that no inner loop has a remainder.
 */
#ifndef DMOE_VARIANT_H
#define DMOE_VARIANT_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define DMOE_PAD 64
#define DMOE_LARGEST 32639   /* integer activation: 127 * 256 + 127 */
#define DMOE_MOST_ROWS 6     /* of weights that a product takes at once */
#define DMOE_BLOCK 64        /* tokens that are packed together at most; every tile's tokens divide it */
#define DMOE_INLINE static inline __attribute__((always_inline))

enum format { DMOE_BF16 = 0, DMOE_INT8 = 1, DMOE_INT4 = 2 };

struct matrix {
    const unsigned char *values; /* row-major: bf16 [rows, cols], int8 [rows, cols], uint8 [rows, cols / 2] */
    const unsigned char *scales; /* nothing, float32 [rows], bf16 [rows, cols / group] */
    int64_t rows, cols, group;
    int format;
    int64_t apart; /* bytes from a row to the next, if they don't lie one behind the other; 0 if they do */
};

/* Some rows of weights against up to DMOE_BLOCK tokens, packed together (`struct lane`). */
struct product {
    const void *weights[DMOE_MOST_ROWS]; /* the variant's number of decoded rows, `padded` elements each */
    const char *packed;                  /* activations */
    const int32_t *sums;                 /* of each token's integers; integer path only */
    int64_t group_bytes, padded, tokens;
    const char *ahead;   /* what will be read next, to be prefetched meanwhile, */
    int64_t ahead_bytes; /* and how much of it */
    float *out;          /* out[t * out_stride + r]; int32 on the integer path. Tokens are filled up to a whole group */
    int64_t out_stride;
};

/* Where a token's activations go. Tokens lie in groups of `lanes`, and groups side by side in tiles, in the order in which
 * a variant reads them: pieces of one token, `step` bytes apart. With one lane and one group a token's row is in one piece.
 */
struct lane {
    char *at;
    int64_t step;
};

/* How many tokens a variant takes at once. */
struct tiling {
    int64_t lanes, piece; /* tokens of a group; bytes between their pieces */
    int64_t groups;       /* of a tile, at most */
    int64_t vectors;      /* that a group's pieces fill one after the other: 2 for high and low bytes */
};

#define DMOE_ROW_BY_ROW {1, 0, 1, 1} /* a tiling without tiles: each token's row in one piece */

/* Groups side by side: as many as a tile takes, and where that does not divide them, as even as can be. */
DMOE_INLINE int64_t tile_groups(const struct tiling *tiling, int64_t tokens)
{
    int64_t groups = (tokens + tiling->lanes - 1) / tiling->lanes, tiles = (groups + tiling->groups - 1) / tiling->groups;
    return (groups + tiles - 1) / tiles;
}

/* Of token `t` among `tokens`, packed together from `packed` on. */
DMOE_INLINE struct lane token_lane(
    const struct tiling *tiling, char *packed, int64_t group_bytes, int64_t tokens, int64_t t)
{
    int64_t groups = (tokens + tiling->lanes - 1) / tiling->lanes, width = tile_groups(tiling, tokens);
    int64_t group = t / tiling->lanes, first = group / width * width;
    int64_t beside = groups - first < width ? groups - first : width;
    int64_t bytes = tiling->lanes * tiling->piece * tiling->vectors;
    char *at = packed + first * group_bytes + (group - first) * bytes + t % tiling->lanes * tiling->piece;
    return (struct lane){at, beside * bytes};
}

/* A row of activations as integers: what one of them is worth, and their sum. */
struct rounded {
    float worth;
    int32_t sum;
};

/* What one token's experts gave, and what they weigh; an expert below 0 gave nothing. */
struct choices {
    const uint16_t *outputs; /* bf16 [count, h] */
    const int64_t *experts;
    const float *weights;
    int64_t count;
};

/* How heads of queries and keys are normed and turned. */
struct turning {
    const unsigned char *cos, *sin; /* bf16 [tokens, dims] */
    int64_t dim, dims;              /* of a head, and how many of them turn: an even number */
    float eps;
};

/* A router's weights, and tokens in groups (router.h). */
struct routed_product {
    float *packed;        /* [groups, cols, DMOE_LANES] */
    const float *weights; /* [rows, cols] */
    int64_t cols, rows, groups;
};

/* The token that a row of logits makes likeliest, and its share of their softmax. */
struct likeliest {
    int64_t token;
    float probability;
};

struct variant {
    const char *name;
    int (*supported)(void);
    int64_t element; /* bytes per activation on the float path; on the integer path 2 */
    int64_t rows;    /* of weights that a product takes */
    struct tiling tiling, integer_tiling;
    void (*pack)(const float *row, int64_t cols, int64_t padded, struct lane lane);
    struct rounded (*quantise)(const float *row, int64_t cols, int64_t padded, int32_t limit, struct lane lane);
    /* A row of weights as `multiply` takes it, at most 4 bytes per element, zeros behind `cols`: in `scratch`, or where
     * it lies.
     */
    const void *(*decode)(const struct matrix *matrix, int64_t row, int64_t padded, void *scratch);
    void (*multiply)(const struct product *product);
    void (*multiply_integer)(const struct product *product);
    void (*scale)(float *sums, const unsigned char *scales, float worth, int64_t count); /* int32 to float32, in place */
    void (*silu_times)(float *gate, const float *up, int64_t count); /* gate = silu(gate) * up */
    void (*round)(const float *from, int64_t count, uint16_t *to);   /* to bf16, to nearest even */
    /* e^(scale (x - largest)) of a row, in place, with zeros behind up to `padded`; returns the sum. NaN stays NaN. */
    float (*exponentials)(float *row, int64_t count, int64_t padded, float scale);
    void (*weighted_sum)(const struct choices *choices, int64_t h, uint16_t *to);
    /* norms.h */
    void (*norm)(const unsigned char *row, const unsigned char *weight, int64_t cols, float eps, uint16_t *out);
    void (*turn)(uint16_t *head, const struct turning *turning, const unsigned char *weight, int64_t token);
    /* likeliest.h: of `count` logits; the token is not the `barred` one, the softmax is of all */
    struct likeliest (*find_likeliest)(const float *logits, int64_t count, int64_t barred);
    /* router.h: `count` rows from `row` on, to out[r * DMOE_BLOCK + t] */
    void (*route)(const struct routed_product *product, int64_t row, int64_t count, float *out);
};

/* Variant `index`, fastest first; null if there is none, or this CPU can't run it. */
const struct variant *dmoe_variant_at(int index);

/* GOMP_parallel of the OpenMP runtime that the process already has: a second one would fight the first for the cores. */
typedef void (*parallel_fn)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

#define DMOE_EXPORT __attribute__((visibility("default")))

enum { DMOE_OK = 0, DMOE_NO_MEMORY = 1, DMOE_NO_VARIANT = 2 };

extern const struct variant dmoe_generic;
#if defined(__x86_64__)
extern const struct variant dmoe_avx2;
extern const struct variant dmoe_avx512;
#endif

DMOE_INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

DMOE_INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

DMOE_INLINE float load_bf16(const unsigned char *at)
{
    uint16_t half;
    memcpy(&half, at, sizeof half);
    return float_of((uint32_t)half << 16);
}

/* Round to nearest even; NaN stays NaN. */
DMOE_INLINE uint16_t to_bf16(float value)
{
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : rounded);
}

#define DMOE_ROUNDER 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer, to nearest even */

/* exp(x) to about 2 ulp: 2^n * e^r with |r| <= ln(2) / 2, e^r by its Taylor series of degree 7. NaN stays NaN. */
DMOE_INLINE float fast_exp(float x)
{
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + DMOE_ROUNDER;
    float n = shifted - DMOE_ROUNDER;
    float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float e = 1.0f / 5040;
    e = e * r + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    return e * float_of((bits_of(shifted) + 127) << 23);
}

DMOE_INLINE void silu_times_inline(float *gate, const float *up, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        gate[i] = gate[i] / (1.0f + fast_exp(-gate[i])) * up[i];
}

DMOE_INLINE void round_inline(const float *from, int64_t count, uint16_t *to)
{
    for (int64_t i = 0; i < count; i++)
        to[i] = to_bf16(from[i]);
}

/* Floats as integers of the same order, NaN at the ends; its own inverse. */
DMOE_INLINE int32_t ordered(int32_t bits)
{
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

#define DMOE_SUMS 16 /* that are added up apart; divides DMOE_PAD */

DMOE_INLINE float exponentials_inline(float *row, int64_t count, int64_t padded, float scale)
{
    int32_t highest = INT32_MIN;
    for (int64_t i = 0; i < count; i++) {
        int32_t key = ordered((int32_t)bits_of(row[i]));
        highest = key > highest ? key : highest;
    }
    float largest = float_of((uint32_t)ordered(highest)), sums[DMOE_SUMS] = {0};
    for (int64_t i = count; i < padded; i++)
        row[i] = largest - 1e6f / scale; /* adds nothing to a sum that the largest takes part in */
    for (int64_t i = 0; i < padded; i += DMOE_SUMS)
        for (int lane = 0; lane < DMOE_SUMS; lane++) {
            row[i + lane] = fast_exp((row[i + lane] - largest) * scale);
            sums[lane] += row[i + lane];
        }
    memset(row + count, 0, (size_t)(padded - count) * sizeof *row);
    for (int half = DMOE_SUMS / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            sums[lane] += sums[lane + half];
    return sums[0];
}

#define DMOE_COLUMNS 128 /* of a weighted sum, kept in registers or the nearest cache */

/* The weighted sum of one token, to bf16: accumulated in float32, in the order of its choices. */
DMOE_INLINE void weighted_sum_inline(const struct choices *choices, int64_t h, uint16_t *to)
{
    for (int64_t first = 0; first < h; first += DMOE_COLUMNS) {
        int64_t count = h - first < DMOE_COLUMNS ? h - first : DMOE_COLUMNS;
        float sums[DMOE_COLUMNS] = {0};
        for (int64_t j = 0; j < choices->count; j++) {
            if (choices->experts[j] < 0)
                continue;
            const unsigned char *row = (const unsigned char *)(choices->outputs + j * h + first);
            for (int64_t i = 0; i < count; i++)
                sums[i] += choices->weights[j] * load_bf16(row + 2 * i);
        }
        round_inline(sums, count, to + first);
    }
}

/* How a row of activations becomes integers: times `inverse`, rounded; and what one of them is worth. */
struct rounding {
    float inverse, worth;
};

/* To integers of at most `limit`. A row that is not finite is worth NaN; one too small to be told from zero is zero. */
DMOE_INLINE struct rounding row_rounding(const float *row, int64_t cols, int32_t limit)
{
    int32_t largest = 0; /* as bits: these order like the sizes they stand for, NaN above all */
    for (int64_t i = 0; i < cols; i++) {
        int32_t size = (int32_t)(bits_of(row[i]) & 0x7FFFFFFF);
        largest = size > largest ? size : largest;
    }
    float peak = float_of((uint32_t)largest);
    if (largest >= 0x7F800000)
        return (struct rounding){0.0f, float_of(0x7FC00000)};
    if (peak < 1e-30f)
        return (struct rounding){0.0f, 0.0f};
    return (struct rounding){(float)limit / peak, peak / (float)limit};
}

DMOE_INLINE struct rounded quantise_inline(const float *row, int64_t cols, int64_t padded, int32_t limit, void *packed)
{
    struct rounding rounding = row_rounding(row, cols, limit);
    int16_t *out = packed;
    int32_t sum = 0;
    memset(out, 0, (size_t)padded * sizeof *out);
    if (rounding.inverse != 0.0f)
        for (int64_t i = 0; i < cols; i++) {
            int32_t number = (int32_t)(bits_of(row[i] * rounding.inverse + DMOE_ROUNDER) - 0x4B400000u);
            out[i] = (int16_t)number;
            sum += number;
        }
    return (struct rounded){rounding.worth, sum};
}

/* Sums of the integer path (int32, in cells of float32) times their rows' scales and the worth of an activation. */
DMOE_INLINE void scale_inline(float *sums, const unsigned char *scales, float worth, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        float scale;
        memcpy(&scale, scales + i * (int64_t)sizeof scale, sizeof scale);
        sums[i] = (float)(int32_t)bits_of(sums[i]) * (scale * worth);
    }
}

DMOE_INLINE void decode_bf16_inline(const unsigned char *values, int64_t cols, int64_t padded, float *row)
{
    for (int64_t i = 0; i < cols; i++)
        row[i] = load_bf16(values + 2 * i);
    memset(row + cols, 0, (size_t)(padded - cols) * sizeof *row);
}

/* Where row `row` begins. */
DMOE_INLINE const unsigned char *row_values(const struct matrix *matrix, int64_t row)
{
    int64_t bytes = matrix->format == DMOE_BF16 ? 2 * matrix->cols
                    : matrix->format == DMOE_INT8 ? matrix->cols
                                                  : matrix->cols / 2;
    return matrix->values + row * (matrix->apart ? matrix->apart : bytes);
}

DMOE_INLINE const unsigned char *int4_scales(const struct matrix *matrix, int64_t row)
{
    return matrix->scales + row * (matrix->cols / matrix->group) * 2;
}

/* A row of bf16 or int8 where it lies, or if it needs zeros behind it, in `scratch`. */
DMOE_INLINE const void *stored_row(const struct matrix *matrix, int64_t row, int64_t padded, void *scratch)
{
    const unsigned char *values = row_values(matrix, row);
    if (padded == matrix->cols)
        return values;
    int64_t element = matrix->format == DMOE_INT8 ? 1 : 2;
    memcpy(scratch, values, (size_t)(matrix->cols * element));
    memset((char *)scratch + matrix->cols * element, 0, (size_t)((padded - matrix->cols) * element));
    return scratch;
}

DMOE_INLINE void pack_float_inline(const float *row, int64_t cols, int64_t padded, void *packed)
{
    memcpy(packed, row, (size_t)cols * sizeof *row);
    memset((float *)packed + cols, 0, (size_t)(padded - cols) * sizeof *row);
}

#endif
