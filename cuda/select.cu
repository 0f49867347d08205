/* dMoE's routing of the tokens of a forward, in one launch: sigmoid and bias, every token's vote for its best experts, the
 * coreset of each block, each token's group-limited choice inside it with its weights, and where those experts lie. Without
 * coresets, token-level routing: the same but for vote and coreset, and block scores are summed over what was chosen.
 *
 * Decides as offload_engine/routing does (base.py, coreset.py, topk.py), given the same scores: bit for bit. So, as in
 * offload_engine/kernels/cpu/select.c, every comparison is made on the same float32 numbers and every sum runs in the same
 * order: votes token by token in float32, all other sums in double from the first to the last.
 *
 * A thread block takes a block of tokens, a warp one token at a time. Compile without contraction (-fmad=false). The same
 * source runs on a CPU against emulation/cuda_runtime.h.
 */
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "ranking.cuh"
#include "selection.h"

#ifndef DMOE_SHARED
#define DMOE_SHARED(type, name) __shared__ type name
#endif
#ifndef DMOE_SOURCES
#define DMOE_SOURCES unknown
#endif
#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARP * WARPS;
constexpr int WINDOW = 32; /* tokens that vote between two barriers */
constexpr int MOST_EXPERTS = 512;
constexpr int MOST_GROUPS = 64;
constexpr float EPSILON = 1e-20f; /* routing/base.py */
constexpr int REFUSED = -1;
constexpr int UNUSED = -2;

struct Room {
    uint64_t places[MOST_EXPERTS];
    uint32_t keys[WARPS][MOST_EXPERTS]; /* of the token a warp is at */
    uint32_t worth[WARPS][MOST_GROUPS];
    uint32_t ballots[WINDOW][MOST_EXPERTS / 32]; /* a bit per expert */
    float votes[MOST_EXPERTS];
    float shares[MOST_EXPERTS];
    int order[MOST_EXPERTS];
    uint8_t voted[MOST_EXPERTS];
    uint8_t coreset[MOST_EXPERTS];
    uint8_t used[MOST_EXPERTS];
    float total; /* of the votes */
    bool last;
};

/* routing/base.py, select_scores: a token's row, by one warp. */
__device__ void score(const dmoe_selection &s, int64_t token)
{
    for (int e = threadIdx.x % WARP; e < s.experts; e += WARP) {
        int64_t at = token * s.experts + e;
        s.scores[at] = 1.0f / (1.0f + expf(-s.logits[at]));
        s.selection[at] = s.bias ? s.scores[at] + s.bias[e] : s.scores[at];
    }
}

/* Marks a token's best experts, by one warp. */
__device__ void mark_ballot(const dmoe_selection &s, int64_t token, uint32_t *keys, uint32_t *ballot)
{
    for (int e = threadIdx.x % WARP; e < s.experts; e += WARP)
        keys[e] = key_of(s.selection[token * s.experts + e]);
    uint64_t from = 0;
    for (int c = 0; c < s.choices; c++) {
        uint64_t place = next_place(keys, s.experts, from);
        from = place + 1;
        if (threadIdx.x % WARP == 0)
            ballot[index_at(place) / 32] |= 1u << index_at(place) % 32;
    }
}

/* Makes absent what lies outside a token's best groups; inside a coreset unless nothing would be left. routing/base.py,
 * group_limited.
 */
__device__ void limit_groups(const dmoe_selection &s, uint32_t *keys, uint32_t *worth)
{
    if (s.groups <= 1 || s.kept_groups >= s.groups)
        return;
    int lane = threadIdx.x % WARP, size = s.experts / s.groups;
    for (int g = lane; g < s.groups; g += WARP) {
        uint32_t first = ABSENT_KEY, second = ABSENT_KEY;
        for (int e = g * size; e < (g + 1) * size; e++) {
            uint32_t lesser = keys[e] < first ? keys[e] : first;
            first = keys[e] > first ? keys[e] : first;
            second = lesser > second ? lesser : second;
        }
        worth[g] = size == 1 ? first : key_of(value_of(first) + value_of(second));
    }
    __syncwarp();
    uint64_t last_kept = 0;
    for (int c = 0; c < s.kept_groups; c++)
        last_kept = next_place(worth, s.groups, c ? last_kept + 1 : 0);
    bool some = !s.coreset;
    for (int e = lane; e < s.experts; e += WARP)
        some |= keys[e] != ABSENT_KEY && place_of(worth[e / size], e / size) <= last_kept;
    if (__any_sync(ALL_LANES, some))
        for (int e = lane; e < s.experts; e += WARP)
            if (place_of(worth[e / size], e / size) > last_kept)
                keys[e] = ABSENT_KEY;
    __syncwarp();
}

