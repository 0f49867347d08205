/* Products of a router (router.c), with the compiler's vectors: what an instruction set chooses is how many sums it keeps
 * at once, which no sum depends on.
 */
#ifndef DMOE_ROUTER_H
#define DMOE_ROUTER_H

#include "variant.h"

#define DMOE_UNROLL _Pragma("GCC unroll 16")

#define DMOE_LANES 16 /* tokens of a group */
#define DMOE_RUN 256  /* columns that are summed before they are added to the rest */

#ifdef DMOE_VECTOR /* bytes of the instruction set's vectors: compilers keep wider ones in memory */
#define DMOE_PARTS ((int64_t)sizeof(float) * DMOE_LANES / DMOE_VECTOR)
#define DMOE_MOST_SUMS 16

typedef float part_of_tokens __attribute__((vector_size(DMOE_VECTOR)));

/* Rows [row, row + rows) and groups [group, group + groups); both counts are constants at every call, so that the sums
 * stay in registers. Rows from `limit` on are not there: the last one is computed again, and not used.
 */
DMOE_INLINE void route_tile(
    const struct routed_product *p, int64_t row, int64_t limit, const int rows, int64_t group, const int groups,
    float *out)
{
    const float *weights[DMOE_MOST_SUMS];
    const part_of_tokens *x = (const part_of_tokens *)p->packed + group * p->cols * DMOE_PARTS;
    part_of_tokens totals[DMOE_MOST_SUMS];
    const int parts = groups * (int)DMOE_PARTS;
    for (int r = 0; r < rows; r++)
        weights[r] = p->weights + (row + r < limit ? row + r : limit - 1) * p->cols;
    for (int i = 0; i < rows * parts; i++)
        totals[i] = (part_of_tokens){0};
    for (int64_t first = 0; first < p->cols; first += DMOE_RUN) {
        int64_t last = first + DMOE_RUN < p->cols ? first + DMOE_RUN : p->cols;
        part_of_tokens sums[DMOE_MOST_SUMS];
        DMOE_UNROLL for (int i = 0; i < rows * parts; i++)
            sums[i] = (part_of_tokens){0};
        for (int64_t k = first; k < last; k++)
            DMOE_UNROLL for (int r = 0; r < rows; r++)
                DMOE_UNROLL for (int i = 0; i < parts; i++)
                    sums[r * parts + i] += weights[r][k] * x[(i / DMOE_PARTS * p->cols + k) * DMOE_PARTS + i % DMOE_PARTS];
        DMOE_UNROLL for (int i = 0; i < rows * parts; i++)
            totals[i] += sums[i];
    }
    for (int r = 0; r < rows && row + r < limit; r++)
        memcpy(out + r * DMOE_BLOCK + group * DMOE_LANES, totals + r * parts, (size_t)parts * sizeof *totals);
}

/* `count` rows from `row` on, to out[r * DMOE_BLOCK + t]; `rows` at once, by `groups` of at most 2. */
DMOE_INLINE void route_inline(
    const struct routed_product *p, int64_t row, int64_t count, const int rows, const int groups, float *out)
{
    for (int64_t at = 0; at < count; at += rows) {
        int64_t group = 0;
        for (; group + groups <= p->groups; group += groups)
            route_tile(p, row + at, row + count, rows, group, groups, out + at * DMOE_BLOCK);
        for (; group < p->groups; group++)
            route_tile(p, row + at, row + count, rows, group, 1, out + at * DMOE_BLOCK);
    }
}
#endif

#endif
