"""The ledger: every request is booked before it is sent and settled when its reply is stored.

One SQLite file beside the output. `requests` holds what was asked, by content, with its reply;
`attempts` holds every sending of it, with its tokens and dollars. An attempt walks

    reserved -> settled     the reply arrived; tokens as the endpoint counted them
             -> refused     the endpoint answered with an error; nothing is owed
             -> lost        no reply arrived; booked at its reserved worst case

so that a process killed at any moment leaves a file that says what is owed at most.
Outside `grouped` every booking is committed when its method returns.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from clover.core.errors import CloverError
from clover.instruct.commit import GroupCommit
from clover.instruct.prices import Price

Outcome = Literal["open", "done", "failed"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
  key TEXT PRIMARY KEY, model TEXT NOT NULL, prompt TEXT NOT NULL, outcome TEXT NOT NULL,
  reason TEXT, is_final INTEGER NOT NULL DEFAULT 0, reply TEXT, finish_reason TEXT
);
CREATE TABLE IF NOT EXISTS attempts (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL, day TEXT NOT NULL, model TEXT NOT NULL,
  endpoint TEXT NOT NULL, state TEXT NOT NULL, batch TEXT,
  worst_input INTEGER NOT NULL, worst_output INTEGER NOT NULL, worst_usd REAL NOT NULL,
  input_price REAL NOT NULL, output_price REAL NOT NULL,
  input_tokens INTEGER NOT NULL DEFAULT 0, output_tokens INTEGER NOT NULL DEFAULT 0,
  usd REAL NOT NULL DEFAULT 0, seconds REAL, is_estimated INTEGER NOT NULL DEFAULT 0, note TEXT
);
CREATE INDEX IF NOT EXISTS attempts_in_flight ON attempts (key, batch) WHERE state = 'reserved';
CREATE TABLE IF NOT EXISTS batches (
  name TEXT PRIMARY KEY, remote TEXT, state TEXT NOT NULL, note TEXT
);
CREATE TABLE IF NOT EXISTS merged (name TEXT PRIMARY KEY);
"""
_OUTCOME = ("outcome", "reason", "is_final", "reply", "finish_reason")
_OPEN_DECLINED = (
    "model = ? AND prompt = ? AND outcome = 'failed' AND NOT is_final AND reason LIKE 'declined:%'"
)
_ATTEMPT = (
    *("key", "day", "model", "endpoint", "state", "batch"),
    *("worst_input", "worst_output", "worst_usd", "input_price", "output_price"),
    *("input_tokens", "output_tokens", "usd", "seconds", "is_estimated", "note"),
)


def ledger_path(out: str | Path) -> Path:
    """Return where the ledger of an output file lies: ``F.ledger.sqlite``."""
    path = Path(out)
    return path if path.name.endswith(".ledger.sqlite") else Path(f"{path}.ledger.sqlite")


@dataclass(frozen=True)
class Worst:
    """What a request can cost at most: tokens in, tokens out."""

    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Totals:
    """A ledger's sums. Tokens and `usd` are of replies that arrived; `lost_*` are worst cases."""

    requests: int
    done: int
    failed: int
    open: int
    attempts: int
    input_tokens: int
    output_tokens: int
    usd: float
    estimated: int
    """Replies without token usage; their tokens are our estimate."""
    lost: int
    """Attempts whose reply never arrived."""
    lost_input_tokens: int
    lost_output_tokens: int
    lost_usd: float

    @property
    def booked_usd(self) -> float:
        """What is owed at most: settled and lost. The budget counts this."""
        return self.usd + self.lost_usd

    def row(self) -> dict[str, float | int]:
        """Return the JSON-able form, dollars rounded to a millionth."""
        row: dict[str, float | int] = {**asdict(self), "booked_usd": self.booked_usd}
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


