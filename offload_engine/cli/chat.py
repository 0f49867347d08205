"""`dmoe chat`: turns read, turns answered, and the commands between them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from offload_engine.cli.answer_view import answer_view
from offload_engine.cli.errors import INTERRUPTED
from offload_engine.cli.interrupt import interruptible
from offload_engine.cli.loading import load_engine, prefill_progress
from offload_engine.cli.report import announce, show_stats
from offload_engine.cli.terminal import Output, note
from offload_engine.config import EngineConfig, format_bytes
from offload_engine.core import Completion, SamplingParams
from offload_engine.engine.adjusting import changed
from offload_engine.engine.engine import Engine
from offload_engine.errors import EngineClosedError, OffloadError, PromptError, UsageError
from offload_engine.files import write_aside
from offload_engine.routing import described
from offload_engine.text import Message

PROMPT = "> "


def converse(config: EngineConfig, params: SamplingParams, system: str | None = None) -> int:
    """Read turns and answer them until the input ends; returns the exit code. Raises `OffloadError`s."""
    output = Output()
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    if config.prefix_reuse == "auto":  # each turn begins with all those before
        config = changed(config, prefix_reuse="on")
    with load_engine(config) as engine:
        if engine.tokenizer is None:
            raise UsageError(
                f"{config.model}: has no tokenizer.json, and a conversation is text; use dmoe run --token-ids"
            )
        announce(engine, whole_plan=False)
        chat = Chat(engine, params, output, system)
        code = _at_terminal(chat) if at_terminal else _from_lines(chat)
        note(engine.stats.summary_line())
    return code


def _at_terminal(chat: Chat) -> int:
    with suppress(ImportError):
        import readline  # `input` then edits lines and knows those before

        readline.set_auto_history(True)
    note("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the conversation")
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            chat.output.line("")
            return 0
        except KeyboardInterrupt:
            note("\nCtrl-D or /exit ends the conversation")
            continue
        except UnicodeDecodeError:
            note("error: that line is not valid UTF-8")
            continue
        if not chat.take(line):
            return 0


def _from_lines(chat: Chat) -> int:
    for line in _lines():
        if not chat.take(line):
            return 0
        if chat.interrupted:
            return INTERRUPTED
    return 0


def _lines() -> Iterator[str]:
    """Standard input's lines. Raises `PromptError` for one that is no UTF-8."""
    if sys.stdin is None:
        raise PromptError("standard input: is closed, so there is nothing to answer")
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise PromptError(f"standard input: line {number}, byte {error.start} is not UTF-8; wanted text") from None


@dataclass(frozen=True, slots=True)
class Command:
    """What may be typed instead of a turn."""

    arguments: str
    what: str
    run: Callable[[Chat, list[str]], None]


