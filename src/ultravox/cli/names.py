"""What the commands that list and fetch by name share."""

import difflib
from collections.abc import Iterable, Sequence

from ultravox.errors import UltravoxError


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a wrong name before anything is fetched. Errors: UltravoxError with a suggestion."""
    known = list(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(known)}"
            raise UltravoxError(f"no bundled {kind} is named '{name}'; {hint}")


def parse_columns(texts: Iterable[str]) -> dict[str, str]:
    """Our column → theirs, of options such as "text=sentence". Errors: UltravoxError."""
    columns = {}
    for text in texts:
        ours, equals, theirs = text.partition("=")
        if not (ours and equals and theirs):
            raise UltravoxError(f"--columns takes OURS=THEIRS, such as text=sentence; got {text!r}")
        columns[ours] = theirs
    return columns


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns that line up, the last one as long as it likes; plain text, so that it can be piped."""
    table = [tuple(head), *map(tuple, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
