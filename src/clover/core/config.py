"""Recipes: one YAML describes one whole run.

Every field has its explanation under it; an unknown key is an error that names the nearest key.
Change a value on the command line with ``--set tune.steps=400``.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from clover.core.assets import expanded
from clover.core.errors import CloverError, nearest
from clover.core.files import fingerprint, from_here
from clover.core.lock import lock_path, read_lock

_LATER = (
    *(("encoder", name) for name in ("options", "mean", "std", "numbers", "licence_note")),
    *(("encoder", name) for name in ("storage", "views", "view_kind")),
    *(("language", name) for name in ("quantise", "paper_dropout", "text_start")),
    ("qformer", "train_word_embedding"),
    *(("align", name) for name in ("ignore_duplicates", "gather", "gradient_chunk")),
    *(("tune", name) for name in ("grounding_spelling", "grounding_tokens", "worked_examples")),
    *(("tune", name) for name in ("grounding_channels", "grounding_kept", "anchoring_repeat")),
    *(("evaluate", name) for name in ("turns", "word_pull")),
    *((stage, "keep_weights") for stage in ("align", "tune")),
    *((stage, "compile") for stage in ("align", "tune")),
)
"""(section, field) of the second release on."""
_NO_NUMBER = (
    *("checkpoint_every", "checkpoint_keep", "checkpoint_in_background"),
    *("checkpoint_activations", "spread", "cuda_graphs"),
)
"""Fields, of whichever section, that change no number."""
_ONLY_OF_BEST = ("validate_every", "validate_samples")
"""Fields that change no number either, unless the best weights are kept."""
_SEEDS = 2**63
"""Torch takes no larger ones, NumPy none below 0."""
_TURNS = 8
"""Ways to turn and mirror a square by quarters, leaving it as it is among them."""
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


Precision = Literal["auto", "float32", "bfloat16"]
"""Number formats that products may run in."""


class Section(BaseModel):
    """A part of a recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class DataConfig(Section):
    """The files of a run. A path is relative to the folder the command is run in."""

    captions: Path | None = None
    """Captioned images for stage 1."""
    instructions: Path | None = None
    """Questions with answers for stage 2."""
    validation: Path | None = None
    """Questions with answers that are only ever evaluated."""
    images: Path | None = None
    """Where relative image paths start; the data file's own folder when absent."""


class PhantomConfig(Section):
    """How many synthetic images are made, and from which seed."""

    images: int = Field(1200, ge=8)
    """Training images."""
    validation_images: int = Field(120, ge=8)
    """Fresh images for evaluation. They never share a seed with training images."""
    seed: int = Field(0, ge=0, lt=_SEEDS)
    """Another seed, another set."""


class InstructConfig(Section):
    """How the hybrid instruction set is put together."""

    generated: int = Field(0, ge=0)
    """How many captions are given to the language model for generation-based instructions."""
    template_share: float = Field(0.15, ge=0, le=1)
    """Share of template-based instructions (describe the image) in the hybrid set."""
    joined_share: float = Field(0.0, ge=0, le=1)
    """Share of an image's questions that are asked three at once: more answers a step."""


_UNREAD = {
    **dict.fromkeys(("timm", "tiny"), ("numbers", "mean", "std", "options")),
    **dict.fromkeys(("eva_clip", "clip", "open_clip"), ("options",)),
}
"""Kind of encoder -> settings of other kinds that it has no use for."""
_FAMILIES = Path(__file__).resolve().parents[1] / "vision" / "family"


def family_files() -> dict[str, Path]:
    """Return the file of each family of encoders: those that come along, then one's own.

    One's own lie in the folder that `CLOVER_FAMILIES` names. Only its owner sets it: a recipe or a
    model folder, which may be a stranger's, cannot name code.
    """
    own = _own_families()
    folders = ([] if own is None else [own]) + [_FAMILIES]
    found = {path.stem: path for folder in folders for path in sorted(folder.glob("*.py"))}
    return {name: path for name, path in found.items() if not name.startswith("_")}


def _own_families() -> Path | None:
    own = os.environ.get("CLOVER_FAMILIES")
    return expanded(own) if own else None


def unknown_family(kind: str) -> str:
    """Return what to say of a family that is in no folder, one's own among them."""
    own = _own_families()
    if own is None:
        where = "which is not set"
    elif own.is_dir():
        where = f"{own}, which has no {kind}.py"
    else:
        where = f"{own}, and there is no such folder" + from_here(own)
    return (
        f"no family '{kind}'{nearest(kind, ['timm', 'tiny', *family_files()])} "
        f"(one of your own lies in the folder that CLOVER_FAMILIES names, {where})"
    )


