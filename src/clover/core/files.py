"""Files that are whole or absent: atomic writes, hashes, JSON lines."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, TypeVar

from clover.core.errors import CloverError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Line = TypeVar("Line")

_HALF_WRITTEN = ".part"
_HALF_SIGNS = "backslashreplace"
"""Half a sign has no bytes in UTF-8; it is written as JSON escapes it. Names of files that are not
UTF-8 hold such, and text that was cut within a sign."""
_HELD: dict[Path, int] = {}
"""What this process holds (`held`), and which of its threads does."""
_HOLDING = threading.Lock()

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What a disk says that takes no more."""
_FREE = "what was finished before is kept, free some space and run the same command again"
_ELSEWHERE = "give a path that may be written"
_ADVICE = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: "the disk takes no file of that size, write to another",
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.EISDIR: "give the name of a file",
    errno.ENOTDIR: "give another path",
    errno.EEXIST: "give another path",
    errno.ENAMETOOLONG: "give a shorter name",
}
"""What to do about it; of any other error the disk has to be looked at."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that replaces it only when the block succeeds.

    A reader sees the old file or the new one, never half of either. What a killed process had
    half written of the same file is removed.

    Raises:
        CloverError: `path` is a folder, the disk is full, or the folder cannot be written.
    """
    target = Path(path)
    check_out(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = _own_sibling(target)
    except OSError as error:
        raise disk_refused(target, error) from error
    is_whole = False
    try:
        yield partial
        # A file of one's own is private; give it what a plain open() would have given.
        partial.chmod(0o666 & ~umask())
        partial.replace(target)
        is_whole = True
    except CloverError:
        raise
    except Exception as error:
        if not _is_of_disk(error):
            raise
        other = getattr(error, "filename", None)
        if other is not None and str(other) not in (str(partial), str(target)):
            # Read, or written, on the way: advice about `target` would not help.
            raise CloverError(f"cannot write {target}: {other}: {_reason(error)}") from error
        raise disk_refused(target, error) from error
    finally:
        if not is_whole:  # else the name may be another process's by now
            partial.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _own_sibling(target: Path) -> tuple[int | None, Path]:
    """Return a temporary file beside `target`; while its handle is open, a lock says it is ours.

    The first of `.name.part`, `.name.1.part`, ... that nobody who lives is writing: what a killed
    process left is written over, and no folder of thousands is listed to find it.
    """
    number = 0
    while fcntl is not None:
        partial = target.with_name(f".{target.name}{f'.{number}' if number else ''}{_HALF_WRITTEN}")
        try:
            handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except PermissionError:  # another user's, in a folder that both write to
            break
        is_ours = _lock(handle)
        if is_ours and _is_file_of(partial, handle):
            os.ftruncate(handle, 0)
            return handle, partial
        os.close(handle)
        if is_ours is None:  # a file system without locks
            partial.unlink(missing_ok=True)
            break
        # A lock of what is not there any more: its writer has just finished; once more.
        number += not is_ours
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.", suffix=_HALF_WRITTEN
    )
    os.close(handle)
    return None, Path(name)


def check_out(out: Path, *read: Path, beside: Sequence[str] = ()) -> None:
    """Refuse to write what is being read, or a folder, before any work is done.

    Args:
        out: The file to write.
        read: The files to read.
        beside: Endings of what is written beside it, ``OUT.ENDING``.

    Raises:
        CloverError: `out` is a folder, or writing would replace a file to read.
    """
    if out.is_dir():
        raise disk_refused(out, IsADirectoryError(errno.EISDIR, "it is a folder"))
    for written in (out, *(Path(f"{out}.{ending}") for ending in beside)):
        for file in read:
            if written.exists() and file.exists() and written.samefile(file):
                raise CloverError(
                    f"--out {out} would overwrite {file}, which is read; give another name"
                )


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Let one process at a time into the block; where there are no locks, all of them.

    Args:
        path: The file that is locked; it stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as handle:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def held(path: Path, doing: str) -> Iterator[None]:
    """Keep other processes out of the block; who finds one inside is refused, and waits for nobody.

    A thread that is inside may come in again, and a process that is killed is out. Where there are
    no locks, or no file can be made, all come in.

    Args:
        path: The file that is locked. It is removed at the end, and its folder if that was made
            for it and is empty.
        doing: What is done there, for the message: `trains in run`.

    Raises:
        CloverError: another process, or another thread of this one, is inside.
    """
    place, thread = path.resolve(), threading.get_ident()
    with _HOLDING:
        holder = _HELD.get(place)
        if holder is None and fcntl is not None:
            _HELD[place] = thread
    if holder not in (None, thread):
        raise CloverError(f"another thread of this process {doing}; wait until it has ended")
    if holder == thread or fcntl is None:
        yield
        return
    try:
        with _locked(path, doing):
            yield
    finally:
        del _HELD[place]


