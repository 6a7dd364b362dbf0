"""Files are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clover.core.errors import CloverError, nearest
from clover.core.files import (
    atomic_path,
    fingerprint,
    growing,
    read_json,
    sha256_file,
    write_json,
    write_jsonl,
    write_text,
)


def test_a_failing_block_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]


def test_what_a_killed_writer_left_goes_with_the_next_write_and_what_a_living_one_writes_stays(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.txt"
    script = (
        "import sys, time\n"
        "from clover.core.files import atomic_path\n"
        f"with atomic_path({str(path)!r}) as partial:\n"
        "    partial.write_text('half')\n"
        "    print(partial, flush=True); time.sleep(600)\n"
    )
    writers: list[subprocess.Popen[str]] = []
    names: list[Path] = []
    try:
        for _ in range(2):  # one after the other: who comes first has the first name
            writers.append(
                subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
            )
            assert writers[-1].stdout is not None
            names.append(Path(writers[-1].stdout.readline().strip()))
        dead, alive = names
        writers[0].kill()
        writers[0].wait()
        assert (dead.name, alive.name) == (".a.txt.part", ".a.txt.1.part")
        dead.write_text("much longer than what comes")
        write_text(path, "new")
        assert not dead.exists() and alive.exists() and path.read_text() == "new"
        with atomic_path(path) as first, atomic_path(path) as second:  # and of one's own
            assert (first.name, second.name) == (".a.txt.part", ".a.txt.2.part")
            first.write_text("one")
            second.write_text("two")
        assert path.read_text() == "one" and [*tmp_path.glob(".a.*")] == [alive]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    words = r"No space left.*run the same command again"
    with pytest.raises(CloverError, match=words) as error, atomic_path(path) as partial:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(path) in str(error.value) and path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "free some space"),
        (OSError(errno.EROFS, "Read-only file system"), "give a path that may be written"),
        (PermissionError(errno.EACCES, "Permission denied"), "give a path that may be written"),
        (OSError(errno.EFBIG, "File too large"), "write to another"),
        (OSError(errno.EIO, "Input/output error"), "see to the disk"),
    ],
)
def test_each_refusal_of_the_disk_has_its_own_advice(
    error: OSError, words: str, tmp_path: Path
) -> None:
    with pytest.raises(CloverError, match=words) as found, atomic_path(tmp_path / "a.txt"):
        raise error
    assert error.strerror in str(found.value)
    assert ("free some space" in str(found.value)) == (words == "free some space")


def test_a_folder_in_the_files_place_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(CloverError, match="it is a folder; give the name of a file"):
        write_jsonl(tmp_path, (pytest.fail("worked") for _ in range(1)))
    assert list(tmp_path.iterdir()) == []


def test_a_file_read_on_the_way_is_named_when_it_is_at_fault(tmp_path: Path) -> None:
    def rows() -> Any:
        yield {"text": (tmp_path / "gone.txt").read_text()}

    with pytest.raises(CloverError, match=r"cannot write .*a\.jsonl: .*gone\.txt: No such file"):
        write_jsonl(tmp_path / "a.jsonl", rows())


def test_half_a_sign_is_written_as_its_escape_and_read_back(tmp_path: Path) -> None:
    row = {"image": os.fsdecode(b"Gr\xfcn.png"), "ä": "ä"}
    write_jsonl(tmp_path / "a.jsonl", [row])
    write_json(tmp_path / "a.json", row)
    assert json.loads((tmp_path / "a.jsonl").read_text()) == row == read_json(tmp_path / "a.json")


def test_a_file_that_grows_is_named_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    words = r"No space left.*run the same command again"
    with pytest.raises(CloverError, match=words) as error, growing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(path) in str(error.value)
    with pytest.raises(FileNotFoundError), growing(path):
        raise FileNotFoundError(errno.ENOENT, "No such file", "another")


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 63936 vs 63824",
        "PytorchStreamWriter failed writing file data/3: file write failed",
        "Error while serializing: I/O error: No space left on device (os error 28)",
    ],
)
def test_what_torch_and_safetensors_say_of_a_full_disk_is_understood(
    said: str, tmp_path: Path
) -> None:
    with pytest.raises(CloverError, match="No space left"), atomic_path(tmp_path / "a"):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="size mismatch"), atomic_path(tmp_path / "a"):
        raise RuntimeError("size mismatch")


def test_whoever_is_reading_the_old_file_reads_it_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old and whole")
    with path.open("rb", buffering=0) as reader:
        assert reader.read(3) == b"old"
        write_text(path, "new")
        assert reader.read() == b" and whole"
    assert path.read_text() == "new"


def test_rows_that_fail_half_way_leave_the_old_lines(tmp_path: Path) -> None:
    def rows() -> object:
        yield {"a": 1}
        raise KeyboardInterrupt

    path = tmp_path / "a.jsonl"
    assert write_jsonl(path, [{"ä": 1}, {"b": 2}]) == 2
    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, rows())  # type: ignore[arg-type]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"ä": 1}, {"b": 2}]


def test_folders_are_made_and_the_file_is_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "a.txt"
    write_text(path, "x")
    plain = tmp_path / "plain.txt"
    plain.write_text("x")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CloverError, match="cannot write"):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_nan_is_not_json_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}


def test_json_that_is_none_or_absent_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CloverError, match="no file"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CloverError, match="is not JSON"):
        read_json(tmp_path / "bad.json")


def test_hashes_are_of_content_and_order_of_keys_does_not_matter(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "a") == expected
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_the_nearest_word_or_all_words_are_named() -> None:
    assert nearest("stpes", ["steps", "seed"]) == "; did you mean 'steps'?"
    assert nearest("zzz", ["steps", "seed"]) == "; known: seed, steps"
    assert nearest("zzz", []) == ""


def test_another_users_half_written_file_does_not_stand_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, opened = tmp_path / ".x.json.part", os.open
    theirs.write_text("half")

    def guarded(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if Path(path) == theirs:  # root may open everything
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *more, **others)

    monkeypatch.setattr(os, "open", guarded)
    write_json(tmp_path / "x.json", {"a": 1})
    assert read_json(tmp_path / "x.json") == {"a": 1} and theirs.read_text() == "half"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.json.part", "x.json"]


def test_one_process_at_a_time_is_alone(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom clover.core.files import alone\n"
        "folder = Path(sys.argv[1])\n"
        "with alone(folder / 'lock'):\n"
        "    assert not (folder / 'busy').exists()\n"
        "    (folder / 'busy').touch(); time.sleep(0.2); (folder / 'busy').unlink()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    started = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
