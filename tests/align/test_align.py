"""Stage 1 as a whole: it learns, writes what it promises, and refuses what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from clover.align import evaluate
from clover.align.contrast import contrastive_loss, same_caption, similarity
from clover.align.match import Negatives, negative_weights, sample_negatives
from clover.align.run import align
from clover.core.errors import CloverError
from clover.core.files import read_json
from clover.core.run import RunFolder
from tiny import Tiny, tiny_recipe


def test_training_brings_images_and_their_captions_together(tiny: Tiny, tmp_path: Path) -> None:
    settings = {"steps": 60, "batch_size": 12, "learning_rate": 3e-3}
    recipe = tiny_recipe(tiny.folder, align=settings, qformer={"dropout": 0.0})
    found = align(
        recipe,
        captions=tiny.captions,
        out=tmp_path,
        cache=tiny.folder / "cache",
        validation=tiny.captions,
    )
    rows = RunFolder(tmp_path).metrics("align")
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    for name in ("contrast", "match", "caption"):
        assert rows[-1][name] < rows[0][name], name
    assert found.scores is not None
    # 24 pairs, colour decides the tissue: chance is 1 in 6 texts at the first place.
    assert found.scores.image_to_text_recall_5 >= 80
    assert read_json(tmp_path / "align.scores.json") == found.scores.row()


def test_it_leaves_weights_metrics_and_the_bill(tiny: Tiny, tmp_path: Path) -> None:
    found = align(tiny.recipe, captions=tiny.captions, out=tmp_path, cache=tiny.folder / "cache")
    state = load_file(str(found.weights))
    assert {"heads.temperature", "qformer.query_tokens", "vision_norm.weight"} <= set(state)
    assert {item["stage"] for item in RunFolder(tmp_path).costs()} == {"features", "align"}
    assert (tmp_path / "recipe.yaml").exists() and found.is_finished


@pytest.mark.parametrize("which", [["contrast"], ["match"], ["caption"], ["contrast", "caption"]])
def test_losses_can_be_left_out(tiny: Tiny, tmp_path: Path, which: list[str]) -> None:
    recipe = tiny_recipe(tiny.folder, align={"losses": which, "steps": 10})
    align(recipe, captions=tiny.captions, out=tmp_path, cache=tiny.folder / "cache")
    row = RunFolder(tmp_path).metrics("align")[0]
    assert {"contrast", "match", "caption"} & set(row) == set(which)
    assert row["loss"] == pytest.approx(sum(row[name] for name in which), abs=1e-4)


def test_what_is_set_aside_is_listed_in_the_run_folder(tiny: Tiny, tmp_path: Path) -> None:
    lines = tiny.captions.read_text().splitlines()
    broken = json.dumps({"id": "gone", "image": "images/gone.png", "caption": "x"})
    data = tmp_path / "captions.jsonl"
    data.write_text("\n".join([*lines, broken]))
    recipe = tiny_recipe(tiny.folder, data={"images": str(tiny.folder / "data")})
    found = align(
        recipe, captions=data, out=tmp_path / "run", cache=tiny.folder / "cache", max_steps=1
    )
    listed = (tmp_path / "run" / "align.rejected.jsonl").read_text().splitlines()
    assert len(listed) == 1 and "missing image" in listed[0]
    assert "1 set aside" in found.summary


def test_captions_are_cut_to_the_positions_there_are(tiny: Tiny, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in tiny.captions.read_text().splitlines()]
    data = tmp_path / "captions.jsonl"
    data.write_text(
        "\n".join(json.dumps({**row, "caption": f"{row['caption']} " * 20}) for row in rows)
    )
    recipe = tiny_recipe(
        tiny.folder,
        data={"images": str(tiny.folder / "data")},
        qformer={"max_positions": 16},
        align={"steps": 2, "max_text_tokens": 32},
    )
    cache, out = tiny.folder / "cache", tmp_path / "run"
    assert align(recipe, captions=data, out=out, cache=cache, validation=data).is_finished
    assert "max_text_tokens: 32" in (out / "recipe.yaml").read_text()  # as it was given


def test_one_pair_a_batch_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny.folder, align={"batch_size": 1})
    with pytest.raises(CloverError, match=r"at least 2 pairs a batch.*align\.batch_size 1"):
        align(recipe, captions=tiny.captions, out=tmp_path, cache=tiny.folder / "cache")


def test_sums_of_parts_are_no_stage_1_and_what_is_has_a_name(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny.folder, align={"batch_size": 12, "accumulate": 3})
    with pytest.raises(CloverError, match=r"align.accumulate is 3.*align.gradient_chunk=4 has"):
        align(recipe, captions=tiny.captions, out=tmp_path, cache=tiny.folder / "cache")


def test_retrieval_a_block_at_a_time_is_that_of_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(9, 3, 4, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(9, 4, generator=generator), dim=-1)
    captions = list("abcdefgha")  # the last says what the first says
    wanted = []
    for of_text in (False, True):
        for k in (1, 5):
            found = []
            for row in range(9):
                others = [
                    float(
                        (images[column] @ texts[row]).max()
                        if of_text
                        else (images[row] @ texts[column]).max()
                    )
                    for column in range(9)
                ]
                best = sorted(range(9), key=lambda column: -others[column])[:k]
                found.append(float(any(captions[row] == captions[column] for column in best)))
            wanted.append(found)
    for numbers in (1, 9 * 3 * 2, 1 << 20):
        monkeypatch.setattr(evaluate, "_NUMBERS", numbers)
        got = evaluate._found(images, texts, torch.tensor(0.07), captions)
        assert got.tolist() == wanted
    assert 0 < sum(map(sum, wanted)) < 36


def test_the_contrast_of_perfect_pairs_is_smaller_than_of_swapped_ones() -> None:
    vectors = torch.eye(4)
    images = vectors[:, None].expand(4, 2, 4)
    temperature = torch.tensor(0.07)
    right = contrastive_loss(similarity(images, vectors, temperature), label_smoothing=0.0)
    wrong = contrastive_loss(similarity(images, vectors.roll(1, 0), temperature), label_smoothing=0)
    assert right < 1e-4 and wrong > 10


def test_an_image_is_as_similar_to_a_text_as_its_best_query() -> None:
    image = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [-1.0, 0.0]]])
    text = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = similarity(image, text, torch.tensor(0.5))
    torch.testing.assert_close(found.image_to_text, torch.tensor([[2.0, 2.0], [1.6, 1.2]]))
    torch.testing.assert_close(found.text_to_image, found.image_to_text.T)


def test_a_single_pair_has_no_negative() -> None:
    one = similarity(torch.ones(1, 1, 2), torch.ones(1, 2), torch.tensor(1.0))
    with pytest.raises(CloverError, match="the least is 2"):
        sample_negatives(one)


def test_of_two_pairs_the_negative_is_the_other() -> None:
    two = similarity(torch.randn(2, 3, 4), torch.randn(2, 4), torch.tensor(0.07))
    for _ in range(5):
        found = sample_negatives(two)
        assert isinstance(found, Negatives)
        assert found.image_for_text.tolist() == found.text_for_image.tolist() == [1, 0]


def test_a_caption_that_says_the_same_is_as_if_it_were_not_there() -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(4, 2, 3), torch.randn(4, 3)
    ids = torch.tensor([[5, 6, 0], [5, 7, 8], [5, 6, 9], [5, 8, 8]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]])  # 0 and 2 say the same
    same = same_caption(ids, mask)
    assert same.nonzero().tolist() == [[0, 2], [2, 0]]
    temperature = torch.tensor(0.5)
    similar = similarity(images, texts, temperature)
    # By hand: each row's cross-entropy over its own columns alone.
    expected = []
    for matrix in (similar.image_to_text, similar.text_to_image):
        for row in range(4):
            left = [column for column in range(4) if not same[row, column]]
            logits, target = matrix[row, left][None], torch.tensor([left.index(row)])
            expected.append(torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1))
    found = contrastive_loss(similar, label_smoothing=0.1, ignored=same)
    torch.testing.assert_close(found, torch.stack(expected).mean())
    none = torch.zeros_like(same)
    torch.testing.assert_close(
        contrastive_loss(similar, label_smoothing=0.1, ignored=none),
        contrastive_loss(similar, label_smoothing=0.1),
    )
    for weights in negative_weights(similar, ignored=same):
        assert weights[0, 2] == weights[2, 0] == 0 and (weights > 0).sum() == 10


def test_where_all_captions_say_the_same_a_negative_is_still_another_pair() -> None:
    similar = similarity(torch.randn(3, 2, 4), torch.randn(3, 4), torch.tensor(0.07))
    alone = ~torch.eye(3, dtype=torch.bool)
    found = sample_negatives(similar, ignored=alone)
    own = torch.arange(3)
    assert (found.image_for_text != own).all() and (found.text_for_image != own).all()
