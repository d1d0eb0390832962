"""What a caller meets can be imported from `preread`, and leads from a call to the server's log."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import preread
from preread import (
    AsyncClient,
    Client,
    ClientOptions,
    InvalidRequest,
    NotFound,
    Passage,
    PrereadError,
    RetryPolicy,
    Unavailable,
)
from preread.service import BaseClient

ROOT = Path(__file__).parents[2]
OPEN = ["Client", "AsyncClient", "ClientOptions", "Stream", "AsyncStream", "PrereadError"]


def named(kind: type) -> set[str]:
    """Names of `preread` in annotations of everything public of a class."""
    members = [getattr(member, "fget", member) for name, member in inspect.getmembers(kind) if not name.startswith("_")]
    made = [kind.__init__] if issubclass(kind, BaseClient) else []
    notes = [note for one in (kind, *members, *made) for note in getattr(one, "__annotations__", {}).values()]
    given = [re.findall(r"\b[A-Z]\w+", one) if isinstance(one, str) else () for one in notes]
    return {*re.findall(r"preread\.\w+\.([A-Z]\w*)", repr(notes)), *itertools.chain(*given)}


def test_signatures_of_public_methods_name_public_names() -> None:
    todo, seen = OPEN[:], set()
    while todo:
        name = todo.pop()
        assert name in preread.__all__
        seen.add(name)
        kind = getattr(preread, name)
        todo += (named(kind) if inspect.isclass(kind) else set()) - seen
    assert {"Reranking", "RerankingStream", "AsyncRerankingStream", "Candidate", "StageScore", "RetryPolicy"} <= seen


def test_pages_import_names_that_exist() -> None:
    for page in (ROOT / "README.md", ROOT / "preread" / "README.md", *(ROOT / "docs").glob("*.md")):
        for names in re.findall(r"from preread import ([\w, ]+)", page.read_text()):
            assert {one.strip() for one in names.split(",")} <= {*preread.__all__, ""}, page.name


def test_every_public_name_can_be_imported_without_a_server() -> None:
    check = "from preread import *; import sys; print([n for n in ('torch', 'numpy', 'cache') if n in sys.modules])"
    said = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def client(server_pair):
    with Client(server_pair.address, encoder_address=server_pair.encoder_address) as client:
        list(client.upsert([Passage("sky", "The sky is blue.")], collection="request-ids"))
        yield client


def answers(client: Client) -> dict[str, Any]:
    """Everything that has a request's id, after it was read."""
    with client.rerank_stream("q", ["sky"], collection="request-ids") as stream:
        list(stream)
    with client.upsert([Passage("sky", "The sky is blue.")], collection="request-ids") as upserted:
        list(upserted)
    listed = client.list_passages("request-ids", page_size=1)
    list(listed)
    return {
        "rerank": client.rerank("q", ["sky"], collection="request-ids"), "stream": stream, "upsert": upserted,
        "warm": client.warm(["sky"], collection="request-ids"), "passages": listed, "models": client.list_models(),
        "collections": client.list_collections(), "stats": client.stats("request-ids"),
    }  # fmt: skip


def test_every_answer_has_an_id(client) -> None:
    ids = {name: one.request_id for name, one in answers(client).items()}
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids.values()), ids
    assert len(set(ids.values())) == len(ids)


def test_the_callers_own_id_is_kept(server_pair) -> None:
    options = ClientOptions(metadata={"X-Request-Id": "order-66"})
    with Client(server_pair.address, encoder_address=server_pair.encoder_address, options=options) as client:
        assert {one.request_id for one in answers(client).values()} == {"order-66"}
        with pytest.raises(NotFound, match=r"\(request order-66\)$"):
            client.rerank("q", ["sky"], collection="no-such")


def test_an_id_that_a_server_would_replace_is_replaced(scripted) -> None:
    with Client(scripted.address, options=ClientOptions(metadata={"x-request-id": "two words"})) as client:
        given = client.rerank("q", ["a"]).request_id
    assert re.fullmatch("[0-9a-f]{32}", given)
    assert scripted.service.metadata[0]["x-request-id"] == given


def test_an_error_shows_the_id_and_survives_pickling(client) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.rerank("q", ["sky"], collection="request-ids", top_n=-1)
    error = caught.value
    assert str(error) == f"{error.message} (request {error.request_id})"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.request_id, again.violations) == (str(error), error.request_id, error.violations)


def test_a_call_that_reached_no_server_shows_no_id() -> None:
    once = ClientOptions(retry=RetryPolicy(budget_seconds=0))
    with Client("127.0.0.1:1", options=once) as client, pytest.raises(Unavailable) as caught:
        client.list_models()
    why = "the server at 127.0.0.1:1 could not be reached: nothing listens there"
    assert (str(caught.value), caught.value.request_id) == (why, "")


def test_what_is_listed_can_be_copied(client) -> None:
    models = client.list_models()
    for again in (copy.copy(models), pickle.loads(pickle.dumps(models))):
        assert (again, again.request_id) == (models, models.request_id)


async def test_a_closed_client_says_so(scripted) -> None:
    client = Client(scripted.address)
    client.close()
    other = AsyncClient(scripted.address)
    await other.close()
    with pytest.raises(PrereadError, match="the client is closed"):
        client.rerank("q", ["a"])
    with pytest.raises(PrereadError, match="the client is closed"):
        await other.rerank("q", ["a"])
