"""What only a process of its own shows: signals, closed pipes, what is imported."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.cli.command_line import ROOT, SHORT, process

ENDLESS = ["--gpu-mem", "4GB", "--threads", 1, "--max-new-tokens", 16000, "--threshold", 1, "--eos-token-id", 95]
"""Hundreds of blocks of 32 steps each: the eos is the mask, which is never an answer."""


def test_help_comes_without_torch():
    program = (
        "import sys\n"
        "from offload_engine.cli.commands import dmoe, run\n"
        "for command in (run, dmoe.commands['plan'], dmoe):\n"
        "    command.main(['--help'], standalone_mode=False) if False else None\n"
        "    import click\n"
        "    assert '--help' in command.get_help(click.Context(command))\n"
        "assert not {'torch', 'tokenizers', 'rich', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
