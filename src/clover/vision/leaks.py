"""Images of one file that are in another: the same bytes, regions of the same slide, or the same
picture turned or cropped.

In: two record files. The second one's portraits stay in memory (about 9 KB an image), the first
one's pass by: name the smaller file second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clover.core.config import Recipe
from clover.core.errors import CloverError
from clover.core.files import fingerprint, read_json, write_json
from clover.core.record import Needs, Record, Rejection, write_rejected
from clover.core.terminal import progress
from clover.slides.picture import is_region, slide_digest
from clover.slides.region import split_reference
from clover.vision.claim import Claims, number_of
from clover.vision.dataset import FeatureSet, load_feature_set, load_image_set
from clover.vision.encoder import ImageEncoder
from clover.vision.likeness import ANGLES, RINGS, Floats, Gallery
from clover.vision.pictures import Picture, look
from clover.vision.portraits import Portraits, decoders, pieces

REFUSED = 0.8
"""Pictures at least as alike are one for training, which is refused: among the millions of pairs of
two files a few that are two pictures reach what `clover data check` lists for a person to look at.
"""


@dataclass(frozen=True)
class Leak:
    """An image of one file that is in the other."""

    image: str
    other: str
    likeness: float | None
    """None where the bytes, or the slides, are the same."""
    is_of_slide: bool = False
    """Whether the two are other places of one slide."""

    def how(self) -> str:
        """Return ``same bytes``, ``same slide`` or ``alike 0.83``."""
        if self.is_of_slide:
            return "same slide"
        return "same bytes" if self.likeness is None else f"alike {self.likeness:.2f}"

    def row(self, path: Path) -> dict[str, Any]:
        """Return the JSON-able form for the written list."""
        content = {"image": self.image, "other": self.other, "how": self.how()}
        return Rejection(str(path), 0, "leak", content).row()


class Reference:
    """The images of the second file, to compare with."""

    def __init__(self, names: Iterable[str], folder: Path) -> None:
        """Open every image; what is missing or broken is counted in `num_unreadable`."""
        self.num_unreadable = 0
        self.num_images = 0
        self._by_digest: dict[str, str] = {}
        self._by_slide: dict[str, str] = {}
        self._names: list[str] = []
        portraits: list[Floats] = []
        with progress("second file", None) as advance:
            for name in names:
                found = look(folder / name, with_portrait=True)
                advance()
                self.num_images += 1
                if found.problem is not None:
                    self.num_unreadable += 1
                elif found.digest:
                    self._by_digest.setdefault(found.digest, name)
                    if found.slide:
                        self._by_slide.setdefault(found.slide, name)
                    if found.portrait is not None:
                        self._names.append(name)
                        portraits.append(found.portrait)
        stacked = np.stack(portraits) if portraits else np.zeros((0, RINGS, ANGLES), np.float32)
        self._gallery = Gallery(stacked) if portraits else None

    def leaks(self, name: str, picture: Picture) -> list[Leak]:
        """Return the images here that are the same as one of the first file."""
        if picture.digest in self._by_digest and picture.digest:
            return [Leak(name, self._by_digest[picture.digest], None)]
        if other := self._same_slide(picture):
            return [Leak(name, other, None, is_of_slide=True)]
        if picture.portrait is None or self._gallery is None:
            return []
        alike = self._gallery.alike(picture.portrait)
        return [
            Leak(name, self._names[place], value)
            for place, value in sorted(alike, key=lambda item: -item[1])
        ]

    def _same_slide(self, picture: Picture) -> str | None:
        """Return a name here that is of a picture's slide; either may be the slide as a whole."""
        if picture.slide:
            return self._by_slide.get(picture.slide) or self._by_digest.get(picture.slide)
        return self._by_slide.get(picture.digest)


class Pictured(Protocol):
    """Records on images that are known by their hashes."""

    @property
    def records(self) -> Sequence[Record]:
        """The records."""
        ...

    @property
    def digests(self) -> Sequence[str]:
        """SHA-256 of each record's image bytes."""
        ...

    @property
    def images(self) -> Path:
        """The folder that image paths start from."""
        ...


@dataclass(frozen=True)
class Overlap:
    """What training and evaluation data share."""

    pairs: list[tuple[str, str, str]]
    """Training image, evaluation image, how they are the same."""
    groups: list[str]
    """Patients, slides or source images with records on both sides."""
    slides: list[tuple[str, str]]
    """Of each slide that both sides name regions of: a training and an evaluation image."""

    def __bool__(self) -> bool:
        return bool(self.pairs or self.groups or self.slides)

    def sentence(self) -> str:
        """Return what is shared, with the first of it named."""
        parts = []
        if self.pairs:
            images = len({pair[1] for pair in self.pairs})
            mine, theirs, how = self.pairs[0]
            parts.append(f"{images:,} evaluation images ({theirs} is {mine}: {how})")
        if self.slides:
            mine, theirs = self.slides[0]
            parts.append(f"{len(self.slides):,} slides ({theirs} is of the slide of {mine})")
        if self.groups:
            parts.append(f"{len(self.groups):,} groups ({self.groups[0]})")
        return " and ".join(parts)