_AboveZero = Annotated[float, Field(gt=0)]
_BelowOne = Annotated[float, Field(ge=0, lt=1)]


class EncoderConfig(Section):
    """The frozen image encoder."""

    kind: str = "timm"
    """Which family: `timm` (feature maps), a file of `clover/vision/family`, or of the folder
    `CLOVER_FAMILIES` (docs/models.md)."""
    model: str = "tf_efficientnet_lite0"
    """The architecture's name in its library."""
    options: dict[str, Any] = {}
    """Further arguments of the architecture, by the names its library gives them."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from each channel; what the library says when absent."""
    std: tuple[_AboveZero, _AboveZero, _AboveZero] | None = None
    """Each channel is divided by it; what the library says when absent."""
    numbers: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    """Number format of a token encoder's weights, never of kind `timm`'s; `int8` (CPU) rounds what
    it multiplies, too."""
    licence_note: str = ""
    """What the licence says of models trained on the encoder's outputs; goes into the card."""
    weights: str | None = None
    """An asset reference; without one the weights are random."""
    image_size: int = Field(224, ge=16)
    """Images are resized to this many pixels a side."""
    levels: tuple[int, ...] = ()
    """Which feature levels become tokens (0 = finest); all levels when empty."""
    grid: int = Field(14, ge=1)
    """The token map is `grid` x `grid`; finer levels are folded into it, coarser ones repeated."""
    microns_per_pixel: float | None = Field(None, gt=0)
    """The resolution the encoder expects, where it is known."""
    licence: str = "unknown"
    """Licence of the weights; it travels into the model card."""
    batch_size: int = Field(32, ge=1)
    """Images a forward pass."""
    storage: Literal["float16", "bfloat16", "int8"] = "float16"
    """Number format that training images' tokens are kept in; int8 has one scale a token."""
    views: int = Field(1, ge=1)
    """Views an image that training draws from: the image as it is, and others made of it."""
    view_kind: Literal["crop", "augment", "turn"] = "crop"
    """How: random crops and mirror images; these with RandAugment, as published for stage 2; or the
    seven turns and mirror images."""

    @model_validator(mode="after")
    def _check_read(self) -> EncoderConfig:
        """Refuse what the kind would ignore."""
        fields = type(self).model_fields
        for name in _UNREAD.get(self.kind, ()):
            if getattr(self, name) != fields[name].default:
                raise ValueError(
                    f"kind {self.kind} does not read {name}, kind timm_tokens does; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _check_views(self) -> EncoderConfig:
        if self.view_kind == "turn" and self.views > _TURNS:
            raise ValueError(f"views {self.views}: there are {_TURNS} with view_kind turn")
        if self.grid > self.image_size:
            raise ValueError(
                f"grid {self.grid} has more tokens a side than image_size {self.image_size} pixels"
            )
        return self

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, kind: str) -> str:
        if kind not in ("timm", "tiny", *family_files()):
            raise ValueError(unknown_family(kind))
        return kind


