from __future__ import annotations

import os
import signal

import pytest

from offload_engine.cli.interrupt import interruptible
from offload_engine.engine.engine import Engine
from tests.cli.command_line import SHORT, dmoe_run


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def handler():
    """Ctrl-C as Python sets it up, whatever started the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_the_first_is_remembered_and_the_second_raises(handler, capfd):
    with interruptible() as interrupted:
        assert not interrupted()
        interrupt()
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_ignored_ctrl_c_stays_ignored(handler):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible() as interrupted:
        interrupt()
        assert not interrupted()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_the_prompts_after_it_are_left_out(handler, speaking, monkeypatch):
    stream = Engine.stream

    def interrupted_stream(self, *args, **keywords):
        events = stream(self, *args, **keywords)

        def follow():
            for place, event in enumerate(events):
                if place == 1:
                    interrupt()
                yield event

        return follow()

    monkeypatch.setattr(Engine, "stream", interrupted_stream)
    done = dmoe_run("--model", speaking, *SHORT, "--json", "-p", "a", "-p", "b")
    assert done.exit_code == 130
    assert len(done.stdout.splitlines()) == 1
    assert '"finish_reason": "cancelled"' in done.stdout
    assert "tokens/s" in done.stderr.splitlines()[-1]


def test_a_second_one_ends_the_line_and_the_run(handler, speaking, monkeypatch):
    stream = Engine.stream

    def twice_interrupted_stream(self, *args, **keywords):
        for event in stream(self, *args, **keywords):
            yield event
            if event.kind == "block":
                interrupt()
                interrupt()

    monkeypatch.setattr(Engine, "stream", twice_interrupted_stream)
    done = dmoe_run("--model", speaking, *SHORT, "-p", "a")
    assert done.exit_code == 130
    assert done.stdout.endswith("\n")
    assert done.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in done.stderr
