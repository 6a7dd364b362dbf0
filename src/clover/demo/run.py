"""Run every stage in order on the phantom, each through the files a user would give it.

OUT/
  phantom/ phantom-validation/   images, captions.jsonl, vqa.jsonl
  instructions/                  template, generated, truth and their hybrid
  features/                      what the frozen encoder saw
  align.safetensors model/       stage 1, stage 2
  evaluation/ scores.json report.html
  recipe.yaml metrics.jsonl costs.json

Every step looks for its own finished output first: stopped anywhere, the same call continues.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clover.align.run import align
from clover.core.config import Recipe
from clover.core.files import fingerprint, read_json, sha256_file, write_json
from clover.core.record import read_records, write_records, write_rejected
from clover.core.run import RunFolder
from clover.core.threads import in_passing_thread
from clover.demo.table import demo_table
from clover.evaluate.run import BASIC, evaluate_folder
from clover.phantom.write import make_phantom
from clover.report.page import write_report
from clover.training import processes
from clover.tune.run import tune

Say = Callable[[str], None]


@dataclass(frozen=True)
class Demo:
    """A demo's recipe, its folder, and where it speaks."""

    recipe: Recipe
    out: Path
    say: Say

    @property
    def train(self) -> Path:
        """The training phantom."""
        return self.out / "phantom"

    @property
    def validation(self) -> Path:
        """Fresh images that no stage learns from."""
        return self.out / "phantom-validation"

    @property
    def instructions(self) -> Path:
        """Where instruction files lie."""
        return self.out / "instructions"

    @property
    def cache(self) -> Path:
        """The feature cache."""
        return self.out / "features"


@processes.alone_in("out")
def run_demo(recipe: Recipe, out: Path, *, say: Say) -> dict[str, Any]:
    """Run or continue the whole recipe in `out`; return what `scores.json` holds."""
    assert recipe.phantom is not None, "the demo's recipe has a phantom section"
    demo = Demo(recipe, out, say)
    run = RunFolder(out)
    run.save_recipe(recipe)
    _phantom(demo, run)
    hybrid = make_instructions(demo, run)
    recipe = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"images": demo.train})}
    )
    say(f"stage 1: contrast, match, caption ({recipe.align.steps} steps)")
    aligned = align(recipe, captions=demo.train / "captions.jsonl", out=out, cache=demo.cache)
    spelling = recipe.tune.grounding_steps + recipe.tune.anchoring_steps
    say(
        f"stage 2: spell answers ({spelling} steps), then through the frozen language model "
        f"({recipe.tune.steps} steps)"
    )
    tuned = tune(
        recipe,
        instructions=hybrid,
        out=out / "model",
        run=out,
        cache=demo.cache,
        start=aligned.weights,
    )
    scores = _evaluate(demo, run, tuned.model)
    with run.timed("report"):
        write_report(out)
    for line in demo_table(scores, out):
        say(line)
    return scores


def _phantom(demo: Demo, run: RunFolder) -> None:
    config = demo.recipe.phantom
    assert config is not None
    demo.say(f"phantom: {config.images} training images, {config.validation_images} fresh ones")
    with run.timed("phantom"):
        make_phantom(demo.train, images=config.images, seed=config.seed, split="train")
        make_phantom(
            demo.validation,
            images=config.validation_images,
            seed=config.seed,
            split="validation",
        )


