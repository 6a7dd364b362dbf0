"""The frozen language model alone behind the server: text in, text out, on this machine.

In: a language model. Out: a base URL that any OpenAI client can talk to while the context lasts.
The demo generates instructions through it, so that the path to a large remote model is the path
that is tested. It is the engine and the application of `clover serve`, without a model that sees;
a request with a JSON schema (`response_format`) is held to it token by token.

`python -m clover.serve.local_endpoint` serves a recipe's language model until it is stopped.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

from clover.core.errors import CloverError
from clover.core.threads import in_passing_thread
from clover.language.decoder_only import DecoderOnly
from clover.serve.app import create_app
from clover.serve.engine import Engine
from clover.serve.request import Served
from clover.serve.server import serving
from clover.serve.settings import ServeSettings

_MAX_WAITING = 4096
"""Our own generation sends many at once and waits for all of them."""
_ANSWER_SECONDS = 3600.0


@contextlib.contextmanager
def serve_language_model(
    model: DecoderOnly, name: str = "local", *, max_batch: int = 16, port: int = 0
) -> Iterator[str]:
    """Serve a language model on loopback for as long as the context lasts; yield its base URL.

    Args:
        model: the frozen model.
        name: what clients call it.
        max_batch: replies written at the same time.
        port: where to listen; 0 takes a free one.

    Raises:
        CloverError: the port is taken.
    """
    settings = ServeSettings(
        port=port,
        max_batch=max_batch,
        max_waiting=_MAX_WAITING,
        max_tokens=1 << 30,  # the model's own length is the limit
        answer_seconds=_ANSWER_SECONDS,
        drain_seconds=5,
    )
    engine = Engine([Served(name, model)], settings)
    try:
        with serving(create_app(engine, settings), settings) as url:
            yield url
    finally:
        engine.close()


def main() -> None:
    """Serve the language model of a recipe on loopback until Ctrl-C."""
    import argparse

    from clover.core.config import load_recipe
    from clover.language.load import load_language_model
    from clover.training.device import choose_device

    parser = argparse.ArgumentParser(prog="python -m clover.serve.local_endpoint")
    parser.add_argument("--recipe", default="phantom", help="whose language model to serve")
    parser.add_argument("--name", default="local", help="what clients call the model")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    options = parser.parse_args()
    try:
        recipe = load_recipe(options.recipe)
        device = choose_device(recipe.device, recipe.precision)
        model = in_passing_thread(
            load_language_model,
            recipe.language,
            recipe.prompt,
            device=device.device,
            dtype=device.dtype,
        )
        if not isinstance(model, DecoderOnly):
            raise CloverError(f"{model.id} does not chat; name a recipe with a decoder_only model")
        with serve_language_model(model, options.name, port=options.port) as url:
            sys.stdout.write(f"{url} serves '{options.name}'; Ctrl-C stops it\n")
            sys.stdout.flush()
            threading.Event().wait()
    except CloverError as error:
        sys.stderr.write(f"clover: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
