"""A Llama-shaped decoder's forward pass of our own, for reading and writing on the CPU.

In: embeddings `[B, T, H]`, positions, a cache. Out: last hidden states `[B, T, H]`, up to rounding
those of transformers. On a CPU one token costs what reading the weights costs, so two things count:
few calls a layer, and weights in the order in which the matrix product reads them (oneDNN's packed
form: about twice the bytes a second of the plain one).

Packed weights take the place of the plain ones from the first pass on, so that a question meets the
same numbers whenever it is asked. The plain ones come back, exactly, as soon as transformers' own
forward runs (training, beam search). Going to and fro costs each time what some eight passes save.
Only the head of a model that shares it with its embeddings is held twice.

Models of another build, other devices, gradients and training mode are transformers' business.

Axes: B rows, T tokens, H width, N heads, K key heads, G = N / K, D width of a head, S own tokens
that a row may look at, P tokens of a shared beginning.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clover.language.packed import FIXED_ROTATIONS
from clover.language.shared_prefix import SharedPrefix, active_prefix

_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}
"""Layers of this one build: pre-norm, rotary halves, grouped heads, a gated SiLU."""
_PARTS = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
_FEWEST_ROWS = 4
"""oneDNN multiplies one row more slowly than four: 1.15 to 1.3 times as long."""
_HIDDEN = -1e30
"""Added to what may not be seen. Not infinity: a padding token may see nothing at all."""
_SCORES = 1 << 24
"""Attention scores held at once (64 MB): a long text is read in pieces."""
_WIDE_PREFIXES = 4
"""Shared beginnings whose keys and values are also kept in float32."""
_ATTRIBUTE = "_clover_lean"

Wide = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values `[K, P, D]` of a shared beginning, float32, layer by layer."""


@dataclass(frozen=True)
class _Packed:
    """The matrices of a layer in oneDNN's order; biases are the modules' own."""

    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    first_norm: Tensor
    second_norm: Tensor
    """Weights of the norms times the root of the width, float32."""


