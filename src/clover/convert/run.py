"""Convert a checkpoint and say what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clover.convert.checkpoint import Checkpoint
from clover.convert.folder import check_model, lacking, write_model
from clover.convert.read import read_checkpoint, with_parts
from clover.convert.verify import Parity, verify
from clover.convert.whole import check_whole
from clover.convert.write import draft_clover, write_clover, write_lavis, write_transformers
from clover.core.config import load_recipe
from clover.core.errors import CloverError


@dataclass(frozen=True)
class Conversion:
    """What was written, what was not, and how far both are apart.

    Attributes:
        source: What was read, with what was left out and filled.
        written: The file or folder.
        parity: The comparison; None where it was not asked for.
        lacking: What a folder of CLOVER's needs before it can answer; empty when it is a model.
    """

    source: Checkpoint
    written: Path
    parity: Parity | None
    lacking: tuple[str, ...] = ()


def convert(
    source: Path,
    target: Path,
    *,
    to: str,
    encoder: Path | None = None,
    language: Path | None = None,
    tokenizer: Path | None = None,
    recipe: str | None = None,
    num_heads: int | None = None,
    has_check: bool = True,
) -> Conversion:
    """Convert `source` to the form `to` at `target`.

    Args:
        source: A file or folder.
        target: A folder, or for LAVIS a file.
        to: `clover`, `lavis` or `transformers`.
        encoder: EVA's weights, where the source has none and the target needs them.
        language: The language model's folder, likewise.
        tokenizer: The Q-Former's `tokenizer.json`, instead of the source's own.
        recipe: Names the frozen parts that the source has not, the prompt and the decoding; a
            CLOVER model's own when absent.
        num_heads: The Q-Former's heads, where the source cannot say them.
        has_check: Whether the same random input goes through both afterwards.

    Raises:
        CloverError: the source is damaged, of no known form, or lacks what the target needs; the
            recipe's parts are not those it was trained with; or the target would replace what is
            read, or a model by what is none. Nothing is written then.
    """
    for path in (source, encoder, language):
        if path is not None:
            _check_apart(path, target)
    found = read_checkpoint(source)
    with_parts(found, encoder=encoder, language=language)
    if num_heads is not None:
        found.details["num_heads"] = num_heads
    check_whole(found)
    needed: list[str] = []
    if to == "clover":
        base = found.recipe if recipe is None else load_recipe(recipe)
        draft = draft_clover(found, target, base=base, tokenizer=tokenizer)
        needed = lacking(found, draft.recipe)
        if not needed:
            check_model(found, draft.recipe)
        elif (target / "config.json").exists() and not found.is_stage_1:
            raise CloverError(
                f"{target} holds a model, and {source} would make none of it: it lacks "
                f"{needed[0]}; or name another folder"
            )
        written, made = write_clover(found, target, draft)
        if not needed:
            write_model(found, made, target)
    elif to == "lavis":
        written = write_lavis(found, target)
    else:
        written = write_transformers(found, target)
    parity = verify(found, read_checkpoint(written)) if has_check else None
    return Conversion(found, written, parity, tuple(needed))


def _check_apart(source: Path, target: Path) -> None:
    """Tensors are read one by one while others are written: what is read must stay as it is.

    Raises:
        CloverError: one of the two is the other, or lies in it.
    """
    read, written = source.resolve(), target.resolve()
    if read == written or read in written.parents or written in read.parents:
        raise CloverError(
            f"{target} and {source} are one, or one lies in the other, and what is read must not "
            "be replaced meanwhile; name another TARGET"
        )
