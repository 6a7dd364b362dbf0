"""Any OpenAI-compatible endpoint as a respondent, so that peers are scored side by side with ours.

In: records with images. Out: answers, one request each, a few at a time. The image goes as a data
URI; nothing is sent anywhere but to the endpoint that the user named.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from PIL import Image

from clover.core.errors import CloverError
from clover.evaluate.view import View, Viewer
from clover.vision.dataset import ImageSet

_RETRIES = 4
_TIMEOUT_S = 300.0


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
    """

    url: str
    model: str
    data: ImageSet
    max_tokens: int = 64
    concurrency: int = 4
    closed_suffix: str = ""
    key_variable: str = "OPENAI_API_KEY"
    seed: int = 0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CloverError(
                f"--endpoint '{self.url}' is not a URL such as http://127.0.0.1:8000/v1"
            )

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
        return Viewer(self.data, view=view, seed=self.seed)

    def answers(self, viewer: Viewer, indices: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Yield (index, answer) as they come.

        Raises:
            CloverError: requests that failed for good, after all others were answered.
        """
        failed: list[str] = []
        waiting: dict[Future[str], int] = {}
        left = iter(indices)
        with ThreadPoolExecutor(self.concurrency) as pool:
            while True:
                while len(waiting) < self.concurrency and not _is_hopeless(failed):
                    index = next(left, None)
                    if index is None:
                        break
                    waiting[pool.submit(self._ask, viewer, index)] = index
                if not waiting:
                    break
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    index = waiting.pop(future)
                    try:
                        yield index, future.result()
                    except CloverError as error:
                        failed.append(str(error))
        if failed:
            raise CloverError(
                f"{len(failed):,} of {len(indices):,} questions got no answer from {self.model} "
                f"(first: {failed[0]}); the same command asks only these again"
            )

    @cached_property
    def _client(self) -> Any:
        from openai import OpenAI

        key = os.environ.get(self.key_variable) or "none"
        return OpenAI(base_url=self.url, api_key=key, max_retries=_RETRIES, timeout=_TIMEOUT_S)

    def _ask(self, viewer: Viewer, index: int) -> str:
        import openai

        picture = viewer.picture(index)
        record = self.data.records[index]
        question = viewer.question(index) or ""
        if record.answer_type == "closed" and not question.endswith(self.closed_suffix):
            question += self.closed_suffix
        content: list[dict[str, Any]] = []
        if picture is not None:
            content.append({"type": "image_url", "image_url": {"url": data_uri(picture)}})
        content.append({"type": "text", "text": question})
        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": content}],
                max_tokens=self.max_tokens,
                temperature=0.0,
            )
        except openai.OpenAIError as error:
            raise CloverError(" ".join(str(error).split())[:200]) from error
        # Some servers send an error as a reply without choices.
        if not reply.choices:
            raise CloverError("a reply without choices")
        return str(reply.choices[0].message.content or "")


def _is_hopeless(failed: Sequence[str]) -> bool:
    """Return whether so many requests failed in the same way that the rest will."""
    return len(failed) >= 8 and len(set(failed)) == 1


def data_uri(picture: Image.Image) -> str:
    """Return a picture as a PNG in a data URI: no pixel is changed on the way."""
    packed = io.BytesIO()
    picture.save(packed, "PNG")
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode("ascii")