class QFormerConfig(Section):
    """The Q-Former: the only large part that learns. Defaults are the published BLIP-2's."""

    weights: str | None = None
    """A BERT-shaped checkpoint (asset reference) to start from; random when absent."""
    tokenizer: str | None = None
    """The WordPiece `tokenizer.json` that belongs to the checkpoint."""
    hidden_size: int = Field(768, ge=1, le=1 << 16)
    """Width D of queries and text."""
    num_layers: int = Field(12, ge=1)
    """Transformer layers; a shorter Q-Former takes the checkpoint's first layers."""
    num_heads: int = Field(12, ge=1)
    """Attention heads."""
    intermediate_size: int = Field(3072, ge=1)
    """Width of the feed-forward layers."""
    vocab_size: int = Field(30523, ge=1)
    """Word pieces, `[DEC]` included; the tokenizer's own number when a model is built."""
    max_positions: int = Field(512, ge=4)
    """Longest text the position embeddings know: captions and questions are cut to it, too."""
    encoder_width: int = Field(1408, ge=1)
    """Width E of an image token; the encoder's own width when a model is built."""
    num_queries: int = Field(32, ge=1)
    """Query tokens Q: the visual prefix the language model reads."""
    cross_attention_frequency: int = Field(2, ge=1)
    """Every n-th layer looks at the image, from layer 0."""
    embedding_size: int = Field(256, ge=1)
    """Width of the contrastive embeddings."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on embeddings, attention probabilities and residuals."""
    layer_norm_eps: float = Field(1e-12, ge=0)
    """BERT's epsilon."""
    initializer_range: float = Field(0.02, ge=0)
    """Standard deviation of fresh weights."""
    train_word_embedding: bool = True
    """Whether the word embedding learns, as published. It is most of a small Q-Former (11.7 of
    19.1M), few of its rows are ever asked for, and AdamW passes over all of them at each step."""
    checkpoint_activations: bool = False
    """Keep only what goes into each layer, and compute the layer again on the way back: the same
    gradients in less memory and a third more time."""
    calibrate: int = Field(0, ge=0)
    """Start fresh weights at the scale of so many samples (0 = as published): for short runs."""

    @model_validator(mode="after")
    def _check_heads(self) -> QFormerConfig:
        if self.hidden_size % self.num_heads:
            fitting = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            near = min(fitting, key=lambda count: abs(count - self.num_heads))
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}; "
                f"{near} does"
            )
        return self


class LanguageConfig(Section):
    """The frozen language model."""

    kind: Literal["decoder_only", "encoder_decoder"] = "decoder_only"
    """Which class drives it; see `clover.language`."""
    weights: str = ""
    """An asset reference: a GGUF file, or a folder in transformers' form."""
    licence: str = "unknown"
    """Licence of the weights; it travels into the model card."""
    max_instruction_tokens: int = Field(128, ge=4)
    """Longer instructions lose their beginning (truncation left, as published)."""
    max_answer_tokens: int = Field(128, ge=2)
    """Longer answers lose their end."""
    quantise: Literal["none", "int8", "bnb-8bit", "bnb-4bit"] = "none"
    """Fewer bits for the frozen weights: `int8` of our own, or bitsandbytes' (extra `[bits]`)."""
    paper_dropout: bool = False
    """Leave the frozen model's dropout on while training, as published (docs/decisions/0002)."""
    spread: bool = False
    """Where several processes train, each holds only its share of the frozen layers (FSDP2): for a
    language model that does not fit on one GPU."""
    text_start: str = ""
    """A special token before the prompt; Vicuna's published `</s>`, for instance (SPEC, 4.2)."""


class PromptConfig(Section):
    """How image and question are put before the language model, in every stage alike."""

    template: str = "{image}{question}"
    """`{image}` becomes the visual tokens, `{question}` the question; special tokens may stand.
    `{examples}` before both becomes the worked examples of `tune.worked_examples`."""
    answer_end: str = ""
    """Text (usually a special token) that closes an answer; the tokenizer's eos when empty."""
    closed_suffix: str = ""
    """Appended to a closed question; the published system asks for yes or no."""


class OptimizerConfig(Section):
    """AdamW with linear warm-up and a cosine."""

    steps: int = Field(100, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(32, ge=1)
    """Samples a step, over all devices."""
    accumulate: int = Field(1, ge=1)
    """Forward passes a step; the batch is split into so many."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    min_learning_rate: float = Field(0.0, ge=0)
    """Where the cosine ends."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""
    weight_decay: float = Field(0.05, ge=0)
    """On matrices only, never on biases, norms, queries or the temperature."""
    betas: tuple[_BelowOne, _BelowOne] = (0.9, 0.999)
    """AdamW's."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest gradient norm; none when absent."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints."""
    checkpoint_keep: int = Field(2, ge=1)
    """How many checkpoints stay while training goes on."""
    checkpoint_in_background: bool = False
    """Whether training goes on while a checkpoint is written, from a copy in memory."""
    cuda_graphs: bool = True
    """On one GPU: whether the kernels of a step are recorded once a shape of batch, and started
    together from then on (`clover.training.replay`)."""
    compile: bool = False
    """Whether the Q-Former's layers are compiled (`torch.compile`): on a GPU steps are faster,
    after a first one of a minute or more."""
    validate_every: int = Field(0, ge=0)
    """Steps between validations on held-out samples (`--validation`); none when 0."""
    validate_samples: int = Field(512, ge=2)
    """Held-out samples of a validation, evenly spaced in their file; all when it holds fewer."""
    keep_weights: Literal["last", "best"] = "last"
    """Whether the stage's product holds the last weights, or those that validated best."""
    seed: int | None = Field(None, ge=0, lt=_SEEDS)
    """Order of the data and dropout; the recipe's seed when absent."""

    @model_validator(mode="after")
    def _check_parts(self) -> OptimizerConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}"
            )
        if self.keep_weights == "best" and not self.validate_every:
            raise ValueError("keep_weights is best, but validate_every is 0: nothing is compared")
        return self


