/* The rows of a matrix times packed activations, shared by threads: what experts and linear layers have in common.
 *
 * Rows are handed out in chunks to whichever thread asks, and tokens taken in blocks. An output element is always computed
 * by one thread, by the same operations in the same order, whatever the number of threads, of tokens beside it, or the
 * order of the chunks: that is why neither threads nor batching can show in a result.
 */
#ifndef DMOE_PRODUCTS_H
#define DMOE_PRODUCTS_H

#include "variant.h"

#define CHUNK 48 /* rows of weights that a thread takes at a time; a multiple of what a product takes in any variant */
#define ALIGN 64

static inline int64_t round_up(int64_t value, int64_t step)
{
    return (value + step - 1) / step * step;
}

/* Activations as the products of one format want them. */
struct packing {
    const struct variant *variant;
    int integer;                        /* int8 weights */
    int64_t cols, padded, group_bytes;  /* of a row, with zeros behind, and of a group of tokens */
    char *packed;                       /* blocks of up to DMOE_BLOCK tokens; a block begins with a group */
    float *worth;                       /* by token, integer path only; so is the next */
    int32_t *sums;
};

/* Tokens that are packed together. */
struct block {
    int64_t first, tokens; /* the first one's number among all that are packed, a multiple of the lanes */
};

/* Of `cols` columns, without memory yet. */
struct packing packing_of(const struct variant *variant, int format, int64_t cols);

/* Tokens with those that fill up a group. */
int64_t whole_groups(const struct packing *packing, int64_t tokens);

/* Memory for `tokens`, whole groups, and its being given to them. */
int64_t packing_bytes(const struct packing *packing, int64_t tokens);
void place_packing(struct packing *packing, int64_t tokens, char *memory);

/* Bytes of the rows that a variant decodes for a product. */
int64_t decoded_bytes(const struct packing *packing);

/* Token `t` of a block. */
void pack_token(const struct packing *packing, struct block block, int64_t t, const float *row);

/* Rows [first, last) of `matrix`, CHUNK at most, times a block, into out[t * stride + row - first], and what is
 * of no use into up to DMOE_MOST_ROWS - 1 places behind each row. `after` is what this thread reads next: the memory is
 * asked for early, which may lie there.
 */
void project(
    const struct packing *packing, const struct matrix *matrix, int64_t first, int64_t last, struct block block,
    const unsigned char *after, char *decoded, float *out, int64_t stride);

/* Room for what `project` writes of a block with a stride of CHUNK. */
#define TILE (DMOE_BLOCK * CHUNK)

/* `count` sums as elements of `out` from `at` on: rounded to bf16, or float32 as they are. */
void store_row(const struct variant *variant, const float *sums, int64_t count, int bf16, void *out, int64_t at);

/* Threads at work on the same thing. */
struct crew {
    int threads;
    parallel_fn parallel; /* may be null if `threads` is 1 */
    int64_t next, workers;
    int64_t taken[2]; /* pieces, from the first on and from the last on */
    char *scratch; /* of `scratch_size` bytes for each thread */
    int64_t scratch_size;
};

/* Have every thread do `phase`. */
void run(struct crew *crew, void (*phase)(void *), void *job);

/* This thread's number among those at work, and the scratch that is its own. */
int64_t take_seat(struct crew *crew);
char *scratch_at(struct crew *crew, int64_t seat);

/* Both together. */
char *take_scratch(struct crew *crew);

/* A piece of the work that nobody else has; its number is too large when all is taken. */
int64_t take_ticket(struct crew *crew);

/* The same of `limit` pieces, by every other thread from the last one on; `limit` when all are taken. With two
 * threads the outputs, of which neighbours share cache lines, then lie apart but for one place.
 */
int64_t take_from_end(struct crew *crew, int64_t seat, int64_t limit);

#endif
