"""What `import clover` offers: names that a checker and a person see, for next to nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import clover

ROOT = Path(__file__).parents[1]

RIGHT = """
import clover


class Mine(clover.QFormer):
    pass


model = clover.load("x")
answer: clover.Answer = model.ask("a.png", "what ?")
found: dict[str, object] = clover.score([{"id": 1}])
error: type[Exception] = clover.CloverError
"""
WRONG = """
import clover

clover.laod("x")
clover.load("x").ask("a.png", 3)
clover.score(5)
"""


def test_importing_the_package_imports_no_library_and_names_what_it_offers() -> None:
    code = (
        "import sys, clover; names = dir(clover);"
        "assert set(clover.__all__) <= set(names) and '__version__' in names;"
        "loaded = {name.split('.')[0] for name in sys.modules};"
        "assert not loaded & {'torch', 'numpy', 'transformers', 'pydantic'}, loaded;"
        "from clover import *; assert load is clover.load and score is clover.score"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'clover' has no attribute 'laod'"):
        clover.laod  # type: ignore[attr-defined]


def test_a_type_checker_knows_the_names_and_refuses_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = pytest.importorskip("mypy.api")
    settings = tmp_path / "mypy.ini"
    # Other libraries' types are not in question, and take minutes to read.
    others = ("torch", "numpy", "PIL", "safetensors", "pydantic", "transformers", "tokenizers")
    more = ("scipy", "yaml", "huggingface_hub")
    names = ",".join(f"mypy-{name}.*" for name in (*others, *more))
    settings.write_text(
        "[mypy]\nstrict = true\nfollow_imports = silent\n"
        f"cache_dir = {tmp_path / 'cache'}\n[{names}]\nfollow_imports = skip\n"
    )
    monkeypatch.setenv("MYPYPATH", str(ROOT / "src"))
    for name, text in (("right", RIGHT), ("wrong", WRONG)):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    said, _, _ = api.run(["--config-file", str(settings), "right.py", "wrong.py"])
    lines = [line.partition(": error: ") for line in said.splitlines() if ": error: " in line]
    assert [place for place, _, _ in lines] == ["wrong.py:4", "wrong.py:5", "wrong.py:6"], said
    assert '"laod"' in lines[0][2]
    assert 'expected "str"' in lines[1][2] and 'expected "Iterable[Any]"' in lines[2][2]
