"""Policies of one's own, in place of those that `EngineConfig` knows by name.

Each is handed over as something that makes one, for an engine makes its own and several engines share none: a class, or
a function without arguments (for routing: of the model's `RouterShape`). `Engine.from_pretrained` takes them where it
takes a name:

    Engine.from_pretrained(model, eviction=MostRecentlyUsed, predictor=lambda: Recurring(depth=3), routing=MyRouting)

What each has to promise is said by `EvictionPolicy`, `ExpertPredictor` and `RoutingPolicy`. An eviction policy and a
predictor decide what moves, never what is computed: whatever they do, answers stay what they are. Routing decides
answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from offload_engine.errors import ConfigError
from offload_engine.experts.scheduling.eviction import EvictionPolicy
from offload_engine.experts.scheduling.predictor import ExpertPredictor
from offload_engine.routing.base import RouterShape, RoutingPolicy

MakeEviction = Callable[[], EvictionPolicy]
MakePredictor = Callable[[], ExpertPredictor]
MakeRouting = Callable[[RouterShape], RoutingPolicy]

_PROMISED = {
    "eviction": ("name", "begin", "on_route", "on_insert", "on_use", "on_remove", "victim"),
    "predictor": ("name", "wants_preview", "begin", "offer", "predict", "observe", "counts"),
    "routing": ("name", "__call__"),
}
"""What each kind of policy must have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Custom:
    """What makes an engine's policies where it is not the config; None: the config does."""

    eviction: MakeEviction | None = None
    predictor: MakePredictor | None = None
    routing: MakeRouting | None = None

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> Self:
        """Those of `options` that are no names; they are removed there."""
        own = {name: options[name] for name in _PROMISED if callable(options.get(name))}
        for name in own:
            del options[name]
        return cls(**own)

    @property
    def notices(self) -> list[str]:
        """What the user should know: which options of the config have no effect."""
        return [f"{name} is a policy of one's own" for name in _PROMISED if getattr(self, name) is not None]

    def make_eviction(self, make: MakeEviction) -> EvictionPolicy:
        """A fresh one, made by `make` where there is none of one's own."""
        return make() if self.eviction is None else _checked("eviction", self.eviction())

    def make_predictor(self, make: MakePredictor) -> ExpertPredictor:
        """Likewise."""
        return make() if self.predictor is None else _checked("predictor", self.predictor())

    def make_routing(self, shape: RouterShape) -> RoutingPolicy | None:
        """A fresh one for routers of this shape; None where there is none of one's own."""
        return None if self.routing is None else _checked("routing", self.routing(shape))


def _checked(option: str, made: Any) -> Any:
    """`made`, if it looks like a policy of that kind. Raises `ConfigError`: better now than in mid-answer."""
    missing = [name for name in _PROMISED[option] if not hasattr(made, name)]
    if missing:
        raise ConfigError(
            f"{option} makes a {type(made).__name__}, which lacks {', '.join(missing)}; "
            f"see offload_engine.engine.extending for what a policy of one's own must have"
        )
    return made
