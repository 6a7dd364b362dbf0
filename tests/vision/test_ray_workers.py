"""Workers under Ray fill the cache that one process fills; what goes wrong is one line."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clover.cli import main
from clover.core.config import EncoderConfig
from clover.core.errors import CloverError
from clover.vision import workers as module
from clover.vision.encoder import load_encoder
from clover.vision.workers import FillJob, fill, fill_under_ray

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'"
)

# Notes in which process it encoded how many images. A shape is asked for with a fake tensor.
FAMILY = """
import os
from pathlib import Path

import torch
from torch import nn

from clover.vision.token_encoder import Family


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, kernel_size=8, stride=8)

    def forward(self, pixels):
        if type(pixels) is torch.Tensor:
            with Path("encoded.txt").open("a") as notes:
                notes.write(f"{os.getpid()} {len(pixels)}\\n")
        return self.patches(pixels).flatten(2).transpose(1, 2)


def build(config):
    return Family("noting/patches", Patches(), None, mean=(0.5,) * 3, std=(0.5,) * 3)
"""
CONFIG = EncoderConfig(kind="tiny", image_size=32, grid=4, batch_size=8)


def captions(folder: Path, count: int) -> Path:
    """Write records on noise, one of them on no image."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(count):
        pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"no image")
    names = [*(f"{index}.png" for index in range(count)), "broken.png"]
    path = folder / "captions.jsonl"
    rows = [{"id": name, "image": name, "caption": "c"} for name in names]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def shards(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each shard and index of a cache, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("shard-*"))}


@needs_ray
def test_workers_of_a_local_ray_fill_the_cache_that_one_process_fills(tmp_path: Path) -> None:
    captions(tmp_path / "i", 300)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "noting.py").write_text(FAMILY)
    words = [sys.executable, "-m", "clover.cli", "features", "i/captions.jsonl", "--views", "2"]
    fields = ("kind=noting", "model=patches", "image_size=32", "batch_size=8", "weights=null")
    words += [word for item in fields for word in ("--set", f"encoder.{item}")]
    noted, said, pids = tmp_path / "encoded.txt", [], []
    for more in (["--out", "one"], ["--out", "two", "--workers", "2", "--ray"]):
        # In a process of its own, which can be ended: Ray in a place that it does not like waits
        # for ever. The time says nothing about the verdict.
        environment = {**os.environ, "CLOVER_FAMILIES": "own"}
        with subprocess.Popen(
            [*words, *more], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            said.append(process.communicate(timeout=900)[0].replace("two/", "one/"))
        assert process.returncode == 0
        pids.append(process.pid)
        if more[1] == "one":
            noted.unlink()
    assert said[0] == said[1] and "300 records on 300 images; 1 set aside" in said[0]
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert len(shards(tmp_path / "one")) == 2 * 5  # 602 images and views, 128 a shard
    first, second = ((tmp_path / name / "rejected.jsonl").read_text() for name in ("one", "two"))
    assert first == second and "broken.png" in first
    rows = [[int(word) for word in line.split()] for line in noted.read_text().splitlines()]
    assert sum(count for _, count in rows) == 600, "not every image once"
    assert pids[1] not in {pid for pid, _ in rows}, "who should have waited has encoded"


class FakeRay(ModuleType):
    """Ray as far as it is used here; what it is given to do is done in this process."""

    def __init__(self, gpus: int = 0) -> None:
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayError=ArithmeticError)
        self.started: dict[str, Any] = {}
        self.options: dict[str, Any] = {}
        self.is_over = False
        self._resources = {"CPU": 2.0} | ({"GPU": float(gpus)} if gpus else {})
        self.data = ModuleType("ray.data")
        self.data.DataContext = SimpleNamespace(get_current=SimpleNamespace)  # type: ignore[attr-defined]
        self.data.TaskPoolStrategy = SimpleNamespace  # type: ignore[attr-defined]
        self.data.from_items = self._items  # type: ignore[attr-defined]

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.started = options

    def shutdown(self) -> None:
        self.is_over = True

    def cluster_resources(self) -> dict[str, float]:
        return self._resources

    def _items(self, rows: list[dict[str, int]], override_num_blocks: int) -> SimpleNamespace:
        assert len(rows) == override_num_blocks

        def run(work: Callable[[dict[str, int]], dict[str, Any]], **options: Any) -> object:
            self.options = options

            def results() -> Iterator[dict[str, Any]]:
                return (work(row) for row in rows)

            return SimpleNamespace(iter_rows=results)

        return SimpleNamespace(map=run)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeRay:
    fake = FakeRay(getattr(request, "param", 0))
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.data", fake.data)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(module, "_LOOK_S", 0.001)
    return fake


