"""The verbs as a user types them, with good files and bad ones."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from clover.cli import main

from .endpoint import Endpoint, Running, url

CSV = (
    'image,caption\na.png,"Liver, H&E, with fatty change and no fibrosis."\nb.png,Kidney: normal.\n'
)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "captions.csv"
    path.write_text(CSV)
    return path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_template_filter_mix_and_stats_follow_on_each_other(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, good, mixed = tmp_path / "t.jsonl", tmp_path / "g.jsonl", tmp_path / "h.jsonl"
    page = tmp_path / "stats.html"
    assert run("instruct", "template", source, "--out", made) == 0
    assert run("instruct", "filter", made, "--out", good) == 0
    assert run("instruct", "mix", good, "--out", mixed, "--val", "0.5", "--per-image", "3") == 0
    assert run("instruct", "stats", mixed, "--out", page) == 0
    assert {row["split"] for row in rows(mixed)} <= {"train", "val"}
    card = json.loads((tmp_path / "h.jsonl.card.json").read_text())
    assert card["records"] == len(rows(mixed))
    text = page.read_text()
    assert "not for diagnosis" in text
    assert "Body parts" in text
    for foreign in ('src="', "href=", "@import", "http://", "https://"):
        assert foreign not in text
    capsys.readouterr()


def test_generate_and_ledger(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.jsonl"
    with Running(Endpoint()) as endpoint:
        words = ("instruct", "generate", source, "--out", out, "--endpoint", url(endpoint))
        words = (*words, "--model", "m", "--price", "1,2")
        assert run(*words, "--dry-run") == 0
        assert endpoint.requests == 0
        assert "Nothing was sent" in capsys.readouterr().out
        assert run(*words) == 0
        capsys.readouterr()
        for name in (out, f"{out}.ledger.sqlite"):
            assert run("instruct", "ledger", name, "--json") == 0
            found = json.loads(capsys.readouterr().out)
            assert (found["requests"], found["done"], found["failed"]) == (2, 2, 0)
            assert found["input_tokens"] == endpoint.input_tokens
            assert found["output_tokens"] == endpoint.output_tokens
            dollars = (endpoint.input_tokens + 2 * endpoint.output_tokens) / 1e6
            assert found["usd"] == pytest.approx(dollars, abs=1e-6)


def test_budget_reached_is_said_and_exits_with_2(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Running(Endpoint()) as endpoint:
        words = ("instruct", "generate", source, "--out", tmp_path / "o", "--model", "m")
        words = (*words, "--endpoint", url(endpoint), "--price", "100,100", "--budget", "0.01")
        assert run(*words) == 2
        assert endpoint.requests == 0
    error = capsys.readouterr().err
    assert "budget of $0.01" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,note\na.png,Liver\n", "no 'caption' column (found: image, note)"),
        ("pic,remark\na.png,Liver\n", "(found: pic, remark); call it one of caption, text, desc"),
        ("", "the file is empty"),
        ("image,caption\n", "no row stands below its header"),
        ("image,caption\na.png,\nb.png,  \n", "no usable record: 2 empty caption"),
        ("image,caption\na.png,NaN\n", "no caption that can be asked about"),
    ],
)
def test_a_bad_caption_file_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path = tmp_path / "c.csv"
    path.write_text(content)
    code = run("instruct", "template", path, "--out", tmp_path / "o")
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_file_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("instruct", "template", tmp_path / "absent.csv", "--out", tmp_path / "o") == 2
    assert "absent.csv" in capsys.readouterr().err


def test_messy_captions_are_used_or_set_aside_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "c.jsonl", tmp_path / "o.jsonl"
    lines = [
        json.dumps({"img": "1.png", "description": "<i>Liver</i> with fat \U0001f52c"}),
        json.dumps({"img": "2.png", "description": float("nan")}),
        json.dumps({"img": "3.png", "description": "Die Leber ist mit der Niere und dem Herz da"}),
        json.dumps({"img": "4.png", "description": "liver " * 2_000_000}),
        json.dumps({"img": "5.png", "description": ""}),
        '{"img": "6.png", "descr',
        json.dumps({"img": "7.png", "description": "Kidney\r\nwith fibrosis"}),
    ]
    path.write_bytes("\r\n".join(lines).encode())
    with Running(Endpoint()) as endpoint:
        words = ("instruct", "generate", path, "--out", out, "--endpoint", url(endpoint))
        assert run(*words, "--model", "m") == 0
        assert endpoint.requests == 2
    assert {row["image"] for row in rows(out)} == {"1.png", "7.png"}
    reasons = {row["reason"].split(" 8,")[0] for row in rows(Path(f"{out}.rejected.jsonl"))}
    assert len(rows(Path(f"{out}.rejected.jsonl"))) == 5
    assert {"not in English", "empty caption", "not a JSON object"} <= reasons
    assert any("longer than" in reason for reason in reasons)
    assert Path(f"{out}.rejected.jsonl").stat().st_size < 10_000
    capsys.readouterr()


def test_a_messy_csv_is_read_like_messy_json_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "c.csv", tmp_path / "o.jsonl"
    lines = [
        "img,description",
        "1.png,<i>Liver</i> &lt;b&gt;with&lt;/b&gt; fat \U0001f52c",
        "2.png,NaN",
        "3.png,Die Leber ist mit der Niere und dem Herz da",
        "4.png," + "liver " * 2_000_000,
        '5.png,"Kidney\r\nwith fibrosis"',
    ]
    path.write_bytes("\r\n".join(lines).encode())
    assert run("instruct", "template", path, "--out", out) == 0
    answers = {row["image"]: row["answer"] for row in reversed(rows(out))}
    assert answers == {"1.png": "Liver with fat.", "5.png": "Kidney with fibrosis."}
    said = capsys.readouterr().out
    for reason in ("not in English", "empty caption", "longer than 8,000 characters"):
        assert f"1 {reason}" in said or f"1 caption {reason}" in said
    rejected = rows(Path(f"{out}.rejected.jsonl"))
    assert [row["line"] for row in rejected] == [3, 4, 5]
    assert Path(f"{out}.rejected.jsonl").stat().st_size < 10_000


def test_captions_that_share_an_id_lose_no_pair_and_are_paid_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "c.jsonl", tmp_path / "o.jsonl"
    lines = [
        {"id": name, "image": f"{image}.png", "caption": f"Liver {image} with fibrosis, H&E."}
        for name, image in (("1", "a"), ("1~2", "b"), ("1", "c"), ("1", "d"), ("2", "e"))
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    with Running(Endpoint()) as endpoint:
        words = ("instruct", "generate", path, "--out", out, "--endpoint", url(endpoint))
        assert run(*words, "--model", "m") == 0
        made = rows(out)
        # An id stands in no request: what was paid under another is found again.
        path.write_text("\n".join(json.dumps({**line, "id": "1"}) for line in lines))
        assert run(*words, "--model", "m") == 0
        assert endpoint.requests == 5
    assert {row["id"].rsplit("-g")[0] for row in made} == {"1", "1~2", "1~3", "1~4", "2"}
    assert run("instruct", "template", path, "--out", tmp_path / "t.jsonl") == 0
    for found in (made, rows(out), rows(tmp_path / "t.jsonl")):
        assert len({row["id"] for row in found}) == len(found)
        assert {row["image"] for row in found} == {f"{image}.png" for image in "abcde"}
    capsys.readouterr()


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_what_is_no_url_is_named_before_its_price(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    words = ("instruct", "generate", source, "--out", tmp_path / "o", "--model", "m")
    assert run(*words, "--endpoint", "nonsense", *more) == 2
    assert "'nonsense' is not a URL" in capsys.readouterr().err


def test_an_endpoint_that_counts_nothing_is_marked_in_the_ledger(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.jsonl"
    with Running(Endpoint(usage=False)) as endpoint:
        words = ("instruct", "generate", source, "--out", out, "--endpoint", url(endpoint))
        assert run(*words, "--model", "m", "--price", "1,2") == 0
    capsys.readouterr()
    assert run("instruct", "ledger", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["estimated"] == found["done"] == 2
    assert found["usd"] > 0


def test_verdicts_of_a_review_are_applied(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, good, review = tmp_path / "t.jsonl", tmp_path / "g.jsonl", tmp_path / "review.jsonl"
    run("instruct", "template", source, "--out", made)
    first = rows(made)[0]["id"]
    review.write_text(json.dumps({"id": first, "verdict": "reject"}) + "\n")
    assert run("instruct", "filter", made, "--out", good, "--review", review) == 0
    assert first not in {row["id"] for row in rows(good)}
    review.write_text('{"id": "x", "verdict": "maybe"}\n')
    assert run("instruct", "filter", made, "--out", good, "--review", review) == 2
    assert "neither keep nor reject" in capsys.readouterr().err


def test_stats_page_carries_no_markup_of_the_data(tmp_path: Path) -> None:
    path, page = tmp_path / "d.jsonl", tmp_path / "d.html"
    evil = "<script>alert(1)</script>"
    record = {"id": evil, "question": f"What {evil}?", "answer": evil, "caption": evil}
    path.write_text(json.dumps(record) + "\n")
    assert run("instruct", "stats", path, "--out", page) == 0
    assert evil not in page.read_text()


@pytest.mark.parametrize("verb", ["generate", "template", "filter", "mix", "stats", "ledger"])
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("instruct", verb, "--help") == 0
    text = capsys.readouterr().out
    assert f"clover instruct {verb}" in text
    assert "Example:" in text


def test_a_wrong_price_shows_the_form(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("instruct", "generate", source, "--out", tmp_path / "o", "--model", "m")
    words = (*words, "--endpoint", "http://127.0.0.1:1/v1", "--price", "cheap")
    assert run(*words) == 2
    assert "0.5,1.5" in capsys.readouterr().err


def test_any_of_an_image_s_captions_may_bear_a_pair_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, captions, good = (tmp_path / f"{name}.jsonl" for name in ("p", "c", "g"))
    asked = ("necrosis", "fibrosis", "amyloid")
    pairs.write_text(
        "\n".join(
            json.dumps({"id": x, "image": "a.png", "question": f"Is there {x}?", "answer": "Yes"})
            for x in asked
        )
    )
    captions.write_text(
        "\n".join(
            json.dumps({"id": "1", "image": "a.png", "caption": f"Liver with {x}."})
            for x in asked[:2]
        )
    )
    assert run("instruct", "filter", pairs, "--out", good, "--captions", captions) == 0
    assert [row["id"] for row in rows(good)] == ["necrosis", "fibrosis"]
    assert "1 unsupported" in capsys.readouterr().out


def test_files_that_no_share_names_are_said_to_be_left_out(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"{name}.jsonl" for name in ("a", "b", "c")]
    for file in files:
        run("instruct", "template", source, "--out", file)
    capsys.readouterr()
    assert run("instruct", "mix", *files, "--out", tmp_path / "m.jsonl", "--share", "a=1") == 0
    assert "left out, because --share names others alone: b, c\n" in capsys.readouterr().out
    assert run("instruct", "mix", *files, "--out", tmp_path / "m.jsonl") == 0
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("share", ["0.7", "good=much"])
def test_a_share_without_a_name_says_its_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: str
) -> None:
    file = tmp_path / "good.jsonl"
    file.write_text("")
    assert run("instruct", "mix", file, "--out", tmp_path / "m.jsonl", "--share", share) == 2
    assert f"--share '{share}' is not of the form name=0.8" in capsys.readouterr().err


def in_folder(folder: Path, caption: str) -> Path:
    """Write captions of one image, which lies beside them; its bytes are the caption's."""
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "1.png").write_text(caption)
    path = folder / f"{folder.name}.jsonl"
    path.write_text(json.dumps({"id": folder.name, "image": "images/1.png", "caption": caption}))
    return path


