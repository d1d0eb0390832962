"""Passages come and go over HTTP, through the encoder worker, and are then ranked by id."""

from __future__ import annotations

import json
import socket
import time

import pytest

NDJSON = {"content-type": "application/x-ndjson"}


def lines(passages):
    return "".join(json.dumps(passage) + "\n" for passage in passages).encode()


@pytest.fixture
def passages(documents):
    return [{"id": f"d{i}", "text": text} for i, text in enumerate(documents)]


def upload(running, name, passages, **settings):
    response = running.post(f"/v1/collections/{name}/passages", {"passages": passages} | settings)
    assert response.status_code == 200, response.text
    return response.json()


def test_json_then_ndjson_is_unchanged(running, passages):
    first = upload(running, "both", passages, compression_ratio=8)
    again = running.http.post("/v1/collections/both/passages", content=lines(passages), headers=NDJSON).json()

    counts = ("num_stored", "num_unchanged", "num_refused", "num_truncated")
    assert [first[count] for count in counts] == [4, 0, 0, 0]
    assert [again[count] for count in counts] == [0, 4, 0, 0]


def test_settings_of_ndjson_are_in_the_query(running, passages):
    url = "/v1/collections/settings/passages?compression_ratio=16&codec=SQbf16&store_text=false"
    running.http.post(url, content=lines(passages), headers=NDJSON).raise_for_status()

    collection = running.http.get("/v1/collections/settings").json()
    assert (collection["compression_ratio"], collection["codec"], collection["stores_text"]) == (16, "SQbf16", False)

    refused = running.http.post(url.replace("=16", "=" + "9" * 5000), content=lines(passages), headers=NDJSON)
    assert refused.status_code == 400
    assert "asked for 2147483647" in refused.json()["message"]


@pytest.mark.parametrize(
    ("method", "url", "body", "found", "expected"),
    [
        ("POST", "passages", {"passages": [], "compresion_ratio": 4}, "compresion_ratio is 4",
         "did you mean compression_ratio?"),
        ("POST", "passages", {"passages": [], "collection": "x"}, "collection is 'x'",
         "one of codec, compression_ratio, passages, store_text"),
        ("POST", "passages?compression_ratio=4", {"passages": []}, "compression_ratio is '4'",
         "next to passages; NDJSON has it in the query"),
        ("POST", "passages?codecs=Flat", {"passages": []}, "codecs is 'Flat'", "codec?"),
        ("POST", "passages", [{"id": "a", "Titel": "A", "text": "b"}], "passages[0].Titel is 'A'", "title?"),
        ("POST", "passages", {"passages": [{"id": "a", "txt": "b"}]}, "passages[0].txt is 'b'", "text?"),
        ("POST", "passages", [{"passage-id": "a", "text": "b"}], "passages[0].passage-id is 'a'", "passage_id?"),
        ("DELETE", "passages", {"id": ["a"]}, "id is 'a list'", "one of ids, passage_ids"),
        ("DELETE", "passages?ids=a", None, "ids is 'a'", "one of id"),
        ("DELETE", "passages/a?id=b", None, "id is 'b'", "no query parameter"),
        ("GET", "passages?page_sise=3", None, "page_sise is '3'", "page_size?"),
    ],
)  # fmt: skip
def test_fields_and_parameters_of_our_own_are_all_known(running, method, url, body, found, expected):
    response = running.http.request(method, f"/v1/collections/strict/{url}", json=body)

    assert response.status_code == 400
    assert response.json()["message"].startswith(f"{found}; expected ")
    assert response.json()["message"].endswith(expected)


def test_a_corpus_may_have_columns_of_its_own(running, documents):
    rows = [{"_id": "a", "title": "T", "text": documents[0], "metadata": {}, "next": "b", "pid": 7, "Text": "again"}]

    assert upload(running, "columns", rows)["num_stored"] == 1
    misspelled = lines([{"id": "b", "text": "fine"}, {"id": "c", "text": "d", "titles": "e"}])
    refused = running.http.post("/v1/collections/columns/passages", content=misspelled, headers=NDJSON)
    assert refused.json()["error"]["param"] == "line 2.titles"


def test_what_was_uploaded_is_ranked_by_id_as_its_text_is(run, passages, documents):
    with run(lookup=()) as running:  # else the texts would be found, and not encoded
        upload(running, "ranked", passages, codec="Flat")
        by_text = running.ask(return_margins=True)["results"]
        ids = [passage["id"] for passage in passages]
        by_id = running.ask(documents=None, passage_ids=ids, collection="ranked", return_margins=True)["results"]

        assert [r["index"] for r in by_id] == [r["index"] for r in by_text]
        assert [r["margin"] for r in by_id] == pytest.approx([r["margin"] for r in by_text], abs=1e-4)
        assert [r["id"] for r in by_id] == [f"d{r['index']}" for r in by_id]
        with_texts = running.ask(
            documents=[{"id": "d1"}, {"id": "d3"}], collection="ranked", return_documents=True, on_miss="skip"
        )
        assert {r["document"]["text"] for r in with_texts["results"]} == {documents[1], documents[3]}


