"""The web application: OpenAI's API, health and metrics, and whatever rooms add routes.

A route finds what it needs in `request.app.state.engine` and `request.app.state.settings`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from clover import __version__
from clover.core.errors import CloverError
from clover.serve import metrics
from clover.serve.completion import answer
from clover.serve.embedding import embed
from clover.serve.engine import Engine
from clover.serve.far import starter
from clover.serve.guard import Guard
from clover.serve.request import BusyError
from clover.serve.settings import ServeSettings
from clover.serve.wire import ChatRequest, EmbeddingRequest, error_body

_LOG = logging.getLogger(__name__)
_FETCHES = 4
"""Images fetched from addresses at a time; others wait their turn."""


def create_app(
    engine: Engine, settings: ServeSettings, *, routers: Sequence[APIRouter] = ()
) -> FastAPI:
    """Return the application.

    Args:
        engine: Answers.
        settings: Limits.
        routers: Further routes, such as the page and slides; they stand behind the same guards.
    """
    app = FastAPI(title="CLOVER", version=__version__, docs_url=None, redoc_url=None)
    app.state.engine, app.state.settings = engine, settings
    app.state.start = starter(engine, settings)
    app.state.decoding = asyncio.Semaphore(2)  # images decoded at a time: each may take 0.5 GB
    app.state.fetching = ThreadPoolExecutor(_FETCHES, "clover-fetch")
    app.state.responses = Counter()
    app.add_middleware(Guard, settings=settings, responses=app.state.responses)
    app.add_exception_handler(RequestValidationError, _explain)
    app.add_exception_handler(CloverError, _refuse)
    app.add_exception_handler(HTTPException, _tell)
    app.include_router(_api(engine))
    for router in routers:
        app.include_router(router)
    return app


def _api(engine: Engine) -> APIRouter:
    router = APIRouter()
    created = int(time.time())
    rows = [
        {"id": name, "object": "model", "created": created, "owned_by": "clover"}
        for name in engine.models
    ]

    @router.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "running": engine.num_running,
            "waiting": engine.num_waiting,
        }

    @router.get("/metrics", response_class=PlainTextResponse)
    async def figures(request: Request) -> Response:
        text = metrics.render(engine, request.app.state.responses)
        return Response(text, media_type=metrics.CONTENT_TYPE)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": rows}

    @router.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        for row in rows:
            if row["id"] == name:
                return row
        raise HTTPException(404, f"no model '{name}'")

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await answer(request, body)

    @router.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingRequest) -> dict[str, Any]:
        return await embed(request, body)

    return router


async def _explain(_: Request, error: Exception) -> JSONResponse:
    """Name the first fault of a request's body."""
    assert isinstance(error, RequestValidationError)
    # Where a value may have several forms each has its fault; the deepest one is what was meant.
    first = max(error.errors(), key=lambda fault: len(fault["loc"]))
    places = [str(part) for part in first["loc"] if part != "body"]
    where = ".".join(places)
    message = str(first["msg"]).removeprefix("Value error, ")
    text = f"{where}: {message}" if where else message
    param = places[0] if places else (first.get("ctx") or {}).get("param")
    return _error(400, text, param=param)


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, BusyError):
        response = _error(429, str(error), code="busy")
        response.headers["retry-after"] = str(error.retry_after)
        return response
    return _error(400, str(error))


async def _tell(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = "model_not_found" if error.status_code == 404 and "model" in error.detail else None
    response = _error(error.status_code, error.detail, code=code)
    response.headers.update(error.headers or {})
    return response


def _error(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> JSONResponse:
    # What clients sent may stand in a message; lone surrogates cannot be sent.
    clean = message.encode("utf-8", "replace").decode()
    where = None if param is None else param.encode("utf-8", "replace").decode()
    return JSONResponse(error_body(status, clean, code=code, param=where), status_code=status)
