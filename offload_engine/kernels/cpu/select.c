/* Which experts tokens go to: the decisions of offload_engine/routing (base.py, coreset.py, topk.py) in one call.
 *
 * Every comparison is made on the same float32 numbers as there, and every sum in the same order: votes are added token
 * by token in float32, all other sums run in double from the first to the last, as torch's cumsum does. Values rank as in
 * a stable falling sort: NaN first, then falling, equals (and the two zeros) by rising index.
 *
 * The caller has checked shapes and bounds (offload_engine/kernels/selection.py), except for block ids.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

#define MOST_EXPERTS 1024 /* of a layer; workspace lies on the stack */
#define MOST_CHOICES 64   /* of a token: beyond that, insertion is slower than sorting */
#define EPSILON 1e-20f    /* routing/base.py */
#define NAN_KEY UINT32_MAX
#define ABSENT_KEY (~0xFF800000u) /* of -inf: not to be chosen */

enum { REFUSED = -1, BAD_EXPERT = -2 };
enum { VOTE = 1, ELECT = 2, CHOOSE = 4, TALLY = 8, FLOOR = 16 };

struct routing {
    int64_t tokens, experts, blocks, choices, groups, kept_groups, least;
    int normalise;
    float scale;
    double top_p;
    const int64_t *block_ids; /* [T]; below 0: a pad */
    const float *scores;      /* [T, E] */
    const float *selection;   /* [T, E] */
    int64_t *chosen;          /* [T, k] */
    float *weights;           /* [T, k] */
    uint8_t *coreset;         /* [B, E]; null: tokens choose among all experts; until elected, who has a vote */
    float *votes;             /* [B, E] */
};

/* The best so far, best first. */
struct best {
    int64_t count, limit;
    uint32_t keys[MOST_CHOICES];
    int64_t experts[MOST_CHOICES];
};

/* An order-preserving integer. */
static inline uint32_t key_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000u;
    key = value == 0 ? 0x80000000u : key;
    return value != value ? NAN_KEY : key;
}

