"""The switches that spare memory, as a user sets them: `clover align --set ...`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clover.align.cached import backward_in_chunks
from clover.align.losses import LossSettings
from clover.align.run import align
from clover.core.errors import CloverError
from clover.core.run import RunFolder
from clover.qformer.tokenizer import Tokens
from tiny import Tiny, tiny_recipe


def train(
    tiny: Tiny, out: Path, *, max_steps: int | None = None, **sections: dict[str, object]
) -> Path:
    align_settings = {"batch_size": 6, **sections.pop("align", {})}
    recipe = tiny_recipe(
        tiny.folder, align=align_settings, data={"images": str(tiny.folder / "data")}, **sections
    )
    cache = tiny.folder / "cache"
    found = align(recipe, captions=tiny.captions, out=out, cache=cache, max_steps=max_steps)
    return found.weights


def test_layers_computed_again_change_no_bit_of_the_weights(tiny: Tiny, tmp_path: Path) -> None:
    plain = train(tiny, tmp_path / "a")
    again = train(tiny, tmp_path / "b", qformer={"checkpoint_activations": True})
    assert plain.read_bytes() == again.read_bytes()


def test_a_chunked_batch_logs_the_same_losses_and_resumes_exactly(
    tiny: Tiny, tmp_path: Path
) -> None:
    no_dropout = {"dropout": 0.0}
    # Without dropout and negatives nothing is drawn, and both ways see the same.
    only = {"losses": ["contrast", "caption"]}
    plain = train(tiny, tmp_path / "a", align=only, qformer=no_dropout)
    parts = train(tiny, tmp_path / "b", align={**only, "gradient_chunk": 4}, qformer=no_dropout)
    expected, found = load_file(str(plain)), load_file(str(parts))
    for name, value in expected.items():
        if not name.endswith("key.bias"):  # of no gradient but rounding, which AdamW blows up
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-4, msg=name)
    rows = [RunFolder(tmp_path / run).metrics("align") for run in "ab"]
    assert [row["loss"] for row in rows[1]] == pytest.approx(
        [row["loss"] for row in rows[0]], abs=1e-4
    )
    # With dropout and negatives: stopped in the middle it ends at the same bits.
    whole = train(tiny, tmp_path / "c", align={"gradient_chunk": 4})
    train(tiny, tmp_path / "d", align={"gradient_chunk": 4}, max_steps=7)
    assert (
        whole.read_bytes() == train(tiny, tmp_path / "d", align={"gradient_chunk": 4}).read_bytes()
    )


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clover.align.cached.processes.num_processes", lambda: 2)
    case = torch.zeros(2, 1)
    with pytest.raises(CloverError, match="gradient_chunk is for one process"):
        backward_in_chunks(
            torch.nn.Linear(1, 1), case, Tokens(case, case), LossSettings(0), chunk=1
        )  # type: ignore[arg-type]
