"""The server: time to first token, company, the health probe, one stream against transformers.

python -m benchmarks.serve clover-demo/model clover-demo/phantom-validation/images

Every comparison alternates both sides in one run against one server. `hostile.py` is apart.
"""

from __future__ import annotations

import base64
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import torch
from PIL import Image

import clover
from benchmarks.figure import print_figure
from clover.core.threads import in_passing_thread
from clover.language.load import load_weights
from clover.language.protocol import GenerationSettings
from clover.model import open_image
from clover.serve.app import create_app
from clover.serve.engine import Engine
from clover.serve.request import Served
from clover.serve.server import serving
from clover.serve.settings import ServeSettings

QUESTIONS = (
    "Is there necrosis?",
    "Which tissue is shown?",
    "Is fibrosis present?",
    "Which stain was used?",
    "How cellular is it?",
)
ROUNDS = 5
CAMERA = (2560, 1920)
"""Pixels of a photograph."""
LONG = 32


def main(arguments: list[str]) -> int:
    """Print the figures."""
    if len(arguments) not in (0, 2):
        print("python -m benchmarks.serve [MODEL IMAGES]", file=sys.stderr)
        return 2
    folder, images = arguments or ["clover-demo/model", "clover-demo/phantom-validation/images"]
    if not Path(folder).exists():
        print(f"no {folder}: run `make demo` first, or name a model and images", file=sys.stderr)
        return 2
    model = in_passing_thread(clover.load, folder)  # as `clover serve` does
    paths = sorted(Path(images).glob("*.png"))
    settings = ServeSettings(port=0)
    engine = Engine([Served(model.name, model.language, model)], settings)  # type: ignore[arg-type]
    with serving(create_app(engine, settings), settings) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        first_token(client, model.name, paths, "an image")
        with tempfile.TemporaryDirectory() as made:
            for kind in ("jpeg", "png"):
                pictures = photographs(paths, Path(made), kind)
                first_token(client, model.name, pictures, f"a {kind.upper()} of 5 megapixels")
        company(client, model.name, paths, url, length=None)
        company(client, model.name, paths, url, length=LONG)
    engine.close()
    in_passing_thread(parts, model, paths)
    one_stream(model, paths[0])
    return 0


def photographs(paths: Sequence[Path], folder: Path, kind: str) -> list[Path]:
    """Return the images as a microscope's camera gives them: 5 megapixels, in a format."""
    found = []
    for path in paths[: ROUNDS + 1]:
        found.append(folder / f"{path.stem}.{kind}")
        Image.open(path).resize(CAMERA, Image.Resampling.BICUBIC).save(found[-1], quality=90)
    return found


def first_token(client: openai.OpenAI, name: str, paths: Sequence[Path], what: str) -> None:
    """Seconds to the first token: a new image, another question, the same question again."""
    times: dict[str, list[float]] = {"first": [], "other": [], "same": []}
    until_first(client, name, paths[-1], QUESTIONS[0])  # the process's own first time
    for path in paths[:ROUNDS]:
        times["first"].append(until_first(client, name, path, QUESTIONS[0]))
        times["other"].append(until_first(client, name, path, QUESTIONS[1]))
        times["same"].append(until_first(client, name, path, QUESTIONS[0]))
    first = statistics.median(times["first"])
    print_figure(f"first token, first question about {what}", first, "s")
    for kind, text in (("other", "another question"), ("same", "the same question again")):
        value = statistics.median(times[kind])
        print_figure(f"first token, {text} about it", value, "s", ratio=value / first)


def until_first(client: openai.OpenAI, name: str, path: Path, question: str) -> float:
    """Return the seconds until the first piece of an answer arrives."""
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model=name, messages=messages(path, question), stream=True
    )
    seconds = 0.0
    for chunk in stream:
        if not seconds and chunk.choices[0].delta.content:
            seconds = time.perf_counter() - start
    return seconds  # with the answer read to its end: the next question waits for no one


def company(
    client: openai.OpenAI, name: str, paths: Sequence[Path], url: str, *, length: int | None
) -> None:
    """Answers a minute of 16 clients at once against one client, with the health probe beside."""
    asked = [(path, QUESTIONS[i % len(QUESTIONS)]) for i, path in enumerate(paths[:48])]
    # `n` seeds that differ make answers of full length comparable: the end token is not forbidden,
    # so long answers are asked for with sampling off and a question that is answered at length.
    more: dict[str, Any] = {} if length is None else {"max_tokens": length, "temperature": 2.0}

    def ask(item: tuple[int, tuple[Path, str]]) -> int:
        number, (path, question) = item
        reply = client.chat.completions.create(
            model=name, messages=messages(path, question), seed=number, **more
        )
        assert reply.usage is not None, "our server counts"
        return reply.usage.completion_tokens

    kind = "short answers" if length is None else f"sampled answers of at most {length} tokens"
    rates: dict[int, list[float]] = {1: [], 16: []}
    tokens = 0
    probes: list[float] = []
    list(map(ask, enumerate(asked[:2])))
    for part in range(2):
        for clients in (1, 16):
            rows = list(enumerate(asked[part * 24 : part * 24 + 24]))
            # Both sides meet images that are kept: the encoder is not what is compared.
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(ask, rows))
            stop = threading.Event()
            probe = threading.Thread(target=health, args=(url, stop, probes), daemon=True)
            if clients > 1:
                probe.start()
            start = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                tokens += sum(pool.map(ask, rows))
            rates[clients].append(60 * len(rows) / (time.perf_counter() - start))
            stop.set()
            if clients > 1:
                probe.join()
    one, many = (statistics.median(rates[clients]) for clients in (1, 16))
    print_figure(f"{kind}, 1 client", one, "answers/min", tokens_each=tokens / 96)
    print_figure(f"{kind}, 16 clients", many, "answers/min", ratio=many / one)
    probes.sort()
    print_figure(
        f"{kind}, health probe under load, p99",
        1000 * probes[int(0.99 * (len(probes) - 1))],
        "ms",
        probes=len(probes),
    )