class AlignConfig(OptimizerConfig):
    """Stage 1: contrast, match, caption."""

    losses: tuple[Literal["contrast", "match", "caption"], ...] = ("contrast", "match", "caption")
    """Which losses are summed, with equal weights."""
    max_text_tokens: int = Field(32, ge=4)
    """Longer captions lose their end (SPEC, section 2); no more than `qformer.max_positions`."""
    temperature: float = Field(0.07, gt=0)
    """Start of the learned contrastive temperature."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Of the contrastive and the caption loss."""
    gradient_chunk: int = Field(0, ge=0)
    """Pairs whose passes are held in memory at a time; the contrast still sees the whole batch
    (gradient caching): less memory for a half more time. 0 holds the batch in one piece."""
    ignore_duplicates: bool = False
    """Whether a caption that says the same as an image's own is no negative of it; the published
    system takes it for one."""
    gather: Literal["with_gradient", "detached"] = "with_gradient"
    """Whether the vectors that an image or text of this process is compared with carry gradient to
    whichever process they came from: the large batch's own gradient. `detached`, as published:
    gathered vectors are copies without gradient, also where one process trains alone."""

    @field_validator("losses")
    @classmethod
    def _check_losses(cls, losses: tuple[str, ...]) -> tuple[str, ...]:
        if not losses:
            raise ValueError("no loss is named; name one or more of contrast, match, caption")
        twice = [name for name in losses if losses.count(name) > 1]
        if twice:
            raise ValueError(f"{twice[0]} is named {losses.count(twice[0])} times; name it once")
        return losses


class TuneConfig(OptimizerConfig):
    """Stage 2: instruction tuning through the frozen language model."""

    grounding_steps: int = Field(0, ge=0)
    """Steps before the language model is asked: visual tokens learn to spell the answer."""
    anchoring_steps: int = Field(0, ge=0)
    """Steps after those, in which visual tokens also move onto the words' embeddings."""
    anchoring_weight: float = Field(0.2, ge=0)
    """Weight of the squared distance to the word's embedding in these steps."""
    grounding_batch_size: int = Field(48, ge=1)
    """Questions of such a step; it is about ten times cheaper than one through a language model."""
    grounding_questions: int = Field(1, ge=1)
    """How many of them ask about the same image, whose keys are then computed once."""
    grounding_repeat: int = Field(1, ge=1)
    """A question that is rare in the data is asked up to so many times as often in these steps."""
    anchoring_repeat: int | None = Field(None, ge=1)
    """The same in the anchoring steps; as before them when absent. "Is this kidney?" can be learnt
    only once kidneys are known: repeating it from the start holds everything up."""
    grounding_learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of these steps."""
    grounding_filler: str = " -"
    """What stands in the visual tokens behind a short answer; one token of the language model."""
    grounding_spelling: Literal["whole", "shortest"] = "whole"
    """Whether visual tokens spell an answer whole, or as far as it differs from every other."""
    grounding_tokens: float = Field(1.0, gt=0, le=1)
    """Share of an image's tokens that such a step sees, drawn anew each time: against over-fitting
    where images are few."""
    grounding_channels: float = Field(1.0, gt=0, le=1)
    """Share of the encoder's channels that such a step sees, other ones of each image, drawn anew
    each time; the rest stand at their mean over up to 256 training images. Against over-fitting,
    too: no answer can lean on few channels."""
    grounding_kept: float = Field(0.0, ge=0)
    """Weight that the anchoring steps' loss of an answer keeps in the steps through the language
    model, beside the loss of each of the answer's tokens: what was learnt is not unlearnt."""
    worked_examples: int = Field(0, ge=0)
    """Training questions and answers shown to the language model, at `prompt.template`'s
    `{examples}`; one for each frequent answer is worth most."""
    instruction_aware: bool = True
    """Whether the Q-Former reads the question too."""
    max_question_tokens: int = Field(128, ge=4)
    """What the Q-Former reads of a question (truncation left); at most `qformer.max_positions`."""

    @model_validator(mode="after")
    def _check_groups(self) -> TuneConfig:
        if self.grounding_batch_size % self.grounding_questions:
            raise ValueError(
                f"grounding_questions {self.grounding_questions} does not divide "
                f"grounding_batch_size {self.grounding_batch_size}"
            )
        if self.grounding_kept and not self.grounding_steps:
            raise ValueError(
                f"grounding_kept is {self.grounding_kept}, but grounding_steps is 0: nothing was "
                "learnt that could be kept"
            )
        return self


