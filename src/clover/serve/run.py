"""`clover serve`: from model folders to a server that says what it serves and with which limits.

In: model folders. Out: nothing until somebody stops it.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from clover.core.config import Recipe
from clover.core.errors import CloverError
from clover.core.threads import in_passing_thread
from clover.language.frozen import FrozenLanguage
from clover.model import NOTICE, Clover, load, read_config, recipe_of
from clover.serve.app import create_app
from clover.serve.engine import Engine
from clover.serve.page.folder import SlideFolder
from clover.serve.page.router import page_router
from clover.serve.request import Served
from clover.serve.server import build_server
from clover.serve.settings import ServeSettings
from clover.training.device import choose_device


def run(
    models: Sequence[str],
    settings: ServeSettings,
    listener: socket.socket,
    *,
    write: Callable[[str], None],
    align: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    slides: Path | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then let running answers finish.

    Args:
        models: Model folders, each as `FOLDER` or `NAME=FOLDER`.
        settings: How much.
        listener: From `listen`; the caller closes it.
        write: Takes lines for the person who started it.
        align: Stage 1's weights of the first model's run, for embeddings; a folder's own
            `align.safetensors` needs none.
        device: `auto`, `cpu`, `cuda`, ...
        precision: `auto`, `float32` or `bfloat16`.
        slides: The folder whose slides the page may open; no file outside it is ever sent.

    Raises:
        CloverError: a model that cannot be loaded, models that do not belong together, or no such
            folder.
    """
    folder = None if slides is None else SlideFolder(slides)
    named = [_named(text) for text in models]
    recipes = {path: recipe_of(read_config(path), path) for _, path in named}
    if precision == "auto":
        _check_formats(recipes, device)
    # The engine's thread computes from here on, and this one no more.
    served = in_passing_thread(load_served, named, align, device=device, precision=precision)
    engine = Engine(served, settings)
    try:
        app = create_app(engine, settings, routers=[page_router(folder)])
        server = build_server(app, settings)
        for line in describe(engine, settings, listener.getsockname()[1]):
            write(line)
        # What comes before uvicorn listens for signals is obeyed as soon as it does; and it raises
        # them again once it has drained, when they have been obeyed.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        server.run(sockets=[listener])
        write("stopped")
    finally:
        engine.close()


def load_served(
    named: Sequence[tuple[str | None, Path]],
    align: Path | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
) -> list[Served]:
    """Load model folders; what is frozen and the same is loaded once. `align` is as in `run`.

    Raises:
        CloverError: see `clover.model.load`.
    """
    served: list[Served] = []
    first: Clover | None = None
    for name, path in named:
        model = load(path, device=device, precision=precision, beside=first)
        first = first or model
        assert isinstance(model.language, FrozenLanguage), "load gives no other"
        # Of a folder that holds its own stage 1, embeddings are served as they are compared.
        served.append(Served(name or model.name, model.language, model, model.aligned))
    if align is not None:
        assert first is not None, "a server has a model"
        served[0] = replace(served[0], alignment=first.attach_alignment(align))
    return served


def _check_formats(recipes: Mapping[Path, Recipe], device: str) -> None:
    """Refuse recipes that insist on unlike number formats before gigabytes are loaded in both.

    Raises:
        CloverError: two of them would not share a language model.
    """
    said: dict[torch.dtype, str] = {}
    for path, recipe in recipes.items():
        dtype = choose_device(device, recipe.precision).dtype
        here = f" ({str(dtype).removeprefix('torch.')} here)" if recipe.precision == "auto" else ""
        said.setdefault(dtype, f"{path} has precision {recipe.precision}{here}")
    if len(said) > 1:
        raise CloverError(
            f"{', '.join(said.values())}, and models that are served together share one language "
            "model; give --precision float32 or --precision bfloat16 for all of them"
        )


def describe(engine: Engine, settings: ServeSettings, port: int) -> list[str]:
    """Return what is served, where, and with which limits."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    lines = []
    for served in engine.models.values():
        clover = served.clover
        if clover is not None:
            count = sum(item.numel() for item in clover.bridge.parameters())
            lines.append(
                f"{served.name}: {clover.encoder.id}, bridge of {count / 1e6:.1f}M parameters, "
                f"{served.language.id.split('?')[0]}"
            )
    if settings.language_endpoint is not None:
        lines.append(
            f"answers are written by {settings.language_endpoint}: prompts leave this server"
        )
    mib = 2**20
    lines += [
        f"at http://{host}:{port}/v1 (OpenAI's API), /health, /metrics; the page is at /; "
        + ("a token is required" if settings.token else "no token, this machine alone"),
        f"limits: {settings.max_batch} answers at once, {settings.max_waiting} wait, "
        f"{settings.max_body_bytes // mib} MiB a request, {settings.max_pixels / 1e6:g} megapixels "
        f"an image, {settings.max_tokens} tokens and {settings.answer_seconds:g} s an answer; "
        + ("public image addresses are fetched" if settings.allow_image_urls else "no image URLs"),
        f"{NOTICE} Ctrl-C stops it.",
    ]
    return lines


def _named(text: str) -> tuple[str | None, Path]:
    """Read `NAME=FOLDER` or `FOLDER`."""
    name, sign, path = text.partition("=")
    if not sign or Path(text).exists():
        return None, Path(text)
    if not name or not path:
        raise CloverError(f"'{text}' is neither FOLDER nor NAME=FOLDER")
    return name, Path(path)
