/* The likeliest token of a row of logits and its probability, in one pass over the row.
 *
 * Spans of logits are read from memory once: their largest is found, and then, while they are in the nearest cache, their
 * powers of e are summed, relative to the largest logit so far. Every instruction set gives the same bits.
 */
#ifndef DMOE_LIKELIEST_H
#define DMOE_LIKELIEST_H

#include <float.h>

#include "variant.h"

#define DMOE_SPAN 1024
#define DMOE_COMPARED 64 /* logits that are compared apart; so are DMOE_SUMS powers summed */

/* The largest of `count`, -inf if there are none. Passes over NaN. */
DMOE_INLINE float largest_of(const float *logits, int64_t count)
{
    float lanes[DMOE_COMPARED];
    for (int lane = 0; lane < DMOE_COMPARED; lane++)
        lanes[lane] = -INFINITY;
    int64_t first = 0;
    for (; first + DMOE_COMPARED <= count; first += DMOE_COMPARED)
        for (int lane = 0; lane < DMOE_COMPARED; lane++)
            lanes[lane] = logits[first + lane] > lanes[lane] ? logits[first + lane] : lanes[lane];
    for (int lane = 0; lane < count - first; lane++)
        lanes[lane] = logits[first + lane] > lanes[lane] ? logits[first + lane] : lanes[lane];
    for (int half = DMOE_COMPARED / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            lanes[lane] = lanes[lane + half] > lanes[lane] ? lanes[lane + half] : lanes[lane];
    return lanes[0];
}

/* Of e^(logit - largest). NaN, and what infinity less itself is, stay NaN. */
DMOE_INLINE float sum_of_powers(const float *logits, int64_t count, float largest)
{
    float sums[DMOE_SUMS] = {0};
    int64_t first = 0;
    for (; first + DMOE_SUMS <= count; first += DMOE_SUMS)
        for (int lane = 0; lane < DMOE_SUMS; lane++)
            sums[lane] += fast_exp(logits[first + lane] - largest);
    for (int lane = 0; lane < count - first; lane++)
        sums[lane] += fast_exp(logits[first + lane] - largest);
    for (int half = DMOE_SUMS / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            sums[lane] += sums[lane + half];
    return sums[0];
}

DMOE_INLINE int64_t first_equal(const float *logits, int64_t first, int64_t last, int64_t barred, float wanted)
{
    for (int64_t token = first; token < last; token++)
        if (token != barred && logits[token] == wanted)
            return token;
    return 0; /* nothing but the barred one, NaN and -inf */
}

DMOE_INLINE struct likeliest find_likeliest_inline(const float *logits, int64_t count, int64_t barred)
{
    float best = -INFINITY, largest = -FLT_MAX; /* from which -inf can be subtracted */
    double sum = 0.0;
    int64_t found = 0; /* where the span begins that has the best */
    for (int64_t first = 0; first < count; first += DMOE_SPAN) {
        int64_t length = count - first < DMOE_SPAN ? count - first : DMOE_SPAN, among = barred - first;
        const float *span = logits + first;
        float most = largest_of(span, length), allowed = most;
        if (among >= 0 && among < length) {
            float before = largest_of(span, among), behind = largest_of(span + among + 1, length - among - 1);
            allowed = behind > before ? behind : before;
        }
        if (allowed > best) { /* a tie goes to the lower token */
            best = allowed;
            found = first;
        }
        if (most > largest) {
            sum *= (double)fast_exp(largest - most);
            largest = most;
        }
        sum += (double)sum_of_powers(span, length, largest);
    }
    if (largest == -FLT_MAX)
        sum = NAN;
    int64_t last = found + DMOE_SPAN < count ? found + DMOE_SPAN : count;
    return (struct likeliest){
        first_equal(logits, found, last, barred, best), (float)((double)fast_exp(best - largest) / sum)};
}

#endif
