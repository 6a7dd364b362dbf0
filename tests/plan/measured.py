"""Run real steps of one stage and print how much memory they took, for `test_plan.py`.

python measured.py align|tune RECIPE.yaml
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from clover.align.apart import backward_apart
from clover.align.losses import LossSettings
from clover.core.config import PromptConfig, load_recipe
from clover.language.decoder_only import DecoderOnly
from clover.language.prompt import Prompt
from clover.plan.step import NoText, language_shape
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import Tokens
from clover.training.loop import parameter_groups


def resident(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def main(stage: str, path: str) -> None:
    torch.set_num_threads(1)
    recipe = load_recipe(path)
    # Libraries allocate for themselves at their first product.
    (torch.randn(64, 64, requires_grad=True) @ torch.randn(64, 64)).sum().backward()
    gc.collect()
    start = resident("VmRSS")
    part = recipe.align.batch_size if stage == "align" else recipe.tune.batch_size
    tokens, width = 64, recipe.qformer.encoder_width
    features = torch.randn(part, tokens, width)
    length = recipe.align.max_text_tokens if stage == "align" else recipe.tune.max_question_tokens
    ids = torch.randint(5, 90, (part, length))
    text = Tokens(ids, torch.ones_like(ids))
    if stage == "align":
        bridge = Bridge(recipe.qformer, has_alignment=True)
    else:
        shape = AutoConfig.for_model(**language_shape(recipe))
        model = AutoModelForCausalLM.from_config(shape)
        prompt = Prompt.from_config(PromptConfig())
        language = DecoderOnly(model, NoText(), prompt=prompt, config=recipe.language)
        bridge = Bridge(recipe.qformer, language_width=language.hidden_size)
    optimizer = torch.optim.AdamW(parameter_groups(bridge, 0.05), lr=1e-4, fused=True)
    for _ in range(2):
        if stage == "align":
            backward_apart(bridge, features, text, LossSettings(1))
        else:
            visual = bridge.visual_prefix(bridge.read_image(features), text.ids, text.mask)
            question = [[1] * recipe.language.max_instruction_tokens] * part
            answer = [[1] * recipe.language.max_answer_tokens] * part
            language.loss_from_ids(visual, question, answer)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(resident("VmHWM") - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
