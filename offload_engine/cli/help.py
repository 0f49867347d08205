"""How `--help` reads: commands and options in groups, a line for each command, examples at the end."""

from __future__ import annotations

from typing import Any

import click

SECTIONS: dict[str, dict[str, str]] = {
    "Answer": {
        "run": "Answer prompts from files, standard input or the command line.",
        "chat": "Hold a conversation at the terminal.",
        "serve": "Answer OpenAI clients over HTTP, with a page that shows denoising.",
    },
    "Fit a model to a machine": {
        "doctor": "Say what of this machine helps or hinders a run.",
        "plan": "Show how a memory budget would be divided.",
        "tune": "Search for the options a budget is best spent with.",
        "simulate": "Predict the speed of another machine from a recorded trace.",
        "convert": "Pack a checkpoint's experts, in fewer bits if wanted.",
    },
    "Measure": {
        "eval": "Accuracy, unique experts and speed on a task.",
        "bench": "The engine against memory-mapped weights and other engines.",
    },
    "More": {
        "completion": "Print a shell's completion script.",
        "version": "Show the version.",
    },
}
"""Commands in the order in which they are shown, each with what it does in one line."""


def examples(*lines: str) -> str:
    """The epilog of a command: what a user might type."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


class SectionOption(click.Option):
    """An option that is shown below a heading of its own."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


def write_options(command: click.Command, context: click.Context, formatter: click.HelpFormatter) -> None:
    """The command's own options first, then those of each section."""
    sections: dict[str, list[tuple[str, str]]] = {"Options": []}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
    for title, records in sections.items():
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


def write_commands(group: click.Group, formatter: click.HelpFormatter) -> None:
    """Every command of the group below its section; one that nobody has put anywhere comes last, in its own words."""
    commands = dict(group.commands)
    for title, summaries in SECTIONS.items():
        rows = [(name, text) for name, text in summaries.items() if commands.pop(name, None) is not None]
        if title == "More":
            rows += [(name, command.get_short_help_str(90)) for name, command in sorted(commands.items())]
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)
