/* RMS norm of rows, and the norm and rotary embedding of queries and keys in place (norms.h).
 *
 * The caller has checked shapes and bounds (offload_engine/kernels/norms.py).
 */
#include "variant.h"

#define TOKENS 4 /* that a thread takes at a time */

struct job {
    const struct variant *variant;
    int64_t tokens, next;
    const unsigned char *x, *weight; /* of a norm: bf16 [tokens, cols] and [cols] */
    uint16_t *out;
    int64_t cols;
    float eps;
    struct turning turning;                        /* of heads: */
    const unsigned char *query_weight, *key_weight; /* bf16 [dim], or null */
    int64_t heads, kv_heads;
};

static void norm_rows(void *argument)
{
    struct job *job = argument;
    for (int64_t from; (from = __atomic_fetch_add(&job->next, TOKENS, __ATOMIC_RELAXED)) < job->tokens;)
        for (int64_t t = from; t < from + TOKENS && t < job->tokens; t++)
            job->variant->norm(job->x + 2 * t * job->cols, job->weight, job->cols, job->eps, job->out + t * job->cols);
}

static void turn_heads(void *argument)
{
    struct job *job = argument;
    int64_t dim = job->turning.dim, heads = job->heads + job->kv_heads;
    for (int64_t from; (from = __atomic_fetch_add(&job->next, TOKENS, __ATOMIC_RELAXED)) < job->tokens;)
        for (int64_t t = from; t < from + TOKENS && t < job->tokens; t++)
            for (int64_t head = 0; head < heads; head++) {
                uint16_t *at = job->out + t * job->cols + head * dim;
                job->variant->turn(at, &job->turning, head < job->heads ? job->query_weight : job->key_weight, t);
            }
}

static void start(struct job *job, void (*phase)(void *), int threads, parallel_fn parallel)
{
    if (threads > 1 && job->tokens > TOKENS)
        parallel(phase, job, (unsigned)threads, 0);
    else
        phase(job);
}

/* out [tokens, cols] = weight [cols] * (x / rms(x)), all bf16. `parallel` may be null if `threads` is 1; below too. */
DMOE_EXPORT int dmoe_norm(
    int variant, int threads, parallel_fn parallel, int64_t tokens, int64_t cols, float eps, const void *x,
    const void *weight, void *out)
{
    const struct variant *chosen = dmoe_variant_at(variant);
    if (!chosen)
        return DMOE_NO_VARIANT;
    struct job job = {
        .variant = chosen, .tokens = tokens, .x = x, .weight = weight, .out = out, .cols = cols, .eps = eps,
    };
    start(&job, norm_rows, threads, parallel);
    return DMOE_OK;
}

/* The query and key heads of `fused` [tokens, heads + 2 kv_heads, dim], in place, by cos and sin [tokens, dims], all bf16;
 * values stay. Weights are [dim] or null.
 */
DMOE_EXPORT int dmoe_turn_heads(
    int variant, int threads, parallel_fn parallel, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
    int64_t dims, float eps, const void *query_weight, const void *key_weight, const void *cos, const void *sin, void *fused)
{
    const struct variant *chosen = dmoe_variant_at(variant);
    if (!chosen)
        return DMOE_NO_VARIANT;
    struct job job = {
        .variant = chosen,
        .tokens = tokens,
        .out = fused,
        .cols = (heads + 2 * kv_heads) * dim,
        .turning = {.cos = cos, .sin = sin, .dim = dim, .dims = dims, .eps = eps},
        .query_weight = query_weight,
        .key_weight = key_weight,
        .heads = heads,
        .kv_heads = kv_heads,
    };
    start(&job, turn_heads, threads, parallel);
    return DMOE_OK;
}
