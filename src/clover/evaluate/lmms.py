"""CLOVER as a model of lmms-eval, which asks the questions and scores by its own tasks' rules.

In: a model folder (`lmms-eval --model clover --model_args model=DIR --tasks T`). Out: answers.
lmms-eval finds it by the entry point `lmms_eval.models`; nothing of ours imports this module.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from clover.core.errors import CloverError
from clover.core.transparency import rgb_on_white
from clover.evaluate.decoding import find_decoding
from clover.language.protocol import GenerationSettings
from clover.model import load

_LOG = logging.getLogger(__name__)
MANIFEST = ModelManifest(model_id="clover", simple_class_path="clover.evaluate.lmms.CloverModel")


class CloverModel(lmms):  # type: ignore[misc]
    """A model folder of ours, asked one image and one question at a time, in batches.

    Args:
        model: The model folder.
        decoding: `task` takes tokens and beams from the task, writing greedily; `recipe` and
            `paper` are those of `clover evaluate`. `sense` is so only in part: it writes greedily
            up to the recipe's `max_tokens`, but a closed question is not given the likelier of
            yes and no, as lmms-eval does not tell a model which questions are closed.
        batch_size: Questions at once; the recipe's when absent.
        device: Ignored, as `max_batch_size`: the model folder's recipe says where it runs.
        max_batch_size: Ignored.
    """

    is_simple = True

    def __init__(
        self,
        model: str,
        decoding: str = "task",
        batch_size: int | str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self._clover = load(Path(model))
        config = self._clover.recipe.evaluate
        # lmms-eval's command passes 1 where none was asked for.
        self._batch = config.batch_size if batch_size in (None, 1, "1", "auto") else int(batch_size)
        self._settings: GenerationSettings | None = None
        if decoding != "task":
            kind = self._clover.recipe.language.kind
            found = find_decoding(decoding, config, is_encoder_decoder=kind == "encoder_decoder")
            self._settings = found.settings
            if found.chooses_yes_no:
                _LOG.warning(
                    "decoding=%s: closed questions are written freely, not chosen from yes and no, "
                    "as lmms-eval does not say which are closed; clover evaluate chooses",
                    found.name,
                )

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer each request's question about its image.

        Raises:
            CloverError: a request without an image, with several, or with a video.
        """
        answers: dict[int, str] = {}
        for settings, places in self._alike(requests):
            for start in range(0, len(places), self._batch):
                part = places[start : start + self._batch]
                asked = [requests[place].args for place in part]
                features = torch.cat([self._clover.encode(self._image(one)) for one in asked])
                questions = [str(one[0]).replace("<image>", " ").strip() for one in asked]
                texts = self._clover.answer_features(features, questions, settings)
                for place, one, text in zip(part, asked, texts, strict=True):
                    answers[place] = _cut(text, one[1].get("until")).strip()
        return [answers[place] for place in range(len(requests))]

    def _alike(
        self, requests: Sequence[Instance]
    ) -> Iterator[tuple[GenerationSettings, list[int]]]:
        """Yield the places of requests that are decoded alike."""
        places: dict[GenerationSettings, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(self._settings or self._of_task(request.args[1]), []).append(place)
        yield from places.items()

    def _of_task(self, asked: dict[str, Any]) -> GenerationSettings:
        if asked.get("do_sample") or float(asked.get("temperature") or 0) > 0:
            raise CloverError(
                "this task samples its answers, which CLOVER does not; give "
                "--gen_kwargs temperature=0,do_sample=False, or the model argument decoding=recipe"
            )
        return replace(
            GenerationSettings(),
            max_tokens=int(asked.get("max_new_tokens") or self._clover.recipe.evaluate.max_tokens),
            num_beams=int(asked.get("num_beams") or 1),
        )

    def _image(self, asked: tuple[Any, ...]) -> Any:
        _, _, visual, document, task, split = asked
        shown = visual(self.task_dict[task][split][document])
        if len(shown) != 1 or isinstance(shown[0], str):
            raise CloverError(
                f"{task}, document {document}: {len(shown)} images or a video; CLOVER is shown one "
                "image a question"
            )
        return rgb_on_white(shown[0])

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuse: CLOVER ranks whole answers, not continuations of any text."""
        raise CloverError("tasks by log-likelihood are not supported; take one that generates")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse: the tasks of several rounds show further images."""
        raise CloverError("tasks of several rounds are not supported; take one that generates once")


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    for end in [until] if isinstance(until, str) else until or []:
        if end.strip():  # a bare line end would cut an answer that begins with one
            text = text.partition(end)[0]
    return text
