"""Embeddings of images and texts in one space: stage 1's contrastive heads behind OpenAI's API.

In: texts, and images as data URIs among them. Out: unit vectors. A text is its `[CLS]` row; an
image is the mean of its queries' vectors, made a unit vector again. Stage 1 itself compares a text
with the best query of an image, so a dot product here is near its score, not equal to it.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException
from torch import Tensor
from torch.nn import functional as F

from clover.aligned import Aligned
from clover.core.errors import CloverError
from clover.model import NOTICE
from clover.serve.completion import read_picture
from clover.serve.engine import Engine
from clover.serve.request import Picture, Served
from clover.serve.wire import EmbeddingRequest


async def embed(request: Request, body: EmbeddingRequest) -> dict[str, Any]:
    """Answer an embedding request.

    Raises:
        CloverError: nothing to embed with, or an input that is none.
        HTTPException: no such model.
    """
    engine: Engine = request.app.state.engine
    served = engine.models.get(body.model)
    if served is None:
        raise HTTPException(404, f"no model '{body.model[:80]}'")
    alignment = served.alignment
    if alignment is None:
        raise CloverError(
            f"'{served.name}' has no embeddings: its folder holds stage 2 alone; put the run's "
            "align.safetensors into it, or for the first model start the server with --align FILE"
        )
    size = alignment.bridge.config.embedding_size
    if body.dimensions not in (None, size):
        raise CloverError(f"dimensions is {body.dimensions}, these embeddings have {size}")
    rows, tokens = [], 0
    for index, text in enumerate(body.inputs):
        if not text.strip():
            raise CloverError(f"input {index} is empty")
        if text[:5].lower() == "data:":
            picture = await read_picture(request, text, served)
            work = engine.call(_embed_image, alignment, engine, served, picture)
        else:
            work = engine.call(_embed_text, alignment, text)
        vector, count = await asyncio.wrap_future(work)
        rows.append({"object": "embedding", "index": index, "embedding": _wire(vector, body)})
        tokens += count
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": rows, "model": body.model, "usage": usage, "notice": NOTICE}


def _embed_text(alignment: Aligned, text: str) -> tuple[Tensor, int]:
    """Return a text's unit vector and how many word pieces it has."""
    tokens = alignment.tokens([text])
    return alignment.text_vectors(tokens)[0].float().cpu(), int(tokens.mask.sum())


def _embed_image(
    alignment: Aligned, engine: Engine, served: Served, picture: Picture
) -> tuple[Tensor, int]:
    """Return an image's unit vector and how many queries it is the mean of."""
    assert served.clover is not None, "stage 1 stands beside a model that sees"
    features = served.clover.upright(engine.features_of(served, picture))
    vectors = alignment.image_vectors(features)[0]
    return F.normalize(vectors.float().mean(dim=0), dim=0).cpu(), len(vectors)


def _wire(vector: Tensor, body: EmbeddingRequest) -> list[float] | str:
    if body.encoding_format == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode("ascii")
    numbers: list[float] = vector.tolist()
    return numbers
