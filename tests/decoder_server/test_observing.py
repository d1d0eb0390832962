"""Laws of what an operator sees: every number adds up with the requests made, every call has its id, no text leaks."""

from __future__ import annotations

import io
import json
import urllib.request

import grpc
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from decoder_server.config import DecoderConfig
from decoder_server.server import DecoderServer
from decoder_server.telemetry import Metrics
from decoder_server.tracing import TracingObserver
from encoder_worker.config import EncoderConfig
from encoder_worker.server import EncoderServer
from preread.v1 import rerank_pb2_grpc
from preread_edge.access import Guard
from preread_edge.listener import metrics_listener
from preread_edge.logs import set_up

ID = (("x-request-id", "order-66"),)


def scraped(serving) -> dict[tuple[str, frozenset], float]:
    """What Prometheus would read, over a real port."""
    with (
        metrics_listener(serving.server.metrics.registry, "127.0.0.1", 0, Guard()) as port,
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer,
    ):
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: dict, name: str, **labels: str) -> float:
    return sum(v for (n, has), v in samples.items() if n == name and labels.items() <= set(has))


async def test_numbers_add_up(serve, refused) -> None:
    async with serve() as serving:
        await serving.rerank(ids=["p1", "p2", "nowhere"], top_n=1)
        await serving.rerank(ids=["p1", "p2"])
        await refused(serving.rerank(ids=["p1"], compression_ratio=3), grpc.StatusCode.INVALID_ARGUMENT)
        await refused(serving.rerank(ids=["p1"], model="other"), grpc.StatusCode.NOT_FOUND)
        seen = scraped(serving)

    assert value(seen, "preread_requests_total", model="tiny", code="ok") == 2
    assert value(seen, "preread_requests_total", code="invalid_request") == 1
    assert value(seen, "preread_rpcs_total", method="RerankService/Rerank") == 4
    assert value(seen, "preread_rpcs_total", code="NOT_FOUND") == 1
    assert value(seen, "preread_candidates_total", status="hit") == 4, "all candidates, not only top_n of them"
    assert value(seen, "preread_candidates_total", status="missing") == 1
    assert value(seen, "preread_forward_seconds_count") == value(seen, "preread_batch_tokens_count") >= 2
    assert value(seen, "preread_batch_pairs_sum") == 4
    assert value(seen, "preread_attention_cells_total", kind="needed") > 0
    assert value(seen, "preread_queue_wait_seconds_count") == 2
    assert value(seen, "preread_cache_hits_total", tier="store") == 2
    assert value(seen, "preread_cache_misses_total", tier="store") == 3
    assert value(seen, "preread_cache_bytes", tier="store") > 0
    assert value(seen, "preread_store_read_bytes_total") > 0
    assert value(seen, "preread_store_read_seconds_count") >= 1
    assert value(seen, "preread_queue_requests") == 0
    assert value(seen, "preread_model_info", model="tiny", backend="fbnl") == 1
    assert value(seen, "preread_collection_info", collection="docs", codec="Flat", compression_ratio="4") == 1
    assert value(seen, "preread_collection_passages", collection="docs") == 60
    assert value(seen, "preread_store_up") == 1


def test_there_are_metrics_before_the_models_have_loaded(store) -> None:
    metrics = Metrics()
    metrics.watch({}, store)
    text = generate_latest(metrics.registry).decode()
    assert "preread_store_up 1.0" in text
    assert "# TYPE preread_cache_bytes gauge" in text


async def test_refusals_are_counted(serve, gated, refused) -> None:
    import asyncio

    async with serve(backend=gated, max_queue_requests=1) as serving:
        gated.gate.clear()
        first = asyncio.create_task(serving.rerank(ids=["p1"]))
        await gated.wait_entered()
        await refused(serving.rerank(ids=["p1"]), grpc.StatusCode.RESOURCE_EXHAUSTED)
        seen = scraped(serving)
        assert value(seen, "preread_admission_refusals_total", model="tiny") == 1
        assert value(seen, "preread_requests_total", code="overloaded") == 1
        assert value(seen, "preread_queue_requests", model="tiny") == 1
        gated.gate.set()
        await first


async def test_two_servers_do_not_share_a_registry(serve) -> None:
    async with serve() as one, serve() as two:
        await one.rerank(ids=["p1"])
        assert value(scraped(one), "preread_requests_total") == 1
        assert value(scraped(two), "preread_requests_total") == 0


