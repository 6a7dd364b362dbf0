"""The plan's parameters, operations, disk and weights, recounted from the shapes with a pencil.

Nothing of the package is used for the expected numbers: only the sizes of the published parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from clover.core.config import Recipe, load_recipe
from clover.plan.run import Card, Plan, plan

GIB = 2**30
# BERT-base with queries (SPEC, section 1).
D, LAYERS, INNER, CROSSED, QUERIES, WORDS, SIZE = 768, 12, 3072, 6, 32, 30523, 256


@dataclass(frozen=True)
class Vit:
    """A vision transformer: tokens, width, blocks, width of the feed-forward layer's two parts."""

    tokens: int
    width: int
    blocks: int
    up: int
    down: int
    patch: int = 14
    image: int = 224
    more: int = 0
    """Parameters beside blocks, patches and positions."""
    block_more: int = 0
    read: int | None = None
    """Tokens that the Q-Former reads."""

    def parameters(self) -> int:
        w = self.width
        products = 4 * w * w + w * self.up + self.down * w
        biases = 4 * w + self.up + w
        norms = 4 * w
        patches = 3 * self.patch**2 * w + w
        return self.blocks * (products + biases + norms + self.block_more) + patches + self.more

    def operations(self) -> int:
        w, n = self.width, self.tokens
        products = 2 * n * (4 * w * w + w * self.up + self.down * w)
        attention = 2 * 2 * n * n * w
        patches = 2 * (self.image // self.patch) ** 2 * 3 * self.patch**2 * w
        return self.blocks * (products + attention) + patches


# 257 positions and the class token stand beside the blocks; our qkv has a bias for the keys too,
# which is 0 (39 * 1408 more than SPEC, section 9).
EVA = Vit(257, 1408, 39, 6144, 6144, more=(257 + 1) * 1408)
# DINOv2's giant with 4 registers: SwiGLU of 8192 halves to 4096; LayerScale twice; a last norm.
OPTIMUS = Vit(
    261, 1536, 40, 8192, 4096, more=(256 + 1 + 4 + 2) * 1536, block_more=2 * 1536, read=257
)


def llama(vocabulary: int, width: int, inner: int, layers: int, *, is_tied: bool) -> int:
    block = 4 * width * width + 3 * width * inner + 2 * width
    return vocabulary * width * (1 if is_tied else 2) + layers * block + width


def t5(vocabulary: int, width: int, inner: int, layers: int, heads: int) -> int:
    encoder = 4 * width * width + 3 * width * inner + 2 * width
    decoder = 8 * width * width + 3 * width * inner + 3 * width
    return 2 * vocabulary * width + layers * (encoder + decoder) + 2 * 32 * heads + 2 * width


LANGUAGES = {
    "clover-flant5xl": t5(32128, 2048, 5120, 24, 32),
    "clover-vicuna7b": llama(32001, 4096, 11008, 32, is_tied=False),
    "modern": llama(49152, 2048, 8192, 24, is_tied=True),
}
WIDTHS = {"clover-flant5xl": 2048, "clover-vicuna7b": 4096, "modern": 2048}


def qformer(encoder_width: int) -> int:
    attention = 4 * (D * D + D) + 2 * D
    feed_forward = D * INNER + INNER + INNER * D + D + 2 * D
    crossed = 2 * (D * D + D) + 2 * (encoder_width * D + D) + 2 * D
    embeddings = WORDS * D + 512 * D + 2 * D
    blocks = LAYERS * (attention + 2 * feed_forward) + CROSSED * crossed
    return embeddings + blocks + QUERIES * D + 2 * encoder_width


def stage_1_parameters(encoder_width: int) -> int:
    head = D * D + D + 2 * D + WORDS
    return qformer(encoder_width) + head + 1 + 2 * (D * SIZE + SIZE) + D * 2 + 2


def image_keys(vit: Vit) -> int:
    """Operations of an image's keys and values in the layers that look at it."""
    return CROSSED * 2 * 2 * (vit.read or vit.tokens) * vit.width * D


def rows(queries: int, text: int, vit: Vit, *, keys: int = 0, text_last: int | None = None) -> int:
    """Operations of one sequence of queries and text through the layers.

    Args:
        queries: Query rows; they look at the image.
        text: Text rows.
        vit: Whose image it is.
        keys: Rows that are attended to beside these.
        text_last: Text rows of which the last layer's result is asked for; all when absent.
    """
    n = queries + text
    total = 0
    for layer in range(LAYERS):
        asked = text if layer < LAYERS - 1 or text_last is None else text_last
        total += 2 * D * D * (2 * (queries + asked) + 2 * n)  # queries and output; keys and values
        total += 4 * (queries + asked) * (n + keys) * D
        total += 2 * 2 * D * INNER * (queries + asked)
        if layer % 2 == 0 and queries:
            total += 2 * 2 * D * D * queries + 4 * queries * (vit.read or vit.tokens) * D
    return total


def stage_1_operations(vit: Vit, batch: int, text: int) -> int:
    image = image_keys(vit) + rows(QUERIES, 0, vit)
    words = rows(0, text, vit, text_last=1)
    match = 3 * rows(QUERIES, text, vit, text_last=0)
    caption = rows(0, text, vit, keys=QUERIES) + 2 * (text - 1) * (D * D + D * WORDS)
    # The words' scores are computed once more in the backward pass instead of being kept.
    again = 2 * (text - 1) * D * WORDS
    return batch * (3 * (image + words + match + caption) + again)


def stage_2_operations(name: str, vit: Vit, recipe: Recipe) -> int:
    width = WIDTHS[name]
    instruction, answer = recipe.language.max_instruction_tokens, recipe.language.max_answer_tokens
    seen = image_keys(vit) + rows(QUERIES, recipe.tune.max_question_tokens, vit, text_last=0)
    learns = 3 * (seen + 2 * QUERIES * D * width)
    if name == "clover-flant5xl":
        layers, inner, words, before = 24, 5120, 32128, QUERIES + instruction
        block = 2 * (4 * width * width + 3 * width * inner)
        frozen = layers * block * (before + answer)
        frozen += layers * 2 * 2 * width * width * (answer + before)  # looking at the encoder
        frozen += 2 * answer * width * words
        attention = 4 * width * (before**2 + answer**2 + answer * before) * layers
    else:
        layers, inner, words = {
            "clover-vicuna7b": (32, 11008, 32001),
            "modern": (24, 8192, 49152),
        }[name]
        length = QUERIES + instruction + answer - 1
        frozen = layers * 2 * (4 * width * width + 3 * width * inner) * length
        frozen += 2 * answer * width * words
        attention = 4 * width * length**2 * layers
    # Through a frozen weight the gradient passes, but none is made for it: twice, not thrice.
    return int(recipe.tune.batch_size * (learns + 2 * frozen + 3 * attention))


@pytest.fixture(scope="module", params=sorted(LANGUAGES))
def made(request: pytest.FixtureRequest) -> tuple[str, Vit, Plan]:
    name = str(request.param)
    vit = OPTIMUS if name == "modern" else EVA
    # A card so large that no switch is looked for.
    return name, vit, plan(load_recipe(name), Card(1000, 100, 2.5), images=250_000)


def test_parameters_are_those_of_the_shapes(made: tuple[str, Vit, Plan]) -> None:
    name, vit, found = made
    assert found.encoder.parameters == vit.parameters()
    assert found.align.trainable == stage_1_parameters(vit.width)
    assert found.tune.trainable == qformer(vit.width) + D * WIDTHS[name] + WIDTHS[name]
    assert found.tune.frozen == LANGUAGES[name]
    if vit is EVA:  # the published numbers themselves (SPEC, section 9)
        assert found.encoder.parameters - 39 * 1408 == 985_894_528
        assert found.align.trainable == 186_705_470


def test_operations_are_those_of_the_shapes(made: tuple[str, Vit, Plan]) -> None:
    name, vit, found = made
    recipe = found.recipe
    assert found.encoder.image.operations == pytest.approx(vit.operations(), rel=0.01)
    stage_1 = stage_1_operations(vit, recipe.align.batch_size, recipe.align.max_text_tokens)
    assert found.align.operations == pytest.approx(stage_1, rel=0.03)
    assert found.tune.operations == pytest.approx(stage_2_operations(name, vit, recipe), rel=0.03)


def test_disk_and_the_bytes_that_stay_are_those_of_the_shapes(made: tuple[str, Vit, Plan]) -> None:
    name, vit, found = made
    tokens = vit.read or vit.tokens
    assert found.cache_gib() == pytest.approx(250_000 * tokens * vit.width * 2 / GIB)
    assert found.encoder.weights == 2 * vit.parameters()  # bfloat16
    learn = found.tune.trainable
    # float32 weights with a bfloat16 copy; gradient and AdamW's two moments.
    assert found.tune.weights == pytest.approx((4 + 2) * learn, rel=1e-3)
    assert found.tune.optimiser == 12 * learn
    assert found.tune.frozen_weights == pytest.approx(2 * LANGUAGES[name], rel=1e-3)
    parts = found.tune
    assert parts.peak == (
        parts.weights + parts.frozen_weights + parts.optimiser + parts.activations
    )
    # What a backward pass needs at least: the input of every layer of the language model, once.
    recipe, width = found.recipe, WIDTHS[name]
    text = recipe.language.max_instruction_tokens + recipe.language.max_answer_tokens
    layers = {"clover-flant5xl": 24, "clover-vicuna7b": 32, "modern": 24}[name]
    assert parts.activations > layers * recipe.tune.batch_size * (QUERIES + text) * width * 2
