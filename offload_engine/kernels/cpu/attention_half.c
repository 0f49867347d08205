/* The half of a decoder layer that comes before its experts, as one call: norm, projections, attention to prefix caches,
 * the sum into the residual stream, the next norm and the router. What is computed is what the functions called here
 * compute one by one, bit for bit: between them, weights run through the processor's caches, and a caller in another
 * language would have to be fetched from memory again before each.
 *
 * The caller has checked shapes and bounds (offload_engine/kernels/attention_half.py).
 */
#include <stdlib.h>

#include "products.h"

#define TOKENS 4  /* that a thread takes at a time */
#define SUMS 256  /* of the residual stream, rounded together */

/* A layer's weights, bf16 but for the router's; null where there are none. */
struct half {
    const void *norm, *projection, *projection_bias, *query_norm, *key_norm, *dense, *dense_bias, *next_norm;
    const float *router;
    int64_t width, heads, kv_heads, head_dim, experts;
    double eps, scale;
};

/* A block of consecutive positions: where its keys and values go, behind all that it sees. */
struct place {
    uint16_t *keys, *values; /* bf16 [layers, positions, kv_heads, head_dim] */
    int64_t layer;           /* elements of a layer */
    int64_t start, tokens;
};

/* How the functions called share their work. */
struct means {
    int variant, threads;
    parallel_fn parallel;
};

int dmoe_norm(
    int variant, int threads, parallel_fn parallel, int64_t tokens, int64_t cols, float eps, const void *x,
    const void *weight, void *out);
int dmoe_linear(
    int variant, int bf16, int threads, parallel_fn parallel, int64_t tokens, int64_t k, int64_t n, const void *x,
    const void *weights, const void *bias, void *out);
int dmoe_turn_heads(
    int variant, int threads, parallel_fn parallel, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
    int64_t dims, float eps, const void *query_weight, const void *key_weight, const void *cos, const void *sin,
    void *fused);
int dmoe_attention(
    int variant, int threads, parallel_fn parallel, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
    int64_t positions, float scale, const void *query, const void *key, const void *value, void *out);
int dmoe_router(
    int variant, int threads, parallel_fn parallel, int64_t tokens, int64_t k, int64_t n, const void *x,
    const float *weights, float *out);

/* Queries, keys and values of the block's tokens, from `fused` [tokens, heads + 2 kv_heads, head_dim] to their places. */
static void hand_out(
    const struct half *half, const struct place *place, int64_t layer, const uint16_t *fused, uint16_t *query)
{
    int64_t queries = half->heads * half->head_dim, each = half->kv_heads * half->head_dim;
    int64_t to = layer * place->layer + place->start * each;
    for (int64_t t = 0; t < place->tokens; t++, fused += queries + 2 * each, to += each) {
        memcpy(query + t * queries, fused, (size_t)queries * sizeof *query);
        memcpy(place->keys + to, fused + queries, (size_t)each * sizeof *query);
        memcpy(place->values + to, fused + queries + each, (size_t)each * sizeof *query);
    }
}

static int attend_blocks(
    const struct means *by, const struct half *half, int64_t layer, const struct place *places, int64_t count,
    const uint16_t *fused, uint16_t *query, uint16_t *out)
{
    int64_t queries = half->heads * half->head_dim, all = queries + 2 * half->kv_heads * half->head_dim;
    for (int64_t at = 0, index = 0; index < count; at += places[index++].tokens)
        hand_out(half, places + index, layer, fused + at * all, query + at * queries);
    for (int64_t at = 0, index = 0; index < count; at += places[index++].tokens) {
        const struct place *place = places + index;
        int64_t from = layer * place->layer, seen = place->start + place->tokens;
        int failure = dmoe_attention(
            by->variant, by->threads, by->parallel, place->tokens, half->heads, half->kv_heads, half->head_dim, seen,
            (float)half->scale, query + at * queries, place->keys + from, place->values + from, out + at * queries);
        if (failure)
            return failure;
    }
    return DMOE_OK;
}

struct sum {
    const struct variant *variant;
    const struct half *half;
    int64_t tokens, next;
    const unsigned char *hidden, *added; /* bf16 [tokens, width]; so are the next two */
    uint16_t *stream, *normed;
};

