"""Listening, serving until told to stop, and ending well."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import FrameType

import uvicorn

from offload_engine.engine.batching import Batcher
from offload_engine.engine.engine import Engine
from offload_engine.errors import ConfigError
from offload_engine.server.app import create_app
from offload_engine.server.connections import Connection, keep_time
from offload_engine.server.settings import ServerSettings

BACKLOG = 128


def bind(settings: ServerSettings) -> socket.socket:
    """A socket of the settings' address, on which nobody is answered yet. Raises `ConfigError` if it can't be had."""
    try:
        found = socket.getaddrinfo(
            settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _name, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host is {settings.host!r}, which is no address of this machine ({error})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"can't listen on {settings.host} port {settings.port} ({error.strerror or error}); "
            "choose others with --host and --port"
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Serves an engine. `run` ends once `should_exit` is set, or SIGTERM or SIGINT came: what is under way is finished
    first, for at most `drain` seconds, then ends with what is decided. A second signal ends at once.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, announce: Callable[[], None] = lambda: None) -> None:
        """`announce` is called once requests are answered."""
        self._announce = announce
        self.batcher = Batcher(engine, max_waiting=settings.max_waiting)
        self.signals: list[int] = []
        self._settings = settings
        protocol = type("_Connection", (Connection,), {"patience": settings.patience, "most": settings.max_connections})
        config = uvicorn.Config(
            create_app(engine, self.batcher, settings),
            http=protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            # what the batcher gave up is to be sent as well; then nothing is waited for
            timeout_graceful_shutdown=int(settings.drain + settings.patience) + 1,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """A signal came."""
        self.signals.append(sig)
        self.force_exit = self.should_exit
        self.should_exit = True

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        # prompts are tokenized one after the other anyway, and each thread that did would keep memory for it
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1, thread_name_prefix="prompts"))
        time_keeping = asyncio.create_task(keep_time(self.server_state))
        try:
            await super().serve(sockets)
        finally:
            time_keeping.cancel()
            await asyncio.to_thread(self.batcher.close, drain=False)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        await super().startup(sockets)
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        giving_up = asyncio.create_task(self._give_up())
        try:
            await super().shutdown(sockets)
        finally:
            giving_up.cancel()
            with suppress(asyncio.CancelledError):
                await giving_up

    async def _give_up(self) -> None:
        """End what is still under way after the time it has, or at the second signal."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._settings.drain
        while loop.time() < end and not self.force_exit:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self.batcher.close, drain=False)


def serve(engine: Engine, settings: ServerSettings, listener: socket.socket, announce: Callable[[], None]) -> int:
    """Serve until a signal; `announce` is called once that has begun. Returns the exit code: 0 if all requests were
    answered, 128 and the signal if a second one came.
    """
    server = Server(engine, settings, announce)
    try:
        server.run([listener])
    finally:
        server.batcher.close(drain=False)
    return 128 + server.signals[-1] if server.force_exit else 0
