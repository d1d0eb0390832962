"""Laws of the collection an index run writes to: codecs that train, aliases, settings, dry runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from cache.collection import Collection
from cache.errors import CodecError, CollectionExists, EncoderMismatch, InvalidName
from cache.states import PassageStates
from cache.store import Store
from encoder_worker.config import CollectionSettings, IndexOptions, PipelineLimits
from encoder_worker.indexing import IndexReport, dry_run, index
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.sources import SourcePassage
from encoder_worker.writing import Target, Upsert, WriteGroup, encode

Make = Callable[..., list[SourcePassage]]
SMALL = IndexOptions(limits=PipelineLimits(batch_passages=16, group_passages=8))


def test_codecs_that_train_do_so_on_the_first_passages(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make
) -> None:
    items = passages(real_texts[:150])
    report = index(items, encoder, store, "docs", CollectionSettings(1, "PQ16"), SMALL)
    assert report.num_stored == 150
    (states,) = Collection.open(store, "docs").get_many(["p3"])
    exact = encoder.encode_one(items[3].text, 1).states
    assert np.abs(states.states - exact).mean() < 0.5 * np.abs(exact).mean()
    with pytest.raises(CodecError, match=r"PQ16 trains on at least 256"):
        index(items[:2], encoder, store, "few", CollectionSettings(32, "PQ16"))
    assert store.list_collections() == ["docs"]


def test_a_group_gathers_what_the_codec_wrote(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make
) -> None:
    """Of float32 states only the latest are held; a passage that cannot be stored is refused with its group."""
    target, group = Target(store, "docs", CollectionSettings(1), encoder), WriteGroup()
    upserts = [Upsert(one) for one in passages(real_texts[:60])]
    upserts[7].passage = replace(upserts[7].passage, text="\udc80")
    held = 0
    for one in upserts:
        one.take(encoder.encode_one(real_texts[0] if one is upserts[7] else one.passage.text, 1))
        group.add(one)
        if plain := group.take_plain(target):
            encode(plain, target)
        held = max(held, sum(one.num_states for one in upserts if isinstance(one.states, PassageStates)))
    assert sum(one.num_states for one in upserts) > 3 * held
    group.write(target, PipelineLimits())
    assert [one for one in upserts if not one.stored] == [upserts[7]]
    assert upserts[7].refused is not None
    (states,) = Collection.open(store, "docs").get_many(["p3"])
    exact = encoder.encode_one(real_texts[3], 1).states
    assert np.array_equal(states.states, exact.astype(np.float16).astype(np.float32))


def test_an_interrupted_run_trains_no_codec(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make
) -> None:
    stop = threading.Event()
    report = index(
        passages(real_texts[:60]), encoder, store, "docs", CollectionSettings(1, "PQ16"), SMALL,
        stop=stop, on_progress=lambda now: stop.set(),
    )  # fmt: skip
    assert (report.interrupted, report.num_stored, store.list_collections()) == (True, 0, [])


def test_an_alias_moves_when_everything_was_read(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make
) -> None:
    items = passages(real_texts[:5])
    index(items, encoder, store, "docs-1", options=IndexOptions(alias="docs"))
    report = index(items, encoder, store, "docs-2", CollectionSettings(8), IndexOptions(alias="docs"))
    assert (report.alias, store.aliases()) == ("docs", {"docs": "docs-2"})
    assert index(items, encoder, store, "docs").num_unchanged == 5  # by alias
    for alias, error in (("docs-1", CollectionExists), ("docs-2", CollectionExists), ("a b", InvalidName)):
        with pytest.raises(error):
            index(items, encoder, store, "docs-2", options=IndexOptions(alias=alias))


def test_a_collection_of_another_encoder_or_with_other_settings_is_refused(
    encoder: PassageEncoder, short_encoder: PassageEncoder, store: Store, passages: Make
) -> None:
    items = passages(["text"])
    index(items, encoder, store, "docs", CollectionSettings(4, "SQfp16", stores_text=False))
    with pytest.raises(EncoderMismatch, match="was written by encoder"):
        index(items, short_encoder, store, "docs")
    for settings, field in [
        (CollectionSettings(8), "compression_ratio 4, asked for 8"),
        (CollectionSettings(codec="SQ8"), "codec 'SQfp16', asked for 'SQ8'"),
        (CollectionSettings(stores_text=True), "stores_text False, asked for True"),
    ]:
        with pytest.raises(CollectionExists, match=field):
            index(items, encoder, store, "docs", settings)
    with pytest.raises(CodecError, match="'zip' is unknown"):
        index(items, encoder, store, "new", CollectionSettings(codec="zip"))
    assert Collection.open(store, "docs").get_texts(["p0"]) == [None]


def test_a_dry_run_tells_what_a_run_then_does(
    encoder: PassageEncoder, store: Store, real_texts: list[str], passages: Make
) -> None:
    items = passages(real_texts[:80])
    index(items[:10], encoder, store, "docs", CollectionSettings(2, "SQ8"))
    before = Collection.open(store, "docs").stats()
    told_report = IndexReport("docs")
    told = dry_run(items, encoder, store, "docs", report=told_report)
    assert Collection.open(store, "docs").stats() == before
    done = index(items, encoder, store, "docs")
    after = Collection.open(store, "docs").stats()
    assert told_report.num_unchanged == 10
    assert (told.num_passages, told.num_tokens, told.num_states) == (70, done.num_tokens, done.num_states)
    assert told.num_padding_tokens == done.num_padding_tokens
    assert told.size_bytes == after.size_bytes - before.size_bytes
    assert told.num_sample_tokens > 0
    assert told.seconds == pytest.approx(told.num_tokens / told.tokens_per_second)
