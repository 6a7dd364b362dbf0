"""One training step of each stage on the meta device, of the recipe's own modules and losses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from clover.align.apart import backward_apart
from clover.align.losses import LossSettings
from clover.core.assets import parse
from clover.core.config import EncoderConfig, PromptConfig, Recipe
from clover.core.errors import CloverError
from clover.core.files import read_json
from clover.core.linear import is_linear
from clover.language.decoder_only import DecoderOnly
from clover.language.encoder_decoder import EncoderDecoder
from clover.language.prompt import Prompt
from clover.language.quantise import quantise_int8
from clover.plan.count import Count, count, num_bytes
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import Tokens
from clover.vision.token_encoder import build_family, number_format, token_shape

_LANGUAGES = Path(__file__).with_name("languages.yaml")
META = torch.device("meta")


@dataclass(frozen=True)
class EncoderSize:
    """The image encoder: bytes, parameters, tokens, width, one image's count, number format."""

    id: str
    parameters: int
    weights: int
    num_tokens: int
    width: int
    image: Count
    numbers: str = "float32"


@dataclass(frozen=True)
class StepSize:
    """One step of a stage.

    Attributes:
        trainable: Parameters that learn.
        frozen: Parameters of the language model.
        weights: Bytes of trained weights.
        frozen_weights: Bytes of the language model.
        optimiser: Bytes of gradients and AdamW's two moments.
        activations: Largest bytes alive of one forward and backward pass, gradients apart.
        operations: Of a whole step, all passes.
        operations_before: Of a step that does without the language model (`tune.grounding_steps`).
        frozen_numbers: Format of the language model's weights.
        trained_numbers: Formats of what learns and of its products.
    """

    trainable: int
    frozen: int
    weights: int
    frozen_weights: int
    optimiser: int
    activations: int
    operations: int
    frozen_numbers: str = ""
    trained_numbers: str = ""
    operations_before: int = 0

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return self.weights + self.frozen_weights + self.optimiser + self.activations


