"""Laws of misspelled names: each near miss is named, and no client's own field is one."""

from __future__ import annotations

import random
import string

import pytest
from starlette.routing import Match, Route

from decoder_server.edge.http import app, dialects, names
from preread.errors import InvalidRequest

DIALECTS = {one.__name__: one for one in dialects._BODIES}
FIELDS = dict.fromkeys(field for one in DIALECTS.values() for field in names.fields_of(one))
# What clients of these services send, and Preread does not know.
FOREIGN = {
    "cohere": "rank_fields max_chunks_per_doc priority",
    "jina": "max_doc_length max_query_length return_embeddings labels",
    "mixedbread": "rank_fields rewrite_query",
    "vllm": "user priority truncate_prompt_tokens truncation_side additional_data mm_processor_kwargs activation "
    "use_activation softmax chat_template chat_template_kwargs add_special_tokens cache_salt request_id data_1 data_2 "
    "queries encoding_format",
    "sglang": "instruct rid items label_token_ids apply_softmax item_first",
    "openai": "user encoding_format dimensions metadata timeout extra_body stream n stop seed",
    "pinecone": "rank_fields parameters",
    "isaacus": "is_iql scoring_method chunking_options",
    "xinference": "return_len kwargs",
    "siliconflow, deepinfra": "overlap_tokens service_tier webhook",
    "tei": "normalize prompt_name",
}


def misspellings(name: str) -> list[str]:
    """One edit away each: a character less, another, one more, two exchanged; and other ways to join the words."""
    cuts = [(name[:i], name[i:]) for i in range(len(name) + 1)]
    found = [a + b[1:] for a, b in cuts if b] + [a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1]
    found += [a + c + b for a, b in cuts for c in string.ascii_lowercase]
    found += [a + c + b[1:] for a, b in cuts if b for c in string.ascii_lowercase]
    first, *rest = name.split("_")
    found += [first + "".join(map(str.capitalize, rest)), name.replace("_", "-"), name.replace("_", ""), name.upper()]
    return [one for one in dict.fromkeys(found) if one not in FIELDS]


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_every_misspelling_of_a_field_is_named(dialect):
    for field in names.fields_of(dialect):
        every = misspellings(field)
        for one in random.Random(field).sample(every, min(len(every), 40)):
            with pytest.raises(InvalidRequest, match=r"is 1; expected a known field: did you mean \w+\?") as refused:
                dialects.check_names({one: 1}, dialect)
            assert refused.value.path == (one,)
            near = names.nearest(one, names.fields_of(dialect))
            assert near
            assert str(refused.value).endswith(f"did you mean {near}?"), "the dialect's own, before another's"


@pytest.mark.parametrize("field", FIELDS)
def test_what_is_left_out_is_the_field(field):
    wrong = [one for one in misspellings(field) if names.nearest(one, (*FIELDS,)) != field]
    assert all(names.nearest(one, (field,)) for one in wrong), "another is as near: top_n, top_k"


@pytest.mark.parametrize("client", FOREIGN)
def test_no_field_of_a_client_is_a_misspelling(client):
    for dialect in DIALECTS.values():
        dialects.check_names(dict.fromkeys(FOREIGN[client].split(), 1), dialect)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_a_field_of_another_dialect_is_none_either_and_null_is_absent(dialect):
    dialects.check_names(dict.fromkeys(FIELDS, 1), dialect)
    dialects.check_names({"compresion_ratio": None}, dialect)


def test_what_is_compared_is_bounded():
    rng = random.Random(5)
    compared = names._nearest.cache_info().misses
    many = {"".join(rng.choices(string.ascii_lowercase, k=25)): 1 for _ in range(10_000)}
    dialects.check_names(many | {"x" * 10_000_000: 1}, DIALECTS["_RerankRequest"])
    assert names._nearest.cache_info().misses - compared <= names.MAX_UNKNOWN


def test_a_value_that_may_be_passages_is_not_repeated():
    with pytest.raises(InvalidRequest) as refused:
        dialects.check_names({"dokuments": ["a secret"]}, DIALECTS["_RerankRequest"])
    assert str(refused.value) == "dokuments is 'a list'; expected a known field: did you mean documents?"


PATHS = [operation.path for operation in app.OPERATIONS]


@pytest.mark.parametrize("path", PATHS)
def test_every_misspelling_of_a_part_of_a_path_is_named(path):
    plain = path.replace("{collection}", "Docs").replace("{alias}", "live").replace("{passage_id:path}", "P-1")
    plain = plain.replace("{model:path}", "some-model")
    routes = [Route(one, print) for one in PATHS]
    for i in (i for i, character in enumerate(plain) if character != "/"):
        for wrong in (plain[:i] + plain[i + 1 :], plain[:i] + "x" + plain[i:]):
            scope = {"type": "http", "method": "GET", "path": wrong}
            if not any(route.matches(scope)[0] is not Match.NONE for route in routes):
                near = names.nearest_path(wrong, PATHS)
                assert any(route.matches(scope | {"path": near})[0] is not Match.NONE for route in routes), wrong


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("/api/v1/rerank", "/v1/rerank"),
        ("/v3/rerank", "/v1/rerank"),
        ("/V1/Rerank", "/v1/rerank"),
        ("/v1/collections/", "/v1/collections"),
        ("/v1/collection/Docs/passages", "/v1/collections/Docs/passages"),
        ("/collections/Docs/passages", "/v1/collections/Docs/passages"),
        ("/v1/alias/live", "/v1/aliases/live"),
        ("/v1/retrieval/a/b/rerank", "/v1/retrieval/{model}/reranking"),
        ("/health/readiness", "/health/ready"),
        ("/v1/embeddings", ""),
        ("/v1/chat/completions", ""),
        ("/favicon.ico", ""),
    ],
)
def test_the_nearest_path(path, near):
    assert names.nearest_path(path, PATHS) == near
