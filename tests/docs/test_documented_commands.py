"""What the documentation shows is what happens."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

from offload_engine import Engine
from offload_engine.cli.commands import dmoe, run
from tests.docs.documents import DOCUMENTS, ROOT, Shown, command_lines, programs, shown
from tests.server.serving import serving

SERVER = "http://127.0.0.1:8000"
"""Where the documentation's programs expect `dmoe serve`."""
BROUGHT = ["configs", "examples", "tests", "tools"]
"""What of the checkout the commands find where they run."""


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """A directory in which the documentation's commands run: they write there, and into no home of anybody's."""
    for name in BROUGHT:
        (tmp_path / name).symlink_to(ROOT / name)
    programs_here = tmp_path / "bin"
    programs_here.mkdir()
    for name, function in {"dmoe": "main", "dmoe-run": "run_main"}.items():
        program = programs_here / name
        program.write_text(f"#!{sys.executable}\nfrom offload_engine.cli import {function}\n\n{function}()\n")
        program.chmod(0o755)
    (programs_here / "python").symlink_to(sys.executable)
    return tmp_path


def environment(workshop: Path) -> dict[str, str]:
    path = f"{workshop / 'bin'}:{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(workshop), "XDG_CACHE_HOME": str(workshop / "cache")}
    return os.environ | own | {"COLUMNS": "200"}


def normal(line: str) -> str:
    """A line without what differs from run to run: numbers, units, the length of gaps."""
    return re.sub(
        r"\s+", " ", re.sub(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?([kKMGT]i?B|B|ms|s|h|min)\b)?\*?", "#", line)
    ).strip()


def test_numbers_and_units_may_differ_and_nothing_else_may():
    assert normal("12.5 MB in 3 s,  p=0.6*") == normal("999 KB in 0.1 ms, p=.61")
    assert normal("12 tokens") != normal("12 tokenz")


def missing(lines: list[str], output: str) -> str | None:
    """The first of `lines` that `output` does not have after the one before; None if it has them all."""
    printed = iter([normal(line) for line in output.splitlines()])
    for line in lines:
        if line.strip() not in ("", "...") and not any(normal(line) == other for other in printed):
            return line
    return None


def perform(one: Shown, workshop: Path) -> str | None:
    """What is wrong with a command; None if it does what is shown."""
    cat = re.fullmatch(r"cat ([\w./-]+)", one.command)
    if cat and not (workshop / cat[1]).exists():
        (workshop / cat[1]).write_text("\n".join(one.output) + "\n", encoding="utf-8")
        return None
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", one.command],
        cwd=workshop,
        env=environment(workshop),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    printed = done.stdout.replace(f"{workshop}/", "")
    if (done.returncode != 0) != one.fails:
        return f"exit code {done.returncode}\n{printed}"
    unseen = missing(one.output, printed)
    return None if unseen is None else f"nowhere in its place: {unseen!r}; printed:\n{printed}"


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if shown(path)], ids=lambda path: path.name)
def test_commands_do_what_the_documentation_shows(path, workshop):
    for one in shown(path):
        wrong = perform(one, workshop)
        assert wrong is None, f"{path.name}: $ {one.command}\n{wrong}"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server, for programs that ask one at the default address."""
    pytest.importorskip("openai")
    with Engine.from_pretrained(gpu_mem="4GB", batch_size=2, max_context=2048) as engine, serving(engine) as served:
        yield served.url


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if programs(path)], ids=lambda path: path.name)
def test_programs_run(path, workshop, request):
    program = "\n\n".join(programs(path))  # what one defines those after it may use
    if SERVER in program:
        program = program.replace(SERVER, request.getfixturevalue("server"))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=workshop,
        env=environment(workshop),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{path.name}:\n{program}\n{done.stderr}"


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """What is called, and its arguments."""
    if words[0] == "dmoe-run":
        return run, words[1:]
    if words[0] == "dmoe":
        return dmoe.commands[words[1]], words[2:]
    return import_module(words[2]).main, words[3:]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if command_lines(path)], ids=lambda path: path.name)
def test_options_that_are_named_exist(path):
    for line in command_lines(path):
        words = shlex.split(re.split(r"(?:^|\s)#|\s\|\s|\s2?>", line)[0])
        command, arguments = command_of(words)
        if not isinstance(command, click.Command):  # a tool with another kind of command line
            continue
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        known |= {"--help"}
        for word in itertools.takewhile(lambda word: word != "--", arguments):  # the rest is for another command
            option = word.split("=")[0]
            if re.fullmatch(r"--?[a-z][\w-]*", option):
                assert option in known, f"{path.name}: {line!r} has {option}"
