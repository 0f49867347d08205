/* What a layer's experts gave each token, summed by weight.
 *
 * The caller has checked shapes and bounds (offload_engine/kernels/ffn.py).
 */
#include "variant.h"

#define TOKENS 8 /* that a thread takes at a time */

struct job {
    const struct variant *variant;
    int64_t tokens, h, next;
    struct choices first; /* of the first token */
    uint16_t *out;
};

static void sum_tokens(void *argument)
{
    struct job *job = argument;
    for (int64_t from; (from = __atomic_fetch_add(&job->next, TOKENS, __ATOMIC_RELAXED)) < job->tokens;)
        for (int64_t t = from; t < from + TOKENS && t < job->tokens; t++) {
            struct choices mine = job->first;
            mine.outputs += t * mine.count * job->h;
            mine.experts += t * mine.count;
            mine.weights += t * mine.count;
            job->variant->weighted_sum(&mine, job->h, job->out + t * job->h);
        }
}

/* out [tokens, h] bf16 = the sum over `choices` of weights [tokens, choices] times outputs [tokens, choices, h] bf16, but
 * for those whose expert is below 0, which may hold anything. `parallel` may be null if `threads` is 1.
 */
DMOE_EXPORT int dmoe_weighted_sum(
    int variant, int threads, parallel_fn parallel, int64_t tokens, int64_t choices, int64_t h, const void *outputs,
    const int64_t *experts, const float *weights, void *out)
{
    struct job job = {
        .variant = dmoe_variant_at(variant),
        .tokens = tokens,
        .h = h,
        .first = {outputs, experts, weights, choices},
        .out = out,
    };
    if (!job.variant)
        return DMOE_NO_VARIANT;
    if (threads > 1 && tokens > TOKENS)
        parallel(sum_tokens, &job, (unsigned)threads, 0);
    else
        sum_tokens(&job);
    return DMOE_OK;
}