def health(url: str, stop: threading.Event, found: list[float]) -> None:
    """Ask for the server's health over one connection until told to stop."""
    import http.client
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port)
    while not stop.is_set():
        start = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        found.append(time.perf_counter() - start)
        time.sleep(0.02)


def parts(model: clover.Clover, paths: Sequence[Path]) -> None:
    """Processor time, on one thread, of what a first token is made of; the server apart."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one waits by spinning, which would be counted
    language: Any = model.language
    question = QUESTIONS[1]
    rows = [language.instruction_ids(question)]
    with torch.no_grad(), model.device.autocast():
        pixels = [model.encoder.prepare(open_image(path))[None] for path in paths[:ROUNDS]]
        features = [model.encoder.encode(item).float() for item in pixels]
        visual = model.visual_prefix(features[0], [question])

        def read(_: int) -> None:
            language._begin(visual, rows, language.prefix_ids, 8)

        for _ in range(8):  # the weights come into the order in which they stay
            read(0)
        steps: dict[str, Callable[[int], object]] = {
            "reading and preparing the image": lambda i: model.encoder.prepare(
                open_image(paths[i])
            ),
            "encoder": lambda i: model.encoder.encode(pixels[i]),
            "Q-Former": lambda i: model.visual_prefix(features[i], [question]),
            f"{visual.shape[1]} visual and {len(rows[0])} text tokens, head included": read,
        }
        for name, function in steps.items():
            times = []
            for number in range(ROUNDS):
                start = time.thread_time()
                function(number)
                times.append(time.thread_time() - start)
            print_figure(f"first token, {name}", 1000 * min(times), "ms of processor time")
    torch.set_num_threads(threads)


def one_stream(model: clover.Clover, path: Path) -> None:
    """Tokens a second of one answer against `transformers` generate on the same embeddings."""
    language: Any = model.language
    # Weights of its own: ours are held packed while we write, and taken apart for others.
    other = load_weights(
        model.recipe.language, device=model.device.device, dtype=model.device.dtype
    ).model.eval()
    question, length = QUESTIONS[0], 48
    engine = Engine([Served("m", language, model)], ServeSettings())

    def embedded() -> tuple[torch.Tensor, torch.Tensor]:
        prefix = model.visual_prefix(model.encode(path), [question])
        found: tuple[torch.Tensor, torch.Tensor] = language._embedded(
            prefix, [language.instruction_ids(question)], language.prefix_ids
        )
        return found

    embeds, mask = engine.call(embedded).result()

    def generate() -> int:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            out = other.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=language.tokens.end_id,
            )
        return int(out.shape[1])

    def theirs() -> int:
        # In the same thread, so that no side's helpers are in the other's way.
        return engine.call(generate).result()

    def ours() -> int:
        return written(engine, model, path, question, length)

    whole = alternate(ours, theirs)
    print_figure(
        f"one answer of {length} tokens, engine", whole[0], "tokens/s", ratio=whole[0] / whole[1]
    )
    print_figure(f"one answer of {length} tokens, transformers generate", whole[1], "tokens/s")
    engine.close()


def alternate(ours: Callable[[], int], theirs: Callable[[], int]) -> tuple[float, float]:
    """Return tokens a second of both, alternating, after one run each that is not counted."""
    rates: list[list[float]] = [[], []]
    for turn in range(ROUNDS + 1):
        for side, function in enumerate((ours, theirs)):
            start = time.perf_counter()
            count = function()
            if turn:
                rates[side].append(count / (time.perf_counter() - start))
    return statistics.median(rates[0]), statistics.median(rates[1])


def written(engine: Engine, model: clover.Clover, path: Path, question: str, length: int) -> int:
    """Ask the engine for an answer of so many tokens; return how many were written."""
    import queue

    from clover.core.files import sha256_file
    from clover.serve.request import Event, Picture, Question
    from clover.serve.writing import Piece

    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    settings = GenerationSettings(max_tokens=length, min_tokens=length)
    pixels = model.encoder.prepare(open_image(path))
    picture = Picture(sha256_file(path), pixels)
    # A question of its own each time: only the constant text is reused, as between strangers.
    engine.prompts.max_bytes = 0
    engine.submit(Question("m", settings, question, picture), events.put)
    count = 0
    while True:
        event = events.get()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Piece):
            count += event.num_tokens
            if event.finish_reason is not None:
                return count


def messages(path: Path, question: str) -> Any:
    """Return one user's message."""
    uri = f"data:image/{path.suffix[1:]};base64," + base64.b64encode(path.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": uri}}
    return [{"role": "user", "content": [{"type": "text", "text": question}, image]}]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
