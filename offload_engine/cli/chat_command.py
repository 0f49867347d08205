"""The command `dmoe chat` and its options."""

from __future__ import annotations

from typing import Any

import click

from offload_engine.cli.errors import ReportingCommand
from offload_engine.cli.help import examples
from offload_engine.cli.options import (
    SETTINGS,
    common_options,
    engine_options,
    sampling_options,
    take_engine_config,
    take_sampling_params,
)


@click.command(
    "chat",
    cls=ReportingCommand,
    context_settings=SETTINGS,
    epilog=examples(
        "dmoe chat --gpu-mem 8GB",
        "dmoe chat --model DIR --gpu-mem 12GB --routing dmoe --system 'Answer in one sentence.'",
        "printf 'How many are 2 and 2?\\nAnd 3 more?\\n' | dmoe chat",
    ),
)
@click.option("--system", metavar="TEXT", help="A system message that the conversation begins with.")
@engine_options
@sampling_options
@common_options
def chat(**options: Any) -> int:
    """Hold a conversation: every answer knows what was said before.

    At the prompt /help lists the commands. Ctrl-C ends the answer under way and keeps what was decided, Ctrl-D ends the
    conversation. Where standard input is no terminal, each of its lines is a turn.
    """
    config, params = take_engine_config(options), take_sampling_params(options)
    from offload_engine.cli.chat import converse

    return converse(config, params, options["system"])