/* A token's best experts of those whose key isn't absent, and their weights, by one warp; marked in `ballot` too, if there
 * is one. routing/base.py, choose.
 */
__device__ void settle(const dmoe_selection &s, int64_t token, const uint32_t *keys, uint8_t *used, uint32_t *ballot)
{
    int64_t *chosen = s.chosen + token * s.choices;
    float *weights = s.weights + token * s.choices;
    double sum = 0;
    uint64_t from = 0;
    for (int c = 0; c < s.choices; c++) {
        uint64_t place = next_place(keys, s.experts, from);
        from = place + 1;
        if (threadIdx.x % WARP)
            continue;
        bool found = key_at(place) != ABSENT_KEY;
        chosen[c] = found ? index_at(place) : -1;
        weights[c] = found ? s.scores[token * s.experts + index_at(place)] : 0;
        sum += weights[c];
        if (found)
            used[index_at(place)] = 1;
        if (found && ballot)
            ballot[index_at(place) / 32] |= 1u << index_at(place) % 32;
    }
    if (threadIdx.x % WARP)
        return;
    float total = static_cast<float>(sum) + EPSILON;
    for (int c = 0; c < s.choices; c++)
        weights[c] = (s.normalise ? weights[c] / total : weights[c]) * s.scale;
}

/* routing/topk.py: a token's choice among all experts, by one warp. */
__device__ void choose_freely(const dmoe_selection &s, Room &room, int64_t token, uint32_t *ballot)
{
    uint32_t *keys = room.keys[threadIdx.x / WARP];
    for (int e = threadIdx.x % WARP; e < s.experts; e += WARP)
        keys[e] = key_of(s.selection[token * s.experts + e]);
    __syncwarp();
    limit_groups(s, keys, room.worth[threadIdx.x / WARP]);
    settle(s, token, keys, room.used, ballot);
}

/* routing/base.py, block_votes, or without coresets tally: window by window, that votes are added token by token. */
__device__ void vote(const dmoe_selection &s, Room &room)
{
    int warp = threadIdx.x / WARP, words = (s.experts + 31) / 32;
    for (int e = threadIdx.x; e < s.experts; e += THREADS) {
        room.votes[e] = 0;
        room.voted[e] = 0;
        room.used[e] = 0;
    }
    __syncthreads();
    for (int64_t first = 0; first < s.tokens; first += WINDOW) {
        for (int i = warp; i < WINDOW; i += WARPS) {
            for (int word = threadIdx.x % WARP; word < words; word += WARP)
                room.ballots[i][word] = 0;
            __syncwarp();
            if (first + i >= s.tokens || s.block_ids[first + i] != blockIdx.x)
                continue;
            if (s.logits)
                score(s, first + i);
            if (s.coreset)
                mark_ballot(s, first + i, room.keys[warp], room.ballots[i]);
            else
                choose_freely(s, room, first + i, room.ballots[i]);
        }
        __syncthreads();
        for (int e = threadIdx.x; e < s.experts; e += THREADS)
            for (int i = 0; i < WINDOW; i++)
                if (room.ballots[i][e / 32] >> e % 32 & 1) {
                    room.votes[e] += s.selection[(first + i) * s.experts + e];
                    room.voted[e] = 1;
                }
        __syncthreads();
    }
    for (int e = threadIdx.x; e < s.experts; e += THREADS)
        s.block_scores[static_cast<int64_t>(blockIdx.x) * s.experts + e] = room.votes[e] < 0 ? 0 : room.votes[e];
}

