"""kill -9 at random moments over `features`, `align` and `tune`: is the end the undisturbed one's?

    python -m benchmarks.kill [--kills 50] [--seed 0] [--folder DIR]

Each verb is first run undisturbed, for its time and its products. Then the same command is started
again and again in a fresh folder; each start is killed at a moment drawn uniformly over the
undisturbed time, until one ends by itself; what it left is compared byte for byte (the shards and
their indices, stage 1's weights, the model folder), and the next fresh folder begins. Half-written
files (`.*.part`) that are still there at the end count as left over.

Models and data are the tests' tiny ones. A start is a fork of this process, which has the imports
and nothing else: otherwise most moments would fall into importing torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from tests.tiny import Tiny, build_tiny, tiny_recipe, write_data

# Imported here for all children at once: the commands would each do it after the fork.
import clover.align.command
import clover.align.run
import clover.tune.command
import clover.tune.run
import clover.vision.command
import clover.vision.workers  # noqa: F401
from benchmarks.figure import print_figure
from clover.cli import cli

_STEPS = {"checkpoint_every": 3, "batch_size": 4, "warmup_steps": 2}
_IMAGES = 1500
"""Of the set that `features` encodes: twelve shards."""


@dataclass(frozen=True)
class Case:
    """A verb, what it is called with, and which files are its product."""

    verb: str
    arguments: tuple[str, ...]
    products: tuple[str, ...]
    """Patterns under the folder that stands for `{out}` in the arguments."""

    def command(self, out: Path) -> list[str]:
        """Return the command line that writes into `out`."""
        return [self.verb, *(item.replace("{out}", str(out)) for item in self.arguments)]

    def product(self, out: Path) -> dict[str, str]:
        """Return the SHA-256 of each file that counts, by its path."""
        found = sorted(path for pattern in self.products for path in out.glob(pattern))
        return {
            str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in found
        }


@dataclass
class Outcome:
    """What the kills of one verb did."""

    seconds: float
    """Of the undisturbed run."""
    kills: int = 0
    runs: int = 0
    differing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    fell_into: Counter[str] = field(default_factory=Counter)
    """What stood in the folder when a kill fell: nothing yet, features, a stage's checkpoints."""


def cases(tiny: Tiny) -> list[Case]:
    """Return the three verbs over one tiny model and its data."""
    settings = {
        "align": {**_STEPS, "steps": 75},
        "tune": {
            **_STEPS, "steps": 60, "grounding_steps": 60, "grounding_batch_size": 4,
            "anchoring_steps": 30, "grounding_filler": " this",
        },
        "data": {"images": str(tiny.folder / "data")},
    }  # fmt: skip
    recipe = tiny.folder / "tiny.yaml"
    recipe.write_text(tiny_recipe(tiny.folder, **settings).to_yaml(), encoding="utf-8")
    many, _ = write_data(tiny.folder / "many", images=_IMAGES)
    common = ("--recipe", str(recipe), "--features", "{out}/cache")
    return [
        Case(
            "features",
            (str(many), "--encoder", str(recipe), "--out", "{out}/cache"),
            ("cache/*/shard-*",),
        ),
        Case(
            "align",
            ("--data", str(tiny.captions), "--out", "{out}", *common),
            ("align.safetensors", "align.json", "cache/*/shard-*"),
        ),
        Case(
            "tune",
            ("--data", str(tiny.instructions), "--out", "{out}/model", "--run", "{out}", *common),
            ("model/*", "cache/*/shard-*"),
        ),
    ]


def start(case: Case, out: Path) -> int:
    """Run a case's command in a child; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        cli.main(args=case.command(out), standalone_mode=False)
        code = 0
    except BaseException:  # the parent learns of it by the exit code; the person by this
        traceback.print_exc()
    finally:
        os._exit(code)


def _ended(child: int, timeout_s: float) -> bool:
    """Return whether a child ended by itself within this time.

    Raises:
        RuntimeError: it ended with an error.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"the command ended with {os.waitstatus_to_exitcode(status)}")
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.001)


@contextlib.contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    out = Path(tempfile.mkdtemp(dir=folder))
    try:
        yield out
    finally:
        shutil.rmtree(out)


def _stage(out: Path) -> str:
    """Return the last thing that had begun in a folder."""
    for stage in ("tune", "anchor", "ground", "align"):
        if list(out.glob(f"checkpoints/{stage}/*")):
            return stage
    return "features" if list(out.glob("cache/*/shard-*")) else "start"


def disturb(case: Case, folder: Path, *, kills: int, seed: int) -> Outcome:
    """Kill a case so many times; compare every run's end with the undisturbed one's."""
    moments = random.Random(f"{seed} {case.verb}")
    with _fresh(folder) as out:
        begun = time.monotonic()
        _ended(start(case, out), float("inf"))
        outcome = Outcome(time.monotonic() - begun)
        whole = case.product(out)
    assert whole, f"{case.verb} made none of {case.products}"
    while outcome.kills < kills:
        with _fresh(folder) as out:
            outcome.runs += 1
            while outcome.kills < kills:
                child = start(case, out)
                if _ended(child, moments.uniform(0, outcome.seconds)):
                    break
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                outcome.kills += 1
                outcome.fell_into[_stage(out)] += 1
            else:
                _ended(start(case, out), float("inf"))
            found = case.product(out)
            outcome.differing += sorted(
                name for name in {*whole, *found} if whole.get(name) != found.get(name)
            )
            outcome.left_over += [path.name for path in out.rglob("*.part")]
    return outcome


def measure(folder: Path, *, kills: int, seed: int) -> list[Outcome]:
    """Share the kills among the verbs, and print the figure."""
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    todo = cases(build_tiny(folder / "tiny"))
    shares = [len(range(place, kills, len(todo))) for place in range(len(todo))]
    found = [
        disturb(case, folder, kills=share, seed=seed)
        for case, share in zip(todo, shares, strict=True)
    ]
    by_verb = {
        case.verb: {
            "kills": one.kills,
            "runs": one.runs,
            "undisturbed_s": round(one.seconds, 2),
            "differing": one.differing[:5],
            "left_over": one.left_over[:5],
            "fell_into": dict(one.fell_into),
        }
        for case, one in zip(todo, found, strict=True)
    }
    wrong = sum(len(one.differing) for one in found)
    print_figure(
        "kill -9", sum(one.kills for one in found), "kills",
        differing_files=wrong, left_over=sum(len(one.left_over) for one in found),
        peer="the undisturbed run, byte for byte", seed=seed, **by_verb,
    )  # fmt: skip
    return found


@click.command()
@click.option("--kills", default=50, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Scratch; a temporary one.")
def main(kills: int, seed: int, folder: Path | None) -> None:
    """Print the figure; exit with 1 where an end differed."""
    scratch = Path(tempfile.mkdtemp(prefix="clover-kill-", dir=folder))
    try:
        found = measure(scratch, kills=kills, seed=seed)
    finally:
        shutil.rmtree(scratch)
    if any(one.differing for one in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