class Ledger:
    """The books of one output file. Open it with `writing` to spend, plainly to read."""

    def __init__(self, path: str | Path, *, must_exist: bool = False) -> None:
        self.path = Path(path)
        if must_exist and not self.path.is_file():
            raise CloverError(f"no ledger {self.path}; `clover instruct generate` writes one")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=30)
            self._check_tables()  # before a stranger's database is changed
            # With WAL and NORMAL a killed process loses nothing; a power cut at most the last few.
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise CloverError(f"{self.path} is not a ledger: {error}; move it away") from error
        # Summed once: adding up a million rows before each request would be slower than asking.
        self._committed = self._sum_committed()
        self._reserved: dict[int, float] = {}
        self._group: GroupCommit | None = None

    def _check_tables(self) -> None:
        """Check that what is in the file already is a ledger's.

        Raises:
            sqlite3.DatabaseError: it is another database.
        """
        tables = self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        found = {str(name) for (name,) in tables}
        ours = {"requests": {"key", "model", "prompt", *_OUTCOME}, "attempts": {"id", *_ATTEMPT}}
        if found and not found & ours.keys():
            raise sqlite3.DatabaseError(f"it is another database, with a table '{min(found)}'")
        for table in found & ours.keys():
            rows = self._db.execute(f"PRAGMA table_info({table})").fetchall()
            missing = ours[table] - {str(row[1]) for row in rows}
            if missing:
                raise sqlite3.DatabaseError(f"its table '{table}' has no column '{min(missing)}'")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- asking ---------------------------------------------------------------------------

    def outcome(self, key: str, *, retry_failed: bool = False) -> Outcome | None:
        """Return what became of a request: None or `open` means that it may be asked."""
        row = self._db.execute(
            "SELECT outcome, is_final FROM requests WHERE key = ?", (key,)
        ).fetchone()
        if row is None:
            return None
        outcome, is_final = row
        if outcome == "failed" and (retry_failed or not is_final):
            return "open"
        found: Outcome = outcome
        return found

    def may_ask(self, key: str, *, retry_failed: bool = False) -> bool:
        """Say whether a request is to be sent: not answered, not failed, and in no open batch."""
        outcome = self.outcome(key, retry_failed=retry_failed)
        return outcome is None or (outcome == "open" and not self.is_in_batch(key))

    def reserve(
        self,
        key: str,
        *,
        request: tuple[str, str, str],
        worst: Worst,
        price: Price,
        budget: float | None,
        batch: str | None = None,
    ) -> int | None:
        """Book a request at its worst case before it is sent.

        Args:
            key: The request's content key.
            request: Model, prompt identity, endpoint.
            worst: What it can cost at most.
            price: Dollars per million tokens.
            budget: Most dollars that may ever be booked in this ledger.
            batch: A batch's name, for the Batch API.

        Returns:
            The attempt's number, or None when the budget does not allow it. Inside `grouped` it
            may be sent after `committed` only.
        """
        model, prompt, endpoint = request
        usd = price.dollars(worst.input_tokens, worst.output_tokens)
        if budget is not None and self._committed + usd > budget + 1e-12:
            return None
        with self._transaction():
            self._db.execute(
                "INSERT INTO requests (key, model, prompt, outcome) VALUES (?, ?, ?, 'open') "
                "ON CONFLICT (key) DO UPDATE SET outcome = 'open', reason = NULL",
                (key, model, prompt),
            )
            cursor = self._db.execute(
                "INSERT INTO attempts (key, day, model, endpoint, state, batch, worst_input, "
                "worst_output, worst_usd, input_price, output_price) "
                "VALUES (?, ?, ?, ?, 'reserved', ?, ?, ?, ?, ?, ?)",
                (
                    *(key, time.strftime("%Y-%m-%d"), model, endpoint, batch),
                    *(worst.input_tokens, worst.output_tokens, usd),
                    *(price.input_usd, price.output_usd),
                ),
            )
        attempt = int(cursor.lastrowid or 0)
        self._committed += usd
        self._reserved[attempt] = usd
        return attempt

    @property
    def committed_usd(self) -> float:
        """Dollars settled, lost, and reserved by requests in flight: what the budget caps."""
        return self._committed

    def _release(self, attempt: int, owed: float) -> None:
        """Put what is owed in the place of what was reserved."""
        worst = self._reserved.pop(attempt, None)
        if worst is None:
            (worst,) = self._db.execute(
                "SELECT worst_usd FROM attempts WHERE id = ?", (attempt,)
            ).fetchone()
        self._committed += owed - float(worst)

    def _sum_committed(self) -> float:
        (usd,) = self._db.execute(
            "SELECT COALESCE(SUM(CASE state WHEN 'reserved' THEN worst_usd ELSE usd END), 0) "
            "FROM attempts WHERE state != 'refused'"
        ).fetchone()
        return float(usd)

    # -- settling -------------------------------------------------------------------------

    def settle(
        self,
        attempt: int,
        *,
        tokens: tuple[int, int],
        reply: str,
        finish_reason: str = "stop",
        seconds: float = 0.0,
        is_estimated: bool = False,
    ) -> None:
        """Book a usable reply and mark its request as done, in one transaction."""
        with self._transaction():
            usd = self._book(attempt, tokens, seconds, is_estimated)
            self._db.execute(
                "UPDATE requests SET reply = ?, finish_reason = ?, outcome = 'done', reason = NULL "
                "WHERE key = (SELECT key FROM attempts WHERE id = ?)",
                (reply, finish_reason, attempt),
            )
        self._release(attempt, usd)

    def settle_unusable(
        self, attempt: int, *, tokens: tuple[int, int], note: str, is_estimated: bool = False
    ) -> None:
        """Book a reply that arrived and must be paid, but cannot be used."""
        with self._transaction():
            usd = self._book(attempt, tokens, 0.0, is_estimated)
            self._db.execute("UPDATE attempts SET note = ? WHERE id = ?", (note[:200], attempt))
        self._release(attempt, usd)

    def _book(
        self, attempt: int, tokens: tuple[int, int], seconds: float, is_estimated: bool
    ) -> float:
        """Write a settled attempt; return the dollars that take the place of its reservation."""
        (usd,) = self._db.execute(
            "UPDATE attempts SET state = 'settled', input_tokens = ?, output_tokens = ?, "
            "usd = (? * input_price + ? * output_price) / 1e6, seconds = ?, is_estimated = ? "
            "WHERE id = ? RETURNING usd",
            (*tokens, *tokens, seconds, is_estimated, attempt),
        ).fetchone()
        return float(usd)

    def refuse(self, attempt: int, note: str) -> None:
        """Book an attempt that the endpoint answered with an error: nothing is owed."""
        self._db.execute(
            "UPDATE attempts SET state = 'refused', note = ? WHERE id = ?", (note[:200], attempt)
        )
        self._release(attempt, 0.0)

    def lose(self, attempt: int, note: str) -> None:
        """Book an attempt whose reply never arrived at its reserved worst case."""
        self._db.execute(
            "UPDATE attempts SET state = 'lost', note = ?, usd = worst_usd, "
            "input_tokens = worst_input, output_tokens = worst_output WHERE id = ?",
            (note[:200], attempt),
        )
        self._reserved.pop(attempt, None)

    def fail(self, key: str, reason: str, *, is_final: bool) -> None:
        """Mark a request as failed; a final failure is not asked again by the same command."""
        self._db.execute(
            "UPDATE requests SET outcome = 'failed', reason = ?, is_final = ? WHERE key = ?",
            (reason[:300], is_final, key),
        )

    def close_declined(self) -> None:
        """Make final what a model declined that has answered the same prompt by now."""
        answered = self._db.execute(
            "SELECT DISTINCT model, prompt FROM requests WHERE outcome = 'done'"
        ).fetchall()
        with self._transaction():
            for names in answered:
                self._db.execute(f"UPDATE requests SET is_final = 1 WHERE {_OPEN_DECLINED}", names)

    def recover(self) -> list[str]:
        """Book what a killed process left in flight as lost; return the keys."""
        rows = self._db.execute(
            "SELECT id, key FROM attempts WHERE state = 'reserved' AND batch IS NULL"
        ).fetchall()
        for attempt, _ in rows:
            self.lose(attempt, "the process was stopped while this was in flight")
        return [key for _, key in rows]

    def merge(self, path: Path) -> int:
        """Take over the books of a shard, once: a second time nothing is booked.

        Args:
            path: The shard's ledger, with nothing in flight. Its file name must be its own.

        Returns:
            The attempts taken over.
        """
        self._db.execute("ATTACH ? AS shard", (str(path),))
        try:
            with self._transaction():
                row = (path.name,)
                if not self._db.execute("INSERT OR IGNORE INTO merged VALUES (?)", row).rowcount:
                    return 0
                columns, news = (
                    ", ".join(_OUTCOME),
                    ", ".join(f"{c} = excluded.{c}" for c in _OUTCOME),
                )
                self._db.execute(
                    f"INSERT INTO requests (key, model, prompt, {columns}) "
                    f"SELECT key, model, prompt, {columns} FROM shard.requests WHERE true "
                    f"ON CONFLICT (key) DO UPDATE SET {news} WHERE requests.outcome != 'done'"
                )
                columns = ", ".join(_ATTEMPT)
                taken = self._db.execute(
                    f"INSERT INTO attempts ({columns}) "
                    f"SELECT {columns} FROM shard.attempts ORDER BY id"
                ).rowcount
        finally:
            self._db.execute("DETACH shard")
        self._committed = self._sum_committed()
        return int(taken)

    # -- reading --------------------------------------------------------------------------

    def reply(self, key: str) -> tuple[str, str] | None:
        """Return the stored reply of a request that is done, and its finish reason."""
        row = self._db.execute(
            "SELECT reply, finish_reason FROM requests WHERE key = ? AND outcome = 'done'", (key,)
        ).fetchone()
        return (row[0], row[1]) if row and row[0] is not None else None

    def reason(self, key: str) -> str | None:
        """Return why a request failed."""
        row = self._db.execute(
            "SELECT reason FROM requests WHERE key = ? AND outcome = 'failed'", (key,)
        ).fetchone()
        return str(row[0]) if row else None

    def has_reply(self, model: str, prompt: str) -> bool:
        """Say whether a model ever answered a prompt."""
        found = self._db.execute(
            "SELECT 1 FROM requests WHERE outcome = 'done' AND model = ? AND prompt = ? LIMIT 1",
            (model, prompt),
        )
        return found.fetchone() is not None

    def open_declined(self, model: str, prompt: str) -> set[str]:
        """Return the keys of what was declined and may be asked again."""
        rows = self._db.execute(f"SELECT key FROM requests WHERE {_OPEN_DECLINED}", (model, prompt))
        return {str(key) for (key,) in rows}

    def totals(self) -> Totals:
        """Return the sums over the whole ledger."""
        counts = dict(
            self._db.execute("SELECT outcome, COUNT(*) FROM requests GROUP BY outcome").fetchall()
        )
        sums = self._db.execute(
            "SELECT COUNT(*), COALESCE(SUM(state = 'lost'), 0), COALESCE(SUM(is_estimated), 0), "
            + ", ".join(
                f"COALESCE(SUM(CASE WHEN state {sign} 'lost' THEN {column} ELSE 0 END), 0)"
                for sign in ("!=", "=")
                for column in ("input_tokens", "output_tokens", "usd")
            )
            + " FROM attempts"
        ).fetchone()
        attempts, lost, estimated, inputs, outputs, usd, *lost_sums = sums
        return Totals(
            requests=sum(counts.values()),
            done=counts.get("done", 0),
            failed=counts.get("failed", 0),
            open=counts.get("open", 0),
            attempts=attempts,
            input_tokens=inputs,
            output_tokens=outputs,
            usd=float(usd),
            estimated=estimated,
            lost=lost,
            lost_input_tokens=lost_sums[0],
            lost_output_tokens=lost_sums[1],
            lost_usd=float(lost_sums[2]),
        )

    def breakdown(self) -> list[dict[str, float | int | str]]:
        """Return sums by model, day and state of the attempt."""
        rows = self._db.execute(
            "SELECT model, day, state, COUNT(*), SUM(input_tokens), SUM(output_tokens), SUM(usd) "
            "FROM attempts GROUP BY model, day, state ORDER BY model, day, state"
        ).fetchall()
        names = ("model", "day", "outcome", "attempts", "input_tokens", "output_tokens", "usd")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def means(self, model: str) -> tuple[float, float] | None:
        """Return the mean output tokens and seconds of a model's replies, if there are any."""
        row = self._db.execute(
            "SELECT AVG(output_tokens), AVG(seconds) FROM attempts "
            "WHERE state = 'settled' AND is_estimated = 0 AND seconds > 0 AND model = ?",
            (model,),
        ).fetchone()
        return (float(row[0]), float(row[1])) if row and row[0] is not None else None

    def failures(self) -> list[tuple[str, int]]:
        """Return the reasons of failed requests with their counts."""
        rows = self._db.execute(
            "SELECT reason, COUNT(*) FROM requests WHERE outcome = 'failed' "
            "GROUP BY reason ORDER BY 2 DESC"
        )
        return [(str(reason), int(count)) for reason, count in rows.fetchall()]

    # -- batches --------------------------------------------------------------------------

    def open_batches(self) -> list[tuple[str, str | None]]:
        """Return name and remote id of the batches that are not ingested yet."""
        rows = self._db.execute("SELECT name, remote FROM batches WHERE state = 'open'").fetchall()
        return [(str(name), remote) for name, remote in rows]

    def note_batch(
        self, name: str, *, remote: str | None = None, state: str = "open", note: str = ""
    ) -> None:
        """Write down what is known of a batch."""
        self._db.execute(
            "INSERT INTO batches (name, remote, state, note) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET remote = COALESCE(excluded.remote, remote), "
            "state = excluded.state, note = excluded.note",
            (name, remote, state, note[:200]),
        )

    def num_batches(self) -> int:
        """Return how many batches were ever begun."""
        return int(self._db.execute("SELECT COUNT(*) FROM batches").fetchone()[0])

    def in_batch(self, name: str) -> dict[int, tuple[str, int]]:
        """Return the attempts of a batch still in flight: number to key and worst-case input."""
        rows = self._db.execute(
            "SELECT id, key, worst_input FROM attempts WHERE batch = ? AND state = 'reserved'",
            (name,),
        ).fetchall()
        return {int(number): (str(key), int(worst)) for number, key, worst in rows}

    def batch_endpoint(self, name: str) -> str | None:
        """Return where a batch was sent, while any of its attempts is in flight."""
        row = self._db.execute(
            "SELECT endpoint FROM attempts WHERE batch = ? AND state = 'reserved'", (name,)
        ).fetchone()
        return str(row[0]) if row else None

    def is_in_batch(self, key: str) -> bool:
        """Say whether a request waits in a batch."""
        found = self._db.execute(
            "SELECT 1 FROM attempts WHERE key = ? AND state = 'reserved' AND batch IS NOT NULL",
            (key,),
        )
        return found.fetchone() is not None

    # -- transactions ---------------------------------------------------------------------

    @contextlib.contextmanager
    def grouped(self) -> Iterator[None]:
        """Let all bookings of one turn of the running event loop share a commit."""
        self._group = GroupCommit(self._db)
        try:
            yield
        finally:
            group, self._group = self._group, None
            group.commit()

    async def committed(self) -> None:
        """Wait until all that was booked is committed; inside `grouped` that may take a turn."""
        if self._group is not None:
            await self._group.committed()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._group is not None:
            self._group.begin()
            # Others' bookings share the commit: half of this one must not be in it.
            begin, undo, end = "SAVEPOINT one", "ROLLBACK TO one", "RELEASE one"
        else:
            begin, undo, end = "BEGIN IMMEDIATE", "ROLLBACK", "COMMIT"
        self._db.execute(begin)
        try:
            yield
        except BaseException:
            self._db.execute(undo)
            raise
        self._db.execute(end)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Ledger]:
    """Open a ledger to spend from; a second process on the same output is turned away.

    Raises:
        CloverError: another process is writing this ledger.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{target}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CloverError(
                f"another process is writing {target}; wait for it, or give another --out"
            ) from error
        with Ledger(target) as ledger:
            yield ledger
