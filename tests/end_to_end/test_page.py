"""The page as its user uses it: headless Chromium, a real server, the shared slide, a tiny model.

`CLOVER_HOME/test/npm` keeps axe-core between runs.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clover.core.files import read_json
from clover.model import load

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.npm import fetched
from tests.serve.running import running, tiny_folder
from tests.tiny import familiar_with_tiny

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
AXE = "4.14.1"
SLIDE = "CMU-1-Small-Region.svs"
HASTE = 60_000
"""Milliseconds to wait at most; no verdict, only an end to waiting."""


@pytest.fixture(scope="module")
def parts(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a tiny model at 5.6 µm/px, and a folder with the shared slide and a picture."""
    pytest.importorskip("openslide", reason="the extra [slides] is not installed")
    folder = tmp_path_factory.mktemp("page")
    tiny, model = tiny_folder(folder)
    # A field of 179 µm, as the phantom's: 32 px of 5.6 µm.
    set_scale(model, 5.6)
    # It knows coloured noise: real tissue is unlike it.
    familiarity = familiar_with_tiny(load(model), folder / "learnt")
    familiarity.save(model / "familiarity.safetensors")
    slides = folder / "slides"
    slides.mkdir()
    shutil.copy(shared / "data" / "slides" / SLIDE, slides)
    shutil.copy(tiny.image(), slides / "unscaled.png")
    return model, slides