def shown(path: Path) -> list[str]:
    """Return what the image of each record holds."""
    return [(path.parent / row["image"]).read_text() for row in rows(path)]


def test_records_in_another_folder_are_about_the_same_images(tmp_path: Path) -> None:
    lung = in_folder(tmp_path / "pa", "Lung, H&E, with fibrosis.")
    fat = in_folder(tmp_path / "pb", "Adipose tissue, H&E, with fibrosis.")
    made, good = tmp_path / "new/t.jsonl", tmp_path / "deep/er/g.jsonl"
    assert run("instruct", "template", lung, "--out", made) == 0
    assert run("instruct", "template", fat, "--out", fat.parent / "t2.jsonl") == 0
    assert run("instruct", "filter", made, "--out", good) == 0
    for path in (made, good):
        assert shown(path) == [row["caption"] for row in rows(path)] != []
    mixed, words = tmp_path / "pa/mixed.jsonl", ("--no-balance", "--val", "0.5")
    files = (made, fat.parent / "t2.jsonl")
    assert run("instruct", "mix", *files, "--out", mixed, *words) == 0
    assert shown(mixed) == [row["caption"] for row in rows(mixed)]
    card = json.loads(Path(f"{mixed}.card.json").read_text())
    assert (card["images"], card["groups"]) == (2, 2)
    assert run("instruct", "mix", *files, "--out", mixed, "--no-balance", "--per-image", "1") == 0
    assert sorted(shown(mixed)) == [rows(fat)[0]["caption"], rows(lung)[0]["caption"]]


