"""Laws of an index run: states are those of one passage alone; nothing is encoded twice, nothing is lost."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cache.collection import Collection
from cache.states import PassageStates
from cache.store import Store
from encoder_worker.config import CollectionSettings, IndexOptions, PipelineLimits
from encoder_worker.indexing import index
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.sources import Place, Reason, Refused, SourcePassage

Make = Callable[..., list[SourcePassage]]
SMALL = IndexOptions(limits=PipelineLimits(batch_passages=16, group_passages=8))


def stored(store: Store, name: str, ids: list[str]) -> list[PassageStates]:
    found = Collection.open(store, name).get_many(ids)
    assert all(isinstance(states, PassageStates) for states in found)
    return found


@pytest.mark.parametrize("options", [IndexOptions(), SMALL], ids=["one window", "many windows"])
def test_states_are_those_of_each_passage_alone(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make, options: IndexOptions
) -> None:
    items = passages(real_texts[:120])
    report = index(items, encoder, store, "docs", CollectionSettings(3, "Flat"), options)
    assert (report.num_read, report.num_stored, report.num_refused) == (120, 120, 0)
    assert report.padding_share < 0.05
    for item, states in zip(items, stored(store, "docs", [item.passage_id for item in items]), strict=True):
        alone = encoder.encode_one(item.text, 3)
        np.testing.assert_allclose(states.states, alone.states, atol=1e-5)
        assert states.window_tokens == alone.window_tokens
        assert states.text_digest == alone.text_digest
    assert Collection.open(store, "docs").get_texts(["p0", "p119"]) == [items[0].text, items[119].text]


def test_a_second_run_encodes_only_what_is_new_or_changed(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make
) -> None:
    first = passages(real_texts[:30])
    index(first, encoder, store, "docs")
    again = index(first, encoder, store, "docs")
    assert (again.num_unchanged, again.num_encoded, again.num_batches) == (30, 0, 0)
    changed = [
        *first[:10],
        SourcePassage("p10", "another text", Place("test", 11)),
        *first[11:],
        *passages(["new"], "q"),
    ]
    report = index(changed, encoder, store, "docs")
    assert (report.num_unchanged, report.num_stored) == (29, 2)
    assert Collection.open(store, "docs").get_texts(["p10", "q0"]) == ["another text", "new"]
    assert index(first, encoder, store, "docs", options=IndexOptions(force=True)).num_stored == 30


def test_over_long_passages_are_cut_and_counted_or_split(
    short_encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make
) -> None:
    items = passages([*[text for text in real_texts if len(text) > 300][:12], "short"])
    cut = index(items, short_encoder, store, "cut", CollectionSettings(4, "Flat"))
    assert (cut.num_truncated, cut.num_split) == (12, 0)
    assert [entry["line"] for entry in cut.truncated] == list(range(1, 13))
    assert {states.num_tokens for states in stored(store, "cut", [f"p{i}" for i in range(12)])} == {32}

    split = index(items, short_encoder, store, "split", CollectionSettings(4, "Flat"), IndexOptions(split=True))
    assert (split.num_truncated, split.num_split, split.num_stored) == (0, 12, 13)
    for item, states in zip(items, stored(store, "split", [item.passage_id for item in items]), strict=True):
        alone = short_encoder.encode_one(item.text, 4, split=True)
        assert max(states.window_tokens) <= 32
        assert states.window_tokens == alone.window_tokens
        np.testing.assert_allclose(states.states, alone.states, atol=1e-5)


def test_split_encodes_again_what_was_stored_cut(
    short_encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make
) -> None:
    items = passages([real_texts[0] * 5, "short"])
    index(items, short_encoder, store, "docs")
    report = index(items, short_encoder, store, "docs", options=IndexOptions(split=True))
    assert (report.num_stored, report.num_unchanged) == (1, 1)
    assert len(stored(store, "docs", ["p0"])[0].window_tokens) > 1


def test_duplicates_and_refusals_are_reported_and_the_first_counts(
    encoder: PassageEncoder, store: Store, tmp_path: Path
) -> None:
    bad = Refused(Place("test", 2), None, Reason.BROKEN_JSON, "not JSON")
    items = [SourcePassage("a", "one", Place("test", 1)), bad, SourcePassage("a", "two", Place("test", 3))]
    report = index(items, encoder, store, "docs")
    assert (report.num_read, report.num_stored, report.num_refused) == (3, 1, 2)
    assert Collection.open(store, "docs").get_texts(["a"]) == ["one"]
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["refused_by_reason"] == {"broken_json": 1, "duplicate_id": 1}
    assert [(entry["line"], entry["reason"]) for entry in written["refused"]] == [
        (2, "broken_json"),
        (3, "duplicate_id"),
    ]
    assert "test:1" in written["refused"][1]["message"]


def test_strict_stops_at_the_first_refusal_and_keeps_what_came_before(encoder: PassageEncoder, store: Store) -> None:
    bad = Refused(Place("test", 2), None, Reason.BROKEN_JSON, "not JSON")
    items = [SourcePassage("a", "one", Place("test", 1)), bad, SourcePassage("b", "two", Place("test", 3))]
    report = index(items, encoder, store, "docs", options=IndexOptions(strict=True, alias="live"))
    assert report.stopped_by == "test:2: not JSON"
    assert Collection.open(store, "docs").digests(["b"]) == [None]
    assert report.num_stored == 1
    assert store.aliases() == {}


def test_an_alias_is_moved_and_what_it_was_is_told(encoder: PassageEncoder, store: Store, passages: Make) -> None:
    live, moves = IndexOptions(alias="live"), []
    for name in ("docs-1", "docs-1", "docs-2"):
        report = index(passages(["one"]), encoder, store, name, options=live)
        moves.append((report.alias, report.alias_was))
    assert moves == [("live", None), ("live", None), ("live", "docs-1")]
    assert store.aliases() == {"live": "docs-2"}


def test_a_passage_with_nan_states_is_refused_alone(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = passages(real_texts[:20])
    poisoned = list(encoder.tokenize([items[7].text])[0].windows[0])
    encode = encoder._encoder.encode

    def overflow(batch: list[list[int]], ratio: int) -> list[np.ndarray]:
        return [
            np.full_like(states, np.nan) if list(tokens) == poisoned else states
            for tokens, states in zip(batch, encode(batch, ratio), strict=True)
        ]

    monkeypatch.setattr(encoder._encoder, "encode", overflow)
    report = index(items, encoder, store, "docs")
    assert (report.num_stored, report.num_refused) == (19, 1)
    (entry,) = report.refused
    assert (entry["passage_id"], entry["reason"]) == ("p7", "not_finite")


def test_a_batch_over_memory_is_tried_in_halves(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = encoder._encoder.encode

    def little_memory(batch: list[list[int]], ratio: int) -> list[np.ndarray]:
        if sum(map(len, batch)) > 300:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return encode(batch, ratio)

    monkeypatch.setattr(encoder._encoder, "encode", little_memory)
    report = index(passages([*(text[:200] for text in real_texts[:40]), "long " * 400]), encoder, store, "docs")
    assert (report.num_stored, dict(report.refused_by_reason)) == (40, {"out_of_memory": 1})


def test_stop_keeps_what_was_encoded_and_a_rerun_does_the_rest(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make
) -> None:
    stop = threading.Event()
    items = passages(real_texts[:60])
    first = index(
        items, encoder, store, "docs", options=SMALL, stop=stop,
        on_progress=lambda now: stop.set() if now.num_encoded >= 20 else None,
    )  # fmt: skip
    assert first.interrupted
    assert 20 <= first.num_stored == first.num_encoded < 60
    assert Collection.open(store, "docs").stats().num_passages == first.num_stored
    second = index(items, encoder, store, "docs", options=SMALL)
    assert (second.num_unchanged, second.num_stored) == (first.num_stored, 60 - first.num_stored)


def test_reading_that_blocks_does_not_hold_up_a_stop(encoder: PassageEncoder, store: Store, passages: Make) -> None:
    stop, never = threading.Event(), threading.Event()

    def blocked() -> Iterator[SourcePassage]:
        yield from passages(["one", "two"])
        threading.Timer(0.2, stop.set).start()
        never.wait(20)

    report = index(blocked(), encoder, store, "docs", stop=stop)
    never.set()
    assert report.interrupted
    assert report.num_read == 2  # of a batch that was not full
    assert report.seconds < 10


def test_at_most_three_windows_are_in_memory(encoder: PassageEncoder, store: Store, passages: Make) -> None:
    num_read = 0
    ahead = []

    def counted() -> Iterator[SourcePassage]:
        nonlocal num_read
        for item in passages([f"passage number {i}" for i in range(200)]):
            num_read += 1
            yield item

    index(
        counted(), encoder, store, "docs", options=SMALL, on_progress=lambda now: ahead.append(num_read - now.num_done)
    )
    assert max(ahead) <= 3 * 16


@pytest.mark.parametrize("first", ["tokenize", "encode"])
def test_tokenizing_and_the_forward_pass_do_not_wait_for_each_other(
    encoder: PassageEncoder, store: Store, passages: Make, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Whichever of the second window's tokenizing and the first window's passes has to come first, can."""
    tokenized, encoded = threading.Event(), threading.Event()
    tokenize, encode = encoder.tokenize, encoder.encode
    num_calls = 0

    def watched_tokenize(texts: list[str], *, split: bool = False) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2 and first == "encode":
            assert encoded.wait(20), "the first window's pass waited for the second's tokenizing"
        result = tokenize(texts, split=split)
        if num_calls == 2:
            tokenized.set()
        return result

    def watched_encode(batch: list[list[int]], ratio: int) -> object:
        if first == "tokenize":
            assert tokenized.wait(20), "the second window's tokenizing waited for the first's pass"
        result = encode(batch, ratio)
        encoded.set()
        return result

    monkeypatch.setattr(encoder, "tokenize", watched_tokenize)
    monkeypatch.setattr(encoder, "encode", watched_encode)
    items = passages([f"passage number {i}" for i in range(60)])
    assert index(items, encoder, store, "docs", options=SMALL).num_stored == 60
    assert num_calls == 4


