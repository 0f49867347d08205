/* Experts on their tokens: down(silu(x @ gate^T) * (x @ up^T)), straight from the stored weights (products.h).
 *
 * The caller has checked shapes and bounds (offload_engine/kernels/ffn.py).
 */
#include <stdlib.h>

#include "products.h"

#define ROWS 1024 /* tokens times their experts, worked on at a time: what bounds the workspace, some 6 KB for each */

/* One expert's matrices. */
struct expert {
    const void *gate, *gate_scales, *up, *up_scales, *down, *down_scales;
};

/* The rows of `out` that an expert fills: places[first] to places[first + count - 1], the rows of `hidden` times k. */
struct share {
    int64_t expert; /* which of the call's experts it is */
    int64_t first, count;
    int64_t packed; /* where its tokens begin among those that are packed at a time */
};

struct job {
    struct crew crew;
    struct packing hidden_packing, inner_packing; /* in the same memory, one after the other */
    const struct variant *variant;
    const struct expert *experts;
    const struct share *shares; /* of those worked on, by falling count */
    const int64_t *places;
    int64_t count, choices, h, i, group;
    int format, bf16;   /* `hidden` and `out` are bf16, else float32 */
    const char *hidden; /* [.., h] */
    char *out;          /* [.., h] */
    float *inner;       /* [packed tokens, i] */
};

static struct matrix gate_of(const struct job *job, const struct expert *expert)
{
    return (struct matrix){expert->gate, expert->gate_scales, job->i, job->h, job->group, job->format, 0};
}

static struct matrix up_of(const struct job *job, const struct expert *expert)
{
    return (struct matrix){expert->up, expert->up_scales, job->i, job->h, job->group, job->format, 0};
}

static struct matrix down_of(const struct job *job, const struct expert *expert)
{
    return (struct matrix){expert->down, expert->down_scales, job->h, job->i, job->group, job->format, 0};
}

/* The tokens of a share from its `t`th on that are packed together. */
static struct block block_at(const struct share *share, int64_t t)
{
    int64_t left = share->count - t;
    return (struct block){share->packed + t, left < DMOE_BLOCK ? left : DMOE_BLOCK};
}

/* CHUNK rows of one of the experts' matrices. Threads take them from both ends: an expert with many tokens keeps the
 * processor busy, one with few the memory, and so one of each is worked on at a time.
 */
struct chunk {
    const struct expert *expert;
    const struct share *share;
    int64_t first, last;
};

static int64_t chunks(const struct job *job, int64_t rows)
{
    return job->count * ((rows + CHUNK - 1) / CHUNK);
}

static struct chunk chunk_of(const struct job *job, int64_t ticket, int64_t rows)
{
    int64_t each = (rows + CHUNK - 1) / CHUNK, index = ticket / each, first = ticket % each * CHUNK;
    int64_t last = first + CHUNK < rows ? first + CHUNK : rows;
    return (struct chunk){&job->experts[job->shares[index].expert], &job->shares[index], first, last};
}

static void pack_hidden(void *argument)
{
    struct job *job = argument;
    float *row = (float *)take_scratch(&job->crew);
    for (int64_t index; (index = take_ticket(&job->crew)) < job->count;) {
        const struct share *share = &job->shares[index];
        for (int64_t t = 0; t < share->count; t++) {
            int64_t at = job->places[share->first + t] / job->choices * job->h;
            if (job->bf16)
                decode_bf16_inline((const unsigned char *)job->hidden + 2 * at, job->h, job->h, row);
            const float *from = job->bf16 ? row : (const float *)job->hidden + at;
            pack_token(&job->hidden_packing, block_at(share, t / DMOE_BLOCK * DMOE_BLOCK), t % DMOE_BLOCK, from);
        }
    }
}