def test_the_split_does_not_depend_on_the_folder_of_out(tmp_path: Path) -> None:
    source = tmp_path / "src/q.jsonl"
    pair = {"question": "What is seen?", "answer": "Fat.", "origin": "x"}
    names = [f"{number}.png" for number in range(40)]
    source.parent.mkdir()
    for name in names:
        (source.parent / name).write_text(name)
    lines = [json.dumps({**pair, "id": name, "image": name}) + "\n" for name in names]
    source.write_text("".join(lines))

    def expected(name: str) -> bool:
        digest = hashlib.sha256(f"0:{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < 0.2 * 2**64

    validation = {name for name in names if expected(name)}
    assert validation
    for folder in ("src", "out", "out/deep"):
        out = tmp_path / folder / "m.jsonl"
        assert run("instruct", "mix", source, "--out", out, "--val", "0.2") == 0
        assert {row["id"] for row in rows(out) if row["split"] == "val"} == validation
        assert set(shown(out)) == set(names)


def test_captions_are_found_by_image_from_whichever_folder(tmp_path: Path) -> None:
    lung = in_folder(tmp_path / "pa", "Lung, H&E, with fibrosis.")
    pair = {"id": "1", "question": "Which organ is shown here?", "answer": "Lung.", "origin": "x"}
    wrong = {**pair, "id": "2", "question": "What is seen?", "answer": "A melanoma of the skin."}
    (tmp_path / "lists").mkdir()
    for name, image in (("lists", "../pa/images/1.png"), ("lists", "images/1.png"), ("pa", "")):
        made, good = tmp_path / name / "q.jsonl", tmp_path / "out/g.jsonl"
        image = image or "images/1.png"
        lines = [json.dumps({**row, "image": image}) + "\n" for row in (pair, wrong)]
        made.write_text("".join(lines))
        assert run("instruct", "filter", made, "--out", good, "--captions", lung) == 0
        assert [row["id"] for row in rows(good)] == ["1"], (name, image)


def test_generated_records_name_their_images_from_their_own_folder_and_are_paid_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lung = in_folder(tmp_path / "pa", "Lung, H&E, with fibrosis.")
    out = tmp_path / "new" / "o.jsonl"
    with Running(Endpoint()) as endpoint:
        words = ("instruct", "generate", lung, "--out", out, "--endpoint", url(endpoint))
        words = (*words, "--model", "m", "--price", "1,2")
        assert run(*words) == 0
        first = out.read_bytes()
        assert run(*words) == 0 and run(*words, "--workers", "2") == 0
        assert endpoint.requests == 1 and out.read_bytes() == first
    assert set(shown(out)) == {rows(lung)[0]["caption"]}


@pytest.mark.parametrize("verb", ["template", "filter", "mix", "stats", "generate"])
def test_no_verb_writes_over_what_it_reads_nor_into_a_folder(
    verb: str, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "t.jsonl"
    assert run("instruct", "template", source, "--out", pairs) == 0
    read = source if verb in ("template", "generate") else pairs
    before = read.read_bytes()
    more = ("--endpoint", "http://127.0.0.1:9/v1", "--model", "m") if verb == "generate" else ()
    (tmp_path / "link").symlink_to(read)
    capsys.readouterr()
    for out, words in (
        (read, "would overwrite"),
        (tmp_path / "link", "would overwrite"),
        (tmp_path, "it is a folder; give the name of a file"),
    ):
        assert run("instruct", verb, read, "--out", out, *more) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
    assert read.read_bytes() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["captions.csv", "link", "t.jsonl"]


def test_what_was_turned_away_is_not_replaced_by_what_is_turned_away_of_it(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "g.jsonl.rejected.jsonl"
    assert run("instruct", "template", source, "--out", pairs) == 0
    assert run("instruct", "filter", pairs, "--out", tmp_path / "g.jsonl") == 2
    assert "would overwrite" in capsys.readouterr().err and rows(pairs)


def test_a_mix_knows_what_its_pairs_cost_through_every_filter_once(tmp_path: Path) -> None:
    source, folder = tmp_path / "captions.csv", tmp_path / "kept"
    source.write_text("image,caption\na.png,Liver with fatty change.\n")
    made, good, short = tmp_path / "m.jsonl", folder / "good.jsonl", folder / "short.jsonl"
    with Running(Endpoint()) as endpoint:
        words = ("instruct", "generate", source, "--out", made, "--endpoint", url(endpoint))
        assert run(*words, "--model", "m", "--price", "1000,2000") == 0
        spent = (1000 * endpoint.input_tokens + 2000 * endpoint.output_tokens) / 1e6
    for kept in (good, short):
        assert run("instruct", "filter", made, "--out", kept, "--min-overlap", "0") == 0
    mixed, again = tmp_path / "h.jsonl", tmp_path / "i.jsonl"
    assert run("instruct", "mix", made, good, short, "--out", mixed, "--no-balance") == 0
    Path(f"{made}.ledger.sqlite").rename(tmp_path / "moved.ledger.sqlite")
    assert run("instruct", "mix", good, mixed, "--out", again, "--no-balance") == 0
    for out in (mixed, again):
        card = json.loads(Path(f"{out}.card.json").read_text())
        assert card["usd"] == pytest.approx(spent, abs=1e-6) and card["usd"] > 0
        assert [row["ledger"] for row in card["ledgers"]] == ["m.jsonl.ledger.sqlite"]


def test_a_card_of_something_else_is_named(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "t.jsonl"
    assert run("instruct", "template", source, "--out", made) == 0
    Path(f"{made}.card.json").write_text('{"ledgers": [{"usd": 1}]}')
    assert run("instruct", "mix", made, "--out", tmp_path / "h.jsonl") == 2
    assert "is not a card of filter or mix" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("card.json", "is not a card of filter or mix"), ("ledger.sqlite", "is not a ledger")],
)
def test_a_broken_card_or_ledger_shows_before_anything_is_sent_or_written(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    made, out = tmp_path / "t.jsonl", tmp_path / "new" / "g.jsonl"
    assert run("instruct", "template", source, "--out", made) == 0
    Path(f"{made}.{name}").write_text('{"ledgers": [{"usd": 1}]}')
    with Running(Endpoint()) as endpoint:
        blind = ("--blind-endpoint", url(endpoint), "--blind-model", "m")
        for verb, words in (("filter", blind), ("mix", ())):
            capsys.readouterr()
            assert run("instruct", verb, made, "--out", out, *words) == 2
            assert message in capsys.readouterr().err
        assert endpoint.requests == 0
    assert not list(tmp_path.glob("new/*"))


def test_a_ledger_that_a_relative_path_and_a_card_lead_to_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("captions.csv").write_text("image,caption\na.png,Liver with fatty change.\n")
    with Running(Endpoint()) as endpoint:
        words = ("generate", "captions.csv", "--out", "m.jsonl", "--endpoint", url(endpoint))
        assert run("instruct", *words, "--model", "m", "--price", "1000,2000") == 0
        spent = (1000 * endpoint.input_tokens + 2000 * endpoint.output_tokens) / 1e6
    good = os.path.join("..", "work", "good.jsonl")
    assert run("instruct", "filter", "m.jsonl", "--out", good, "--min-overlap", "0") == 0
    for files in (("m.jsonl", good), (good, "m.jsonl")):
        assert run("instruct", "mix", *files, "--out", "h.jsonl", "--no-balance") == 0
        card = json.loads(Path("h.jsonl.card.json").read_text())
        assert card["usd"] == pytest.approx(spent, abs=1e-6)
        assert [row["ledger"] for row in card["ledgers"]] == ["m.jsonl.ledger.sqlite"]


@pytest.mark.parametrize(
    "words",
    [
        *[("generate", "--budget", value) for value in ("nan", "inf", "-1")],
        *[("generate", "--timeout", value) for value in ("nan", "inf", "0")],
        *[("generate", "--poll", value) for value in ("nan", "0")],
        ("generate", "--attempts", "0"),
        *[("mix", "--share", f"file={value}") for value in ("nan", "inf", "-inf")],
        ("filter", "--blind-budget", "nan"),
        ("stats", "--samples", "-5"),
    ],
)
def test_what_is_no_number_or_below_its_range_is_one_line(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    verb, option, value = words
    file = tmp_path / "file.jsonl"
    assert run("instruct", "template", source, "--out", file) == 0
    arguments = ["instruct", verb, file, "--out", tmp_path / "o", option, value]
    if verb == "generate":
        arguments += ["--endpoint", "http://127.0.0.1:1/v1", "--model", "m"]
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert option in error and error.count("\n") == 1
    assert not (tmp_path / "o.ledger.sqlite").exists()
