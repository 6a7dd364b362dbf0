"""Rows of a Parquet file, one at a time; needs the extra `parquet`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clover.core.errors import CloverError

_ROWS = 256
"""Rows read at a time: with images inside, 256 of them are some 50 MB."""


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file.

    Raises:
        CloverError: pyarrow is not installed, or the file is not readable Parquet.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise CloverError(
            f"{path} is Parquet, which needs the extra: pip install 'clover-pathology[parquet]'"
        ) from error
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                yield from batch.to_pylist()
    except FileNotFoundError as error:
        raise CloverError(f"no file {path}") from error
    except ArrowException as error:
        raise CloverError(f"{path} is not readable Parquet: {str(error)[:120]}") from error
