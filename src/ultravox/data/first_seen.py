"""Which row was the first with some content, for more rows than fit into memory."""

import hashlib
import sqlite3


class FirstSeen:
    """Content → the name that it was first seen under.

    The table is a temporary database of SQLite: in memory while it is small, on disk when it grows, gone with the
    process. A key is 128 bits of a SHA-256.
    """

    def __init__(self) -> None:
        self._table = sqlite3.connect("", isolation_level=None)
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute("PRAGMA synchronous = OFF")
        self._table.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, name TEXT) WITHOUT ROWID")
        self._table.execute("BEGIN")

    def first(self, content: str, name: str) -> str | None:
        """The name that this content came under before; None when it comes for the first time."""
        key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:16]
        if self._table.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, name)).rowcount:
            return None
        return str(self._table.execute("SELECT name FROM seen WHERE key = ?", (key,)).fetchone()[0])

    def close(self) -> None:
        """Drop the table."""
        self._table.close()
