/* RMS norm and rotary embedding of bf16 rows, rounded to bf16 wherever torch rounds when it computes them step by step.
 *
 * Only the order in which squares are summed is ours, the same on every instruction set.
 */
#ifndef DMOE_NORMS_H
#define DMOE_NORMS_H

#include <math.h>

#include "variant.h"

#define DMOE_SQUARES 64       /* squares that are summed apart */
#define DMOE_WIDEST_HEAD 512

DMOE_INLINE float rounded(float value)
{
    return float_of((uint32_t)to_bf16(value) << 16);
}

/* 1 / sqrt(mean of squares + eps). */
DMOE_INLINE float inverse_rms(const unsigned char *row, int64_t cols, float eps)
{
    float sums[DMOE_SQUARES] = {0};
    int64_t first = 0;
    for (; first + DMOE_SQUARES <= cols; first += DMOE_SQUARES)
        for (int lane = 0; lane < DMOE_SQUARES; lane++) {
            float value = load_bf16(row + 2 * (first + lane));
            sums[lane] += value * value;
        }
    for (int lane = 0; lane < cols - first; lane++) {
        float value = load_bf16(row + 2 * (first + lane));
        sums[lane] += value * value;
    }
    for (int half = DMOE_SQUARES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            sums[lane] += sums[lane + half];
    return 1.0f / sqrtf(sums[0] / (float)cols + eps);
}

DMOE_INLINE void norm_inline(
    const unsigned char *restrict row, const unsigned char *restrict weight, int64_t cols, float eps,
    uint16_t *restrict out)
{
    float inverse = inverse_rms(row, cols, eps);
    for (int64_t i = 0; i < cols; i++)
        out[i] = to_bf16(load_bf16(weight + 2 * i) * rounded(load_bf16(row + 2 * i) * inverse));
}

/* A head, in place: normed, if there is a weight, and its first `dims` columns turned in the rotate-half form. */
DMOE_INLINE void turn_inline(uint16_t *head, const struct turning *turning, const unsigned char *weight, int64_t token)
{
    int64_t dim = turning->dim, dims = turning->dims, half = dims / 2;
    const unsigned char *restrict cos = turning->cos + 2 * token * dims, *restrict sin = turning->sin + 2 * token * dims;
    float row[DMOE_WIDEST_HEAD];
    uint16_t turned[DMOE_WIDEST_HEAD];
    for (int64_t i = 0; i < dim; i++)
        row[i] = load_bf16((unsigned char *)(head + i));
    if (weight) {
        float inverse = inverse_rms((unsigned char *)head, dim, turning->eps);
        for (int64_t i = 0; i < dim; i++)
            row[i] = rounded(load_bf16(weight + 2 * i) * rounded(row[i] * inverse));
    }
    for (int64_t i = 0; i < half; i++) {
        float first = row[i], second = row[half + i];
        turned[i] = to_bf16(rounded(first * load_bf16(cos + 2 * i)) + rounded(-second * load_bf16(sin + 2 * i)));
        turned[half + i] =
            to_bf16(rounded(second * load_bf16(cos + 2 * (half + i))) + rounded(first * load_bf16(sin + 2 * (half + i))));
    }
    for (int64_t i = dims; i < dim; i++)
        turned[i] = to_bf16(row[i]);
    memcpy(head, turned, (size_t)dim * sizeof *head);
}

#endif
