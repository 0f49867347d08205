/* Experts on their tokens: down(silu(x @ gate^T) * (x @ up^T)), straight from the stored weights.
 *
 * The rows of all matrices are handed out in chunks to whichever thread asks. An output element is always computed by
 * one thread, by the same operations in the same order, whatever the number of threads, of tokens beside it, or the
 * order of the chunks: that is why neither threads nor batching can show in a result, nor which experts run together.
 *
 * The caller has checked shapes and bounds (offload_engine/kernels/ffn.py).
 */
#include <stdlib.h>

#include "variant.h"

#define CHUNK 32 /* rows of weights that a thread takes at a time; a multiple of DMOE_ROWS */
#define LEAD 4   /* rows between what is computed and what is prefetched; below CHUNK */
#define ALIGN 64

#define ROWS 1024 /* tokens times their experts, worked on at a time: what bounds the workspace, some 6 KB for each */

/* One expert's matrices. */
struct expert {
    const void *gate, *gate_scales, *up, *up_scales, *down, *down_scales;
};

/* The rows of `out` that an expert fills: places[first] to places[first + count - 1], the rows of `hidden` times k. */
struct share {
    int64_t first, count;
};

struct job {
    const struct variant *variant;
    const struct expert *experts; /* those worked on, and */
    const struct share *shares;   /* what is theirs */
    const int64_t *places;
    int64_t count, choices, h, i, group;
    int format, bf16;      /* `hidden` and `out` are bf16, else float32 */
    const char *hidden;    /* [.., h] */
    char *out;             /* [.., h] */
    int64_t start;         /* place of the first packed row */
    float *inner;          /* [rows, i] */
    char *packed;          /* [rows]: the activations that the matrices of this phase are multiplied with */
    float *packed_scale;   /* [rows], integer path only */
    int64_t stride;        /* bytes between packed rows */
    char *scratch;         /* per thread: one row of float32, decoded rows, two tiles */
    int64_t scratch_size, row_bytes, decoded_bytes, tile_bytes;
    int64_t next, workers; /* tickets */
};

static int64_t round_up(int64_t value, int64_t step)
{
    return (value + step - 1) / step * step;
}

static int64_t element_size(const struct job *job)
{
    return job->format == DMOE_INT8 ? (int64_t)sizeof(int16_t) : job->variant->element;
}

/* Largest activation that keeps every sum of products within int32: |w| <= 128. */
static int32_t integer_limit(int64_t cols)
{
    int64_t limit = INT32_MAX / (128 * cols);
    return (int32_t)(limit > DMOE_LARGEST ? DMOE_LARGEST : limit);
}

static void pack_row(struct job *job, const float *row, int64_t at, int64_t cols)
{
    void *packed = job->packed + at * job->stride;
    int64_t padded = round_up(cols, DMOE_PAD);
    if (job->format == DMOE_INT8)
        job->packed_scale[at] = job->variant->quantise(row, cols, padded, integer_limit(cols), packed);
    else
        job->variant->pack(row, cols, padded, packed);
}

static int64_t row_size(const struct matrix *matrix)
{
    return row_values(matrix, 1) - matrix->values;
}

static struct matrix gate_of(const struct job *job, const struct expert *expert)
{
    return (struct matrix){expert->gate, expert->gate_scales, job->i, job->h, job->group, job->format};
}

static struct matrix up_of(const struct job *job, const struct expert *expert)
{
    return (struct matrix){expert->up, expert->up_scales, job->i, job->h, job->group, job->format};
}

static struct matrix down_of(const struct job *job, const struct expert *expert)
{
    return (struct matrix){expert->down, expert->down_scales, job->h, job->i, job->group, job->format};
}

/* What one thread works with. */
struct worker {
    float *row;    /* of activations */
    char *decoded; /* DMOE_ROWS rows of weights */
    float *tile, *other;
};

static struct worker take_worker(struct job *job)
{
    char *mine = job->scratch + __atomic_fetch_add(&job->workers, 1, __ATOMIC_RELAXED) * job->scratch_size;
    char *tile = mine + job->row_bytes + job->decoded_bytes;
    return (struct worker){(float *)mine, mine + job->row_bytes, (float *)tile, (float *)(tile + job->tile_bytes)};
}

/* A piece of the work that nobody else has; `limit` or more when all is taken. */
static int64_t take_ticket(struct job *job)
{
    return __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
}

/* CHUNK rows of one of the experts' matrices, and its tokens: packed rows, places. */
struct chunk {
    const struct expert *expert;
    const int64_t *places;
    int64_t packed, tokens, first, last;
};

static int64_t chunks(const struct job *job, int64_t rows)
{
    return job->count * ((rows + CHUNK - 1) / CHUNK);
}

