"""A conversation about one image: commands, turns, and answers piece by piece.

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

from clover.core.errors import CloverError, nearest
from clover.core.files import atomic_path, write_json

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from clover.language.protocol import GenerationSettings
    from clover.model import Clover


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
    """

    model: Clover
    write: Callable[[str], None]
    settings: GenerationSettings | None = None
    image: str | None = None
    turns: list[Turn] = field(default_factory=list)
    draw: Callable[[Image.Image], str] | None = None
    """Turns a picture into what this terminal shows; none where it shows no pictures."""
    _features: Tensor | None = None
    _picture: Image.Image | None = None

    def look_at(self, path: str) -> None:
        """Read an image and begin anew.

        Raises:
            CloverError: it cannot be read; the conversation is as it was.
        """
        from clover.model import open_image

        name = path.strip().strip("'\"")
        if not name:
            raise CloverError("/image wants a path, for instance /image slide-17.png")
        picture = open_image(Path(name).expanduser())
        self._features = self.model.encode(picture)
        self.image, self.turns, self._picture = name, [], picture
        if self.draw is not None:
            self.write(self.draw(picture))

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
        if self.image is None:
            self.look_at(line)
            self.write(f"Looking at {self.image}.\n")
        else:
            self._answer(line)
        return True

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        if name == "/image":
            self.look_at(rest)
            self.write(f"Looking at {self.image}; a new conversation.\n")
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
        path = Path(name or "why.png").expanduser()
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
        path = Path(name).expanduser()
        content = {
            "model": self.model.name,
            "notice": NOTICE,
            "image": self.image,
            "turns": [turn.row() for turn in self.turns],
        }
        write_json(path, content)
        self.write(f"{len(self.turns)} turns written to {path}.\n")
