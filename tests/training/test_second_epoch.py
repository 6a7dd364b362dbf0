"""The benchmark of a second epoch, at a size that only shows that it runs."""

from __future__ import annotations

import json

import pytest
from benchmarks import second_epoch


def test_every_part_is_measured_and_the_ratio_is_of_both_sides(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_epoch, "_CACHED", 128)
    names = ["encoder float32", "peer float32", "ours float32", "read float16", "read int8"]
    assert set(names) <= set(second_epoch.parts())
    found = {name: second_epoch.measure(name, "small", 1, 2) for name in names}
    assert all(value > 0 for value in found.values())
    second_epoch.print_rows(found, "small")
    row = json.loads(capsys.readouterr().out)
    peer = 8 * found["encoder float32"] + found["peer float32"]
    ours = found["ours float32"] + found["read float16"]
    assert row["value"] == pytest.approx(peer / ours, abs=1e-3)
