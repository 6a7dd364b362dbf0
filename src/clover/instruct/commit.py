"""One commit for all that is booked in one turn of the event loop.

A commit costs several times what it writes. While requests are on their way, a reply that was
settled, the next request that was reserved, and whatever other replies came in the same instant
share one: nothing waits for company, and nothing is sent before its reservation is committed.
"""

from __future__ import annotations

import asyncio
import sqlite3


class GroupCommit:
    """Holds one open transaction at most, until the loop comes round. Needs a running loop."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._written: asyncio.Future[None] | None = None

    def begin(self) -> None:
        """Open a transaction, or join the one that is open."""
        if self._written is not None:
            return
        self._database.execute("BEGIN IMMEDIATE")
        self._written = self._loop.create_future()
        self._loop.call_soon(self.commit)

    async def committed(self) -> None:
        """Wait until all that was booked so far is committed.

        Raises:
            sqlite3.Error: the disk refused it; none of the group is booked.
        """
        if self._written is not None:
            # One who is cancelled while waiting must not cancel what the others wait for.
            await asyncio.shield(self._written)

    def commit(self) -> None:
        """Commit what is open, and let go on whoever waits for it."""
        if self._written is None:
            return
        written, self._written = self._written, None
        try:
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            written.set_exception(error)
        else:
            written.set_result(None)
