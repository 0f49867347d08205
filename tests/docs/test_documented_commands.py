"""What the documentation shows is what happens, and nothing that it shows escapes being tried."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

from offload_engine.cli.commands import dmoe, run
from tests.docs.documents import (
    DOCUMENTS,
    REASONS,
    ROOT,
    Block,
    blocks,
    blocks_of,
    command_lines,
    programs,
    quoted,
    shown,
)
from tests.docs.workshop import Workshop, needs_curl, normal, unseen

FENCED = {"python", "json", "text"}
"""Languages of fenced blocks: programs, which are run, and what isn't a command."""


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    with Workshop(tmp_path) as workshop:
        yield workshop


def named(path: Path) -> str:
    return path.name


def test_numbers_and_units_may_differ_and_nothing_else_may():
    assert normal("12.5 MB in 3 s,  p=0.6*") == normal("999 KB in 0.1 ms, p=.61")
    assert normal("12 tokens") != normal("12 tokenz")
    assert unseen(["a 1", "...", "b"], "a 2\nx\nb\n") is None
    assert "'b'" in str(unseen(["b", "a 1"], "a 2\n"))


def test_blocks_are_told_apart():
    (transcript,) = blocks("x\n\n    $ one \\\n        --two\n    out\n\n    more\n\ny\n")
    (marked,) = blocks("    # takes hours: so it does\n    three \\\n      4\n")
    assert transcript.is_transcript
    assert transcript.lines[-2:] == ["more", ""]
    assert (marked.reason, marked.marked_commands) == ("takes hours", ["three 4"])
    (bare,) = blocks("    dmoe doctor\n")
    assert fault(bare)
    (excused,) = blocks("    # takes a whim\n    dmoe doctor\n")
    assert fault(excused)


def fault(block: Block) -> str | None:
    """What a block lacks that it may be shown."""
    if block.language:
        return None if block.language in FENCED else f"a language of {sorted(FENCED)}"
    if block.is_transcript or block.reason is not None:
        return None
    return f"a command behind `$ ` in its first line, or a comment with one of {REASONS}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_command_is_run_or_says_why_not(path):
    for block in blocks_of(path):
        lacking = fault(block)
        assert lacking is None, f"{path.name}: {block.lines[0]!r} begins a block without {lacking}"


def test_no_reason_is_there_for_nothing():
    assert {block.reason for path in DOCUMENTS for block in blocks_of(path)} - {None} == set(REASONS)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if shown(path) or programs(path)], ids=named)
def test_what_a_document_shows_is_what_happens(path, workshop):
    if any("openai" in program for program in programs(path)):
        pytest.importorskip("openai")
    if needs_curl(shown(path)):
        pytest.skip("curl is not installed")
    for one in shown(path):
        wrong = workshop.perform(one)
        assert wrong is None, f"{path.name}: $ {one.command}\n{wrong}"
    program = "\n\n".join(programs(path))  # what one defines those after it may use; a server is still there
    wrong = workshop.program(program) if program else None
    assert wrong is None, f"{path.name}:\n{program}\n{wrong}"
    wrong = workshop.stop_server()
    assert wrong is None, f"{path.name}: {wrong}"


CALL = re.compile(r"(dmoe-run|dmoe(?= \w)|python -m (tools|offload_engine)[\w.]*|python tools/\w+\.py)( |$)")


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """What is called, and its arguments."""
    if words[0] == "dmoe-run":
        return run, words[1:]
    if words[0] == "dmoe":
        return dmoe.commands[words[1]], words[2:]
    if words[1] == "-m":
        return import_module(words[2]).main, words[3:]
    return import_module(words[1].removesuffix(".py").replace("/", ".")).main, words[2:]


def called(line: str) -> list[list[str]]:
    """The calls of `dmoe`, `dmoe-run` and the tools in a line, as words."""
    pieces = (re.sub(r"^torchrun .*?-m ", "python -m ", piece.strip()) for piece in line.split(" | "))
    return [shlex.split(re.split(r"(?:^|\s)#|\s2?>", piece)[0]) for piece in pieces if CALL.match(piece)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_options_that_are_named_exist(path):
    """Also those in the prose, such as `dmoe doctor --measure`."""
    for line in [*command_lines(path), *quoted(path)]:
        for words in called(line):
            command, arguments = command_of(words)
            if not isinstance(command, click.Command):  # a tool with another kind of command line
                continue
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            known |= {"--help"}
            for word in itertools.takewhile(lambda word: word != "--", arguments):  # the rest is for another command
                option = word.split("=")[0]
                if re.fullmatch(r"--?[a-z][\w-]*", option):
                    assert option in known, f"{path.name}: {line!r} has {option}"


def test_make_targets_and_extras_that_are_named_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for path in DOCUMENTS:
        for line in command_lines(path):
            if target := re.match(r"make (\w+)", line):
                assert target[1] in targets, f"{path.name}: {line}"
            for extras in re.findall(r"pip install .*\[([\w,-]+)\]", line):
                assert set(extras.split(",")) <= set(project["optional-dependencies"]), f"{path.name}: {line}"
