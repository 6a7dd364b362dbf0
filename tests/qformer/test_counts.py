"""The published sizes, on the meta device: nothing is allocated (SPEC, sections 1 and 9)."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForPreTraining

from clover.core.config import QFormerConfig
from clover.qformer.bridge import Bridge
from clover.qformer.initialise import start_from_bert
from clover.qformer.model import Layer

PUBLISHED = QFormerConfig()


def test_stage_1_trains_186_705_470_parameters() -> None:
    with torch.device("meta"):
        bridge = Bridge(PUBLISHED, has_alignment=True)
    assert bridge.num_trainable() == 186_705_470
    assert all(item.is_meta for item in bridge.parameters())


@pytest.mark.parametrize(
    ("language", "width", "count"),
    [("FLAN-T5-XL", 2048, 187_262_464), ("Vicuna-7B", 4096, 188_837_376)],
)
def test_stage_2_trains_the_published_number(language: str, width: int, count: int) -> None:
    with torch.device("meta"):
        bridge = Bridge(PUBLISHED, language_width=width)
    assert bridge.num_trainable() == count, language


def test_the_parts_are_those_of_the_specification() -> None:
    with torch.device("meta"):
        bridge = Bridge(PUBLISHED, has_alignment=True)
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in bridge.named_modules()}
    layers = sum(counts[f"qformer.layers.{index}"] for index in range(12))
    embeddings = sum(
        counts[f"qformer.{name}"]
        for name in ("word_embedding", "position_embedding", "embedding_norm")
    )
    assert layers == 161_823_744 and embeddings == 23_836_416
    assert counts["heads.language"] == 622_651
    assert counts["heads.vision_projection"] == counts["heads.text_projection"] == 196_864
    assert counts["heads.matching"] == 1_538 and counts["vision_norm"] == 2_816
    assert bridge.qformer.query_tokens.numel() == 24_576


def test_a_bert_of_bert_base_shape_starts_a_full_size_qformer(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    # bert-base's form in all but the number of layers, to stay quick.
    torch.manual_seed(0)
    bert = BertForPreTraining(BertConfig(num_hidden_layers=2, vocab_size=1000))
    folder = tmp_path_factory.mktemp("bert")
    bert.save_pretrained(folder)
    config = PUBLISHED.model_copy(update={"num_layers": 2, "vocab_size": 1001})
    bridge = Bridge(config, has_alignment=True)
    fresh = bridge.qformer.word_embedding.weight[1000].clone()
    start_from_bert(bridge, folder / "model.safetensors")
    words = bert.bert.embeddings.word_embeddings.weight
    assert torch.equal(bridge.qformer.word_embedding.weight[:1000], words)
    # [DEC], the row that BERT lacks, stays as drawn; its bias is 0.
    assert torch.equal(bridge.qformer.word_embedding.weight[1000], fresh)
    assert bridge.alignment.language.bias[1000] == 0
    for index, theirs in enumerate(bert.bert.encoder.layer):
        layer = bridge.qformer.layers[index]
        assert isinstance(layer, Layer)
        for ours in (layer.query_feed_forward, layer.text_feed_forward):
            assert torch.equal(ours.inner.weight, theirs.intermediate.dense.weight)
            assert torch.equal(ours.norm.weight, theirs.output.LayerNorm.weight)
        assert (layer.cross_attention is not None) == (index % 2 == 0)
