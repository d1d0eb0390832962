"""One log line per request that ended. An Observer; never shows texts, unless it was made to show queries."""

from __future__ import annotations

import logging
from collections import Counter

from decoder_server.engine.lifecycle import Answered, Pass
from preread_edge.logs import fields

log = logging.getLogger(__name__)


class RequestLog:
    """`log_text` adds query and instruction; passages are never logged, a request has too many."""

    def __init__(self, *, log_text: bool = False) -> None:
        self._log_text = log_text

    def answered(self, answered: Answered) -> None:
        request, timings = answered.request, answered.timings
        values = {
            "model": answered.model,
            "code": answered.code,
            "collection": request.collection,
            "num_candidates": len(request.candidates),
            "seconds": round(answered.end - answered.start, 6),
        }
        if timings is not None:
            values |= {
                "fetch_seconds": round(timings.fetch_seconds, 6),
                "encode_seconds": round(timings.encode_seconds, 6),
                "queue_seconds": round(timings.queue_seconds, 6),
                "compute_seconds": round(timings.compute_seconds, 6),
            }
        if answered.trail.degraded:
            values |= {"degraded": answered.trail.degraded}
        if answered.trail.stopped_early:
            values |= {"stopped_early": True}
        counts = Counter(outcome.status for outcome in answered.trail.outcomes)
        values |= {f"num_{status}": count for status, count in sorted(counts.items())}
        if self._log_text:
            values |= {"query": request.query, "instruction": request.instruction}
        level = logging.ERROR if answered.code == "internal" else logging.INFO
        log.log(level, answered.kind, extra=fields(**values))

    def passed(self, one: Pass) -> None:
        log.debug("pass", extra=fields(num_pairs=one.num_pairs, num_tokens=one.num_tokens, seconds=one.seconds))
