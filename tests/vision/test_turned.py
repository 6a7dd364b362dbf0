"""An image read from every side: the tokens, the answer, and the map drawn of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from clover.evaluate.run import evaluate_folder
from clover.explain import delete, explain, look
from clover.model import Clover, load
from clover.qformer.attention_map import attention_map
from clover.vision.turned import TurnedEncoder, num_turns, places_of_turns, plain_encoder, turned
from tiny import QUESTION, Tiny, tiny_clover, tiny_recipe


class _Places:
    """An encoder whose token is the pixel's own value, after a class token where one is asked."""

    id, revision, named_revision = "places", "r", "n"
    width, licence, licence_note, microns_per_pixel, batch_size = 1, "MIT", "", None, 4

    def __init__(self, side: int, *, has_class: bool) -> None:
        self.num_tokens = side * side + has_class
        self._has_class = has_class

    def prepare(self, image: Image.Image) -> Tensor:
        raise NotImplementedError

    def encode(self, pixels: Tensor) -> Tensor:
        tokens = pixels[:, 0].flatten(1)[..., None]
        first = torch.full((len(pixels), 1, 1), -1.0)
        return torch.cat([first, tokens], dim=1) if self._has_class else tokens


@pytest.fixture(scope="module")
def seen_from_all_sides(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Clover:
    folder = tmp_path_factory.mktemp("turned") / "model"
    recipe = tiny_recipe(tiny.folder, evaluate={"turns": 8})
    tiny_clover(recipe).save(folder)
    return load(folder, precision="float32")


def test_eight_turns_are_the_eight_of_a_square() -> None:
    square = torch.arange(16).view(4, 4)
    found = {tuple(turned(square, turn, 8).flatten().tolist()) for turn in range(8)}
    expected = set()
    for quarters in range(4):
        rows = torch.rot90(square, quarters)
        expected |= {tuple(rows.flatten().tolist()), tuple(rows.t().flatten().tolist())}
    assert found == expected
    assert len(found) == 8
    for turns in (2, 4, 8):
        assert torch.equal(turned(square, 0, turns), square)
    assert torch.equal(turned(square, 1, 2), square.flip(1)), "two: the image and its mirror image"


@pytest.mark.parametrize("has_class", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 4, 8])
def test_each_place_knows_its_tokens(turns: int, has_class: bool) -> None:
    encoder = TurnedEncoder(_Places(3, has_class=has_class), turns)
    pixels = torch.arange(9.0).view(1, 1, 3, 3)
    tokens = encoder.encode(pixels)
    assert tokens.shape == (1, encoder.num_tokens, 1)
    found = places_of_turns(3, encoder.num_tokens, turns)
    assert found.shape == (turns, 9)
    for turn in range(turns):
        assert tokens[0, found[turn], 0].tolist() == list(range(9))


def test_an_answer_does_not_hang_on_how_the_tissue_lay(
    seen_from_all_sides: Clover, tiny: Tiny
) -> None:
    image = Image.open(tiny.image()).convert("RGB")
    # One half dark, so that the turns of the image differ.
    image.paste((20, 20, 20), (0, 0, 32, 10))
    one_way = tiny_clover(tiny.recipe)
    prefixes, plain = [], []
    for quarters in range(4):
        lain = image.rotate(90 * quarters)
        with torch.no_grad():
            prefixes.append(
                seen_from_all_sides.visual_prefix(seen_from_all_sides.encode(lain), [QUESTION])
            )
            plain.append(one_way.encode(lain))
    for other in prefixes[1:]:
        torch.testing.assert_close(other, prefixes[0], atol=1e-4, rtol=1e-4)
    assert float((plain[1] - plain[0]).abs().max()) > 0.1, "the encoder itself sees a difference"