static void gate_and_up(void *argument)
{
    struct job *job = argument;
    int64_t seat = take_seat(&job->crew), limit = chunks(job, job->i);
    char *decoded = scratch_at(&job->crew, seat);
    float gates[TILE], ups[TILE];
    for (int64_t ticket = take_from_end(&job->crew, seat, limit), next; ticket < limit; ticket = next) {
        next = take_from_end(&job->crew, seat, limit);
        struct chunk chunk = chunk_of(job, ticket, job->i);
        struct matrix gate = gate_of(job, chunk.expert), up = up_of(job, chunk.expert);
        int64_t first = chunk.first, last = chunk.last, count = last - first;
        for (int64_t t = 0; t < chunk.share->count; t += DMOE_BLOCK) {
            struct block block = block_at(chunk.share, t);
            const unsigned char *after = row_values(&gate, first);
            if (t + DMOE_BLOCK >= chunk.share->count && next < limit) {
                struct chunk following = chunk_of(job, next, job->i);
                struct matrix next_gate = gate_of(job, following.expert);
                after = row_values(&next_gate, following.first);
            }
            project(&job->hidden_packing, &gate, first, last, block, row_values(&up, first), decoded, gates, CHUNK);
            project(&job->hidden_packing, &up, first, last, block, after, decoded, ups, CHUNK);
            for (int64_t b = 0; b < block.tokens; b++) {
                job->variant->silu_times(gates + b * CHUNK, ups + b * CHUNK, count);
                float *to = job->inner + (block.first + b) * job->i + first;
                memcpy(to, gates + b * CHUNK, (size_t)count * sizeof *to);
            }
        }
    }
}

static void pack_inner(void *argument)
{
    struct job *job = argument;
    for (int64_t index; (index = take_ticket(&job->crew)) < job->count;) {
        const struct share *share = &job->shares[index];
        for (int64_t t = 0; t < share->count; t++) {
            const float *from = job->inner + (share->packed + t) * job->i;
            pack_token(&job->inner_packing, block_at(share, t / DMOE_BLOCK * DMOE_BLOCK), t % DMOE_BLOCK, from);
        }
    }
}

static void down(void *argument)
{
    struct job *job = argument;
    int64_t seat = take_seat(&job->crew), limit = chunks(job, job->h);
    char *decoded = scratch_at(&job->crew, seat);
    float tile[TILE];
    for (int64_t ticket = take_from_end(&job->crew, seat, limit), next; ticket < limit; ticket = next) {
        next = take_from_end(&job->crew, seat, limit);
        struct chunk chunk = chunk_of(job, ticket, job->h);
        struct matrix matrix = down_of(job, chunk.expert);
        int64_t first = chunk.first, last = chunk.last;
        for (int64_t t = 0; t < chunk.share->count; t += DMOE_BLOCK) {
            struct block block = block_at(chunk.share, t);
            const unsigned char *after = row_values(&matrix, first);
            if (t + DMOE_BLOCK >= chunk.share->count && next < limit) {
                struct chunk following = chunk_of(job, next, job->h);
                struct matrix next_matrix = down_of(job, following.expert);
                after = row_values(&next_matrix, following.first);
            }
            project(&job->inner_packing, &matrix, first, last, block, after, decoded, tile, CHUNK);
            const int64_t *places = job->places + chunk.share->first + t;
            for (int64_t b = 0; b < block.tokens; b++)
                store_row(job->variant, tile + b * CHUNK, last - first, job->bf16, job->out, places[b] * job->h + first);
        }
    }
}

/* Those with most tokens first. */
static int by_tokens(const void *one, const void *other)
{
    int64_t a = ((const struct share *)one)->count, b = ((const struct share *)other)->count;
    return (a < b) - (a > b);
}

/* Work on experts that need no more memory than the workspace has. */
static void run_experts(struct job *job)
{
    run(&job->crew, pack_hidden, job);
    run(&job->crew, gate_and_up, job);
    run(&job->crew, pack_inner, job);
    run(&job->crew, down, job);
}