class EvaluateConfig(Section):
    """Prediction and scores."""

    batch_size: int = Field(32, ge=1)
    """Questions a forward pass."""
    decoding: Literal["recipe", "paper", "sense"] = "recipe"
    """`recipe`: the three below; `paper`: 5 beams, 5 to 40 tokens; `sense`: likelier of yes, no."""
    num_beams: int = Field(1, ge=1)
    """1 is greedy."""
    min_tokens: int = Field(1, ge=0)
    """Shortest answer; the published system forces 5."""
    max_tokens: int = Field(32, ge=1)
    """Longest answer."""
    turns: Literal[1, 2, 4, 8] = 1
    """How many copies of an image, turned by quarters and mirrored, are read at once; with 8 an
    answer does not depend on how the tissue lay (`encoder.views` shows them in training)."""
    word_pull: float = Field(0.0, ge=0, le=1)
    """How far a visual token is moved to the word it points at before the language model reads it;
    only where the bridge was taught to spell (`tune.grounding_steps`)."""
    bootstrap: int = Field(1000, ge=0)
    """Draws for the 95 % intervals, clustered by image."""
    control_items: int = Field(0, ge=0)
    """How many questions each control is asked; all when 0."""


class Recipe(Section):
    """One whole run."""

    _written: dict[tuple[str, str], str | None] = PrivateAttr(default_factory=dict)
    """References as the recipe has them, where a lock pins them more exactly."""
    name: str
    """A short name; it appears in reports."""
    seed: int = Field(0, ge=0, lt=_SEEDS)
    """Of everything random."""
    precision: Precision = "auto"
    """`auto` takes bfloat16 where the device multiplies it faster than float32."""
    device: str = "auto"
    """`auto` takes a GPU when there is one."""
    data: DataConfig = DataConfig()
    """Files."""
    phantom: PhantomConfig | None = None
    """The built-in set; only `clover demo` reads this."""
    instruct: InstructConfig = InstructConfig()
    """Instruction data."""
    encoder: EncoderConfig = EncoderConfig()
    """Image encoder."""
    qformer: QFormerConfig = QFormerConfig()
    """Q-Former."""
    language: LanguageConfig = LanguageConfig()
    """Language model."""
    prompt: PromptConfig = PromptConfig()
    """Prompt."""
    align: AlignConfig = AlignConfig()
    """Stage 1."""
    tune: TuneConfig = TuneConfig()
    """Stage 2."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation."""

    def within_positions(self) -> Recipe:
        """Return the recipe with captions and questions no longer than the Q-Former's positions.

        What reads texts goes by this one. A run is known by the recipe as it was given.
        """
        most, align, tune = self.qformer.max_positions, self.align, self.tune
        captions, questions = align.max_text_tokens, tune.max_question_tokens
        return self.model_copy(
            update={
                "align": align.model_copy(update={"max_text_tokens": min(captions, most)}),
                "tune": tune.model_copy(update={"max_question_tokens": min(questions, most)}),
            }
        )

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML."""
        text: str = yaml.safe_dump(
            self.model_dump(mode="json"), sort_keys=False, allow_unicode=True
        )
        return text

    def fingerprint(self, *sections: str) -> str:
        """Return a short hash of the named sections: the key of work that depends on them.

        What changes no number (how often a checkpoint is written) is left out.
        """
        return fingerprint(self._that_matter(sections))

    def settings(self, *sections: str) -> dict[str, str]:
        """Return what `fingerprint` is made of, one `section.key` and its value each."""
        found = {}
        for name, value in self._that_matter(sections).items():
            if isinstance(value, dict):
                found.update({f"{name}.{key}": str(item) for key, item in value.items()})
            else:
                found[name] = str(value)
        return found

    def _that_matter(self, sections: tuple[str, ...]) -> dict[str, Any]:
        tree = self.model_dump(mode="json", include=set(sections))
        for (name, field), reference in self._written.items():
            if name in tree:  # a lock made later says the same more exactly: runs still go on
                tree[name][field] = reference
        for section in tree.values():
            if isinstance(section, dict):
                is_best = section.get("keep_weights") == "best"
                for field in (*_NO_NUMBER, *(() if is_best else _ONLY_OF_BEST)):
                    section.pop(field, None)
        for name, field in _LATER:
            # A field that came later counts when it is set: runs from before it still go on.
            default = type(getattr(self, name)).model_fields[field].default
            if name in tree and getattr(getattr(self, name), field) == default:
                tree[name].pop(field)
        return tree


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for name in path:
        field = model.model_fields.get(str(name))
        if field is None:
            break
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            break
        model = nested[0]
    return list(model.model_fields)


def explain_error(error: ValidationError, source: str) -> str:
    """Return a validation error of a recipe as one line that names the key and the nearest."""
    first = error.errors()[0]
    path = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = _known_keys(Recipe, first["loc"][:-1])
        return f"{source}: unknown key '{path}'{nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "value_error":
        return f"{source}: {path}: {first['ctx']['error']}"
    value = f" (found {first['input']!r})" if first["type"] != "missing" else ""
    return f"{source}: {path}: {first['msg'].lower()}{value}"


def _assign(tree: dict[str, Any], setting: str) -> None:
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise CloverError(f"--set '{setting}' is not of the form section.key=value")
    *parents, last = key.strip().split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise CloverError(f"--set '{setting}': {parent} is a value, not a section")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CloverError(f"--set '{setting}': {text!r} is not a YAML value") from error
    # YAML 1.1 reads 1e-4 as text; people mean the number.
    if isinstance(tree[last], str):
        with contextlib.suppress(ValueError):
            tree[last] = float(tree[last])


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: a path, or the name of one that comes with CLOVER."""
    path = Path(name)
    # A folder of that name is none: `clover phantom phantom` makes one.
    if path.is_file():
        return path
    shipped = RECIPES / f"{path.stem}.yaml"
    # my/phantom.yaml that is not there is a mistake, not the phantom that comes with CLOVER;
    # recipes/phantom.yaml is how the documentation writes the latter.
    is_shipped = path.parent in (Path(), Path("recipes"))
    if is_shipped and shipped.exists():
        return shipped
    known = [item.stem for item in RECIPES.glob("*.yaml")]
    raise CloverError(f"no recipe {name}{nearest(path.stem, known)}")