static struct chunk chunk_of(const struct job *job, int64_t ticket, int64_t rows)
{
    int64_t each = (rows + CHUNK - 1) / CHUNK, index = ticket / each, first = ticket % each * CHUNK;
    int64_t last = first + CHUNK < rows ? first + CHUNK : rows;
    struct share share = job->shares[index];
    const int64_t *places = job->places + share.first;
    return (struct chunk){&job->experts[index], places, share.first - job->start, share.count, first, last};
}

/* A chunk of a matrix times its expert's packed activations, into tile[t * CHUNK + row - first]. `after` is what this
 * thread reads next: the memory is asked for LEAD rows early, which may lie there.
 */
static void project(
    const struct job *job, const struct matrix *matrix, const struct chunk *chunk, const unsigned char *after,
    char *decoded, float *tile)
{
    int integer = matrix->format == DMOE_INT8;
    int64_t padded = round_up(matrix->cols, DMOE_PAD), element = element_size(job), size = row_size(matrix);
    struct product product = {
        .packed = job->packed + chunk->packed * job->stride,
        .stride = job->stride,
        .padded = padded,
        .tokens = chunk->tokens,
        .ahead_bytes = DMOE_ROWS * size,
        .out_stride = CHUNK,
    };
    for (int64_t row = chunk->first; row < chunk->last; row += DMOE_ROWS) {
        for (int r = 0; r < DMOE_ROWS; r++) {
            /* the last rows are computed again, and not used */
            int64_t at = row + r < chunk->last ? row + r : chunk->last - 1;
            product.weights[r] = job->variant->decode(matrix, at, padded, decoded + r * padded * element);
        }
        int64_t lead = row + LEAD;
        product.ahead = (const char *)(lead < chunk->last ? row_values(matrix, lead) : after + (lead - chunk->last) * size);
        product.out = tile + (row - chunk->first);
        if (integer)
            job->variant->multiply_integer(&product);
        else
            job->variant->multiply(&product);
    }
    if (integer)
        for (int64_t t = 0; t < product.tokens; t++)
            job->variant->scale(
                tile + t * CHUNK, matrix->scales + chunk->first * (int64_t)sizeof(float),
                job->packed_scale[chunk->packed + t], chunk->last - chunk->first);
}

static void pack_hidden(void *argument)
{
    struct job *job = argument;
    float *row = take_worker(job).row;
    for (int64_t index; (index = take_ticket(job)) < job->count;) {
        struct share share = job->shares[index];
        for (int64_t t = 0; t < share.count; t++) {
            int64_t at = job->places[share.first + t] / job->choices * job->h;
            if (job->bf16)
                decode_bf16_inline((const unsigned char *)job->hidden + 2 * at, job->h, job->h, row);
            pack_row(job, job->bf16 ? row : (const float *)job->hidden + at, share.first - job->start + t, job->h);
        }
    }
}

static void gate_and_up(void *argument)
{
    struct job *job = argument;
    struct worker mine = take_worker(job);
    int64_t limit = chunks(job, job->i);
    for (int64_t ticket = take_ticket(job), next; ticket < limit; ticket = next) {
        next = take_ticket(job);
        struct chunk chunk = chunk_of(job, ticket, job->i);
        struct chunk following = next < limit ? chunk_of(job, next, job->i) : chunk;
        struct matrix gate = gate_of(job, chunk.expert), up = up_of(job, chunk.expert);
        struct matrix next_gate = gate_of(job, following.expert);
        project(job, &gate, &chunk, row_values(&up, chunk.first), mine.decoded, mine.tile);
        project(job, &up, &chunk, row_values(&next_gate, following.first), mine.decoded, mine.other);
        int64_t count = chunk.last - chunk.first;
        for (int64_t t = 0; t < chunk.tokens; t++) {
            float *tile = mine.tile + t * CHUNK;
            job->variant->silu_times(tile, mine.other + t * CHUNK, count);
            memcpy(job->inner + (chunk.packed + t) * job->i + chunk.first, tile, (size_t)count * sizeof *tile);
        }
    }
}

static void pack_inner(void *argument)
{
    struct job *job = argument;
    for (int64_t index; (index = take_ticket(job)) < job->count;)
        for (int64_t t = 0; t < job->shares[index].count; t++) {
            int64_t at = job->shares[index].first - job->start + t;
            pack_row(job, job->inner + at * job->i, at, job->i);
        }
}

