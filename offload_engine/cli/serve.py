"""`dmoe serve`: from options to a server, and to its end."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offload_engine.cli.loading import load_engine
from offload_engine.cli.report import announce
from offload_engine.cli.terminal import note
from offload_engine.config import EngineConfig, parse_bytes
from offload_engine.errors import ConfigError, UsageError
from offload_engine.server.settings import ServerSettings

KEY_VARIABLE = "DMOE_API_KEY"
TOGETHER = 4
"""Requests that are denoised together unless the configuration says otherwise."""
NEEDED = ("fastapi", "uvicorn", "prometheus_client")
RESERVED = 24 * 2**20
"""Bytes of the process that serving takes beside the model: connections, bodies, and answers on their way."""
TOKENIZING = 600
"""And what tokenizing takes, for each byte of the longest prompt; 580 were measured at worst."""


def run_server(config: EngineConfig, options: Mapping[str, Any], key_file: Path | None) -> int:
    """Serve until told to stop; returns the exit code. Raises `OffloadError`s."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{missing[0]} is not installed; get it with: pip install 'offload-engine[serve]'")
    settings = settings_of(options, key_file)
    from offload_engine.server import logs, running

    with running.bind(settings) as listener:
        if "batch_size" not in config.model_fields_set:
            config = EngineConfig(**config.model_dump(exclude_unset=True) | {"batch_size": TOGETHER})
        # the plan counts what the process holds: so it leaves room for what serving will take
        reserve = b"\1" * (RESERVED + TOKENIZING * settings.max_prompt)
        engine = load_engine(config)
        del reserve
        with engine:
            announce(engine, whole_plan=False)
            logs.log_to(prompts=settings.log_prompts)
            url = running.url_of(listener)
            return running.serve(engine, settings, listener, lambda: note(f"serving on {url}; Ctrl-C ends it"))


def settings_of(options: Mapping[str, Any], key_file: Path | None) -> ServerSettings:
    """What was given on the command line, the key from wherever it is. Raises `ConfigError`."""
    values = {name: value for name, value in options.items() if value is not None and value != ()}
    for name in values.keys() & {"max_body", "max_prompt"}:
        values[name] = parse_bytes(values[name], f"--{name.replace('_', '-')}")
    if "api_key" in values and key_file is not None:
        raise ConfigError("--api-key and --api-key-file both say the key; leave one of them out")
    if key_file is not None:
        values["api_key"] = _read_key(key_file)
    values.setdefault("api_key", os.environ.get(KEY_VARIABLE))
    return ServerSettings(**values)


def _read_key(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path}: can't be read ({error})") from None
