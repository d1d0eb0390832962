"""Laws of lookup by text: a text that was indexed is scored from stored states, with any client."""

from __future__ import annotations

import pytest

from cache.errors import InvalidName
from cache.open import open_store
from decoder_server.config import DecoderConfig, parse_lookup
from preread.v1 import common_pb2, rerank_pb2

HIT, MISSING = common_pb2.CANDIDATE_STATUS_HIT, common_pb2.CANDIDATE_STATUS_MISSING


def where(answer) -> list[tuple[str, str]]:
    return [(one.found_in, one.found_id) for one in sorted(answer.results, key=lambda one: one.index)]


async def test_a_text_without_an_id_is_scored_from_stored_states(serve, texts) -> None:
    async with serve() as serving:
        by_id = await serving.rerank(ids=["p3", "p17"])
        by_text = await serving.rerank(collection="", inline=[texts["p3"], texts["p17"], "never indexed"])
    scored = {one.index: one for one in by_text.results}
    assert [scored[i].status for i in range(3)] == [HIT, HIT, MISSING]
    assert where(by_text) == [("docs", "p3"), ("docs", "p17"), ("", "")]
    assert [scored[i].passage_id for i in range(2)] == ["", ""]  # as it was sent
    assert {one.index: one.margin for one in by_id.results} == {i: scored[i].margin for i in range(2)}
    assert (by_text.num_looked_up, by_text.num_found) == (3, 2)
    assert (by_id.num_looked_up, by_id.num_found) == (0, 0)


async def test_an_id_that_is_not_stored_is_found_by_its_text(serve, texts) -> None:
    candidates = [
        rerank_pb2.Candidate(passage_id="a name of the caller's", text=texts["p5"]),
        rerank_pb2.Candidate(passage_id="p6", text=texts["p7"]),  # stored, with another text
        rerank_pb2.Candidate(passage_id="p8", text=texts["p8"]),
    ]
    async with serve() as serving:
        answer = await serving.rerank(candidates=candidates)
    assert where(answer) == [("docs", "p5"), ("docs", "p7"), ("", "")]
    by_index = {one.index: one for one in answer.results}
    assert [by_index[i].passage_id for i in range(3)] == ["a name of the caller's", "p6", "p8"]
    assert {one.status for one in answer.results} == {HIT}
    assert answer.num_looked_up == 2


async def test_the_order_of_lookup_decides_which_states_are_read(serve, store, encoding, texts) -> None:
    encoding.fill(store, "coarse", {f"c{i}": texts[f"p{i}"] for i in range(5)}, ratio=8)
    async with serve(lookup=("coarse", "docs")) as serving:
        both = await serving.rerank(collection="", inline=[texts["p1"], texts["p9"]])
    async with serve(lookup=("docs", "coarse")) as serving:
        other = await serving.rerank(collection="", inline=[texts["p1"], texts["p9"]])
        at_8 = await serving.rerank(collection="", inline=[texts["p1"]], compression_ratio=8)
        at_2 = await serving.rerank(collection="", inline=[texts["p1"]], compression_ratio=2)
    # Without a ratio in the request it is the first collection's, and every score is at that one.
    assert (both.compression_ratio, where(both)) == (8, [("coarse", "c1"), ("docs", "p9")])
    assert (other.compression_ratio, where(other)) == (4, [("docs", "p1"), ("docs", "p9")])
    assert where(at_8) == [("docs", "p1")]
    assert (at_2.results[0].status, at_2.num_looked_up) == (MISSING, 0)  # no collection is stored so finely


async def test_by_default_every_collection_of_the_encoder_is_looked_into(serve, store, encoding, texts) -> None:
    encoding.fill(store, "faq", {"f1": "asked frequently"})
    store.write_manifest(encoding.manifest("another", fingerprint="0" * 64))
    async with serve() as serving:
        answer = await serving.rerank(collection="", inline=["asked frequently", texts["p2"]])
        named = await serving.rerank(collection="faq", inline=["asked frequently", texts["p2"]])
    assert where(answer) == where(named) == [("faq", "f1"), ("docs", "p2")]


async def test_no_lookup(serve, texts) -> None:
    async with serve(lookup=()) as serving:
        answer = await serving.rerank(collection="", inline=[texts["p3"]])
        named = await serving.rerank(inline=[texts["p3"]])
    assert answer.results[0].status == MISSING
    assert (answer.num_looked_up, named.num_looked_up) == (0, 0)


async def test_what_is_written_later_is_found_and_what_is_deleted_is_not(serve, store, encoding, texts) -> None:
    async with serve() as serving:

        async def found(text: str) -> list[tuple[str, str]]:
            return where(await serving.rerank(collection="", inline=[text]))

        assert await found("written later") == [("", "")]
        later = encoding.fill(store, "later", {"n": "written later"})
        assert await found("written later") == [("later", "n")]
        later.delete_many(["n"])
        assert await found("written later") == [("", "")]
        store.drop_collection("docs")
        assert await found(texts["p1"]) == [("", "")]


async def test_a_damaged_record_costs_its_states_and_no_text(serve, store, texts, by_hand) -> None:
    (path,) = (store.path / "segments").glob("*.faiss")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)  # of some passages
    path.write_bytes(content)
    async with serve() as serving:
        answer = await serving.rerank(collection="", inline=list(texts.values()))
    found = [one for one in answer.results if one.status == HIT]
    missed = [one for one in answer.results if one.status != HIT]
    assert len(found) + len(missed) == len(texts)
    assert missed
    assert {one.status for one in missed} == {MISSING}  # without an encoder; with one they are encoded
    one = found[0]
    assert one.margin == pytest.approx(by_hand(texts[one.found_id]), abs=1e-4)


async def test_a_store_that_fails_costs_the_lookup_alone(serve, redis_server, encoding, texts) -> None:
    store = open_store(redis_server.url, read_budget_seconds=5.0)
    encoding.fill(store, "docs", texts)
    async with serve(over=store) as serving:
        assert where(await serving.rerank(collection="", inline=[texts["p3"]])) == [("docs", "p3")]
        redis_server.stop()
        answer = await serving.rerank(collection="", inline=[texts["p3"], "other"])
    store.close()
    assert {one.status for one in answer.results} == {MISSING}


async def test_a_name_that_is_not_there_yet_is_no_error(serve, store, encoding, caplog) -> None:
    async with serve(lookup=("soon",)) as serving:
        assert where(await serving.rerank(collection="", inline=["text"])) == [("", "")]
        encoding.fill(store, "soon-1", {"s": "text"})
        store.set_alias("soon", "soon-1")
        assert where(await serving.rerank(collection="", inline=["text"])) == [("soon-1", "s")]
    assert sum("texts are not looked up in soon" in one.getMessage() for one in caplog.records) == 1


def test_what_lookup_may_be() -> None:
    assert parse_lookup("docs, faq") == ("docs", "faq")
    assert parse_lookup("none") == ()
    assert parse_lookup("all") is None
    for wrong in ("docs,docs", "docs,", "none,docs", "all,docs"):
        with pytest.raises(ValueError, match="lookup is"):
            parse_lookup(wrong)


async def test_a_lookup_under_a_name_no_collection_can_have_ends_the_start(tiny, serve) -> None:
    with pytest.raises(InvalidName, match="lookup: 'a b'"):
        async with serve(lookup=("a b",)):
            pass
    assert DecoderConfig.of_one(str(tiny)).lookup is None
