"""Routes of page and slides: what they send, and that no file outside the folder is ever sent."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from clover.core.errors import CloverError
from clover.core.files import read_json
from clover.model import load
from clover.serve.app import create_app
from clover.serve.engine import Engine
from clover.serve.page.folder import SlideFolder
from clover.serve.page.router import POLICY, STATIC, page_router, static_files
from clover.serve.request import Served
from clover.serve.settings import ServeSettings
from tiny import QUESTION, Tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two pictures, with secrets beside it and links that lead out."""
    base = tmp_path_factory.mktemp("served")
    root = base / "slides"
    (root / "case 1").mkdir(parents=True)
    rows, columns = np.mgrid[:300, :400]
    image = np.stack([columns / 2, rows / 2, 0 * rows + 90], axis=-1).astype(np.uint8)
    Image.fromarray(image).save(root / "case 1" / "a.png")
    Image.fromarray(image[:64, :64]).save(root / "small.png")
    Image.fromarray(image).save(base / "secret.png")
    (root / "notes.txt").write_text("secret")
    (root / ".hidden.png").write_bytes((root / "small.png").read_bytes())
    os.symlink(base / "secret.png", root / "link.png")
    os.symlink(base, root / "up")
    (root / "broken.png").write_bytes((root / "small.png").read_bytes()[:90])
    return root


def model_with_scale(tiny_model: Path, to: Path, mpp: float | None) -> Path:
    shutil.copytree(tiny_model, to)
    config = read_json(to / "config.json")
    config["recipe"]["encoder"]["microns_per_pixel"] = mpp
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.fixture(scope="module")
def client(
    tiny_model: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    model = load(model_with_scale(tiny_model, tmp_path_factory.mktemp("m") / "m", 2.0))
    settings = ServeSettings(token="t")
    engine = Engine([Served("tiny", model.language, model)], settings)
    app = create_app(engine, settings, routers=[page_router(SlideFolder(folder))])
    with TestClient(
        app, base_url="http://127.0.0.1", headers={"Authorization": "Bearer t"}
    ) as found:
        yield found
    engine.close()


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_only_slides_inside_the_folder_are_listed(client: TestClient) -> None:
    names = {row["name"] for row in client.get("/slides").json()["slides"]}
    assert names == {"broken.png", "case 1/a.png", "small.png"}


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "case 1/../../secret.png",
        "/etc/passwd",
        "link.png",
        "up/secret.png",
        "notes.txt",
        ".hidden.png",
        "case 1//a.png",
        "./small.png",
        "..\\secret.png",
        "small.png\x00.svs",
        "%2e%2e/secret.png",
        "",
        "case 1",
        "x" * 5000 + ".png",
    ],
)
def test_no_trick_with_a_path_opens_another_file(client: TestClient, name: str) -> None:
    for route in ("info", "thumbnail", "tile/0/0/0", "region"):
        given = {"name": name, "region": "0,0,10,10", "mpp": "1"}
        answer = client.get(f"/slides/{route}", params=given)
        assert answer.status_code == 404, (route, answer.text)
        assert "no slide" in answer.json()["error"]["message"]
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "path", ["../router.py", "..%2frouter.py", "%2e%2e/router.py", "vendor", "absent.js", ""]
)
def test_only_the_page_s_own_files_are_static(client: TestClient, path: str) -> None:
    answer = client.get(f"/page/static/{path}")
    assert answer.status_code in (404, 422) and "import" not in answer.text


def test_the_page_needs_no_token_and_its_data_do(client: TestClient, folder: Path) -> None:
    bare = {"Authorization": ""}
    assert client.get("/", headers=bare).status_code == 200
    assert client.get("/page/static/main.js", headers=bare).status_code == 200
    for path in ("/slides", "/slides/info?name=small.png", "/talk/setup"):
        assert client.get(path, headers=bare).status_code == 401
    assert client.post("/talk/why", headers=bare, json={}).status_code == 401


