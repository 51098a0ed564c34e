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


def parse_columns(texts: Iterable[str], sources: Sequence[str]) -> dict[str, dict[str, str]]:
    """Source → our column → theirs, of options such as "text=sentence" (of every source) and "a.jsonl:text=said".

    What is said of one source goes before what is said of all. Errors: UltravoxError.
    """
    of_all: dict[str, str] = {}
    of_one: dict[str, dict[str, str]] = {source: {} for source in sources}
    for text in texts:
        # a source's name may hold any of these signs
        source = max((name for name in sources if text.startswith(f"{name}:")), key=len, default=None)
        ours, equals, theirs = (text if source is None else text[len(source) + 1 :]).partition("=")
        if source is None and ":" in ours:
            raise UltravoxError(
                f"--columns {text}: no source is called {ours.rpartition(':')[0]!r} on this command line: expected one "
                f"of {', '.join(dict.fromkeys(sources))}"
            )
        if not (ours and equals and theirs):
            raise UltravoxError(
                "--columns takes OURS=THEIRS, such as text=sentence, or SOURCE:OURS=THEIRS for one source alone; got "
                f"{text!r}"
            )
        (of_all if source is None else of_one[source])[ours] = theirs
    return {source: {**of_all, **own} for source, own in of_one.items()}


def hours(seconds: float) -> str:
    """A length as people read it: 7.4 s, 3.2 min, 12.50 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 360 else f"{seconds / 3600:.2f} h"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns that line up, the last one as long as it likes; plain text, so that it can be piped."""
    table = [tuple(head), *map(tuple, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
