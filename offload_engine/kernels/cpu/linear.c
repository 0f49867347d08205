/* A linear layer: x @ w^T + bias, straight from the stored bf16 weights (products.h).
 *
 * The caller has checked shapes and bounds (offload_engine/kernels/dense.py).
 */
#include <stdlib.h>

#include "products.h"

struct layer {
    struct crew crew;
    struct packing packing;
    struct matrix weights;
    const unsigned char *x, *bias; /* bf16 [tokens, k], and [n] or null */
    void *out;
    int64_t tokens;
    int bf16; /* `out` is bf16, else float32 */
};

static int64_t blocks(const struct layer *layer)
{
    return (layer->tokens + DMOE_BLOCK - 1) / DMOE_BLOCK;
}

static struct block block_of(const struct layer *layer, int64_t index)
{
    int64_t first = index * DMOE_BLOCK, left = layer->tokens - first;
    return (struct block){first, left < DMOE_BLOCK ? left : DMOE_BLOCK};
}

#define PACKED 8 /* tokens that a thread packs at a time: a multiple of every tile's lanes, which share cache lines */

static void pack_tokens(void *argument)
{
    struct layer *layer = argument;
    int64_t columns = layer->weights.cols;
    float *row = (float *)take_scratch(&layer->crew);
    for (int64_t first; (first = take_ticket(&layer->crew) * PACKED) < layer->tokens;)
        for (int64_t token = first; token < first + PACKED && token < layer->tokens; token++) {
            decode_bf16_inline(layer->x + 2 * token * columns, columns, columns, row);
            pack_token(&layer->packing, block_of(layer, token / DMOE_BLOCK), token % DMOE_BLOCK, row);
        }
}

static void add_bias(const struct layer *layer, int64_t first, int64_t count, float *sums)
{
    if (layer->bias)
        for (int64_t i = 0; i < count; i++)
            sums[i] += load_bf16(layer->bias + 2 * (first + i));
}

static void multiply_chunks(void *argument)
{
    struct layer *layer = argument;
    const struct matrix *weights = &layer->weights;
    int64_t seat = take_seat(&layer->crew), limit = (weights->rows + CHUNK - 1) / CHUNK;
    char *decoded = scratch_at(&layer->crew, seat);
    float tile[TILE];
    for (int64_t ticket = take_from_end(&layer->crew, seat, limit), next; ticket < limit; ticket = next) {
        next = take_from_end(&layer->crew, seat, limit);
        int64_t first = ticket * CHUNK, last = first + CHUNK < weights->rows ? first + CHUNK : weights->rows;
        for (int64_t index = 0; index < blocks(layer); index++) {
            struct block block = block_of(layer, index);
            int64_t following = index + 1 < blocks(layer) || next >= limit ? first : next * CHUNK;
            project(&layer->packing, weights, first, last, block, row_values(weights, following), decoded, tile, CHUNK);
            for (int64_t t = 0; t < block.tokens; t++) {
                add_bias(layer, first, last - first, tile + t * CHUNK);
                int64_t at = (block.first + t) * weights->rows + first;
                store_row(layer->packing.variant, tile + t * CHUNK, last - first, layer->bf16, layer->out, at);
            }
        }
    }
}

/* out [tokens, n], bf16 or float32, of x [tokens, k], weights [n, k] and bias [n] (or null), all bf16. `parallel` may be
 * null if `threads` is 1.
 */
DMOE_EXPORT int dmoe_linear(
    int variant, int bf16, int threads, parallel_fn parallel, int64_t tokens, int64_t k, int64_t n, const void *x,
    const void *weights, const void *bias, void *out)
{
    struct layer layer = {
        .crew = {.threads = threads, .parallel = parallel},
        .weights = {.values = weights, .rows = n, .cols = k, .format = DMOE_BF16},
        .x = x,
        .bias = bias,
        .out = out,
        .tokens = tokens,
        .bf16 = bf16,
    };
    const struct variant *chosen = dmoe_variant_at(variant);
    if (!chosen)
        return DMOE_NO_VARIANT;
    layer.packing = packing_of(chosen, DMOE_BF16, k);
    int64_t room = whole_groups(&layer.packing, tokens), packed = packing_bytes(&layer.packing, room);
    int64_t row = round_up(k * (int64_t)sizeof(float), ALIGN), decoded = decoded_bytes(&layer.packing);
    layer.crew.scratch_size = row > decoded ? row : decoded;
    char *workspace = NULL;
    if (posix_memalign((void **)&workspace, ALIGN, (size_t)(packed + threads * layer.crew.scratch_size)))
        return DMOE_NO_MEMORY;
    place_packing(&layer.packing, room, workspace);
    layer.crew.scratch = workspace + packed;
    run(&layer.crew, pack_tokens, &layer);
    run(&layer.crew, multiply_chunks, &layer);
    free(workspace);
    return DMOE_OK;
}
