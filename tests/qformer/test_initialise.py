"""Starting from BERT: our text path is then BERT, and queries start as text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clover.core.config import QFormerConfig
from clover.core.errors import CloverError
from clover.qformer.bridge import Bridge
from clover.qformer.initialise import start_from_bert

SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}


def bridge_of(**changes: int) -> Bridge:
    sizes = {**SIZES, "vocab_size": 31, "max_positions": 20, "encoder_width": 6, "dropout": 0.0}
    return Bridge(QFormerConfig(**{**sizes, **changes}), has_alignment=True).eval()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """Return a random masked-word BERT of three layers, without token types, and its file."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    model = BertForMaskedLM(config).eval()
    model.cls.predictions.bias.data.normal_()
    # The published system drops token types (SPEC, 1.1): with them at zero BERT is comparable.
    model.bert.embeddings.token_type_embeddings.weight.data.zero_()
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return folder / "model.safetensors", model


def test_text_alone_is_berts_own_text(bert: tuple[Path, object]) -> None:
    path, model = bert
    bridge = bridge_of(num_layers=3)
    start_from_bert(bridge, path)
    ids = torch.randint(1, 30, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)  # type: ignore[operator]
        ours = bridge.qformer.encode_text(ids, mask)
        logits = bridge.alignment.language(ours, bridge.qformer.word_embedding.weight)
    seen = mask.bool()
    torch.testing.assert_close(ours[seen], theirs.hidden_states[-1][seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[seen][:, :30], theirs.logits[seen], atol=1e-4, rtol=1e-4)


def test_the_query_feed_forward_starts_as_the_text_feed_forward(bert: tuple[Path, object]) -> None:
    bridge = bridge_of()
    first = bridge.qformer.layers[0]
    assert not torch.equal(
        first.query_feed_forward.inner.weight, first.text_feed_forward.inner.weight
    )
    start_from_bert(bridge, bert[0])
    for layer in bridge.qformer.layers:
        query, text = layer.query_feed_forward.state_dict(), layer.text_feed_forward.state_dict()
        assert all(torch.equal(query[name], text[name]) for name in text)
        # A copy, not the same tensor: they part ways in training.
        assert query["inner.weight"].data_ptr() != text["inner.weight"].data_ptr()


def test_what_bert_lacks_stays_as_drawn(bert: tuple[Path, object]) -> None:
    bridge = bridge_of()
    before = {name: item.clone() for name, item in bridge.state_dict().items()}
    start_from_bert(bridge, bert[0])
    after = bridge.state_dict()
    kept = [name for name in before if "cross_attention" in name or "query_tokens" in name]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    words = "qformer.word_embedding.weight"
    assert torch.equal(before[words][30], after[words][30])
    assert not torch.equal(before[words][:30], after[words][:30])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 32}, "hidden_size"),
        ({"intermediate_size": 40}, "intermediate_size"),
        ({"vocab_size": 50}, "vocab_size"),
        ({"num_layers": 4}, "enough layers"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(
    bert: tuple[Path, object], changes: dict[str, int], words: str
) -> None:
    with pytest.raises(CloverError, match=words) as error:
        start_from_bert(bridge_of(**changes), bert[0])
    assert "\n" not in str(error.value)


def test_a_torn_checkpoint_is_one_line(bert: tuple[Path, object], tmp_path: Path) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(bert[0].read_bytes()[:500])
    with pytest.raises(CloverError, match="is not a whole safetensors file") as error:
        start_from_bert(bridge_of(), torn)
    assert "\n" not in str(error.value)