def find_overlap(train: Pictured, test: Pictured, *, cache: Path) -> Overlap:
    """Find images, slides and groups of `test` that `train` holds too.

    Images are the same by their bytes, or by their portraits: `REFUSED` alike or more, turned,
    mirrored, cropped or brightened. Slides are the same by their bytes. Portraits are kept in
    `cache`, by hash, and so is the finding; processes that look for the same at the same time share
    the work.

    Args:
        train: What is learnt from.
        test: What is only ever evaluated.
        cache: The feature cache's folder.
    """
    shared = sorted(_groups(train) & _groups(test))
    ours, theirs = _named(train), _named(test)
    pairs = [(ours[digest], theirs[digest], "same bytes") for digest in theirs if digest in ours]
    ours_at, theirs_at = _paths(ours, train.images), _paths(theirs, test.images)
    pairs += [
        (ours[mine], theirs[other], f"alike {value:.2f}")
        for mine, other, value in _Comparison(ours_at, theirs_at, Path(cache)).found()
    ]
    return Overlap(pairs, shared, _shared_slides((ours, ours_at), (theirs, theirs_at)))


def refuse_leaks(train: Pictured, test: Pictured, *, cache: Path, what: str) -> None:
    """Raise where training and evaluation data share an image, a slide or a group.

    Raises:
        CloverError: they do; `what` names the two.
    """
    found = find_overlap(train, test, cache=cache)
    if found:
        raise CloverError(
            f"{what} share {found.sentence()}: a score on them would mean nothing; take them out "
            "(clover data check F --against F2 --out LIST names all), or go on with --allow-leaks"
        )


def _groups(data: Pictured) -> set[str]:
    """Return the groups of a file, but those that only repeat an image's name.

    A number that counts a file's images says nothing about another file's number. A region's group
    is kept though its slide is called so: that name was given to a slide, not counted.
    """
    return {
        record.group
        for record in data.records
        if record.group and not _repeats_name(record, data.images)
    }


def _repeats_name(record: Record, images: Path) -> bool:
    name = record.image or ""
    return record.group in (name, Path(name).stem) and not is_region(images / name)


def _named(data: Pictured) -> dict[str, str]:
    """Return hash -> name of each image, as the records have it."""
    return {
        digest: str(record.image)
        for digest, record in reversed(list(zip(data.digests, data.records, strict=True)))
    }


def _paths(names: Mapping[str, str], folder: Path) -> dict[str, Path]:
    return {digest: folder / name for digest, name in names.items()}


Images = tuple[Mapping[str, str], Mapping[str, Path]]
"""Hash -> name, and hash -> path."""


def _shared_slides(ours: Images, theirs: Images) -> list[tuple[str, str]]:
    """Return a name of ours and one of theirs of each slide that both have regions of.

    One side may also name the slide's file as a whole, as it can with a plain image.
    """
    mine, other = _slides(ours), _slides(theirs)
    shared = [
        (mine[slide] if slide in mine else ours[0][slide], name)
        for slide, name in other.items()
        if slide in mine or slide in ours[0]
    ]
    shared += [
        (name, theirs[0][slide])
        for slide, name in mine.items()
        if slide not in other and slide in theirs[0]
    ]
    return sorted(shared)


def _slides(images: Images) -> dict[str, str]:
    """Return slide -> name of the first region of it, by the SHA-256 of the slide's bytes.

    They were read for the hashes of the regions. A slide that is gone since is known by its path.
    """
    names, paths = images
    slides: dict[Path, str] = {}
    for digest, name in names.items():
        if "#" in name:
            slide, region = split_reference(paths[digest])
            if region is not None:
                slides[slide] = name  # names come from the last record to the first
    found: dict[str, str] = {}
    for slide, name in slides.items():
        try:
            key = slide_digest(slide)
        except OSError:
            key = str(slide.resolve())
        found[key] = name
    return found


