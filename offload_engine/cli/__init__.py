"""The command line: `dmoe-run` and the group `dmoe`. Modules that need torch are imported when a command runs."""

from offload_engine.cli.commands import main, run_main

__all__ = ["main", "run_main"]
