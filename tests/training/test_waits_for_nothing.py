"""A recorded step must not wait for its GPU, nor copy to it: looked at without one, on meta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from clover.align.apart import backward_apart
from clover.align.losses import LossSettings
from clover.core.config import LanguageConfig, PromptConfig, QFormerConfig
from clover.language.decoder_only import AnswerBatch, DecoderOnly
from clover.language.prompt import Prompt
from clover.plan.step import NoText
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import Tokens

META = torch.device("meta")
SHAPE = QFormerConfig(
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    intermediate_size=48,
    encoder_width=24,
    num_queries=4,
    vocab_size=100,
)
WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal")


class Waits(TorchDispatchMode):  # type: ignore[misc]
    """Note what would wait for a GPU, or be copied to one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
        places = [item.device.type for item in args if torch.is_tensor(item)]
        wanted = (kwargs or {}).get("device")
        is_sent = name in ("_to_copy", "copy_") and (
            len({*places, *([wanted.type] if wanted is not None else [])}) > 1
        )
        by_truth = name == "index" and any(
            item is not None and item.dtype == torch.bool for item in args[1]
        )
        if name in WAITS or is_sent or by_truth:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Made(TorchFunctionMode):
    """Note tensors that are made of Python's numbers on another device: they are copied there."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        device = (kwargs or {}).get("device")
        if function in (torch.tensor, torch.as_tensor) and torch.device(device or "cpu") == META:
            self.found.append(function.__name__)
        if function is torch.Tensor.__setitem__ and not torch.is_tensor(args[2]):
            # A number that is put at places of a tensor goes to a GPU as a tensor, by a copy.
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found += ["set"] * any(map(torch.is_tensor, places))
        if function is torch.multinomial:  # its checks wait, and are not there on meta
            self.found.append("multinomial")
        return function(*args, **(kwargs or {}))


def waits(run: Callable[[], object]) -> list[str]:
    with Waits() as found, Made(found.found):
        run()
    return found.found


def bridge_on_meta(**more: Any) -> tuple[Bridge, torch.Tensor, Tokens]:
    with META:
        bridge = Bridge(SHAPE, **more).to(torch.bfloat16).train()
        features = torch.empty(6, 9, 24)
        text = Tokens(torch.zeros(6, 8, dtype=torch.long), torch.ones(6, 8, dtype=torch.long))
    return bridge, features, text


@pytest.mark.parametrize("ignore_duplicates", [False, True])
def test_stage_1_waits_for_nothing(ignore_duplicates: bool) -> None:
    bridge, features, text = bridge_on_meta(has_alignment=True)
    settings = LossSettings(99, ignore_duplicates=ignore_duplicates)
    assert waits(lambda: backward_apart(bridge, features, text, settings)) == []


def test_stage_2_waits_for_nothing() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    bridge, features, text = bridge_on_meta(language_width=32)
    with META:
        model = LlamaForCausalLM(shape).to(torch.bfloat16).requires_grad_(False).eval()
        said = AnswerBatch(
            torch.zeros(6, 16, dtype=torch.long),
            torch.zeros(64, dtype=torch.long),
            torch.zeros(64, dtype=torch.long),
            64,
        )
    prompt = Prompt.from_config(PromptConfig())
    language = DecoderOnly(model, NoText(), prompt=prompt, config=LanguageConfig())
    assert language.can_be_replayed

    def step() -> None:
        visual = bridge.visual_prefix(bridge.read_image(features), text.ids, text.mask)
        language.loss_of_batch(visual, said).backward()  # type: ignore[no-untyped-call]

    assert waits(step) == []


def test_what_waits_is_seen() -> None:
    here, there = torch.ones(3), torch.ones(3, device=META)
    assert waits(lambda: here[here > 0]) == ["index"]
    assert waits(lambda: here.to(META)) == ["_to_copy"]
    assert waits(lambda: there.copy_(here)) == ["copy_"]
    assert waits(lambda: torch.tensor([1, 2], device=META)) == ["tensor"]
    place = torch.zeros(1, dtype=torch.long, device=META)
    assert waits(lambda: there.__setitem__(place, 1.0)) == ["set"]
    assert waits(lambda: torch.multinomial(there, 1)) == ["multinomial"]
    assert waits(lambda: here.sum().item()) == ["_local_scalar_dense"]
