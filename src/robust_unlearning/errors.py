"""One kind of error for everything a user can get wrong, and the helper that finds the nearest name.

A message says what was given, what is allowed, the nearest name and what to do next. The command line
prints it without a traceback and exits with status 2; in Python it is an ordinary `ValueError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """Something the user gave cannot work; the message says what would."""


def nearest(name: str, allowed: Iterable[str], alike: float = 0.66) -> str | None:
    """The allowed name closest in spelling to `name`, or None when nothing is close.

    A `name` without a slash is compared with last parts too: `rmu` is close to `tiny/rmu`.

    Args:
        alike: share of letters that must agree, in order; the default lets one of three differ.
    """
    names = sorted(allowed, key=len, reverse=True)
    folded = {} if "/" in name else {each.rpartition("/")[2].lower(): each for each in names}
    folded |= {each.lower(): each for each in names}
    found = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=alike)
    return folded[found[0]] if found else None


def no_column(where: str, column: str, row: Mapping[str, Any], what: str) -> UserError:
    """The error for a row that lacks a column; `what` the row is called, `where` it stands."""
    close = nearest(column, map(str, row))
    hint = f" Rename {close!r} to {column!r}?" if close else ""
    return UserError(f"{where}: no {column!r}; the {what} has {', '.join(map(str, row)) or 'nothing'}.{hint}")


def kind(value: Any) -> str:
    """What a value read from YAML or JSON is, in a user's words.

    >>> kind([1, 2])
    'a list'
    """
    match value:
        case None:
            return "nothing"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case Mapping():
            return "a mapping"
    return "a list" if isinstance(value, list | tuple) else type(value).__name__


def unknown(kind: str, name: str, allowed: Iterable[str], next_step: str = "", place: str = "") -> str:
    """The sentence for an unknown name: what was given, the nearest, what is allowed, what to do next.

    `place` is shown instead of `name` where the name alone would not tell which one is meant.

    >>> unknown("method", "rmuu", ["rmu", "rsv"])
    "unknown method 'rmuu': did you mean 'rmu'? Allowed: rmu, rsv."
    """
    names = sorted(allowed)
    close = nearest(name, names)
    hint = f": did you mean {close!r}?" if close else "."
    shown = ", ".join(names[:30]) + (f", … ({len(names)} in all)" if len(names) > 30 else "")
    text = f"unknown {kind} {(place or name)!r}{hint} Allowed: {shown or 'none'}."
    return f"{text} {next_step}" if next_step else text
