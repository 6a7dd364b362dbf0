"""Images of one file that are in another: the same bytes, or the same picture turned or cropped.

In: two record files. The second one's portraits stay in memory (about 9 KB an image), the first
one's pass by: name the smaller file second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from clover.core.config import Recipe
from clover.core.errors import CloverError
from clover.core.files import atomic_path, fingerprint, read_json, write_json
from clover.core.record import Needs, Record, Rejection, write_rejected
from clover.core.terminal import progress
from clover.vision.dataset import FeatureSet, load_feature_set, load_image_set
from clover.vision.encoder import ImageEncoder
from clover.vision.likeness import ANGLES, RINGS, Floats, Gallery
from clover.vision.pictures import Picture, look

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
    """None where the bytes are the same."""

    def how(self) -> str:
        """Return ``same bytes`` or ``alike 0.83``."""
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
                    if found.portrait is not None:
                        self._names.append(name)
                        portraits.append(found.portrait)
        stacked = np.stack(portraits) if portraits else np.zeros((0, RINGS, ANGLES), np.float32)
        self._gallery = Gallery(stacked) if portraits else None

    def leaks(self, name: str, picture: Picture) -> list[Leak]:
        """Return the images here that are the same as one of the first file."""
        if picture.digest in self._by_digest and picture.digest:
            return [Leak(name, self._by_digest[picture.digest], None)]
        if picture.portrait is None or self._gallery is None:
            return []
        alike = self._gallery.alike(picture.portrait)
        return [
            Leak(name, self._names[place], value)
            for place, value in sorted(alike, key=lambda item: -item[1])
        ]


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

    def __bool__(self) -> bool:
        return bool(self.pairs or self.groups)

    def sentence(self) -> str:
        """Return what is shared, with the first of it named."""
        parts = []
        if self.pairs:
            images = len({pair[1] for pair in self.pairs})
            mine, theirs, how = self.pairs[0]
            parts.append(f"{images:,} evaluation images ({theirs} is {mine}: {how})")
        if self.groups:
            parts.append(f"{len(self.groups):,} groups ({self.groups[0]})")
        return " and ".join(parts)


def find_overlap(train: Pictured, test: Pictured, *, cache: Path) -> Overlap:
    """Find images and groups of `test` that `train` holds too.

    Images are the same by their bytes, or by their portraits: `REFUSED` alike or more, turned,
    mirrored, cropped or brightened. Portraits are kept in `cache`, by hash, and so is the finding.

    Args:
        train: What is learnt from.
        test: What is only ever evaluated.
        cache: The feature cache's folder.
    """
    shared = sorted(_groups(train) & _groups(test))
    ours, theirs = _named(train), _named(test)
    pairs = [(ours[digest], theirs[digest], "same bytes") for digest in theirs if digest in ours]
    key = fingerprint([sorted(ours), sorted(theirs), REFUSED])
    kept = Path(cache) / "portraits" / f"alike-{key}.json"
    if not kept.exists():
        paths = [
            {digest: data.images / name for digest, name in names.items()}
            for data, names in ((train, ours), (test, theirs))
        ]
        write_json(kept, _alike(paths[0], paths[1], Path(cache)))
    pairs += [
        (ours[mine], theirs[other], f"alike {value:.2f}") for mine, other, value in read_json(kept)
    ]
    return Overlap(pairs, shared)


def refuse_leaks(train: Pictured, test: Pictured, *, cache: Path, what: str) -> None:
    """Raise where training and evaluation data share an image or a group.

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

    A number that counts a file's images says nothing about another file's number.
    """
    return {
        record.group
        for record in data.records
        if record.group and record.group not in (record.image, Path(record.image or "").stem)
    }


def _named(data: Pictured) -> dict[str, str]:
    """Return hash -> name of each image, as the records have it."""
    return {
        digest: str(record.image)
        for digest, record in reversed(list(zip(data.digests, data.records, strict=True)))
    }


def _alike(
    ours: dict[str, Path], theirs: dict[str, Path], cache: Path
) -> list[tuple[str, str, float]]:
    """Return pairs of hashes of pictures that are surely one, with their likeness."""
    portraits = read_portraits({**ours, **theirs}, cache)
    others = [digest for digest in theirs if digest in portraits and digest not in ours]
    if not others:
        return []
    gallery = Gallery(np.stack([portraits[digest] for digest in others]))
    found = []
    with progress("leaks", len(ours)) as advance:
        for digest in ours:
            advance()
            if digest in portraits:
                found += [
                    (digest, others[place], round(value, 3))
                    for place, value in gallery.alike(portraits[digest])
                    if value >= REFUSED
                ]
    return sorted(found, key=lambda pair: -pair[2])


def read_portraits(images: dict[str, Path], cache: Path) -> dict[str, Floats]:
    """Return the portraits of images by hash; those not in the cache yet are made.

    An image that cannot be read has none.
    """
    folder = cache / "portraits"
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, Floats] = {}
    files = sorted(folder.glob("part-*.safetensors"))
    for file in files:
        try:
            known |= load_file(str(file))
        except (SafetensorError, OSError):
            continue  # cut off: its images are looked at again
    missing = [digest for digest in images if digest not in known]
    made: dict[str, Floats] = {}
    with progress("portraits", len(missing)) as advance:
        for digest in missing:
            advance()
            found = look(images[digest], with_portrait=True).portrait
            if found is not None:
                made[digest] = found.astype(np.float16)
    if made:
        name = folder / f"part-{fingerprint(sorted(made))}.safetensors"
        with atomic_path(name) as partial:
            save_file(made, str(partial))
    return {
        digest: found.astype(np.float32)
        for digest, found in {**known, **made}.items()
        if digest in images
    }


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
        held_out: Record files that training must share no image and no group with.
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
