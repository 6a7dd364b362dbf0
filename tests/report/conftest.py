"""A run folder as `clover demo --out` leaves it, made up: small, quick, every part there."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

FORMS = {
    "tissue": ("open", "What tissue is shown?", ("liver", "colonic mucosa", "lymph node")),
    "stain": ("open", "Which stain was used?", ("haematoxylin and eosin", "PAS", "DAB")),
    "is_necrosis": ("closed", "Is there necrosis?", ("yes", "no")),
    "is_mitosis": ("closed", "Are there mitoses?", ("yes", "no")),
}
SCRIPT = "<script>alert(1)</script>"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _picture(path: Path, dice: random.Random, *, is_noisy: bool) -> None:
    """Draw a picture; a noisy one would be too large for the page as it is."""
    image = Image.new("RGB", (448, 448), (225, 160, 200))
    if is_noisy:
        image = Image.blend(Image.effect_noise(image.size, 90).convert("RGB"), image, 0.4)
    pen = ImageDraw.Draw(image)
    for _ in range(60):
        x, y, r = dice.randrange(448), dice.randrange(448), dice.randrange(6, 16)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(95, 60, 140))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _predictions(run: Path, dice: random.Random) -> None:
    rows, blind = [], []
    for index in range(80):
        form = list(FORMS)[index % len(FORMS)]
        kind, question, answers = FORMS[form]
        truth = answers[dice.randrange(len(answers))]
        said = truth if dice.random() < 0.8 else answers[dice.randrange(len(answers))]
        row = {
            "id": f"q{index}",
            "image": f"images/{index % 12:05d}.png",
            "question": question,
            "answer": truth,
            "answer_type": kind,
            "form": form,
        }
        rows.append({**row, "prediction": said})
        blind.append({**row, "prediction": answers[0]})
    rows[2]["prediction"] = SCRIPT
    rows[0].update(answer="colonic mucosa", prediction="mucosa of the stomach")
    header = {"header": {"model": "made-up", "notice": "research use only"}}
    write_lines(run / "evaluation" / "predictions.jsonl", [header, *rows])
    write_lines(run / "evaluation" / "blind.jsonl", [header, *blind])


def _figure(value: float, half: float = 3.0, n: int = 240) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def _scores(run: Path) -> None:
    views = {
        view: {"closed": _figure(closed), "open_recall": _figure(open_)}
        for view, (closed, open_) in {
            "image": (91.37, 86.2),
            "blind": (50.1, 31.4),
            "shuffled": (52.6, 29.8),
            "noise": (49.2, 30.3),
        }.items()
    }
    write(
        run / "scores.json",
        {
            "closed": 91.37,
            "open_recall": 86.2,
            "image_gain_closed": 41.27,
            "image_gain_open": 54.8,
            "num_closed": 240,
            "num_open": 240,
            "seconds": 512.4,
            "dollars": 0.0,
            "details": {
                "protocol": "strict@1",
                "images": "phantom-validation",
                "trainable_parameters": 9412224,
                "per_log_parameters": {"closed": 93.84, "open_recall": 88.53},
                "views": views,
                "gains": {
                    "blind": {"closed": _figure(41.27, 5), "open": _figure(54.8, 4)},
                    "shuffled": {"closed": _figure(38.8), "open": _figure(56.4)},
                },
                "unparsed": 0.4,
                "yes_rate": 51.2,
                "base_rate": 50.0,
                "baselines": {
                    "colour_only": {"closed": _figure(55.0), "open_recall": _figure(44.0)},
                    "linear_probe": {"closed": _figure(88.8), "open_recall": _figure(84.4)},
                    "majority": {"closed": 50.0, "open_exact": 22.5},
                    "question_only": {"closed": 50.8, "open_exact": 30.1},
                },
                "forms": {
                    f"{form} ({kind})": {
                        "type": kind,
                        "n": 120,
                        "image": 80.0 + index,
                        "blind": 50.0,
                        "colour": 55.5,
                        "probe": 79.3,
                        "majority": 50.0,
                    }
                    for index, (form, (kind, _, _)) in enumerate(FORMS.items())
                },
                "verdict": "The model looks: on closed questions the image is worth 41.3 points.",
            },
        },
    )


def _training(run: Path) -> None:
    rows = []
    for step in range(5, 125, 5):
        parts = {"contrast": 3.4 / step**0.2, "match": 0.64 / step**0.1, "caption": 6 / step**0.3}
        loss = sum(parts.values())
        rows.append({"stage": "align", "step": step, "time": 0.0, "loss": loss, **parts})
    for stage in ("ground", "anchor"):
        for step in range(10, 210, 10):
            rows.append({"stage": stage, "step": step, "time": 0.0, "loss": 3.0 / step**0.5})
    rows.append({"stage": "refit", "step": 1, "time": 0.0, "explained_variance": 0.8123})
    for step in range(10, 310, 10):
        row = {"stage": "tune", "step": step, "time": 0.0, "loss": 2.7 / step**0.4}
        rows.append({**row, "learning_rate": 5e-4, "seconds_per_step": 0.83})
    write_lines(run / "metrics.jsonl", rows)
    stages = [
        {"stage": stage, "seconds": seconds, "dollars": 0.0, "peak_memory_gib": memory}
        for stage, seconds, memory in (
            ("phantom", 31.2, 0.4),
            ("instruct generate", 62.0, 1.9),
            ("features", 40.5, 1.1),
            ("align", 121.3, 2.6),
            ("tune", 249.0, 3.37),
            ("evaluate", 70.4, 3.37),
        )
    ]
    write(run / "costs.json", {"total": {"seconds": 574.4, "dollars": 0.0042}, "stages": stages})
    write(
        run / "align.scores.json",
        {
            "num_pairs": 120,
            "image_to_text_recall_1": 41.67,
            "image_to_text_recall_5": 78.33,
            "text_to_image_recall_1": 39.17,
            "text_to_image_recall_5": 77.5,
            "matching_accuracy": 88.61,
        },
    )


def _instructions(run: Path, dice: random.Random) -> None:
    sets: dict[str, list[dict[str, Any]]] = {"template": [], "generated": [], "truth": []}
    for origin, count in (("template", 40), ("generated", 25), ("truth", 160)):
        for index in range(count):
            form = list(FORMS)[index % len(FORMS)]
            kind, question, answers = FORMS[form]
            answer = answers[index % len(answers)]
            if origin == "template":
                kind, question = "open", "Describe this image in detail."
                answer = "Section of " + "glands and stroma " * dice.randrange(3, 12)
            row = {"id": f"{origin}-{index}", "question": question, "answer": answer}
            sets[origin].append({**row, "answer_type": kind, "origin": origin, "form": form})
    for origin, rows in sets.items():
        write_lines(run / "instructions" / f"{origin}.jsonl", rows)
    write_lines(run / "instructions" / "hybrid.jsonl", [r for rows in sets.values() for r in rows])
    write_lines(
        run / "instructions" / "generated.rejected.jsonl",
        [
            {"source": "g", "line": index, "reason": reason, "content": {"question": "Why?"}}
            for index, reason in enumerate(["answer not in the caption"] * 7 + ["leaks"] * 3)
        ],
    )


@pytest.fixture
def run(tmp_path: Path, whole_run: Path) -> Path:
    """A whole made-up run folder, for one test to spoil."""
    return Path(shutil.copytree(whole_run, tmp_path / "demo"))


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder that every test gets a copy of."""
    dice = random.Random(0)
    folder = tmp_path_factory.mktemp("report") / "demo"
    for index in range(12):
        _picture(
            folder / "phantom-validation" / "images" / f"{index:05d}.png", dice, is_noisy=index == 0
        )
    _predictions(folder, dice)
    _scores(folder)
    _training(folder)
    _instructions(folder, dice)
    (folder / "recipe.yaml").write_text("name: made-up\nseed: 0\ntune:\n  steps: 300\n")
    write(
        folder / "model" / "config.json",
        {
            "name": "clover-phantom",
            "clover": "0.1.0",
            "encoder": {"id": "timm/tf_efficientnet_lite0", "licence": "Apache-2.0"},
            "language": {"id": "SmolLM2-135M", "licence": "Apache-2.0"},
            "trainable_parameters": 9412224,
            "bridge_sha256": "ab" * 32,
        },
    )
    return folder
