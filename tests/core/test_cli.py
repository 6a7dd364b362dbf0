"""The command line: quick, and one line for a mistake."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from clover.cli import VERBS, main
from clover.demo import table
from tiny import Tiny


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\nfrom clover.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print('IMPORTED', *sorted(sys.modules), file=sys.stderr)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_help_names_every_verb_and_imports_nothing_heavy() -> None:
    done = run("--help")
    assert done.returncode == 0 and all(verb in done.stdout for verb in VERBS)
    assert "not for diagnosis" in " ".join(done.stdout.split())
    imported = set(done.stderr.split())
    heavy = {"torch", "transformers", "timm", "scipy", "numpy", "PIL", "pydantic", "rich"}
    assert "clover.cli" in imported and not imported & heavy


@pytest.mark.parametrize("verb", ["ask", "chat", "fetch", "doctor"])
def test_the_help_of_a_verb_has_an_example_and_does_not_import_torch(verb: str) -> None:
    done = run(verb, "--help")
    assert done.returncode == 0 and f"Example: clover {verb}" in done.stdout
    assert not set(done.stderr.split()) & {"torch", "transformers", "timm", "scipy"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["aks"], "no verb 'aks'; did you mean 'ask'?"),
        (["ask"], "Missing argument"),
        (["ask", "--nonsense"], "No such option"),
        (["ask", "m", "i", "q", "--beams", "0"], "0 is not in the range"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert words in captured.err and captured.err.count("\n") == 1
    assert captured.err.startswith("clover: ")


def test_a_path_that_cannot_be_used_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(tmp_path / "file" / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "file/out: Not a directory; give another path" in said


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert not stop.value.code and "clover" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_output_to_a_narrow_encoding_goes_on_with_question_marks(encoding: str) -> None:
    code = (
        "import click, clover.cli as cli\n"
        "@click.command()\n"
        "def say():\n    click.echo('a ≥ b → c')\n    click.echo('d ≥ e', err=True)\n"
        "cli.LazyGroup.get_command = lambda *_: say\n"
        "cli.main(['say'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"a ? b ? c") and done.stderr.startswith(b"d ? e")


def test_commands_to_be_typed_next_are_quoted(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*arguments: str | Path) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(item) for item in arguments])
        captured = capsys.readouterr()
        assert not stop.value.code, captured.err
        return captured.out

    monkeypatch.setenv("CLOVER_HOME", str(tmp_path / "a home"))
    recipe, aligned, model = tmp_path / "my own.yaml", tmp_path / "r un", tmp_path / "m odel"
    recipe.write_text(tiny.recipe.to_yaml())
    short = ("--recipe", recipe, "--features", tiny.folder / "cache")
    steps = [f"--set={stage}.steps=1" for stage in ("align", "tune")]
    steps += [f"--set={stage}.warmup_steps=0" for stage in ("align", "tune")]
    out = said("align", *short, *steps, "--data", tiny.captions, "--out", aligned)
    command = ["clover", "tune", "--recipe", str(recipe), "--from", str(aligned)]
    assert shlex.split(out.partition("next: ")[2]) == command
    out = said("tune", *short, *steps, "--data", tiny.instructions, "--out", model)
    assert shlex.split(out.partition("next: ")[2])[:3] == ["clover", "ask", str(model)]
    out = said("fetch", recipe)
    command = [f"CLOVER_HOME={tmp_path / 'a home'}", "CLOVER_OFFLINE=1", "clover", "align"]
    assert shlex.split(out.partition("Offline: ")[2]) == [*command, "--recipe", str(recipe)]
    monkeypatch.setattr(table, "evaluation_lines", lambda _: [])
    demo = tmp_path / "a demo"
    *_, line = table.demo_table({"seconds": 1, "dollars": 0}, demo)
    image = demo / "phantom-validation" / "images" / "00000.png"
    assert shlex.split(line) == ["clover", "chat", str(demo / "model"), str(image)]
