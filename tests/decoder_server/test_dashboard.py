"""The Grafana dashboard speaks of metrics that exist, and of every one of them; its labels exist too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cache.memory import MemoryStore
from decoder_server.engine.lifecycle import PassRecord, RequestTrace
from encoder_worker.config import EncoderConfig
from encoder_worker.keeping import Reason
from encoder_worker.server import EncoderServer
from preread.v1 import encoder_pb2
from preread.values import Degraded, RerankRequest

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana-dashboard.json").read_text())
# Added by Prometheus itself.
SCRAPE_LABELS = {"job", "instance", "le"}


def panels() -> Iterator[dict]:
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", ())


EXPRESSIONS = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
EXPRESSIONS += [variable["definition"] for variable in DASHBOARD["templating"]["list"] if "definition" in variable]


def samples(registry: CollectorRegistry) -> dict[str, set[str]]:
    """Labels of every sample, by its name."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture
async def exported(serve) -> dict[str, set[str]]:
    async with serve() as serving:
        await serving.rerank(ids=["p1"])
        serving.server.metrics.pass_finished(PassRecord(1, 1, 1, 1, 0.1))
        serving.server.metrics.http(200, 0.1)
        serving.server.metrics.encoder_up("tiny", True)
        trace = RequestTrace(RerankRequest("q", ()), "tiny", degraded=Degraded("queue", 4), stopped_early=True)
        trace.num_looked_up, trace.num_found = 2, 1
        serving.server.metrics.request_finished(trace)
        found = samples(serving.server.metrics.registry)
    worker = EncoderServer(EncoderConfig("a checkpoint"), store=MemoryStore()).metrics
    worker.rpc("EncoderService/Encode", "OK", 0.1)
    worker.passed(1, 0, 0.1)
    worker.upserted(encoder_pb2.UpsertResponse(results=[encoder_pb2.UpsertResult(status=1)]))
    worker.dropped(Reason.BUSY, 1)
    worker.holds("kept", 1)
    return found | samples(worker.registry)


async def test_every_name_exists(exported) -> None:
    used = {name for expression in EXPRESSIONS for name in re.findall(r"\bpreread_\w+", expression)}
    assert used <= set(exported), used - set(exported)


async def test_the_page_for_operators_names_metrics_that_exist(exported) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    named = set(re.findall(r"`(preread_\w+)`", page))
    assert len(named) > 20
    assert named <= set(exported) | {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported}


async def test_every_metric_is_shown(exported) -> None:
    used = " ".join(EXPRESSIONS)
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exported}
    unseen = {name for name in families if name not in used}
    assert not unseen


async def test_labels_exist(exported) -> None:
    for panel in panels():
        for target in panel.get("targets", ()):
            names = re.findall(r"\bpreread_\w+", target["expr"])
            by = {
                label.strip() for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(",")
            }
            matched = set(re.findall(r"[{,](\w+)=~?\"", target["expr"]))
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            for name in names:
                assert by | matched <= exported[name] | SCRAPE_LABELS, (panel["title"], name)
            assert shown <= by, panel["title"]


def test_panels_are_told_apart_and_do_not_overlap() -> None:
    everything = list(panels())
    assert len({panel["id"] for panel in everything}) == len(everything)
    cells: set[tuple[int, int]] = set()
    for panel in everything:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own
