"""Both training steps at the published size, beside the naive ways of the same mathematics.

Stage 1: 12 layers of 768, 32 queries, 257 x 1408 features, 8 pairs, text at 32 tokens; the peer
runs four separate passes (`benchmarks.step.separate_passes`: image keys projected for each, every
row and every logit computed).
Stage 2: a language model of SmolLM2-135M's shape, 8 instructions of 24 tokens, answers of natural
length about 48; the peer pads to the longest row and scores the vocabulary at every place. Of the
word embedding ours trains the rows that a data set's questions hold, as `clover tune` does.
A step is forward, backward, clipping and AdamW, with the published dropout of 0.1.

Time is processor time (medians): the core may be shared. The floor replays every matrix product of
our step alone. The peer always computes in float32; ours too, and once more in bfloat16 (autocast,
the frozen language model held in it) where the processor multiplies that fast. Each side, and each
floor, runs in a process of its own, whose peak memory is the side's; with `--into` each part is
kept as it is done, so that a busy machine can do one at a time, and a row is printed once its parts
are there.

    python -m benchmarks.train_step [--steps 3] [--small]
    python -m benchmarks.train_step --into parts/ --only "stage 1" ours
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.figure import print_figure
from benchmarks.naive import torch_operations
from benchmarks.step import separate_passes
from clover.align.apart import backward_apart
from clover.align.losses import LossSettings
from clover.core.config import LanguageConfig, PromptConfig, QFormerConfig
from clover.core.files import read_json, write_json
from clover.core.linear import multiply
from clover.core.memory import keep_freed_memory
from clover.core.number_format import without_autocast
from clover.core.run import peak_memory_gib
from clover.language.decoder_only import AnswerBatch, DecoderOnly
from clover.language.prompt import Prompt
from clover.plan.step import NoText
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import Tokens
from clover.qformer.used_words import only_words
from clover.training.device import Device, choose_device, multiplies_bfloat16_fast
from clover.training.loop import apply_gradients, make_optimizer
from clover.training.replay import Replay

Step = Callable[[], object]
BATCH, PLACES, TEXT, DECODE_START = 8, 257, 32, 30522
INSTRUCTION = 24
WORDS = 10_000
"""Drawn for the questions of a data set: some 8,500 different ones of the vocabulary."""
ANSWERS = (12, 20, 31, 40, 48, 60, 75, 98)  # mean 48: as long and as uneven as generated answers
SIZES = {
    "published": {},
    "small": {"hidden_size": 96, "num_layers": 2, "intermediate_size": 192, "encoder_width": 64},
}


def _finish(
    bridge: Bridge, optimizer: torch.optim.Optimizer, *, is_ours: bool, device: Device
) -> None:
    if is_ours:
        apply_gradients(optimizer, torch.ones((), device=device.device), clip_norm=1.0)
    else:
        torch.nn.utils.clip_grad_norm_(bridge.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def stage_1(
    size: str, device: Device, batch: int = BATCH, *, compiled: bool = False
) -> tuple[Step, Step]:
    """Return our step and the peer's; `compiled` is ours with compiled layers."""
    torch.manual_seed(0)
    with device.device:
        bridge = Bridge(QFormerConfig(**SIZES[size]), has_alignment=True)  # type: ignore[arg-type]
        features = torch.randn(batch, PLACES, bridge.config.encoder_width)
        # Captions are longer than the limit: all 32 places are tokens, padding saves us nothing.
        ids = torch.randint(1000, 30000, (batch, TEXT))
    if compiled:
        bridge.qformer.compile_layers()
    text = Tokens(ids, torch.ones_like(ids))
    optimizer = make_optimizer(bridge, learning_rate=1e-5, weight_decay=0.05)

    def losses(features: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        settings = LossSettings(DECODE_START)
        return backward_apart(bridge, features, Tokens(ids, mask), settings).parts

    run = Replay(losses) if device.device.type == "cuda" else losses

    def ours() -> None:
        with device.autocast():
            run(features, text.ids, text.mask)
        _finish(bridge, optimizer, is_ours=True, device=device)

    def peer() -> None:
        with torch_operations():
            separate_passes(bridge, features, text, DECODE_START, keep_gradients=True)
        _finish(bridge, optimizer, is_ours=False, device=device)

    return ours, peer


DECODERS = {
    "small": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152,
              "tie_word_embeddings": True},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
             "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32001,
           "tie_word_embeddings": False},
}  # fmt: skip
"""Llama's shape: one that only shows that it runs, SmolLM2-135M's, Vicuna-7B's."""


