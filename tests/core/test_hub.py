"""`clover fetch` against a hub on a local port: locked, carried offline, never half a file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from clover.core.hub import manifest_digest
from fake_hub import FakeHub
from tiny import Tiny, tiny_recipe

LANGUAGE, WORDS = "lab/tiny-llama", "lab/tiny-bert"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    found = FakeHub()
    yield found
    found.close()


@pytest.fixture
def language(tiny: Tiny) -> dict[str, bytes]:
    folder = tiny.folder / "llama"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def recipe(tiny: Tiny, hub: FakeHub, language: dict[str, bytes], tmp_path: Path) -> Path:
    """Return a recipe whose language model and tokenizer are on the hub, by branch."""
    pickle = {"pytorch_model.bin": b"\x80\x04.", "onnx/model.onnx": b"o", "README.md": b"# tiny"}
    hub.push(LANGUAGE, language | pickle)
    hub.push(WORDS, {"tokenizer.json": (tiny.folder / "tokenizer.json").read_bytes()})
    made = tiny_recipe(
        tiny.folder,
        language={"weights": f"hf://{LANGUAGE}@main"},
        qformer={"tokenizer": f"hf://{WORDS}@main/tokenizer.json"},
        tune={"steps": 2, "warmup_steps": 1},
    )
    path = tmp_path / "own.yaml"
    path.write_text(made.to_yaml())
    return path


def clover(hub: FakeHub, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user with this hub would."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "CLOVER_OFFLINE": "0",
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-m", "clover.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def fetch(hub: FakeHub, recipe: Path, home: Path, **variables: str) -> str:
    done = clover(hub, "fetch", recipe, "--to", home, HF_HOME=str(home / "hf-home"), **variables)
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, (done.stdout[-500:], done.stderr[-1500:])
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def lying(home: Path) -> list[str]:
    """Return the model files at the places where models are looked for."""
    found = (path for path in (home / "hf").rglob("*") if path.is_file())
    names = (str(path.relative_to(home / "hf")) for path in found)
    return sorted(name for name in names if ".part/" not in name)


def test_fetched_locked_cut_off_from_the_network_trained_and_asked(
    hub: FakeHub, recipe: Path, tiny: Tiny, tmp_path: Path, language: dict[str, bytes]
) -> None:
    home, commit = tmp_path / "home", hub.branches[LANGUAGE]["main"]
    out = fetch(hub, recipe, home)
    lock = json.loads((tmp_path / "own.lock.json").read_text())
    assert f"Locked: {tmp_path / 'own.lock.json'}" in out
    entry = lock["fields"]["language.weights"]
    # Neither the pickle nor the same weights for other programs.
    assert set(entry["files"]) == {*language, "README.md"}
    digest = manifest_digest(entry["files"])
    assert entry["pinned"] == f"hf://{LANGUAGE}@{commit}?sha256={digest}"
    copied = home / "hf" / LANGUAGE.replace("/", "--") / commit
    sums = subprocess.run(
        ["sha256sum", *sorted(entry["files"])],
        cwd=copied,
        capture_output=True,
        text=True,
        check=True,
    )
    whole = subprocess.run(
        ["sha256sum"], input=sums.stdout, capture_output=True, text=True, check=True
    )
    assert whole.stdout.split()[0] == digest

    hub.close()
    carried = tmp_path / "carried"
    shutil.move(home, carried)
    offline = {"CLOVER_HOME": str(carried), "CLOVER_OFFLINE": "1"}
    model = tmp_path / "model"
    done = clover(
        hub, "tune", "--recipe", recipe, "--data", tiny.instructions, "--out", model, **offline
    )
    assert done.returncode == 0, done.stderr[-1500:]
    said = json.loads((model / "config.json").read_text())["recipe"]
    assert said["language"]["weights"] == entry["pinned"]
    asked = clover(hub, "ask", model, tiny.image(), "which tissue is shown ?", **offline)
    assert asked.returncode == 0, asked.stderr[-1500:]


def test_a_lock_keeps_the_commit_when_the_branch_moves_on(
    hub: FakeHub, recipe: Path, tmp_path: Path, language: dict[str, bytes]
) -> None:
    first = hub.branches[LANGUAGE]["main"]
    fetch(hub, recipe, tmp_path / "home")
    second = hub.push(LANGUAGE, language | {"README.md": b"# newer"})
    fetch(hub, recipe, tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere" / "hf" / LANGUAGE.replace("/", "--")
    assert (folder / first).is_dir() and not (folder / second).exists()
    # Without the lock, the newer one.
    (tmp_path / "own.lock.json").unlink()
    fetch(hub, recipe, tmp_path / "third")
    assert (tmp_path / "third" / "hf" / LANGUAGE.replace("/", "--") / second).is_dir()
    # A branch stays in a cache what it was there at first, also for a file asked for later.
    before = len(hub.asked)
    (tmp_path / "own.lock.json").unlink()
    fetch(hub, recipe, tmp_path / "home")
    assert len(hub.asked) == before
    assert first in (tmp_path / "own.lock.json").read_text()


def test_a_download_that_breaks_off_is_not_a_model_and_goes_on_where_it_stopped(
    hub: FakeHub, recipe: Path, tmp_path: Path, language: dict[str, bytes]
) -> None:
    home = tmp_path / "home"
    assert len(language["model.safetensors"]) > 9 * 3000
    hub.cut_after = 3000
    done = clover(hub, "fetch", recipe, "--to", home, HF_HOME=str(home / "hf-home"))
    message = refused(done)
    assert "language.weights: cannot fetch" in message and "goes on where it stopped" in message
    assert not [name for name in lying(home) if LANGUAGE.replace("/", "--") in name]
    assert not (tmp_path / "own.lock.json").exists()
    offline = clover(hub, "fetch", recipe, "--to", home, CLOVER_OFFLINE="1")
    assert "is missing; put all files of lab/tiny-llama main there" in refused(offline)
    hub.cut_after, hub.ranges = None, []
    fetch(hub, recipe, home)
    assert any(item.startswith("model.safetensors from") for item in hub.ranges)
    commit = hub.branches[LANGUAGE]["main"]
    folder = home / "hf" / LANGUAGE.replace("/", "--")
    assert (folder / commit / "model.safetensors").read_bytes() == language["model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [commit, f"{commit}.json", "main.ref"]
    )


def test_a_changed_file_is_refused_wherever_it_was_changed(
    hub: FakeHub, recipe: Path, tiny: Tiny, tmp_path: Path, language: dict[str, bytes]
) -> None:
    home, commit = tmp_path / "home", hub.branches[LANGUAGE]["main"]
    fetch(hub, recipe, home)
    weights = home / "hf" / LANGUAGE.replace("/", "--") / commit / "model.safetensors"
    other = weights.read_bytes()[:-1] + b"\x07"
    weights.write_bytes(other)
    offline = {"CLOVER_HOME": str(home), "CLOVER_OFFLINE": "1"}
    tune = ("tune", "--recipe", recipe, "--data", tiny.instructions, "--out", tmp_path / "m")
    assert f"{weights} was changed since it was fetched" in refused(clover(hub, *tune, **offline))
    assert f"{weights} was changed" in refused(clover(hub, "fetch", recipe, "--to", home))

    # A middleman: the listing is right, the bytes are not.
    hub.swapped["model.safetensors"] = other
    again = ("fetch", recipe, "--to", tmp_path / "second")
    assert "did not arrive as the hub has it" in refused(clover(hub, *again))
    # A hub that has other files at the commit it had: listing and bytes agree with each other.
    hub.swapped.clear()
    hub.files[LANGUAGE, commit]["model.safetensors"] = other
    message = refused(clover(hub, *again))
    assert f"hf://{LANGUAGE}@{commit} holds other files than the SHA-256" in message
    assert not [name for name in lying(tmp_path / "second") if name.endswith(".safetensors")]
    hub.files[LANGUAGE, commit]["model.safetensors"] = language["model.safetensors"]
    fetch(hub, recipe, tmp_path / "second")


def test_a_folder_of_single_files_is_no_snapshot(
    hub: FakeHub, recipe: Path, tmp_path: Path, language: dict[str, bytes]
) -> None:
    home, commit = tmp_path / "home", hub.branches[LANGUAGE]["main"]
    one = tmp_path / "one.yaml"
    tree = yaml.safe_load(recipe.read_text())
    tree["qformer"]["tokenizer"] = f"hf://{LANGUAGE}@main/tokenizer.json"
    part = {**tree, "language": {}}
    one.write_text(yaml.safe_dump(part))
    fetch(hub, one, home)
    folder = home / "hf" / LANGUAGE.replace("/", "--") / commit
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]
    # As its whole is named too, beside that file or after it.
    recipe.write_text(yaml.safe_dump(tree))
    message = refused(clover(hub, "fetch", recipe, "--to", home, CLOVER_OFFLINE="1"))
    assert f"{folder} holds single files of {LANGUAGE} alone" in message
    for place in (home, tmp_path / "other"):
        (tmp_path / "own.lock.json").unlink(missing_ok=True)
        fetch(hub, recipe, place)
        lying = place / "hf" / LANGUAGE.replace("/", "--") / commit
        assert {path.name for path in lying.iterdir()} == {*language, "README.md"}
        lock = json.loads((tmp_path / "own.lock.json").read_text())
        assert set(lock["fields"]["language.weights"]["files"]) == {*language, "README.md"}
    before = len(hub.asked)
    fetch(hub, recipe, home)
    assert len(hub.asked) == before


def test_offline_a_file_that_is_missing_of_many_is_named(
    hub: FakeHub, recipe: Path, tmp_path: Path
) -> None:
    home, commit = tmp_path / "home", hub.branches[LANGUAGE]["main"]
    fetch(hub, recipe, home)
    gone = home / "hf" / LANGUAGE.replace("/", "--") / commit / "tokenizer.json"
    content = gone.read_bytes()
    gone.unlink()
    message = refused(clover(hub, "fetch", recipe, "--to", home, CLOVER_OFFLINE="1"))
    assert f"{gone} is missing; put tokenizer.json of {LANGUAGE} {commit}" in message
    assert "(1 of 5 files are missing)" in message or " of " in message
    gone.write_bytes(content)
    fetch(hub, recipe, home, CLOVER_OFFLINE="1")


def test_files_put_by_hand_are_taken_and_locked(
    hub: FakeHub, recipe: Path, tiny: Tiny, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(tiny.folder / "llama", home / "hf" / LANGUAGE.replace("/", "--") / "main")
    words = home / "hf" / WORDS.replace("/", "--") / "main" / "tokenizer.json"
    words.parent.mkdir(parents=True)
    shutil.copyfile(tiny.folder / "tokenizer.json", words)
    fetch(hub, recipe, home, CLOVER_OFFLINE="1")
    assert hub.asked == []
    words.write_bytes(words.read_bytes() + b" ")
    message = refused(clover(hub, "fetch", recipe, "--to", home, CLOVER_OFFLINE="1"))
    assert f"{words} is another file than the SHA-256" in message


def test_what_a_hub_will_not_give_is_one_line_with_the_remedy(
    hub: FakeHub, recipe: Path, tmp_path: Path, language: dict[str, bytes]
) -> None:
    def failing(weights: str) -> str:
        tree = yaml.safe_load(recipe.read_text())
        tree["language"]["weights"] = weights
        path = tmp_path / "other.yaml"
        path.write_text(yaml.safe_dump(tree))
        return refused(clover(hub, "fetch", path, "--to", tmp_path / "home"))

    assert "the hub has no lab/nothing, or it is private" in failing("hf://lab/nothing")
    assert "lab/tiny-llama has no revision v9" in failing(f"hf://{LANGUAGE}@v9")
    near = failing(f"hf://{LANGUAGE}@main/model.safetensor")
    assert "has no file model.safetensor; did you mean 'model.safetensors'?" in near
    hub.push("lab/pickles", {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."})
    assert "has no safetensors, and pickles are not read" in failing("hf://lab/pickles")
    hub.push("lab/closed", language)
    hub.gated.add("lab/closed")
    assert f"is gated: ask for access at {hub.url}/lab/closed" in failing("hf://lab/closed")


def test_a_damaged_lock_is_one_line(hub: FakeHub, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "own.lock.json").write_text('{"fields": {"language.weights": {}}}')
    message = refused(clover(hub, "fetch", recipe, "--to", tmp_path / "home"))
    assert "own.lock.json is not a lock" in message
