"""The command `dmoe serve` and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from offload_engine.cli.errors import ReportingCommand
from offload_engine.cli.options import PATH, SETTINGS, common_options, engine_options, take_engine_config


@click.command("serve", cls=ReportingCommand, context_settings=SETTINGS)
@click.option("--host", metavar="ADDRESS", help="Address to listen on; other than loopback only with an API key.")
@click.option("--port", type=click.INT, metavar="N", help="0: any free one.  [default: 8000]")
@click.option(
    "--api-key", metavar="TEXT", help="What clients must send; others see it in the list of processes: see below."
)
@click.option("--api-key-file", type=PATH, metavar="FILE", help="A file that holds the key.")
@click.option("--served-model-name", metavar="TEXT", help="The model's id for clients.  [default: its name]")
@click.option("--max-waiting", type=click.INT, metavar="N", help="Requests that may wait.  [default: 64]")
@click.option("--deadline", type=click.FLOAT, metavar="SECONDS", help="Time a request may take.  [default: 600]")
@click.option("--max-body", metavar="SIZE", help="Largest body of a request.  [default: 1MiB]")
@click.option("--max-prompt", metavar="SIZE", help="Longest prompt, in UTF-8.  [default: 64KiB]")
@click.option("--max-connections", type=click.INT, metavar="N", help="Connections answered.  [default: 256]")
@click.option(
    "--patience",
    type=click.FLOAT,
    metavar="SECONDS",
    help="Time a client may take to send headers, to send a body, to take what it is sent.  [default: 20]",
)
@click.option(
    "--drain",
    type=click.FLOAT,
    metavar="SECONDS",
    help="Time that answers under way have once the server is told to stop.  [default: 60]",
)
@click.option(
    "--allow-origin",
    "allow_origins",
    multiple=True,
    metavar="ORIGIN",
    help="A page elsewhere that may use the server, as http://localhost:3000; may be given several times.",
)
@click.option("--log-prompts", is_flag=True, help="Log prompts as well.")
@engine_options
@common_options
def serving(**options: Any) -> int:
    """Serve a model to OpenAI's clients, and a page that shows denoising.

    Listens on 127.0.0.1:8000 until SIGTERM or Ctrl-C; then answers what is under way, and a second signal ends at once.
    The API key is --api-key's, else that of --api-key-file, else the environment's DMOE_API_KEY. One JSON object per
    request goes to standard output, everything else to standard error. Several requests are denoised together:
    --batch-size, here 4 unless told otherwise.
    """
    config = take_engine_config(options)
    from offload_engine.cli.serve import run_server

    key_file: Path | None = options.pop("api_key_file")
    return run_server(config, options, key_file)
