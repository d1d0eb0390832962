"""Every path there is, in the order of wire.md, and the application around them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from cache.errors import CacheError
from decoder_server.edge.http import collections as c
from decoder_server.edge.http import errors, openapi, page
from decoder_server.edge.http import info as models
from decoder_server.edge.http.body import TooLarge
from decoder_server.edge.http.context import Context
from decoder_server.edge.http.envelope import Envelope, respond
from decoder_server.edge.http.errors import HttpError
from decoder_server.edge.http.rerank import rerank
from preread import PrereadError
from preread_edge.hosts import Guard
from preread_edge.keys import AccessMiddleware, App, Scope

# One endpoint: the body tells the dialect. Clients disagree on everything else.
RERANK = (
    "/rerank", "/v1/rerank", "/v2/rerank", "/v1/v2/rerank", "/reranking", "/v1/reranking", "/rerankings",
    "/v1/rerankings", "/v1/ranking", "/v1/retrieval/{model:path}/reranking", "/score", "/v1/score",
)  # fmt: skip
# In front of a reranking path, and of the others: these clients get their dialect whatever the body looks like.
PREFIXES = ("/tei", "/voyage", "/infinity")

Endpoint = Callable[[Request], Awaitable[Response]]

ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("GET", "/v1/models", models.models),
    ("GET", "/models", models.models),
    ("GET", "/info", models.info),
    ("GET", "/health", models.live),
    ("GET", "/health/ready", models.ready),
    ("GET", "/metrics", models.metrics),
    ("GET", "/openapi.json", openapi.serve),
    ("POST", "/v1/explain", page.explain_few),
    ("GET", "/v1/collections", c.list_collections),
    ("GET", "/v1/collections/{collection}", c.get_collection),
    ("POST", "/v1/collections/{collection}/passages", c.add_passages),
    ("DELETE", "/v1/collections/{collection}/passages", c.delete_passages),
    ("DELETE", "/v1/collections/{collection}/passages/{passage_id:path}", c.delete_passages),
    ("GET", "/v1/aliases", c.list_aliases),
    ("PUT", "/v1/aliases/{alias}", c.set_alias),
    ("DELETE", "/v1/aliases/{alias}", c.remove_alias),
)
# Probes carry no keys; what describes the interface, or is a page to type a key into, needs none.
OPEN = ("/", "/page/page.js", "/page/page.css", "/page/icon.svg", "/health", "/health/ready", "/openapi.json")
PREFIXED = ("/v1/models", "/models", "/info", "/health")


def build(context: Context, guard: Guard, extra: Sequence[BaseRoute] = ()) -> ASGIApp:
    """The application.

    Args:
        guard: which names and pages it answers to.
        extra: routes of others, such as /metrics; they come first.
    """
    app = Starlette(routes=[*extra, *_routes(), *page.ROUTES], exception_handlers=_handlers())
    app.router.redirect_slashes = False  # a redirected POST loses its body with many clients
    app.state.context = context
    return Envelope(AccessMiddleware(app, context.keys, scopes_of, _refuse), guard)


def scopes_of(method: str, path: str) -> tuple[Scope, ...]:
    """Which keys may call: one with any of these scopes; none at all: everyone."""
    for prefix in PREFIXES:
        path = path.removeprefix(prefix)
    if method in ("GET", "HEAD"):
        return () if path in OPEN else (Scope.RERANK, Scope.INDEX)
    if method == "POST" and path.startswith("/v1/collections/"):
        return (Scope.INDEX,)
    return (Scope.RERANK,) if method == "POST" else (Scope.ADMIN,)


def _refuse(status: int, message: str) -> App:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        response = await respond(scope, receive, errors.by_status(status, message))
        await response(scope, receive, send)

    return refuse


def _routes() -> list[BaseRoute]:
    routes: list[BaseRoute] = [Route(path, rerank, methods=["POST"]) for path in RERANK]
    routes += [Route(prefix + path, rerank, methods=["POST"]) for prefix in PREFIXES for path in RERANK]
    by_path: dict[str, dict[str, Endpoint]] = {}
    for method, path, endpoint in ROUTES:
        by_path.setdefault(path, {})[method] = endpoint
        if path in PREFIXED:
            for prefix in PREFIXES:
                by_path.setdefault(prefix + path, {})[method] = endpoint
    return routes + [Route(path, _by_method(endpoints), methods=list(endpoints)) for path, endpoints in by_path.items()]


def _by_method(endpoints: dict[str, Endpoint]) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        chosen = endpoints["GET" if request.method == "HEAD" else request.method]
        return await chosen(request)

    return endpoint


def _handlers() -> dict[Any, Any]:  # Starlette's type admits no handler of a narrower exception
    return {
        HTTPException: _routed,
        ClientDisconnect: _left,
        Exception: _unforeseen,
        **dict.fromkeys((HttpError, TooLarge, PrereadError, CacheError), _failed),
    }


async def _failed(request: Request, exc: Exception) -> Response:
    found = errors.problem(exc)
    assert found is not None
    return await respond(request.scope, request.receive, found)


async def _routed(request: Request, exc: HTTPException) -> Response:
    message = f"{request.method} {request.url.path[:200]}: {exc.detail}"
    headers = dict(exc.headers or {})
    return await respond(request.scope, request.receive, errors.by_status(exc.status_code, message), headers)


async def _unforeseen(request: Request, exc: Exception) -> Response:
    return await respond(request.scope, request.receive, errors.internal())


async def _left(request: Request, exc: ClientDisconnect) -> Response:
    """Nobody reads this; the request ends all the same."""
    return errors.respond(errors.by_status(499, "the client closed the connection"))
