"""Hundreds of hostile requests among honest ones: refused, and the server lives on as it was."""

from __future__ import annotations

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from tests.serve import hostile
from tests.serve.running import Running, running, tiny_folder

ROUNDS = 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("hostile")
    with running(f"tiny={tiny_folder(folder)[1]}") as server:
        yield server


def honest(server: Running) -> None:
    assert hostile.send(server.port, hostile.asked(hostile.small())) == 200


@pytest.mark.parametrize("attack", hostile.ATTACKS, ids=lambda attack: attack.__name__)
def test_no_attack_makes_the_server_fail(server: Running, attack: hostile.Attack) -> None:
    dice = random.Random(attack.__name__)
    statuses: Counter[int] = Counter()
    for _ in range(ROUNDS):
        statuses[hostile.send(server.port, attack(dice))] += 1
    assert not {status for status in statuses if status >= 500}, statuses
    assert sum(count for status, count in statuses.items() if 400 <= status < 500) > ROUNDS // 3
    honest(server)
    with urlopen(server.url + "/metrics") as reply:
        assert b'status="5' not in reply.read()


def test_a_hundred_megapixels_are_refused_from_the_header(server: Running) -> None:
    honest(server)
    before = server.resident_bytes()
    for _ in range(5):
        assert (
            hostile.send(server.port, hostile.asked(hostile.png(10_000, 10_000, hostile.ZEROS)))
            == 400
        )
    assert server.resident_bytes() < before + 30_000_000  # decoded it would be 300 MB


def test_who_hangs_up_at_any_point_leaves_nothing_behind(server: Running) -> None:
    dice = random.Random(7)
    content = hostile.asked(hostile.small(), n=4, max_tokens=50, temperature=2)
    for _ in range(40):
        hostile.send(server.port, content, leave_after=dice.randrange(len(content) + 1))
    deadline = time.monotonic() + 60
    while True:
        with urlopen(server.url + "/health") as reply:
            state = json.loads(reply.read())
        if not state["running"] and not state["waiting"]:
            break
        assert time.monotonic() < deadline, state
        time.sleep(0.1)
    open_files = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
    assert open_files < 64
    honest(server)


def test_slow_bodies_do_not_keep_others_waiting(server: Running) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    for connection in slow:
        connection.sendall(head)
    honest(server)
    for connection in slow:
        connection.settimeout(60)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        connection.close()


def test_who_asks_and_never_reads_keeps_nobody_waiting(server: Running) -> None:
    more = {"n": 4, "max_tokens": 200, "temperature": 2, "stream": True}
    content = hostile.asked(hostile.small(), logprobs=True, top_logprobs=20, **more)
    deaf = [socket.socket() for _ in range(6)]
    for connection in deaf:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(content)
    honest(server)  # is answered among them
    deadline = time.monotonic() + 120
    while True:  # what they asked for is written to its end, read or not
        with urlopen(server.url + "/health") as reply:
            state = json.loads(reply.read())
        if not state["running"] and not state["waiting"]:
            break
        assert time.monotonic() < deadline, state
        time.sleep(0.1)
    honest(server)
    for connection in deaf:
        connection.setblocking(False)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()
    honest(server)
