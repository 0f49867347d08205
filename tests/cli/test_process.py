"""What only a process of its own shows: signals, closed pipes, terminals, what is imported."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from offload_engine.cli.terminal import visible
from tests.cli.command_line import ROOT, SHORT, dmoe_run, process

ENDLESS = ["--gpu-mem", "4GB", "--threads", 1, "--max-new-tokens", 16000, "--threshold", 1, "--eos-token-id", 95]
"""Hundreds of blocks of 32 steps each: the eos is the mask, which is never an answer."""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["plan", "--help"], ["convert", "--help"], ["--version"]]
)
def test_help_comes_without_the_heavy_libraries(arguments):
    program = (
        "import sys\n"
        "from offload_engine.cli.commands import dmoe\n"
        "try:\n"
        f"    dmoe.main({arguments!r}, prog_name='dmoe')\n"
        "except SystemExit as done:\n"
        "    assert done.code == 0, done.code\n"
        "assert not {'torch', 'tokenizers', 'rich', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "offload_engine" in done.stdout or "--model" in done.stdout or "plan" in done.stdout


def test_the_first_ctrl_c_stops_after_the_step_and_keeps_the_answer(mute):
    with process("run", "--model", mute, *ENDLESS, "--token-ids", "-p", "1 2 3") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        first = child.stdout.read(2)  # blocks until the first block is out
        child.send_signal(signal.SIGINT)
        rest, errors = child.communicate(timeout=300)
    answer = first + rest
    assert child.returncode == 130
    assert answer.endswith(b"\n")
    assert 29 <= len(answer.split()) < 16000
    assert b"stopping after this step" in errors
    assert b"tokens/s" in errors.splitlines()[-1]
    assert b"Traceback" not in errors


def test_a_reader_that_goes_away_ends_the_run_quietly(mute):
    with process("run", "--model", mute, *ENDLESS, "--token-ids", "-p", "1 2 3") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(2)
        child.stdout.close()
        errors = child.stderr.read()
        child.wait(timeout=300)
    assert child.returncode == 1
    assert errors.count(b"\n") == 2  # loaded, plan
    assert b"Error" not in errors


def test_an_answer_that_cannot_be_written_is_one_line(mute):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("wb") as full:
        child = process("run", "--model", mute, *SHORT, "--token-ids", "-p", "1 2 3", stdout=full)
        _out, errors = child.communicate(timeout=300)
    assert child.returncode == 1
    assert errors.splitlines()[-1].startswith(b"error: standard output can't be written (No space left on device)")
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors


def test_on_a_terminal_the_view_goes_before_the_answer_comes_and_nothing_steers_it(speaking):
    sampled = ["--temperature", 1, "--seed", 1]
    plain = dmoe_run("--model", speaking, *SHORT, *sampled, "-p", "How many?").stdout_bytes.decode()
    assert any(letter < " " and letter not in "\n\t" for letter in plain), "random bytes hold control characters"
    ours, theirs = pty.openpty()
    child = process(
        *("run", "--model", speaking, *SHORT, *sampled, "--threads", 1, "--watch", "-p", "How many?"),
        stdout=theirs,
        stderr=theirs,
        env={"TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # Linux' word for the end of a terminal
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    assert child.wait(timeout=300) == 0
    view, _, answer = shown.decode(errors="replace").replace("\r\n", "\n").rpartition("\x1b[2K")
    assert "expert cache" in view
    assert "░" in view
    assert answer.startswith(visible(plain))
    assert "tokens/s, " in answer
    assert "\x1b" not in answer
