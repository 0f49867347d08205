"""Which expert is in which slot. No torch, no I/O, no clock, no thread: whoever calls serialises the calls."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from offload_engine.core import ExpertKey, ForwardInfo
from offload_engine.errors import InternalError
from offload_engine.experts.scheduling.eviction import EvictionPolicy
from offload_engine.experts.scheduling.outlook import Outlook


class SlotState(StrEnum):
    """FREE → LOADING → RESIDENT → FREE."""

    FREE = "free"
    """Of a key: it has no slot."""
    LOADING = "loading"
    """The slot is being written; neither readable nor evictable."""
    RESIDENT = "resident"
    """Readable; evictable unless pinned."""


_FREE, _LOADING, _RESIDENT = SlotState  # to look a member up costs more than a state's other work


class Reservation(NamedTuple):
    """A slot that now belongs to a LOADING key."""

    slot: int
    evicted: ExpertKey | None
    """Whose slot it was until now; None where it was free."""


class Resized(NamedTuple):
    """What became of the experts when the number of slots changed."""

    evicted: tuple[ExpertKey, ...]
    """Those that had no place any more, in the order of their eviction."""
    moves: tuple[tuple[int, int], ...]
    """(from, to) of the slots whose bytes have to be copied before the slots from which they come are given up."""


class Occupancy(NamedTuple):
    """Slots by state, `free + loading + resident` being all of them; and how many of those taken are marked."""

    free: int
    loading: int
    resident: int
    probation: int
    """Loading or resident on a prediction, and not wanted yet."""
    pinned: int
    """Resident with at least one pin."""


class ExpertCache:
    """Maps experts to a fixed number of slots.

    Only an unpinned RESIDENT expert is ever evicted. One that was prefetched is on probation until it is wanted
    (`promote`) or used: a demand evicts probationers first, the oldest prediction first, and asks the policy
    only when there are none. A prefetch takes a free slot; failing that it takes a place from the policy's victim while
    fewer than `probation_limit` are on probation, and from the oldest probationer when that many are. So predictions,
    however wrong, displace at most `probation_share` of the slots. The policy knows nothing of probationers.

    What a layer has yet to ask for, once it said so (`expect`), goes only where nothing else may.

    Methods that change a key raise `InternalError` when its state does not allow it, and then change nothing.
    """

    def __init__(self, slots: int, policy: EvictionPolicy, probation_share: float = 0.25) -> None:
        if slots < 0 or not 0.0 <= probation_share <= 1.0:
            raise InternalError(
                f"a cache of {slots} slots with a probationary share of {probation_share}; "
                "wanted at least 0 slots and a share of 0 to 1"
            )
        self.slots = slots
        self.policy = policy
        self._blank_policy = copy.deepcopy(policy)
        self._probation_share = probation_share
        self._keys: list[ExpertKey | None] = [None] * slots
        self._slot_of: dict[ExpertKey, int] = {}
        self._free = list(reversed(range(slots)))
        """A stack whose first use hands out the lowest slot first."""
        self._loading: set[ExpertKey] = set()
        self._pins: dict[ExpertKey, int] = {}
        """Counts above 0 only."""
        self._probation: OrderedDict[ExpertKey, None] = OrderedDict()
        """By age of the prediction, oldest first."""
        self._expected: frozenset[ExpertKey] = frozenset()
        """What the layer under way has still to ask for."""
        self._lent: int | None = None
        """The layer of which nothing is evicted."""

    @property
    def probation_limit(self) -> int:
        """How many slots may be taken from residents for what was only predicted."""
        return int(self.slots * self._probation_share)

    @property
    def has_free(self) -> bool:
        """Whether a slot may be had without evicting anything."""
        return bool(self._free)

    def begin(self, info: ForwardInfo) -> None:
        """A forward starts; the policy is told."""
        self.policy.begin(info)

    def route(self, layer: int, experts: Sequence[int], outlook: Outlook) -> None:
        """`layer` routed and wants these experts; the policy is told."""
        self.policy.on_route(layer, experts, outlook)

    def expect(self, keys: Iterable[ExpertKey]) -> None:
        """These, which may have no slot, will be wanted by the layer under way; replaces what was expected before."""
        self._expected = frozenset(keys)

    def lend(self, layer: int | None) -> None:
        """From now on nothing of `layer` is evicted, as if all of it were pinned; None: of no layer."""
        self._lent = layer

    def state(self, key: ExpertKey) -> SlotState:
        """Where `key` stands; FREE where it has no slot."""
        if key in self._loading:
            return _LOADING
        return _RESIDENT if key in self._slot_of else _FREE

    def slot(self, key: ExpertKey) -> int | None:
        """The slot that holds `key`, None unless it is RESIDENT."""
        return None if key in self._loading else self._slot_of.get(key)

    def on_probation(self, key: ExpertKey) -> bool:
        """Whether `key` was prefetched and neither promoted nor used since."""
        return key in self._probation

    def pins(self, key: ExpertKey) -> int:
        """How many pins hold `key`."""
        return self._pins.get(key, 0)

    def reserve(self, key: ExpertKey, *, prefetch: bool) -> Reservation | None:
        """FREE → LOADING, evicting if need be. None, and nothing changed, where no slot may be had now."""
        self._expect(key, _FREE, "reserved")
        evicted = None
        if not self._free:
            evicted = self._prefetch_victim() if prefetch else self._demand_victim()
            if evicted is None:
                return None
            self._evict(evicted)
        slot = self._free.pop()
        self._keys[slot] = key
        self._slot_of[key] = slot
        self._loading.add(key)
        if prefetch:
            self._probation[key] = None
        return Reservation(slot, evicted)

    def loaded(self, key: ExpertKey) -> None:
        """LOADING → RESIDENT."""
        self._expect(key, _LOADING, "loaded")
        self._loading.remove(key)
        if key not in self._probation:
            self.policy.on_insert(key)

    def failed(self, key: ExpertKey) -> None:
        """LOADING → FREE."""
        self._expect(key, _LOADING, "given up")
        self._loading.remove(key)
        self._probation.pop(key, None)
        self._release(key)

    def promote(self, key: ExpertKey) -> bool:
        """A LOADING or RESIDENT key is wanted after all: its probation, if any, ends. Returns whether it was on it."""
        if key not in self._slot_of:
            raise InternalError(f"{key} is promoted but has no slot")
        if key not in self._probation:
            return False
        del self._probation[key]
        if key not in self._loading:
            self.policy.on_insert(key)
        return True

    def pin(self, key: ExpertKey) -> int:
        """Keep a RESIDENT key from eviction until `unpin` was called once for every `pin`. Returns its slot."""
        self._expect(key, _RESIDENT, "pinned")
        self._pins[key] = self._pins.get(key, 0) + 1
        return self._slot_of[key]

    def unpin(self, key: ExpertKey) -> None:
        """Take back one `pin`."""
        count = self._pins.pop(key, 0)
        if not count:
            raise InternalError(f"{key} is unpinned more often than it was pinned")
        if count > 1:
            self._pins[key] = count - 1

    def claim(self, key: ExpertKey) -> tuple[SlotState, int]:
        """A layer wants `key`: its probation ends (`promote`), and if RESIDENT it is pinned. Returns its state, and its
        slot or -1.
        """
        slot = self._slot_of.get(key, -1)
        if slot < 0:
            return _FREE, slot
        if key in self._probation:
            self.promote(key)
        if key in self._loading:
            return _LOADING, slot
        self._pins[key] = self._pins.get(key, 0) + 1
        return _RESIDENT, slot

    def release(self, key: ExpertKey, score: float) -> None:
        """The layer that claimed `key`, with block score `score`, is through with it: it was used (`use`), and its pin
        is taken back.
        """
        if self._pins.get(key) == 1:
            del self._pins[key]
        else:
            self.unpin(key)
        if key in self._probation:
            self.promote(key)
        self.policy.on_use(key, score)

    def use(self, key: ExpertKey, score: float) -> None:
        """A RESIDENT key was computed with, wanted with block score `score`; ends its probation."""
        self._expect(key, _RESIDENT, "used")
        if key in self._probation:
            self.promote(key)
        self.policy.on_use(key, score)

    def reset(self, loading: Mapping[ExpertKey, int]) -> None:
        """Forget everything, as after an interrupt half way through any method: all slots are FREE but those of
        `loading`, which are being written. The policy forgets as well.
        """
        self.policy = copy.deepcopy(self._blank_policy)
        self._slot_of = dict(loading)
        self._loading = set(loading)
        key_of = {slot: key for key, slot in loading.items()}
        self._keys = [key_of.get(slot) for slot in range(self.slots)]
        self._free = [slot for slot in reversed(range(self.slots)) if slot not in key_of]
        self._pins = {}
        self._lent = None
        self._probation = OrderedDict()

    def shrink(self, slots: int) -> None:
        """Do with the first `slots` slots from now on. Those behind them must be FREE, else `InternalError`."""
        if any(key is not None for key in self._keys[slots:]):
            raise InternalError(f"a cache is to shrink to {slots} slots, but holds experts behind them")
        del self._keys[slots:]
        self._free = [slot for slot in self._free if slot < slots]
        self.slots = len(self._keys)

    def resize(self, slots: int) -> Resized:
        """Have `slots` slots, at least 1, from now on: new ones come behind, or the last ones go. What then has no
        place is evicted as for a demand; who stays and was in a slot that goes gets another.

        Raises `InternalError`, with nothing changed, while anything is LOADING or pinned.
        """
        if slots < 1 or self._loading or self._pins:
            raise InternalError(f"{self.slots} slots were to become {slots} at {self.occupancy()}")
        self._expected = frozenset()
        evicted = []
        while len(self._slot_of) > slots:
            victim = self._demand_victim()
            if victim is None:
                raise InternalError(f"the eviction policy {self.policy.name} names no victim at {self.occupancy()}")
            self._evict(victim)
            evicted.append(victim)
        keys = self._keys[:slots] + [None] * (slots - self.slots)
        free = [slot for slot in reversed(range(slots)) if keys[slot] is None]
        moves = []
        for slot, key in enumerate(self._keys[slots:], start=slots):
            if key is not None:
                target = free.pop()
                keys[target] = key
                self._slot_of[key] = target
                moves.append((slot, target))
        self.slots, self._keys, self._free = slots, keys, free
        return Resized(tuple(evicted), tuple(moves))

    def occupancy(self) -> Occupancy:
        """How many slots are in each state."""
        loading = len(self._loading)
        return Occupancy(
            free=len(self._free),
            loading=loading,
            resident=len(self._slot_of) - loading,
            probation=len(self._probation),
            pinned=len(self._pins),
        )

    def resident_keys(self) -> list[ExpertKey]:
        """Every RESIDENT key, by rising slot. O(slots)."""
        return [key for key in self._keys if key is not None and key not in self._loading]

    def states(self) -> dict[ExpertKey, SlotState]:
        """Every key that has a slot, and whether it is LOADING or RESIDENT. O(slots)."""
        loading = self._loading
        return {key: SlotState.LOADING if key in loading else SlotState.RESIDENT for key in self._slot_of}

    def held(self, keys: Iterable[ExpertKey]) -> list[ExpertKey]:
        """Those of `keys` that have a slot, LOADING or RESIDENT, in the order given."""
        return [key for key in keys if key in self._slot_of]

    def check(self) -> None:
        """Raise `InternalError` unless every slot is in exactly one state and all books agree. O(slots)."""
        occupancy = self.occupancy()
        taken = {slot for slot, key in enumerate(self._keys) if key is not None}
        resident = set(self.resident_keys())
        laws = {
            "free + loading + resident = slots": sum(occupancy[:3]) == self.slots == len(self._keys),
            "each slot is free or taken": sorted([*self._free, *taken]) == list(range(self.slots)),
            "keys and slots map to each other": len(taken) == len(self._slot_of)
            and all(self._keys[slot] == key for key, slot in self._slot_of.items()),
            "what loads has a slot": self._loading <= self._slot_of.keys(),
            "only residents are pinned": self._pins.keys() <= resident and all(n > 0 for n in self._pins.values()),
            "what is on probation has a slot": self._probation.keys() <= self._slot_of.keys(),
        }
        broken = [law for law, holds in laws.items() if not holds]
        if broken:
            raise InternalError(f"the expert cache broke its law {'; '.join(broken)} at {occupancy}")

    def _demand_victim(self) -> ExpertKey | None:
        return (
            self._oldest_probationer(self._spare)
            or self.policy.victim(self._spare)
            or self._oldest_probationer(self._unpinned)
            or self.policy.victim(self._unpinned)
        )

    def _prefetch_victim(self) -> ExpertKey | None:
        victim = self.policy.victim(self._spare) if len(self._probation) < self.probation_limit else None
        return victim or self._oldest_probationer(self._spare)

    def _oldest_probationer(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        return next((key for key in self._probation if key not in self._loading and evictable(key)), None)

    def _unpinned(self, key: ExpertKey) -> bool:
        return key not in self._pins and key.layer != self._lent

    def _spare(self, key: ExpertKey) -> bool:
        return key not in self._pins and key.layer != self._lent and key not in self._expected

    def _evict(self, key: ExpertKey) -> None:
        if key in self._probation:
            del self._probation[key]
        else:
            self.policy.on_remove(key)
        self._release(key)

    def _release(self, key: ExpertKey) -> None:
        slot = self._slot_of.pop(key)
        self._keys[slot] = None
        self._free.append(slot)

    def _expect(self, key: ExpertKey, wanted: SlotState, verb: str) -> None:
        found = self.state(key)
        if found is not wanted:
            raise InternalError(f"{key} is {verb} while {found}; wanted {wanted}")
