/* A router's logits: activations in bf16 times weights in float32, summed in float32.
 *
 * Sixteen tokens side by side make a vector, so that a sum is never spread over lanes: each is made of the same
 * multiplications and additions, in the order of the columns, by RUN columns, whatever the instruction set. All machines
 * therefore route alike, and nothing beside a token can show in its logits.
 *
 * The caller has checked shapes and bounds (offload_engine/kernels/router.py).
 */
#include <stdlib.h>

#include "products.h"
#include "router.h"

#define ROWS_AT_ONCE 48 /* that a thread takes */

struct router {
    struct crew crew;
    struct routed_product product;
    const unsigned char *x; /* bf16, of the block's first token */
    float *out;             /* [block's tokens, n] */
    const struct variant *variant;
    int64_t tokens, n; /* of the block */
};

/* Columns [first, last) of the group that begins with token `t`. */
static void interleave(const struct router *router, int64_t t, int64_t first, int64_t last)
{
    int64_t cols = router->product.cols, count = router->tokens - t < DMOE_LANES ? router->tokens - t : DMOE_LANES;
    float *to = router->product.packed + t * cols;
    const unsigned char *from = router->x + 2 * t * cols;
    for (int64_t k = first; k < last; k++)
        for (int64_t lane = 0; lane < DMOE_LANES; lane++)
            to[k * DMOE_LANES + lane] = lane < count ? load_bf16(from + 2 * (lane * cols + k)) : 0.0f;
}

static void interleave_tokens(void *argument)
{
    struct router *router = argument;
    int64_t cols = router->product.cols, runs = (cols + DMOE_RUN - 1) / DMOE_RUN;
    int64_t limit = runs * router->product.groups;
    for (int64_t ticket; (ticket = take_ticket(&router->crew)) < limit;) {
        int64_t first = ticket % runs * DMOE_RUN, last = first + DMOE_RUN < cols ? first + DMOE_RUN : cols;
        interleave(router, ticket / runs * DMOE_LANES, first, last);
    }
}

static void multiply_rows(void *argument)
{
    struct router *router = argument;
    float sums[ROWS_AT_ONCE][DMOE_BLOCK];
    for (int64_t row; (row = take_ticket(&router->crew) * ROWS_AT_ONCE) < router->n;) {
        int64_t count = router->n - row < ROWS_AT_ONCE ? router->n - row : ROWS_AT_ONCE;
        router->variant->route(&router->product, row, count, sums[0]);
        for (int64_t t = 0; t < router->tokens; t++)
            for (int64_t r = 0; r < count; r++)
                router->out[t * router->n + row + r] = sums[r][t];
    }
}

/* out [tokens, n] float32, of x [tokens, k] bf16 and weights [n, k] float32. `parallel` may be null if `threads` is 1. */
DMOE_EXPORT int dmoe_router(
    int variant, int threads, parallel_fn parallel, int64_t tokens, int64_t k, int64_t n, const void *x,
    const float *weights, float *out)
{
    const struct variant *chosen = dmoe_variant_at(variant);
    if (!chosen)
        return DMOE_NO_VARIANT;
    int64_t room = round_up(tokens < DMOE_BLOCK ? tokens : DMOE_BLOCK, DMOE_LANES);
    float *packed = NULL;
    if (posix_memalign((void **)&packed, ALIGN, (size_t)(room * k) * sizeof *packed))
        return DMOE_NO_MEMORY;
    for (int64_t first = 0; first < tokens; first += DMOE_BLOCK) {
        int64_t count = tokens - first < DMOE_BLOCK ? tokens - first : DMOE_BLOCK;
        struct router router = {
            .crew = {.threads = threads, .parallel = parallel},
            .product = {packed, weights, k, n, round_up(count, DMOE_LANES) / DMOE_LANES},
            .x = (const unsigned char *)x + 2 * first * k,
            .out = out + first * n,
            .variant = chosen,
            .tokens = count,
            .n = n,
        };
        run(&router.crew, interleave_tokens, &router);
        run(&router.crew, multiply_rows, &router);
    }
    free(packed);
    return DMOE_OK;
}
