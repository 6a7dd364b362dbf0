"""kill -9 at twenty random moments: the same output, and no stored reply asked for again."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from clover.instruct.generate import GenerateSettings, generate_file
from clover.instruct.ledger import ledger_path
from clover.instruct.prices import Price

HERE = Path(__file__).resolve().parent
COUNT = 900


@pytest.fixture
def endpoint() -> Iterator[str]:
    command = [sys.executable, str(HERE / "endpoint.py"), "--delay", "0.03"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.terminate()


def test_killed_twenty_times_it_ends_with_the_same_file_and_asks_nothing_stored_again(
    tmp_path: Path, endpoint: str
) -> None:
    source, out = tmp_path / "c.jsonl", tmp_path / "killed.jsonl"
    rows = [{"image": f"{i}.png", "caption": f"Lung, case {i}."} for i in range(COUNT)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(HERE / "killed.py"), str(source), str(out)]
    subprocess.run([*command, f"{endpoint}/v1", "20", "0"], check=True, timeout=120)
    with urllib.request.urlopen(f"{endpoint}/count") as answer:
        count = json.load(answer)

    with sqlite3.connect(ledger_path(out)) as database:
        per_key = database.execute(
            "SELECT SUM(state = 'settled'), SUM(state = 'lost'), SUM(state = 'reserved') "
            "FROM attempts GROUP BY key"
        ).fetchall()
    assert len(per_key) == COUNT
    # One paid reply each; whatever was asked again was in flight when the process died.
    assert {(settled, reserved) for settled, _, reserved in per_key} == {(1, 0)}
    lost = sum(row[1] for row in per_key)
    assert 0 < lost <= 20 * 8, "at most the requests in flight at each kill"
    first = 1  # asked by killed.py for an output of its own
    assert sum(count["asked"].values()) <= COUNT + lost + first

    undisturbed = tmp_path / "undisturbed.jsonl"
    settings = GenerateSettings(
        endpoint=f"{endpoint}/v1", model="small-model", price=Price(0.5, 1.5), concurrency=32
    )
    generate_file(source, out=undisturbed, settings=settings)
    assert out.read_bytes() == undisturbed.read_bytes()
