"""The routes, and what stands before them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from offload_engine.config import format_bytes
from offload_engine.engine.batching import Batcher
from offload_engine.engine.engine import Engine
from offload_engine.errors import OffloadError, PromptError
from offload_engine.server.bodies import Body, ChatBody, CompletionBody, Job, check_model, parse
from offload_engine.server.denoising import Denoising
from offload_engine.server.failures import RefusedError, encoded, refusal_of, refusal_of_status, shutting_down
from offload_engine.server.following import Following, unless_gone
from offload_engine.server.guard import Guard
from offload_engine.server.logs import Record, RequestLog, record_of
from offload_engine.server.pages import Pages
from offload_engine.server.settings import ServerSettings
from offload_engine.server.statistics import Telemetry, statistics
from offload_engine.server.streaming import EventStream
from offload_engine.server.wire import Wire

CLIENT_GONE = 499
"""Status, in logs only, of a response that nobody was there to receive."""


def create_app(engine: Engine, batcher: Batcher, settings: ServerSettings) -> FastAPI:
    """The application that serves `engine` through `batcher`, which belongs to the caller."""
    service = _Service(engine, batcher, settings)
    app = FastAPI(
        title="offload_engine",
        openapi_url=None,  # its viewers load scripts from elsewhere; docs/serving.md has the fields
        middleware=[
            Middleware(RequestLog, telemetry=service.telemetry),
            *_foreign_pages(settings),
            Middleware(Guard, settings=settings),
        ],
        exception_handlers={OffloadError: _refuse, RefusedError: _refuse, HTTPException: _refuse_status},
    )
    pages = Pages()
    app.add_api_route("/", pages.index, methods=["GET"])
    app.add_api_route("/page/{name}", pages.file, methods=["GET"])
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/metrics", service.metrics, methods=["GET"])
    app.add_api_route("/v1/models", service.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", service.one_model, methods=["GET"])
    app.add_api_route("/v1/stats", service.stats, methods=["GET"])
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    app.add_api_route("/v1/completions", service.complete, methods=["POST"])
    app.add_api_route("/v1/denoise", service.denoise, methods=["POST"])
    return app


def model_name(engine: Engine, settings: ServerSettings) -> str:
    """The model's id for clients: as told, else its hub id, else the name of its directory."""
    if settings.served_model_name is not None:
        return settings.served_model_name
    model = engine.config.model
    if model is None:
        return "built-in"
    return Path(model).resolve().name if Path(model).is_dir() else model


class _Service:
    """The handlers of one server."""

    def __init__(self, engine: Engine, batcher: Batcher, settings: ServerSettings) -> None:
        self._engine = engine
        self._batcher = batcher
        self._settings = settings
        self._model = model_name(engine, settings)
        self._created = int(time.time())
        self.telemetry = Telemetry(engine, batcher)

    async def health(self) -> Response:
        """Whether requests are taken."""
        if self._batcher.closed:
            raise shutting_down()
        return _json({"status": "ok"})

    async def metrics(self) -> Response:
        """For Prometheus."""
        return Response(generate_latest(self.telemetry.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> Response:
        """The one model there is."""
        return _json({"object": "list", "data": [self._card()]})

    async def one_model(self, name: str) -> Response:
        """The same, asked for by its id."""
        check_model(name, self._model)
        return _json(self._card())

    async def stats(self) -> Response:
        """Counters, plan, slots and experts."""
        return _json({"model": self._model, **statistics(self._engine, self._batcher)})

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completions."""
        body = parse(ChatBody, await request.body())
        return await self._answer(request, "chat", body, body.job())

    async def complete(self, request: Request) -> Response:
        """OpenAI's completions."""
        body = parse(CompletionBody, await request.body())
        return await self._answer(request, "text", body, body.job())

    async def denoise(self, request: Request) -> Response:
        """A chat completion, told step by step."""
        body = parse(ChatBody, await request.body())
        check_model(body.model, self._model)
        job = body.job()
        with ExitStack() as stack:
            stack.enter_context(self._engine.activity.watching())
            denoising = Denoising(self._engine, job)
            following = await self._submitted(record_of(request.scope), job, denoising.observe)
            stack.callback(following.leave)
            return EventStream(denoising.stream(following, self._model), stack.pop_all().close)

    async def _answer(self, request: Request, kind: Literal["chat", "text"], body: Body, job: Job) -> Response:
        check_model(body.model, self._model)
        following = await self._submitted(record_of(request.scope), job)
        wire = Wire(kind, self._model)
        if body.stream:
            wanted = body.stream_options is not None and bool(body.stream_options.include_usage)
            return EventStream(wire.stream(following, include_usage=wanted), following.leave)
        done = await unless_gone(request.receive, following)
        return Response(status_code=CLIENT_GONE) if done is None else _json(wire.whole(following, done))

    async def _submitted(self, record: Record, job: Job, observer: Callable[[Any], None] | None = None) -> Following:
        following = Following(self._settings.deadline, record)
        self._check_length(job)
        record.details["routing"] = job.routing or self._engine.routing_name
        if self._settings.log_prompts:
            record.details["prompt"] = job.prompt
        try:
            await following.submit(self._batcher, job, observer)
        except PromptError as error:
            place = f"{self._engine.directory}{os.sep}"  # where a file lies on this machine is nobody else's business
            refusal = refusal_of(PromptError(str(error).replace(place, "")))
            refusal.param = "prompt" if job.raw else "messages"
            raise refusal from None
        return following

    def _check_length(self, job: Job) -> None:
        """Refuse what would take more than its share of memory and time to tokenize."""
        most = self._settings.max_prompt
        if job.size > most:
            raise RefusedError(
                400,
                f"the prompt has {format_bytes(job.size)}, but this server takes {format_bytes(most)}; shorten it, or "
                "start the server with a larger --max-prompt",
                param="prompt" if job.raw else "messages",
                code="prompt_too_long",
            )

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "offload_engine",
            "max_model_len": self._engine.plan.context,
        }


def _foreign_pages(settings: ServerSettings) -> list[Middleware]:
    """What tells browsers of the allowed origins; nothing where there are none."""
    if not settings.allow_origins:
        return []
    headers = ["authorization", "content-type"]
    methods = ["GET", "POST"]
    return [
        Middleware(CORSMiddleware, allow_origins=settings.allow_origins, allow_methods=methods, allow_headers=headers)
    ]


def _json(content: Any) -> Response:
    return Response(encoded(content), media_type="application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    record_of(request.scope).error = error
    return refusal_of(error).response()


async def _refuse_status(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal_of_status(error.status_code, error.headers).response()
