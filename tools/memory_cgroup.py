"""Runs a command in a memory control group of its own: `python -m tools.memory_cgroup --limit 1.2GB -- command...`

The limit is that of `offload_engine.bench.cgroup`; at the end the largest use and the kernel's kills are told.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

if __package__ in (None, ""):  # run as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from offload_engine.bench.cgroup import run_limited
from offload_engine.config import format_bytes, parse_bytes
from offload_engine.errors import OffloadError


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--limit", required=True, help="Most memory in use at once, page cache included, such as 1.2GB.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def main(limit: str, command: tuple[str, ...]) -> None:
    """Run COMMAND within a limit of memory and report its peak."""
    try:
        ended = run_limited(command, parse_bytes(limit, "--limit"))
    except OffloadError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    peak = "unknown" if ended.peak is None else format_bytes(ended.peak)
    click.echo(f"peak {peak} of {format_bytes(ended.limit)} allowed, {ended.oom_kills} OOM kills", err=True)
    raise SystemExit(ended.returncode if ended.returncode >= 0 else 128 - ended.returncode)


if __name__ == "__main__":
    main()
