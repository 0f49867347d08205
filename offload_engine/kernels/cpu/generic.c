/* Plain C for any CPU. The compiler's vector extension gives SSE2 on x86-64 and NEON on Arm. */
#define DMOE_VECTOR 16
#include "likeliest.h"
#include "norms.h"
#include "router.h"

#define ROWS 4

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

static const void *decode(const struct matrix *matrix, int64_t row, int64_t padded, void *scratch)
{
    return decode_inline(matrix, row, padded, scratch);
}

DMOE_INLINE lanes load(const float *at)
{
    lanes value;
    memcpy(&value, at, sizeof value);
    return value;
}

static float dot(const float *a, const float *b, int64_t padded)
{
    lanes sums[4] = {{0}, {0}, {0}, {0}};
    for (int64_t k = 0; k < padded; k += 16)
        for (int lane = 0; lane < 4; lane++)
            sums[lane] += load(a + k + 4 * lane) * load(b + k + 4 * lane);
    lanes sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

static int32_t dot_integer(const int16_t *a, const int16_t *b, int64_t padded)
{
    int32_t sum = 0;
    for (int64_t k = 0; k < padded; k++)
        sum += (int32_t)a[k] * b[k];
    return sum;
}

static void multiply(const struct product *p)
{
    for (int64_t t = 0; t < p->tokens; t++)
        for (int row = 0; row < ROWS; row++)
            p->out[t * p->out_stride + row] =
                dot((const float *)(p->packed + t * p->group_bytes), p->weights[row], p->padded);
}

static void multiply_integer(const struct product *p)
{
    int32_t *out = (int32_t *)p->out;
    for (int64_t t = 0; t < p->tokens; t++)
        for (int row = 0; row < ROWS; row++)
            out[t * p->out_stride + row] =
                dot_integer((const int16_t *)(p->packed + t * p->group_bytes), p->weights[row], p->padded);
}

static void scale(float *sums, const unsigned char *scales, float worth, int64_t count)
{
    scale_inline(sums, scales, worth, count);
}

static void silu_times(float *gate, const float *up, int64_t count)
{
    silu_times_inline(gate, up, count);
}

static void round_bf16(const float *from, int64_t count, uint16_t *to)
{
    round_inline(from, count, to);
}

static float exponentials(float *row, int64_t count, int64_t padded, float scale)
{
    return exponentials_inline(row, count, padded, scale);
}

static void weighted_sum(const struct choices *choices, int64_t h, uint16_t *to)
{
    weighted_sum_inline(choices, h, to);
}

static void norm(
    const unsigned char *row, const unsigned char *weight, int64_t cols, float eps, uint16_t *out)
{
    norm_inline(row, weight, cols, eps, out);
}

static void turn(uint16_t *head, const struct turning *turning, const unsigned char *weight, int64_t token)
{
    turn_inline(head, turning, weight, token);
}

static struct likeliest find_likeliest(const float *logits, int64_t count, int64_t barred)
{
    return find_likeliest_inline(logits, count, barred);
}

static void route(const struct routed_product *product, int64_t row, int64_t count, float *out)
{
    route_inline(product, row, count, 2, 1, out);
}

const struct variant dmoe_generic = {
    "generic", supported, sizeof(float), ROWS, DMOE_ROW_BY_ROW, DMOE_ROW_BY_ROW, pack, quantise, decode, multiply,
    multiply_integer, scale, silu_times, round_bf16, exponentials, weighted_sum, norm, turn, find_likeliest, route,
};
