"""Prints generated arithmetic word problems as JSON lines."""

import itertools
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import click

if __package__ in (None, ""):  # run as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from offload_engine.evaluate.arithmetic import Problem, generate, problem


@click.command()
@click.option("--n", "count", type=click.IntRange(min=0), default=10, show_default=True, help="Number of problems.")
@click.option("--seed", type=int, default=0, show_default=True, help="The sequence to print (1 is for training).")
@click.option("--unlike", type=int, multiple=True, help="Leave out the questions of this seed, too.")
@click.option("--unlike-n", type=click.IntRange(min=1), default=10_000, show_default=True, help="So many of each.")
def main(count: int, seed: int, unlike: tuple[int, ...], unlike_n: int) -> None:
    """Print the first N problems of a seed, one JSON object a line: question, answer and gold.

    With --unlike, those of them that the other sequences don't hold, each once: training data that leaves an evaluation
    set unseen.
    """
    seen = {made.question for other in unlike for made in generate(other, unlike_n)}
    for made in islice(_unseen(seed, seen), count) if unlike else generate(seed, count):
        print(json.dumps({"question": made.question, "answer": made.answer, "gold": made.gold}))


def _unseen(seed: int, seen: set[str]) -> Iterator[Problem]:
    """The problems of a seed whose question isn't in `seen`, each once."""
    for index in itertools.count():
        made = problem(seed, index)
        if made.question not in seen:
            seen.add(made.question)
            yield made


if __name__ == "__main__":
    main()
