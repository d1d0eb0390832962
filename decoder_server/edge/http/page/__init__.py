"""The page at /, its files, and the endpoint it asks. The files are plain; nothing is fetched from elsewhere."""

from __future__ import annotations

import dataclasses
import time
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from decoder_server.edge.http import body
from decoder_server.edge.http.context import context, read_json, while_connected
from decoder_server.edge.http.dialects import check_counts, question
from decoder_server.edge.http.fields import Fields
from decoder_server.engine.explain import MAX_CANDIDATES, Explained, explain, first_ids
from preread.errors import InvalidRequest

TYPES = {"page.html": "text/html", "page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
CONTENT = {name: files(__name__).joinpath(name).read_bytes() for name in TYPES}


async def _file(request: Request) -> Response:
    name = request.url.path.rpartition("/")[2] or "page.html"
    return Response(CONTENT[name], media_type=TYPES[name], headers=HEADERS)


ROUTES = [Route(path, _file) for path in ("/", "/page/page.js", "/page/page.css", "/page/icon.svg")]


async def explain_few(request: Request) -> Response:
    """POST: query, instruction, and documents, or collection with passage_ids or `first`, a number of passages."""
    here = context(request)
    deadline = time.monotonic() + body.seconds_left(request, here.config.timeout_seconds)
    fields = Fields(await read_json(request, deadline))
    engine = here.engine(fields.text("model") or "")
    name, first = fields.text("collection"), fields.count("first")
    if name and first:
        if first > MAX_CANDIDATES:
            raise InvalidRequest("first", first, f"1..{MAX_CANDIDATES}")
        fields = fields.or_else("passage_ids", await first_ids(engine, name, first))
    check_counts(fields, engine.limits.max_candidates)
    asked = question(fields, "documents")
    start = time.monotonic()
    try:
        explained = await while_connected(request, explain(engine, asked.request, deadline))
    except InvalidRequest as exc:
        raise asked.renamed(exc) from exc
    document: dict[str, Any] = {
        "object": "explanation",
        "model": engine.name,
        "seconds": time.monotonic() - start,
        "results": [_result(one) for one in explained],
    }
    return await body.respond(document, is_large=True)


def _result(explained: Explained) -> dict[str, Any]:
    return dataclasses.asdict(explained) | {"status": explained.status}
