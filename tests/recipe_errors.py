"""What a recipe that is wrong is told."""

from __future__ import annotations

from typing import Any

import pytest

from robust_unlearning import UserError, load_recipe


def load_error(source: Any, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(source, overrides)
    return str(caught.value)


def lines_of(message: str) -> list[str]:
    """The errors of a message, one a line, after the line that counts them."""
    head, *lines = message.splitlines()
    count = int(head.split(": ")[-1].split()[0])
    assert count == len(lines), message
    return lines
