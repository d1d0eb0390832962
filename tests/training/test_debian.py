from __future__ import annotations

from training.collections import clean_body


def test_wrapped_lines_join_and_dots_are_breaks() -> None:
    assert clean_body(" A tool for\n two things.\n .\n  * one\n  * two\n") == "A tool for two things. * one * two"
