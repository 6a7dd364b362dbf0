"""CLOVER as a model of lmms-eval, found by its entry point and asked by its own evaluator."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tiny import QUESTION, Tiny, tiny_clover

evaluator = pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is an extra of its own")

TASK = """task: tiny_tissue
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function shown.visual
doc_to_text: !function shown.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """from PIL import Image

def visual(doc):
    return [Image.open(doc["image"])]

def text(doc):
    return "<image> " + doc["question"]
"""


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clover(tiny.recipe).save(tmp_path_factory.mktemp("lmms") / "model")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def test_the_entry_point_names_the_model() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    point = EntryPoint("clover", "clover.evaluate.lmms:MANIFEST", "lmms_eval.models")
    for manifest in registry._coerce_payload_to_manifests(point.load()):
        registry.register_manifest(manifest)
    assert registry.get_model_class("clover").__name__ == "CloverModel"


def test_lmms_eval_asks_what_we_would_ask(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from clover.evaluate.lmms import MANIFEST
    from clover.language.protocol import GenerationSettings
    from clover.model import load

    model = load(folder)
    images = [tiny.image(name) for name in ("liver", "colon", "kidney")]
    settings = GenerationSettings(max_tokens=6)
    ours = [model.ask(image, QUESTION, settings=settings).text for image in images]
    truths = [ours[0], "wrong", ours[2]]
    rows = [
        {"image": str(image), "question": QUESTION, "answer": truth}
        for image, truth in zip(images, truths, strict=True)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "tiny.yaml").write_text(TASK.format(data=data))
    (tmp_path / "task" / "shown.py").write_text(FUNCTIONS)
    MODEL_REGISTRY_V2.register_manifest(MANIFEST, overwrite=True)
    found = evaluator.simple_evaluate(
        model="clover",
        model_args=f"model={folder}",
        tasks=["tiny_tissue"],
        batch_size=1,
        log_samples=True,
        task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
    )
    said = {
        sample["doc_id"]: sample["filtered_resps"][0] for sample in found["samples"]["tiny_tissue"]
    }
    assert [said[at] for at in range(3)] == ours
    assert found["results"]["tiny_tissue"]["exact_match,none"] == pytest.approx(2 / 3)


def test_what_clover_cannot_do_is_refused_in_a_line(folder: Path) -> None:
    from clover.core.errors import CloverError
    from clover.evaluate.lmms import CloverModel

    model = CloverModel(str(folder), batch_size="auto")
    model.task_dict = {"t": {"test": {0: None}}}
    picture = Image.new("RGB", (8, 8))

    class Request:
        def __init__(self, shown: list[Any], **decoding: Any) -> None:
            self.args = ("q", decoding, lambda _: shown, 0, "t", "test")

    for shown in ([], [picture, picture], ["video.mp4"]):
        with pytest.raises(CloverError, match="one image a question"):
            model.generate_until([Request(shown)])
    with pytest.raises(CloverError, match="samples its answers"):
        model.generate_until([Request([picture], temperature=0.7)])
    with pytest.raises(CloverError, match="log-likelihood"):
        model.loglikelihood([])
    assert len(model.generate_until([Request([picture], until=["\n\n", "."])])) == 1


def test_what_sense_leaves_out_is_said_in_a_line(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from clover.evaluate.lmms import CloverModel

    CloverModel(str(folder), decoding="recipe")
    assert not caplog.messages
    CloverModel(str(folder), decoding="sense")
    assert len(caplog.messages) == 1
    assert "closed questions are written freely, not chosen from yes and no" in caplog.messages[0]
