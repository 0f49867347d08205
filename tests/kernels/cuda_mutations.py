"""Bugs to plant in the CUDA kernels, each with the case that has to show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Edit = Callable[[str], str]


class Mutation(NamedTuple):
    bug: str
    shown_by: str
    """Name of a case of cuda_cases.py."""
    edits: tuple[Edit, ...]


def _once(text: str, part: str) -> int:
    assert text.count(part) == 1, f"{part!r} is in the kernel {text.count(part)} times, wanted once"
    return text.index(part)


def instead(old: str, new: str) -> Edit:
    """With `new` where `old` is."""

    def edit(text: str) -> str:
        at = _once(text, old)
        return text[:at] + new + text[at + len(old) :]

    return edit


def without_next(wait: str, anchor: str) -> Edit:
    """Without the first `wait` after `anchor`."""

    def edit(text: str) -> str:
        at = text.index(wait, _once(text, anchor))
        return text[:at] + text[at + len(wait) :]

    return edit


def bug(name: str, shown_by: str, *edits: Edit) -> Mutation:
    return Mutation(name, shown_by, edits)


def no_barrier(name: str, shown_by: str, anchor: str, *others: Edit) -> Mutation:
    return Mutation(f"no barrier {name}", shown_by, (without_next("__syncthreads();", anchor), *others))


RANKING = [
    bug(
        "ties to the higher index",
        "ties",
        instead("| static_cast<uint32_t>(index)", "| ~static_cast<uint32_t>(index)"),
        instead("static_cast<int>(static_cast<uint32_t>(place))", "static_cast<int>(~static_cast<uint32_t>(place))"),
    ),
    bug("NaN last", "NaN and infinities", instead("return NAN_KEY;", "return 0;")),
    bug("the two zeros differ", "two zeros", instead("if (value == 0)", "if (false)")),
    bug("negatives in rising order", "three blocks, a bias", instead("bits >> 31 ? ~bits :", "bits >> 31 ? bits :")),
]

VOTING = [
    bug("pads vote", "pads", instead("s.block_ids[first + i] != blockIdx.x", "s.block_ids[first + i] > blockIdx.x")),
    bug(
        "every block's tokens vote",
        "three blocks, a bias",
        instead("s.block_ids[first + i] != blockIdx.x", "s.block_ids[first + i] < 0"),
    ),
    bug(
        "ballots of the window before",
        "three blocks, a bias",
        instead("room.ballots[i][word] = 0;", "room.ballots[i][word] &= first ? ~0u : 0u;"),
    ),
    bug(
        "votes added from the last token to the first",
        "a block",
        instead("for (int i = 0; i < WINDOW; i++)", "for (int i = WINDOW; i-- > 0;)"),
    ),
    bug(
        "the best gets no vote",
        "a block",
        instead("== 0)\n            ballot[", "== 0 && c)\n            ballot["),
    ),
]

ELECTING = [
    bug(
        "the total in float32",
        "the precision of the total",
        instead("double sum = 0;\n        for (int e = 0;", "float sum = 0;\n        for (int e = 0;"),
    ),
    bug(
        "the total from the last",
        "the order of the total",
        instead(
            "int e = 0; e < s.experts; e++)\n            sum +=", "int e = s.experts; e-- > 0;)\n            sum +="
        ),
    ),
    bug("the running sum in float32", "last bit 2", instead("double before = 0;", "float before = 0;")),
    bug(
        "no floor under the total",
        "all zero",
        instead("static_cast<float>(sum) < FLT_MIN ? FLT_MIN : static_cast<float>(sum)", "static_cast<float>(sum)"),
    ),
    bug(
        "the expert that crosses is left out",
        "a block",
        instead("static_cast<float>(before) <= ", "static_cast<float>(before + room.shares[e]) <= "),
    ),
    bug(
        "below top_p instead of up to it",
        "last bit 0",
        instead("static_cast<float>(before) <= ", "static_cast<float>(before) < "),
    ),
    bug("top_p of 1 as any other", "NaN, and all of the votes", instead("s.top_p >= 1 || ", "")),
    bug("no smallest coreset", "three blocks, a bias", instead("rank < s.least || ", "")),
    bug("a smallest coreset of one more", "three blocks, a bias", instead("rank < s.least", "rank <= s.least")),
    bug("experts without a vote", "blocks in disorder, some idle", instead("room.voted[e] && passed", "passed")),
    bug("negative block scores", "negative votes", instead("room.votes[e] < 0 ? 0 : room.votes[e]", "room.votes[e]")),
]

CHOOSING = [
    bug("outside the coreset", "a block", instead("room.coreset[e] ? key_of", "true ? key_of")),
    bug(
        "a group is worth its best alone",
        "a block",
        instead("size == 1 ? first : key_of(value_of(first) + value_of(second))", "first"),
    ),
    bug("groups of one are worth two", "groups of one", instead("size == 1 ? first : key_of", "key_of")),
    bug("groups unlimited", "a block", instead("if (s.groups <= 1 || s.kept_groups >= s.groups)", "if (true)")),
    bug("a group too many", "a block", instead("c < s.kept_groups", "c <= s.kept_groups")),
    bug("stranded tokens get nothing", "stranded", instead("__any_sync(ALL_LANES, some)", "true")),
    bug("a lane decides alone who is stranded", "a block", instead("__any_sync(ALL_LANES, some)", "some")),
    bug("pads keep what was there", "pads", instead("s.chosen[c] = -1;", "")),
    bug("pads keep their weights", "pads", instead("s.weights[c] = 0;", "")),
    bug("weights from selection", "three blocks, a bias", instead("found ? s.scores[", "found ? s.selection[")),
    bug("the weights' sum in float32", "a block", instead("double sum = 0;\n    uint", "float sum = 0;\n    uint")),
    bug("weights always normalised", "weights as they are", instead("s.normalise ? ", "true ? ")),
    bug("weights not scaled", "a block", instead(" * s.scale", "")),
]

UNCONFINED = [
    bug(
        "votes for what is barred",
        "k above what the groups hold, no coreset",
        instead("if (found && ballot)", "if (ballot)"),
    ),
    bug("what is chosen gets no vote", "a block, no coreset", instead("if (found && ballot)", "if (false)")),
    bug(
        "all experts vote for their best as for a coreset",
        "three blocks, a bias, no coreset",
        instead("if (s.coreset)\n                mark_ballot", "if (true)\n                mark_ballot"),
    ),
    bug("barred groups are let in", "groups of nothing", instead("bool some = !s.coreset", "bool some = false")),
    no_barrier("before the first choice", "blocks in disorder, some idle, no coreset", "room.used[e] = 0;"),
]

LOOKING_UP = [
    bug("the first block's experts only", "three blocks, a bias", instead("b < s.blocks; b++", "b < 1; b++")),
    bug(
        "the first to finish looks up",
        "three blocks, a bias",
        instead(
            "room.last = atomicAdd(s.finished, 1u) == gridDim.x - 1", "unsigned before = atomicAdd(s.finished, 1u)"
        ),
        instead("if (room.last)", "room.last = before == 0;\n        if (before == gridDim.x - 1)"),
    ),
    bug("the count is not reset", "a block", instead("*s.finished = 0;", ";")),
    bug("unused experts are missing", "a block", instead("used && s.table[e] < 0", "s.table[e] < 0")),
    bug("missing by rising index", "a block", instead("place_of(key_of(total), e)", "place_of(0, e)")),
    bug(
        "scores of the missing by index",
        "a block",
        instead("s.sums[rank] = room.votes[e];", "s.sums[e] = room.votes[e];"),
    ),
    bug("scores not filled up", "a block", instead("s.sums[i] = 0;", "")),
    bug("missing not filled up", "a block", instead("s.missing[1 + i] = -1;", "")),
    bug("slots of unused experts", "a block", instead("used ? s.table[e] : UNUSED", "s.table[e]")),
    bug("NaN ranks first among the missing", "NaN and infinities", instead("total != total ? 0 : ", "")),
]

WITHIN = instead("int e = room.order[rank];", "int e = room.order[rank] & 0xFF;")
"""Keeps garbage from being an address: a case is to show the bug, not a crash."""

WAITING = [
    no_barrier("between voting and adding", "a block", "mark_ballot(s, first"),
    no_barrier("between adding and the next window", "three blocks, a bias", "room.voted[e] = 1;"),
    no_barrier("after the total", "a block", "room.total = "),
    no_barrier("after the shares", "a block", "room.places[e] = place_of(key_of(room.shares[e]), e);", WITHIN),
    no_barrier("after the order", "a block", "room.order[rank_of(", WITHIN),
    no_barrier("after the coreset", "a block", "before += room.shares[e];"),
    no_barrier("after the choice", "blocks in disorder, some idle", "settle(s, t, keys"),
    no_barrier("before a block counts as finished", "blocks that race, no coreset", "bool last_to_finish("),
    no_barrier("after the count", "three blocks, a bias", "*s.finished = 0;"),
    no_barrier("before the missing are ranked", "a block", "e) : UINT64_MAX;"),
    bug(
        "groups are ranked before all keys are there",
        "a block",
        without_next("__syncwarp();", "room.coreset[e] ? key_of"),
    ),
    bug(
        "a barrier that most never reach",
        "a block",
        instead("room.last = atomicAdd", "__syncthreads();\n        room.last = atomicAdd"),
    ),
]

MUTATIONS = [*RANKING, *VOTING, *ELECTING, *CHOOSING, *UNCONFINED, *LOOKING_UP, *WAITING]
