"""What becomes of errors: one line on stderr and an exit code, a traceback only with --debug."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from offload_engine.cli.help import write_commands, write_options
from offload_engine.cli.terminal import note
from offload_engine.errors import MemoryBudgetError, OffloadError

FAILED = 1
INTERRUPTED = 130
"""What shells say of a program that SIGINT ended."""


class _Reporting:
    """Ends a click command with an exit code, having said on stderr what went wrong.

    A command returns its exit code, or None for 0. `ctx.obj["debug"]` says whether tracebacks are wanted.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """As `click.Command.main`, which it extends."""
        shared: dict[str, bool] = {}
        parent: Callable[..., Any] = super().main  # type: ignore[misc]
        code = _exit_code(lambda: parent(*args, **{**kwargs, "standalone_mode": False, "obj": shared}), shared)
        sys.exit(code)


class ReportingCommand(_Reporting, click.Command):
    """A command whose failures are one line and an exit code."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click, in sections."""
        write_options(self, ctx, formatter)


class ReportingGroup(_Reporting, click.Group):
    """A group whose commands' failures are one line and an exit code."""

    command_class = ReportingCommand

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Commands first, in sections: they are what one is looking for."""
        write_commands(self, formatter)
        write_options(self, ctx, formatter)


def _exit_code(command: Callable[[], Any], shared: dict[str, bool]) -> int:
    try:
        result = command()
    except click.ClickException as error:
        note(f"error: {_usage(error)}")
        return error.exit_code
    except click.Abort:
        note("interrupted")
        return INTERRUPTED
    except Exception as error:
        if shared.get("debug"):
            traceback.print_exc()
        message, code = _described(error)
        note(f"error: {message}")
        return code
    return result if isinstance(result, int) else 0


def _usage(error: click.ClickException) -> str:
    """Click's complaint as one line."""
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    return message if context is None else f"{message.rstrip('.')}; see '{context.command_path} --help'"


def _described(error: Exception) -> tuple[str, int]:
    """The message and the exit code of what ended a command."""
    if isinstance(error, OffloadError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch has no type for its own
        return (
            "the system refused memory that the plan doesn't account for; lower --gpu-mem, or free some memory",
            MemoryBudgetError.exit_code,
        )
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"internal error: {reason}; run with --debug for the traceback, and please report it", FAILED
