"""How the fields of a row become a passage: one rule for files, clients and commands. Imports no package."""

from __future__ import annotations

import operator


def id_text(value: object) -> str | None:
    """An id as the string that is stored: a string as it is, an integer as its digits; None: it is neither.

    A float is neither: 3.0 and 3 would be two ids, and 12345678901234567890.0 another number's.
    """
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, numpy's or an enum's, the string itself
    if isinstance(value, bool):
        return None
    try:
        return str(operator.index(value))  # type: ignore[arg-type]  # whatever is no integer raises
    except TypeError:
        return None


def join_title(title: str | None, text: str, separator: str = " ") -> str:
    """The text that is encoded: a title that is not blank goes before it, as BEIR's readers do."""
    if title and title.strip():
        return f"{title}{separator}{text}" if text.strip() else title
    return text
