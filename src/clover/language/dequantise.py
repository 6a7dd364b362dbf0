"""A GGUF file as a folder in transformers' form, made once and kept in the cache.

In: a GGUF file of a Llama- or Qwen2-shaped model with a byte-pair tokenizer. Out: a folder with
config, float32 safetensors and tokenizer under `CLOVER_HOME`, keyed by the file's SHA-256.
transformers reads GGUF too, but only with `accelerate` installed, and it cuts numbers in another
way than the model learned; reading the file takes seconds each time either way.
"""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from clover.core.assets import home, remembered_sha256
from clover.core.errors import CloverError
from clover.core.files import atomic_path, disk_refused, umask, write_json

_NAMES = Path(__file__).with_name("gguf_names.yaml")
_FORM = "2"
"""Changes when the written folder changes, so that an old cache is a miss."""


def dequantised_path(sha256: str) -> Path:
    """Return where the folder of the GGUF file with this SHA-256, in hex, lies or will lie."""
    return home() / "dequantised" / f"{sha256[:32]}-{_FORM}"


def is_dequantised(sha256: str) -> bool:
    """Return whether that folder is there: then nothing is left to be written."""
    return (dequantised_path(sha256) / "config.json").exists()


def dequantised_folder(path: Path) -> Path:
    """Return the folder of a GGUF file in transformers' form, making it when it is absent.

    Where it is there, nothing is written: a cache may be read-only once `clover fetch` filled it.

    Raises:
        CloverError: the file is not GGUF, its architecture or tokenizer is not known here, or the
            folder is absent and cannot be written.
    """
    (sha256,) = remembered_sha256(path)
    folder = dequantised_path(sha256)
    if is_dequantised(sha256):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        _write_folder(path, partial)
        # As any new folder: a server's user is mostly another one.
        partial.chmod(0o777 & ~umask())
        try:
            partial.replace(folder)
        except OSError:
            # Another process finished the same file first; its folder is as good as ours.
            if not (folder / "config.json").exists():
                raise
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _cannot_write(folder: Path, error: OSError) -> CloverError:
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return disk_refused(folder, error)
    return CloverError(
        f"cannot write {folder}: {error.strerror or error}; the language model is unpacked "
        "there once: run `clover fetch RECIPE` as somebody who may write there, or set CLOVER_HOME "
        "to a folder that you may write to"
    )


def _write_folder(path: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, LookupError, OverflowError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CloverError(f"{path} is not a GGUF file, or is cut off: {line}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tables = yaml.safe_load(_NAMES.read_text(encoding="utf-8"))
    kind = str(fields["general.architecture"])
    if kind not in tables or kind == "cut":
        raise CloverError(
            f"{path.name} holds a '{kind}' model; GGUF is read for llama and qwen2 only, "
            "give a folder in transformers' form instead"
        )
    cut = _cut(fields, tables["cut"], path.name)
    config = _config(fields, kind)
    tensors = _tensors(reader, tables[kind], config)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    # Not straight into the folder: safetensors makes files that their owner alone may read.
    with atomic_path(folder / "model.safetensors") as whole:
        save_file(tensors, whole, metadata={"format": "pt"})
    _save_tokenizer(fields, folder, cut)
    write_json(folder / "config.json", config)


def _cut(fields: dict[str, Any], known: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Return how the file's tokenizer cuts text before it merges.

    Raises:
        CloverError: it merges no byte pairs, or cuts in a way that is not known here: the ids
            would be others than the model was taught.
    """
    if fields["tokenizer.ggml.model"] != "gpt2":
        raise CloverError(
            f"the GGUF file's tokenizer is '{fields['tokenizer.ggml.model']}', only byte-pair "
            "('gpt2') is read; give a folder in transformers' form instead"
        )
    pre = str(fields.get("tokenizer.ggml.pre", ""))
    if pre not in known:
        raise CloverError(
            f"{name} cuts text by tokenizer.ggml.pre '{pre}', and {', '.join(known)} are known "
            "here; give a folder in transformers' form instead"
        )
    return known[pre]


def _rope(fields: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return transformers' rotary settings.

    Raises:
        CloverError: positions are stretched in another way than evenly.
    """
    found = {"rope_type": "default", "rope_theta": fields.get(f"{kind}.rope.freq_base", 10000.0)}
    # A file of before `rope.scaling` says `scale_linear`.
    old = fields.get(f"{kind}.rope.scale_linear")
    scaling = fields.get(f"{kind}.rope.scaling.type", "none" if old is None else "linear")
    if scaling == "none":
        return found
    if scaling != "linear":
        raise CloverError(
            f"the GGUF file stretches its positions by rope.scaling.type '{scaling}', only "
            "'linear' is read; give a folder in transformers' form instead"
        )
    factor = fields.get(f"{kind}.rope.scaling.factor", 1.0 if old is None else old)
    return found | {"rope_type": "linear", "factor": float(factor)}


def _config(fields: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the `config.json` of the model."""

    def value(name: str, default: Any = None) -> Any:
        return fields.get(f"{kind}.{name}", default)

    heads = value("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM" if kind == "llama" else "Qwen2ForCausalLM"],
        "model_type": kind,
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("rope.dimension_count", value("embedding_length") // heads),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(fields, kind),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "hidden_act": "silu",
        "dtype": "float32",
    }


def _tensors(reader: Any, names: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return float32 arrays under transformers' names."""
    import numpy as np
    from gguf import dequantize

    tensors: dict[str, Any] = {}
    for tensor in reader.tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
        table = names["block"] if match and match[1] is not None else names["outside"]
        if match is None or match[2] not in table:
            raise CloverError(
                f"the GGUF file holds a tensor {tensor.name} that is not known here; "
                "give a folder in transformers' form instead"
            )
        array = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if match[2] in names["interleaved"]:
            key = "num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"
            array = _halves_apart(array, config[key])
        name = f"{table[match[2]].format(n=match[1])}.{match[3]}"
        tensors[name] = np.ascontiguousarray(array)
    return tensors


def _halves_apart(array: Any, num_heads: int) -> Any:
    """Reorder the rows of each head from (pair, 2) to (2, pair)."""
    pairs = array.reshape(num_heads, array.shape[0] // num_heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _save_tokenizer(fields: dict[str, Any], folder: Path, cut: dict[str, Any]) -> None:
    """Write the byte-pair tokenizer with its special tokens and chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as cuts
    from transformers import PreTrainedTokenizerFast

    words: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    vocabulary = {word: index for index, word in enumerate(words)}
    is_whole_first = bool(cut.get("ignore_merges"))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=is_whole_first))
    if cut.get("nfc"):
        tokenizer.normalizer = normalizers.NFC()
    first: list[Any] = []
    if cut.get("digits_apart"):
        first = [cuts.Digits(individual_digits=True)]
    elif "split" in cut:
        first = [cuts.Split(Regex(cut["split"]), behavior="isolated")]
    rest = cuts.ByteLevel(add_prefix_space=False, use_regex="split" not in cut)
    tokenizer.pre_tokenizer = cuts.Sequence([*first, rest])
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        AddedToken(word, special=True, normalized=False)
        for word, kind in zip(words, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == 3  # CONTROL in the GGUF specification
    ]
    tokenizer.add_special_tokens(control)
    special = {
        f"{role}_token": words[fields[f"tokenizer.ggml.{name}_token_id"]]
        for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{name}_token_id" in fields
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )
    fast.chat_template = fields.get("tokenizer.chat_template")
    fast.save_pretrained(folder)
