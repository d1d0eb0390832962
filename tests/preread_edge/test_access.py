"""Laws of keys."""

from __future__ import annotations

import contextlib
from contextvars import Context, copy_context
from pathlib import Path

import pytest

from preread.errors import PermissionDenied, PrereadError, Unauthenticated
from preread.v1 import encoder_pb2, rerank_pb2
from preread_edge.access import ApiKeys, Scope, caller, may, permits

ASKS, RULES = "asks-0123456789ab", "rules-0123456789a"


def refusal(keys: ApiKeys, key: str, *scopes: Scope) -> type[PrereadError] | None:
    """How a call that needs one of the scopes ends; None: it passes."""
    try:
        keys.check(f"Bearer {key}", scopes, "a call")
    except PrereadError as error:
        return type(error)
    return None


def test_a_key_may_what_its_scopes_say() -> None:
    keys = ApiKeys.parse([f"rerank:{ASKS}", RULES])
    assert refusal(keys, ASKS, Scope.RERANK) is None
    assert refusal(keys, ASKS, Scope.INDEX, Scope.RERANK) is None
    assert refusal(keys, ASKS, Scope.INDEX) is PermissionDenied
    assert [refusal(keys, RULES, scope) for scope in Scope] == [None] * 3
    assert refusal(keys, "unknown-0123456789", Scope.RERANK) is Unauthenticated
    assert refusal(keys, "", Scope.RERANK) is Unauthenticated
    assert not ApiKeys().keys
    assert refusal(ApiKeys(), "", Scope.ADMIN) is None


def test_a_key_may_be_bound_to_collections() -> None:
    keys = ApiKeys.parse([f"rerank@docs,faq:{ASKS}", RULES])

    def permitted(key: str) -> list[bool]:
        assert refusal(keys, key, Scope.RERANK) is None
        return [permits("docs"), permits("other"), permits("other", "faq")]

    assert copy_context().run(permitted, ASKS) == [True, False, True]
    assert copy_context().run(permitted, RULES) == [True, True, True]
    assert permits("anything")  # outside of any call


def test_a_caller_has_a_name_and_what_it_may_do() -> None:
    keys = ApiKeys.parse([f"rerank:{ASKS}", RULES])

    def known(key: str) -> tuple[str, list[bool]]:
        assert refusal(keys, key, Scope.RERANK) is None
        return caller(), [may(scope) for scope in (Scope.RERANK, Scope.INDEX)]

    (asks, may_ask), (rules, may_rule) = (copy_context().run(known, key) for key in (ASKS, RULES))
    assert (may_ask, may_rule) == ([True, False], [True, True])
    assert asks != rules
    assert ASKS not in asks
    assert copy_context().run(known, ASKS)[0] == asks  # always
    assert Context().run(lambda: (caller(), may(Scope.ADMIN))) == ("", True)  # outside of any call


def test_keys_are_not_kept() -> None:
    assert ASKS not in repr(ApiKeys.parse([f"rerank:{ASKS}"]))


def test_a_key_may_have_a_colon() -> None:
    assert refusal(ApiKeys.parse(["a:0123456789abcdef"]), "a:0123456789abcdef", Scope.ADMIN) is None


def test_a_key_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who asks\nrerank,index {ASKS}  # search\n\nadmin {RULES}\n")
    keys = ApiKeys.read(file)
    assert len(keys.keys) == 2
    assert [refusal(keys, ASKS, scope) for scope in Scope] == [None, None, PermissionDenied]
    assert refusal(keys, RULES, Scope.ADMIN) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rerank", "line 1 has 1 words"),
        (f"\nread {ASKS}", "line 2: scopes are 'read'"),
        ("rerank short", "5 characters long"),
        (f"rerank@docs, {ASKS}", "line 1: collections are 'docs,'"),
        ("# none\n", "holds no key"),
    ],
)
def test_a_bad_key_file_names_the_line_and_no_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        ApiKeys.read(file)
    assert ASKS not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "passes"), [("Bearer {}", True), ("bearer  {} ", True), ("{}", True), ("Basic {}", False), ("", False)]
)
def test_bearer(header: str, passes: bool) -> None:
    keys = ApiKeys.parse([ASKS])
    with contextlib.nullcontext() if passes else pytest.raises(Unauthenticated):
        keys.check(header.format(ASKS), [Scope.RERANK], "a call")
    keys.check("Bearer", [Scope.RERANK], "a call", "", ASKS)


def test_every_method_has_its_scope() -> None:
    """A method that is added later needs admin until someone decides."""
    found = {
        f"{service.name}/{method.name}": Scope.needed_by(f"/{service.full_name}/{method.name}")
        for file in (encoder_pb2.DESCRIPTOR, rerank_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert {name for name, scopes in found.items() if scopes == (Scope.ADMIN,)} == {"EncoderService/Delete"}
    assert found["EncoderService/Upsert"] == (Scope.INDEX,)
    assert found["RerankService/Rerank"] == (Scope.RERANK,)
