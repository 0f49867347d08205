/* Runs the kernels on made-up data, without Python, and prints a digest of every result: on another machine the plain C
 * variant must print the same. Built and run by test_portability.py.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "variant.h"

struct expert {
    const void *gate, *gate_scales, *up, *up_scales, *down, *down_scales;
};

int dmoe_experts(
    int variant, int format, int bf16, int threads, parallel_fn parallel, int64_t count, int64_t rows, int64_t choices,
    int64_t h, int64_t i, int64_t group, const void *hidden, const int64_t *chosen, const int64_t *numbers,
    const struct expert *experts, void *out);
int dmoe_weighted_sum(
    int variant, int threads, parallel_fn parallel, int64_t tokens, int64_t choices, int64_t h, const void *outputs,
    const int64_t *experts, const float *weights, void *out);
int64_t dmoe_select(
    int stages, int64_t tokens, int64_t experts, int64_t blocks, int64_t choices, int64_t groups, int64_t kept_groups,
    int normalise, float scale, double top_p, int64_t least, const int64_t *block_ids, const float *scores,
    const float *selection, int64_t *chosen, float *weights, uint8_t *coreset, float *votes);
int dmoe_norm(
    int variant, int threads, parallel_fn parallel, int64_t tokens, int64_t cols, float eps, const void *x,
    const void *weight, void *out);
int dmoe_turn_heads(
    int variant, int threads, parallel_fn parallel, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
    int64_t dims, float eps, const void *query_weight, const void *key_weight, const void *cos, const void *sin,
    void *fused);
int dmoe_router(
    int variant, int threads, parallel_fn parallel, int64_t tokens, int64_t k, int64_t n, const void *x,
    const float *weights, float *out);
int dmoe_attention(
    int variant, int threads, parallel_fn parallel, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
    int64_t positions, float scale, const void *query, const void *key, const void *value, void *out);
int dmoe_likeliest(
    int variant, int threads, parallel_fn parallel, int64_t rows, int64_t count, int64_t barred, const void *logits,
    void *tokens, void *probabilities);
const char *dmoe_variant(int index);

enum { EXPERTS = 3, TOKENS = 7, CHOICES = 2, H = 72, I = 40, GROUP = 8, ROUTED = 64, BLOCKS = 2 };
enum { ALL_STAGES = 31 };
enum { HEADS = 4, KV_HEADS = 2, DIM = 72, DIMS = 40, POSITIONS = 75, VOCABULARY = 1100 };

static uint32_t state = 1;

static uint32_t draw(void)
{
    state ^= state << 13;
    state ^= state >> 17;
    return state ^= state << 5;
}

/* In [-1, 1), exactly representable in bf16 or not, as asked. */
static float draw_float(int bf16)
{
    float value = (float)(int32_t)draw() / 2147483648.0f;
    return bf16 ? float_of((uint32_t)to_bf16(value) << 16) : value;
}

static void *fill(size_t count, int format)
{
    size_t size = format == DMOE_BF16 ? 2 : 1;
    unsigned char *data = malloc(count * size);
    for (size_t at = 0; at < count; at++) {
        if (format == DMOE_BF16) {
            uint16_t half = to_bf16(draw_float(0));
            memcpy(data + 2 * at, &half, sizeof half);
        } else
            data[at] = (unsigned char)draw();
    }
    return data;
}

static void *fill_scales(size_t count, int format)
{
    unsigned char *data = malloc(4 * count);
    for (size_t at = 0; at < count; at++) {
        float value = (2.0f + draw_float(0)) / 256.0f;
        uint16_t half = to_bf16(value);
        if (format == DMOE_INT8)
            memcpy(data + 4 * at, &value, sizeof value);
        else
            memcpy(data + 2 * at, &half, sizeof half);
    }
    return data;
}

static void tell(const char *what, int format, int bf16, const void *data, size_t size)
{
    uint64_t digest = 14695981039346656037u; /* FNV-1a */
    for (size_t at = 0; at < size; at++)
        digest = (digest ^ ((const unsigned char *)data)[at]) * 1099511628211u;
    printf("%s %d %d %016llx\n", what, format, bf16, (unsigned long long)digest);
}

static void run_experts(int variant, int format, int bf16)
{
    int64_t numbers[EXPERTS] = {4, 0, 9}, chosen[TOKENS * CHOICES];
    struct expert experts[EXPERTS];
    size_t values = H * I / (format == DMOE_INT4 ? 2 : 1), rows = format == DMOE_INT8 ? 1 : 0;
    for (int e = 0; e < EXPERTS; e++)
        experts[e] = (struct expert){
            fill(values, format), fill_scales(rows ? I : I * H / GROUP, format),
            fill(values, format), fill_scales(rows ? I : I * H / GROUP, format),
            fill(values, format), fill_scales(rows ? H : H * I / GROUP, format),
        };
    for (int at = 0; at < TOKENS * CHOICES; at++)
        chosen[at] = at % 5 == 4 ? -1 : numbers[draw() % EXPERTS];
    size_t element = bf16 ? 2 : 4;
    unsigned char *hidden = malloc(TOKENS * H * element), *out = calloc(TOKENS * CHOICES * H, element);
    for (int at = 0; at < TOKENS * H; at++) {
        float value = draw_float(bf16);
        uint16_t half = to_bf16(value);
        memcpy(hidden + at * element, bf16 ? (void *)&half : (void *)&value, element);
    }
    int failure = dmoe_experts(
        variant, format, bf16, 1, NULL, EXPERTS, TOKENS * CHOICES, CHOICES, H, I, GROUP, hidden, chosen, numbers,
        experts, out);
    tell(failure ? "experts failed" : "experts", format, bf16, out, TOKENS * CHOICES * H * element);
    if (!bf16)
        return;
    float weights[TOKENS * CHOICES];
    for (int at = 0; at < TOKENS * CHOICES; at++)
        weights[at] = draw_float(0);
    uint16_t sums[TOKENS * H];
    failure = dmoe_weighted_sum(variant, 1, NULL, TOKENS, CHOICES, H, out, chosen, weights, sums);
    tell(failure ? "sum failed" : "sum", format, bf16, sums, sizeof sums);
}

