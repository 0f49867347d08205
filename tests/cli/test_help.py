"""How --help reads, and what shells complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from offload_engine.cli import options
from offload_engine.cli.commands import dmoe
from offload_engine.cli.completion import SHELLS
from offload_engine.cli.help import SECTIONS
from offload_engine.routing import POLICIES
from tests.cli.command_line import ROOT, complaint, dmoe_command

SUMMARIES = {name: text for section in SECTIONS.values() for name, text in section.items()}


def test_every_command_has_a_place_and_a_line_of_its_own():
    assert set(dmoe.commands) <= set(SUMMARIES)
    shown = dmoe_command("--help").stdout
    for name in dmoe.commands:
        assert SUMMARIES[name] in shown, f"{name} is cut off or left out"
        assert len(SUMMARIES[name]) < 68
    titles = [f"{title}:" for title in SECTIONS]
    assert [line for line in shown.splitlines() if line in titles] == titles


@pytest.mark.parametrize("name", sorted(set(dmoe.commands) - {"version", "serve"}))
def test_every_command_says_what_it_does_and_shows_examples(name):
    shown = dmoe_command(name, "--help").stdout
    assert "Examples:" in shown
    examples = shown.split("Examples:\n")[1]
    assert all(line.startswith("    ") for line in examples.splitlines() if line)
    assert f"dmoe {name}" in examples or f"dmoe-{name}" in examples


def test_options_stand_below_what_they_are_about():
    shown = dmoe_command("run", "--help").stdout
    places = [shown.index(text) for text in ("Options:", "--watch", "The engine:", "--gpu-mem", "Decoding:", "--steps")]
    assert places == sorted(places)


def test_the_names_that_shells_are_offered_are_those_there_are():
    assert set(options.CHOICES["routing"]) == set(POLICIES)


def complete(words: str, incomplete: str) -> set[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_DMOE_COMPLETE": "bash_complete",
        "COMP_WORDS": f"{words} {incomplete}",
        "COMP_CWORD": str(len(words.split())),
    }
    program = "from offload_engine.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    return set(done.stdout.splitlines())


def test_commands_options_and_values_are_completed():
    assert {"plain,run", "plain,chat", "plain,completion"} <= complete("dmoe", "")
    assert complete("dmoe run", "--gpu-m") == {"plain,--gpu-mem"}
    assert complete("dmoe run --eviction", "l") == {"plain,lru", "plain,lfu"}
    assert complete("dmoe run --routing", "d") == {"plain,dmoe", "plain,des-seq", "plain,des-vote"}
    assert complete("dmoe run --model", "check") == {"dir,check"}
    assert complete("dmoe completion", "z") == {"plain,zsh"}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_one_that_the_shell_takes(shell, tmp_path):
    done = dmoe_command("completion", shell)
    assert done.exit_code == 0
    for variable in ("_DMOE_COMPLETE", "_DMOE_RUN_COMPLETE"):
        assert f"{variable}={shell}_complete" in done.stdout
    script = tmp_path / "script"
    script.write_text(done.stdout)
    program = shutil.which(shell)
    if program is not None:
        subprocess.run([program, "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_by_it(tmp_path: Path):
    """The script asks the program itself, as bash does when a key is pressed."""
    program = tmp_path / "dmoe"
    program.write_text(f"#!{sys.executable}\nfrom offload_engine.cli import main; main()\n")
    program.chmod(0o755)
    lines = f"""
        export PATH={tmp_path}:$PATH PYTHONPATH={ROOT}
        eval "$(dmoe completion bash)"
        COMP_WORDS=(dmoe si) COMP_CWORD=1
        _dmoe_completion dmoe
        echo "found: ${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, check=True)
    assert "found: simulate" in done.stdout


def test_an_unknown_shell_is_refused():
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in complaint(dmoe_command("completion", "tcsh"))