/* stream = hidden + added, and its norm. */
static void sum_and_norm(void *argument)
{
    struct sum *sum = argument;
    const struct half *half = sum->half;
    for (int64_t from; (from = __atomic_fetch_add(&sum->next, TOKENS, __ATOMIC_RELAXED)) < sum->tokens;)
        for (int64_t t = from; t < from + TOKENS && t < sum->tokens; t++) {
            uint16_t *stream = sum->stream + t * half->width;
            for (int64_t first = 0; first < half->width; first += SUMS) {
                int64_t count = half->width - first < SUMS ? half->width - first : SUMS, at = t * half->width + first;
                float sums[SUMS];
                for (int64_t i = 0; i < count; i++)
                    sums[i] = load_bf16(sum->added + 2 * (at + i)) + load_bf16(sum->hidden + 2 * (at + i));
                sum->variant->round(sums, count, stream + first);
            }
            sum->variant->norm(
                (const unsigned char *)stream, half->next_norm, half->width, (float)half->eps,
                sum->normed + t * half->width);
        }
}

/* Activations on the way, bf16. */
struct desk {
    uint16_t *narrow, *fused, *query, *attended; /* [tokens, width], all heads, those of queries, and these again */
};

static int compute(
    const struct means *by, const struct half *half, int64_t layer, const struct place *places, int64_t count,
    int64_t dims, const void *cos, const void *sin, const struct desk *desk, struct sum *sum, float *logits)
{
    int v = by->variant, threads = by->threads;
    int64_t tokens = sum->tokens, width = half->width, queries = half->heads * half->head_dim;
    int64_t all = queries + 2 * half->kv_heads * half->head_dim;
    float eps = (float)half->eps;
    int failure = dmoe_norm(v, threads, by->parallel, tokens, width, eps, sum->hidden, half->norm, desk->narrow);
    if (!failure)
        failure = dmoe_linear(
            v, 1, threads, by->parallel, tokens, width, all, desk->narrow, half->projection, half->projection_bias,
            desk->fused);
    if (!failure)
        failure = dmoe_turn_heads(
            v, threads, by->parallel, tokens, half->heads, half->kv_heads, half->head_dim, dims, eps, half->query_norm,
            half->key_norm, cos, sin, desk->fused);
    if (!failure)
        failure = attend_blocks(by, half, layer, places, count, desk->fused, desk->query, desk->attended);
    if (!failure)
        failure = dmoe_linear(
            v, 1, threads, by->parallel, tokens, queries, width, desk->attended, half->dense, half->dense_bias,
            desk->narrow);
    if (failure)
        return failure;
    sum->added = (const unsigned char *)desk->narrow;
    if (threads > 1 && tokens > TOKENS)
        by->parallel(sum_and_norm, sum, (unsigned)threads, 0);
    else
        sum_and_norm(sum);
    if (!half->router)
        return DMOE_OK;
    return dmoe_router(
        v, threads, by->parallel, tokens, width, half->experts, sum->normed, half->router, logits);
}

/* The half of layer `layer` for hidden [tokens, width], which are the tokens of `count` blocks one after the other:
 * stream and normed [tokens, width], all bf16, and logits [tokens, experts] float32 if there is a router. Angles cos and
 * sin [tokens, dims] are bf16. `parallel` may be null if `threads` is 1.
 */
DMOE_EXPORT int dmoe_attention_half(
    int variant, int threads, parallel_fn parallel, const struct half *half, int64_t layer, const struct place *places,
    int64_t count, int64_t tokens, int64_t dims, const void *cos, const void *sin, const void *hidden, void *stream,
    void *normed, float *logits)
{
    const struct variant *chosen = dmoe_variant_at(variant);
    if (!chosen)
        return DMOE_NO_VARIANT;
    int64_t queries = half->heads * half->head_dim, all = queries + 2 * half->kv_heads * half->head_dim;
    uint16_t *room = NULL;
    if (posix_memalign((void **)&room, ALIGN, (size_t)(tokens * (half->width + all + 2 * queries)) * sizeof *room))
        return DMOE_NO_MEMORY;
    struct desk desk = {.narrow = room, .fused = room + tokens * half->width};
    desk.query = desk.fused + tokens * all;
    desk.attended = desk.query + tokens * queries;
    struct means by = {variant, threads, parallel};
    struct sum sum = {
        .variant = chosen, .half = half, .tokens = tokens, .hidden = hidden, .stream = stream, .normed = normed,
    };
    int failure = compute(&by, half, layer, places, count, dims, cos, sin, &desk, &sum, logits);
    free(room);
    return failure;
}
