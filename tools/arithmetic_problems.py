"""Prints generated arithmetic word problems as JSON lines."""

import json
import sys
from pathlib import Path

import click

if __package__ in (None, ""):  # run as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from offload_engine.evaluate.arithmetic import generate


@click.command()
@click.option("--n", "count", type=click.IntRange(min=0), default=10, show_default=True, help="Number of problems.")
@click.option("--seed", type=int, default=0, show_default=True, help="The sequence to print (1 is for training).")
def main(count: int, seed: int) -> None:
    """Print the first N problems of a seed, one JSON object a line: question, answer and gold."""
    for made in generate(seed, count):
        print(json.dumps({"question": made.question, "answer": made.answer, "gold": made.gold}))


if __name__ == "__main__":
    main()