async def test_a_call_keeps_its_id_also_when_it_fails(serve, make_request) -> None:
    async with serve() as serving:
        call = serving.stub.Rerank(make_request(ids=["p1"]), metadata=ID)
        await call
        assert ("x-request-id", "order-66") in tuple(await call.trailing_metadata())
        bad = serving.stub.Rerank(make_request(), metadata=ID)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bad
        trailers = dict(caught.value.trailing_metadata())
        assert trailers["x-request-id"] == "order-66"
        assert "grpc-status-details-bin" in trailers


@pytest.mark.parametrize("given", [(), (("x-request-id", "a b"),), (("x-request-id", "x" * 200),)])
async def test_an_id_is_made_where_none_is_usable(serve, make_request, given) -> None:
    async with serve() as serving:
        call = serving.stub.Rerank(make_request(ids=["p1"]), metadata=given)
        await call
        assert len(dict(await call.trailing_metadata())["x-request-id"]) == 32


@pytest.fixture
def log_lines():
    """Set logs up on a separate stream; give what was logged."""
    stream = io.StringIO()
    set_up("json", "debug", stream)
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("log_text", [False, True])
async def test_a_log_line_has_the_id_and_text_only_where_asked_for(serve, make_request, log_lines, log_text) -> None:
    async with serve(log_text=log_text) as serving:
        await serving.stub.Rerank(make_request(query="velvet", inline=["crimson"], ids=["p1"]), metadata=ID)
    (line,) = [line for line in log_lines() if line["message"] == "rerank"]
    assert line["request_id"] == "order-66"
    assert (line["code"], line["num_candidates"], line["num_hit"]) == ("ok", 2, 1)
    assert line["seconds"] > 0
    everything = json.dumps(log_lines())
    assert ("velvet" in everything) is log_text
    assert "crimson" not in everything


@pytest.fixture
async def traced(fbnl, tiny, store, tmp_path):
    """A server that writes spans, with a real encoder worker beside it: a stub, and what was written so far by name."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    compute = {"device": "cpu", "dtype": "float32"}
    worker = EncoderServer(EncoderConfig(str(tiny), port=0, store=f"faiss:{tmp_path / 'worker'}", **compute))
    await worker.start()
    server = DecoderServer(
        DecoderConfig.of_one(str(tiny), port=0, encoder_address=f"127.0.0.1:{worker.port}", **compute),
        store=store,
        load=lambda _: fbnl,
        observers=[TracingObserver(provider.get_tracer("test"))],
    )
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = rerank_pb2_grpc.RerankServiceStub(channel)
        yield stub, lambda: {span.name: span for span in exporter.get_finished_spans()}
    await server.stop(1)
    await worker.stop(1)


async def test_spans_follow_a_request(traced, make_request) -> None:
    stub, written = traced
    trace = "0af7651916cd43dd8448eb211c80319c"
    parent = (("traceparent", f"00-{trace}-b7ad6b7169203331-01"),)
    await stub.Rerank(make_request(ids=["p1", "p2"], inline=["a text"]), metadata=parent)
    spans, call = written(), "preread.v1.RerankService/Rerank"
    assert set(spans) == {call, "fetch", "encode", "batch", "forward"}
    assert all(f"{span.context.trace_id:032x}" == trace for span in spans.values())
    ids = {span.context.span_id: name for name, span in spans.items()}
    parents = {name: ids.get(span.parent.span_id) for name, span in spans.items()}
    assert parents == {call: None, "fetch": call, "encode": call, "batch": call, "forward": "batch"}
    root = spans[call]
    assert root.parent.span_id == 0xB7AD6B7169203331
    assert all(root.start_time <= span.start_time <= span.end_time <= root.end_time for span in spans.values())
    assert (root.attributes["preread.num_hit"], root.attributes["preread.num_encoded"]) == (2, 1)
    assert root.attributes["rpc.service"] == "preread.v1.RerankService"
    assert (root.attributes["rpc.method"], root.attributes["rpc.grpc.status_code"]) == ("Rerank", 0)
    assert root.status.is_ok or root.status.is_unset


async def test_a_refused_request_has_a_span_too(traced, make_request, refused) -> None:
    stub, written = traced
    await refused(stub.Rerank(make_request(ids=["p1"], compression_ratio=3)), grpc.StatusCode.INVALID_ARGUMENT)
    (span,) = written().values()
    assert (span.attributes["preread.code"], span.attributes["rpc.grpc.status_code"]) == ("invalid_request", 3)
    assert span.parent is None


async def test_a_request_has_a_token_limit(serve, texts, refused) -> None:
    async with serve(max_request_tokens=200) as serving:
        assert (await serving.rerank(ids=["p1"])).num_scored == 1
        error = await refused(serving.rerank(ids=texts), grpc.StatusCode.INVALID_ARGUMENT)
        assert "at most 200" in error.details()
        assert (await serving.rerank(ids=["p1"])).num_scored == 1