class LeanDecoder:
    """Runs a transformers model's layers without transformers' code.

    Args:
        model: A causal language model that `is_llama_shaped`; its weights stay where they are.
    """

    def __init__(self, model: Any) -> None:
        config, body = model.config, model.base_model
        self._model, self._body = model, body
        self._layers: list[Any] = list(body.layers)
        self._head = model.get_output_embeddings()
        self._embed = model.get_input_embeddings()
        self._is_tied = self._head.weight is self._embed.weight
        self._heads = int(config.num_attention_heads)
        self._groups = int(config.num_key_value_heads)
        self._width = int(self._layers[0].self_attn.head_dim)
        first = self._layers[0]
        self._smallest = tuple(
            torch.full((1, 1), (norm.variance_epsilon * norm.weight.numel()) ** 0.5)
            for norm in (first.input_layernorm, first.post_attention_layernorm)
        )
        self._packed: list[_Packed] = []
        self._packed_head: Tensor | None = None
        self._head_version = 0
        self._can_pack: dict[torch.dtype, bool] = {}
        self._wide: dict[int, tuple[tuple[Tensor, ...], Wide]] = {}
        self._lock = threading.RLock()
        self._num_plain = 0
        """Passes that read the plain weights now, in whichever thread: nothing is packed then."""
        # Whoever calls transformers' own forward, or reads the weights, finds them in place.
        body.register_forward_pre_hook(self._plain_begins)
        body.register_forward_hook(self._plain_ends, always_call=True)
        if not self._is_tied:
            self._head.register_forward_pre_hook(self._give_back)
        model.register_state_dict_pre_hook(self._give_back)
        body.register_state_dict_pre_hook(self._give_back)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the model needs: plain weights, and no lock of this process."""
        self.unpack()
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_lock", "_wide", "_num_plain")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up what `__getstate__` gave."""
        self.__dict__.update(state)
        self._lock, self._wide, self._num_plain = threading.RLock(), {}, 0

    @classmethod
    def of(cls, model: Any) -> LeanDecoder | None:
        """Return the one of a model, or none where the model is of another build."""
        found: LeanDecoder | None = getattr(model, _ATTRIBUTE, None)
        if found is None and is_llama_shaped(model):
            found = cls(model)
            # Not a submodule: it holds no weights of its own that a state could list.
            object.__setattr__(model, _ATTRIBUTE, found)
        return found

    @property
    def is_usable(self) -> bool:
        """Whether it may run now: on the CPU, and nothing is to be learnt."""
        weight = self._embed.weight
        return (
            not torch.is_grad_enabled()
            and not self._body.training
            and not getattr(self._model, "is_spread", False)
            and weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.bfloat16)
        )

    @property
    def is_packed(self) -> bool:
        """Whether the layers' weights are held in packed form now."""
        return bool(self._packed)

    # -- the pass --------------------------------------------------------------------------

    def hidden(
        self,
        embeds: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Return the last hidden states `[B, T, H]`, behind the prefix that is active.

        Args:
            embeds: `[B, T, H]`.
            mask: `[B, S]`, 1 where a token stands; or `[B, 1, T, S]`, numbers to be added or True
                where a token is seen; none where nothing but the future is hidden.
            positions: `[B, T]` or `[1, T]`; counted on from the cache where absent.
            cache: Takes keys and values as transformers' caches do; none where nothing is kept.
        """
        # Held for the whole pass: another thread may want the plain weights back meanwhile.
        matrices = self._begun(self._embed.weight.dtype)
        try:
            with torch.autocast("cpu", enabled=False):
                return self._hidden(embeds, mask, positions, cache, matrices)
        finally:
            if matrices[0] is None:
                self._plain_ends()

    def _hidden(
        self,
        embeds: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Any,
        matrices: Sequence[_Packed | None],
    ) -> Tensor:
        batch, length, _ = embeds.shape
        dtype = self._embed.weight.dtype
        num_before = 0 if cache is None else int(cache.get_seq_length())
        if positions is None:
            positions = torch.arange(num_before, num_before + length)[None]
        prefix = active_prefix()
        wide = None if prefix is None else self._widened(prefix)
        not_before = None
        if prefix is not None and prefix.hidden is not None:
            not_before = prefix.hidden[:, None, None].float() * _HIDDEN  # [B, 1, 1, P]
        turns = self._turns(positions)
        bias: Tensor | None = None
        states = embeds.to(dtype).reshape(batch * length, -1)
        if matrices[0] is not None:
            states = _at_least(_FEWEST_ROWS, states)
        for index, (layer, packed) in enumerate(zip(self._layers, matrices, strict=True)):
            queries, keys, values = self._project(layer, packed, states, batch, turns)
            if cache is not None:
                keys, values = cache.update(keys, values, index)
            if index == 0:
                bias = _bias(mask, length, keys.shape[2])
            before = None if wide is None else wide[index]
            seen = self._attend(queries, keys, values, bias, before, not_before)
            seen = seen.to(dtype).reshape(batch * length, -1)
            states = self._leave(layer, packed, seen, states)
        return _normed(self._body.norm, states[: batch * length]).view(batch, length, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the head's scores `[..., V]` of `[..., H]`, float32."""
        with torch.autocast("cpu", enabled=False):
            head = self._head
            with self._lock:
                packed = self._packed_head
                is_old = self._is_tied and self._head_version != head.weight._version
                if packed is not None and is_old:
                    packed = self._pack_head()
            if packed is not None:
                flat = _at_least(_FEWEST_ROWS, hidden.reshape(-1, hidden.shape[-1]))
                scores = _product(flat, packed, head.bias)
                return scores[: hidden[..., 0].numel()].view(*hidden.shape[:-1], -1).float()
            with self._lock:  # nobody packs it meanwhile
                return F.linear(hidden, head.weight, head.bias).float()

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines `[B, T, N+K, D]`; queries' carry the scores' scale."""
        rotary = self._body.rotary_emb
        angles = positions[..., None].float() * rotary.inv_freq.float()  # [B, T, D/2]
        cosines, sines = angles.cos(), angles.sin()
        cosines = torch.cat([cosines, cosines], dim=-1)[:, :, None]
        sines = torch.cat([-sines, sines], dim=-1)[:, :, None]
        sizes = torch.full((self._heads + self._groups, 1), float(rotary.attention_scaling))
        sizes[: self._heads] *= self._layers[0].self_attn.scaling
        return cosines * sizes, sines * sizes

    def _project(
        self,
        layer: Any,
        packed: _Packed | None,
        states: Tensor,
        batch: int,
        turns: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries `[B, T, N, D]` in float32, and keys and values `[B, K, T, D]`."""
        rows = batch * turns[0].shape[1]
        if packed is not None:
            normed = _quickly_normed(packed.first_norm, self._smallest[0], states)
            joined = _product(normed, packed.qkv, packed.qkv_bias)[:rows]
        else:
            normed = _normed(layer.input_layernorm, states)
            parts = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            joined = torch.cat([F.linear(normed, part.weight, part.bias) for part in parts], dim=-1)
        turned = self._heads + self._groups
        joined = joined.view(batch, -1, turned + self._groups, self._width)
        plain = joined[:, :, :turned].float()
        halves = plain.view(*plain.shape[:3], 2, -1).flip(-2).view(plain.shape)
        both = torch.addcmul(plain * turns[0], halves, turns[1])
        keys = both[:, :, self._heads :].to(joined.dtype).transpose(1, 2)
        return both[:, :, : self._heads], keys, joined[:, :, turned:].transpose(1, 2)

    def _attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        before: tuple[Tensor, Tensor] | None,
        not_before: Tensor | None,
    ) -> Tensor:
        """Return `[B, T, N, D]` in float32, of scaled queries `[B, T, N, D]` in float32.

        Args:
            keys: `[B, K, S, D]`, any format; `values` alike.
            bias: `[B, 1, 1, T, S]`, added to the scores of a row's own tokens.
            before: Keys and values of the shared beginning, which all rows' queries meet in one
                product.
            not_before: `[B, 1, 1, P]`, added to the scores of the shared beginning.
        """
        batch, length, heads, width = queries.shape
        num_seen = keys.shape[2] + (0 if before is None else before[0].shape[1])
        at_once = max(1, _SCORES // (batch * heads * num_seen))
        if length > at_once:
            parts = [
                self._attend(
                    queries[:, start : start + at_once],
                    keys,
                    values,
                    None if bias is None else bias[..., start : start + at_once, :],
                    before,
                    not_before,
                )
                for start in range(0, length, at_once)
            ]
            return torch.cat(parts, dim=1)
        groups = self._groups
        rows = heads // groups * length
        grouped = queries.view(batch, length, groups, -1, width).permute(0, 2, 3, 1, 4)
        grouped = grouped.reshape(batch, groups, rows, width)
        scores = grouped @ keys.float().transpose(2, 3)  # [B, K, G*T, S]
        if bias is not None:
            scores.view(batch, groups, -1, length, scores.shape[-1]).add_(bias)
        if before is None:
            seen = scores.softmax(dim=-1) @ values.float()
        else:
            together = grouped.transpose(0, 1).reshape(groups, batch * rows, width)
            shared = torch.bmm(together, before[0].transpose(1, 2))
            shared = shared.view(groups, batch, rows, -1).transpose(0, 1)
            if not_before is not None:
                shared = shared + not_before
            weights = torch.cat([shared, scores], dim=-1).softmax(dim=-1)
            split = shared.shape[-1]
            first = weights[..., :split].transpose(0, 1).reshape(groups, batch * rows, split)
            seen = torch.bmm(first, before[1]).view(groups, batch, rows, width).transpose(0, 1)
            seen = seen + weights[..., split:] @ values.float()
        by_token: Tensor = seen.reshape(batch, groups, -1, length, width).permute(0, 3, 1, 2, 4)
        return by_token.reshape(batch, length, heads, width)

    def _leave(self, layer: Any, packed: _Packed | None, seen: Tensor, states: Tensor) -> Tensor:
        """Return what a layer hands on `[B*T, H]`: after attention's last product and the MLP."""
        mlp, out = layer.mlp, layer.self_attn.o_proj
        if packed is None:
            states = states + F.linear(seen, out.weight, out.bias)
            normed = _normed(layer.post_attention_layernorm, states)
            gate = F.silu(F.linear(normed, mlp.gate_proj.weight, mlp.gate_proj.bias))
            inner = F.linear(normed, mlp.up_proj.weight, mlp.up_proj.bias).mul_(gate)
            return states + F.linear(inner, mlp.down_proj.weight, mlp.down_proj.bias)
        seen = _at_least(_FEWEST_ROWS, seen)
        states = _product_and(seen, states, packed.o, out.bias, "add")
        normed = _quickly_normed(packed.second_norm, self._smallest[1], states)
        gate = _product(normed, packed.gate, mlp.gate_proj.bias, "swish")
        inner = _product_and(normed, gate, packed.up, mlp.up_proj.bias, "mul")
        return _product_and(inner, states, packed.down, mlp.down_proj.bias, "add")

    def _widened(self, prefix: SharedPrefix) -> Wide:
        """Return a shared beginning in float32, widened once."""
        # `replace` hands the tuple on: the same beginning is the same object.
        key = id(prefix.keys)
        found = self._wide.get(key)
        if found is None or found[0] is not prefix.keys:
            pairs = zip(prefix.keys, prefix.values, strict=True)
            found = (prefix.keys, tuple((keys.float(), values.float()) for keys, values in pairs))
            while len(self._wide) >= _WIDE_PREFIXES:
                self._wide.pop(next(iter(self._wide)))
            self._wide[key] = found
        return found[1]

    # -- where the weights are ---------------------------------------------------------------

    def _begun(self, dtype: torch.dtype) -> Sequence[_Packed | None]:
        """Return a pass's packed matrices; or none, a layer each, and note a plain pass."""
        with self._lock:
            if self._packed and self._packed[0].gate.dtype != dtype:
                self.unpack()  # the model was moved to another format meanwhile
            if self._num_plain == 0 and self.pack(dtype):
                return tuple(self._packed)
            self._num_plain += 1
            return (None,) * len(self._layers)

    def _plain_begins(self, *_: Any, **__: Any) -> None:
        """Before transformers' own forward."""
        with self._lock:
            self._num_plain += 1
            self._give_back()

    def _plain_ends(self, *_: Any, **__: Any) -> None:
        with self._lock:
            self._num_plain -= 1

    def pack(self, dtype: torch.dtype | None = None) -> bool:
        """Bring the weights into packed form; return whether this build of torch can."""
        dtype = dtype or self._embed.weight.dtype
        with self._lock:
            if self._packed:
                return True
            if dtype not in self._can_pack:
                self._can_pack[dtype] = can_pack(dtype)
            if not self._can_pack[dtype]:
                return False
            packed: list[_Packed] = []
            try:
                for layer in self._layers:
                    packed.append(self._packed_layer(layer))
                    for part in _linears(layer):
                        _empty(part.weight)
                self._pack_head()
                if not self._is_tied:
                    _empty(self._head.weight)
            except BaseException:
                # No memory, or interrupted: what was taken comes back, and is left alone.
                self._packed = packed
                self.unpack()
                self._can_pack[dtype] = False
                raise
            self._packed = packed
            return True

    @staticmethod
    def _packed_layer(layer: Any) -> _Packed:
        own, mlp = layer.self_attn, layer.mlp
        parts = (own.q_proj, own.k_proj, own.v_proj)
        bias = None
        if own.q_proj.bias is not None:
            bias = torch.cat([part.bias.data for part in parts])
        return _Packed(
            _pack(torch.cat([part.weight.data for part in parts])),
            bias,
            *(
                _pack(part.weight.data)
                for part in (own.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
            ),
            *(
                norm.weight.data.float() * norm.weight.numel() ** 0.5
                for norm in (layer.input_layernorm, layer.post_attention_layernorm)
            ),
        )

    def _pack_head(self) -> Tensor:
        self._packed_head = _pack(self._head.weight.data)
        self._head_version = self._head.weight._version
        return self._packed_head

    def unpack(self) -> None:
        """Put the plain weights back, bit for bit."""
        # What comes back must be fit to learn through, whoever asks for it.
        with self._lock, torch.inference_mode(False):
            packed, self._packed = self._packed, []
            head, self._packed_head = self._packed_head, None
            packed.reverse()
            for layer in self._layers[: len(packed)]:
                item = packed.pop()  # its memory goes before the next layer's comes
                own, mlp = layer.self_attn, layer.mlp
                parts = (own.q_proj, own.k_proj, own.v_proj)
                sizes = [part.weight.shape[0] for part in parts]
                for part, weight in zip(
                    parts, torch.split(item.qkv.to_dense(), sizes), strict=True
                ):
                    _fill(part.weight, weight)
                _fill(own.o_proj.weight, item.o.to_dense())
                _fill(mlp.gate_proj.weight, item.gate.to_dense())
                _fill(mlp.up_proj.weight, item.up.to_dense())
                _fill(mlp.down_proj.weight, item.down.to_dense())
            if head is not None and not self._is_tied:
                _fill(self._head.weight, head.to_dense())

    def _give_back(self, *_: Any, **__: Any) -> None:
        """Before transformers' own forward."""
        if self._packed:
            self.unpack()


def is_llama_shaped(model: Any) -> bool:
    """Return whether a causal language model is built as `LeanDecoder` computes."""
    config, body = model.config, model.base_model
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or model is body:
        return False
    rotary = getattr(body, "rotary_emb", None)
    if getattr(rotary, "rope_type", None) not in FIXED_ROTATIONS or not hasattr(body, "norm"):
        return False
    if getattr(config, "hidden_act", None) not in ("silu", "swish"):
        return False
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds != {"full_attention"} or (window and getattr(config, "use_sliding_window", True)):
        return False
    if type(model.get_output_embeddings()) is not nn.Linear:
        return False
    return all(type(layer).__name__ in _LAYERS and _has_parts(layer) for layer in layers)


def _has_parts(layer: Any) -> bool:
    for name, wanted in _PARTS.items():
        part = getattr(layer, name, None) if name else layer
        if part is None or {child for child, _ in part.named_children()} != wanted:
            return False
    linears = [*layer.self_attn.children(), *layer.mlp.children()]
    # Quantised layers and those with hooks or adapters are something else than a matrix.
    return all(type(item) is nn.Linear for item in linears if item is not layer.mlp.act_fn)


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether oneDNN packs weights of this format here, and multiplies them right."""
    try:
        if not torch._C._has_mkldnn:
            return False
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(48, 32, generator=generator).to(dtype)
        states = torch.randn(3, 32, generator=generator).to(dtype)
        packed = _pack(weight)
        found = _product_and(states, _product(states, packed, None, "swish"), packed, None, "mul")
        plain = states.double() @ weight.double().t()
        is_right = torch.allclose(found.double(), plain * F.silu(plain), rtol=0.05, atol=0.05)
        return is_right and torch.equal(packed.to_dense(), weight)
    except (AttributeError, RuntimeError):
        return False


def _linears(layer: Any) -> tuple[nn.Linear, ...]:
    own, mlp = layer.self_attn, layer.mlp
    return (
        *(own.q_proj, own.k_proj, own.v_proj, own.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
    return packed


def _product(states: Tensor, weight: Tensor, bias: Tensor | None, after: str = "none") -> Tensor:
    """Return `states @ weight.T + bias`, and a function of it, of a packed weight."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, after, [], "")
    return found


def _product_and(
    states: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, how: str
) -> Tensor:
    """Return the product of a packed weight added to or multiplied with `other`."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(states, other, weight, bias, how)
    return found


def _empty(weight: Tensor) -> None:
    """Take a weight's memory and keep its shape; a product with what is left shows at once."""
    weight.data = weight.data.new_full((), torch.nan).expand(weight.shape)


def _fill(weight: Tensor, values: Tensor) -> None:
    weight.data = values.to(weight.device, weight.dtype)


def _normed(norm: Any, states: Tensor) -> Tensor:
    """Root mean square normalisation, computed in float32."""
    return F.rms_norm(states, states.shape[-1:], norm.weight, norm.variance_epsilon)


def _quickly_normed(weight: Tensor, smallest: Tensor, states: Tensor) -> Tensor:
    """The same in fewer calls: `weight` and `smallest` hold the root of the width and of epsilon.

    x w / sqrt(mean(x^2) + e) = x (w sqrt(n)) / hypot(|x|, sqrt(n e)).
    """
    wide = states.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * weight).div_(torch.hypot(size, smallest)).to(states.dtype)


def _at_least(count: int, rows: Tensor) -> Tensor:
    """Return `[N, H]` with rows of zeros behind, where there are fewer than `count`."""
    return rows if len(rows) >= count else F.pad(rows, (0, 0, 0, count - len(rows)))


def _bias(mask: Tensor | None, length: int, size: int) -> Tensor | None:
    """Return what is added to scores `[B, K, G, T, S]`: 0, or much less than nothing."""
    if mask is None or mask.dim() == 2:
        if length == 1 and (mask is None or bool(mask.all())):
            return None
        seen = torch.ones(length, size, dtype=torch.bool).tril(size - length)
        if mask is not None:
            seen = seen & mask[:, None, None, None, :size].bool()
        hidden = ~seen
    else:
        mask = mask[:, :, None, :, :size]
        hidden = ~mask if mask.dtype == torch.bool else mask < 0
        if not hidden.any():
            return None
    return hidden.float() * _HIDDEN
