"""Generated grade-school arithmetic: word problems with worked answers, and drills of bare equations.

`problems.problem(seed, index)` and `problems.generate(seed, n)` are the way in; docs/problem-grammar.md describes the
language. `drills.drill(rng)` makes training lines of equations.
"""

from offload_engine.evaluate.arithmetic.drills import drill
from offload_engine.evaluate.arithmetic.problems import Problem, generate, problem

__all__ = ["Problem", "drill", "generate", "problem"]
