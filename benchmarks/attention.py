"""Does the heat map show the finding? Pointing game and deletion test on the phantom.

    python benchmarks/attention.py MODEL PHANTOM [--images 100]

The phantom knows where it painted necrosis and infiltrate. A map scores a point when its strongest
place lies inside (pointing game, Zhang et al. 2016); a random place scores the finding's share of
the picture. One JSON line a figure; `random` is the peer.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

import clover
from clover.explain import delete, explain, likelihood, look
from clover.phantom.case import SIZE, sample_case
from clover.phantom.picture import draw

QUESTIONS = {"necrosis": "Is there necrosis?", "infiltrate": "Which infiltrate do you see?"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("phantom", type=Path)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--deletions", type=int, default=20, help="images a finding to delete in")
    options = parser.parse_args()
    model = clover.load(options.model)
    setting = json.loads((options.phantom / "phantom.json").read_text())
    hits: dict[tuple[str, str], list[float]] = defaultdict(list)
    falls: dict[tuple[str, str], list[float]] = defaultdict(list)
    labels: dict[str, list[str]] = defaultdict(list)
    for index in range(min(options.images, setting["images"])):
        case = sample_case(setting["seed"], setting["split"], index)
        picture = draw(case)
        if not picture.masks:
            continue
        features = model.encode(options.phantom / "images" / f"{case.name}.png")
        for finding, mask in picture.masks.items():
            question = QUESTIONS[finding]
            maps = look(model, features, question)
            side = SIZE // maps.grid
            shown = {"rollout": maps.rollout(), "mean": maps.mean()}
            shown |= {f"layer {n}": maps.layer(n) for n in range(len(maps.weights))}
            shown |= {
                f"layer {len(maps.weights) - 1} query {n}": maps.weights[-1, n]
                for n in range(maps.weights.shape[1])
            }
            for name, heat in shown.items():
                row, column = divmod(int(heat.flatten().argmax()), maps.grid)
                middle = row * side + side // 2, column * side + side // 2
                hits[finding, name].append(float(mask[middle]))
            hits[finding, "random"].append(float(mask.mean()))
            if len(labels[finding]) < options.deletions:
                answer = model.answer_features(features, [question], model.default_settings())[0]
                test = explain(model, features, question, answer).deletion
                labels[finding].append(test.label)
                falls[finding, "attended"].append(float(np.mean(test.attended)))
                falls[finding, "random"].append(float(np.mean(test.random)))
                truth = torch.tensor(mask).float().reshape(maps.grid, side, maps.grid, side)
                measure = partial(likelihood, model, question=question, answer=answer)
                known = delete(features, truth.mean(dim=(1, 3)), measure)
                falls[finding, "painted"].append(float(np.mean(known.attended)))
    for (finding, name), values in hits.items():
        if name != "random":
            value, chance = float(np.mean(values)), float(np.mean(hits[finding, "random"]))
            show(f"pointing game, {finding}, {name}", value, chance, len(values))
    for finding, found in labels.items():
        for name in ("attended", "painted"):
            value = float(np.mean(falls[finding, name]))
            chance = float(np.mean(falls[finding, "random"]))
            show(f"fall in nats without {name} tokens, {finding}", value, chance, len(found))
        counts = {label: found.count(label) for label in sorted(set(found))}
        print(json.dumps({"figure": f"labels, {finding}", "counts": counts}), flush=True)


def show(figure: str, value: float, chance: float, count: int) -> None:
    """Print one figure beside what chance gives."""
    row = {"figure": figure, "value": round(value, 3), "random": round(chance, 3)}
    ratio = {"ratio": round(value / chance, 2)} if chance > 0 else {}
    print(json.dumps(row | ratio | {"images": count}), flush=True)


if __name__ == "__main__":
    main()
