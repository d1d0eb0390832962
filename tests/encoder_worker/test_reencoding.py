"""Laws of a second encoding: what a narrow table had cut is whole again, and readers never see half of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cache.collection import Collection, StoredPassage
from cache.errors import CollectionExists, EncoderMismatch
from cache.store import Store
from checkpoint import Checkpoint
from decoder_server.models.fbnl.backend import FbnlBackend
from encoder_worker.config import CollectionSettings, IndexOptions, PipelineLimits
from encoder_worker.indexing import index
from encoder_worker.passage_encoder import PassageEncoder
from encoder_worker.reencoding import reencode
from encoder_worker.sources import SourcePassage
from preread_cli.main import cli
from tuning.rerank import score_passages

Make = Callable[..., list[SourcePassage]]
UNIFORM = [f"the same few words the same few words the same few words {i}" for i in range(12)]


@pytest.fixture
def texts(real_texts: list[str]) -> list[str]:
    return [text for text in real_texts if len(text) > 200][:40]


@pytest.fixture
def narrow(encoder: PassageEncoder, store: Store, texts: list[str], passages: Make) -> Callable[..., Collection]:
    """A collection whose table learnt from twelve uniform passages, with forty others written all the same."""

    def make(codec: str = "SQ8", *, stores_text: bool = True) -> Collection:
        index(passages(UNIFORM, "u"), encoder, store, "docs", CollectionSettings(4, codec, stores_text))
        report = index(passages(texts), encoder, store, "docs", options=IndexOptions(allow_clipped=True))
        assert report.num_clipped > 0
        store.set_alias("live", "docs")
        return Collection.open(store, "live")

    return make


def off(encoder: PassageEncoder, collection: Collection, texts: list[str]) -> float:
    """Mean distance of the stored numbers from those that the encoder gives."""
    found = collection.get_many([f"p{i}" for i in range(len(texts))])
    true = [encoder.encode_one(text, 4).states for text in texts]
    return float(np.mean([np.abs(one.states - states).mean() for one, states in zip(found, true, strict=True)]))


@pytest.mark.parametrize("codec", ["SQ8", "SQ4"])
def test_margins_are_those_of_a_well_trained_table_again(
    tiny_checkpoint: Path, encoder: PassageEncoder, store: Store, narrow: Callable[..., Collection], texts, codec: str
) -> None:
    old = narrow(codec)
    backend = FbnlBackend(Checkpoint.open(tiny_checkpoint), device="cpu", dtype="float32")
    prompts = [backend.prompt(query) for query in ("what does it do", "how are names bound")]

    def margins(states) -> np.ndarray:
        return np.stack([score_passages(backend, [(prompt, one) for one in states]) for prompt in prompts])

    ids = [f"p{i}" for i in range(len(texts))]
    true = margins([encoder.encode_one(text, 4) for text in texts])
    before = np.abs(margins(old.get_many(ids)) - true).mean()

    done = reencode(old, "docs.v2", codec, lambda: encoder)

    assert done.complete
    assert done.moved_names == ["live", "docs"]
    new = Collection.open(store, "live")
    assert new.name == "docs.v2"
    assert new.stats().num_passages == old.stats().num_passages == 52
    assert new.get_texts(ids) == texts
    after = np.abs(margins(new.get_many(ids)) - true).mean()
    assert after < before / 4
    assert sum(header.num_clipped for header in store.headers_many("docs.v2", ids)) < done.report.num_values * 0.001
    assert new.manifest.identity != old.manifest.identity


def test_only_what_was_cut_is_encoded_again_and_split_passages_stay_split(
    short_encoder: PassageEncoder, store: Store, texts: list[str], passages: Make
) -> None:
    index(passages(UNIFORM, "u"), short_encoder, store, "docs", CollectionSettings(4, "SQ8"))
    told = IndexOptions(allow_clipped=True, split=True)
    index(passages(texts), short_encoder, store, "docs", options=told)
    old = Collection.open(store, "docs")
    ids = [*(f"p{i}" for i in range(len(texts))), *(f"u{i}" for i in range(12))]
    num_cut = sum(header.num_clipped > 0 for header in store.headers_many("docs", ids))
    assert 0 < num_cut <= len(texts)

    done = reencode(old, "again", "SQ8", lambda: short_encoder)

    assert done.num_from_texts == num_cut
    assert Collection.open(store, "docs").name == "again"
    before, after = old.get_many(ids), Collection.open(store, "again").get_many(ids)
    assert [one.window_tokens for one in after] == [one.window_tokens for one in before]
    assert [one.text_digest for one in after] == [one.text_digest for one in before]


def test_an_interrupted_run_goes_on_and_readers_see_the_old_one_until_the_end(
    encoder: PassageEncoder, store: Store, narrow: Callable[..., Collection], texts: list[str]
) -> None:
    old = narrow()
    small = PipelineLimits(group_passages=4)
    first = reencode(old, "docs.v2", "B16,SQ8", lambda: encoder, stop=_after(2), limits=small)
    assert (first.complete, first.moved_names) == (False, [])
    assert Collection.open(store, "live").name == "docs"
    written = Collection.open(store, "docs.v2").stats().num_passages
    assert 0 < written < 52

    second = reencode(old, "docs.v2", "B16,SQ8", lambda: encoder, limits=small)

    assert second.complete
    assert second.report.num_stored == 52 - written
    assert Collection.open(store, "live").name == "docs.v2"
    assert off(encoder, Collection.open(store, "live"), texts) < off(encoder, old, texts) / 4


class _after(threading.Event):  # noqa: N801 - reads like what it is
    """Set when it was looked at so often."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._left = times

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


