"""What computes in a passing thread leaves no helper threads behind."""

from __future__ import annotations

import os
import subprocess
import sys
from contextvars import ContextVar
from pathlib import Path

import pytest

from clover.core.threads import in_passing_thread

TASKS = Path("/proc/self/task")
HEAVY = """
import os, sys, time
import torch
from clover.core.threads import in_passing_thread

def tasks():
    return len(os.listdir("/proc/self/task"))

def compute():
    torch.ones(1 << 20).mul_(2)
    return tasks()

torch.set_num_threads(3)  # starts threads of another pool, which stay
before = tasks()
inside = in_passing_thread(compute) if sys.argv[1] == "passing" else compute()
until = time.monotonic() + 60  # threads take their time to go
while sys.argv[1] == "passing" and tasks() > before and time.monotonic() < until:
    time.sleep(0.01)
print(before, inside, tasks())
"""


def test_it_returns_and_raises_what_the_function_does() -> None:
    assert in_passing_thread(divmod, 7, 2) == (3, 1)
    assert in_passing_thread(sorted, [1, 2], reverse=True) == [2, 1]
    with pytest.raises(ZeroDivisionError):
        in_passing_thread(divmod, 1, 0)
    with pytest.raises(SystemExit):
        in_passing_thread(sys.exit, 2)


def test_the_function_sees_the_callers_context() -> None:
    said: ContextVar[str] = ContextVar("said", default="nothing")
    said.set("something")
    assert in_passing_thread(said.get) == "something"


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted as Linux lists them")
@pytest.mark.parametrize("how", ["passing", "here"])
def test_helper_threads_end_with_it(how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, how],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "3"},
    )
    before, inside, after = map(int, done.stdout.split())
    assert inside >= before + 2  # else nothing was computed in parallel
    assert (after == before) if how == "passing" else (after == inside)


def test_an_interrupt_ends_the_function_and_lets_go_of_what_it_holds() -> None:
    code = """
import os, signal, threading, time
from clover.core.threads import in_passing_thread

def work():
    try:
        while True:
            time.sleep(0.01)
    finally:
        print("let go", flush=True)

signal.signal(signal.SIGINT, signal.default_int_handler)  # who is started by nohup has none
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    in_passing_thread(work)
except KeyboardInterrupt:
    print("interrupted", threading.active_count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "let go\ninterrupted 1\n", "")
