"""The call under way: its id and its place in a distributed trace. Follows the task, and tasks started from it.

An edge sets it, whoever logs or traces reads it. Knows no transport.
"""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar
from dataclasses import dataclass

# What other systems use as ids; anything else could forge lines in a log.
_USABLE = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")


@dataclass(frozen=True, slots=True)
class Call:
    """
    request_id: the caller's, or our own
    traceparent: the caller's W3C header, "" where there is none
    rpc: full name of a gRPC method (preread.v1.RerankService/Rerank), "" on other edges
    """

    request_id: str
    traceparent: str = ""
    rpc: str = ""


_current: ContextVar[Call | None] = ContextVar("preread_call", default=None)


def begin(request_id: str = "", traceparent: str = "", rpc: str = "") -> Call:
    """Makes this the current call; an id that is missing or unusable is replaced by a random one."""
    call = Call(request_id if _USABLE.fullmatch(request_id) else secrets.token_hex(16), traceparent, rpc)
    _current.set(call)
    return call


def current() -> Call | None:
    """The call this code runs for; None outside of any."""
    return _current.get()