def test_what_is_written_or_deleted_meanwhile_is_taken_over(
    encoder: PassageEncoder, store: Store, narrow: Callable[..., Collection], passages: Make
) -> None:
    old = narrow()
    changes = iter([True])

    def meanwhile(num_done: int, num_passages: int) -> None:
        if next(changes, False):
            index(passages(["a text that came later"], "late"), encoder, store, "docs")
            old.delete_many(["p0"])

    done = reencode(old, "docs.v2", "SQ8", lambda: encoder, on_progress=meanwhile)

    assert done.complete
    new = Collection.open(store, "live")
    assert new.get_texts(["late0", "p0"]) == ["a text that came later", None]
    assert {i for i, _ in new.scan()} == {i for i, _ in old.scan()}


def test_names_stay_where_writers_do_not_rest(
    encoder: PassageEncoder, store: Store, narrow: Callable[..., Collection], passages: Make
) -> None:
    """What comes during the last pass is in the old collection alone, so its names must not move away from it."""
    old = narrow()
    (states,) = old.get_many(["p1"])

    def meanwhile(num_done: int, num_passages: int) -> None:
        old.put_many([StoredPassage(f"late{num_passages}", states)], allow_clipped=True)

    done = reencode(old, "docs.v2", "SQ8", lambda: encoder, on_progress=meanwhile)

    assert done.overtaken
    assert not done.complete
    assert Collection.open(store, "live").name == Collection.open(store, "docs").name == "docs"
    done = reencode(old, "docs.v2", "SQ8", lambda: encoder)
    assert done.complete
    assert not done.overtaken
    assert {i for i, _ in Collection.open(store, "live").scan()} == {i for i, _ in old.scan()}


def test_without_texts_it_says_whose_input_is_needed_and_keeps_the_count(
    encoder: PassageEncoder, store: Store, narrow: Callable[..., Collection], texts: list[str]
) -> None:
    old = narrow(stores_text=False)
    ids = [*(f"p{i}" for i in range(len(texts))), *(f"u{i}" for i in range(12))]
    before = dict(zip(ids, store.headers_many("docs", ids), strict=True))

    done = reencode(old, "docs.v2", "SQ8", lambda: pytest.fail("there is no text to encode"))

    assert sorted(done.needs_input) == sorted(one for one in ids if before[one].num_clipped)
    for passage_id, header in zip(ids, store.headers_many("docs.v2", ids), strict=True):
        assert header.num_clipped >= before[passage_id].num_clipped


