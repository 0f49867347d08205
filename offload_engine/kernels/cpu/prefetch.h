/* What a product asks for while it computes: the weights that will be read next. */
#ifndef DMOE_PREFETCH_H
#define DMOE_PREFETCH_H

#include "variant.h"

/* The part of what comes next that one tile of tokens asks for: spread evenly, since bursts wait for the memory. */
struct stream {
    const char *next, *end;
    int64_t step; /* bytes at a time, whole cache lines */
    int passing;  /* to be read once and not kept in the outer caches, where the rest of the program has its data */
};

/* Of a tile that asks every `columns` of its own. */
DMOE_INLINE struct stream tile_stream(
    const struct product *product, int64_t first, int64_t tokens, int64_t columns, const int passing)
{
    int64_t last = first + tokens < product->tokens ? first + tokens : product->tokens;
    int64_t from = product->ahead_bytes * first / product->tokens, to = product->ahead_bytes * last / product->tokens;
    int64_t step = (to - from) * columns / product->padded;
    return (struct stream){product->ahead + from, product->ahead + to, (step + 63) / 64 * 64, passing};
}

DMOE_INLINE void prefetch_step(struct stream *stream)
{
    for (int64_t line = 0; line < stream->step; line += 64)
        if (stream->next < stream->end) {
            if (stream->passing)
                __builtin_prefetch(stream->next, 0, 0);
            else
                __builtin_prefetch(stream->next, 0, 3);
            stream->next += 64;
        }
}

#endif
