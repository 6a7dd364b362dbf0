import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from clover.core.errors import CloverError
from clover.core.record import read_records
from clover.phantom.command import phantom
from clover.phantom.write import make_phantom


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_set_can_be_read_back_as_records(tmp_path: Path) -> None:
    make_phantom(tmp_path / "set", images=12, seed=0, split="train")
    captions = read_records(tmp_path / "set" / "captions.jsonl", needs="caption")
    questions = read_records(tmp_path / "set" / "vqa.jsonl", needs="question")
    assert len(captions.records) == 12 and not captions.rejected and not questions.rejected
    first = captions.records[0].row()
    assert first["mpp"] == 0.8 and first["licence"] == "CC0-1.0" and first["source"] == "phantom"
    assert set(first["truth"]) >= {"tissue", "stain", "cellularity", "infiltrate", "regions"}
    for record in captions.records + questions.records:
        assert record.image is not None and (tmp_path / "set" / record.image).exists()
        assert record.split == "train" and record.group == record.image[7:-4]
    with Image.open(tmp_path / "set" / "images" / "00000.png") as image:
        assert np.asarray(image).shape == (224, 224, 3)


def test_broken_off_work_continues_to_the_same_bytes(tmp_path: Path) -> None:
    make_phantom(tmp_path / "whole", images=6, seed=4)
    make_phantom(tmp_path / "broken", images=6, seed=4)
    whole = snapshot(tmp_path / "whole")
    (tmp_path / "broken" / "vqa.jsonl").unlink()
    (tmp_path / "broken" / "images" / "00004.png").unlink()
    make_phantom(tmp_path / "broken", images=6, seed=4)
    assert snapshot(tmp_path / "broken") == whole


def test_a_finished_set_is_left_alone(tmp_path: Path) -> None:
    make_phantom(tmp_path, images=3, seed=4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    make_phantom(tmp_path, images=3, seed=4)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_longer_set_begins_with_the_shorter_one(tmp_path: Path) -> None:
    make_phantom(tmp_path / "short", images=2, seed=1)
    make_phantom(tmp_path / "long", images=4, seed=1)
    for name in ("00000.png", "00001.png"):
        short, long = (tmp_path / which / "images" / name for which in ("short", "long"))
        assert short.read_bytes() == long.read_bytes()


def test_a_folder_with_another_set_is_refused_in_one_line(tmp_path: Path) -> None:
    make_phantom(tmp_path, images=2, seed=1)
    with pytest.raises(CloverError, match=r"seed 1.*not.*seed 2.*choose another folder"):
        make_phantom(tmp_path, images=2, seed=2)


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(CloverError, match="empty folder"):
        make_phantom(tmp_path, images=2, seed=1)


@pytest.mark.parametrize(
    ("images", "seed", "split"), [(0, 0, "train"), (2, -1, "train"), (2, 0, "a/b"), (2, 0, "")]
)
def test_numbers_out_of_range_are_refused(
    tmp_path: Path, images: int, seed: int, split: str
) -> None:
    with pytest.raises(CloverError):
        make_phantom(tmp_path / "x", images=images, seed=seed, split=split)
    assert not (tmp_path / "x").exists()


def test_the_verb_writes_a_set_and_a_sheet(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "set"), "--images", "2", "--seed", "3", "--split", "validation"]
    result = CliRunner().invoke(phantom, [*arguments, "--sheet", str(tmp_path / "sheet.png")])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "set" / "captions.jsonl").open()]
    assert [row["split"] for row in rows] == ["validation", "validation"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 900


def test_several_processes_paint_the_same_bytes_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_phantom(tmp_path / "one", images=9, seed=4)
    monkeypatch.setattr("clover.phantom.write._LEAST_A_WORKER", 3)
    monkeypatch.setattr("clover.phantom.write.num_processors", lambda: 3)
    make_phantom(tmp_path / "three", images=9, seed=4)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "three")


INTERRUPTED = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
import clover.phantom.write as write
from clover.cli import main
write.num_processors = lambda: 2
if __name__ == "__main__":
    main(["phantom", sys.argv[1], "--images", "128", "--seed", "4"])
"""


def test_ctrl_c_while_several_processes_start_is_one_line_and_nobody_stays(tmp_path: Path) -> None:
    script, out = tmp_path / "interrupted.py", tmp_path / "set"
    script.write_text(INTERRUPTED)
    # A terminal sends Ctrl-C to the whole group; who stays behind would hold stderr open.
    running = subprocess.Popen(
        [sys.executable, str(script), str(out)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (out / "phantom.json").exists():
        assert running.poll() is None, "it ended before it painted"
        time.sleep(0.01)
    time.sleep(0.5)  # the workers are importing
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate()
    assert running.returncode == 130
    assert len(said.strip().splitlines()) == 1 and "continues" in said, said
    assert not list(out.rglob(".*")), "something half-written was left"
    assert not (out / "captions.jsonl").exists()
