"""What pydantic coerces, in its lax mode, is coerced; what it refuses is refused."""

from __future__ import annotations

import json

import httpx
import pytest
from pydantic import TypeAdapter, ValidationError

VALUES = [
    True, False, 0, 1, 2, 1.0, 0.0, 2.0, 2.5, "true", "True", "TRUE", "yes", "y", "on", "t", "1", "0", "no", "off",
    "f", "n", " true ", "2", "2.0", "2.00", "2.5", " 2 ", "1_000", "+2", "02", "", "1e3", "2.", "2__0", "_1", "0x10",
    "maybe", [], {}, "\n2\t", "-0", "--1",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "field"), [(bool, "return_documents"), (int, "top_n")])
def test_as_pydantic(server, query, documents, kind, field):
    for value in VALUES:
        try:
            expected = TypeAdapter(kind).validate_json(json.dumps(value))
        except ValidationError:
            expected = None
        body = {"query": query, "documents": documents, field: value}
        response = httpx.post(f"{server.url}/v1/rerank", json=body)
        assert response.status_code == (400 if expected is None else 200), value
        if expected is not None:
            results = response.json()["results"]
            found = "document" in results[0] if kind is bool else len(results)
            assert found == (expected if kind is bool else min(expected or 4, 4)), value