def stage_2(
    size: str, device: Device, batch: int = BATCH, decoder: str | None = None
) -> tuple[Step, Step]:
    """Return our step and the peer's; a process makes steps of one of them.

    Args:
        size: Of the bridge, and where no decoder is named of the language model.
        device: Where, and in which format.
        batch: Instructions; answers' lengths are repeated.
        decoder: One of `DECODERS`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    stack = contextlib.ExitStack()  # open for as long as the process lives
    config = LlamaConfig(**DECODERS[decoder or ("small" if size == "small" else "135m")])  # type: ignore[arg-type]
    words = config.vocab_size
    lengths = [ANSWERS[row % len(ANSWERS)] for row in range(batch)]
    with device.device, _format(device.dtype):
        model = LlamaForCausalLM(config).eval().requires_grad_(False).to(device.dtype)
    with device.device:
        bridge = Bridge(
            QFormerConfig(**SIZES[size]),  # type: ignore[arg-type]
            language_width=config.hidden_size,
        )
        features = torch.randn(batch, PLACES, bridge.config.encoder_width)
        question = torch.randint(1000, 30000, (batch, INSTRUCTION))
    instructions = torch.randint(0, words, (batch, INSTRUCTION)).tolist()
    answers = [torch.randint(0, words, (length,)).tolist() for length in lengths]

    # Our attention registers itself with the model, and `clover tune` trains the words alone that
    # its questions hold: neither may be there when the peer makes its step.
    @cache
    def our_side() -> tuple[DecoderOnly, torch.optim.Optimizer]:
        held = torch.cat([question.flatten().cpu(), torch.randint(1000, 30000, (WORDS,))])
        stack.enter_context(only_words(bridge.qformer, held.unique()))
        prompt = Prompt.from_config(PromptConfig())
        language = DecoderOnly(model, NoText(), prompt=prompt, config=LanguageConfig())
        return language, make_optimizer(bridge, learning_rate=1e-5, weight_decay=0.05)

    @cache
    def peer_optimizer() -> torch.optim.Optimizer:
        return make_optimizer(bridge, learning_rate=1e-5, weight_decay=0.05)

    def prefix() -> Tensor:
        image = bridge.read_image(features)
        return bridge.visual_prefix(image, question, torch.ones_like(question))

    def ours() -> None:
        language, optimizer = our_side()
        with device.autocast():
            total, count = language.loss_from_ids(prefix(), instructions, answers)
        (total / count).backward()  # type: ignore[no-untyped-call]
        _finish(bridge, optimizer, is_ours=True, device=device)

    said = DecoderOnly.answer_batch_from_ids(
        instructions, answers, num_queries=bridge.config.num_queries
    )
    inputs = [device.put(item) for item in (said.ids, said.places, said.labels)]

    def loss(ids: Tensor, places: Tensor, labels: Tensor) -> dict[str, Tensor]:
        language, _ = our_side()
        total = language.loss_of_batch(prefix(), AnswerBatch(ids, places, labels, said.count))
        with without_autocast(total.device):
            (total / said.count).backward()  # type: ignore[no-untyped-call]
        return {"total": total.detach()}

    replay = Replay(loss)

    def ours_on_a_gpu() -> None:
        _, optimizer = our_side()
        with device.autocast():
            replay(*inputs)
        _finish(bridge, optimizer, is_ours=True, device=device)

    def peer() -> None:
        optimizer = peer_optimizer()
        with torch_operations():
            visual = prefix()
        width = INSTRUCTION + max(lengths)
        ids = torch.zeros(batch, width, dtype=torch.long)
        labels = torch.full((batch, visual.shape[1] + width), -100)
        mask = torch.zeros_like(labels)
        for row, (asked, said) in enumerate(zip(instructions, answers, strict=True)):
            ids[row, : len(asked) + len(said)] = torch.tensor(asked + said)
            start = visual.shape[1] + len(asked)
            labels[row, start : start + len(said)] = torch.tensor(said)
            mask[row, : start + len(said)] = 1
        ids, labels, mask = (item.to(device.device) for item in (ids, labels, mask))
        embeds = torch.cat([visual.to(model.dtype), model.get_input_embeddings()(ids)], dim=1)
        logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits.float()
        mean = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        mean.backward()  # type: ignore[no-untyped-call]
        _finish(bridge, optimizer, is_ours=False, device=device)

    return (ours_on_a_gpu if device.device.type == "cuda" else ours), peer


@contextlib.contextmanager
def _format(dtype: torch.dtype) -> Iterator[None]:
    """Within the block, make new parameters in this format: 7B of float32 would be 28 GB first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


PARTS = ("ours", "peer", "floor")
"""Of a row in float32."""
HALF = ("ours bfloat16", "peer", "floor bfloat16")
"""Of a row in bfloat16; the peer is the same."""
STAGES = {"stage 1": stage_1, "stage 2": stage_2}


_LONG_ENOUGH = 0.2
"""Seconds of processor time beside which a tick of the system's clock is small."""


