/* One expert on its tokens: down(silu(x @ gate^T) * (x @ up^T)), straight from the stored weights.
 *
 * The rows of each matrix are handed out in chunks to whichever thread asks. An output element is always computed by
 * one thread, by the same operations in the same order, whatever the number of threads, of tokens beside it, or the
 * order of the chunks: that is why neither threads nor batching can show in a result.
 *
 * The caller has checked shapes and bounds (offload_engine/kernels/ffn.py).
 */
#include <stdlib.h>

#include "variant.h"

#define CHUNK 32 /* rows of weights that a thread takes at a time; a multiple of DMOE_ROWS */
#define LEAD 4   /* rows between what is computed and what is prefetched; below CHUNK */
#define ALIGN 64

enum { OK = 0, NO_MEMORY = 1, NO_VARIANT = 2 };

/* GOMP_parallel of the OpenMP runtime that the process already has: a second one would fight the first for the cores. */
typedef void (*parallel_fn)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

struct job {
    const struct variant *variant;
    struct matrix gate, up, down;
    int64_t tokens;
    int bf16;            /* `hidden` and `out` are bf16, else float32 */
    void *out;           /* [tokens, H] */
    float *inner;        /* [tokens, I] */
    char *packed;        /* the activations that the matrices of this phase are multiplied with */
    float *packed_scale; /* [tokens], integer path only */
    int64_t stride;      /* bytes between packed rows */
    char *scratch;       /* per thread: decoded rows, then two tiles */
    int64_t scratch_size, decoded_size;
    int64_t next, workers; /* tickets */
};

static int64_t round_up(int64_t value, int64_t step)
{
    return (value + step - 1) / step * step;
}

static int64_t element_size(const struct job *job)
{
    return job->gate.format == DMOE_INT8 ? (int64_t)sizeof(int16_t) : job->variant->element;
}

/* Largest activation that keeps every sum of products within int32: |w| <= 128. */
static int32_t integer_limit(int64_t cols)
{
    int64_t limit = INT32_MAX / (128 * cols);
    return (int32_t)(limit > DMOE_LARGEST ? DMOE_LARGEST : limit);
}

static void pack_row(struct job *job, const float *row, int64_t token, int64_t cols)
{
    void *packed = job->packed + token * job->stride;
    int64_t padded = round_up(cols, DMOE_PAD);
    if (job->gate.format == DMOE_INT8)
        job->packed_scale[token] = job->variant->quantise(row, cols, padded, integer_limit(cols), packed);
    else
        job->variant->pack(row, cols, padded, packed);
}

static int64_t row_size(const struct matrix *matrix)
{
    return row_values(matrix, 1) - matrix->values;
}

/* Rows `first` to `last` of a matrix times the packed activations, into tile[t * CHUNK + row - first]. `after` is what
 * this thread reads next: the memory is asked for LEAD rows early, which may lie there.
 */
static void project(
    const struct job *job, const struct matrix *matrix, int64_t first, int64_t last, const unsigned char *after,
    char *scratch, float *tile)
{
    int integer = matrix->format == DMOE_INT8;
    int64_t padded = round_up(matrix->cols, DMOE_PAD), element = element_size(job), size = row_size(matrix);
    struct product product = {
        .packed = job->packed,
        .stride = job->stride,
        .padded = padded,
        .tokens = job->tokens,
        .ahead_bytes = DMOE_ROWS * size,
        .out_stride = CHUNK,
    };
    for (int64_t row = first; row < last; row += DMOE_ROWS) {
        for (int r = 0; r < DMOE_ROWS; r++) {
            int64_t at = row + r < last ? row + r : last - 1; /* the last rows are computed again, and not used */
            product.weights[r] = job->variant->decode(matrix, at, padded, scratch + r * padded * element);
        }
        int64_t lead = row + LEAD;
        product.ahead = (const char *)(lead < last ? row_values(matrix, lead) : after + (lead - last) * size);
        product.out = tile + (row - first);
        if (integer)
            job->variant->multiply_integer(&product);
        else
            job->variant->multiply(&product);
    }
    if (integer)
        for (int64_t t = 0; t < job->tokens; t++)
            job->variant->scale(
                tile + t * CHUNK, matrix->scales + first * (int64_t)sizeof(float), job->packed_scale[t], last - first);
}

static char *my_scratch(struct job *job)
{
    return job->scratch + __atomic_fetch_add(&job->workers, 1, __ATOMIC_RELAXED) * job->scratch_size;
}

/* The first row of a chunk that nobody else has; `rows` or more when all are taken. */
static int64_t take_chunk(struct job *job)
{
    return __atomic_fetch_add(&job->next, CHUNK, __ATOMIC_RELAXED);
}

static int64_t chunk_end(int64_t first, int64_t rows)
{
    return first + CHUNK < rows ? first + CHUNK : rows;
}

static void gate_and_up(void *argument)
{
    struct job *job = argument;
    char *scratch = my_scratch(job);
    float *gate = (float *)(scratch + job->decoded_size), *up = gate + job->tokens * CHUNK;
    int64_t rows = job->gate.rows;
    for (int64_t first = take_chunk(job), next; first < rows; first = next) {
        int64_t last = chunk_end(first, rows);
        next = take_chunk(job);
        project(job, &job->gate, first, last, row_values(&job->up, first), scratch, gate);
        project(job, &job->up, first, last, row_values(&job->gate, next), scratch, up);
        for (int64_t t = 0; t < job->tokens; t++) {
            job->variant->silu_times(gate + t * CHUNK, up + t * CHUNK, last - first);
            memcpy(job->inner + t * rows + first, gate + t * CHUNK, (size_t)(last - first) * sizeof *gate);
        }
    }
}

