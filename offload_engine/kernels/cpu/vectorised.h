/* The arithmetic that all variants share, compiled for the instruction set of the file that includes this: `TARGET` names
 * it, `ROUTED_ROWS` and `ROUTED_GROUPS` say how much of a router's product its registers hold (router.h).
 */
#include "likeliest.h"
#include "norms.h"
#include "router.h"

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
    route_inline(product, row, count, ROUTED_ROWS, ROUTED_GROUPS, out);
}

/* The same, in the order of `struct variant`. */
#define VECTORISED scale, silu_times, round_bf16, exponentials, weighted_sum, norm, turn, find_likeliest, route