def test_what_a_worker_cannot_do_is_said_and_nobody_does_it_instead(
    tmp_path: Path, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = FillJob(captions(tmp_path / "i", 3), CONFIG, tmp_path / "c")
    real = FillJob.run
    with monkeypatch.context() as patch:

        def fails(self: FillJob, *_: object) -> None:
            raise CloverError("the disk is full; free some space")

        patch.setattr(FillJob, "run", fails)
        with pytest.raises(CloverError, match="the disk is full; free some space"):
            fill_under_ray(job, workers=2)
    assert ray.is_over and not shards(tmp_path / "c")
    assert FillJob.run is real and len(fill_under_ray(job, workers=2).records) == 3
    fill(FillJob(job.data, CONFIG, tmp_path / "one"))
    assert shards(tmp_path / "c") == shards(tmp_path / "one") != {}


def test_a_worker_that_dies_is_one_line(tmp_path: Path, ray: FakeRay) -> None:
    ray.exceptions.RayError = ZeroDivisionError
    job = FillJob(captions(tmp_path / "i", 3), CONFIG, tmp_path / "c")

    def dies(_: object, **__: object) -> object:
        raise ZeroDivisionError("the node died\nmore")

    ray.data.from_items = lambda *_, **__: SimpleNamespace(map=dies)  # type: ignore[attr-defined]
    with pytest.raises(CloverError, match=r"failed under Ray \(ZeroDivisionError: the node died\)"):
        fill_under_ray(job)
    assert ray.is_over


def test_of_a_task_that_failed_the_last_line_of_its_trace_is_said(
    tmp_path: Path, ray: FakeRay
) -> None:
    trace = (
        "\x1b[36mray::Map(run)()\x1b[39m (pid=54700, ip=10.0.0.7)\n"
        '  File "worker.py", line 1, in run\n'
        "MemoryError: CUDA out of memory\n"
    )

    def fails(_: object, **__: object) -> object:
        raise ArithmeticError(trace)

    ray.data.from_items = lambda *_, **__: SimpleNamespace(map=fails)  # type: ignore[attr-defined]
    job = FillJob(captions(tmp_path / "i", 3), CONFIG, tmp_path / "c")
    with pytest.raises(CloverError, match=r"\(ArithmeticError: MemoryError: CUDA out of memory\)"):
        fill_under_ray(job)


def test_a_cluster_that_lets_nobody_in_is_no_worker_that_failed(
    tmp_path: Path, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(**_: object) -> None:
        raise ArithmeticError("Token authentication is enabled")

    monkeypatch.setattr(ray, "init", refuses)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    job = FillJob(captions(tmp_path / "i", 3), CONFIG, tmp_path / "c")
    with pytest.raises(CloverError, match=r"no Ray at head:6379 \(Token .*RAY_AUTH_TOKEN"):
        fill_under_ray(job)


def test_a_worker_without_this_folder_names_it(
    tmp_path: Path, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(module.os, "chdir", cannot)
    job = FillJob(captions(tmp_path / "i", 3), CONFIG, tmp_path / "c")
    with pytest.raises(CloverError, match=r"on .*: No such file or directory; workers need it too"):
        fill_under_ray(job)


@pytest.mark.parametrize(
    ("ray", "workers", "share"),
    [(0, 2, None), (1, 2, 1 / 2), (2, 2, 1), (8, 2, 1), (3, 4, 1 / 2)],
    indirect=["ray"],
)
def test_workers_divide_the_gpus_so_that_all_of_them_run(
    tmp_path: Path, ray: FakeRay, workers: int, share: float | None
) -> None:
    fill_under_ray(FillJob(captions(tmp_path / "i", 2), CONFIG, tmp_path / "c"), workers=workers)
    assert ray.options["num_gpus"] == share
    assert ray.options["compute"].size == workers
    assert ray.started["num_cpus"] == ray.options["num_cpus"] * workers


def test_a_cluster_is_taken_as_it_is_with_a_cpu_for_each_worker(
    tmp_path: Path, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 8)
    taken: list[int] = []
    monkeypatch.setattr(module.torch, "set_num_threads", taken.append)
    job = FillJob(captions(tmp_path / "i", 2), CONFIG, tmp_path / "c")
    fill_under_ray(job, workers=2)
    assert "address" not in ray.started and ray.options["num_cpus"] == 1
    monkeypatch.delenv("RAY_ADDRESS")
    fill_under_ray(job, workers=2)
    assert ray.started["address"] == "local" and ray.options["num_cpus"] == 4
    assert taken == [1, 1, 4, 4]


def test_a_shard_found_torn_is_named_though_a_worker_made_it_again(
    tmp_path: Path, ray: FakeRay
) -> None:
    job = FillJob(captions(tmp_path / "i", 2), CONFIG, tmp_path / "c")
    shard = next(fill(job).cache.path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:50])
    found = fill_under_ray(job)
    assert found.cache.set_aside == [shard.parent / "broken" / shard.name]
    assert len(found.cache.get(list(found.digests))) == 2


def test_without_ray_the_flag_says_what_to_install_and_nothing_is_encoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    path = captions(tmp_path / "i", 2)
    tiny = ("kind=tiny", "image_size=32", "grid=4", "weights=null", "levels=[]")
    words = [word for item in tiny for word in ("--set", f"encoder.{item}")]
    words += ["--out", str(tmp_path / "c"), "--ray"]
    with pytest.raises(SystemExit) as stop:
        main(["features", str(path), *words])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "pip install 'clover-pathology[ray]'" in error and error.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_progress_counts_the_images_that_others_have_written(
    tmp_path: Path, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []

    class Bar:
        def __enter__(self) -> Callable[[int], None]:
            return shown.append

        def __exit__(self, *_: object) -> None:
            pass

    def progress(_: str, total: None, done: int) -> Bar:
        assert done == 0
        return Bar()

    job = FillJob(captions(tmp_path / "i", 5), CONFIG, tmp_path / "c")
    monkeypatch.setattr(module, "progress", progress)
    cache = module.FeatureCache(tmp_path / "c", load_encoder(CONFIG))
    with module._shown(cache):
        fill(job)
    assert sum(shown) == 5
