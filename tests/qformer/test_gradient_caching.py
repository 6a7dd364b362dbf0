"""A batch in chunks has the gradients of the batch in one piece."""

from __future__ import annotations

import pytest
import torch
from test_equations import DECODE_START, Case, make_case
from torch import Tensor

from clover.align.cached import backward_in_chunks
from clover.align.contrast import contrastive_loss, similarity
from clover.align.losses import ALL_LOSSES, LossSettings, alignment_losses


def gradients(case: Case) -> dict[str, Tensor]:
    found = {
        name: item.grad.clone()
        for name, item in case.bridge.named_parameters()
        if item.grad is not None and item.grad.any()
    }
    case.bridge.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("is_detached", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 7, 9])
@pytest.mark.parametrize("which", [ALL_LOSSES, ("contrast",), ("match",), ("match", "caption")])
def test_losses_and_gradients_are_those_of_the_whole_batch(
    which: tuple[str, ...], chunk: int, is_detached: bool
) -> None:
    case = make_case([3, 1, 4, 6, 5, 2, 4], seed=1)  # the second caption has no word to predict
    settings = LossSettings(
        DECODE_START, which, detach_gathered=is_detached, ignore_duplicates=True
    )
    whole = alignment_losses(
        case.bridge,
        case.bridge.read_image(case.features),
        case.text,
        settings,
        negatives=case.negatives,
    )
    (whole.total * 5).backward()  # type: ignore[no-untyped-call]
    expected = gradients(case)
    assert "qformer.query_tokens" in expected
    found = backward_in_chunks(
        case.bridge,
        case.features,
        case.text,
        settings,
        chunk=chunk,
        negatives=case.negatives,
        scale=5.0,
    )
    assert list(found.parts) == list(whole.parts)
    for name, value in whole.parts.items():  # losses are float32, also of float64 weights
        torch.testing.assert_close(found.parts[name], value.detach(), rtol=1e-6, atol=1e-6)
    ours = gradients(case)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_with_dropout_the_second_time_is_as_the_first() -> None:
    case = make_case([3, 4, 6, 5, 2], seed=2)
    config = case.bridge.config.model_copy(update={"dropout": 0.3})
    case.bridge.qformer.config = config
    for module in case.bridge.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.3  # type: ignore[assignment]
    case.bridge.train()
    qformer, heads = case.bridge.qformer, case.bridge.alignment

    def naive() -> Tensor:
        """The same passes in the same order, all of them with a graph."""
        image, text = [], []
        for start in range(0, 5, 2):
            part = slice(start, start + 2)
            keys = case.bridge.read_image(case.features[part])
            image.append(heads.embed_image(qformer.encode_queries(keys).hidden))
            ids, mask = case.text.ids[part], case.text.mask[part]
            text.append(heads.embed_text(qformer.encode_text(ids, mask, first_row=True)[:, 0]))
        similar = similarity(torch.cat(image), torch.cat(text), heads.temperature)
        return contrastive_loss(similar, label_smoothing=0.1)

    torch.manual_seed(7)
    loss = naive()
    loss.backward()  # type: ignore[no-untyped-call]
    expected = gradients(case)
    torch.manual_seed(7)
    found = backward_in_chunks(
        case.bridge, case.features, case.text, LossSettings(DECODE_START, ("contrast",)), chunk=2
    )
    after = torch.get_rng_state()
    torch.testing.assert_close(found.parts["contrast"], loss.detach())
    for name, value in gradients(case).items():
        torch.testing.assert_close(value, expected.pop(name), rtol=1e-5, atol=1e-6, msg=name)
    assert not expected
    torch.manual_seed(7)
    naive()
    assert torch.equal(after, torch.get_rng_state()), "what comes next draws what nobody drew yet"
    torch.manual_seed(8)
    assert naive() != loss, "dropout is off: this test says nothing"
