"""The web application: OpenAI's API, health and metrics, and whatever rooms add routes.

A route finds what it needs in `request.app.state.engine` and `request.app.state.settings`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI

if TYPE_CHECKING:
    from clover.serve.engine import Engine
    from clover.serve.settings import ServeSettings


def create_app(
    engine: Engine, settings: ServeSettings, *, routers: Sequence[APIRouter] = ()
) -> FastAPI:
    """Return the application.

    Args:
        engine: Answers.
        settings: Limits.
        routers: Further routes, such as the page and slides; they stand behind the same guards.
    """
    app = FastAPI(title="CLOVER", docs_url=None, redoc_url=None)
    app.state.engine, app.state.settings = engine, settings
    created = int(time.time())

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        rows = [
            {"id": name, "object": "model", "created": created, "owned_by": "clover"}
            for name in engine.adapters
        ]
        return {"object": "list", "data": rows}

    for router in routers:
        app.include_router(router)
    return app