def test_a_missing_id_is_skipped_encoded_or_fatal(running, passages):
    upload(running, "missing", passages)
    some = [{"id": "d0"}, {"id": "nobody"}, {"id": "new", "text": "a text that is not stored"}]

    skipped = running.ask(documents=some, collection="missing", on_miss="skip")
    assert [r["index"] for r in skipped["results"]] == [0]
    assert len(skipped["meta"]["warnings"]) == 2
    encoded = running.ask(documents=some, collection="missing", on_miss="encode")
    assert sorted(r["index"] for r in encoded["results"]) == [0, 2]
    fatal = running.refused(400, documents=some, collection="missing", on_miss="fail")
    assert fatal["error"]["code"] == "passage_missing"
    running.refused(404, documents=some, collection="no-such-collection")


def test_what_befalls_an_id_is_said_of_the_field_that_has_it(running, passages):
    upload(running, "named", passages)
    ids = {"documents": None, "passage_ids": ["d0", "nobody"], "collection": "named"}
    answer = running.ask(**ids, on_miss="skip")
    assert [line.split(" was ")[0] for line in answer["meta"]["warnings"]] == ["passage_ids[1]"]
    for path in ("/v1/rerank", "/tei/rerank"):
        assert "passage_ids[1]" in json.dumps(running.refused(400, path, **ids, on_miss="fail"))
    texts_too = running.ask(**ids | {"documents": ["a text", None]})
    assert [line.split(" was ")[0] for line in texts_too["meta"]["warnings"]] == ["documents[1]"]


def test_a_bad_passage_is_refused_by_itself(running, passages):
    mixed = [*passages, {"id": "empty", "text": ""}]
    answer = upload(running, "mixed", mixed)

    assert answer["num_stored"] == 4
    assert [one["id"] for one in answer["refused"]] == ["empty"]
    assert answer["refused"][0]["message"]


def test_of_passages_with_one_id_the_first_counts_and_rows_are_read_as_index_reads_them(running):
    rows = [
        {"_id": "a", "title": "Title", "text": "first"},
        *({"id": f"p{i}", "text": f"number {i}"} for i in range(150)),
        {"id": "a", "text": "second"},
    ]
    answers = [
        upload(running, "twice", rows),
        running.http.post("/v1/collections/twice-lines/passages", content=lines(rows), headers=NDJSON).json(),
    ]
    for answer in answers:
        assert (answer["num_stored"], answer["num_refused"], answer["num_clipped"]) == (151, 1, 0)
        assert answer["refused"] == [
            {"id": "a", "message": "id 'a' came before, at upload:1; the first one counts"},
        ]
    found = running.ask(documents=[{"id": "a"}], collection="twice", return_documents=True)["results"]
    assert found[0]["document"]["text"] == "Title first"


