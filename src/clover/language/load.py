"""From a recipe's language section to a `LanguageModel`: local files only, never a network.

In: an asset reference to a GGUF file or to a folder in transformers' form. Out: the frozen model.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from clover.core.assets import parse, resolve
from clover.core.config import LanguageConfig, PromptConfig
from clover.core.errors import CloverError, nearest
from clover.core.files import read_json
from clover.language.decoder_only import DecoderOnly
from clover.language.dequantise import dequantised_folder
from clover.language.encoder_decoder import EncoderDecoder
from clover.language.prompt import Prompt
from clover.language.quantise import bitsandbytes_config, keep_gradients, quantise_int8

_LOG = logging.getLogger(__name__)
LOADING = threading.RLock()
"""Held while a model is loaded. `from_pretrained` swaps torch's number format and initialisers for
its own and then puts back what it found: from two threads at once, what the other one had put."""


def load_language_model(
    config: LanguageConfig,
    prompt: PromptConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DecoderOnly | EncoderDecoder:
    """Load a frozen language model.

    Args:
        config: which weights, which class, which token limits.
        prompt: how image and question are put.
        device: where the weights go.
        dtype: of the weights; losses and logits are float32 in any case.

    Raises:
        CloverError: no weights are named, they are absent, or they are of another kind.
    """
    parsed = Prompt.from_config(prompt)
    return drive(load_weights(config, device=device, dtype=dtype), config, parsed)


class Weights(NamedTuple):
    """What is large, and the same under every prompt and every limit."""

    model: Any
    tokenizer: Any


def load_weights(
    config: LanguageConfig, *, device: str | torch.device, dtype: torch.dtype
) -> Weights:
    """Load model and tokenizer; of `config` only kind, weights and quantise are read.

    Raises:
        CloverError: as `load_language_model`.
    """
    if not config.weights:
        raise CloverError(
            "language.weights is empty; name a GGUF file or a folder in transformers' form"
        )
    folder = _folder(resolve(config.weights))
    with LOADING, _quiet():
        tokenizer = _load_tokenizer(folder)
        return Weights(_load_model(folder, config, dtype, device), tokenizer)


def drive(weights: Weights, config: LanguageConfig, prompt: Prompt) -> DecoderOnly | EncoderDecoder:
    """Put loaded weights under a prompt and token limits; nothing is copied."""
    build = DecoderOnly if config.kind == "decoder_only" else EncoderDecoder
    named = config.model_copy(update={"weights": parse(config.weights).reference.split("?")[0]})
    return build(weights.model, weights.tokenizer, prompt=prompt, config=named)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers: its bar and its notes come up terminal or not; errors still raise."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    before, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    is_hub_silent = are_progress_bars_disabled()
    logging.disable_progress_bar()  # the hub's with it
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if has_bar:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where the environment forbids the hub's
                logging.enable_progress_bar()
            if is_hub_silent:
                disable_progress_bars()


def _folder(path: Path) -> Path:
    """Return a folder in transformers' form."""
    if path.is_file() and path.suffix.lower() == ".gguf":
        return dequantised_folder(path)
    if not (path / "config.json").exists():
        raise CloverError(
            f"{path} is neither a .gguf file nor a folder with a config.json; "
            "name one of them in language.weights"
        )
    return path


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        hint = _first_line(error)
        if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
            # transformers then suggests tiktoken, which is not what a Llama folder lacks.
            hint = "a SentencePiece tokenizer.model needs the package protobuf (pip install it)"
        raise CloverError(f"{folder} has no usable tokenizer: {hint}") from error


def _load_model(
    folder: Path, config: LanguageConfig, dtype: torch.dtype, device: str | torch.device
) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers import __version__ as version
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        shape = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        kind = read_json(folder / "config.json").get("model_type")
        raise CloverError(
            f"{folder}/config.json: transformers {version} knows no model_type "
            f"{kind!r}{nearest(str(kind), CONFIG_MAPPING)}"
        ) from error
    is_pair = bool(getattr(shape, "is_encoder_decoder", False))
    if is_pair != (config.kind == "encoder_decoder"):
        kind = "encoder_decoder" if is_pair else "decoder_only"
        raise CloverError(
            f"language.kind is {config.kind}, but {folder.name} holds a {shape.model_type} model; "
            f"set language.kind={kind}"
        )
    if is_pair and getattr(shape, "dense_act_fn", None) == "gelu_new":
        # SPEC 4.1: the published system runs T5 with the exact GELU, not the checkpoint's tanh one.
        shape.dense_act_fn = "gelu"
    for weights in folder.glob("*.safetensors"):
        # safetensors would say that it is not there.
        if weights.exists() and not os.access(weights, os.R_OK):
            raise CloverError(
                f"{weights} cannot be read by this user; its owner may write: chmod a+r"
            )
    family = AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM
    more: dict[str, Any] = {}
    if config.quantise.startswith("bnb"):
        more = {
            "quantization_config": bitsandbytes_config(config, dtype),
            "device_map": {"": device},
        }
    try:
        model, report = family.from_pretrained(
            str(folder),
            config=shape,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **more,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise CloverError(
            f"cannot read the weights in {folder}: {_first_line(error)}; "
            "safetensors are read, pickles are not"
        ) from error
    # transformers would draw what is missing or does not fit at random and go on.
    for name, lying, wanted in sorted(report["mismatched_keys"]):
        raise CloverError(
            f"{folder} does not fit its own config.json: {name} is {list(lying)}, it wants "
            f"{list(wanted)}; the files are another model's"
        )
    if extra := sorted(report["unexpected_keys"]):
        _LOG.warning(
            "%s: %d tensors that its config.json has no place for are left out, for instance %s",
            folder,
            len(extra),
            extra[0],
        )
    if missing := sorted(report["missing_keys"]):
        raise CloverError(
            f"{folder} does not fit its own config.json: {len(missing)} tensors are missing, "
            f"for instance {missing[0]}; the files are not whole, or another model's"
        )
    if config.quantise == "bnb-4bit":
        keep_gradients(model)
    if config.quantise == "int8":
        quantise_int8(model)
    return model if more else model.to(device)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
