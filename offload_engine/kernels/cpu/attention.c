/* Attention of some tokens to a prefix that all of them see, query heads sharing key-value heads: softmax(s q k^T) v.
 *
 * Both products are those of products.h: the queries of a key-value head times its keys, and their softmax times its
 * values, transposed. The softmax's exponentials are rounded to bf16, and divided by their sum afterwards.
 *
 * The caller has checked shapes and bounds (offload_engine/kernels/attention.py).
 */
#include <stdlib.h>

#include "products.h"

#define QUERIES 32 /* of a key-value head, worked on at a time: their scores stay in the cache */

struct attention {
    struct crew crew;
    struct packing queries, powers; /* of head_dim and of positions; each thread places them in its own scratch */
    const uint16_t *query, *key, *value;
    uint16_t *out, *transposed; /* [tokens, heads, head_dim]; values [kv_heads, head_dim, apart] */
    int64_t tokens, heads, kv_heads, head_dim, positions, rows;
    int64_t apart; /* elements from a row of `transposed` to the next: not a power of two, which caches map to few places */
    float scale;
};

/* What one thread works with. */
struct desk {
    struct packing queries, powers;
    float *row;    /* of queries */
    float *scores; /* [QUERIES, score_stride] */
    char *decoded;
};

static int64_t larger(int64_t one, int64_t other)
{
    return one > other ? one : other;
}

/* Room for the scores of a query, and for what `project` leaves behind them. */
static int64_t score_stride(const struct attention *attention)
{
    return attention->powers.padded + round_up(DMOE_MOST_ROWS, DMOE_SUMS);
}

/* Bytes of a desk's parts. */
struct sizes {
    int64_t queries, powers, row, scores, decoded;
};

static struct sizes desk_sizes(const struct attention *attention)
{
    const struct packing *queries = &attention->queries, *powers = &attention->powers;
    return (struct sizes){
        .queries = packing_bytes(queries, QUERIES),
        .powers = packing_bytes(powers, QUERIES),
        .row = round_up(attention->head_dim * (int64_t)sizeof(float), ALIGN),
        .scores = QUERIES * score_stride(attention) * (int64_t)sizeof(float),
        .decoded = larger(decoded_bytes(queries), decoded_bytes(powers)),
    };
}

static struct desk take_desk(struct attention *attention)
{
    struct sizes sizes = desk_sizes(attention);
    struct desk desk = {.queries = attention->queries, .powers = attention->powers};
    char *at = take_scratch(&attention->crew);
    place_packing(&desk.queries, QUERIES, at);
    place_packing(&desk.powers, QUERIES, at += sizes.queries);
    desk.row = (float *)(at += sizes.powers);
    desk.scores = (float *)(at += sizes.row);
    desk.decoded = at + sizes.scores;
    return desk;
}

#define AT_ONCE 8 /* positions transposed together */

/* Positions [first, first + AT_ONCE) of a head's values, zeros for those behind the last. */
static void transpose(const struct attention *attention, int64_t head, int64_t first)
{
    int64_t dim = attention->head_dim, stride = attention->kv_heads * dim, apart = attention->apart;
    const uint16_t *from = attention->value + first * stride + head * dim;
    uint16_t *to = attention->transposed + head * dim * apart + first;
    int64_t count = attention->positions - first;
    for (int64_t d = 0; d < dim; d++, from++, to += apart)
        if (count >= AT_ONCE)
            for (int64_t i = 0; i < AT_ONCE; i++)
                to[i] = from[i * stride];
        else
            for (int64_t i = 0; i < AT_ONCE; i++)
                to[i] = i < count ? from[i * stride] : 0;
}

static void transpose_values(void *argument)
{
    struct attention *attention = argument;
    int64_t each = attention->powers.padded / DMOE_PAD;
    for (int64_t ticket; (ticket = take_ticket(&attention->crew)) < attention->kv_heads * each;)
        for (int64_t first = 0; first < DMOE_PAD; first += AT_ONCE)
            transpose(attention, ticket / each, ticket % each * DMOE_PAD + first);
}

/* Where the query of a head's `row`, and its output, lie: the tokens' queries of one key-value head, one by one. */
static int64_t query_at(const struct attention *attention, int64_t head, int64_t row)
{
    int64_t sharing = attention->heads / attention->kv_heads;
    return (row / sharing * attention->heads + head * sharing + row % sharing) * attention->head_dim;
}

