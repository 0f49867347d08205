"""A directory in which what a document shows is done, one command after the other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tests.docs.documents import ROOT, TYPED, Shown

SERVER = "http://127.0.0.1:8000"
"""Where the documentation's commands and programs expect `dmoe serve`; here it gets a free port."""
BROUGHT = ["configs", "examples", "offload_engine", "tests", "tools"]
"""What of the checkout the commands find where they run."""
CODES = {"dmoe doctor": (0, 5)}
"""Exit codes beside 0 of commands that did what they should: a machine may well deserve a warning."""
SECONDS = 300.0
"""The longest that a command may take."""


class Workshop:
    """Does what a document shows: files stay for the commands after it, and none is written to anybody's home."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._server: _Server | None = None
        for name in BROUGHT:
            (directory / name).symlink_to(ROOT / name)
        self._programs = directory / "bin"
        self._programs.mkdir()
        self._program("python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')  # a link would forget its environment
        for name, function in {"dmoe": "main", "dmoe-run": "run_main"}.items():
            self._program(name, f"#!{sys.executable}\nfrom offload_engine.cli import {function}\n\n{function}()\n")

    def perform(self, one: Shown) -> str | None:
        """What is wrong with a command; None if it does what is shown."""
        cat = re.fullmatch(r"cat ([\w./-]+)", one.command)
        if cat and not (self.directory / cat[1]).exists():
            (self.directory / cat[1]).write_text("\n".join(one.output).rstrip("\n") + "\n", encoding="utf-8")
            return None
        if one.command.startswith("dmoe serve"):
            wrong = self.stop_server()
            self._server = _Server(one, self)
            return wrong or self._server.wait()
        return self._run(one)

    def program(self, text: str) -> str | None:
        """What is wrong with a Python program."""
        return self._run(Shown(""), [sys.executable, "-c", self.addressed(text)])

    def addressed(self, text: str) -> str:
        """`text` with the server's own address for the usual one."""
        return text if self._server is None else text.replace(SERVER, self._server.url)

    def stop_server(self) -> str | None:
        """End the server that is running, if one is; what was wrong with it."""
        server, self._server = self._server, None
        return None if server is None else server.stop()

    @property
    def environment(self) -> dict[str, str]:
        """Of all that is run."""
        own = {
            "PATH": f"{self._programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.directory),
            "XDG_CACHE_HOME": str(self.directory / "cache"),
            "COLUMNS": "200",
        }
        return os.environ | own

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop_server()

    def _run(self, one: Shown, program: list[str] | None = None) -> str | None:
        expected, typed = one.output, ""
        if re.fullmatch(r"dmoe chat[^|]*", one.command):
            expected = [line for line in one.output if not line.startswith(TYPED)]
            typed = "".join(f"{line.removeprefix(TYPED)}\n" for line in one.output if line.startswith(TYPED))
        done = subprocess.run(
            program or ["bash", "-o", "pipefail", "-c", self.addressed(one.command)],
            cwd=self.directory,
            env=self.environment,
            input=typed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        printed = done.stdout.replace(f"{self.directory}/", "")
        good = next((codes for name, codes in CODES.items() if one.command.startswith(name)), (0,))
        if (done.returncode not in good) != one.fails:
            return f"exit code {done.returncode}\n{printed}"
        return unseen(expected, printed)

    def _program(self, name: str, text: str) -> None:
        path = self._programs / name
        path.write_text(text)
        path.chmod(0o755)


class _Server:
    """A `dmoe serve` of a document, in the background."""

    def __init__(self, one: Shown, workshop: Workshop) -> None:
        self._shown = one
        self._log = workshop.directory / "server.log"
        command = f"exec {re.sub(r'(^| )#.*', '', one.command)} --port 0"
        with self._log.open("w") as log:
            self._process = _started(command, workshop, log)
        self.url = ""

    def wait(self) -> str | None:
        """Until it listens; what is wrong with what it has printed by then."""
        end = time.monotonic() + SECONDS
        while not (found := re.search(r"serving on (http://\S+);", self._log.read_text())):
            if self._process.poll() is not None or time.monotonic() > end:
                return f"doesn't serve: {self._log.read_text()}"
            time.sleep(0.02)
        self.url = found[1]
        return unseen(self._shown.output, self._log.read_text().replace(self.url, SERVER))

    def stop(self) -> str | None:
        """Have it end by SIGTERM, and see that it ends well."""
        self._process.terminate()
        try:
            code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return f"{self._shown.command} doesn't end"
        return None if code == 0 else f"{self._shown.command} ends with {code}: {self._log.read_text()}"


def _started(command: str, workshop: Workshop, log: IO[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["bash", "-c", command],
        cwd=workshop.directory,
        env=workshop.environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def normal(line: str) -> str:
    """A line without what differs from run to run: numbers, units, the length of gaps."""
    return re.sub(
        r"\s+", " ", re.sub(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?([kKMGT]i?B|B|ms|s|h|min)\b)?\*?", "#", line)
    ).strip()


def unseen(lines: list[str], output: str) -> str | None:
    """What is wrong with `output`, which should have `lines` in this order, and may have others between them."""
    printed = iter([normal(line) for line in output.splitlines()])
    for line in lines:
        if line.strip() not in ("", "...") and not any(normal(line) == other for other in printed):
            return f"nowhere in its place: {line!r}; printed:\n{output}"
    return None


def needs_curl(commands: list[Shown]) -> bool:
    """Whether a program is called that this machine doesn't have."""
    return any(one.command.startswith("curl ") for one in commands) and shutil.which("curl") is None