static void select_experts(void)
{
    static float scores[TOKENS * ROUTED], selection[TOKENS * ROUTED], votes[BLOCKS * ROUTED];
    static uint8_t coreset[BLOCKS * ROUTED];
    float weights[TOKENS * CHOICES];
    int64_t chosen[TOKENS * CHOICES], blocks[TOKENS] = {0, 0, 0, 0, 1, 1, 1};
    for (int at = 0; at < TOKENS * ROUTED; at++) {
        scores[at] = (1.0f + draw_float(0)) / 2.0f;
        selection[at] = scores[at] + (at % 3 ? 0.0f : 0.125f);
    }
    int64_t failure = dmoe_select(
        ALL_STAGES, TOKENS, ROUTED, BLOCKS, CHOICES, 8, 4, 1, 2.5f, 0.6, 4, blocks, scores, selection, chosen, weights,
        coreset, votes);
    tell(failure ? "select failed" : "select", 0, 0, coreset, sizeof coreset);
    tell("chosen", 0, 0, chosen, sizeof chosen);
    tell("weights", 0, 0, weights, sizeof weights);
    tell("votes", 0, 0, votes, sizeof votes);
}

static void norm_and_route(int variant)
{
    void *x = fill(TOKENS * H, DMOE_BF16), *weight = fill(H, DMOE_BF16);
    static uint16_t normed[TOKENS * H];
    static float weights[ROUTED * H], logits[TOKENS * ROUTED];
    int failure = dmoe_norm(variant, 1, NULL, TOKENS, H, 1e-6f, x, weight, normed);
    tell(failure ? "norm failed" : "norm", 0, 1, normed, sizeof normed);
    for (int at = 0; at < ROUTED * H; at++)
        weights[at] = draw_float(0);
    failure = dmoe_router(variant, 1, NULL, TOKENS, H, ROUTED, x, weights, logits);
    tell(failure ? "router failed" : "router", 0, 0, logits, sizeof logits);
    size_t count = TOKENS * (HEADS + 2 * KV_HEADS) * DIM;
    void *fused = fill(count, DMOE_BF16), *cos = fill(TOKENS * DIMS, DMOE_BF16), *sin = fill(TOKENS * DIMS, DMOE_BF16);
    failure = dmoe_turn_heads(
        variant, 1, NULL, TOKENS, HEADS, KV_HEADS, DIM, DIMS, 1e-6f, weight, weight, cos, sin, fused);
    tell(failure ? "heads failed" : "heads", 0, 1, fused, 2 * count);
}

static void attend(int variant)
{
    void *query = fill(TOKENS * HEADS * DIM, DMOE_BF16);
    void *key = fill(POSITIONS * KV_HEADS * DIM, DMOE_BF16), *value = fill(POSITIONS * KV_HEADS * DIM, DMOE_BF16);
    static uint16_t out[TOKENS * HEADS * DIM];
    int failure = dmoe_attention(
        variant, 1, NULL, TOKENS, HEADS, KV_HEADS, DIM, POSITIONS, 0.125f, query, key, value, out);
    tell(failure ? "attention failed" : "attention", 0, 1, out, sizeof out);
}

static void find_likeliest(int variant)
{
    static float logits[TOKENS * VOCABULARY], probabilities[TOKENS];
    static int64_t tokens[TOKENS];
    for (int at = 0; at < TOKENS * VOCABULARY; at++)
        logits[at] = 8.0f * draw_float(0);
    int failure = dmoe_likeliest(variant, 1, NULL, TOKENS, VOCABULARY, 5, logits, tokens, probabilities);
    tell(failure ? "likeliest failed" : "likeliest", 0, 0, tokens, sizeof tokens);
    tell("probabilities", 0, 0, probabilities, sizeof probabilities);
}

int main(void)
{
    int generic = 0;
    while (dmoe_variant(generic) && strcmp(dmoe_variant(generic), "generic"))
        generic++;
    for (int format = DMOE_BF16; format <= DMOE_INT4; format++)
        for (int bf16 = 0; bf16 < 2; bf16++)
            run_experts(generic, format, bf16);
    select_experts();
    norm_and_route(generic);
    attend(generic);
    find_likeliest(generic);
    return 0;
}