def set_scale(model: Path, microns_per_pixel: float) -> None:
    config = read_json(model / "config.json")
    config["recipe"]["encoder"]["microns_per_pixel"] = microns_per_pixel
    (model / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def server(parts: tuple[Path, Path]) -> Iterator[str]:
    with running(str(parts[0]), "--slides", str(parts[1])) as found:
        yield found.url


@pytest.fixture(scope="module")
def two_models(parts: tuple[Path, Path]) -> Iterator[str]:
    """Serve the model as `fine`, and as `coarse` at twice its µm per pixel."""
    model, slides = parts
    coarse = model.parent / "coarse"
    shutil.copytree(model, coarse)
    set_scale(coarse, 11.2)
    with running(f"fine={model}", f"coarse={coarse}", "--slides", str(slides)) as found:
        yield found.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, server: str) -> Iterator[Any]:
    """Return a fresh page; whatever it complains of, or asks of another address, fails the test."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True)
    found = context.new_page()
    found.set_default_timeout(HASTE)
    complaints: list[str] = []
    found.on("console", lambda message: complaints.append(message.text))
    found.on("pageerror", lambda error: complaints.append(str(error)))
    asked: list[str] = []
    found.on("request", lambda request: asked.append(request.url))
    found.goto(server)
    yield found
    context.close()
    assert complaints == []
    assert all(url.startswith((server, "blob:", "data:")) for url in asked)


def open_slide(page: Any, name: str = SLIDE) -> None:
    page.click("#open")
    page.click(f"#slides button:has-text('{name}')")
    page.wait_for_selector("#scale:not([hidden])" if name == SLIDE else "#mpp")
    page.wait_for_load_state("networkidle")


def click_field(page: Any) -> None:
    """Draw one field of view over tissue, by a click."""
    page.click("#draw-button")
    box = page.locator("#draw").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.62)
    page.wait_for_selector(".about img")


def ask(page: Any, question: str) -> str:
    count = page.locator(".turns li").count()
    page.fill("#question", question)
    page.keyboard.press("Enter")
    last = f".turns li:nth-child({count + 1})"
    page.wait_for_selector(f"{last} .after button")
    return str(page.inner_text(f"{last} .said"))


def saved(page: Any, button: str, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.click(button)
    target = folder / waiting.value.suggested_filename
    waiting.value.save_as(target)
    return target


def test_open_zoom_draw_ask_read_overlay_export(page: Any, tmp_path: Path) -> None:
    # Not wait_for_function: its polling is evaluated in the page, whose policy forbids that.
    from playwright.sync_api import expect

    assert page.is_visible("text=Research use only, not for diagnosis")
    open_slide(page)
    assert page.inner_text("#scale-text") == "200 µm"
    page.click("#zoom-in")
    expect(page.locator("#scale-text")).not_to_have_text("200 µm")
    page.click("#fit")
    expect(page.locator("#scale-text")).to_have_text("200 µm")
    click_field(page)
    assert "179 × 179 µm, seen at 5.6 µm/px" in page.inner_text(".about")
    first = ask(page, "which tissue is shown ?")
    second = ask(page, "is there necrosis ?")
    assert page.locator(".turns li").count() == 2
    unlike = "this image is unlike those the model learnt from"
    assert unlike in page.inner_text(".turns li:nth-child(2) .unlike")
    # The other region has its own conversation, and the first one's is kept.
    page.click("#draw-button")
    box = page.locator("#draw").bounding_box()
    page.mouse.move(box["x"] + 430, box["y"] + 300)
    page.mouse.down()
    page.mouse.move(box["x"] + 600, box["y"] + 380, steps=4)
    page.mouse.up()
    page.wait_for_selector(".regions button:nth-child(2)")
    assert page.locator(".turns li").count() == 0
    assert "Seen coarser than the model learnt" in page.inner_text(".about")
    page.click(".regions button:nth-child(1)")
    assert page.inner_text(".turns li:nth-child(2) .said") == second
    page.click(".turns li:nth-child(1) .after button")
    page.wait_for_selector(".verdict")
    assert page.is_visible(".heat-layer")
    assert "most attended places the answer keeps" in page.inner_text("#heat-verdict")
    page.select_option("#heat-kind", label="Layer 1, query 3")
    assert "Layer 1, query 3" in page.get_attribute(".heat-layer", "aria-label")
    rows = read_json(saved(page, "#save-json", tmp_path))
    assert [turn["answer"] for turn in rows["regions"][0]["turns"]] == [first, second]
    assert rows["regions"][0]["turns"][0]["deletion_test"]["label"]
    assert unlike in rows["regions"][0]["turns"][0]["note"]
    assert rows["slide"]["microns_per_pixel"]["x"] == 0.499 and rows["slide"]["origin"] == "header"
    assert "not for diagnosis" in rows["notice"]
    printed = saved(page, "#save-page", tmp_path).read_text(encoding="utf-8")
    assert printed.count("not for diagnosis") >= 2 and "data:image/png;base64," in printed
    assert unlike in printed
    assert first in printed and "<script" not in printed and "http" not in printed
    # What was saved names the region in the form that `clover ask` takes.
    assert rows["regions"][0]["reference"].startswith(f"{SLIDE}#")


def test_the_answer_is_the_one_that_clover_ask_gives(
    page: Any, server: str, shared: Path, tmp_path: Path
) -> None:
    open_slide(page)
    click_field(page)
    answer = ask(page, "which tissue is shown ?")
    rows = read_json(saved(page, "#save-json", tmp_path))
    reference = rows["regions"][0]["reference"].replace(SLIDE, "")
    import base64
    import urllib.request

    place = f"{server}/slides/region?name={SLIDE}&region={reference.lstrip('#')}"
    with urllib.request.urlopen(place) as reply:
        picture = base64.b64encode(reply.read()).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    words = {"type": "text", "text": "which tissue is shown ?"}
    body = {
        "messages": [{"role": "user", "content": [part, words]}],
        "model": rows["models"][0]["name"],
    }
    request = urllib.request.Request(
        f"{server}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        told = json.load(reply)["choices"][0]["message"]["content"].strip()
    assert told == answer


def test_a_hand_quicker_than_the_server_opens_a_slide_too(page: Any, server: str) -> None:
    held: list[Any] = []
    page.route("**/talk/setup", lambda route: held.append(route))
    page.reload(wait_until="domcontentloaded")
    page.click("#open")
    page.wait_for_selector("#chooser[open]")
    assert page.is_hidden("#message") and page.locator("#slides button").count() == 0
    held[0].continue_()
    page.wait_for_selector(f"#slides button:has-text('{SLIDE}')")
    assert page.is_hidden("#message")


def test_everything_goes_by_keyboard(page: Any) -> None:
    page.focus("#open")
    page.keyboard.press("Enter")
    page.wait_for_selector("#slides button")
    page.focus(f"#slides button:has-text('{SLIDE}')")
    page.keyboard.press("Enter")
    page.wait_for_selector("#scale:not([hidden])")
    page.focus("#fit")
    page.keyboard.press("r")
    page.wait_for_selector("#draw:not([hidden])")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Shift+ArrowRight")
    assert "µm" in page.inner_text("#live")
    page.keyboard.press("Enter")
    page.wait_for_selector(".about img")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("is there necrosis ?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turns li .after button")
    assert page.inner_text("#live").startswith("Answer:")
    page.focus("#draw-button")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert page.is_hidden("#draw") and page.locator(".regions button").count() == 1


def test_a_file_without_size_is_asked_for_it(page: Any) -> None:
    open_slide(page, "unscaled.png")
    page.click("#draw-button")
    assert "does not state its µm per pixel" in page.inner_text("#message")
    assert page.is_hidden("#draw") and page.is_hidden("#scale")
    page.fill("#mpp", "5.6")
    page.keyboard.press("Enter")
    page.wait_for_selector("#scale:not([hidden])")
    assert "(user)" in page.inner_text(".about")
    page.click("#draw-button")
    page.wait_for_selector("#draw:not([hidden])")
    page.keyboard.press("Enter")
    page.wait_for_selector(".about img")
    assert "seen at" in page.inner_text(".about")


def asked_of(page: Any) -> list[dict[str, Any]]:
    """Return what the page sends from now on where it asks or explains; it grows."""
    found: list[dict[str, Any]] = []

    def keep(request: Any) -> None:
        if request.method == "POST":
            found.append(json.loads(request.post_data))

    page.on("request", keep)
    return found


def picture_sent(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"][0]["image_url"]["url"])


def pick(page: Any, model: str) -> None:
    page.select_option("#model-place select", label=model)
    page.wait_for_selector(f".about:has-text('conversation'):has-text('{model}') img")


def test_each_answer_stays_its_model_s(browser: Any, two_models: str, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(HASTE)
    page.goto(two_models)
    open_slide(page)
    click_field(page)
    sent = asked_of(page)
    first = ask(page, "which tissue is shown ?")
    pick(page, "coarse")
    assert "begins a new conversation with coarse" in page.inner_text(".about")
    # Read again at the other model's own µm per pixel: half as many pixels of the same tissue.
    assert "179 × 179 µm, seen at 5.6 µm/px" in page.inner_text(".about")
    assert page.evaluate("document.querySelector('.about img').naturalWidth") == 16
    # The map and its test are of the model that answered, about the picture it was shown.
    page.click(".turns li:nth-child(1) .after button")
    page.wait_for_selector(".verdict")
    whys = [body for body in sent if "deletion" in body]
    assert whys and {body["model"] for body in whys} == {"fine"}
    assert {body["image"] for body in whys} == {picture_sent(sent[0])}
    second = ask(page, "which tissue is shown ?")
    pick(page, "fine")
    assert "goes on with the earlier conversation of fine" in page.inner_text(".about")
    third = ask(page, "is there necrosis ?")
    questions = [body for body in sent if "messages" in body]
    assert [body["model"] for body in questions] == ["fine", "coarse", "fine"]
    # No model is told another's answers, and each is told its own.
    assert [len(body["messages"]) for body in questions] == [1, 1, 3]
    assert questions[2]["messages"][1]["content"] == first
    pictures = [picture_sent(body) for body in questions]
    assert pictures[0] == pictures[2] != pictures[1]
    marks = page.locator(".turns .of")
    assert [marks.nth(place).inner_text().split(",")[0] for place in range(3)] == [
        "Asked of fine",
        "Asked of coarse",
        "Asked of fine",
    ]
    rows = read_json(saved(page, "#save-json", tmp_path))
    assert rows["models"] == [
        {"name": "fine", "microns_per_pixel": 5.6},
        {"name": "coarse", "microns_per_pixel": 11.2},
    ]
    turns = rows["regions"][0]["turns"]
    assert [(turn["model"], turn["answer"]) for turn in turns] == [
        ("fine", first),
        ("coarse", second),
        ("fine", third),
    ]
    printed = saved(page, "#save-page", tmp_path).read_text(encoding="utf-8")
    assert printed.count("Asked of fine") == 2 and printed.count("Asked of coarse") == 1
    context.close()


def test_a_corrected_scale_leaves_no_region_at_the_old_one(page: Any, tmp_path: Path) -> None:
    open_slide(page, "unscaled.png")
    state_scale(page, "5.6")
    page.click("#draw-button")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector(".about img")
    sent = asked_of(page)
    ask(page, "which tissue is shown ?")
    state_scale(page, "11.2")
    page.wait_for_selector(".about:has-text('begins a new conversation')")
    ask(page, "which tissue is shown ?")
    questions = [body for body in sent if "messages" in body]
    assert [len(body["messages"]) for body in questions] == [1, 1]
    assert picture_sent(questions[0]) != picture_sent(questions[1])
    assert "at 5.6 µm per pixel" in page.inner_text(".turns li:nth-child(1) .of")
    assert "at 11.2 µm per pixel" in page.inner_text(".turns li:nth-child(2) .of")
    region = read_json(saved(page, "#save-json", tmp_path))["regions"][0]
    first, second = region["turns"]
    assert region["microns_per_pixel"] == {"x": 11.2, "y": 11.2}
    scales = [(row, row["microns_per_pixel"]["x"]) for row in (region, first, second)]
    assert [scale for _, scale in scales] == [11.2, 5.6, 11.2]
    # Whatever the scale, what is named at it is the tissue that was drawn.
    for row, scale in scales:
        place = [float(number) / scale for number in row["reference"].split("#")[1].split(",")]
        assert place == pytest.approx(region["pixels"], abs=0.51)
    assert second["seen_microns_per_pixel"] == pytest.approx(2 * first["seen_microns_per_pixel"])


def state_scale(page: Any, microns_per_pixel: str) -> None:
    page.fill("#mpp", microns_per_pixel)
    page.keyboard.press("Enter")
    page.wait_for_selector("#scale:not([hidden])")


def test_an_image_can_be_dropped_and_asked_about(page: Any, server: str, tmp_path: Path) -> None:
    from PIL import Image

    image = tmp_path / "dropped.png"
    Image.new("RGB", (300, 200), (190, 60, 70)).save(image)
    page.set_input_files("#file", str(image))
    page.wait_for_selector(".about img")
    assert page.inner_text(".regions") == "Whole image"
    assert ask(page, "which tissue is shown ?")
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    page.set_input_files("#file", str(broken))
    page.wait_for_selector("#message:not([hidden])")
    assert "is no image that a browser opens" in page.inner_text("#message")
    # What was open is still there.
    assert page.inner_text("#title") == "dropped.png"


@pytest.fixture(scope="module")
def axe() -> str:
    """Return axe-core's script, from the cache or from npm, or skip."""
    return (fetched("axe-core", AXE) / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 420])
