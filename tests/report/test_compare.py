"""Case studies: what is sorted how, what the filters leave, and files that do not belong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from clover.core.errors import CloverError
from clover.report.command import report
from clover.report.compare import choose, read_speaker, shared_cases, write_compared

CHROMIUM = shutil.which("chromium")
TRUTH = [
    ("a", "Which organ?", "lymph node", "organ"),
    ("b", "Necrosis?", "yes", "necrosis"),
    ("c", "Which stain?", "PAS", "stain"),
    ("d", "Mitoses?", "no", "mitoses"),
]
ANSWERS = {
    "first": ["lymph node", "Yes, some", "PAS", "yes"],
    "second": ["liver", "no", "PAS", "yes"],
    "third": ["a lymph node", "no", "pas.", "<script>alert(1)</script>"],
}


def write(path: Path, answers: list[str], **more: Any) -> Path:
    rows: list[dict[str, Any]] = [{"header": {"model": path.stem, **more}}]
    for (identity, question, answer, form), said in zip(TRUTH, answers, strict=True):
        row = {"id": identity, "question": question, "answer": answer, "form": form}
        rows.append({**row, "image": f"{identity}.png", "prediction": said})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for identity, *_ in TRUTH[:3]:
        Image.new("RGB", (40, 40), (200, 120, 180)).save(tmp_path / f"{identity}.png")
    return [write(tmp_path / f"{name}.jsonl", said) for name, said in ANSWERS.items()]


def test_disputes_are_told_from_words(files: list[Path]) -> None:
    cases = shared_cases([read_speaker(path) for path in files])
    assert [(case.differs, case.right) for case in cases] == [
        ("verdict", [0, 2]),
        ("verdict", [0]),
        ("no", [0, 1, 2]),
        ("words", []),
    ]
    assert [case.kind for case in cases] == ["open", "closed", "open", "closed"]
    assert [case.row["id"] for case in choose(cases, 3)] == ["a", "b", "d"]


def test_the_page_holds_pictures_counts_and_no_foreign_markup(
    files: list[Path], tmp_path: Path
) -> None:
    out = write_compared(files, tmp_path / "page.html")
    page = out.read_text("utf-8")
    assert page.count('src="data:image/jpeg') == 3
    assert page.count("picture not found") == 1
    assert "<script>alert" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "Research use only, not for diagnosis." in page
    # right, %, right alone, wrong alone
    assert re.search(r"first\.jsonl</small></td>.*>3<.*>75\.0<.*>1<.*>0<", page)


def test_rows_are_read_as_the_scorer_reads_them(tmp_path: Path) -> None:
    """QUILT-VQA's closed truth is `yes_no_answer`; other people's files call things otherwise."""
    truth = "The image shows a tumour, so yes."
    first, second = tmp_path / "a.jsonl", tmp_path / "b.csv"
    rows = [
        {"id": "1", "question": "Tumour?", "answer": truth, "yes_no_answer": "yes", "pred": "yes"},
        {"id": "2", "question": "Organ?", "response": "liver"},
        {"id": "3", "question": "Side?", "answer": "left", "prediction": "left"},
        {"id": "4", "question": "Fat?", "prediction": "no"},
    ]
    for row, kind in zip(rows, ("closed", "open", "closed", "closed"), strict=True):
        row["answer_type"] = kind
    first.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    second.write_text("qid,gold,predicted\n1,yes,no\n2,liver,a fat liver\n3,left,right\n4,,yes\n")
    cases = shared_cases([read_speaker(first), read_speaker(second)])
    assert [case.right for case in cases] == [[0], [0, 1], [], []]
    assert [case.kind for case in cases] == ["closed", "open", "closed", "open"]
    assert [case.judgements[0].kind for case in cases] == ["right", "right", *["unscored"] * 2]
    page = write_compared([first, second], tmp_path / "page.html").read_text("utf-8")
    assert "– not scored: the truth is neither yes nor no" in page
    # of the two that have a truth: right, %, right alone, wrong alone
    assert re.search(r"a\.jsonl</small></td>.*>2<.*>100\.0<.*>1<.*>0<", page)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize(
    ("address", "left"),
    [
        ("", ["Which organ?", "Necrosis?", "Mitoses?", "Which stain?"]),
        ("#differs=verdict", ["Which organ?", "Necrosis?"]),
        ("#differs=any&kind=closed", ["Necrosis?", "Mitoses?"]),
        ("#right=only%200", ["Necrosis?"]),
        ("#right=not%202", ["Necrosis?", "Mitoses?"]),
        ("#right=all", ["Which stain?"]),
        ("#right=none", ["Mitoses?"]),
        ("#form=organ", ["Which organ?"]),
        ("#words=LIVER", ["Which organ?"]),
        ("#words=spleen", []),
    ],
)
def test_the_filters_leave_what_they_say(
    files: list[Path], tmp_path: Path, address: str, left: list[str]
) -> None:
    out = write_compared(files, tmp_path / "page.html")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command.append(f"file://{out}{address}")
    page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    rows = re.findall(r'<tr data-form=[^>]*?( hidden="")?><td class="q">(.*?)<small', page)
    assert [question for hidden, question in rows if not hidden] == left
    said = re.search(r'<output id="count"[^>]*>(.*?)</output>', page)
    assert said is not None
    assert said[1] == f"{len(left)} question" + "s" * (len(left) != 1)


def test_the_command_takes_files_and_run_folders(whole_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "compare.html"
    blind = whole_run / "evaluation" / "blind.jsonl"
    done = CliRunner().invoke(
        report, ["--compare", str(whole_run), str(blind), "--out", str(out), "--limit", "10"]
    )
    assert done.exit_code == 0, done.output
    page = out.read_text("utf-8")
    assert page.count("<tr data-form=") == 10
    assert "10 are on this page" in page


def test_what_cannot_be_compared_is_one_line(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    with pytest.raises(CloverError, match="1 prediction file; a comparison needs two"):
        write_compared(files[:1], out)
    with pytest.raises(CloverError, match="no prediction file"):
        write_compared([files[0], tmp_path / "absent.jsonl"], out)
    stranger = tmp_path / "stranger.jsonl"
    stranger.write_text('{"id": "z", "prediction": "x"}\n[]\n{torn\n')
    assert read_speaker(stranger).num_damaged == 2
    with pytest.raises(CloverError, match="no id is in all 2 files"):
        write_compared([files[0], stranger], out)
    stranger.write_text('{"id": "a", "question": "Other?", "prediction": "x"}\n')
    with pytest.raises(CloverError, match="not the same questions"):
        write_compared([files[0], stranger], out)
    stranger.write_text("")
    with pytest.raises(CloverError, match="holds no line with an id"):
        write_compared([files[0], stranger], out)
    assert not out.exists()