static void down(void *argument)
{
    struct job *job = argument;
    char *scratch = my_scratch(job);
    float *tile = (float *)(scratch + job->decoded_size);
    int64_t rows = job->down.rows;
    for (int64_t first = take_chunk(job), next; first < rows; first = next) {
        int64_t last = chunk_end(first, rows);
        next = take_chunk(job);
        project(job, &job->down, first, last, row_values(&job->down, next), scratch, tile);
        for (int64_t t = 0; t < job->tokens; t++) {
            int64_t at = t * rows + first, count = last - first;
            if (job->bf16)
                job->variant->round(tile + t * CHUNK, count, (uint16_t *)job->out + at);
            else
                memcpy((float *)job->out + at, tile + t * CHUNK, (size_t)count * sizeof *tile);
        }
    }
}

static void run(struct job *job, void (*phase)(void *), int threads, parallel_fn parallel)
{
    job->next = 0;
    job->workers = 0;
    if (threads > 1)
        parallel(phase, job, (unsigned)threads, 0);
    else
        phase(job);
}

static void pack_hidden(struct job *job, const void *hidden, float *row)
{
    int64_t cols = job->gate.cols;
    for (int64_t t = 0; t < job->tokens; t++) {
        if (job->bf16)
            decode_bf16_inline((const unsigned char *)hidden + 2 * t * cols, cols, cols, row);
        pack_row(job, job->bf16 ? row : (const float *)hidden + t * cols, t, cols);
    }
}

static const struct variant *const VARIANTS[] = {
#if defined(__x86_64__)
    &dmoe_avx512,
    &dmoe_avx2,
#endif
    &dmoe_generic,
};
#define VARIANT_COUNT ((int)(sizeof VARIANTS / sizeof *VARIANTS))

#define EXPORT __attribute__((visibility("default")))

#define TEXT(macro) #macro
#define TEXT_OF(macro) TEXT(macro)

/* Fingerprint of the sources that this was built from. */
EXPORT const char *dmoe_sources(void)
{
    return TEXT_OF(DMOE_SOURCES);
}

/* Name of variant `index`, fastest first; null behind the last. */
EXPORT const char *dmoe_variant(int index)
{
    return index >= 0 && index < VARIANT_COUNT ? VARIANTS[index]->name : NULL;
}

/* Whether this CPU, and its operating system, can run variant `index`. */
EXPORT int dmoe_supported(int index)
{
    return index >= 0 && index < VARIANT_COUNT && VARIANTS[index]->supported();
}

/* hidden [tokens, h] and out [tokens, h], both bf16 or both float32; gate and up [i, h], down [h, i] in `format`, `group`
 * columns per scale in int4. `parallel` may be null if `threads` is 1.
 */
EXPORT int dmoe_expert_ffn(
    int variant, int format, int bf16, int threads, parallel_fn parallel, int64_t tokens, int64_t h, int64_t i,
    int64_t group, const void *hidden, const void *gate, const void *gate_scales, const void *up,
    const void *up_scales, const void *down_values, const void *down_scales, void *out)
{
    if (!dmoe_supported(variant))
        return NO_VARIANT;
    struct job job = {
        .variant = VARIANTS[variant],
        .gate = {gate, gate_scales, i, h, group, format},
        .up = {up, up_scales, i, h, group, format},
        .down = {down_values, down_scales, h, i, group, format},
        .tokens = tokens,
        .bf16 = bf16,
        .out = out,
    };
    int64_t widest = round_up(h > i ? h : i, DMOE_PAD);
    job.stride = round_up(widest * element_size(&job), ALIGN) + DMOE_SPARE;
    job.decoded_size = round_up(DMOE_ROWS * widest * element_size(&job), ALIGN);
    job.scratch_size = round_up(job.decoded_size + 2 * tokens * CHUNK * (int64_t)sizeof(float), ALIGN);

    int64_t packed_size = tokens * job.stride;
    int64_t inner_size = round_up(tokens * i * (int64_t)sizeof(float), ALIGN);
    int64_t scale_size = round_up(tokens * (int64_t)sizeof(float), ALIGN);
    int64_t one_row = round_up(h * (int64_t)sizeof(float), ALIGN);
    char *workspace = NULL;
    size_t size = (size_t)(packed_size + inner_size + scale_size + one_row + threads * job.scratch_size);
    if (posix_memalign((void **)&workspace, ALIGN, size))
        return NO_MEMORY;
    job.packed = workspace;
    job.inner = (float *)(job.packed + packed_size);
    job.packed_scale = (float *)((char *)job.inner + inner_size);
    float *row = (float *)((char *)job.packed_scale + scale_size);
    job.scratch = (char *)row + one_row;

    pack_hidden(&job, hidden, row);
    run(&job, gate_and_up, threads, parallel);
    for (int64_t t = 0; t < tokens; t++)
        pack_row(&job, job.inner + t * i, t, i);
    run(&job, down, threads, parallel);
    free(workspace);
    return OK;
}
