from __future__ import annotations

from training.collections import RawCollection


def test_wrapped_lines_join_and_dots_are_breaks() -> None:
    stanza = "Package: toy\nDescription-en: a toy \n A tool for\n two things.\n .\n  * one\n  * two\n"
    collection = RawCollection.of_descriptions([f"{stanza}\n{stanza}\nPackage: none\n"])
    assert list(collection.queries.values()) == ["a toy"]
    assert list(collection.passages.values()) == ["A tool for two things. * one * two"]
