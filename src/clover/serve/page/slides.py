"""Routes of the slide folder: list, size, tiles, and a region as the model sees it.

Errors have OpenAI's shape, as those of the API beside them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from clover.core.errors import CloverError
from clover.serve.page.folder import SlideFolder
from clover.serve.wire import error_body
from clover.slides.deepzoom import OVERLAP, TILE, num_levels, tile
from clover.slides.reader import Slide
from clover.slides.region import parse_region
from clover.slides.units import estimated_from_power

if TYPE_CHECKING:
    from clover.model import Clover

_THUMBNAIL = 240
_DAY = {"Cache-Control": "private, max-age=86400"}


def refused(status: int, message: str) -> JSONResponse:
    """Return an error in OpenAI's shape, one line."""
    return JSONResponse(error_body(status, " ".join(message.split())), status)


def models_of(request: Request) -> dict[str, Clover]:
    """Return the models that can be shown an image, by name."""
    models = request.app.state.engine.models
    return {name: item.clover for name, item in models.items() if item.clover is not None}


def slide_router(folder: SlideFolder) -> APIRouter:
    """Return the routes over one folder.

    Args:
        folder: What may be shown.
    """
    router = APIRouter()

    def with_slide(
        name: str, mpp: str | None, use: Callable[[Slide], Response | dict[str, Any]]
    ) -> Any:
        try:
            slide = folder.slide(name, mpp)
        except CloverError as error:
            return refused(404 if "no slide '" in str(error) else 422, _inside(error, folder))
        try:
            return use(slide)
        except CloverError as error:
            folder.forget(slide)
            return refused(422, _inside(error, folder))

    # Plain functions: FastAPI runs them in threads, and tiles are read beside each other.
    @router.get("/slides")
    def list_slides() -> dict[str, Any]:
        return {"slides": folder.names()}

    @router.get("/slides/info")
    def info(name: str, mpp: str | None = None) -> Any:
        return with_slide(name, mpp, lambda slide: {"name": name} | described(slide))

    @router.get("/slides/tile/{level}/{column}/{row}")
    def one_tile(level: int, column: int, row: int, name: str) -> Any:
        def draw(slide: Slide) -> Response:
            return Response(tile(slide, level, column, row), media_type="image/jpeg", headers=_DAY)

        return with_slide(name, None, draw)

    @router.get("/slides/thumbnail")
    def thumbnail(name: str) -> Any:
        def draw(slide: Slide) -> Response:
            out = io.BytesIO()
            slide.overview(_THUMBNAIL).save(out, "JPEG", quality=80)
            return Response(out.getvalue(), media_type="image/jpeg", headers=_DAY)

        return with_slide(name, None, draw)

    @router.get("/slides/region")
    def region(
        request: Request, name: str, region: str, model: str | None = None, mpp: str | None = None
    ) -> Any:
        """Return a region's picture at the model's µm per pixel: what a question is asked about."""

        def draw(slide: Slide) -> Response:
            served = models_of(request)
            chosen = served.get(model or "") or next(iter(served.values()))
            picture = slide.read(parse_region(region), chosen.microns_per_pixel)
            out = io.BytesIO()
            picture.save(out, "PNG", compress_level=1)
            return Response(out.getvalue(), media_type="image/png", headers=_DAY)

        return with_slide(name, mpp, draw)

    return router


def described(slide: Slide) -> dict[str, Any]:
    """Return what a viewer has to know of a slide; label and macro are no part of it."""
    width, height = slide.size
    scale = slide.microns_per_pixel
    power = slide.power
    return {
        "kind": slide.kind,
        "width": width,
        "height": height,
        "tile": TILE,
        "overlap": OVERLAP,
        "levels": num_levels(slide),
        "microns_per_pixel": None if scale is None else {"x": scale.x, "y": scale.y},
        "origin": None if scale is None else scale.origin,
        "estimate": None if scale or not power else round(estimated_from_power(power).mean, 4),
    }


def _inside(error: CloverError, folder: SlideFolder) -> str:
    """Return an error's line without the server's own paths."""
    return str(error).replace(f"{folder.root}/", "")