def test_the_folder_names_the_encoder_and_its_cache_is_its_own(
    seen_from_all_sides: Clover, tiny: Tiny
) -> None:
    plain = tiny_clover(tiny.recipe)
    assert num_turns(seen_from_all_sides.encoder) == 8
    assert num_turns(plain.encoder) == 1
    assert plain_encoder(seen_from_all_sides.encoder).revision == plain.encoder.revision
    assert seen_from_all_sides.encoder.revision != plain.encoder.revision
    features = seen_from_all_sides.encode(tiny.image())
    assert features.shape[1] == 8 * plain.encoder.num_tokens
    torch.testing.assert_close(
        seen_from_all_sides.upright(features), plain.encode(tiny.image()), atol=1e-5, rtol=0
    )
    again = load_again(seen_from_all_sides, tiny)
    assert again.encoder is not seen_from_all_sides.encoder
    assert plain_encoder(again.encoder) is plain_encoder(seen_from_all_sides.encoder)


def load_again(model: Clover, tiny: Tiny) -> Clover:
    folder = tiny.folder / "turned-again"
    model.save(folder)
    return load(folder, precision="float32", beside=model)


def test_a_map_adds_up_what_all_turns_show(tiny: Tiny) -> None:
    model = tiny_clover(tiny.recipe)
    bridge = model.bridge
    features = model.encode(tiny.image())  # [1, 16, E]
    alone = attention_map(bridge, features)
    # The same tokens laid otherwise, and told where they are.
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    laid = attention_map(bridge, features[:, order], places=order.argsort()[None])
    torch.testing.assert_close(laid.weights, alone.weights, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(laid.rolled, alone.rolled, atol=1e-6, rtol=1e-5)
    # Twice over: softmax halves each copy's weight, and a place is worth both.
    both = torch.cat([features, features[:, order]], dim=1)
    places = torch.stack([torch.arange(16), order.argsort() + 16])
    twice = attention_map(bridge, both, places=places)
    torch.testing.assert_close(twice.weights, alone.weights, atol=1e-6, rtol=1e-5)


def test_the_map_of_a_turned_image_is_the_map_turned(
    seen_from_all_sides: Clover, tiny: Tiny
) -> None:
    model, image = seen_from_all_sides, Image.open(tiny.image()).convert("RGB")
    image.paste((20, 20, 20), (0, 0, 32, 10))
    upright = look(model, model.encode(image), QUESTION)
    lain = look(model, model.encode(image.transpose(Image.Transpose.ROTATE_90)), QUESTION)
    assert upright.grid == 4
    torch.testing.assert_close(lain.mean(), torch.rot90(upright.mean()), atol=1e-5, rtol=1e-3)
    assert not torch.allclose(lain.mean(), upright.mean(), atol=1e-4)


def test_deleting_a_place_takes_it_out_of_every_turn(tiny: Tiny) -> None:
    tokens = TurnedEncoder(_Places(4, has_class=False), 8).encode(
        torch.arange(16.0).view(1, 1, 4, 4)
    )
    heat = torch.arange(16.0).view(4, 4)
    left: list[list[float]] = []

    def measure(stays: Tensor) -> float:
        left.append(sorted(set(stays[0, :, 0].tolist())))
        return float(stays.shape[1])

    found = delete(tokens, heat, measure, places=places_of_turns(4, tokens.shape[1], 8))
    assert left[1] == list(range(14)), "a tenth of 16 places: the two hottest, in all turns"
    assert found.attended[0] == 16.0


def test_it_explains_and_evaluates_as_any_model(
    seen_from_all_sides: Clover, tiny: Tiny, tmp_path: Path
) -> None:
    model = seen_from_all_sides
    explained = explain(model, model.encode(tiny.image()), QUESTION, "liver")
    assert explained.maps.grid == 4
    model.save(tmp_path / "model")
    scores = evaluate_folder(
        tmp_path / "model",
        data=tiny.instructions,
        out=tmp_path / "out",
        cache=tmp_path / "cache",
        images=tiny.instructions.parent,
        train=tiny.instructions,
        controls=("blind", "turned"),
    )
    assert scores is not None
    assert "linear_probe" in scores["details"]["baselines"]
    found = [
        [row["prediction"] for row in rows(tmp_path / "out" / f"{name}.jsonl")]
        for name in ("predictions", "turned")
    ]
    assert found[0] == found[1]
    header = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert header["header"]["turns"] == 8, "what is read once is another prediction"
    assert len(list((tmp_path / "cache").glob("tiny-*"))) == 2, "the probe reads images once"


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]
