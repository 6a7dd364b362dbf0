"""`clover evaluate --endpoint` and `clover instruct generate --endpoint` against `clover serve`.

A real server, real commands, and an environment whose proxy would swallow every image.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.language.test_constraint import byte_llama
from tests.serve.running import Running, environment, running
from tests.tiny import Tiny, build_tiny, tiny_clover, tiny_recipe

# Nobody listens there: a request that took the proxy would fail.
PROXY = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")


def clover(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clover.cli", *map(str, arguments)]
    variables = environment(**PROXY, OPENAI_API_KEY="", NO_PROXY="")
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny parts, with a language model whose tokens are bytes, so that it can write JSON."""
    pytest.importorskip("llguidance", reason="the extra [structured] is not installed")
    parts = build_tiny(tmp_path_factory.mktemp("own") / "parts")
    language = byte_llama()
    language.model.config.max_position_embeddings = 16384
    language.model.save_pretrained(parts.folder / "bytes")
    language.tokens.tokenizer.save_pretrained(parts.folder / "bytes")
    recipe = tiny_recipe(
        parts.folder,
        language={"weights": str(parts.folder / "bytes")},
        prompt={"template": "{image}{question}\n"},
    )
    return Tiny(parts.folder, recipe, parts.captions, parts.instructions)


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[Running]:
    model = tiny_clover(tiny.recipe).save(tiny.folder / "model")
    with running(str(model)) as started:
        yield started


def test_a_model_behind_its_own_server_is_evaluated_as_in_its_folder(
    tiny: Tiny, server: Running, tmp_path: Path
) -> None:
    common = ("--data", tiny.instructions, "--predict-only", "--out")
    served = clover(
        *("evaluate", "--endpoint", f"{server.url}/v1", "--model", "tiny", "--max-tokens", 6),
        *(*common, tmp_path / "served"),
    )
    assert served.returncode == 0, served.stderr
    folder = clover("evaluate", tiny.folder / "model", *common, tmp_path / "folder")
    assert folder.returncode == 0, folder.stderr
    answers = [
        [
            json.loads(line).get("prediction")
            for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()[1:]
        ]
        for name in ("served", "folder")
    ]
    assert len(answers[0]) == 48
    assert answers[0] == [text.strip() for text in answers[1]]


def test_instructions_come_from_our_own_server(tiny: Tiny, server: Running, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    done = clover(
        *("instruct", "generate", tiny.captions, "--out", out, "--prompt", "structured-v1"),
        *("--endpoint", f"{server.url}/v1", "--model", "tiny", "--limit", 3, "--attempts", 8),
        *("--any-language",),
    )
    assert out.exists(), done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    failed = Path(f"{out}.failed.jsonl")
    assert rows, (done.stderr, failed.read_text() if failed.exists() else "")
    assert all(row["question"] and row["answer"] for row in rows)
