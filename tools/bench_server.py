"""How a server holds up under load: latency, tokens per second and bytes moved, for some numbers of clients.

    python -m tools.bench_server --clients 1,4,16 -- --gpu-mem 8GB --expert-mem 4MB

What follows `--` are options of `dmoe serve`, which is started for the measurement on a free port, in a process of its
own; `--url` measures one that runs already. Each client asks one question after another, streamed, until all questions
of its number of clients are answered. The questions are the same for every number; others before them fill the cache.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import click
import httpx

from offload_engine.cli.errors import ReportingCommand
from offload_engine.config import format_bytes
from offload_engine.errors import OffloadError, UsageError
from offload_engine.evaluate.arithmetic import generate

WARM_UP = 4
"""Questions asked before anything is counted."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One request, in seconds from its beginning."""

    first: float
    """Until the first text."""
    whole: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Level:
    """One number of clients."""

    clients: int
    seconds: float
    answers: list[Answered]
    tokens: int
    bytes_moved: int
    hit_rate: float | None
    denoise_steps: int
    """Summed over requests."""
    forwards: int
    """Those that took these steps."""

    @property
    def tokens_per_second(self) -> float:
        """Of all clients together."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked for."""

    requests: int
    max_tokens: int
    seed: int
    extra: dict[str, Any]
    """Further fields of the bodies."""
    patience: float
    """Seconds that a request may take."""


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all values don't exceed."""
    ranked = sorted(values)
    return ranked[max(0, -(-int(share * 1000) * len(ranked) // 1000) - 1)]


async def ask(client: httpx.AsyncClient, question: str, load: Load) -> Answered:
    """One streamed chat completion. Raises `OffloadError` for anything but a whole answer."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": load.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **load.extra,
    }
    began, first, tokens = time.perf_counter(), None, None
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            said = (await response.aread()).decode(errors="replace")
            raise OffloadError(f"the server answered {response.status_code}: {said[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise OffloadError(f"an answer failed: {chunk['error']['message']}")
            if first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = time.perf_counter() - began
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    if tokens is None:
        raise OffloadError("an answer ended without its usage")
    whole = time.perf_counter() - began
    return Answered(whole if first is None else first, whole, tokens)


async def ask_all(url: str, key: str | None, clients: int, questions: Sequence[str], load: Load) -> list[Answered]:
    """All questions, by `clients` at a time."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    waiting = iter(questions)
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=load.patience, limits=limits) as http:

        async def client() -> list[Answered]:
            return [await ask(http, question, load) for question in waiting]

        try:
            answers = await asyncio.gather(*(client() for _ in range(clients)))
        except httpx.HTTPError as error:
            raise OffloadError(f"{url}: {type(error).__name__} ({error})") from None
    return list(chain.from_iterable(answers))


def measure(url: str, key: str | None, clients: int, load: Load) -> Level:
    """One number of clients."""
    drawn = [made.question for made in generate(load.seed, WARM_UP + load.requests)]
    asyncio.run(ask_all(url, key, min(clients, WARM_UP), drawn[:WARM_UP], load))
    before, began = statistics(url, key), time.perf_counter()
    answers = asyncio.run(ask_all(url, key, clients, drawn[WARM_UP:], load))
    seconds, after = time.perf_counter() - began, statistics(url, key)
    counted = {name: after[name] - before[name] for name in ("bytes_moved", "denoise_steps", "hits", "late", "misses")}
    wanted = counted["hits"] + counted["late"] + counted["misses"]
    return Level(
        clients=clients,
        seconds=seconds,
        answers=answers,
        tokens=sum(answer.tokens for answer in answers),
        bytes_moved=counted["bytes_moved"],
        hit_rate=counted["hits"] / wanted if wanted else None,
        denoise_steps=counted["denoise_steps"],
        forwards=after["forwards"]["denoise"] - before["forwards"]["denoise"],
    )


def statistics(url: str, key: str | None) -> dict[str, Any]:
    """The engine's counters."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    response = httpx.get(f"{url}/v1/stats", headers=headers, timeout=30)
    if response.status_code != 200:
        raise OffloadError(f"{url}/v1/stats answered {response.status_code}")
    found: dict[str, Any] = response.json()["stats"]
    return found


def table(levels: Sequence[Level]) -> str:
    """A line per number of clients, as Markdown."""
    lines = [
        "| clients | first text p50 | p95 | whole answer p50 | p95 | p99 | tokens/s | steps per forward "
        "| moved per token | hit rate |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for level in levels:
        first = [answer.first for answer in level.answers]
        whole = [answer.whole for answer in level.answers]
        times = [quantile(first, 0.5), quantile(first, 0.95), *(quantile(whole, share) for share in (0.5, 0.95, 0.99))]
        hits = "n/a" if level.hit_rate is None else f"{level.hit_rate * 100:.1f} %"
        lines.append(
            f"| {level.clients} | "
            + " | ".join(f"{1000 * one:.0f} ms" for one in times)
            + f" | {level.tokens_per_second:.0f} | {level.denoise_steps / max(1, level.forwards):.2f} "
            f"| {format_bytes(level.bytes_moved // max(1, level.tokens))} | {hits} |"
        )
    return "\n".join(lines)


@contextmanager
def served(options: Sequence[str]) -> Iterator[str]:
    """A server of its own while open; its URL."""
    command = [sys.executable, "-m", "offload_engine.cli", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stderr is not None
            said = []
            for line in child.stderr:
                said.append(line)
                if found := re.search(r"serving on (http://\S+);", line):
                    yield found[1]
                    return
            raise UsageError(f"the server did not start: {''.join(said).strip()}")
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(timeout=30)
            except subprocess.TimeoutExpired:
                child.kill()


def _numbers(_context: click.Context, _option: click.Parameter, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise click.BadParameter(f"{text!r}; wanted numbers of clients from 1 on, such as 1,4,16")
    return [int(word) for word in words]


@click.command(cls=ReportingCommand, help=(__doc__ or "").replace("    python", "\b\n    python", 1))
@click.option("--url", metavar="URL", help="A server that runs already.  [default: start one]")
@click.option("--api-key", envvar="DMOE_API_KEY", metavar="TEXT", help="Its key.")
@click.option("--clients", default="1,4,16", show_default=True, callback=_numbers, help="At a time.")
@click.option("--requests", type=click.IntRange(min=1), default=64, show_default=True, help="For each of them.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=96, show_default=True, help="Of an answer.")
@click.option("--seed", type=int, default=5, show_default=True, help="Of the questions.")
@click.option("--fields", default="{}", metavar="JSON", help='Further fields, as {"threshold": 1.0}.')
@click.option("--patience", type=float, default=300.0, show_default=True, help="Seconds for one answer.")
@click.option("--json", "as_json", is_flag=True, help="Every request as JSON instead of the table.")
@click.argument("options", nargs=-1, metavar="[-- OPTIONS OF dmoe serve]")
def main(
    url: str | None,
    api_key: str | None,
    clients: Sequence[int],
    requests: int,
    max_tokens: int,
    seed: int,
    fields: str,
    patience: float,
    as_json: bool,
    options: Sequence[str],
) -> None:
    """See the module."""
    if url is not None and options:
        raise UsageError(f"--url names a server that runs already, so {options[0]!r} has no effect; leave one out")
    try:
        extra = json.loads(fields)
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise UsageError(f"--fields is {fields!r}; wanted a JSON object")
    load = Load(requests, max_tokens, seed, extra, patience)
    if url is not None:
        levels = [measure(url.rstrip("/"), api_key, number, load) for number in clients]
    else:
        with served(options) as own:
            levels = [measure(own, api_key, number, load) for number in clients]
    print(json.dumps([asdict(level) for level in levels]) if as_json else table(levels))


if __name__ == "__main__":
    main()
