"""One question over all the tissue of a slide: a field at a time, then counts and a heat map.

In: a model, an open slide, a question. Out: `tour.jsonl` (an answer a field, kept as they come, so
that a stopped tour goes on where it was), `tour.json` (counts, agreement) and `heat-map.png`.

Counts say how many fields got an answer; they are no diagnosis of the slide.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clover.core.errors import CloverError
from clover.core.files import atomic_path, fingerprint, growing, write_json
from clover.core.terminal import progress
from clover.explain import YES_NO, first_word, yes_probability
from clover.slides.field import spread, tissue_fields
from clover.slides.region import Region, parse_region

if TYPE_CHECKING:
    from clover.language.protocol import GenerationSettings
    from clover.model import Clover
    from clover.slides.reader import Slide

_BATCH = 8


@dataclass(frozen=True)
class FieldAnswer:
    """What was said of one field."""

    region: Region
    answer: str
    yes: float | None
    """Probability of yes against no; None where the answer is neither."""

    def row(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        row: dict[str, Any] = {"region": str(self.region), "answer": self.answer}
        return row if self.yes is None else row | {"yes": round(self.yes, 4)}


@dataclass(frozen=True)
class Tour:
    """A question over a slide.

    Attributes:
        question: As asked.
        side_um: Side of a field.
        fields: The answers, row by row.
        num_tissue: Fields with tissue, of which `fields` are all or an even sample.
        model: The model's name.
    """

    question: str
    side_um: float
    fields: list[FieldAnswer]
    num_tissue: int
    model: str

    @cached_property
    def read(self) -> list[str]:
        """The answers as they are counted, one a field."""
        return read_answers([item.answer for item in self.fields])

    def counts(self) -> list[tuple[str, int]]:
        """Return answers as read and how many fields got them, the commonest first."""
        found = Counter(self.read)
        return sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))

    @property
    def agreement(self) -> float:
        """The commonest answer's share of the fields."""
        return self.counts()[0][1] / len(self.fields)

    def row(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        from clover.model import NOTICE

        return {
            "question": self.question,
            "model": self.model,
            "field_um": round(self.side_um, 2),
            "tissue_fields": self.num_tissue,
            "asked": len(self.fields),
            "counts": dict(self.counts()),
            "agreement": round(self.agreement, 4),
            "fields": [item.row() for item in self.fields],
            "notice": NOTICE,
        }


def read_answers(answers: Sequence[str]) -> list[str]:
    """Return each answer as it is counted: spelling and politeness make no other answer.

    Where most answers begin with yes or no the question was one of yes or no, and such an answer
    is read as that word. Any other is told apart without capitals, spaces and its last full stop,
    and named by its commonest spelling.
    """
    words = [first_word(answer) for answer in answers]
    is_closed = 2 * sum(word in YES_NO for word in words) > len(words)
    forms = [
        word if is_closed and word in YES_NO else _form(answer)
        for word, answer in zip(words, answers, strict=True)
    ]
    spellings: dict[str, Counter[str]] = {}
    for form, answer in zip(forms, answers, strict=True):
        spellings.setdefault(form, Counter())[" ".join(answer.split()).rstrip(".")] += 1
    names = {
        form: min(found, key=lambda text: (-found[text], text)) for form, found in spellings.items()
    }
    return [form if is_closed and form in YES_NO else names[form] for form in forms]


def _form(answer: str) -> str:
    return " ".join(answer.lower().split()).rstrip(".")


def run_tour(
    model: Clover,
    slide: Slide,
    question: str,
    *,
    settings: GenerationSettings,
    out: Path,
    within: Region | None = None,
    most: int = 100,
) -> Tour:
    """Ask the question of every tissue field, or of an even sample.

    Args:
        model: That answers; it must state its µm per pixel.
        slide: An open slide.
        question: In words.
        settings: Decoding.
        out: A folder; made when absent. A tour that was stopped goes on.
        within: Only here.
        most: Fields to ask at most.

    Raises:
        CloverError: no tissue, no µm per pixel, or the folder holds another tour.
    """
    side = model.field_um
    found = tissue_fields(slide, side_um=side, within=within)
    chosen = spread(found, most)
    key = _key(model, slide, question, settings)
    path = out / "tour.jsonl"
    known = _read(path, key)
    out.mkdir(parents=True, exist_ok=True)
    missing = [region for region in chosen if str(region) not in known]
    done = len(chosen) - len(missing)
    with (
        progress("tour", len(chosen), done=done) as advance,
        growing(path),
        path.open("a", encoding="utf-8") as handle,
    ):
        for start in range(0, len(missing), _BATCH):
            regions = missing[start : start + _BATCH]
            for item in _ask(model, slide, regions, question, settings):
                known[str(item.region)] = item
                handle.write(json.dumps({"key": key} | item.row(), ensure_ascii=False) + "\n")
            handle.flush()
            advance(len(regions))
    fields = [known[str(region)] for region in chosen]
    tour = Tour(question, side, fields, len(found), model.name)
    write_json(out / "tour.json", tour.row())
    draw_heat_map(slide, tour, out / "heat-map.png")
    return tour


def _key(model: Clover, slide: Slide, question: str, settings: GenerationSettings) -> str:
    weights = {name: float(item.sum()) for name, item in model.bridge.state_dict().items()}
    file = slide.path.stat()
    scale = slide.scale
    return fingerprint(
        [
            model.encoder.revision,
            model.language.id,
            weights,
            [slide.path.name, file.st_size, file.st_mtime_ns, scale.x, scale.y],
            [question, model.field_um, vars(settings)],
            *([model.word_pull] if model.word_pull else []),
        ]
    )


def _read(path: Path, key: str) -> dict[str, FieldAnswer]:
    known: dict[str, FieldAnswer] = {}
    if not path.is_file():
        return known
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that was being written when it was stopped
        if row.get("key") != key:
            raise CloverError(
                f"{path} is of another question, slide or model; give another folder with --out"
            )
        item = FieldAnswer(parse_region(row["region"]), row["answer"], row.get("yes"))
        known[row["region"]] = item
    return known


def _ask(
    model: Clover,
    slide: Slide,
    regions: Sequence[Region],
    question: str,
    settings: GenerationSettings,
) -> list[FieldAnswer]:
    import torch

    pictures = [slide.read(region, model.microns_per_pixel) for region in regions]
    pixels = torch.stack([model.encoder.prepare(picture) for picture in pictures])
    features = model.encoder.encode(pixels).float()  # [B, P, E]
    answers = model.answer_features(features, [question] * len(regions), settings)
    found = []
    for row, (region, answer) in enumerate(zip(regions, answers, strict=True)):
        is_closed = first_word(answer) in YES_NO
        yes = yes_probability(model, features[row : row + 1], question, is_closed)
        found.append(FieldAnswer(region, answer.strip(), yes))
    return found


Colour = tuple[int, int, int]
# Okabe and Ito 2008: told apart with any kind of colour vision; grey for all rarer answers.
_PALETTE: tuple[Colour, ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
)
_REST: Colour = (138, 138, 138)
# From no to yes, by way of a light middle; both ends are as dark.
_NO, _MIDDLE, _YES = (33, 102, 172), (247, 247, 247), (178, 24, 43)
_LONGEST, _LEGEND = 1200, 34


def draw_heat_map(slide: Slide, tour: Tour, path: Path) -> None:
    """Write the slide's overview with a colour over every field that was asked, and a legend."""
    from PIL import Image, ImageDraw, ImageFont

    overview = slide.overview(_LONGEST)
    extent = slide.extent
    colours, legend = _colours(tour)
    layer = Image.new("RGBA", overview.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    across, down = overview.width / extent.width, overview.height / extent.height
    for item, colour in zip(tour.fields, colours, strict=True):
        place = item.region
        box = (place.x * across, place.y * down, place.right * across, place.bottom * down)
        pen.rectangle(box, fill=(*colour, 118), outline=(*colour, 235))
    shown = Image.alpha_composite(overview.convert("RGBA"), layer).convert("RGB")
    font = ImageFont.load_default(size=18)
    # Pillow's own font has no mu.
    title = f"{tour.question}   {len(tour.fields)} fields of {tour.side_um:.0f} um"
    notice = f"{tour.model}. Research use only, not for diagnosis."
    width = max(shown.width, 640)
    sheet = Image.new("RGB", (width, shown.height + _LEGEND * (len(legend) + 2) + 12), "white")
    sheet.paste(shown, ((width - shown.width) // 2, _LEGEND))
    pen = ImageDraw.Draw(sheet)
    pen.text((10, 6), title, fill="#111111", font=font)
    top = _LEGEND + shown.height + 8
    for name, colour in legend:
        pen.rectangle((10, top + 4, 34, top + 24), fill=colour, outline="#555555")
        pen.text((44, top + 3), name, fill="#111111", font=font)
        top += _LEGEND
    pen.text((10, top + 3), notice, fill="#555555", font=font)
    with atomic_path(path) as partial:
        sheet.save(partial, format="PNG")


def _colours(tour: Tour) -> tuple[list[Colour], list[tuple[str, Colour]]]:
    """Return each field's colour, and what the colours mean."""
    chances = [item.yes for item in tour.fields if item.yes is not None]
    if len(chances) == len(tour.fields):
        legend = [(f"p(yes) {chance:.1f}", mixed(chance)) for chance in (0.0, 0.5, 1.0)]
        return [mixed(chance) for chance in chances], legend
    counts = tour.counts()
    table = {answer: colour for (answer, _), colour in zip(counts, _PALETTE, strict=False)}
    shades = [(f"{answer} ({count})", table[answer]) for answer, count in counts if answer in table]
    rarer = sum(count for answer, count in counts if answer not in table)
    if rarer:
        shades.append((f"other answers ({rarer})", _REST))
    return [table.get(answer, _REST) for answer in tour.read], shades


def mixed(chance: float) -> Colour:
    """Return the colour of a probability of yes: blue for no, red for yes, light between."""
    ends = (_MIDDLE, _YES) if chance >= 0.5 else (_MIDDLE, _NO)
    share = abs(chance - 0.5) * 2
    red, green, blue = (
        round(start + (end - start) * share) for start, end in zip(*ends, strict=True)
    )
    return red, green, blue
