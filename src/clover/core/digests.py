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
from pathlib import Path

from clover.core.files import sha256_file

_SETTLED_NS = 2_000_000_000


class DigestMemory:
    """SHA-256 of files by path, size and time of change.

    Args:
        path: An SQLite file, shared by all processes; one that cannot be used is done without.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, tuple[int, int, bytes]] = {}
        self._new: dict[str, tuple[int, int, bytes]] = {}
        if path.exists():
            try:
                with sqlite3.connect(path, timeout=30) as base:
                    rows = base.execute("select path, size, changed_ns, sha256 from digest")
                    self._known = {name: (size, at, sha) for name, size, at, sha in rows}
                base.close()
            except sqlite3.DatabaseError:
                self._known = {}

    def digest(self, path: Path) -> str:
        """Return the SHA-256 of a file's bytes, in hex.

        Raises:
            OSError: the file is not there, or cannot be read.
        """
        name = os.path.abspath(path)
        found = os.stat(name)
        size, at = found.st_size, max(found.st_mtime_ns, found.st_ctime_ns)
        known = self._known.get(name)
        if known is not None and known[:2] == (size, at):
            return known[2].hex()
        is_settled = time.time_ns() - at > _SETTLED_NS
        sha = bytes.fromhex(sha256_file(name))
        if is_settled:
            self._new[name] = (size, at, sha)
        return sha.hex()

    def save(self) -> None:
        """Write what is new; a disk that refuses costs a second reading, nothing else."""
        if not self._new:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with sqlite3.connect(self._path, timeout=30) as base:
                base.execute(
                    "create table if not exists digest "
                    "(path text primary key, size integer, changed_ns integer, sha256 blob)"
                )
                rows = [(name, *values) for name, values in self._new.items()]
                base.executemany("insert or replace into digest values (?, ?, ?, ?)", rows)
            base.close()
        except (sqlite3.OperationalError, OSError):
            pass  # locked, full, or not ours to write: hashed again next time
        except sqlite3.DatabaseError:  # damaged
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._known.update(self._new)
        self._new = {}
