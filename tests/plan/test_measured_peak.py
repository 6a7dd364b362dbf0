"""The plan's peak against what a process really took, at a small size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clover.core.config import Recipe
from clover.plan.count import Count
from clover.plan.step import EncoderSize, align_size, tune_size

LANGUAGE = {
    "model_type": "llama",
    "vocab_size": 4000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stage", ["align", "tune"])
def test_the_peak_is_within_15_percent_of_the_measured_one(tmp_path: Path, stage: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LANGUAGE))
    recipe = Recipe.model_validate(
        {
            "name": "measured",
            "precision": "float32",
            "device": "cpu",
            "qformer": {
                "hidden_size": 384,
                "num_layers": 4,
                "num_heads": 6,
                "intermediate_size": 1536,
                "vocab_size": 4000,
                "encoder_width": 512,
                "dropout": 0.0,
            },
            "language": {
                "weights": str(tmp_path),
                "max_instruction_tokens": 32,
                "max_answer_tokens": 32,
            },
            "align": {"batch_size": 48, "max_text_tokens": 32},
            "tune": {"batch_size": 32, "max_question_tokens": 32},
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    encoder = EncoderSize("none", 0, 0, num_tokens=64, width=512, image=Count(0, 0))
    planned = (align_size if stage == "align" else tune_size)(recipe, encoder).peak
    # Big blocks go back to the system at once, so that the peak is the step's and not malloc's.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("measured.py"), stage, path],
        capture_output=True,
        text=True,
        check=False,
        env=variables,
    )
    assert done.returncode == 0, done.stderr[-800:]
    measured = int(done.stdout)
    assert measured > 250 << 20
    assert planned == pytest.approx(measured, rel=0.15), (planned >> 20, measured >> 20)
