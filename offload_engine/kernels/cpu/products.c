#include <stddef.h>

#include "products.h"

#define DECODED 4 /* bytes at most per element that `decode` leaves */

/* Largest activation that keeps every sum of products within int32: |w| <= 128. */
static int32_t integer_limit(int64_t cols)
{
    int64_t limit = INT32_MAX / (128 * cols);
    return (int32_t)(limit > DMOE_LARGEST ? DMOE_LARGEST : limit);
}

static const struct tiling *tiling(const struct packing *packing)
{
    return packing->integer ? &packing->variant->integer_tiling : &packing->variant->tiling;
}

static int64_t element_size(const struct packing *packing)
{
    return packing->integer ? (int64_t)sizeof(int16_t) : packing->variant->element;
}

static char *packed_block(const struct packing *packing, struct block block)
{
    return packing->packed + block.first / tiling(packing)->lanes * packing->group_bytes;
}

struct packing packing_of(const struct variant *variant, int format, int64_t cols)
{
    struct packing packing = {.variant = variant, .integer = format == DMOE_INT8, .cols = cols};
    packing.padded = round_up(cols, DMOE_PAD);
    packing.group_bytes = tiling(&packing)->lanes * packing.padded * element_size(&packing);
    return packing;
}

int64_t whole_groups(const struct packing *packing, int64_t tokens)
{
    return round_up(tokens, tiling(packing)->lanes);
}

int64_t packing_bytes(const struct packing *packing, int64_t tokens)
{
    int64_t packed = tokens / tiling(packing)->lanes * packing->group_bytes;
    int64_t numbers = packing->integer ? round_up(tokens * (int64_t)sizeof(float), ALIGN) : 0;
    return round_up(packed, ALIGN) + 2 * numbers;
}

void place_packing(struct packing *packing, int64_t tokens, char *memory)
{
    int64_t numbers = packing->integer ? round_up(tokens * (int64_t)sizeof(float), ALIGN) : 0;
    char *end = memory + packing_bytes(packing, tokens);
    packing->packed = memory;
    packing->worth = (float *)(end - 2 * numbers);
    packing->sums = (int32_t *)(end - numbers);
}

int64_t decoded_bytes(const struct packing *packing)
{
    return round_up(packing->variant->rows * packing->padded * DECODED, ALIGN);
}

void pack_token(const struct packing *packing, struct block block, int64_t t, const float *row)
{
    const struct variant *variant = packing->variant;
    int64_t cols = packing->cols, padded = packing->padded;
    struct lane lane = token_lane(tiling(packing), packed_block(packing, block), packing->group_bytes, block.tokens, t);
    if (!packing->integer) {
        variant->pack(row, cols, padded, lane);
        return;
    }
    struct rounded rounded = variant->quantise(row, cols, padded, integer_limit(cols), lane);
    packing->worth[block.first + t] = rounded.worth;
    packing->sums[block.first + t] = rounded.sum;
}

void project(
    const struct packing *packing, const struct matrix *matrix, int64_t first, int64_t last, struct block block,
    const unsigned char *after, char *decoded, float *out, int64_t stride)
{
    const struct variant *variant = packing->variant;
    int64_t rows = variant->rows, row_bytes = packing->padded * DECODED;
    struct product product = {
        .packed = packed_block(packing, block),
        .sums = packing->integer ? packing->sums + block.first : NULL,
        .group_bytes = packing->group_bytes,
        .padded = packing->padded,
        .tokens = block.tokens,
        .ahead_bytes = matrix->apart ? 0 : row_values(matrix, rows) - row_values(matrix, 0),
        .out_stride = stride,
    };
    for (int64_t row = first; row < last; row += rows) {
        for (int64_t r = 0; r < rows; r++) {
            /* the last rows are computed again, and not used */
            int64_t at = row + r < last ? row + r : last - 1;
            product.weights[r] = variant->decode(matrix, at, packing->padded, decoded + r * row_bytes);
        }
        product.ahead = (const char *)(row + rows < last ? row_values(matrix, row + rows) : after);
        product.out = out + (row - first);
        if (packing->integer)
            variant->multiply_integer(&product);
        else
            variant->multiply(&product);
    }
    if (packing->integer)
        for (int64_t t = 0; t < block.tokens; t++)
            variant->scale(
                out + t * stride, matrix->scales + first * (int64_t)sizeof(float), packing->worth[block.first + t],
                last - first);
}

void store_row(const struct variant *variant, const float *sums, int64_t count, int bf16, void *out, int64_t at)
{
    if (bf16)
        variant->round(sums, count, (uint16_t *)out + at);
    else
        memcpy((float *)out + at, sums, (size_t)count * sizeof *sums);
}

void run(struct crew *crew, void (*phase)(void *), void *job)
{
    crew->next = 0;
    crew->workers = 0;
    crew->taken[0] = crew->taken[1] = 0;
    if (crew->threads > 1)
        crew->parallel(phase, job, (unsigned)crew->threads, 0);
    else
        phase(job);
}

int64_t take_seat(struct crew *crew)
{
    return __atomic_fetch_add(&crew->workers, 1, __ATOMIC_RELAXED);
}

char *scratch_at(struct crew *crew, int64_t seat)
{
    return crew->scratch + seat * crew->scratch_size;
}

char *take_scratch(struct crew *crew)
{
    return scratch_at(crew, take_seat(crew));
}

int64_t take_ticket(struct crew *crew)
{
    return __atomic_fetch_add(&crew->next, 1, __ATOMIC_RELAXED);
}

int64_t take_from_end(struct crew *crew, int64_t seat, int64_t limit)
{
    int64_t end = seat % 2;
    if (take_ticket(crew) >= limit) /* so that both ends together give no more than there are */
        return limit;
    int64_t at = __atomic_fetch_add(&crew->taken[end], 1, __ATOMIC_RELAXED);
    return end ? limit - 1 - at : at;
}
