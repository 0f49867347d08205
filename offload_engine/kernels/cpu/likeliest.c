/* What each row of logits makes likeliest (likeliest.h).
 *
 * The caller has checked shapes and bounds (offload_engine/kernels/likeliest.py).
 */
#include "variant.h"

struct job {
    const struct variant *variant;
    const float *logits; /* [rows, count] */
    int64_t rows, count, barred, next;
    int64_t *tokens; /* [rows], and so is the next */
    float *probabilities;
};

static void find_rows(void *argument)
{
    struct job *job = argument;
    for (int64_t row; (row = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->rows;) {
        struct likeliest found = job->variant->find_likeliest(job->logits + row * job->count, job->count, job->barred);
        job->tokens[row] = found.token;
        job->probabilities[row] = found.probability;
    }
}

/* tokens [rows] and probabilities [rows] of logits [rows, count], no token being the `barred` one. `parallel` may be null
 * if `threads` is 1.
 */
DMOE_EXPORT int dmoe_likeliest(
    int variant, int threads, parallel_fn parallel, int64_t rows, int64_t count, int64_t barred, const void *logits,
    void *tokens, void *probabilities)
{
    struct job job = {
        .variant = dmoe_variant_at(variant),
        .logits = logits,
        .rows = rows,
        .count = count,
        .barred = barred,
        .tokens = tokens,
        .probabilities = probabilities,
    };
    if (!job.variant)
        return DMOE_NO_VARIANT;
    if (threads > 1 && rows > 1)
        parallel(find_rows, &job, (unsigned)threads, 0);
    else
        find_rows(&job);
    return DMOE_OK;
}
