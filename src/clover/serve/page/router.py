"""Routes of the page: its files, what it has to know, and why an answer was given.

The page talks to our own `/v1/chat/completions` like any other client: a region goes there as the
picture itself (data URI), so that a dropped image and a slide's region are asked in the same way,
the API stays OpenAI's, and the engine knows the picture again by its bytes.
"""

from __future__ import annotations

import functools
import mimetypes
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from clover.core.errors import CloverError
from clover.serve.chat import words
from clover.serve.page.folder import SlideFolder
from clover.serve.page.slides import models_of, refused, slide_router
from clover.serve.picture import data_uri_bytes, open_stranger

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from clover.model import Clover
    from clover.serve.engine import Engine

STATIC = Path(__file__).parent / "static"
_WAITING = 4
"""Explanations at a time; one more is asked to come again."""
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        # The hash of nothing: one empty style stands where OpenSeadragon would write its own.
        "style-src 'self' 'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Everything comes from this server; pictures may also be what the user dropped."""
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class WhyRequest(BaseModel):
    """What `/talk/why` takes."""

    model: str | None = None
    """A served model; the first when absent."""
    image: str
    """A data URI."""
    question: str = Field(min_length=1, max_length=4000)
    answer: str = Field("", max_length=8000)
    """Needed for the deletion test and for the probability of yes."""
    deletion: bool = False
    """Whether the map is tested; it takes about as long as twenty short answers."""


@functools.cache
def static_files() -> dict[str, Path]:
    """Return the page's files by the name they are asked for: nothing else is ever sent."""
    return {
        path.relative_to(STATIC).as_posix(): path
        for path in sorted(STATIC.rglob("*"))
        if path.is_file()
    }


def page_router(folder: SlideFolder | None = None) -> APIRouter:
    """Return the page's routes.

    Args:
        folder: Slides that may be opened; none when absent, images can be dropped all the same.
    """
    router = APIRouter()
    places = threading.BoundedSemaphore(_WAITING)

    @router.get("/", include_in_schema=False)
    def index() -> Response:
        return _file("index.html")

    @router.get("/page/static/{name:path}", include_in_schema=False)
    def static(name: str) -> Response:
        return _file(name)

    @router.get("/talk/setup")
    def setup(request: Request) -> dict[str, Any]:
        served = models_of(request)
        return {
            "models": [_described(name, model) for name, model in served.items()],
            "questions": words()["examples"],
            "has_slides": folder is not None,
        }

    @router.post("/talk/why")
    def why(request: Request, asked: WhyRequest) -> Any:
        engine: Engine = request.app.state.engine
        settings = request.app.state.settings
        served = models_of(request)
        name = asked.model or next(iter(served), "")
        if name not in served:
            return refused(404, f"no model '{name[:100]}' is served")
        if not places.acquire(blocking=False):
            busy = refused(429, "other explanations are being worked out; ask again in a moment")
            busy.headers["Retry-After"] = "2"
            return busy
        try:
            content = data_uri_bytes(asked.image, max_bytes=settings.max_body_bytes)
            picture = open_stranger(content, max_pixels=settings.max_pixels)
            return _explained(engine, served[name], picture, asked)
        except CloverError as error:
            return refused(422, str(error))
        finally:
            places.release()

    if folder is not None:
        router.include_router(slide_router(folder))
    return router


def _file(name: str) -> Response:
    path = static_files().get(name)
    if path is None:
        return refused(404, f"the page has no file '{name[:100]}'")
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    if path.suffix == ".js":
        kind = "text/javascript"
    return Response(path.read_bytes(), media_type=kind, headers=_HEADERS)


def _described(name: str, model: Clover) -> dict[str, Any]:
    resolution = model.encoder.microns_per_pixel
    side = model.recipe.encoder.image_size
    return {
        "name": name,
        "microns_per_pixel": resolution,
        "side": side,
        "field_um": None if resolution is None else side * resolution,
    }


def _explained(
    engine: Engine, model: Clover, picture: Image.Image, asked: WhyRequest
) -> dict[str, Any]:
    """Return maps, probability of yes, and the deletion test when it is asked for."""
    from clover.explain import (
        YES_NO,
        delete,
        first_word,
        likelihood,
        look,
        token_places,
        yes_probability,
    )

    # Each piece is one short call, so that answers that are being written go on in between.
    features: Tensor = engine.call(model.encode, picture).result()
    maps = engine.call(look, model, features, asked.question).result()
    is_closed = first_word(asked.answer) in YES_NO
    yes = engine.call(yes_probability, model, features, asked.question, is_closed).result()
    found: dict[str, Any] = {
        "grid": maps.grid,
        "rollout": _numbers(maps.rollout()),
        "mean": _numbers(maps.mean()),
        "layers": [
            {"mean": _numbers(layer.mean(dim=0)), "queries": [_numbers(query) for query in layer]}
            for layer in maps.weights
        ],
        "yes": yes,
    }
    if asked.deletion:
        if not asked.answer.strip():
            raise CloverError("the answer is empty; there is nothing to test")

        def measure(stays: Tensor) -> float:
            return engine.call(likelihood, model, stays, asked.question, asked.answer).result()

        places = token_places(model, features)
        test = delete(features, maps.rollout(), measure, places=places)
        found["deletion"] = {
            "shares": test.shares,
            "attended": test.attended,
            "random": test.random,
            "spread": test.spread,
            "gain": test.gain,
            "label": test.label,
        }
    return found


def _numbers(heat: Tensor) -> list[float]:
    """Return a map row by row, to the fifth digit."""
    return [round(value, 5) for value in heat.flatten().tolist()]