static void down(void *argument)
{
    struct job *job = argument;
    struct worker mine = take_worker(job);
    int64_t limit = chunks(job, job->h);
    for (int64_t ticket = take_ticket(job), next; ticket < limit; ticket = next) {
        next = take_ticket(job);
        struct chunk chunk = chunk_of(job, ticket, job->h);
        struct chunk following = next < limit ? chunk_of(job, next, job->h) : chunk;
        struct matrix matrix = down_of(job, chunk.expert), next_matrix = down_of(job, following.expert);
        project(job, &matrix, &chunk, row_values(&next_matrix, following.first), mine.decoded, mine.tile);
        int64_t count = chunk.last - chunk.first;
        for (int64_t t = 0; t < chunk.tokens; t++) {
            int64_t at = chunk.places[t] * job->h + chunk.first;
            if (job->bf16)
                job->variant->round(mine.tile + t * CHUNK, count, (uint16_t *)job->out + at);
            else
                memcpy((float *)job->out + at, mine.tile + t * CHUNK, (size_t)count * sizeof(float));
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

/* Work on experts that need no more memory than the workspace has. */
static void run_experts(struct job *job, int threads, parallel_fn parallel)
{
    run(job, pack_hidden, threads, parallel);
    run(job, gate_and_up, threads, parallel);
    run(job, pack_inner, threads, parallel);
    run(job, down, threads, parallel);
}

/* Sort the places [0, rows) by the experts that `chosen` names there, rising; those of no expert are left out. */
static void sort_places(
    const int64_t *chosen, int64_t rows, const int64_t *numbers, int64_t count, int64_t *places, struct share *shares)
{
    for (int64_t index = 0, at = 0; index < count; index++) {
        shares[index].first = at;
        for (int64_t place = 0; place < rows; place++)
            if (!chosen || chosen[place] == numbers[index])
                places[at++] = place;
        shares[index].count = at - shares[index].first;
    }
}

/* `count` experts on their tokens, all with gate and up [i, h] and down [h, i] in `format`, `group` columns per scale in
 * int4; hidden [rows / choices, h] and out [rows, h] both bf16 or both float32. Where chosen [rows] is an expert's
 * number, out has what it makes of hidden; no number comes twice. Null: the first one is chosen everywhere.
 * `parallel` may be null if `threads` is 1.
 */
DMOE_EXPORT int dmoe_experts(
    int variant, int format, int bf16, int threads, parallel_fn parallel, int64_t count, int64_t rows, int64_t choices,
    int64_t h, int64_t i, int64_t group, const void *hidden, const int64_t *chosen, const int64_t *numbers,
    const struct expert *experts, void *out)
{
    struct job job = {
        .variant = dmoe_variant_at(variant),
        .choices = choices,
        .h = h,
        .i = i,
        .group = group,
        .format = format,
        .bf16 = bf16,
        .hidden = hidden,
        .out = out,
    };
    if (!job.variant)
        return DMOE_NO_VARIANT;
    int64_t places_size = round_up(rows * (int64_t)sizeof(int64_t), ALIGN);
    char *sorted = NULL;
    if (posix_memalign((void **)&sorted, ALIGN, (size_t)(places_size + count * (int64_t)sizeof(struct share))))
        return DMOE_NO_MEMORY;
    struct share *shares = (struct share *)(sorted + places_size);
    job.places = (const int64_t *)sorted;
    sort_places(chosen, rows, numbers, count, (int64_t *)sorted, shares);
    int64_t most = 0, largest = 0; /* tokens of one expert; rows worked on at a time */
    for (int64_t index = 0; index < count; index++)
        most = shares[index].count > most ? shares[index].count : most;
    largest = shares[count - 1].first + shares[count - 1].count;
    if (largest > ROWS)
        largest = most > ROWS ? most : ROWS;

    int64_t widest = round_up(h > i ? h : i, DMOE_PAD);
    job.stride = round_up(widest * element_size(&job), ALIGN) + DMOE_SPARE;
    job.row_bytes = round_up(h * (int64_t)sizeof(float), ALIGN);
    job.decoded_bytes = round_up(DMOE_ROWS * widest * element_size(&job), ALIGN);
    job.tile_bytes = round_up(most * CHUNK * (int64_t)sizeof(float), ALIGN);
    job.scratch_size = job.row_bytes + job.decoded_bytes + 2 * job.tile_bytes;
    int64_t packed_size = largest * job.stride;
    int64_t inner_size = round_up(largest * i * (int64_t)sizeof(float), ALIGN);
    int64_t scale_size = round_up(largest * (int64_t)sizeof(float), ALIGN);
    size_t size = (size_t)(packed_size + inner_size + scale_size + threads * job.scratch_size);
    char *workspace = NULL;
    if (posix_memalign((void **)&workspace, ALIGN, size)) {
        free(sorted);
        return DMOE_NO_MEMORY;
    }
    job.packed = workspace;
    job.inner = (float *)(job.packed + packed_size);
    job.packed_scale = (float *)((char *)job.inner + inner_size);
    job.scratch = (char *)job.packed_scale + scale_size;

    for (int64_t from = 0; from < count; from += job.count) {
        int64_t taken = shares[from].count;
        for (job.count = 1; from + job.count < count; job.count++) {
            taken += shares[from + job.count].count;
            if (taken > largest)
                break;
        }
        job.experts = experts + from;
        job.shares = shares + from;
        job.start = shares[from].first;
        run_experts(&job, threads, parallel);
    }
    free(workspace);
    free(sorted);
    return DMOE_OK;
}
