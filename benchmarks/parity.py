"""Compare our Q-Former, losses and language-model layouts with the published LAVIS classes.

    python -m benchmarks.parity ../shared/reference/stage1_seed0.safetensors

prints one JSON line a tensor group (largest absolute difference) and exits 1 above the tolerance.
The files hold a small random model, its inputs and what the published code computed from them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from clover.align.losses import LossSettings, alignment_losses, match_logits
from clover.align.match import Negatives, negative_weights
from clover.core.config import QFormerConfig
from clover.qformer.bridge import Bridge
from clover.qformer.convert import from_lavis, lavis_name
from clover.qformer.tokenizer import Tokens

TOLERANCE = 1e-4
Figures = dict[str, float]


class Reference:
    """One golden file: tensors by name, without reading what is not asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = safe_open(str(path), "pt")
        self.metadata = self._file.metadata()
        self.names = set(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def group(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name without prefix, tensor)."""
        for name in sorted(self.names):
            if name.startswith(prefix):
                yield name.removeprefix(prefix), self[name]

    def bridge(self) -> Bridge:
        """Build the file's bridge from its LAVIS state dict, in evaluation mode."""
        converted = from_lavis(dict(self.group("sd/")))
        if converted.unknown:
            raise ValueError(f"not understood: {converted.unknown}")
        state = converted.state
        layers = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("qformer.layers."))
        words, width = state["qformer.word_embedding.weight"].shape
        has_alignment = "heads.temperature" in state
        config = QFormerConfig(
            hidden_size=width,
            num_layers=layers,
            num_heads=4,
            intermediate_size=state["qformer.layers.0.text_feed_forward.inner.bias"].shape[0],
            vocab_size=words,
            max_positions=state["qformer.position_embedding.weight"].shape[0],
            encoder_width=state["vision_norm.weight"].shape[0],
            num_queries=state["qformer.query_tokens"].shape[1],
            embedding_size=(
                state["heads.vision_projection.weight"].shape[0] if has_alignment else 8
            ),
            dropout=0.0,
        )
        projection = state.get("projection.weight")
        bridge = Bridge(
            config,
            language_width=None if projection is None else projection.shape[0],
            has_alignment=has_alignment,
        )
        bridge.load_state_dict(state)
        return bridge.eval()


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference; shapes must agree."""
    if found.shape != expected.shape:
        raise ValueError(f"shape {list(found.shape)} instead of {list(expected.shape)}")
    return float((found.detach().double() - expected.double()).abs().max())


def gradient_difference(bridge: Bridge, reference: Reference, prefix: str) -> float:
    """Compare the gradient norm of every trained tensor."""
    gradients = {name: item.grad for name, item in bridge.named_parameters()}
    worst = 0.0
    for name, expected in reference.group(prefix):
        ours = lavis_name(name)
        if ours is None or ours not in gradients:
            raise ValueError(f"no parameter of ours for the gradient of {name}")
        gradient = gradients[ours]
        norm = 0.0 if gradient is None else float(gradient.norm())
        worst = max(worst, abs(norm - float(expected)))
    return worst


def stage1(reference: Reference) -> Figures:
    """Every listed tensor of stage 1, both gradient variants included."""
    bridge = reference.bridge()
    text = Tokens(reference["in/input_ids"], reference["in/attention_mask"])
    negatives = Negatives(
        reference["in/neg_image_idx_for_text"], reference["in/neg_text_idx_for_image"]
    )
    decode_start = int(reference["out/lm_input_ids"][0, 0])
    features = reference["in/image_features_pre_ln"]
    figures: Figures = {}
    with torch.no_grad():
        figures["image_embeds"] = difference(
            bridge.vision_norm(features), reference["in/image_embeds"]
        )
        image = bridge.read_image(features)
        image_pass = bridge.qformer.encode_queries(image)
        figures["query_hidden"] = difference(image_pass.hidden, reference["out/query_hidden"])
        for name, expected in reference.group("out/pass1_kv/"):
            layer, kind = name.split("/")
            found = image_pass.cache[int(layer)]["kv".index(kind)]
            figures[f"pass1_kv/{name}"] = difference(found, expected)
        text_hidden = bridge.qformer.encode_text(text.ids, text.mask)
        figures["text_hidden"] = _masked(text_hidden, reference["out/text_hidden"], text.mask)
        heads = bridge.alignment
        figures["image_feats"] = difference(
            heads.embed_image(image_pass.hidden), reference["out/image_feats"]
        )
        figures["text_feat"] = difference(
            heads.embed_text(text_hidden[:, 0]), reference["out/text_feat"]
        )
        own = torch.arange(len(text.ids))
        images = torch.cat([own, negatives.image_for_text, own])
        texts = torch.cat([own, own, negatives.text_for_image])
        itm_hidden = bridge.qformer.encode_pair(
            image.select(images), text.ids[texts], text.mask[texts]
        )
        figures["itm_hidden"] = difference(itm_hidden, reference["out/itm_hidden"])
        figures["itm_logits"] = difference(
            match_logits(bridge, image, text, negatives), reference["out/itm_logits"]
        )
        inputs = reference["out/lm_input_ids"]
        lm_hidden = bridge.qformer.decode_text(inputs, text.mask, image_pass.cache)
        figures["lm_hidden"] = difference(lm_hidden, reference["out/lm_hidden"])
        words = bridge.qformer.word_embedding.weight
        figures["lm_logits"] = difference(
            heads.language(lm_hidden, words), reference["out/lm_logits"]
        )
    for detached, suffix in ((True, ""), (False, "_nodetach")):
        bridge.zero_grad(set_to_none=True)
        losses = alignment_losses(
            bridge,
            bridge.read_image(features),
            text,
            LossSettings(decode_start, detach_gathered=detached),
            negatives=negatives,
        )
        losses.total.backward()
        figures[f"grad_norm{suffix}"] = gradient_difference(
            bridge, reference, f"grad_norm{suffix}/"
        )
        total = torch.stack([p.grad.norm() for p in bridge.parameters() if p.grad is not None])
        figures[f"grad_norm{suffix}_total"] = difference(
            total.norm(), reference[f"grad_norm{suffix}_total"]
        )
    similar = losses.similar
    figures["sim_i2t"] = difference(similar.image_to_text, reference["out/sim_i2t"])
    figures["sim_t2i"] = difference(similar.text_to_image, reference["out/sim_t2i"])
    weights_t2i, weights_i2t = negative_weights(similar)
    figures["weights_t2i"] = difference(weights_t2i, reference["out/weights_t2i"])
    figures["weights_i2t"] = difference(weights_i2t, reference["out/weights_i2t"])
    for ours, theirs in (("contrast", "itc"), ("match", "itm"), ("caption", "lm")):
        figures[f"loss_{theirs}"] = difference(losses.parts[ours], reference[f"out/loss_{theirs}"])
    figures["loss"] = difference(losses.total, reference["out/loss"])
    return figures


def _masked(found: Tensor, expected: Tensor, mask: Tensor) -> float:
    # Rows of padding are computed by both and read by nobody; compare them as well.
    return max(difference(found, expected), difference(found[mask > 0], expected[mask > 0]))


def compare(path: str | Path) -> Figures:
    """Return the largest absolute difference of each tensor group in a golden file."""
    reference = Reference(path)
    if "out/lm_logits" in reference.names:
        return stage1(reference)
    from benchmarks.parity_stage2 import stage2

    return stage2(reference)


def main(arguments: list[str], *, echo: Callable[[str], None] = print) -> int:
    """Print one JSON line a tensor group; return 1 when one is above the tolerance."""
    if not arguments:
        echo("usage: python -m benchmarks.parity FILE.safetensors…")
        return 2
    worst = 0.0
    for path in arguments:
        for name, value in compare(path).items():
            worst = max(worst, value)
            row = {"file": Path(path).name, "group": name, "max_abs_difference": value}
            echo(json.dumps({**row, "tolerance": TOLERANCE, "ok": value <= TOLERANCE}))
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
