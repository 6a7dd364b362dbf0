"""EVA-CLIP ViT-g/14 at full size, random weights, against transformers' `Blip2VisionModel`.

    python -m benchmarks.eva --batch 2 --runs 3

Both hold the same float32 weights (4 GB each, 8 GB in all); afterwards ours in bfloat16 (a copy, 2
GB; where the processor multiplies that fast) and in eight bits (`encoder.numbers`). Prints the
largest absolute difference of the tokens after the same last norm, the norm of the difference to
the tokens' norm, and the seconds an image of both, called in turn in one process: processor seconds
where one thread runs, so that a shared core does not count.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.figure import alternating, print_figure
from clover.core.config import EncoderConfig
from clover.core.tensors import open_tensors
from clover.training.device import multiplies_bfloat16_fast
from clover.vision.quantise import quantise
from clover.vision.token_encoder import build_family, load


def main() -> None:
    """Build both, compare, time."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--depth", type=int, default=39, help="Blocks; less for a trial.")
    options = parser.parse_args()
    torch.manual_seed(0)
    # Its own initial range, 1e-10, would make every token the same.
    shape = Blip2VisionConfig(
        num_hidden_layers=options.depth, layer_norm_eps=1e-6, initializer_range=0.02
    )
    theirs = Blip2VisionModel(shape).eval()
    _, family = build_family(EncoderConfig(kind="eva_clip", model="vit_g_14"))
    network = family.network
    if options.depth != 39:
        network.blocks = network.get_submodule("blocks")[: options.depth]  # type: ignore[index]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(theirs.state_dict(), path)
        assert family.collect is not None
        load(family, family.collect(open_tensors(path)), "transformers")
    network = network.eval()
    pixels = torch.randn(options.batch, 3, 224, 224)
    count = sum(item.numel() for item in theirs.parameters())
    details = {"parameters": count, "batch": options.batch, "blocks": options.depth}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.inference_mode():
        expected = theirs(pixels).last_hidden_state
        spread = float(expected.std())
        formats = ("float32", *["bfloat16"] * multiplies_bfloat16_fast(), "int8")
        for numbers in formats:
            # int8 in place: a second copy of 4 GB is not needed, float32 has been measured by then.
            if numbers == "int8":
                quantise(network, torch.device("cpu"))
            chosen = copy.deepcopy(network).bfloat16() if numbers == "bfloat16" else network
            shown = pixels.bfloat16() if numbers == "bfloat16" else pixels
            details["numbers"] = numbers
            found = theirs.post_layernorm(chosen(shown).float())
            apart = found - expected
            print_figure("eva_difference", float(apart.abs().max()), "", spread=spread, **details)
            relative = float(apart.norm() / expected.norm())
            print_figure("eva_relative_difference", relative, "", **details)
            ours_s, theirs_s = alternating(
                [partial(chosen, shown), partial(theirs, pixels)], runs=options.runs, clock=clock
            )
            print_figure("eva_seconds_an_image", ours_s / options.batch, "s", **details)
            peer = "transformers Blip2VisionModel, float32"
            print_figure("eva_speed", theirs_s / ours_s, "x", peer=peer, **details)


if __name__ == "__main__":
    main()
