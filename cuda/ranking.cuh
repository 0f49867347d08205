/* The one order in which all numbers rank: as in a stable falling sort, NaN first, then falling, equals (and the two zeros)
 * by rising index.
 */
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;
constexpr uint32_t NAN_KEY = UINT32_MAX;
constexpr uint32_t ABSENT_KEY = ~0xFF800000u; /* of -inf: not to be chosen */

/* An order-preserving integer. */
__device__ uint32_t key_of(float value)
{
    if (value != value)
        return NAN_KEY;
    if (value == 0)
        return 0x80000000u;
    uint32_t bits = __float_as_uint(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ float value_of(uint32_t key)
{
    return __uint_as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}

/* What rises as keys fall and, among equals, as indices rise; no two are equal. */
__device__ uint64_t place_of(uint32_t key, int index)
{
    return static_cast<uint64_t>(~key) << 32 | static_cast<uint32_t>(index);
}

__device__ uint32_t key_at(uint64_t place)
{
    return ~static_cast<uint32_t>(place >> 32);
}

__device__ int index_at(uint64_t place)
{
    return static_cast<int>(static_cast<uint32_t>(place));
}

/* To every lane of a warp: the first place among those of `keys` that isn't before `from`. A lane reads every 32nd key, as
 * all loops here write them.
 */
__device__ uint64_t next_place(const uint32_t *keys, int count, uint64_t from)
{
    uint64_t best = UINT64_MAX;
    for (int i = threadIdx.x % WARP; i < count; i += WARP) {
        uint64_t place = place_of(keys[i], i);
        best = place >= from && place < best ? place : best;
    }
    for (int distance = WARP / 2; distance; distance /= 2) {
        uint64_t other = __shfl_xor_sync(ALL_LANES, best, distance);
        best = other < best ? other : best;
    }
    return best;
}

/* How many of the first `count` places come before that of `index`. */
__device__ int rank_of(const uint64_t *places, int count, int index)
{
    int rank = 0;
    for (int i = 0; i < count; i++)
        rank += places[i] < places[index];
    return rank;
}

} // namespace
