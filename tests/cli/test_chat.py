"""`dmoe chat`: turns, commands, Ctrl-C, terminals and pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time

import pytest
from click.testing import CliRunner

from offload_engine import Engine, SamplingParams
from offload_engine.cli.commands import dmoe
from offload_engine.cli.terminal import visible
from offload_engine.text import Message
from tests.cli.command_line import SHORT, complaint, process

PARAMS = SamplingParams(max_new_tokens=48, block_length=16, steps=4)
BUILT_IN = ["--gpu-mem", "4GB", "--threads", "1"]
QUESTION = "Tom has 3 apples and buys 4 more. How many apples does Tom have?"


def chat(*options, stdin: str | bytes):
    return CliRunner().invoke(dmoe, ["chat", *map(str, options)], input=stdin, prog_name="dmoe")


@pytest.fixture(scope="module")
def answers(speaking) -> list[str]:
    """To "one", and to "two" after that."""
    with Engine.from_pretrained(speaking, gpu_mem="4GB", max_context=512) as engine:
        first = engine.generate([Message(role="user", content="one")], PARAMS).text
        told = [Message(role="user", content="one"), Message(role="assistant", content=first)]
        return [first, engine.generate([*told, Message(role="user", content="two")], PARAMS).text]


def ended(text: str) -> str:
    return text if text.endswith("\n") else f"{text}\n"


def test_every_turn_knows_those_before(speaking, answers):
    done = chat("--model", speaking, *SHORT, stdin="one\n\n  two  \n")
    assert done.exit_code == 0
    assert done.stdout_bytes.decode() == ended(answers[0]) + ended(answers[1])
    assert "tokens/s, " in done.stderr.splitlines()[-1]


def test_a_turn_begins_with_what_the_last_one_left(speaking):
    long = "How many? " * 10
    done = chat("--model", speaking, *SHORT, stdin=f"{long}\nmore\n/stats\n")
    again = chat("--model", speaking, *SHORT, "--prefix-reuse", "off", stdin=f"{long}\nmore\n/stats\n")
    assert done.stdout_bytes == again.stdout_bytes

    def forwards(result):
        return result.stderr.split("expert requests")[1].split(":")[0]

    assert int(forwards(done)) < int(forwards(again))


def test_reset_forgets_and_exit_ends(speaking, answers):
    done = chat("--model", speaking, *SHORT, stdin="two\n/reset\none\n/exit\none\n")
    assert done.stdout_bytes.decode().endswith(ended(answers[0]))
    assert done.stdout_bytes.decode().count(ended(answers[0])) == 1
    assert "the conversation begins anew" in done.stderr


def test_a_system_message_comes_first_and_survives_a_reset(speaking, tmp_path):
    file = tmp_path / "talk.json"
    done = chat("--model", speaking, *SHORT, "--system", "Be brief.", stdin=f"one\n/reset\none\n/save {file}\n")
    saved = json.loads(file.read_text())
    assert [one["role"] for one in saved] == ["system", "user", "assistant"]
    assert saved[0]["content"] == "Be brief."
    first, _, second = done.stdout_bytes.decode().partition(ended(saved[2]["content"]))
    assert (first, second) == ("", ended(saved[2]["content"]))


def test_save_writes_what_was_said_and_replaces_only_what_it_wrote(speaking, answers, tmp_path):
    mine, other = tmp_path / "mine.json", tmp_path / "other.json"
    other.write_text("precious")
    lines = ["one", f"/save {mine}", "two", f"/save {mine}", f"/save {other}", f"/save {tmp_path}/no/file", "/save"]
    done = chat("--model", speaking, *SHORT, stdin="\n".join(lines))
    assert done.exit_code == 0
    assert [one["content"] for one in json.loads(mine.read_text())] == ["one", answers[0], "two", answers[1]]
    assert other.read_text() == "precious"
    assert f"error: {other}: exists already; name another file" in done.stderr
    assert "no/file: can't be written (No such file or directory)" in done.stderr
    assert "error: /save takes the name of a file" in done.stderr


def test_routing_is_shown_and_changed(speaking):
    lines = ["/routing", "one", "/routing dmoe 0.3", "one", "/routing best", "/routing dmoe many", "/routing dmoe 7"]
    done = chat("--model", speaking, *SHORT, stdin="\n".join([*lines, "/routing a b c"]))
    assert done.exit_code == 0
    told = done.stderr.splitlines()
    assert "routing original" in " ".join(told)
    assert any(one.startswith("routing dmoe, top_p 0.3, min_experts 16") for one in told)
    assert any(one.startswith("note: routing dmoe (top-p 0.3) on weights that were not distilled") for one in told)
    for wrong in ("routing is 'best'", "p is 'many'; wanted a share", "'top_p': found 7.0", "takes a name and a p"):
        assert any(one.startswith("error: ") and wrong in one for one in told), wrong


def test_help_stats_and_what_is_no_command(speaking):
    done = chat("--model", speaking, *SHORT, stdin="/help\none\n/stats\n/nothing\n//slash\n")
    for said in (
        "/routing [NAME] [P]",
        "expert requests",
        "slots now: ",
        "hit rate",
        "error: /nothing: there is no such",
    ):
        assert said in done.stderr
    with Engine.from_pretrained(speaking, gpu_mem="4GB", max_context=512) as engine:
        first = engine.generate("one", PARAMS).text
        told = [Message(role="user", content="one"), Message(role="assistant", content=first)]
        second = engine.generate([*told, Message(role="user", content="/slash")], PARAMS).text
    assert done.stdout_bytes.decode() == ended(first) + ended(second)


def test_a_conversation_that_outgrows_the_context_says_the_way_out(speaking):
    turn = "x" * 200
    done = chat("--model", speaking, *SHORT, stdin=f"{turn}\n{turn}\n{turn}\n/reset\none\n")
    assert done.exit_code == 0
    refused = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert refused
    assert all(line.endswith("; or begin anew with /reset") for line in refused)
    assert "error" not in done.stderr.split("begins anew")[1]


def test_a_model_without_a_tokenizer_and_bytes_that_are_no_text(mute, speaking):
    assert "has no tokenizer.json" in complaint(chat("--model", mute, *SHORT, stdin="one\n"))
    done = chat("--model", speaking, *SHORT, stdin=b"one\n\xff\n")
    assert done.exit_code == 2
    assert "error: standard input: line 2, byte 0 is not UTF-8" in done.stderr


def test_ctrl_c_in_a_pipe_ends_the_answer_and_the_run(speaking):
    endless = ["--gpu-mem", "4GB", "--threads", 1, "--max-new-tokens", 8000, "--threshold", 1, "--eos-token-id", 257]
    with process("chat", "--model", speaking, *endless, stdin=subprocess.PIPE) as child:
        child.stdin.write(b"one\ntwo\n")
        child.stdin.flush()
        first = child.stdout.read(1)  # blocks until the first block is out
        child.send_signal(signal.SIGINT)
        rest, errors = child.communicate(timeout=300)
    assert child.returncode == 130
    assert (first + rest).endswith(b"\n")
    assert b"ended by Ctrl-C" in errors
    assert b"Traceback" not in errors


class Terminal:
    """A chat on a terminal of its own."""

    def __init__(self, *options, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        env = {"TERM": "xterm", "COLUMNS": "100", "LINES": "40", **environment}
        self.child = process(
            "chat", *options, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def read_until(self, pattern: str, since: int = 0) -> str:
        """What was shown after `since`, once `pattern` is in it."""
        deadline = time.monotonic() + 60
        while not re.search(pattern, self.shown[since:]):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} not in {self.shown[since:][-500:]!r}"
            if select.select([self._ours], [], [], left)[0]:
                self.shown += os.read(self._ours, 65536).decode(errors="replace")
        return self.shown[since:]

    def close(self) -> int:
        try:
            while os.read(self._ours, 65536):
                pass
        except OSError:  # Linux' word for the end of a terminal
            pass
        os.close(self._ours)
        return self.child.wait(timeout=60)


def lasting(shown: str) -> str:
    """What stays on the screen: what was redrawn since is left out."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.rpartition("\x1b[2K")[2]).replace("\r", "")


@pytest.mark.parametrize("environment", [{}, {"TERM": "dumb"}])
def test_on_a_terminal_masks_become_words_and_the_answer_stays(environment):
    terminal = Terminal(*BUILT_IN, "--threshold", "1", **environment)
    terminal.read_until("> ")
    terminal.type(QUESTION + "\n")
    shown = terminal.read_until(r"moved\]\r\n> ")
    assert ("░" in shown) == (not environment)
    assert "7 apples" in lasting(shown)
    before = len(terminal.shown)
    terminal.type("And 2 more?\n")
    terminal.read_until(r"moved\]\r\n> ", before)
    terminal.type("\x04")
    terminal.read_until("tokens/s, .* steps")
    assert terminal.close() == 0


def test_on_a_terminal_ctrl_c_ends_the_answer_and_keeps_what_was_decided(speaking, tmp_path):
    file = tmp_path / "talk.json"
    endless = ["--gpu-mem", "4GB", "--threads", 1, "--max-new-tokens", 8000, "--threshold", 1, "--eos-token-id", 257]
    terminal = Terminal("--model", speaking, *endless)
    terminal.read_until("> ")
    terminal.type("one\n")
    for _ in range(70):  # redraws, more than two blocks of them; the eos is the mask here, lest the answer end
        terminal.read_until(r"\x1b\[2K", len(terminal.shown))
    os.kill(terminal.child.pid, signal.SIGINT)
    terminal.read_until(r"ended by Ctrl-C\]\r\n> ")
    place = len(terminal.shown)
    terminal.type(f"/save {file}\n")
    terminal.read_until(r"wrote 2 messages.*\r\n> ", place)
    os.kill(terminal.child.pid, signal.SIGINT)
    terminal.read_until("Ctrl-D or /exit ends.*\r\n> ", place)
    terminal.type("/exit\n")
    terminal.read_until("tokens/s, .* steps", place)
    assert terminal.close() == 0
    saved = json.loads(file.read_text())
    assert [one["role"] for one in saved] == ["user", "assistant"]
    assert 0 < len(saved[1]["content"].encode()) < 8000
    assert visible(saved[1]["content"]).split("\n")[0][:10] in terminal.shown


def test_lines_are_edited_and_remembered_where_there_is_readline():
    pytest.importorskip("readline")
    terminal = Terminal(*BUILT_IN)
    terminal.read_until("> ")
    terminal.type("/routign\x1b[D\x7f\x1b[C\x7fng\n")  # the cursor moves, letters go
    terminal.read_until(r"\r\nrouting dmoe.*\r\n> ")
    place = len(terminal.shown)
    terminal.type("\x1b[A\n")  # the line before
    terminal.read_until(r"\r\nrouting dmoe.*\r\n> ", place)
    terminal.type("\x04")
    terminal.read_until("steps", place)
    assert terminal.close() == 0