class _Comparison:
    """Which pictures of two sets are surely one; found once, piece by piece, and kept.

    Args:
        ours: SHA-256 -> path.
        theirs: The same of the set whose portraits stay in memory.
        cache: The feature cache's folder.
    """

    def __init__(self, ours: Mapping[str, Path], theirs: Mapping[str, Path], cache: Path) -> None:
        self._ours = list(ours)
        self._others = [digest for digest in theirs if digest not in ours]
        self._images = {**ours, **theirs}
        self._folder = cache / "portraits"
        # Findings of before regions had portraits are not those of today.
        more = ["regions"] if any("#" in path.name for path in self._images.values()) else []
        self._key = fingerprint([sorted(ours), sorted(theirs), REFUSED, *more])
        self._kept = self._folder / f"alike-{self._key}.json"

    def found(self) -> list[tuple[str, str, float]]:
        """Return pairs of hashes with their likeness, the most alike first."""
        if not self._kept.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            with Claims(self._folder / "claims.lock") as claims, decoders() as pool:
                try:
                    self._find(claims, pool)
                finally:
                    pool.shutdown(cancel_futures=True)
        return [(mine, other, value) for mine, other, value in read_json(self._kept)]

    def _find(self, claims: Claims, pool: ThreadPoolExecutor) -> None:
        portraits = Portraits(self._folder, self._images)
        names, gallery = self._gallery(portraits, claims, pool)
        cut = [] if gallery is None else pieces(self._ours)
        left = [piece for piece in cut if self._is_left(piece)]
        with progress("leaks", sum(map(len, left))) as advance:

            def compare(piece: Sequence[str]) -> None:
                assert gallery is not None
                found = []
                for digest, portrait in portraits.each(piece, pool):
                    advance()
                    found += [
                        (digest, names[place], round(value, 3))
                        for place, value in ([] if portrait is None else gallery.alike(portrait))
                        if value >= REFUSED
                    ]
                write_json(self._piece(piece), found)

            claims.each_once(left, is_left=self._is_left, do=compare)
        claims.take(number_of(self._key), wait=True)
        try:
            if not self._kept.exists():
                self._join(cut)
        except CloverError:  # without locks another process may have joined them meanwhile
            if not self._kept.exists():
                raise
        claims.give_back(number_of(self._key))

    def _gallery(
        self, portraits: Portraits, claims: Claims, pool: ThreadPoolExecutor
    ) -> tuple[list[str], Gallery | None]:
        """Return the hashes and portraits of the others; None where none can be read."""
        cut = pieces(self._others)
        left = [piece for piece in cut if portraits.missing(piece)]
        with progress("portraits", sum(map(len, left))) as advance:

            def make(piece: Sequence[str]) -> None:
                for _ in portraits.each(piece, pool):
                    advance()

            claims.each_once(left, is_left=lambda piece: bool(portraits.missing(piece)), do=make)
        found = {
            digest: portrait
            for piece in cut
            for digest, portrait in portraits.each(piece, pool)
            if portrait is not None
        }
        return list(found), Gallery(np.stack(list(found.values()))) if found else None

    def _piece(self, piece: Sequence[str]) -> Path:
        """Return where the finding of a piece lies until that of all does."""
        return self._folder / f"alike-{self._key}.{fingerprint(piece)}.json"

    def _is_left(self, piece: Sequence[str]) -> bool:
        # In this order: pieces go only once the whole is there.
        return not self._piece(piece).exists() and not self._kept.exists()

    def _join(self, cut: Sequence[Sequence[str]]) -> None:
        found = [pair for piece in cut for pair in read_json(self._piece(piece))]
        write_json(self._kept, sorted(found, key=lambda pair: -pair[2]))
        for piece in cut:
            self._piece(piece).unlink(missing_ok=True)


def load_training_set(
    path: Path,
    *,
    needs: Needs,
    recipe: Recipe,
    encoder: ImageEncoder,
    cache: Path,
    held_out: Sequence[Path],
    rejected: Path | None,
) -> FeatureSet:
    """Read what a stage learns from, and refuse what will be evaluated.

    Args:
        path: The records.
        needs: Which columns each must fill.
        recipe: Says where images lie, how features are kept and how many views are drawn from.
        encoder: Of the images.
        cache: The feature cache's folder.
        held_out: Record files that training must share no image, slide or group with.
        rejected: Where what was set aside is listed; None for a process that writes nothing.

    Raises:
        CloverError: nothing usable is left, or a held-out file shares something.
    """
    data = load_feature_set(
        path,
        needs=needs,
        encoder=encoder,
        cache=cache,
        images=recipe.data.images,
        storage=recipe.encoder.storage,
        views=recipe.encoder.views,
        view_kind=recipe.encoder.view_kind,
    )
    if rejected is not None:
        write_rejected(rejected, data.rejected)
    for other in held_out:
        asked = load_image_set(
            other,
            recipe.data.images,
            unpacked=cache / "records",
            microns_per_pixel=encoder.microns_per_pixel,
        )
        refuse_leaks(data, asked, cache=cache, what=f"{path} and {other}")
    return data
