"""A conversation about one image or field of a slide: commands, turns, answers piece by piece.

In: lines that somebody types. Out: pieces of text through `write`. It knows no terminal, so that
a test, a pipe and a person drive the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from clover.core.assets import expanded
from clover.core.errors import CloverError, nearest
from clover.core.files import atomic_path, write_json
from clover.serve.slide_ask import View, open_for
from clover.slides.region import Region, parse_region

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from clover.language.protocol import GenerationSettings
    from clover.model import Clover

_OVERVIEW = 512
"""Longer side in pixels of a slide's overview."""


@cache
def words() -> dict[str, Any]:
    """Return the example questions and the commands, from `chat.yaml`."""
    text = (Path(__file__).parent / "chat.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def help_text() -> str:
    """Return the commands and three questions to begin with."""
    commands = [f"  {name:<12} {text}" for name, text in words()["commands"].items()]
    examples = [f"  {question}" for question in words()["examples"]]
    return "\n".join(["Ask for instance:", *examples, "Commands:", *commands])


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str
    seconds: float
    is_stopped: bool = False
    """Whether Ctrl-C cut the answer short."""

    def row(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        row = {"question": self.question, "answer": self.answer, "seconds": self.seconds}
        return row | ({"stopped": True} if self.is_stopped else {})


@dataclass
class Conversation:
    """A model, an image, and the turns so far.

    Attributes:
        model: That answers.
        write: Takes text without a line break at its end.
        settings: Decoding; the recipe's when absent.
        mpp: Of files that do not state their µm per pixel: a number, or 'estimate'.
        image: What is looked at; None before an image, or a field of a slide, was named.
        draw: Turns a picture into what this terminal shows; none where it shows no pictures.
    """

    model: Clover
    write: Callable[[str], None]
    settings: GenerationSettings | None = None
    mpp: str | None = None
    image: str | None = None
    turns: list[Turn] = field(default_factory=list)
    draw: Callable[[Image.Image], str] | None = None
    file: Path | None = None
    """Where /region reads."""
    _features: Tensor | None = None
    _picture: Image.Image | None = None

    def look_at(self, path: str) -> None:
        """Read an image, a field ``slide.svs#x,y,w,h``, or open a whole slide, and begin anew.

        Of a whole slide nothing is asked before /region names a field.

        Raises:
            CloverError: it cannot be read; the conversation is as it was.
        """
        from clover.model import open_image
        from clover.slides.picture import is_whole_slide
        from clover.slides.region import split_reference

        name = path.strip().strip("'\"")
        if not name:
            raise CloverError("/image wants a path, for instance /image slide-17.png")
        file, region = split_reference(expanded(name))
        if region is not None:
            self._look_at_region(file, region)
        elif is_whole_slide(file):
            self._open_slide(file)
        else:
            self._begin(name, open_image(file), file)

    def _begin(self, name: str, picture: Image.Image, file: Path) -> None:
        self._features = self.model.encode(picture)
        self.image, self.turns, self._picture, self.file = name, [], picture, file
        if self.draw is not None:
            self.write(self.draw(picture))
        if (note := self.model.note_on(self._features)) is not None:
            self.write(note + "\n")

    def _open_slide(self, file: Path) -> None:
        """Say how large a slide is; the fields of it are what is asked about."""
        with open_for(file, self.mpp) as slide:
            extent = slide.extent
            if self.draw is not None:
                self.write(self.draw(slide.overview(_OVERVIEW)))
        field_um = self.model.field_um
        self.image, self.turns, self._picture, self._features = None, [], None, None
        self.file = file
        self.write(
            f"{file} is a slide of {extent.width:.0f} x {extent.height:.0f} µm. Name the field to "
            f"ask about: /region x,y,width,height in µm; the model's own is {field_um:.0f} µm "
            "wide.\n"
        )

    def _look_at_region(self, file: Path, region: Region) -> None:
        learnt, side = self.model.microns_per_pixel, self.model.recipe.encoder.image_size
        with open_for(file, self.mpp) as slide:
            view = View(slide.read(region, learnt), region, learnt, side)
        self._begin(f"{file}#{region}", view.picture, file)
        if (note := view.note()) is not None:
            self.write(note + "\n")

    def _say_what_is_seen(self) -> None:
        if self.image is not None:
            self.write(f"Looking at {self.image}; a new conversation.\n")

    def take(self, line: str) -> bool:
        """Do what a line says; return whether the conversation goes on.

        Raises:
            CloverError: a mistake that the conversation survives.
        """
        line = line.strip()
        if not line:
            return True
        if line.startswith("/") and not (self.image is None and Path(line).is_file()):
            return self._command(line)
        if self.image is None and self.file is not None and not expanded(line).is_file():
            raise CloverError(
                f"{self.file} is a whole slide; name a field of it first, for instance "
                "/region 1200,800,180,180"
            )
        if self.image is None:
            self.look_at(line)
            self._say_what_is_seen()
        else:
            self._answer(line)
        return True

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        if name == "/image":
            self.look_at(rest)
            self._say_what_is_seen()
        elif name == "/region":
            if self.file is None:
                raise CloverError("/region wants a slide first; open one with /image slide.svs")
            self._look_at_region(self.file, parse_region(rest))
            self._say_what_is_seen()
        elif name == "/new":
            self.turns = []
            self.write("A new conversation about the same image.\n")
        elif name == "/save":
            self._save(rest.strip().strip("'\""))
        elif name == "/why":
            self._explain(rest.strip().strip("'\""))
        elif name == "/help":
            self.write(help_text() + "\n")
        else:
            known = [item.split()[0] for item in words()["commands"]]
            raise CloverError(f"no command {name}{nearest(name, known)}")
        return True

    def _answer(self, question: str) -> None:
        assert self._features is not None, "an image was looked at"
        start = time.perf_counter()
        pieces: list[str] = []
        before = [(turn.question, turn.answer) for turn in self.turns]
        is_stopped = False
        try:
            for piece in self.model.stream(
                self._features, before, question, settings=self.settings
            ):
                pieces.append(piece)
                self.write(piece)
        except KeyboardInterrupt:
            is_stopped = True
        self.write(" … (stopped)\n" if is_stopped else "\n")
        seconds = round(time.perf_counter() - start, 3)
        self.turns.append(Turn(question, "".join(pieces).strip(), seconds, is_stopped))

    def _explain(self, name: str) -> None:
        """Write the picture with where the queries looked at the last question."""
        from clover.explain import explain
        from clover.serve.overlay import overlay

        if not self.turns or self._features is None or self._picture is None:
            raise CloverError("/why wants a question first; ask one, then /why")
        path = expanded(name or "why.png")
        if path.suffix.lower() != ".png":
            raise CloverError(f"/why writes a PNG; name it for instance {path.stem}.png")
        last = self.turns[-1]
        found = explain(self.model, self._features, last.question, last.answer)
        shown = overlay(self._picture, found.maps.rollout())
        with atomic_path(path) as partial:
            shown.save(partial, format="PNG")
        if self.draw is not None:
            self.write(self.draw(shown))
        self.write(
            f"{path}: where the model looked when asked {last.question!r}. Deletion test: "
            f"{found.deletion.label}; without these places the answer's log-likelihood falls by "
            f"{found.deletion.gain:.2f} more than without random ones.\n"
        )

    def _save(self, name: str) -> None:
        from clover.model import NOTICE

        if not name:
            raise CloverError("/save wants a file, for instance /save conversation.json")
        path = expanded(name)
        content = {
            "model": self.model.name,
            "notice": NOTICE,
            "image": self.image,
            "turns": [turn.row() for turn in self.turns],
        }
        write_json(path, content)
        self.write(f"{len(self.turns)} turns written to {path}.\n")
