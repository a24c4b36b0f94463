"""One kind of error for everything a user can get wrong, and the helper that finds the nearest name.

A message says what was given, what is allowed, the nearest name and what to do next. The command line
prints it without a traceback and exits with status 2; in Python it is an ordinary `ValueError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

LONGEST = 200
"""Letters of a wrong value that a message shows."""
_IN_WORDS = {
    "bool_parsing": "input should be true or false",
    "bool_type": "input should be true or false",
    "dict_type": "input should be a mapping",
    "list_type": "input should be a list",
    "model_attributes_type": "input should be a mapping of fields",
    "model_type": "input should be a mapping of fields",
    "string_too_short": "input should have {min_length} or more characters",
    "string_type": "input should be text",
    "too_long": "input should have {max_length} or fewer items",
    "too_short": "input should have {min_length} or more items",
    "tuple_type": "input should be a list",
}
"""What pydantic says in the names of Python's types, in words of YAML."""


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


def explain(details: Sequence[Mapping[str, Any]], model: Any) -> list[str]:
    """One sentence for each error that pydantic's `errors()` lists, with the nearest field name for unknown keys.

    Args:
        details: what `ValidationError.errors()` gives; pydantic itself is not imported here.
        model: the class that was to be made.
    """
    lines = []
    for detail in details:
        location = detail["loc"]
        if detail["type"] == "too_short" and any(other["loc"][:-1] == location for other in details):
            continue  # only because an item that is wrong was not counted
        place = ".".join(str(part) for part in location)
        head = f"{place}: " if place else ""
        match detail["type"]:
            case "extra_forbidden":
                lines.append(unknown("field", str(location[-1]), _fields_at(location, model), place=place))
            case "missing":
                lines.append(f"{head}required, and not given.")
            case "value_error":  # a sentence of this package
                lines.append(f"{head}{detail['ctx']['error']}")
            case name:
                text = _IN_WORDS[name].format_map(detail.get("ctx", {})) if name in _IN_WORDS else detail["msg"]
                text = text[0].lower() + text[1:]
                lines.append(f"{head}{text}; given {_shown(detail.get('input'))}.")
    return lines


def _fields_at(location: Sequence[int | str], model: Any) -> Iterable[str]:
    """Names of the fields of a pydantic model, or of one nested in it, that are allowed where an error points."""
    for part in location[:-1]:
        if part in model.model_fields:
            model = next(_models(model.model_fields[part].annotation), model)
    return model.model_fields


def _models(annotation: Any) -> Iterator[Any]:
    """The pydantic models in a field's type."""
    if hasattr(annotation, "model_fields"):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def all_of(errors: Sequence[str], source: str) -> UserError:
    """Every error of what `source` gave in one message."""
    count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
    return UserError("\n  - ".join([f"{source}: {count}", *errors]))
