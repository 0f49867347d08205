"""Driving the command line in tests: checkpoints that speak bytes, commands in this process and in one of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from offload_engine.cli.commands import dmoe, run
from tests.checkpoints import tiny_config, write_checkpoint

ROOT = Path(__file__).parents[2]
EOS, MASK = 256, 257
SPECIAL = ["<|endoftext|>", "<|mask|>", "<role>", "</role>", "<|role_end|>"]
TEMPLATE = "{% for m in messages %}<role>{{ m.role }}</role>{{ m.content }}<|role_end|>{% endfor %}<role>A</role>"
FAST = ["--gpu-mem", "4GB", "--max-context", "512"]
"""Whatever the test process has grown to, so that the plan stands; a context that keeps the plan small."""
SHORT = [*FAST, "--max-new-tokens", "48", "--block-length", "16", "--steps", "4"]
"""An answer of a few blocks of few steps."""


def byte_tokenizer() -> Tokenizer:
    """One token per byte, 0 to 255 in the order of a byte-level alphabet, then `SPECIAL`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: id_ for id_, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_speaking_checkpoint(directory: Path, **overrides: Any) -> Path:
    """A random checkpoint with `byte_tokenizer`; its answers are noise, control characters included."""
    size = 256 + len(SPECIAL)
    config = tiny_config(vocab_size=size, eos_token_id=EOS, pad_token_id=EOS, mask_token_id=MASK, **overrides)
    write_checkpoint(directory, config)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    special = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0], "mask_token": SPECIAL[1], "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    return directory


def dmoe_run(*args: Any, stdin: bytes | str | None = None) -> Result:
    """`dmoe-run` in this process."""
    return CliRunner().invoke(run, [str(arg) for arg in args], input=stdin, prog_name="dmoe-run")


def dmoe_command(*args: Any) -> Result:
    """`dmoe` in this process."""
    return CliRunner().invoke(dmoe, [str(arg) for arg in args], prog_name="dmoe")


def process(*args: Any, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
    """`python -m offload_engine.cli` with pipes for stdout and stderr, its Ctrl-C as in a shell's foreground."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    defaults: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(
        [sys.executable, "-m", "offload_engine.cli", *map(str, args)],
        env=environment,
        bufsize=0,  # a pipe read by `communicate` after a `read` of our own
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **(defaults | options),
    )


def complaint(result: Result) -> str:
    """The one line of a command that failed; its stdout was empty and there was no traceback."""
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0].removeprefix("error: ")
