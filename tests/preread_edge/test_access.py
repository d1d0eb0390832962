"""Laws of keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from preread.v1 import encoder_pb2, rerank_pb2
from preread_edge.access import ApiKeys, Scope, bearer, parse_keys, read_keys, scopes_of

ASKS, RULES = "asks-0123456789ab", "rules-0123456789a"


def test_a_key_may_what_its_scopes_say() -> None:
    keys = parse_keys([f"rerank:{ASKS}", RULES])
    asks, rules = keys.find(ASKS), keys.find(RULES)
    assert asks is not None
    assert rules is not None
    assert asks.may(Scope.RERANK)
    assert asks.may(Scope.INDEX, Scope.RERANK)
    assert not asks.may(Scope.INDEX)
    assert all(rules.may(scope) for scope in Scope)
    assert keys.find("unknown-0123456789") is None
    assert keys.find("") is None
    assert not ApiKeys().required


def test_keys_are_not_kept() -> None:
    assert ASKS not in repr(parse_keys([f"rerank:{ASKS}"]))


def test_a_key_may_have_a_colon() -> None:
    assert parse_keys(["a:0123456789abcdef"]).find("a:0123456789abcdef") is not None


def test_a_key_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who asks\nrerank,index {ASKS}  # search\n\nadmin {RULES}\n")
    keys = read_keys(file)
    assert len(keys.keys) == 2
    found = keys.find(ASKS)
    assert found is not None
    assert found.scopes == {Scope.RERANK, Scope.INDEX}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rerank", "line 1 has 1 words"),
        (f"\nread {ASKS}", "line 2: scopes are 'read'"),
        ("rerank short", "5 characters long"),
        ("# none\n", "holds no key"),
    ],
)
def test_a_bad_key_file_names_the_line_and_no_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_keys(file)
    assert ASKS not in str(caught.value)


def test_bearer() -> None:
    assert [bearer(one) for one in ("Bearer x", "bearer  x ", "Basic x", "")] == ["x", "x", "", ""]


def test_every_method_has_its_scope() -> None:
    """A method that is added later needs admin until someone decides."""
    found = {
        f"{service.name}/{method.name}": scopes_of(f"/{service.full_name}/{method.name}")
        for file in (encoder_pb2.DESCRIPTOR, rerank_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert {name for name, scopes in found.items() if scopes == (Scope.ADMIN,)} == {"EncoderService/Delete"}
    assert found["EncoderService/Upsert"] == (Scope.INDEX,)
    assert found["RerankService/Rerank"] == (Scope.RERANK,)