class Chat:
    """One conversation."""

    def __init__(self, engine: Engine, params: SamplingParams, output: Output, system: str | None = None) -> None:
        self.engine, self.params, self.output = engine, params, output
        self._beginning = [] if system is None else [Message(role="system", content=system)]
        self.messages = list(self._beginning)
        """What was said so far, the system message included."""
        self.interrupted = False
        """Whether Ctrl-C ended the last answer."""
        self._saved: set[Path] = set()
        self._over = False

    def take(self, line: str) -> bool:
        """A turn, or a command; whether the conversation goes on. What fails is told, and nothing of it is kept."""
        text = line.strip()
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._obey(text)
            elif text:
                self._answer(text.removeprefix("/") if text.startswith("//") else text)
        except EngineClosedError:
            raise
        except OffloadError as error:
            note(f"error: {error}")
        return not self._over

    def _answer(self, text: str) -> None:
        conversation = [*self.messages, Message(role="user", content=text)]
        answer = ""
        done: Completion | None = None
        self.interrupted = False
        with interruptible(notice=b"") as interrupted, prefill_progress(self.engine):
            try:
                events = self.engine.stream(conversation, self.params, cancelled=interrupted)
            except PromptError as error:
                spoken = len(self.messages) > len(self._beginning)
                raise PromptError(f"{error}; or begin anew with /reset" if spoken else str(error)) from None
            try:
                with answer_view(self.engine, self.params, self.output) as view:
                    for event in events:
                        view.show(event)
                        answer += event.text
                        done = event.completion
            except KeyboardInterrupt:  # the second Ctrl-C: what was shown is kept all the same
                note("stopped at once")
            self.interrupted = interrupted()
        if answer:
            self.messages = [*conversation, Message(role="assistant", content=answer)]
        self._sum_up(done, answer)

    def _sum_up(self, done: Completion | None, answer: str) -> None:
        if not answer:
            note("no answer; the turn is forgotten")
        elif done is not None and (self.output.terminal or done.finish_reason != "eos"):
            stats = done.stats
            speed = "" if stats.tokens_per_second is None else f", {stats.tokens_per_second:.1f} tokens/s"
            why = {"eos": "", "stop": "", "length": ", cut off by its length", "cancelled": ", ended by Ctrl-C"}
            note(
                f"[{stats.new_tokens} tokens in {stats.denoise_steps} steps{speed}, "
                f"{format_bytes(stats.bytes_moved)} moved{why[done.finish_reason]}]"
            )

    def _obey(self, text: str) -> None:
        name, *arguments = text.split()
        command = COMMANDS.get(name)
        if command is None:
            raise UsageError(f"{name}: there is no such command; /help lists them, and // begins a turn with a slash")
        command.run(self, arguments)

    def help(self, _arguments: list[str]) -> None:
        """The commands."""
        rows = [(f"{name} {command.arguments}".strip(), command.what) for name, command in COMMANDS.items()]
        wide = max(len(name) for name, _what in rows)
        note("\n".join(f"{name:<{wide}}  {what}" for name, what in rows))

    def stats(self, _arguments: list[str]) -> None:
        """The engine's counters, and how its slots are filled."""
        slots = self.engine.occupancy()
        show_stats(self.engine.stats)
        note(f"slots now: {slots.resident} resident, {slots.loading} loading, {slots.free} free")
        note(self.engine.stats.summary_line())

    def routing(self, arguments: list[str]) -> None:
        """Tell how the engine routes, or change it."""
        if len(arguments) > 2:
            raise UsageError("/routing takes a name and a p; /help lists the commands")
        if arguments:
            share = _number(arguments[1]) if len(arguments) == 2 else None
            for notice in self.engine.set_routing(arguments[0], top_p=share):
                note(f"note: {notice}")
        found = described(self.engine.policy)
        note(f"routing {found.pop('name')}" + "".join(f", {name} {value:g}" for name, value in found.items()))

    def reset(self, _arguments: list[str]) -> None:
        """Begin anew."""
        self.messages = list(self._beginning)
        note("the conversation begins anew")

    def save(self, arguments: list[str]) -> None:
        """Write the conversation."""
        if len(arguments) != 1:
            raise UsageError("/save takes the name of a file, which gets the conversation as JSON")
        path = Path(arguments[0]).expanduser()
        if path.exists() and path.resolve() not in self._saved:
            raise UsageError(f"{path}: exists already; name another file")
        try:
            write_aside(path, (json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n").encode())
        except OSError as error:
            raise UsageError(f"{path}: can't be written ({error.strerror}); name another file") from None
        self._saved.add(path.resolve())
        note(f"wrote {len(self.messages)} messages to {path}")

    def exit(self, _arguments: list[str]) -> None:
        """End the conversation."""
        self._over = True


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"/routing: p is {text!r}; wanted a share such as 0.6") from None


COMMANDS = {
    "/stats": Command("", "Show all counters so far.", Chat.stats),
    "/routing": Command(
        "[NAME] [P]", "Show how experts are chosen, or choose another way from the next answer on.", Chat.routing
    ),
    "/reset": Command("", "Forget what was said.", Chat.reset),
    "/save": Command("FILE", "Write the conversation to a new file, as JSON.", Chat.save),
    "/help": Command("", "List the commands.", Chat.help),
    "/exit": Command("", "End the conversation, as Ctrl-D does.", Chat.exit),
}