/* scores[t][position] of a block, q k^T. */
static void score(const struct attention *attention, const struct desk *desk, int64_t head, struct block block)
{
    int64_t dim = attention->head_dim;
    struct matrix keys = {
        .values = (const unsigned char *)(attention->key + head * dim),
        .rows = attention->positions,
        .cols = dim,
        .format = DMOE_BF16,
        .apart = attention->kv_heads * dim * (int64_t)sizeof(uint16_t),
    };
    for (int64_t first = 0; first < keys.rows; first += CHUNK) {
        int64_t last = first + CHUNK < keys.rows ? first + CHUNK : keys.rows;
        const unsigned char *after = row_values(&keys, last < keys.rows ? last : 0);
        float *scores = desk->scores + first;
        project(&desk->queries, &keys, first, last, block, after, desk->decoded, scores, score_stride(attention));
    }
}

/* What a block's `powers` make of the values, each row divided by its sum. */
static void weigh(
    const struct attention *attention, const struct desk *desk, int64_t head, struct block block, int64_t row,
    const float *sums)
{
    int64_t dim = attention->head_dim;
    struct matrix values = {
        .values = (const unsigned char *)(attention->transposed + head * dim * attention->apart),
        .rows = dim,
        .cols = desk->powers.padded,
        .format = DMOE_BF16,
        .apart = attention->apart * (int64_t)sizeof(uint16_t),
    };
    float tile[TILE];
    for (int64_t first = 0; first < dim; first += CHUNK) {
        int64_t last = first + CHUNK < dim ? first + CHUNK : dim;
        const unsigned char *after = row_values(&values, last < dim ? last : 0);
        project(&desk->powers, &values, first, last, block, after, desk->decoded, tile, CHUNK);
        for (int64_t t = 0; t < block.tokens; t++) {
            for (int64_t i = 0; i < last - first; i++)
                tile[t * CHUNK + i] /= sums[t];
            int64_t at = query_at(attention, head, row + t) + first;
            attention->queries.variant->round(tile + t * CHUNK, last - first, attention->out + at);
        }
    }
}

static void attend(void *argument)
{
    struct attention *attention = argument;
    const struct variant *variant = attention->queries.variant;
    int64_t dim = attention->head_dim, each = (attention->rows + QUERIES - 1) / QUERIES;
    struct desk desk = take_desk(attention);
    for (int64_t ticket; (ticket = take_ticket(&attention->crew)) < attention->kv_heads * each;) {
        int64_t head = ticket / each, row = ticket % each * QUERIES, left = attention->rows - row;
        struct block block = {0, left < QUERIES ? left : QUERIES};
        float sums[QUERIES];
        for (int64_t t = 0; t < block.tokens; t++) {
            const uint16_t *query = attention->query + query_at(attention, head, row + t);
            decode_bf16_inline((const unsigned char *)query, dim, dim, desk.row);
            pack_token(&desk.queries, block, t, desk.row);
        }
        score(attention, &desk, head, block);
        for (int64_t t = 0; t < block.tokens; t++) {
            float *scores = desk.scores + t * score_stride(attention);
            sums[t] = variant->exponentials(scores, attention->positions, desk.powers.padded, attention->scale);
            pack_token(&desk.powers, block, t, scores);
        }
        weigh(attention, &desk, head, block, row, sums);
    }
}

/* query and out [tokens, heads, head_dim], key and value [positions, kv_heads, head_dim], bf16; `parallel` may be null
 * if `threads` is 1.
 */
DMOE_EXPORT int dmoe_attention(
    int variant, int threads, parallel_fn parallel, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
    int64_t positions, float scale, const void *query, const void *key, const void *value, void *out)
{
    const struct variant *chosen = dmoe_variant_at(variant);
    if (!chosen)
        return DMOE_NO_VARIANT;
    struct attention attention = {
        .crew = {.threads = threads, .parallel = parallel},
        .queries = packing_of(chosen, DMOE_BF16, head_dim),
        .query = query,
        .key = key,
        .value = value,
        .out = out,
        .tokens = tokens,
        .heads = heads,
        .kv_heads = kv_heads,
        .head_dim = head_dim,
        .positions = positions,
        .rows = tokens * (heads / kv_heads),
        .scale = scale,
    };
    attention.powers = packing_of(chosen, DMOE_BF16, round_up(positions, DMOE_PAD));
    attention.apart = attention.powers.padded + ALIGN / (int64_t)sizeof(uint16_t);
    struct sizes sizes = desk_sizes(&attention);
    attention.crew.scratch_size = sizes.queries + sizes.powers + sizes.row + sizes.scores + sizes.decoded;
    int64_t transposed = round_up(kv_heads * head_dim * attention.apart * (int64_t)sizeof(uint16_t), ALIGN);
    char *workspace = NULL;
    if (posix_memalign((void **)&workspace, ALIGN, (size_t)(transposed + threads * attention.crew.scratch_size)))
        return DMOE_NO_MEMORY;
    attention.transposed = (uint16_t *)workspace;
    attention.crew.scratch = workspace + transposed;
    run(&attention.crew, transpose_values, &attention);
    run(&attention.crew, attend, &attention);
    free(workspace);
    return DMOE_OK;
}
