"""`dmoe completion SHELL`: the script by which a shell completes `dmoe` and `dmoe-run`, click's own."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, ShellComplete, get_completion_class

from offload_engine.cli.errors import ReportingCommand
from offload_engine.cli.help import examples
from offload_engine.cli.options import SETTINGS, common_options
from offload_engine.cli.terminal import Output
from offload_engine.errors import InternalError

SHELLS = ("bash", "zsh", "fish")
PROGRAMS = ("dmoe", "dmoe-run")


@click.command(
    "completion",
    cls=ReportingCommand,
    context_settings=SETTINGS,
    epilog=examples(
        'eval "$(dmoe completion bash)"                                    # in ~/.bashrc',
        'eval "$(dmoe completion zsh)"                                     # in ~/.zshrc',
        "dmoe completion fish > ~/.config/fish/completions/dmoe.fish",
    ),
)
@click.argument("shell", type=click.Choice(SHELLS))
@common_options
def completion(shell: str) -> None:
    """Print the script that makes a shell complete dmoe and dmoe-run: commands, options, files, names."""
    Output().line("\n".join(script(shell, program) for program in PROGRAMS))


def script(shell: str, program: str) -> str:
    """The script for one program, which then answers the shell's questions itself."""
    found = get_completion_class(shell)
    if found is None:
        raise InternalError(f"click has no completion for {shell}")
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    writer: ShellComplete = found(click.Command(program), {}, program, variable)
    # Bash's own `source` starts a bash to learn its version; a script that needs a newer one says so itself.
    return ShellComplete.source(writer) if isinstance(writer, BashComplete) else writer.source()