@contextlib.contextmanager
def _locked(path: Path, doing: str) -> Iterator[None]:
    is_new_folder, handle = not path.parent.exists(), None
    with contextlib.suppress(OSError):  # nor can anything else be written there: that will be said
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _own_lock(path, doing)
    if handle is None:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before it is let go: afterwards it may be another's
            if is_new_folder:
                path.parent.rmdir()  # where nothing has come into it
        os.close(handle)


def _own_lock(path: Path, doing: str) -> int:
    """Return a handle with which `path` is locked, and our number written into it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        is_ours = _lock(handle)
        if is_ours is False:
            who = os.read(handle, 200).decode(errors="replace").split()
            os.close(handle)
            raise CloverError(f"another process {doing}{_named(who)}; wait until it has ended")
        if is_ours is None or _is_file_of(path, handle):
            break
        os.close(handle)  # of one that has just ended, and has removed the file
    with contextlib.suppress(OSError):  # a full disk: only the message would be longer
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()} {platform.node()}\n".encode())
    return handle


def _named(who: list[str]) -> str:
    """Return ` (process 12 on there)` of a number and a machine; nothing where they are absent."""
    if not who:
        return ""
    where = "" if who[1:] in ([], [platform.node()]) else f" on {who[1]}"
    return f" (process {who[0]}{where})"


def _is_file_of(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _lock(handle: int) -> bool | None:
    """Return whether a file is locked by us now; None where there are no locks."""
    assert fcntl is not None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def growing(path: str | Path) -> Iterator[None]:
    """Name `path`, a file that grows inside the block, when the disk takes no more.

    Python's own error names no file when a write fails, only when an open does.

    Raises:
        CloverError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise disk_refused(path, error) from error


def whole_lines(path: Path, read: Callable[[bytes], Line]) -> list[Line]:
    """Return the lines of a file that a killed process may have been writing; cut a torn end off.

    In place, so that what is appended starts on a line of its own; the file is not written anew: a
    full disk would take what is in it already.

    Args:
        path: The file; an absent one has no lines.
        read: Makes of a line what it stands for. Where it raises ValueError the file ends.
    """
    found: list[Line] = []
    if not path.exists():
        return found
    whole = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            item = read(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        found.append(item)
        whole += len(line)
    os.truncate(path, whole)
    return found


def disk_refused(path: str | Path, error: Exception) -> CloverError:
    """Return the one line for a file that cannot be written: why, and what to do about it.

    Args:
        path: The file.
        error: The system's, or what torch and safetensors make of a full disk.
    """
    number = error.errno if isinstance(error, OSError) else errno.ENOSPC
    advice = _ADVICE.get(number or 0, "see to the disk and run the same command again")
    return CloverError(f"cannot write {path}: {_reason(error)}; {advice}")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return os.strerror(errno.ENOSPC)


def _is_of_disk(error: Exception) -> bool:
    """Return whether an error is the system's.

    torch and safetensors wrap that of a full disk in types of their own.
    """
    said = ("No space left", "os error 28", "PytorchStreamWriter failed", "inline_container.cc")
    return isinstance(error, OSError) or any(words in str(error) for words in said)


def from_here(path: Path) -> str:
    """Return where a path starts, for a message that it is not there; nothing for a whole path."""
    return "" if path.is_absolute() else f" in {Path.cwd()}"


def umask() -> int:
    """Return what new files and folders are not given; asking sets it, so it is set back."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def open_text(path: Path) -> IO[str]:
    """Open a file to write UTF-8 into; half a sign is written as its escape."""
    return path.open("w", encoding="utf-8", errors=_HALF_SIGNS)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=_HALF_SIGNS)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        CloverError: the file is absent or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CloverError(f"no file {path}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CloverError(f"{path} is not JSON: {error}") from error


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line, atomically; return the number of lines."""
    count = 0
    with atomic_path(path) as partial, open_text(partial) as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) else str(value)


def fingerprint(value: Any) -> str:
    """Return a short stable hash of a JSON-able value: the key of a finished piece of work."""
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
