"""Stages as people write them."""

from __future__ import annotations

import pytest

from preread.client import Stage, format_stages, parse_stages


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("32:100, 4:20, 1:5", (Stage(32, 100), Stage(4, 20), Stage(1, 5))),
        (" 32 : 100 ,4", (Stage(32, 100), Stage(4))),
        ("8", (Stage(8),)),
    ],
)
def test_stages_read_as_written_and_back(text: str, stages: tuple[Stage, ...]) -> None:
    assert parse_stages(text) == stages
    assert parse_stages(format_stages(stages)) == stages


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "RATIO:KEEP"),
        ("32:100,", "RATIO:KEEP"),
        ("32-100", "RATIO:KEEP"),
        ("32:-1,4", "RATIO:KEEP"),
        ("３２:100,4", "RATIO:KEEP"),
        ("32:100,4:200", r"stages\[1\].keep .* at most 100"),
        ("4:100,32", r"stages\[1\].compression_ratio .* less than 4"),
        ("32,4", r"stages\[0\].keep"),
        ("0:5", r"stages\[0\].compression_ratio"),
    ],
)
def test_what_cannot_be_read_is_told(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_stages(text)