def make_instructions(demo: Demo, run: RunFolder) -> Path:
    """Write template-based, generated and true instructions and their hybrid; return the hybrid."""
    from clover.instruct.join import join_questions
    from clover.instruct.mix import mix_records
    from clover.instruct.template import write_template_instructions

    folder = demo.instructions
    captions = demo.train / "captions.jsonl"
    key = fingerprint(
        [demo.recipe.fingerprint("instruct", "language", "seed"), sha256_file(captions)]
    )
    done, hybrid = folder / "done.json", folder / "hybrid.jsonl"
    if done.exists() and read_json(done).get("key") == key:
        return hybrid
    demo.say("instructions: templates for every caption, a language model for a sample")
    records = read_records(captions, needs="caption").records
    with run.timed("instruct template"):
        template = write_template_instructions(records, seed=demo.recipe.seed)
        write_records(folder / "template.jsonl", template)
    generated = _generate(demo, run)
    truth = read_records(demo.train / "vqa.jsonl", needs="question").records
    truth = join_questions(truth, share=demo.recipe.instruct.joined_share, seed=demo.recipe.seed)
    write_records(folder / "truth.jsonl", truth)
    with run.timed("instruct mix"):
        share = demo.recipe.instruct.template_share
        rest = (1 - share) * len(truth) / max(1, len(truth) + len(generated))
        sources = {"template": template, "generated": generated, "truth": truth}
        shares = {"template": share, "generated": 1 - share - rest, "truth": rest}
        mixed = mix_records(
            {name: found for name, found in sources.items() if found},
            shares={name: value for name, value in shares.items() if sources[name]},
            seed=demo.recipe.seed,
        )
        write_records(hybrid, mixed)
    demo.say(
        f"  {len(template):,} template-based, {len(generated):,} generated, {len(truth):,} from "
        f"the phantom's truth -> {len(mixed):,} in the hybrid set"
    )
    write_json(done, {"key": key})
    return hybrid


def _generate(demo: Demo, run: RunFolder) -> list[Any]:
    """Let the language model itself write instructions, over the OpenAI-compatible path."""
    wanted = demo.recipe.instruct.generated
    if wanted == 0:
        return []
    from clover.instruct.caption import Captions
    from clover.instruct.filter import filter_records
    from clover.instruct.generate import GenerateSettings, generate_from
    from clover.model import load_frozen_language
    from clover.serve.local_endpoint import serve_language_model
    from clover.training.device import choose_device

    folder, captions = demo.instructions, demo.train / "captions.jsonl"
    device = choose_device(demo.recipe.device, demo.recipe.precision)
    with run.timed("instruct generate") as bill:
        model = in_passing_thread(
            load_frozen_language, demo.recipe.language, demo.recipe.prompt, device
        )
        with serve_language_model(model, "local") as endpoint:  # type: ignore[arg-type]
            summary = generate_from(
                # Images keep their names, which start from data.images as in all files here.
                Captions(captions, limit=wanted),
                out=folder / "generated.raw.jsonl",
                settings=GenerateSettings(
                    endpoint=endpoint,
                    model="local",
                    prompt="plain-v1",
                    concurrency=16,
                ),
            )
        bill["dollars"] = summary.usd
    by_image = {
        str(r.image): str(r.caption) for r in read_records(captions, needs="caption").records
    }
    raw_path = folder / "generated.raw.jsonl"
    if summary.pairs == 0:
        demo.say(f"  generation: {summary.done} of {wanted} captions answered, no pair among them")
        return []
    raw = read_records(raw_path, needs="question")
    kept, rejected = filter_records(raw.records, captions=by_image)
    write_records(folder / "generated.jsonl", kept)
    write_rejected(folder / "generated.rejected.jsonl", [*raw.rejected, *rejected])
    demo.say(
        f"  generation: {summary.done} captions gave {summary.pairs} pairs, "
        f"{len(kept)} survive the filter ({summary.seconds:.0f} s, ${summary.usd:.2f})"
    )
    return kept


def _evaluate(demo: Demo, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Ask the model about fresh images, with controls; write `scores.json`."""
    path = demo.out / "scores.json"
    key = read_json(folder / "config.json")["key"]
    if path.exists() and read_json(path)["details"].get("model_key") == key:
        found: dict[str, Any] = read_json(path)
        return found
    demo.say("evaluation: fresh images, and three controls")
    with run.timed("evaluate"):
        scores = evaluate_folder(
            folder,
            data=demo.validation / "vqa.jsonl",
            out=demo.out / "evaluation",
            cache=demo.cache,
            train=demo.train / "vqa.jsonl",
            controls=BASIC,
            control_items=demo.recipe.evaluate.control_items,
        )
    assert scores is not None, "scores were asked for"
    total = {
        name: round(sum(item[name] for item in run.costs()), 4) for name in ("seconds", "dollars")
    }
    scores.update(total)
    write_json(path, scores)
    return scores
