"""Start a Q-Former from a BERT-shaped checkpoint (SPEC, section 1.6).

The checkpoint's first layers are taken when the Q-Former is shorter. Cross-attention is fresh; the
query feed-forward starts as a copy of the text feed-forward, as stage 1 of BLIP-2 does.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clover.core.errors import CloverError
from clover.qformer.bridge import Bridge
from clover.qformer.model import Layer

# our name of a layer's part -> BERT's
_LAYER = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "text_feed_forward.inner": "intermediate.dense",
    "text_feed_forward.outer": "output.dense",
    "text_feed_forward.norm": "output.LayerNorm",
}


def start_from_bert(bridge: Bridge, path: str | Path) -> None:
    """Copy a BERT checkpoint (safetensors) into the bridge's Q-Former and next-word head.

    Raises:
        CloverError: the file is damaged, or a tensor is missing or has another shape.
    """
    try:
        loaded = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise CloverError(f"{path} is not a whole safetensors file: {error}") from error
    state = {name.removeprefix("bert."): tensor for name, tensor in loaded.items()}
    qformer = bridge.qformer
    _copy_rows(qformer.word_embedding.weight, state, "embeddings.word_embeddings.weight")
    _copy_rows(qformer.position_embedding.weight, state, "embeddings.position_embeddings.weight")
    _copy_module(qformer.embedding_norm, state, "embeddings.LayerNorm")
    for index, layer in enumerate(qformer.layers):
        for ours, theirs in _LAYER.items():
            _copy_module(layer.get_submodule(ours), state, f"encoder.layer.{index}.{theirs}")
        copy_text_to_query(layer)
    head = "cls.predictions.transform"
    if bridge.heads is not None and f"{head}.dense.weight" in state:
        _copy_module(bridge.heads.language.dense, state, f"{head}.dense")
        _copy_module(bridge.heads.language.norm, state, f"{head}.LayerNorm")
        _copy_rows(bridge.heads.language.bias, state, "cls.predictions.bias")


def copy_text_to_query(layer: nn.Module) -> None:
    """Let a layer's query feed-forward start as a copy of its text feed-forward."""
    assert isinstance(layer, Layer)
    layer.query_feed_forward.load_state_dict(layer.text_feed_forward.state_dict())


def _find(state: dict[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise CloverError(f"the BERT checkpoint has no tensor '{name}'; has it enough layers?")
    return state[name]


def _copy_module(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    for part, parameter in module.named_parameters():
        source = _find(state, f"{name}.{part}")
        if source.shape != parameter.shape:
            raise CloverError(
                f"the BERT checkpoint's {name}.{part} is {list(source.shape)}, the recipe wants "
                f"{list(parameter.shape)}; set qformer.hidden_size and intermediate_size to match"
            )
        parameter.data.copy_(source)


def _copy_rows(parameter: Tensor, state: dict[str, Tensor], name: str) -> None:
    """Copy the rows that both have; `[DEC]`, the row BERT lacks, stays as drawn."""
    source = _find(state, name)
    rows = min(len(source), len(parameter))
    if source.shape[1:] != parameter.shape[1:] or abs(len(source) - len(parameter)) > 1:
        raise CloverError(
            f"the BERT checkpoint's {name} is {list(source.shape)}, the recipe wants "
            f"{list(parameter.shape)}; set qformer.vocab_size, hidden_size, max_positions to match"
        )
    parameter.data[:rows].copy_(source[:rows])