/* Sort the places [0, rows) by the experts that `chosen` names there, rising; those of no expert are left out. */
static void sort_places(
    const int64_t *chosen, int64_t rows, const int64_t *numbers, int64_t count, int64_t *places, struct share *shares)
{
    for (int64_t index = 0, at = 0; index < count; index++) {
        shares[index].expert = index;
        shares[index].first = at;
        for (int64_t place = 0; place < rows; place++)
            if (!chosen || chosen[place] == numbers[index])
                places[at++] = place;
        shares[index].count = at - shares[index].first;
    }
}

/* How many of `count` shares are worked on together, and where the tokens of each are packed; `room` is for tokens that
 * fill up whole groups, and enough for any one of them.
 */
static int64_t fill_room(const struct packing *packing, struct share *shares, int64_t count, int64_t room)
{
    int64_t taken = 0, packed = 0;
    for (; taken < count; taken++) {
        int64_t tokens = whole_groups(packing, shares[taken].count);
        if (taken && packed + tokens > room)
            break;
        shares[taken].packed = packed;
        packed += tokens;
    }
    return taken;
}

/* Tokens, filled up to whole groups, that are worked on at a time. */
static int64_t room_for(const struct packing *packing, const struct share *shares, int64_t count)
{
    int64_t most = 0, all = 0;
    for (int64_t index = 0; index < count; index++) {
        int64_t tokens = whole_groups(packing, shares[index].count);
        most = tokens > most ? tokens : most;
        all += tokens;
    }
    return all <= ROWS ? all : most > ROWS ? most : ROWS;
}

static int64_t larger(int64_t one, int64_t other)
{
    return one > other ? one : other;
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
        .crew = {.threads = threads, .parallel = parallel},
        .variant = dmoe_variant_at(variant),
        .choices = choices,
        .h = h,
        .i = i,
        .group = group,
        .format = format,
        .bf16 = bf16,
        .experts = experts,
        .hidden = hidden,
        .out = out,
    };
    if (!job.variant)
        return DMOE_NO_VARIANT;
    int64_t places_size = round_up(rows * (int64_t)sizeof(int64_t), ALIGN);
    char *sorted = NULL, *workspace = NULL;
    if (posix_memalign((void **)&sorted, ALIGN, (size_t)(places_size + count * (int64_t)sizeof(struct share))))
        return DMOE_NO_MEMORY;
    struct share *shares = (struct share *)(sorted + places_size);
    job.places = (const int64_t *)sorted;
    sort_places(chosen, rows, numbers, count, (int64_t *)sorted, shares);

    job.hidden_packing = packing_of(job.variant, format, h);
    job.inner_packing = packing_of(job.variant, format, i);
    int64_t room = room_for(&job.hidden_packing, shares, count);
    int64_t packed = larger(packing_bytes(&job.hidden_packing, room), packing_bytes(&job.inner_packing, room));
    int64_t decoded = larger(decoded_bytes(&job.hidden_packing), decoded_bytes(&job.inner_packing));
    job.crew.scratch_size = larger(decoded, round_up(h * (int64_t)sizeof(float), ALIGN));
    int64_t inner = round_up(room * i * (int64_t)sizeof(float), ALIGN);
    if (posix_memalign((void **)&workspace, ALIGN, (size_t)(packed + inner + threads * job.crew.scratch_size))) {
        free(sorted);
        return DMOE_NO_MEMORY;
    }
    place_packing(&job.hidden_packing, room, workspace);
    place_packing(&job.inner_packing, room, workspace);
    job.inner = (float *)(workspace + packed);
    job.crew.scratch = workspace + packed + inner;

    for (int64_t from = 0; from < count; from += job.count) {
        job.count = fill_room(&job.hidden_packing, shares + from, count - from, room);
        job.shares = shares + from;
        qsort(shares + from, (size_t)job.count, sizeof *shares, by_tokens);
        run_experts(&job);
    }
    free(workspace);
    free(sorted);
    return DMOE_OK;
}