def test_a_bad_line_ends_the_upload_and_says_what_is_stored(running, passages):
    body = lines(passages) + b'{"id": "x", "text": 7}\n' + lines([{"id": "later", "text": "never read"}])
    response = running.http.post("/v1/collections/broken/passages", content=body, headers=NDJSON)

    assert response.status_code == 400
    assert "line 5.text" in response.json()["message"]
    assert response.json()["error"]["param"] == "line 5.text"
    assert "passages before that are stored" in response.json()["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "passages"),
        ({"passages": []}, "passages"),
        ({"passages": ["text alone"]}, "passages[0]"),
        ({"passages": [{"text": "no id"}]}, "passages[0].id"),
        ({"passages": [{"id": "a"}]}, "passages[0].text"),
        ({"passages": [{"id": "a", "text": "b"}], "codec": "ZIP"}, "codec"),
    ],
)
def test_uploads_are_checked(running, body, param):
    response = running.post("/v1/collections/checked/passages", body)

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_long_stream_is_not_gathered_before_it_is_stored(running):
    """The first passages are stored while later ones have not even been sent: nothing waits for the end."""
    body = lines([{"id": f"s{i}", "text": f"passage number {i}"} for i in range(300)])
    half = body.index(b"\n", len(body) // 2) + 1
    head = (
        "POST /v1/collections/streamed/passages HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\n"
    )
    with socket.create_connection(("127.0.0.1", running.gateway.port), timeout=30) as client:
        client.sendall(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body[:half])
        deadline = time.monotonic() + 20
        stored = 0
        while stored < 64 and time.monotonic() < deadline:
            found = running.http.get("/v1/collections/streamed")
            stored = found.json()["num_passages"] if found.status_code == 200 else 0
            time.sleep(0.02)
        assert 64 <= stored < 300
        client.sendall(body[half:])
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert b'"num_stored":300' in answer


def test_a_line_over_the_limit_costs_itself(run):
    """However it lies in the chunks that arrive, and whether or not it ends."""
    long, good = lines([{"id": "long", "text": "x" * 2000}]), lines([{"id": "good", "text": "y"}])
    with run(http={"max_line_bytes": 1000}) as small:
        url = "/v1/collections/long/passages"
        for body, numbers in (
            (long + good, [1]),
            (good + b"x" * 200_000, [2]),
            (good + long[:-1], [2]),
            (b"x" * 70_000 + b"\n\n" + good + long + b"z" * 300_000, [1, 4, 5]),
        ):
            answer = small.http.post(url, content=body, headers=NDJSON).raise_for_status().json()
            assert answer["num_stored"] + answer["num_unchanged"] == 1
            assert answer["num_refused"] == len(numbers)
            assert [one["message"] for one in answer["refused"]] == [f"line {n} is over 1000 bytes" for n in numbers]


def test_a_text_that_cannot_be_stored_costs_itself(running, passages):
    """Half a surrogate pair, over the byte limit, empty: in a document and in lines."""
    bad = ["\ud800", "half a pair \udfff", "x" * 17_000_000, "", " \n", "\u3000"]
    every = [*passages[:2], *({"id": f"bad{i}", "text": text} for i, text in enumerate(bad)), *passages[2:]]
    every.append({"id": "titled", "title": "\udc00", "text": "good"})
    for name, content, headers in (
        ("document", json.dumps({"passages": every}).encode(), {"content-type": "application/json"}),
        ("lines", lines(every), NDJSON),
    ):
        answer = running.http.post(f"/v1/collections/{name}/passages", content=content, headers=headers)
        answer = answer.raise_for_status().json()
        assert (answer["num_stored"], answer["num_refused"]) == (4, len(bad) + 1)
        why = {one.get("id"): one["message"] for one in answer["refused"]}
        halves = [why[i] for i in ("bad0", "bad1", "titled")]
        assert all(message.startswith("text is half of a surrogate pair") for message in halves)
        assert [why[f"bad{i}"] for i in range(3, 6)] == ["text is empty"] * 3
        # As a line it is over the lines' own limit, and its id was never read.
        assert ("16,777,216" in why["bad2"]) if name == "document" else why[None] == "line 5 is over 16777216 bytes"


def test_deleting(running, passages):
    upload(running, "fewer", [*passages, {"id": "a/b c", "text": "an id with a slash"}])
    url = "/v1/collections/fewer/passages"
    by_body = running.http.request("DELETE", url, json={"ids": ["d0", "nobody"]}).json()
    by_query = running.http.delete(url, params={"id": ["d1", "d2"]}).json()
    by_path = running.http.delete(f"{url}/a%2Fb%20c").json()

    assert [answer["num_deleted"] for answer in (by_body, by_query, by_path)] == [1, 2, 1]
    assert running.http.get("/v1/collections/fewer").json()["num_passages"] == 1
    assert running.http.request("DELETE", url, json={"ids": []}).status_code == 400
    assert running.http.delete("/v1/collections/unknown/passages/x").status_code == 404


def test_aliases(running, passages):
    upload(running, "old", passages[:2])
    upload(running, "new", passages)
    for name, count in (("old", 2), ("new", 4)):
        assert running.http.put("/v1/aliases/live", json={"collection": name}).json()["collection"] == name
        assert running.http.get("/v1/collections/live").json()["num_passages"] == count
        documents = [{"id": "d0"}, {"id": "d3"}]
        found = running.ask(documents=documents, collection="live", on_miss="skip")["results"]
        assert len(found) == count // 2
    listed = {one["id"]: one["aliases"] for one in running.http.get("/v1/collections").json()["data"]}
    assert (listed["old"], listed["new"]) == ([], ["live"])
    assert {"alias": "live", "collection": "new"} in running.http.get("/v1/aliases").json()["data"]

    assert running.http.put("/v1/aliases/live", json={"collection": "nowhere"}).status_code == 404
    assert running.http.put("/v1/aliases/old", json={"collection": "new"}).status_code == 400
    assert running.http.put("/v1/aliases/no%20name", json={"collection": "new"}).status_code == 400
    assert running.http.delete("/v1/aliases/live").status_code == 200
    assert running.http.delete("/v1/aliases/live").status_code == 404


def test_without_an_encoder_passages_are_refused_and_the_store_still_answers(run, passages):
    with run(encoder=False) as alone:
        added = alone.post("/v1/collections/c/passages", {"passages": passages})
        deleted = alone.http.delete("/v1/collections/c/passages/d0")
        listed = alone.http.get("/v1/collections")

    for refused in (added, deleted):
        assert refused.status_code == 503
        assert "no encoder worker is configured" in refused.json()["message"]
        assert refused.headers["retry-after"]
    assert listed.json() == {"object": "list", "data": []}


def test_ids_are_listed_page_by_page(running, passages):
    upload(running, "listed", passages)
    url, found, token = "/v1/collections/listed/passages", [], ""
    while True:
        page = running.http.get(url, params={"page_size": 3, "page_token": token}).json()
        found += [one["id"] for one in page["data"]]
        token = page["next_page_token"]
        if not token:
            break
    assert page["object"] == "list"
    assert sorted(found) == sorted(one["id"] for one in passages)
    assert running.http.get("/v1/collections/no-such/passages").status_code == 404
    for field, wrong in {"page_size": "5001", "page_token": "forged"}.items():
        refused = running.http.get(url, params={field: wrong})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == field