def encoder_size(config: EncoderConfig, *, batch: int) -> EncoderSize:
    """Count the image encoder at its full size."""
    if config.kind in ("timm", "tiny"):
        return _small_encoder(config, batch=batch)
    with META:
        config, family = build_family(config.model_copy(update={"weights": _shape_only(config)}))
    dtype = number_format(config)
    network = family.network.to(dtype=dtype).requires_grad_(False)
    tokens, width = token_shape(network, config.image_size)
    pixels = torch.empty(
        batch,
        3,
        config.image_size,
        config.image_size,
        device=META,
        dtype=dtype,
    )
    with torch.no_grad():
        found = count(lambda: network(pixels), before=[*network.parameters(), pixels])
    parameters = sum(item.numel() for item in network.parameters())
    return EncoderSize(
        family.id,
        parameters,
        num_bytes(network) - (_saved(network) if config.numbers == "int8" else 0),
        tokens,
        width,
        Count(found.peak, found.operations // batch),
        config.numbers,
    )


def _saved(network: nn.Module) -> int:
    """Return the bytes that one byte a weight saves in a network's linear layers."""
    layers = filter(is_linear, network.modules())
    return sum(3 * item.weight.numel() for item in layers)


def _shape_only(config: EncoderConfig) -> str | None:
    """Only transformers' family reads its shape out of the weights' folder."""
    return config.weights if config.kind == "transformers_vision" else None


def _small_encoder(config: EncoderConfig, *, batch: int) -> EncoderSize:
    from clover.vision.encoder import unloaded_encoder

    encoder = unloaded_encoder(config)
    network = getattr(encoder, "network", nn.Identity())
    pixels = torch.empty(1, 3, config.image_size, config.image_size)
    found = count(lambda: encoder.encode(pixels), before=[*network.parameters(), pixels])
    return EncoderSize(
        encoder.id,
        sum(item.numel() for item in network.parameters()),
        num_bytes(network),
        encoder.num_tokens,
        encoder.width,
        Count(found.peak * batch, found.operations),
    )


def _tokens(batch: int, length: int) -> Tokens:
    ids = torch.zeros(batch, length, dtype=torch.long, device=META)
    return Tokens(ids, torch.ones_like(ids))


def align_size(recipe: Recipe, encoder: EncoderSize) -> StepSize:
    """Count a step of stage 1."""
    with META:
        bridge = Bridge(_qformer(recipe, encoder), has_alignment=True).to(products_of(recipe))
    config = recipe.align
    # One pair alone has no negative to be counted with: two are counted.
    chunk = min(max(2, config.gradient_chunk), config.batch_size) if config.gradient_chunk else 0
    part = chunk or config.batch_size // config.accumulate
    features = torch.empty(part, encoder.num_tokens, encoder.width, device=META)
    text = _tokens(part, min(config.max_text_tokens, recipe.qformer.max_positions))

    def step() -> None:
        backward_apart(
            bridge,
            features,
            text,
            LossSettings(
                decode_start=1,
                which=recipe.align.losses,
                label_smoothing=recipe.align.label_smoothing,
            ),
        )

    parts = -(-config.batch_size // part)
    found = _size(bridge, None, step, features, recipe, parts=parts)
    if not chunk:
        return found

    def compared() -> None:
        bridge.qformer.encode_queries(bridge.read_image(features))
        bridge.qformer.encode_text(text.ids, text.mask, first_row=True)

    # What the contrast compares is computed twice. Negatives come from the whole batch, whose
    # features are there all the time.
    again = count(compared, before=[*bridge.parameters(), features]).operations
    return replace(
        found,
        operations=found.operations + again * parts,
        activations=found.activations + num_bytes_of(features) * (parts - 1),
    )


def tune_size(recipe: Recipe, encoder: EncoderSize) -> StepSize:
    """Count a step of stage 2 with questions and answers of their longest."""
    language = build_language(recipe)
    with META:
        bridge = Bridge(_qformer(recipe, encoder), language_width=language.hidden_size)
        bridge.to(products_of(recipe))
    part = recipe.tune.batch_size // recipe.tune.accumulate
    features = torch.empty(part, encoder.num_tokens, encoder.width, device=META)
    text = _tokens(part, min(recipe.tune.max_question_tokens, recipe.qformer.max_positions))
    question = [[1] * recipe.language.max_instruction_tokens] * part
    answer = [[1] * recipe.language.max_answer_tokens] * part

    def step() -> None:
        image = bridge.read_image(features)
        reads = (text.ids, text.mask) if recipe.tune.instruction_aware else ()
        visual = bridge.visual_prefix(image, *reads)
        total, _ = language.loss_from_ids(visual, question, answer, prefix=())
        total.backward()  # type: ignore[no-untyped-call]

    found = _size(bridge, language.model, step, features, recipe, parts=recipe.tune.accumulate)
    if not recipe.tune.grounding_steps:
        return found
    # The language model is there meanwhile, and does nothing.
    before = _grounding_size(recipe, encoder, bridge)
    return replace(
        found,
        activations=max(found.activations, before.activations),
        operations_before=before.operations,
    )


def _grounding_size(recipe: Recipe, encoder: EncoderSize, bridge: Bridge) -> StepSize:
    """Count a step in which visual tokens learn to spell the answer.

    Their scores are left out: how many words answers are made of is the data's own.
    """
    tune = recipe.tune
    images = tune.grounding_batch_size // tune.grounding_questions
    kept = max(1, round(tune.grounding_tokens * encoder.num_tokens))
    features = torch.empty(images, kept, encoder.width, device=META)
    text = _tokens(tune.grounding_batch_size, tune.max_question_tokens)
    reads = (text.ids, text.mask) if tune.instruction_aware else ()

    def step() -> None:
        visual = bridge.visual_prefix(bridge.read_image(features), *reads)
        visual.float().square().mean().backward()  # type: ignore[no-untyped-call]

    return _size(bridge, None, step, features, recipe, parts=1)


def _size(
    bridge: Bridge, language: Any, step: Any, features: Tensor, recipe: Recipe, *, parts: int
) -> StepSize:
    products = str(products_of(recipe)).removeprefix("torch.")
    bits = recipe.language.quantise
    frozen = [] if language is None else [*language.parameters(), *language.buffers()]
    found = count(step, before=[*bridge.parameters(), *bridge.buffers(), *frozen, features])
    trainable = bridge.num_trainable()
    counted = num_bytes(bridge)
    # Weights, gradients and AdamW's two moments are float32 in any case; under bfloat16 autocast
    # keeps a copy of the weights in half the bytes.
    copies = 0 if counted == 4 * trainable else counted
    return StepSize(
        trainable=trainable,
        frozen=0 if language is None else sum(p.numel() for p in language.parameters()),
        weights=4 * trainable + copies,
        frozen_weights=0 if language is None else num_bytes(language),
        optimiser=12 * trainable,
        # The step's own gradients were counted with it; they stand under `optimiser`.
        activations=max(0, found.peak - counted) + num_bytes_of(features),
        operations=found.operations * parts,
        frozen_numbers=products if bits == "none" else f"{bits}, the rest {products}",
        trained_numbers="float32" if copies == 0 else f"float32, products in {products}",
    )


def num_bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def products_of(recipe: Recipe) -> torch.dtype:
    """Return what matrix products run in; `auto` is planned for a card, which takes bfloat16."""
    return torch.float32 if recipe.precision == "float32" else torch.bfloat16


def _qformer(recipe: Recipe, encoder: EncoderSize) -> Any:
    return recipe.qformer.model_copy(update={"encoder_width": encoder.width})


def language_shape(recipe: Recipe) -> dict[str, Any]:
    """Return the language model's configuration, from its folder or from the list.

    Raises:
        CloverError: the model is not at hand and not in the list.
    """
    weights = recipe.language.weights
    asset = parse(weights)
    if (asset.path / "config.json").exists():
        found: dict[str, Any] = read_json(asset.path / "config.json")
        return found
    known: dict[str, dict[str, Any]] = yaml.safe_load(_LANGUAGES.read_text(encoding="utf-8"))
    for name, shape in known.items():
        if name.lower() in weights.lower():
            return shape
    raise CloverError(
        f"the shape of language.weights {weights} is not known: fetch it first, or name one of "
        f"{', '.join(known)}"
    )


def build_language(recipe: Recipe) -> DecoderOnly | EncoderDecoder:
    """Build the language model on the meta device, in the format the recipe trains with.

    Raises:
        CloverError: its shape is not known.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    stated = language_shape(recipe)
    shape = AutoConfig.for_model(**stated)
    is_pair = recipe.language.kind == "encoder_decoder"
    family = AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM
    with META:
        model = family.from_config(shape, dtype=products_of(recipe))
        if stated.get("tie_word_embeddings") is False:
            # transformers ties a fresh T5 all the same; FLAN's checkpoints bring their own head.
            head = model.get_output_embeddings()
            head.weight = nn.Parameter(torch.empty_like(head.weight))
        if recipe.language.quantise in ("int8", "bnb-8bit"):
            quantise_int8(model)
        elif recipe.language.quantise == "bnb-4bit":
            _pack_four_bits(model)
    build = EncoderDecoder if is_pair else DecoderOnly
    # Ids are given, so neither template nor special tokens matter here.
    settings = recipe.language.model_copy(update={"text_start": "", "paper_dropout": False})
    return build(model, NoText(), prompt=Prompt.from_config(PromptConfig()), config=settings)


class FourBits(nn.Module):
    """A frozen linear layer in bitsandbytes' NF4, as far as memory and operations go.

    Two values a byte, and for each 64 of them a scale of one byte; a scale of these for 256.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        count = linear.weight.numel()
        sizes = {"weight": count // 2, "scale": count // 64 + 4 * (count // (64 * 256))}
        for name, size in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=torch.uint8, device=META))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        product: Tensor = _Unpacked.apply(x, self.out_features)
        return product


class _Unpacked(torch.autograd.Function):
    """x @ weight.T with a weight that is unpacked for the product, and again for its gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor, num_out: int) -> Tensor:
        context.num_in = x.shape[-1]
        return nn.functional.linear(x, x.new_empty(num_out, x.shape[-1]))

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ grad.new_empty(grad.shape[-1], context.num_in), None


def _pack_four_bits(model: Any) -> None:
    kept = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not kept:
                setattr(parent, name, FourBits(child))


class NoText:
    """A tokenizer of a model that is only counted."""

    eos_token_id = 1

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        """Return no ids."""
        return {"input_ids": []}