def test_another_encoder_or_another_collection_of_that_name_is_refused(
    encoder: PassageEncoder, short_encoder: PassageEncoder, store: Store, narrow: Callable[..., Collection], passages
) -> None:
    old = narrow()
    with pytest.raises(EncoderMismatch):
        reencode(old, "docs.v2", "SQ8", lambda: short_encoder)
    assert Collection.open(store, "live").name == "docs"
    index(passages(["text"]), encoder, store, "other", CollectionSettings(8, "Flat"))
    with pytest.raises(CollectionExists, match="'other' exists and is no copy of 'docs'"):
        reencode(old, "other", "SQ8", lambda: encoder)


def test_a_damaged_passage_is_left_out_and_named(
    encoder: PassageEncoder, store: Store, narrow: Callable[..., Collection]
) -> None:
    old = narrow()
    (record,) = store.get_many("docs", ["p1"])
    built = type(record).build(
        record.codes, window_tokens=record.window_tokens, compression_ratio=4, truncated=False,
        text_digest=record.header.text_digest, binding=1, text=record.text,
    )  # fmt: skip
    store.put_many("docs", {"p1": built})
    done = reencode(old, "docs.v2", "SQ8", lambda: encoder)
    assert done.damaged == ["p1"]
    assert Collection.open(store, "docs.v2").stats().num_passages == 51


def test_the_command(tiny_checkpoint: Path, tmp_path: Path, store: Store, narrow: Callable[..., Collection]) -> None:
    narrow()
    given = ("--store", f"faiss:{tmp_path / 'store'}", "--model", str(tiny_checkpoint), "--device", "cpu")
    stats = CliRunner().invoke(cli, ["stats", "-c", "docs", *given[:2]])
    assert "of the numbers lie outside what the codec was trained for" in stats.stdout
    verified = CliRunner().invoke(cli, ["verify", "-c", "docs", *given[:2]])
    assert "of the numbers lie outside what the codec was trained for" in verified.stdout
    assert "52 passages read, 0 damaged" in verified.stdout

    answer = CliRunner().invoke(cli, ["collection", "reencode", "live", "--dtype", "float32", *given])

    assert answer.exit_code == 0, answer.output
    assert "docs -> docs.v2 as SQ8: 52 passages, 52 written" in answer.stdout
    assert "live -> docs.v2\ndocs -> docs.v2\n" in answer.stdout
    assert CliRunner().invoke(cli, ["collection", "drop", "docs", "--yes", *given[:2]]).exit_code == 0
    assert Collection.open(store, "docs").name == "docs.v2"
    again = CliRunner().invoke(cli, ["collection", "reencode", "live", "--codec", "B16,SQ8", *given])
    assert again.exit_code == 0, again.output
    assert "live -> docs.v3" in again.stdout
    none = CliRunner().invoke(cli, ["collection", "reencode", "live", *given])
    assert none.exit_code == 2
    assert "B16,SQ8 has no table to train" in none.stderr


def test_the_command_reads_control_tokens_as_the_collection_does(
    tiny_checkpoint: Path, tmp_path: Path, store: Store, passages: Make, texts: list[str]
) -> None:
    reading = PassageEncoder.load(str(tiny_checkpoint), device="cpu", dtype="float32", read_control_tokens=True)
    index(passages(UNIFORM, "u"), reading, store, "docs", CollectionSettings(4, "SQ8", stores_text=True))
    index(passages(texts), reading, store, "docs", options=IndexOptions(allow_clipped=True))
    given = ("--store", f"faiss:{tmp_path / 'store'}", "--model", str(tiny_checkpoint), "--device", "cpu")

    other = CliRunner().invoke(cli, ["collection", "reencode", "docs", *given])
    assert other.exit_code != 0
    assert "was written by encoder" in other.stderr
    same = CliRunner().invoke(cli, ["collection", "reencode", "docs", "--read-control-tokens", *given])
    assert same.exit_code == 0, same.output
    assert Collection.open(store, "docs").name == "docs.v2"
