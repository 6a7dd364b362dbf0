"""BLIP-2's own abilities: caption, match, similarity, features, ranking by loss."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from clover.core.errors import CloverError
from clover.model import Clover, build_bridge, load, load_tokenizer, save_bridge
from clover.qformer.caption import CaptionSettings, write_caption
from clover.vision.encoder import load_encoder
from tiny import QUESTION, Tiny


@pytest.fixture(scope="module")
def model(tiny: Tiny, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Clover:
    folder = tmp_path_factory.mktemp("aligned") / "model"
    shutil.copytree(tiny_model, folder)
    recipe = tiny.recipe.model_copy(update={"seed": 5})
    encoder, tokenizer = load_encoder(recipe.encoder), load_tokenizer(recipe)
    bridge = build_bridge(recipe, encoder, tokenizer, has_alignment=True)
    save_bridge(bridge, folder / "align.safetensors")
    return load(folder)


def test_match_and_similarity_are_the_equations(model: Clover, tiny: Tiny) -> None:
    texts = ["the image shows liver", "many cells and fibrosis", "no necrosis"]
    assert model.aligned is not None
    bridge, heads = model.aligned.bridge, model.aligned.bridge.alignment
    features = model.encode(tiny.image())
    image = bridge.read_image(features)
    vectors = heads.embed_image(bridge.qformer.encode_queries(image).hidden)[0]
    scores, cosines = model.match(tiny.image(), texts), model.similarity([tiny.image()], texts)
    assert torch.equal(model.similarity(iter([tiny.image()]), texts), cosines)  # type: ignore[arg-type]
    assert cosines.shape == (1, 3) and len(set(scores)) == 3
    for index, text in enumerate(texts):
        tokens = model.tokenizer([text], limit=32)
        hidden = bridge.qformer.encode_pair(image, tokens.ids, tokens.mask)
        logits = heads.matching(hidden[0, : bridge.config.num_queries]).mean(dim=0)
        assert scores[index] == pytest.approx(float(logits.softmax(0)[1]), abs=1e-5)
        row = heads.embed_text(bridge.qformer.encode_text(tokens.ids, tokens.mask)[:, 0])[0]
        best = max(float(query @ row) for query in vectors)
        assert float(cosines[0, index]) == pytest.approx(best, abs=1e-5)
    torch.testing.assert_close(model.features(tiny.image()), vectors)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))


def test_one_text_or_image_alone_is_not_taken_for_its_letters(model: Clover, tiny: Tiny) -> None:
    image = tiny.image()
    with pytest.raises(CloverError, match=r"texts is one text, 'liver'; give a list: \['liver'\]"):
        model.match(image, "liver")
    with pytest.raises(CloverError, match=r"texts is one text, 'liver'; give a list: \['liver'\]"):
        model.similarity([image], "liver")
    for texts in ([], None, [None]):
        with pytest.raises(CloverError, match=r"texts is .*; give a list of texts"):
            model.match(image, texts)  # type: ignore[arg-type]
    for one in (image, str(image), image.read_bytes(), Image.open(image), []):
        with pytest.raises(CloverError, match=r"give a list: \[image\]"):
            model.similarity(one, ["liver"])  # type: ignore[arg-type]


def test_stage_1_is_attached_without_a_random_number(model: Clover, tmp_path: Path) -> None:
    assert model.aligned is not None
    save_bridge(model.aligned.bridge, tmp_path / "align.safetensors")
    before = torch.get_rng_state()
    model.attach_alignment(tmp_path / "align.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def greedy(model: Clover, features: torch.Tensor, settings: CaptionSettings) -> list[int]:
    assert model.aligned is not None
    bridge = model.aligned.bridge
    cache = bridge.qformer.encode_queries(bridge.read_image(features)).cache
    ids = [model.tokenizer.decode_start]
    while len(ids) < settings.max_length:
        row = torch.tensor([ids])
        hidden = bridge.qformer.decode_text(row, torch.ones_like(row), cache)
        logits = bridge.alignment.language(hidden[0, -1], bridge.qformer.word_embedding.weight)
        if len(ids) < settings.min_length:
            logits[model.tokenizer.end] = -torch.inf
        word = int(logits.argmax())
        if word == model.tokenizer.end:
            break
        ids.append(word)
    return ids[1:]


def likelihood(model: Clover, features: torch.Tensor, ids: list[int]) -> float:
    """Return the mean log-likelihood of a caption that was cut at its longest."""
    assert model.aligned is not None
    bridge = model.aligned.bridge
    cache = bridge.qformer.encode_queries(bridge.read_image(features)).cache
    row = torch.tensor([[model.tokenizer.decode_start, *ids]])
    hidden = bridge.qformer.decode_text(row[:, :-1], torch.ones_like(row[:, 1:]), cache)
    logits = bridge.alignment.language(hidden[0], bridge.qformer.word_embedding.weight)
    chosen = logits.log_softmax(dim=1).gather(1, row[0, 1:, None])
    return float(chosen.mean())


def test_one_beam_is_greedy_and_three_are_no_worse(model: Clover, tiny: Tiny) -> None:
    features = model.encode(tiny.image())
    assert model.aligned is not None
    bridge = model.aligned.bridge
    cache = bridge.qformer.encode_queries(bridge.read_image(features)).cache
    ends = {"start": model.tokenizer.decode_start, "end": model.tokenizer.end}
    # No end within 6 words: all captions are cut, so that their likelihoods compare.
    settings = CaptionSettings(num_beams=1, max_length=7, min_length=7)
    one = write_caption(bridge, cache, settings=settings, **ends)
    assert one == greedy(model, features, settings) and len(one) == 6
    wide = CaptionSettings(num_beams=3, max_length=7, min_length=7)
    three = write_caption(bridge, cache, settings=wide, **ends)
    assert likelihood(model, features, three) >= likelihood(model, features, one) - 1e-6
    text = model.caption(tiny.image())
    assert text and text == model.caption(tiny.image()) and "[" not in text


def test_a_caption_ends_at_the_end_token_and_not_before_it_may(model: Clover, tiny: Tiny) -> None:
    assert model.aligned is not None
    bridge = model.aligned.bridge
    cache = bridge.qformer.encode_queries(bridge.read_image(model.encode(tiny.image()))).cache
    bias = bridge.alignment.language.bias.data
    kept = bias.clone()
    bias[model.tokenizer.end] = 50.0
    try:
        for shortest in (1, 5):
            found = write_caption(
                bridge,
                cache,
                start=model.tokenizer.decode_start,
                end=model.tokenizer.end,
                settings=CaptionSettings(min_length=shortest),
            )
            assert len(found) == shortest - 1
    finally:
        bias.copy_(kept)


def test_candidates_are_ordered_by_the_language_models_loss(model: Clover, tiny: Tiny) -> None:
    candidates = ["liver", "colon", "kidney with many cells"]
    found = model.rank(tiny.image(), QUESTION, candidates)
    assert {text for text, _ in found} == set(candidates)
    features = model.encode(tiny.image())
    for text, score in found:
        total, _ = model.loss(features, [QUESTION], [text])
        assert score == pytest.approx(-float(total), abs=1e-3)
    assert [score for _, score in found] == sorted((s for _, s in found), reverse=True)


def test_without_stage_1_or_with_an_empty_text_it_is_one_line(
    tiny_model: Path, tiny: Tiny, model: Clover
) -> None:
    with pytest.raises(CloverError, match=r"without stage 1's weights.*attach_alignment"):
        load(tiny_model).caption(tiny.image())
    with pytest.raises(CloverError, match="a text is empty"):
        model.match(tiny.image(), ["liver", " "])
    with pytest.raises(CloverError, match="does not fit: missing"):
        model.attach_alignment(tiny_model / "bridge.safetensors")