UNIFORM = ["the same few words " * 3 for _ in range(12)]


@pytest.mark.parametrize("codec", ["SQ8", "SQ4"])
def test_a_table_of_few_uniform_passages_does_not_ruin_later_ones_silently(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make, codec: str
) -> None:
    """Everything that the table was not trained for is refused and named, or stored because it was asked for."""
    uniform = passages([f"{text} {i}" for i, text in enumerate(UNIFORM)], "u")
    first = index(uniform, encoder, store, "docs", CollectionSettings(4, codec))
    assert first.num_stored == 12
    assert first.clipped_share < 0.01
    assert 0 < first.num_training_states < 1000

    report = index(passages(real_texts[:60]), encoder, store, "docs")

    assert report.num_read == 60
    assert report.num_stored + report.num_refused == 60
    assert report.refused_by_reason[Reason.OUT_OF_RANGE] > 40
    refused = list(report.refused)
    assert all("lie outside what" in entry["message"] for entry in refused)
    assert {entry["reason"] for entry in refused} == {"out_of_range"}

    told = index(passages(real_texts[:60]), encoder, store, "docs", options=IndexOptions(allow_clipped=True))
    assert told.num_refused == 0
    assert told.clipped_share > 0.05
    headers = store.headers_many("docs", [f"p{i}" for i in range(60)])
    assert sum(header.num_clipped for header in headers if header is not None) == told.num_clipped + report.num_clipped


@pytest.mark.parametrize("codec", ["SQ8", "SQ4"])
def test_a_well_trained_table_refuses_nothing(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make, codec: str
) -> None:
    index(passages(real_texts[:100]), encoder, store, "docs", CollectionSettings(4, codec))
    odd = ["cat", "3141592653589793238462643383279502884197" * 4, "zzzz qqqq " * 40, "\U0001f600 " * 60]
    for group in (real_texts[100:160], *[[text] for text in odd]):
        report = index(passages(group, f"q{group[0][:5]}"), encoder, store, "docs")
        assert (report.num_refused, report.num_stored) == (0, len(group))


@pytest.mark.parametrize("codec", ["SQfp16", "Flat", "B16,SQ8"])
def test_a_codec_without_a_table_counts_nothing(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make, codec: str
) -> None:
    report = index(passages([*UNIFORM[:1], *real_texts[:20]]), encoder, store, "docs", CollectionSettings(4, codec))
    assert (report.num_clipped, report.num_refused) == (0, 0)
