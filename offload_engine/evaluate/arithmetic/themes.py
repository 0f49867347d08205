"""The kinds of story; each carries its weight and the numbers of steps it can have."""

from offload_engine.evaluate.arithmetic import (
    ages,
    bare,
    belongings,
    clock,
    comparison,
    each,
    goals,
    groups,
    measures,
    places,
    purse,
    shopping,
    unknowns,
    work,
)
from offload_engine.evaluate.arithmetic.stages import Theme

BARE: Theme = bare.THEME
THEMES: tuple[Theme, ...] = (
    belongings.THEME,
    places.THEME,
    comparison.THEME,
    shopping.THEME,
    purse.THEME,
    work.THEME,
    goals.THEME,
    measures.THEME,
    groups.THEME,
    each.THEME,
    ages.THEME,
    unknowns.THEME,
    clock.THEME,
)
