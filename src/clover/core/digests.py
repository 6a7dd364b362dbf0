"""Hashes of files that have not changed: a million images are not read to start a training, nor
the gigabytes of a model to see that they are the pinned ones.

A file is taken for unchanged when its size and its time of change, to the nanosecond, are what they
were. A file that was changed within two seconds of being hashed is not remembered: it might change
again within what the file system calls the same instant.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

from clover.core.files import sha256_file

_SETTLED_NS = 2_000_000_000
_AT_ONCE = 500
"""Paths a question to the file."""
_UNWRITTEN = 20_000
"""New hashes that are held before they are written."""


class DigestMemory:
    """SHA-256 of files by path, size and time of change.

    What is known stays in the file and is asked for some hundreds at a time.

    Args:
        path: An SQLite file, shared by all processes; one that cannot be used is done without.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new: dict[str, tuple[int, int, bytes]] = {}
        self._base = self._open()

    def _open(self) -> sqlite3.Connection | None:
        if self._path.exists():
            # For reading alone: what is known serves also where nothing may be written.
            with contextlib.suppress(sqlite3.DatabaseError):
                name = f"{self._path.absolute().as_uri()}?mode=ro"
                return sqlite3.connect(name, uri=True, timeout=30)
        return None

    def digest(self, path: Path) -> str:
        """Return the SHA-256 of a file's bytes, in hex.

        Raises:
            OSError: the file is not there, or cannot be read.
        """
        found = self.digests([os.path.abspath(path)])[0]
        if isinstance(found, OSError):
            raise found
        return found.hex()

    def digests(self, paths: Sequence[str]) -> list[bytes | OSError]:
        """Return the SHA-256 of each file's bytes, or why a file cannot be read.

        Args:
            paths: Absolute ones.
        """
        found: list[bytes | OSError] = []
        add, stat, nothing = found.append, os.stat, ("", -1, -1, b"")
        for start in range(0, len(paths), _AT_ONCE):
            part = paths[start : start + _AT_ONCE]
            known = self._known(part)
            for path in part:  # of a million: no call but the system's
                try:
                    now = stat(path)
                    _, size, at, sha = known.get(path, nothing)
                    if size == now.st_size and at == max(now.st_mtime_ns, now.st_ctime_ns):
                        add(sha)
                    else:
                        add(self._read(path, now))
                except OSError as error:
                    add(error)
            if len(self._new) > _UNWRITTEN:
                self.save()
        return found

    def _known(self, paths: Sequence[str]) -> dict[str, tuple[str, int, int, bytes]]:
        known: dict[str, tuple[str, int, int, bytes]] = {}
        if self._base is not None:
            marks = ",".join("?" * len(paths))
            try:
                rows = self._base.execute(
                    f"select path, size, changed_ns, sha256 from digest where path in ({marks})",
                    paths,
                )
                known = {row[0]: row for row in rows}
            except UnicodeEncodeError:  # a folder whose name is not UTF-8: none of it is known
                pass
            except sqlite3.DatabaseError:  # damaged, or not a table of ours
                self._base.close()
                self._base = None
        if self._new:
            known |= {path: (path, *self._new[path]) for path in paths if path in self._new}
        return known

    def _read(self, path: str, found: os.stat_result) -> bytes:
        at = max(found.st_mtime_ns, found.st_ctime_ns)
        is_settled = time.time_ns() - at > _SETTLED_NS
        sha = bytes.fromhex(sha256_file(path))
        if is_settled:
            self._new[path] = (found.st_size, at, sha)
        return sha

    def save(self) -> None:
        """Write what is new; a disk that refuses costs a second reading, nothing else."""
        if not self._new:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with sqlite3.connect(self._path, timeout=30) as base:
                base.execute(
                    "create table if not exists digest "
                    "(path text primary key, size integer, changed_ns integer, sha256 blob) "
                    "without rowid"  # one look-up a path, not two
                )
                rows = [(name, *values) for name, values in self._new.items()]
                base.executemany("insert or replace into digest values (?, ?, ?, ?)", rows)
            base.close()
        except (sqlite3.OperationalError, OSError, UnicodeEncodeError):
            pass  # locked, full, not ours to write, or no text: hashed again next time
        except sqlite3.DatabaseError:  # damaged
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._new = {}
        if self._base is None:
            self._base = self._open()
