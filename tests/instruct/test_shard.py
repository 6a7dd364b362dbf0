"""Several processes, here or under Ray: the files of one, and not a request more."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from clover.core.errors import CloverError
from clover.core.record import read_records
from clover.instruct.generate import GenerateSettings, generate_file
from clover.instruct.ledger import Ledger, Worst, ledger_path
from clover.instruct.merge import merge_shard, shards_folder, unmerged_shards
from clover.instruct.shard import (
    Runner,
    Shard,
    ShardResult,
    generate_in_shards,
    generate_shard,
)
from clover.instruct.workers import run_locally, run_under_ray

from .endpoint import Endpoint, Running, url
from .test_command import run
from .test_faults import forbidding
from .test_generate import PRICE, captions, settings

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'"
)


def run_here(shards: list[Shard], workers: int) -> Iterator[tuple[Shard, ShardResult]]:
    """Run one shard after the other in this process."""
    for shard in shards:
        yield shard, generate_shard(shard)


def with_repeats(path: Path, count: int) -> Path:
    """Write captions of which every third stands twice, and one is not fit."""
    captions(path, count)
    lines = path.read_text().splitlines()
    more = [json.dumps({**json.loads(line), "image": "again.png"}) for line in lines[::3]]
    path.write_text("\n".join([*lines, '{"image": "x", "caption": ""}', *more]) + "\n")
    return path


@pytest.mark.parametrize("runner", [run_here, run_locally])
def test_two_workers_leave_the_same_files_as_one_process(tmp_path: Path, runner: Runner) -> None:
    source = with_repeats(tmp_path / "c.jsonl", 60)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    with Running(Endpoint()) as endpoint:
        chosen = settings(endpoint, timeout_s=60.0)
        whole = generate_file(source, out=one, settings=chosen)
        before = endpoint.count()
        parts = generate_in_shards(source, out=two, settings=chosen, workers=2, runner=runner)
        after = endpoint.count()
        assert (whole.done, whole.set_aside, before["requests"]) == (80, 1, 60)
        # Not a request more: what stands twice was asked once, in whichever shard.
        assert set(after["asked"].values()) == {2}
        again = generate_in_shards(source, out=two, settings=chosen, workers=2, runner=runner)
        single = generate_file(source, out=two, settings=chosen)
        assert (again.sent, single.sent) == (0, 0)
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_size > 0
    for name in ("rejected", "failed"):
        first, second = (Path(f"{out}.{name}.jsonl") for out in (one, two))
        assert first.exists() == second.exists()
        assert not first.exists() or first.read_bytes() == second.read_bytes()
    assert not shards_folder(two).exists()
    ignored = {"seconds"}
    first_row, second_row = (
        {k: v for k, v in dataclasses.asdict(summary).items() if k not in ignored}
        for summary in (whole, parts)
    )
    assert first_row == second_row
    with Ledger(ledger_path(one)) as a, Ledger(ledger_path(two)) as b:
        assert a.totals() == b.totals()
        assert b.totals().input_tokens == after["input_tokens"] - before["input_tokens"]


@needs_ray
def test_two_workers_of_a_local_ray_leave_the_same_file_as_one_process(tmp_path: Path) -> None:
    source = with_repeats(tmp_path / "c.jsonl", 60)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    with Running(Endpoint()) as endpoint:
        chosen = settings(endpoint, timeout_s=60.0)
        whole = generate_file(source, out=one, settings=chosen)
        # In a process of its own, which can be ended: Ray in a place that it does not like waits
        # for ever. The time says nothing about the verdict.
        words = [*command(endpoint, source, two), "--workers", "2", "--ray"]
        done = subprocess.run(words, timeout=900, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert set(endpoint.asked.values()) == {2}
    assert one.read_bytes() == two.read_bytes()
    assert not shards_folder(two).exists()
    with Ledger(ledger_path(one)) as a, Ledger(ledger_path(two)) as b:
        assert a.totals() == b.totals()
        assert b.totals().done == whole.done - 20 == 60


def command(endpoint: Endpoint, source: Path, out: Path) -> list[str]:
    """Return the command that generates, as a user would type it."""
    words = [sys.executable, "-c", "from clover.cli import main; main()", "instruct", "generate"]
    words += [str(source), "--out", str(out), "--endpoint", url(endpoint)]
    return [*words, "--model", "small-model", "--price", "0.5,1.5", "--concurrency", "8"]


def test_shards_do_not_depend_on_the_run(tmp_path: Path) -> None:
    source = captions(tmp_path / "c.jsonl", 40)
    seen: list[list[set[str]]] = []

    def look(shards: list[Shard], workers: int) -> Iterator[tuple[Shard, ShardResult]]:
        files = [read_records(Path(shard.captions), needs="caption") for shard in shards]
        seen.append([{str(record.caption) for record in file.records} for file in files])
        yield from run_here(shards, workers)

    with Running(Endpoint()) as endpoint:
        for name in ("a", "b"):
            out = tmp_path / name
            generate_in_shards(source, out=out, settings=settings(endpoint), workers=3, runner=look)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3
    # All but the first caption, which is asked before there are shards; and none twice.
    assert sum(map(len, seen[0])) == len(set.union(*seen[0])) == 39


@pytest.mark.parametrize("hostile", [False, True])
def test_the_budget_holds_for_all_workers_together_and_is_used(
    tmp_path: Path, hostile: bool
) -> None:
    source, out = captions(tmp_path / "c.jsonl", 120), tmp_path / "o.jsonl"
    budget = 0.03
    with Running(Endpoint(hostile=hostile, hang_s=1.0)) as endpoint:
        chosen = settings(endpoint, budget_usd=budget, timeout_s=0.5)
        small = generate_in_shards(source, out=out, settings=chosen, workers=4, runner=run_here)
        assert 0 < small.done < 120
        assert small.stopped == "the budget of $0.03 is reached"
        assert small.usd + small.lost_usd <= budget
        assert PRICE.dollars(endpoint.input_tokens, endpoint.output_tokens) <= budget
        # What the shards left over was not left lying: less than one worst case remains.
        assert small.usd + small.lost_usd > budget - 0.004
        more = dataclasses.replace(chosen, budget_usd=10.0)
        rest = generate_in_shards(source, out=out, settings=more, workers=4, runner=run_here)
        assert (rest.done, rest.stopped) == (120, None)


def test_what_a_killed_run_left_is_merged_once_by_the_next_run_of_either_kind(
    tmp_path: Path,
) -> None:
    source = captions(tmp_path / "c.jsonl", 20)
    for name, go_on in (("a", generate_file), ("b", generate_in_shards)):
        out = tmp_path / name
        folder = shards_folder(out.resolve())
        folder.mkdir()
        shard_file = captions(folder / "0123-000", 12)
        with Running(Endpoint()) as endpoint:
            chosen = settings(endpoint)
            shard = Shard(shard_file, chosen, 12)
            generate_shard(shard)
            # And one more, on its way when the process was killed.
            with Ledger(ledger_path(shard.out)) as books:
                books.reserve(
                    "in-flight",
                    request=("m", "p", "e"),
                    worst=Worst(9, 9),
                    price=PRICE,
                    budget=None,
                )
            assert endpoint.requests == 12
            more = {} if go_on is generate_file else {"workers": 2, "runner": run_here}
            summary = go_on(source, out=out, settings=chosen, **more)  # type: ignore[operator]
            assert endpoint.requests == 20
        assert (summary.done, summary.sent) == (20, 8)
        with Ledger(ledger_path(out)) as ledger:
            totals = ledger.totals()
        assert (totals.done, totals.lost, totals.lost_input_tokens) == (20, 1, 9)
        assert totals.input_tokens == endpoint.input_tokens
        assert not folder.exists()


def test_a_shard_merged_twice_is_booked_once(tmp_path: Path) -> None:
    with Running(Endpoint()) as endpoint:
        shard = Shard(captions(tmp_path / "s", 5), settings(endpoint), 5)
        generate_shard(shard)
    with Ledger(tmp_path / "whole.sqlite") as whole:
        assert merge_shard(whole, shard.out) == 5
        once, committed = whole.totals(), whole.committed_usd
        assert merge_shard(whole, shard.out) == 0
        assert (whole.totals(), whole.committed_usd) == (once, committed)
        assert once.usd == pytest.approx(committed)
        assert once.done == 5


def test_a_shard_with_a_done_file_is_not_touched_again(tmp_path: Path) -> None:
    with Running(Endpoint()) as endpoint:
        shard = Shard(captions(tmp_path / "s", 5), settings(endpoint), 5)
        assert generate_shard(shard) == ShardResult()
        ledger_path(shard.out).unlink()
        assert generate_shard(shard) == ShardResult()
        assert endpoint.requests == 5
    assert not ledger_path(shard.out).exists()
    assert len(read_records(shard.out, needs="question").records) == 20


def test_a_wrong_key_stops_at_the_first_call_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    source, out = captions(tmp_path / "c.jsonl", 40), tmp_path / "o.jsonl"
    with Running(Endpoint(key="right")) as endpoint:
        with pytest.raises(CloverError, match="does not accept the API key"):
            generate_in_shards(
                source, out=out, settings=settings(endpoint), workers=2, runner=run_here
            )
        assert endpoint.kinds["401"] == 1


def test_an_endpoint_that_dies_is_one_line_and_what_arrived_is_kept(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 40), tmp_path / "o.jsonl"
    with Running(Endpoint()) as endpoint:
        chosen = settings(endpoint)

        def dies(shards: list[Shard], workers: int) -> Iterator[tuple[Shard, ShardResult]]:
            yield shards[0], generate_shard(shards[0])
            endpoint.key = "changed"
            yield shards[1], generate_shard(shards[1])

        with pytest.raises(CloverError, match="does not accept the API key"):
            generate_in_shards(source, out=out, settings=chosen, workers=2, runner=dies)
        answered = sum(endpoint.answered.values())
        assert 1 < answered < 40
        endpoint.key = None
        rest = generate_in_shards(source, out=out, settings=chosen, workers=2, runner=run_here)
        assert rest.done == 40
        assert set(endpoint.answered.values()) == {1}


def test_what_a_shard_declines_is_final_where_the_model_answered_elsewhere(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 30), tmp_path / "o.jsonl"
    with Running(forbidding(range(1, 9))) as endpoint:
        chosen = settings(endpoint, concurrency=3)
        words = {"out": out, "settings": chosen, "workers": 3, "runner": run_here}
        first = generate_in_shards(source, **words)
        assert (first.done, first.failed, first.left) == (22, 8, 0)
        assert generate_in_shards(source, **words).sent == 0


def test_what_was_declined_before_any_shard_was_answered_is_final_afterwards(
    tmp_path: Path,
) -> None:
    source, out = captions(tmp_path / "c.jsonl", 30), tmp_path / "o.jsonl"
    with Running(forbidding(range(10))) as endpoint:
        chosen = settings(endpoint, concurrency=30)  # some stand alone in their shard
        words = {"out": out, "settings": chosen, "workers": 30, "runner": run_here}
        first = generate_in_shards(source, **words)
        assert (first.done, first.failed, first.left) == (20, 10, 0)
        assert generate_in_shards(source, **words).sent == 0


def test_declined_captions_at_the_head_of_a_shard_keep_no_later_run_from_the_others(
    tmp_path: Path,
) -> None:
    source, out = captions(tmp_path / "c.jsonl", 16), tmp_path / "o.jsonl"
    with Running(forbidding(range(8))) as endpoint:
        chosen = settings(endpoint, concurrency=1)
        words = {"out": out, "settings": chosen, "workers": 1, "runner": run_here}
        with pytest.raises(CloverError, match="the same command goes on with the others"):
            generate_in_shards(source, **words)
        for _ in range(2):
            with contextlib.suppress(CloverError):
                last = generate_in_shards(source, **words)
        assert (last.done, last.failed, last.left) == (8, 8, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workers", "0"), "--workers 0 is less than 1"),
        (("--workers", "4", "--concurrency", "3"), "give --concurrency 4 or more"),
        (("--workers", "2", "--batch"), "do not go with --batch"),
    ],
)
def test_what_workers_cannot_do_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    source = captions(tmp_path / "c.jsonl", 2)
    start = ("instruct", "generate", source, "--out", tmp_path / "o", "--model", "m")
    assert run(*start, "--endpoint", "http://127.0.0.1:1/v1", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_ray_the_flag_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    source = captions(tmp_path / "c.jsonl", 5)
    with Running(Endpoint()) as endpoint:
        start = ("instruct", "generate", source, "--out", tmp_path / "o", "--model", "m")
        assert run(*start, "--endpoint", url(endpoint), "--workers", "2", "--ray") == 2
        assert endpoint.requests == 0
    error = capsys.readouterr().err
    assert "pip install 'clover-pathology[ray]'" in error
    assert error.count("\n") == 1


def test_a_ray_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoRay(ModuleType):
        data = exceptions = None

        @staticmethod
        def init(**_: object) -> None:
            raise ConnectionError("Could not find any running Ray instance.\nMore.")

        @staticmethod
        def is_initialized() -> bool:
            return False

        @staticmethod
        def shutdown() -> None:
            pass

    fake = NoRay("ray")
    fake.exceptions = SimpleNamespace(RayError=ArithmeticError)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.data", ModuleType("ray.data"))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with Running(Endpoint()) as endpoint:
        source, chosen = captions(tmp_path / "c.jsonl", 5), settings(endpoint)
        with pytest.raises(
            CloverError, match=r"no Ray at head:6379 \(Could not find .*\); check RAY_ADDRESS"
        ):
            generate_in_shards(
                source, out=tmp_path / "o", settings=chosen, workers=2, runner=run_under_ray
            )


def test_kill_9_of_the_whole_leaves_no_worker_behind_and_loses_no_reply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = captions(tmp_path / "c.jsonl", 300), tmp_path / "o.jsonl"
    with Running(Endpoint(delay_s=0.1)) as endpoint:
        words = [*command(endpoint, source, out), "--workers", "2"]
        with subprocess.Popen(words, start_new_session=True) as process:
            while endpoint.requests < 60 and process.poll() is None:
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGKILL)
        assert unmerged_shards(out)
        for _ in range(1200):  # the workers notice, and end
            if not is_locked(out):
                break
            time.sleep(0.05)
        assert not is_locked(out), "a worker was left behind"
        assert run("instruct", "ledger", out) == 0
        assert "2 shards are not counted yet" in capsys.readouterr().err
        chosen = GenerateSettings(
            endpoint=url(endpoint), model="small-model", price=PRICE, concurrency=8
        )
        summary = generate_file(source, out=out, settings=chosen)
        count = endpoint.count()
    assert summary.done == 300
    with contextlib.closing(sqlite3.connect(ledger_path(out))) as database:
        states = dict(
            database.execute("SELECT state, COUNT(*) FROM attempts GROUP BY state").fetchall()
        )
    assert states["settled"] == 300
    assert 0 < states.get("lost", 0) <= 8
    assert count["requests"] <= 300 + states["lost"]


def is_locked(out: Path) -> bool:
    """Say whether a worker still writes a shard."""
    import fcntl

    for path in unmerged_shards(out):
        with Path(f"{path}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
    return False