/* routing/coreset.py, top_p_coreset. */
__device__ void elect(const dmoe_selection &s, Room &room)
{
    if (threadIdx.x == 0) { /* alone: cards for consumers add few doubles at a time */
        double sum = 0;
        for (int e = 0; e < s.experts; e++)
            sum += room.votes[e];
        room.total = static_cast<float>(sum) < FLT_MIN ? FLT_MIN : static_cast<float>(sum);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < s.experts; e += THREADS) {
        room.shares[e] = room.votes[e] / room.total;
        room.places[e] = place_of(key_of(room.shares[e]), e);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < s.experts; e += THREADS)
        room.order[rank_of(room.places, s.experts, e)] = e;
    __syncthreads();
    if (threadIdx.x == 0) {
        double before = 0;
        for (int rank = 0; rank < s.experts; rank++) {
            int e = room.order[rank];
            bool passed = s.top_p >= 1 || static_cast<float>(before) <= static_cast<float>(s.top_p);
            room.coreset[e] = rank < s.least || (room.voted[e] && passed);
            before += room.shares[e];
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < s.experts; e += THREADS)
        s.coreset[static_cast<int64_t>(blockIdx.x) * s.experts + e] = room.coreset[e];
}

/* routing/base.py, choose_inside; without coresets tokens have chosen already, and only pads are left. */
__device__ void choose(const dmoe_selection &s, Room &room)
{
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int64_t t = warp; t < s.tokens; t += WARPS) {
        int64_t block = s.block_ids[t];
        if (block < 0 || block >= s.blocks) {
            for (int64_t c = t * s.choices + lane; blockIdx.x == 0 && c < (t + 1) * s.choices; c += WARP) {
                s.chosen[c] = -1;
                s.weights[c] = 0;
            }
        } else if (block == blockIdx.x && s.coreset) {
            uint32_t *keys = room.keys[warp];
            for (int e = lane; e < s.experts; e += WARP)
                keys[e] = room.coreset[e] ? key_of(s.selection[t * s.experts + e]) : ABSENT_KEY;
            __syncwarp();
            limit_groups(s, keys, room.worth[warp]);
            settle(s, t, keys, room.used, nullptr);
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < s.experts; e += THREADS)
        s.used[static_cast<int64_t>(blockIdx.x) * s.experts + e] = room.used[e];
}

/* Whether this thread block is the last to get here; it then sees what all the others have written. */
__device__ bool last_to_finish(const dmoe_selection &s, Room &room)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        room.last = atomicAdd(s.finished, 1u) == gridDim.x - 1;
        if (room.last)
            *s.finished = 0;
        __threadfence();
    }
    __syncthreads();
    return room.last;
}

/* Where the used experts are; those that are nowhere by falling score, as experts/executor.py, ranked_experts. */
__device__ void look_up(const dmoe_selection &s, Room &room)
{
    for (int e = threadIdx.x; e < s.experts; e += THREADS) {
        double sum = 0;
        bool used = false;
        for (int b = 0; b < s.blocks; b++) {
            sum += s.block_scores[static_cast<int64_t>(b) * s.experts + e];
            used |= s.used[static_cast<int64_t>(b) * s.experts + e];
        }
        float total = static_cast<float>(sum);
        total = total != total ? 0 : total > FLT_MAX ? FLT_MAX : total < -FLT_MAX ? -FLT_MAX : total;
        room.votes[e] = total;
        s.slots[e] = used ? s.table[e] : UNUSED;
        room.places[e] = used && s.table[e] < 0 ? place_of(key_of(total), e) : UINT64_MAX;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < s.experts; e += THREADS)
        if (room.places[e] != UINT64_MAX) {
            int rank = rank_of(room.places, s.experts, e);
            s.missing[1 + rank] = e;
            s.sums[rank] = room.votes[e];
        }
    int count = 0;
    for (int e = 0; e < s.experts; e++)
        count += room.places[e] != UINT64_MAX;
    for (int i = count + threadIdx.x; i < s.experts; i += THREADS) {
        s.missing[1 + i] = -1;
        s.sums[i] = 0;
    }
    if (threadIdx.x == 0)
        s.missing[0] = count;
}

__global__ void __launch_bounds__(THREADS) select_experts(const dmoe_selection s)
{
    DMOE_SHARED(Room, room);
    vote(s, room);
    if (s.coreset)
        elect(s, room);
    choose(s, room);
    if (s.table && last_to_finish(s, room))
        look_up(s, room);
}

bool fits(const dmoe_selection &s)
{
    return s.tokens >= 0 && s.blocks >= 1 && s.experts >= 1 && s.experts <= MOST_EXPERTS && s.choices >= 1 &&
           s.choices <= s.experts && s.groups >= 1 && s.groups <= MOST_GROUPS && s.experts % s.groups == 0 &&
           s.kept_groups >= 1;
}

} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

/* What the library was built from (offload_engine/kernels/cuda_build.py). */
EXPORT const char *dmoe_cuda_sources()
{
    return TEXT(DMOE_SOURCES);
}

/* What an error number means. */
EXPORT const char *dmoe_cuda_error(int error)
{
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

/* Enqueues a selection on `stream` of the current device. Returns 0, a cudaError_t, or REFUSED for sizes that don't fit. */
EXPORT int dmoe_cuda_select(const dmoe_selection *selection, void *stream)
{
    if (!fits(*selection))
        return REFUSED;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(selection->blocks));
    config.blockDim = dim3(THREADS);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, select_experts, *selection);
}
