"""Any OpenAI-compatible endpoint as a respondent, so that peers are scored side by side with ours.

In: records with images. Out: answers, one request each, a few at a time. The image goes as a data
URI; nothing is sent anywhere but to the endpoint that the user named.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from PIL import Image

from clover.core.endpoint import (
    Client,
    Declined,
    Lost,
    Refused,
    check_endpoint,
    find_key,
    pause_s,
)
from clover.core.errors import CloverError
from clover.evaluate.view import View, Viewer
from clover.vision.dataset import ImageSet

_ATTEMPTS = 5
_TIMEOUT_S = 300.0
_LONGEST_PAUSE_S = 60.0
_FAILURES = (Declined, Refused, Lost)


@dataclass(frozen=True)
class EndpointModel:
    """A model behind an endpoint.

    Attributes:
        url: Of the API, as http://127.0.0.1:8000/v1.
        model: Its name there.
        data: What it is asked.
        max_tokens: Of an answer.
        concurrency: Requests on the way at a time.
        closed_suffix: Added to a closed question.
        key_variable: The environment variable that holds the API key, where one is needed.
        seed: Of shuffling and noise.
        microns_per_pixel: At which regions of slides are read, as they were for `data`.
    """

    url: str
    model: str
    data: ImageSet
    max_tokens: int = 64
    concurrency: int = 4
    closed_suffix: str = ""
    key_variable: str = "OPENAI_API_KEY"
    seed: int = 0
    microns_per_pixel: float | None = None

    def __post_init__(self) -> None:
        check_endpoint(self.url)

    def identity(self) -> dict[str, Any]:
        """Return what the header says of it; a password in the URL is left out."""
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]
        return {
            "model": self.model,
            "model_key": "",
            "model_hash": None,
            "endpoint": urlunsplit((parts.scheme, host, parts.path, "", "")),
            "prompt": {
                "template": "one user message: {image}, then {question}",
                "closed_suffix": self.closed_suffix,
            },
            "decoding": {"name": "endpoint", "temperature": 0.0, "max_tokens": self.max_tokens},
        }

    def viewer(self, view: View) -> Viewer:
        """Return questions and pictures in a view."""
        return Viewer(
            self.data, view=view, seed=self.seed, microns_per_pixel=self.microns_per_pixel
        )

    def answers(self, viewer: Viewer, indices: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Yield (index, answer) as they come.

        Raises:
            CloverError: no key for an endpoint elsewhere; one that cannot be worked with; requests
                that failed for good, after all others were answered.
        """
        key = find_key(self.url, self.key_variable)
        failed: list[str] = []
        fatal: CloverError | None = None
        waiting: dict[asyncio.Task[str], int] = {}
        left = iter(indices)
        # The loop runs while there is something to wait for; the caller works in between.
        with asyncio.Runner() as runner:
            client = runner.run(self._client(key))
            try:
                while True:
                    while (
                        len(waiting) < self.concurrency
                        and fatal is None
                        and not _is_hopeless(failed)
                    ):
                        index = next(left, None)
                        if index is None:
                            break
                        asking = self._ask(client, viewer, index)
                        waiting[runner.get_loop().create_task(asking)] = index
                    if not waiting:
                        break
                    for task in runner.run(_first_done(waiting)):
                        index = waiting.pop(task)
                        try:
                            yield index, task.result()
                        except _FAILURES as error:
                            failed.append(str(error))
                        except CloverError as error:
                            # No more is asked; what is under way was paid for, and is kept.
                            fatal = fatal or error
            finally:
                runner.run(client.__aexit__())
        if fatal is not None:
            raise fatal
        if failed:
            raise CloverError(
                f"{len(failed):,} of {len(indices):,} questions got no answer from {self.model} "
                f"(first: {failed[0]}); the same command asks only these again"
            )

    async def _client(self, key: str) -> Client:
        return Client(
            check_endpoint(self.url), key=key, timeout_s=_TIMEOUT_S, concurrency=self.concurrency
        )

    async def _ask(self, client: Client, viewer: Viewer, index: int) -> str:
        """Ask one question, again where that may help.

        Raises:
            CloverError: the endpoint cannot be worked with.
            Declined: it finds fault with this question, or the image cannot be read.
            Refused: it was busy or broken every time.
            Lost: no whole reply came, however often it was asked.
        """
        try:
            body = await asyncio.to_thread(self._body, viewer, index)
        except CloverError as error:  # this record's image, not the endpoint
            raise Declined(str(error)) from error
        for attempt in range(1, _ATTEMPTS):
            try:
                return (await client.send(body)).text
            except (Refused, Lost) as error:
                await asyncio.sleep(pause_s(error, attempt, _LONGEST_PAUSE_S))
        return (await client.send(body)).text

    def _body(self, viewer: Viewer, index: int) -> dict[str, Any]:
        """Return the request about one record."""
        picture = viewer.picture(index)
        record = self.data.records[index]
        question = viewer.question(index) or ""
        if record.answer_type == "closed" and not question.endswith(self.closed_suffix):
            question += self.closed_suffix
        content: list[dict[str, Any]] = []
        if picture is not None:
            content.append({"type": "image_url", "image_url": {"url": data_uri(picture)}})
        content.append({"type": "text", "text": question})
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
        }


async def _first_done(waiting: Iterable[asyncio.Task[str]]) -> set[asyncio.Task[str]]:
    """Return those that have ended, at least one."""
    return (await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED))[0]


def _is_hopeless(failed: Sequence[str]) -> bool:
    """Return whether so many requests failed in the same way that the rest will."""
    return len(failed) >= 8 and len(set(failed)) == 1


def data_uri(picture: Image.Image) -> str:
    """Return a picture as a PNG in a data URI: no pixel is changed on the way."""
    packed = io.BytesIO()
    picture.save(packed, "PNG")
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode("ascii")