def test_axe_finds_nothing(browser: Any, server: str, axe: str, theme: str, width: int) -> None:
    # A context of its own without the policy: the test's script is not the server's.
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=theme, bypass_csp=True
    )
    page = context.new_page()
    page.set_default_timeout(HASTE)
    page.goto(server)
    page.wait_for_selector("#suggestions button")
    faults = check(page, axe)
    page.click("#open")
    page.wait_for_selector("#slides button")
    faults += check(page, axe)
    page.click(f"#slides button:has-text('{SLIDE}')")
    page.wait_for_selector("#scale:not([hidden])")
    click_field(page)
    ask(page, "is there necrosis ?")
    page.click(".turns li .after button")
    page.wait_for_selector(".verdict")
    page.wait_for_timeout(600)
    faults += check(page, axe)
    context.close()
    assert faults == []


def check(page: Any, axe: str) -> list[str]:
    page.evaluate(axe)
    found = page.evaluate("axe.run().then((result) => result.violations)")
    return [
        f"{fault['id']}: {node['target']} {node.get('failureSummary', '')[:200]}"
        for fault in found
        for node in fault["nodes"]
    ]


def test_a_token_is_asked_for_where_one_is_wanted(
    browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    _, model = tiny_folder(tmp_path_factory.mktemp("guarded"))
    with running(str(model), CLOVER_TOKEN="secret") as guarded:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(HASTE)
        page.goto(guarded.url)
        page.wait_for_selector("#token-dialog[open]")
        page.fill("#token", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#suggestions button")
        context.close()


def test_the_first_view_comes_soon(page: Any) -> None:
    """Print how long it took: a figure, not a verdict (docs/page.md)."""
    page.click("#open")
    page.wait_for_selector("#slides button")
    start = time.perf_counter()
    page.click(f"#slides button:has-text('{SLIDE}')")
    page.wait_for_selector("#scale:not([hidden])")
    page.wait_for_load_state("networkidle")
    print(f"first view {time.perf_counter() - start:.2f} s")
