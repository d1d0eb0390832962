"""The grid of a sweep: stages as people write them, and which combinations can be."""

from __future__ import annotations

import pytest

from cache.errors import CodecError
from preread.values import parse_stages
from tuning import EvaluationError
from tuning.config import SweepSettings
from tuning.sweep.settings import Configuration, resolved, units_of
from tuning.sweep.settings import grid as grid_of


def grid(
    stored: tuple[int, ...], codecs: tuple[str, ...], read: tuple[int, ...], cascades: list[str]
) -> list[Configuration]:
    stages = tuple(map(parse_stages, cascades))
    settings = SweepSettings(stored_ratios=stored, codecs=codecs, read_ratios=read, cascades=stages)
    return grid_of(settings)


def test_a_grid_has_what_can_be_read() -> None:
    found = grid((4, 2), ("Flat", "SQ8"), (2, 4, 8), ["8:3,2", "8:3,4"])
    names = [one.name for one in found]
    assert names[:6] == ["2 Flat read 2", "2 Flat read 4", "2 Flat read 8", "2 Flat read 8:3,2", "2 Flat read 8:3,4",
                         "2 SQ8 read 2"]  # fmt: skip
    assert [n for n in names if n.startswith("4 SQ8")] == ["4 SQ8 read 4", "4 SQ8 read 8", "4 SQ8 read 8:3,4"]
    assert len({one.file_stem for one in found}) == len(found)


def test_cascades_share_the_units_of_plain_readings() -> None:
    found = grid((2,), ("Flat",), (2, 8), ["8:3,2", "16:3,2"])
    assert [one.name for one in units_of(found)] == ["2 Flat read 2", "2 Flat read 8", "2 Flat read 16"]


def test_what_is_left_open_follows_from_the_states() -> None:
    settings = resolved(SweepSettings(top_k=100), 1, 64)
    assert settings.stored_ratios == (1, 2, 4, 8)
    assert settings.read_ratios == (1, 2, 4, 8, 16, 32)
    assert settings.codecs == ("Flat", "SQfp16", "SQ8", "B32,SQ4", "PQ16", "PQ8")
    assert settings.cascades is not None
    assert settings.cascades[0] == parse_stages("32:20,2")  # the published one
    assert resolved(SweepSettings(), 16, 7).stored_ratios == (16,)
    assert resolved(SweepSettings(), 1, 7).codecs == ("Flat", "SQfp16", "SQ8", "B32,SQ4", "PQ1")
    assert resolved(SweepSettings(top_k=4), 1, 64).cascades == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stored_ratios": (0,)}, r"stored_ratios is \(0,\); expected integers of at least 1"),
        ({"read_ratios": (2, 2)}, r"read_ratios is \(2, 2\); expected each once"),
        ({"codecs": ()}, r"codecs is \(\); expected at least one, each once"),
        ({"few_samples": "guess"}, "few_samples is 'guess'; expected fallback, refuse"),
        ({"rounds": 0}, "rounds is 0; expected at least 1"),
    ],
)
def test_bad_settings_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        SweepSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stored_ratios": (6,)}, "stored ratio is 6; the states are at 4, expected a multiple of it"),
        ({"stored_ratios": (4, 8), "read_ratios": (6,)}, "read ratio is 6; no stored ratio of 4, 8 can give it"),
        ({"cascades": (parse_stages("8:2,6"),)}, "cascade is 8:2,6; no stored ratio"),
    ],
)
def test_ratios_that_cannot_be_given_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        resolved(SweepSettings(**values), 4, 64)  # type: ignore[arg-type]


def test_a_codec_that_faiss_does_not_know_is_refused_before_anything_is_encoded() -> None:
    with pytest.raises(CodecError, match="'ZIP9' is unknown, expected one of Flat"):
        resolved(SweepSettings(codecs=("Flat", "ZIP9")), 1, 64)