static inline float value_of(uint32_t key)
{
    uint32_t bits = key >> 31 ? key & 0x7FFFFFFFu : ~key;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To be called by rising expert, so that among equals the lower stays ahead. */
static inline void insert(struct best *best, uint32_t key, int64_t expert)
{
    if (best->count == best->limit) {
        if (!best->limit || key <= best->keys[best->count - 1])
            return;
    } else {
        best->count++;
    }
    int64_t at = best->count - 1;
    for (; at > 0 && best->keys[at - 1] < key; at--) {
        best->keys[at] = best->keys[at - 1];
        best->experts[at] = best->experts[at - 1];
    }
    best->keys[at] = key;
    best->experts[at] = expert;
}

static void keys_of(const float *row, int64_t count, uint32_t *keys)
{
    for (int64_t i = 0; i < count; i++)
        keys[i] = key_of(row[i]);
}

/* What sorts, rising, by falling key and then by rising index. */
static inline uint64_t place_of(uint32_t key, int64_t index)
{
    return (uint64_t)~key << 32 | (uint64_t)index;
}

/* Rising, by merging; `spare` has room for as many. */
static void sort(uint64_t *places, int64_t count, uint64_t *spare)
{
    for (int64_t width = 1; width < count; width *= 2) {
        for (int64_t first = 0; first < count; first += 2 * width) {
            int64_t middle = first + width < count ? first + width : count;
            int64_t last = middle + width < count ? middle + width : count;
            int64_t left = first, right = middle;
            for (int64_t at = first; at < last; at++) {
                int from_left = right >= last || (left < middle && places[left] < places[right]);
                spare[at] = from_left ? places[left++] : places[right++];
            }
        }
        memcpy(places, spare, (size_t)count * sizeof *places);
    }
}

/* routing/base.py, block_votes. */
static void vote(const struct routing *r)
{
    uint32_t keys[MOST_EXPERTS];
    struct best best;
    memset(r->votes, 0, (size_t)(r->blocks * r->experts) * sizeof *r->votes);
    memset(r->coreset, 0, (size_t)(r->blocks * r->experts));
    for (int64_t t = 0; t < r->tokens; t++) {
        if (r->block_ids[t] < 0)
            continue;
        const float *row = r->selection + t * r->experts;
        int64_t block = r->block_ids[t] * r->experts;
        keys_of(row, r->experts, keys);
        best.count = 0;
        best.limit = r->choices;
        for (int64_t e = 0; e < r->experts; e++)
            insert(&best, keys[e], e);
        for (int64_t c = 0; c < best.count; c++) {
            r->votes[block + best.experts[c]] += row[best.experts[c]];
            r->coreset[block + best.experts[c]] = 1;
        }
    }
}

/* routing/coreset.py, top_p_coreset. */
static void elect(const struct routing *r)
{
    uint64_t places[MOST_EXPERTS], spare[MOST_EXPERTS];
    float shares[MOST_EXPERTS];
    for (int64_t b = 0; b < r->blocks; b++) {
        const float *votes = r->votes + b * r->experts;
        uint8_t *coreset = r->coreset + b * r->experts;
        double sum = 0;
        for (int64_t e = 0; e < r->experts; e++)
            sum += votes[e];
        float total = (float)sum < FLT_MIN ? FLT_MIN : (float)sum;
        for (int64_t e = 0; e < r->experts; e++) {
            shares[e] = votes[e] / total;
            places[e] = place_of(key_of(shares[e]), e);
        }
        sort(places, r->experts, spare);
        double before = 0;
        for (int64_t rank = 0; rank < r->experts; rank++) {
            uint32_t e = (uint32_t)places[rank];
            int passed = r->top_p >= 1 || (float)before <= (float)r->top_p;
            coreset[e] = rank < r->least || (coreset[e] && passed);
            before += shares[e];
        }
    }
}

/* Marks the groups in which a token may choose among `members`, which rise. routing/base.py, group_limited. */
static void limit_groups(
    const struct routing *r, const int64_t *members, int64_t count, const uint32_t *keys, const int64_t *group_of,
    uint8_t *kept)
{
    uint32_t worth[MOST_EXPERTS];
    struct best best = {.limit = r->kept_groups};
    for (int64_t g = 0; g < r->groups; g++)
        worth[g] = ABSENT_KEY;
    for (int64_t i = 0; i < count;) {
        int64_t group = group_of[members[i]];
        uint32_t first = ABSENT_KEY, second = ABSENT_KEY;
        for (; i < count && group_of[members[i]] == group; i++) {
            uint32_t key = keys[members[i]], lesser = key < first ? key : first;
            first = key > first ? key : first;
            second = lesser > second ? lesser : second;
        }
        worth[group] = r->groups == r->experts ? first : key_of(value_of(first) + value_of(second));
    }
    for (int64_t g = 0; g < r->groups; g++)
        insert(&best, worth[g], g);
    for (int64_t g = 0; g < r->groups; g++)
        kept[g] = 0;
    for (int64_t c = 0; c < best.count; c++)
        kept[best.experts[c]] = 1;
}

/* The best of `members`, and of `kept` groups if not null. */
static void pick(
    struct best *best, const int64_t *members, int64_t count, const uint32_t *keys, const int64_t *group_of,
    const uint8_t *kept)
{
    for (int64_t i = 0; i < count; i++) {
        int64_t e = members[i];
        if (keys[e] != ABSENT_KEY && (!kept || kept[group_of[e]]))
            insert(best, keys[e], e);
    }
}

/* The experts a token found, -1 for those it lacks, and their weights. routing/base.py, choose. */
static void settle(const struct routing *r, int64_t token, const struct best *best)
{
    const float *scores = r->scores + token * r->experts;
    int64_t *chosen = r->chosen + token * r->choices;
    float *weights = r->weights + token * r->choices;
    double sum = 0;
    for (int64_t c = 0; c < r->choices; c++) {
        chosen[c] = c < best->count ? best->experts[c] : -1;
        weights[c] = c < best->count ? scores[chosen[c]] : 0;
        sum += weights[c];
    }
    float total = (float)sum + EPSILON;
    for (int64_t c = 0; c < r->choices; c++)
        weights[c] = (r->normalise ? weights[c] / total : weights[c]) * r->scale;
}

/* routing/base.py, choose_inside; without a coreset, choose of what group_limited leaves. */
static void choose(const struct routing *r)
{
    int64_t members[MOST_EXPERTS], group_of[MOST_EXPERTS], count = 0, listed = -1;
    uint32_t keys[MOST_EXPERTS];
    uint8_t kept[MOST_EXPERTS];
    struct best best;
    int limited = r->groups > 1 && r->kept_groups < r->groups;
    for (int64_t e = 0; e < r->experts; e++)
        group_of[e] = e / (r->experts / r->groups);
    for (int64_t t = 0; t < r->tokens; t++) {
        int64_t block = r->block_ids[t];
        best.count = 0;
        best.limit = r->choices;
        if (block >= 0) {
            if (listed != (r->coreset ? block : 0)) { /* neighbours mostly share a block */
                listed = r->coreset ? block : 0;
                count = 0;
                for (int64_t e = 0; e < r->experts; e++)
                    if (!r->coreset || r->coreset[block * r->experts + e])
                        members[count++] = e;
            }
            keys_of(r->selection + t * r->experts, r->experts, keys);
            if (limited) {
                limit_groups(r, members, count, keys, group_of, kept);
                pick(&best, members, count, keys, group_of, kept);
            }
            if (!limited || (r->coreset && !best.count)) /* stranded: the groups hold none of the coreset */
                pick(&best, members, count, keys, group_of, NULL);
        }
        settle(r, t, &best);
    }
}

/* routing/base.py, tally, of the experts chosen. */
static void tally(const struct routing *r)
{
    memset(r->votes, 0, (size_t)(r->blocks * r->experts) * sizeof *r->votes);
    for (int64_t t = 0; t < r->tokens; t++)
        for (int64_t c = 0; c < r->choices; c++) {
            int64_t e = r->chosen[t * r->choices + c];
            if (e >= 0)
                r->votes[r->block_ids[t] * r->experts + e] += r->selection[t * r->experts + e];
        }
}

/* Does the `stages` asked for, in their order; pointers that those don't use may be null. Returns 0; REFUSED where a size
 * is below 1 or more than there is room for; or, with nothing done, the number of blocks where there are more than
 * `blocks`. `choices` is at most `experts`, which `groups` divides; `least` is the smallest coreset.
 */
EXPORT int64_t dmoe_select(
    int stages, int64_t tokens, int64_t experts, int64_t blocks, int64_t choices, int64_t groups, int64_t kept_groups,
    int normalise, float scale, double top_p, int64_t least, const int64_t *block_ids, const float *scores,
    const float *selection, int64_t *chosen, float *weights, uint8_t *coreset, float *votes)
{
    const struct routing r = {
        .tokens = tokens,
        .experts = experts,
        .blocks = blocks,
        .choices = choices,
        .groups = groups,
        .kept_groups = kept_groups,
        .least = least,
        .normalise = normalise,
        .scale = scale,
        .top_p = top_p,
        .block_ids = block_ids,
        .scores = scores,
        .selection = selection,
        .chosen = chosen,
        .weights = weights,
        .coreset = coreset,
        .votes = votes,
    };
    if (experts > MOST_EXPERTS || choices > MOST_CHOICES || (kept_groups < groups && kept_groups > MOST_CHOICES))
        return REFUSED;
    if (groups < 1 || groups > experts || choices < 1 || kept_groups < 1)
        return REFUSED;
    int64_t last = -1;
    for (int64_t t = 0; t < tokens; t++)
        last = block_ids[t] > last ? block_ids[t] : last;
    if (last >= blocks)
        return last + 1;
    if (stages & VOTE)
        vote(&r);
    if (stages & ELECT)
        elect(&r);
    if (stages & CHOOSE)
        choose(&r);
    if (stages & TALLY)
        tally(&r);
    if (stages & FLOOR)
        for (int64_t i = 0; i < blocks * experts; i++)
            votes[i] = votes[i] < 0 ? 0 : votes[i];
    return 0;
}

/* Sorts `places` and writes what they hold with its totals. Returns how many. */
static int64_t in_order(
    uint64_t *places, int64_t count, int64_t most, const float *totals, int64_t *experts, float *scores)
{
    uint64_t spare[MOST_EXPERTS];
    sort(places, count, spare);
    count = count < most ? count : most;
    for (int64_t i = 0; i < count; i++) {
        experts[i] = (uint32_t)places[i];
        scores[i] = totals[experts[i]];
    }
    return count;
}

/* The distinct experts >= 0 among `count` of them, by falling score summed over the blocks, equals by rising index; NaN
 * counts as 0, infinities as the largest numbers. Behind them the others with a sum above 0, in the same order, at most
 * `most`. Writes to `counts` how many there are of either. Returns 0; or REFUSED, or BAD_EXPERT, which names no score.
 */
EXPORT int64_t dmoe_rank(
    int64_t count, const int64_t *chosen, int64_t experts, int64_t blocks, const float *block_scores, int64_t most,
    int64_t *ranked, float *ranked_scores, int64_t *counts)
{
    uint64_t used_places[MOST_EXPERTS], other_places[MOST_EXPERTS];
    float totals[MOST_EXPERTS];
    uint8_t used[MOST_EXPERTS] = {0};
    int64_t distinct = 0, others = 0;
    if (experts > MOST_EXPERTS)
        return REFUSED;
    for (int64_t i = 0; i < count; i++) {
        if (chosen[i] >= experts)
            return BAD_EXPERT;
        if (chosen[i] >= 0)
            used[chosen[i]] = 1;
    }
    for (int64_t e = 0; e < experts; e++) {
        double sum = 0;
        for (int64_t b = 0; b < blocks; b++)
            sum += block_scores[b * experts + e];
        float total = (float)sum;
        total = total != total ? 0 : total > FLT_MAX ? FLT_MAX : total < -FLT_MAX ? -FLT_MAX : total;
        totals[e] = total;
        if (used[e])
            used_places[distinct++] = place_of(key_of(total), e);
        else if (total > 0)
            other_places[others++] = place_of(key_of(total), e);
    }
    counts[0] = in_order(used_places, distinct, distinct, totals, ranked, ranked_scores);
    counts[1] = in_order(other_places, others, most, totals, ranked + distinct, ranked_scores + distinct);
    return 0;
}