def load_recipe(name: str | Path, settings: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply ``section.key=value`` settings.

    Raises:
        CloverError: no such recipe, YAML that does not parse, an unknown key (the nearest is
            named), or a value out of its range.
    """
    path = find_recipe(name)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CloverError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise CloverError(f"{path} is not a recipe: expected sections, found {type(tree).__name__}")
    for setting in settings:
        _assign(tree, setting)
    try:
        return _locked(Recipe.model_validate(tree), path)
    except ValidationError as error:
        raise CloverError(explain_error(error, str(path))) from error


ASSETS = (
    ("encoder", "weights"),
    ("qformer", "weights"),
    ("qformer", "tokenizer"),
    ("language", "weights"),
)
"""(section, field) of a recipe's references."""


def lock_of(name: str | Path) -> Path:
    """Return where the lock of a recipe lies, or would: see `core/lock.py`."""
    path = find_recipe(name)
    return lock_path(path, is_shipped=path.resolve().parent == RECIPES.resolve())


def _locked(recipe: Recipe, path: Path) -> Recipe:
    """Return the recipe with its references as its lock pins them."""
    found = read_lock(lock_of(path))
    changes: dict[str, Any] = {}
    written: dict[tuple[str, str], str | None] = {}
    for section, field in ASSETS:
        entry = found.get(f"{section}.{field}")
        part = changes.get(section) or getattr(recipe, section)
        said = getattr(part, field)
        # An encoder known by name leaves its weights to the register.
        is_register = section == "encoder" and recipe.encoder.kind == "known" and said is None
        if entry is None or (said != entry["reference"] and not is_register):
            continue
        if not is_register or entry.get("model") == recipe.encoder.model:
            tree = part.model_dump(exclude_unset=True) | {field: entry["pinned"]}
            changes[section] = type(part).model_validate(tree)
            written[section, field] = said
    locked = recipe.model_copy(update=changes)
    locked._written = written
    return locked