class _Products(TorchDispatchMode):  # type: ignore[misc]
    """Note the matrix products of a step, by operation, shapes and strides."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"):
            tensors = [
                (tuple(item.shape), item.stride(), item.dtype)
                for item in args
                if torch.is_tensor(item)
            ]
            self.found[name, tuple(tensors[-2:])] += 1
        elif name == "mkldnn::_linear_pointwise":
            left, right = args[0].flatten(0, -2), args[1].t()
            pair = tuple((tuple(item.shape), item.stride(), item.dtype) for item in (left, right))
            self.found[name, pair] += 1
        elif "scaled_dot_product" in name:
            shapes = [
                tuple(item.shape) for item in args if torch.is_tensor(item) and item.ndim == 4
            ]
            self.found["attention" + ("_backward" in name) * "_backward", tuple(shapes[-4:])] += 1
        return function(*args, **(kwargs or {}))


def floor(step: Step) -> tuple[float, float]:
    """Return (seconds, GFLOP) of the matrix products of a step, each measured alone."""
    with _Products() as products:
        step()
    total = work = 0.0
    for (name, tensors), times in products.found.items():
        if len(tensors) != 2:
            continue  # fused attention: a few per cent, and left out of the floor
        left, right = (
            torch.empty_strided(shape, stride, dtype=dtype).normal_()
            for shape, stride, dtype in tensors
        )
        product: Callable[..., Tensor] = torch.bmm if left.ndim == 3 else torch.mm
        out = product(left, right)
        run: Callable[[], object] = partial(product, left, right, out=out)
        if name == "mkldnn::_linear_pointwise":
            # The product alone: the operation would put a transposed matrix in order first.
            run = partial(multiply, left.contiguous(), right)

        total += times * min(_processor_each(run) for _ in range(3))
        work += times * 2 * out.numel() * left.shape[-1] / 1e9
    return total, work


def _processor(function: Step) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _processor_each(function: Step) -> float:
    """Return the processor seconds of one of many runs.

    The system books a thread's time at its ticks. A product of three milliseconds on two threads
    ends between them, and measured once it seems to take down to half of what it does.
    """
    times = max(1, round(_LONG_ENOUGH / max(_processor(function), 1e-4)))
    start = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - start) / times


def measure(stage: str, part: str, size: str, steps: int) -> dict[str, float]:
    """Return what one part of a row is: a side's seconds a step and peak memory, or the floor."""
    is_half = part in HALF and part not in PARTS
    device = choose_device("cpu", "bfloat16" if is_half else "float32")
    ours, peer = STAGES[stage](size, device)
    if part != "peer":
        keep_freed_memory()  # as the loop does
    if part.startswith("floor"):
        seconds, work = floor(ours)
        return {"seconds": seconds, "gflop": work}
    step = peer if part == "peer" else ours
    del ours, peer
    step()  # AdamW's state is made here,
    step()  # and by the second step memory has settled: its pages are there
    times = [_processor(step) for _ in range(steps)]
    return {"seconds": statistics.median(times), "peak_gib": peak_memory_gib()}


def print_row(name: str, steps: int, parts: list[dict[str, float]]) -> None:
    """Print one row of the table from its parts."""
    ours, peer, least = parts
    print_figure(
        name,
        ours["seconds"],
        "s of processor time",
        batch=BATCH,
        steps=steps,
        naive=round(peer["seconds"], 3),
        ratio=round(peer["seconds"] / ours["seconds"], 2),
        floor=round(least["seconds"], 3),
        gflop=round(least["gflop"]),
        above_floor=round(ours["seconds"] / least["seconds"], 2),
        peak_gib=round(ours["peak_gib"], 2),
        naive_peak_gib=round(peer["peak_gib"], 2),
        memory_ratio=round(ours["peak_gib"] / peer["peak_gib"], 2),
    )


@click.command()
@click.option("--steps", default=3, show_default=True, help="Measured steps of each side.")
@click.option("--small", is_flag=True, help="A size that only shows that it runs.")
@click.option("--into", type=click.Path(path_type=Path), help="Keep each part here as it is done.")
@click.option(
    "--only",
    "chosen",
    nargs=2,
    type=(click.Choice(list(STAGES)), click.Choice([*PARTS, *HALF])),
    help="With --into: measure this part alone.",
)
@click.option("--child", nargs=2, hidden=True)
def main(
    steps: int,
    small: bool,
    into: Path | None,
    chosen: tuple[str, str] | None,
    child: tuple[str, str] | None,
) -> None:
    """Print seconds, peak memory, ratio and floor of both stages; parts kept are not redone."""
    size = "small" if small else "published"
    if child:
        print(json.dumps(measure(*child, size, steps)))
        return
    folder = into or Path(tempfile.mkdtemp(prefix="clover-step-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"float32": PARTS} | ({"bfloat16": HALF} if multiplies_bfloat16_fast() else {})
    for stage in STAGES:
        for numbers, parts in rows.items():
            found = []
            for part in parts:
                kept = folder / f"{size}-{stage}-{part}-{steps}.json".replace(" ", "-")
                if not kept.exists() and chosen in (None, (stage, part)):
                    write_json(kept, _in_a_process(stage, part, steps, small))
                if kept.exists():
                    found.append(read_json(kept))
            if len(found) == len(parts):
                print_row(f"{stage}, {size} size, {numbers}", steps, found)


def _in_a_process(stage: str, part: str, steps: int, small: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.train_step", "--child", stage, part]
    command += ["--steps", str(steps), *["--small"] * small]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    main()
