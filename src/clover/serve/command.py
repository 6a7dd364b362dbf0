"""The verbs of this room: `clover ask`, `clover chat`, `clover serve`."""

from __future__ import annotations

import contextlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clover.core.errors import CloverError
from clover.serve.slide_ask import mpp_option, slide_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from clover.language.protocol import GenerationSettings
    from clover.model import Clover
    from clover.serve.chat import Conversation


def _model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add what every verb that loads a model takes."""
    for option in (
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …"),
        click.option(
            "--precision",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "float32", "bfloat16"]),
            help="Number format of matrix products.",
        ),
        click.option(
            "--beams", type=click.IntRange(1, 64), help="Beam search; 1 is greedy. As the recipe."
        ),
        click.option(
            "--max-tokens", type=click.IntRange(1, 4096), help="Longest answer. As the recipe."
        ),
    ):
        command = option(command)
    return command


def _load(model: Path, options: dict[str, Any]) -> tuple[Clover, GenerationSettings]:
    from dataclasses import replace

    from clover.model import load

    loaded = load(model, device=options["device"], precision=options["precision"])
    settings = loaded.default_settings()
    if options["beams"] is not None:
        settings = replace(settings, num_beams=options["beams"])
    if options["max_tokens"] is not None:
        longest = options["max_tokens"]
        shortest = min(settings.min_tokens, longest)
        settings = replace(settings, max_tokens=longest, min_tokens=shortest)
    return loaded, settings


@click.command(epilog='Example: clover ask clover-demo/model image.png "Is there necrosis?"')
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("question", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
@slide_options
@_model_options
def ask(model: Path, image: Path, question: str | None, as_json: bool, **options: Any) -> None:
    """Ask MODEL (a model folder) one QUESTION about one IMAGE.

    The answer goes to stdout, the notice to stderr; with --json one line with answer, model,
    seconds and notice. Research use only, not for diagnosis.

    \b
    A region of a slide, in µm from its upper left corner:
      clover ask MODEL slide.svs "Is there necrosis?" --region 480,620,180,180
    All its tissue, field by field, with counts and a heat map:
      clover ask MODEL slide.svs --tour "Is there necrosis?"
    """
    from clover.model import check_question, open_image, read_config
    from clover.serve.slide_ask import ask_tour, look_at_region, stated_resolution

    # What is cheap to check is checked before gigabytes are loaded.
    config = read_config(model)
    if options["tour"] is not None:
        if question is not None:
            raise CloverError(f"--tour carries the question, '{question}' is one too many")
        learnt, side = stated_resolution(config)
        loading = partial(_load, model, options)
        asked = check_question(options["tour"])
        ask_tour(loading, image, asked, options | {"field_um": learnt * side}, as_json=as_json)
        return
    question = check_question(question or "")
    view = look_at_region(config, image, options["region"], options["mpp"])
    picture = open_image(image) if view is None else view.picture
    loaded, settings = _load(model, options)
    answer = loaded.ask(picture, question, settings=settings)
    if as_json:
        row = {
            "answer": answer.text,
            "model": answer.model,
            "seconds": answer.seconds,
            "notice": answer.notice,
            **({} if answer.note is None else {"note": answer.note}),
            **({} if view is None else view.row()),
        }
        click.echo(json.dumps(row, ensure_ascii=False))
    else:
        click.echo(answer.text)
        if view is not None and (note := view.note()) is not None:
            click.echo(note, err=True)
        if answer.note is not None:
            click.echo(answer.note, err=True)
        click.secho(answer.notice, dim=True, err=True)


@click.command(epilog="Example: clover chat clover-demo/model image.png")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("image", required=False)
@mpp_option
@_model_options
def chat(model: Path, image: str | None, mpp: str | None, **options: Any) -> None:
    """Talk with MODEL (a model folder) about IMAGE: a field of view, or a slide.

    Answers appear as they are written; Ctrl-C stops one, Ctrl-D leaves. Commands: /image PATH,
    /region X,Y,W,H (a field of a slide, in µm), /why [FILE], /new, /save FILE, /help, /quit. A
    terminal that can shows the picture. Questions may also be piped in, one a line. Research use
    only, not for diagnosis.
    """
    from clover.model import NOTICE, read_config
    from clover.serve.chat import Conversation, help_text
    from clover.serve.slide_ask import check_conversation

    config = read_config(model)
    if image is not None:
        check_conversation(config, image, mpp)
    loaded, settings = _load(model, options)
    from clover.serve.overlay import drawer

    draw = drawer(sys.stdout.isatty())
    conversation = Conversation(loaded, _write, settings, mpp=mpp, draw=draw)
    click.secho(NOTICE, dim=True, err=True)
    if image is not None:
        conversation.look_at(image)
    if sys.stdin.isatty():
        _write(help_text() + "\n")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() its history and editing keys
    _converse(conversation)


@click.command(
    epilog="Example: clover serve clover-demo/model --port 8000. Then point any OpenAI client at "
    "http://127.0.0.1:8000/v1. A token for other machines: CLOVER_TOKEN=SECRET clover serve ..."
)
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]MODEL...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: a free one."
)
@click.option("--allow-host", "hosts", multiple=True, help="A further name of this server.")
@click.option("--allow-image-urls", is_flag=True, help="Fetch images at public http(s) addresses.")
@click.option(
    "--max-batch",
    default=16,
    show_default=True,
    type=click.IntRange(1, 256),
    help="Answers written at once.",
)
@click.option(
    "--max-waiting", default=64, show_default=True, type=click.IntRange(1), help="Then 429."
)
@click.option(
    "--align",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Stage 1's align.safetensors of the first MODEL's run: adds /v1/embeddings.",
)
@click.option(
    "--slides",
    type=click.Path(path_type=Path),
    help="A folder whose slides and images the page at / may open.",
)
@click.option(
    "--language-endpoint",
    metavar="URL",
    help="A vLLM server (--enable-prompt-embeds) of the same language model, to write the answers.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …")
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="Number format of matrix products.",
)
def serve(
    models: tuple[str, ...],
    align: Path | None,
    slides: Path | None,
    device: str,
    precision: str,
    **options: Any,
) -> None:
    """Serve one or several MODELs (model folders) to OpenAI clients, and a page to look at slides.

    Several models must stand on one frozen language model; each further one costs its bridge
    alone. Off loopback a token is required, from the environment variable CLOVER_TOKEN. Ctrl-C or
    SIGTERM lets running answers finish. Research use only, not for diagnosis.
    """
    import os

    from clover.serve.server import listen
    from clover.serve.settings import ServeSettings

    settings = ServeSettings(
        token=os.environ.get("CLOVER_TOKEN") or None,
        language_key=os.environ.get("CLOVER_LANGUAGE_KEY") or None,
        **options,
    )
    # What is cheap to check is checked before torch is imported and gigabytes are loaded.
    listener = listen(settings)
    try:
        from clover.serve.run import run

        where = {"device": device, "precision": precision}
        run(models, settings, listener, write=_line, align=align, slides=slides, **where)
    finally:
        listener.close()


def _line(text: str) -> None:
    _write(text + "\n")


def _write(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _converse(conversation: Conversation) -> None:
    """Read lines until the end of input or /quit; a mistake is one line, and it goes on."""
    is_terminal = sys.stdin.isatty()
    if conversation.image is None and conversation.file is None:
        _write("Which image? Type its path.\n")
    while True:
        prompt = "image> " if conversation.image is None else "you> "
        try:
            line = input(prompt if is_terminal else "")
            if not conversation.take(line):
                return
        except EOFError:
            if is_terminal:
                _write("\n")
            return
        except CloverError as error:
            click.echo(" ".join(str(error).split()), err=True)
        except KeyboardInterrupt:
            _write("\n(Ctrl-D or /quit leaves)\n")
