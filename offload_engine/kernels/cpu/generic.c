/* Plain C for any CPU. The compiler's vector extension gives SSE2 on x86-64 and NEON on Arm. */
#define TARGET
#define DMOE_VECTOR 16
#define ROUTED_ROWS 2
#define ROUTED_GROUPS 1
#include "vectorised.h"

#define ROWS 4
#define TOKENS 3 /* with four rows: twelve sums, three activations and one row of weights, of sixteen registers */

typedef float lanes __attribute__((vector_size(16)));

static int supported(void)
{
    return 1;
}

static void pack(const float *row, int64_t cols, int64_t padded, struct lane lane)
{
    pack_float_inline(row, cols, padded, lane.at);
}

static struct rounded quantise(
    const float *row, int64_t cols, int64_t padded, int32_t limit, struct lane lane)
{
    return quantise_inline(row, cols, padded, limit, lane.at);
}

DMOE_INLINE void decode_int8(const unsigned char *values, int64_t cols, int64_t padded, int16_t *row)
{
    const int8_t *from = (const int8_t *)values;
    for (int64_t i = 0; i < cols; i++)
        row[i] = from[i];
    memset(row + cols, 0, (size_t)(padded - cols) * sizeof *row);
}

/* int4 to float32: byte i of a group holds column i in its low nibble and column i + group / 2 in its high one. */
DMOE_INLINE void decode_int4(
    const unsigned char *values, const unsigned char *scales, int64_t cols, int64_t padded, int64_t group, float *row)
{
    int64_t half = group / 2;
    for (int64_t start = 0; start < cols; start += group, values += half, scales += 2) {
        float scale = load_bf16(scales);
        for (int64_t i = 0; i < half; i++) {
            row[start + i] = (float)((values[i] & 15) - 8) * scale;
            row[start + half + i] = (float)((values[i] >> 4) - 8) * scale;
        }
    }
    memset(row + cols, 0, (size_t)(padded - cols) * sizeof *row);
}

/* In float32, or int16 on the integer path. */
static const void *decode(const struct matrix *matrix, int64_t row, int64_t padded, void *scratch)
{
    const unsigned char *values = row_values(matrix, row);
    if (matrix->format == DMOE_INT8)
        decode_int8(values, matrix->cols, padded, scratch);
    else if (matrix->format == DMOE_INT4)
        decode_int4(values, int4_scales(matrix, row), matrix->cols, padded, matrix->group, scratch);
    else
        decode_bf16_inline(values, matrix->cols, padded, scratch);
    return scratch;
}

DMOE_INLINE lanes load(const float *at)
{
    lanes value;
    memcpy(&value, at, sizeof value);
    return value;
}

#define COLUMNS _Pragma("GCC unroll 1") /* lest more be in flight than there are registers */

/* `tokens` is a constant at every call, so that the sums stay in registers. */
DMOE_INLINE void tile(const struct product *p, int64_t first, const int tokens)
{
    const float *packed[TOKENS];
    lanes sums[TOKENS][ROWS];
    for (int t = 0; t < tokens; t++) {
        packed[t] = (const float *)(p->packed + (first + t) * p->group_bytes);
        for (int row = 0; row < ROWS; row++)
            sums[t][row] = (lanes){0};
    }
    COLUMNS for (int64_t k = 0; k < p->padded; k += 4) {
        lanes x[TOKENS];
        for (int t = 0; t < tokens; t++)
            x[t] = load(packed[t] + k);
        for (int row = 0; row < ROWS; row++) {
            lanes w = load((const float *)p->weights[row] + k);
            for (int t = 0; t < tokens; t++)
                sums[t][row] += w * x[t];
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int row = 0; row < ROWS; row++) {
            lanes sum = sums[t][row];
            p->out[(first + t) * p->out_stride + row] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
}

/* One token with all rows: compilers turn this into products of pairs where there are such. */
static void dot_integers(const int16_t *x, const void *const *weights, int64_t padded, int32_t *out)
{
    const int16_t *w0 = weights[0], *w1 = weights[1], *w2 = weights[2], *w3 = weights[3];
    int32_t sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
    for (int64_t k = 0; k < padded; k++) {
        sum0 += (int32_t)w0[k] * x[k];
        sum1 += (int32_t)w1[k] * x[k];
        sum2 += (int32_t)w2[k] * x[k];
        sum3 += (int32_t)w3[k] * x[k];
    }
    out[0] = sum0;
    out[1] = sum1;
    out[2] = sum2;
    out[3] = sum3;
}

static void multiply(const struct product *p)
{
    int64_t t = 0;
    for (; t + 3 <= p->tokens; t += 3)
        tile(p, t, 3);
    if (p->tokens - t == 2)
        tile(p, t, 2);
    else if (p->tokens - t == 1)
        tile(p, t, 1);
}

static void multiply_integer(const struct product *p)
{
    int32_t *out = (int32_t *)p->out;
    for (int64_t t = 0; t < p->tokens; t++)
        dot_integers((const int16_t *)(p->packed + t * p->group_bytes), p->weights, p->padded, out + t * p->out_stride);
}

const struct variant dmoe_generic = {
    "generic", supported, sizeof(float), ROWS, DMOE_ROW_BY_ROW, DMOE_ROW_BY_ROW, pack, quantise, decode, multiply,
    multiply_integer, VECTORISED,
};