def test_every_static_file_is_sent_with_the_policy_and_names_no_other_address(
    client: TestClient,
) -> None:
    assert len(static_files()) >= 10
    for name in static_files():
        answer = client.get(f"/page/static/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY and "http" not in POLICY
    own = [path for name, path in static_files().items() if not name.startswith("vendor/")]
    texts = [path.read_text(encoding="utf-8") for path in own]
    assert not any("https://" in text or "style=" in text for text in texts)
    assert (STATIC / "vendor" / "openseadragon" / "LICENSE.txt").is_file()


def test_info_says_size_and_origin_and_asks_where_it_is_unknown(client: TestClient) -> None:
    plain = client.get("/slides/info", params={"name": "case 1/a.png"}).json()
    assert (plain["width"], plain["height"], plain["levels"]) == (400, 300, 10)
    assert plain["microns_per_pixel"] is None and plain["origin"] is None
    stated = client.get("/slides/info", params={"name": "case 1/a.png", "mpp": "0.5"}).json()
    assert stated["microns_per_pixel"] == {"x": 0.5, "y": 0.5} and stated["origin"] == "user"


def test_a_region_comes_at_the_model_s_resolution(client: TestClient) -> None:
    place = {"name": "case 1/a.png", "region": "20,10,64,48", "mpp": "0.5"}
    answer = client.get("/slides/region", params=place)
    picture = Image.open(io.BytesIO(answer.content))
    assert answer.headers["content-type"] == "image/png" and picture.size == (32, 24)
    # Red rises with x, half a level a pixel: the middle of the region is at 104 px.
    assert int(np.asarray(picture)[12, 16, 0]) == pytest.approx(52, abs=2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"region": "20,10,64,48"}, "does not state its µm per pixel"),
        ({"region": "20,10,640,48", "mpp": "0.5"}, "reaches beyond a.png"),
        ({"region": "-0.2,0,0.1,10", "mpp": "0.5"}, "less than 0.01 of a pixel of a.png"),
        ({"region": "here", "mpp": "0.5"}, "'here' is no region"),
        ({"region": "0,0,10,10", "mpp": "huge"}, "is no size of a pixel"),
    ],
)
def test_a_wrong_region_is_one_line(client: TestClient, given: dict[str, str], words: str) -> None:
    answer = client.get("/slides/region", params={"name": "case 1/a.png", **given})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 422 and words in message and "\n" not in message
    assert "/tmp" not in message and "served" not in message


def test_a_broken_slide_is_one_line_and_the_server_lives_on(client: TestClient) -> None:
    answer = client.get("/slides/info", params={"name": "broken.png"})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 422 and "cannot be read" in message and "/slides/" not in message
    assert client.get("/slides/tile/9/0/0", params={"name": "case 1/a.png"}).status_code == 200
    assert client.get("/slides/tile/9/9/9", params={"name": "case 1/a.png"}).status_code == 422


def test_why_gives_maps_chance_and_deletion(client: TestClient, tiny: Tiny) -> None:
    body = {"image": data_uri(tiny.image()), "question": QUESTION, "answer": "yes"}
    found = client.post("/talk/why", json=body | {"deletion": True}).json()
    assert found["grid"] == 4 and len(found["rollout"]) == 16
    assert sum(found["rollout"]) == pytest.approx(1, abs=1e-3)
    assert len(found["layers"]) == 1 and len(found["layers"][0]["queries"]) == 4
    assert 0 < found["yes"] < 1
    test = found["deletion"]
    assert test["label"] in ("faithful", "weak", "not faithful") and len(test["attended"]) == 3
    plain = client.post("/talk/why", json=body | {"answer": "liver"}).json()
    assert plain["yes"] is None and "deletion" not in plain


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"image": "https://example.org/a.png"}, 422),
        ({"image": "data:image/png;base64,AAAA"}, 422),
        ({"model": "other"}, 404),
        ({"question": ""}, 422),
        ({"deletion": True, "answer": " "}, 422),
    ],
)
def test_why_refuses_in_openai_s_shape(
    client: TestClient, tiny: Tiny, change: dict[str, object], status: int
) -> None:
    body = {"image": data_uri(tiny.image()), "question": QUESTION, "answer": "yes"} | change
    answer = client.post("/talk/why", json=body)
    assert answer.json()["error"]["message"]
    # The API answers 400 to a body that is not of its form.
    assert answer.status_code == status or (status == 422 and answer.status_code == 400)


def test_a_folder_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CloverError, match=r"--slides .* is no folder"):
        SlideFolder(tmp_path / "absent")
