/* What a selection is asked for: the C ABI of select.cu. offload_engine/kernels/cuda.py holds the same list. */
#pragma once

#include <cstdint>

/* All pointers are the device's. */
struct dmoe_selection {
    int64_t tokens;           /* T */
    int32_t experts;          /* E */
    int32_t blocks;           /* B */
    int32_t choices;          /* k, at most E */
    int32_t groups;           /* divides E */
    int32_t kept_groups;      /* a token may choose from */
    int32_t least;            /* the smallest coreset */
    int32_t normalise;        /* weights are divided by their sum */
    float scale;              /* and multiplied with this */
    double top_p;             /* share of the votes that a coreset has to pass */
    const int64_t *block_ids; /* [T]; not in 0 to B - 1: a pad */
    const float *logits;      /* [T, E]; null: scores and selection are given */
    const float *bias;        /* [E] or null; added for selection only */
    float *scores;            /* [T, E]; of tokens that are no pads, if made of logits */
    float *selection;         /* [T, E]; likewise */
    int64_t *chosen;          /* out [T, k]; -1: none */
    float *weights;           /* out [T, k] */
    uint8_t *coreset;         /* out [B, E]; null: there is none, and tokens choose among all experts */
    float *block_scores;      /* out [B, E]: votes of all tokens for their best; without coresets, of those that chose */
    uint8_t *used;            /* out [B, E]: some token of the block chose it */
    const int32_t *table;     /* [E]: an expert's slot, -1: absent; null: nothing is looked up, the rest may be null */
    int32_t *slots;           /* out [E]: a used expert's slot or -1, -2 for the others */
    int32_t *missing;         /* out [E + 1]: how many used experts are absent, who, by falling block score, then -1 */
    float *sums;              /* out [E]: the block scores that those who are absent were ranked by, in the same order */
    uint32_t *finished;       /* thread blocks that are done: 0 before the launch and after it */
};
