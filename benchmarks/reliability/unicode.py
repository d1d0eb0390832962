"""Hostile but valid Unicode: texts of 0 to 3 characters of every general category, beside ordinary neighbours.

Real servers and sockets: index files, uploads, gRPC, every HTTP dialect, TEI's gRPC; models that read states, whose
tokenizer knows every byte or drops what it does not know, and models that read text. The law: each odd text has the
margin that it has alone, or is empty and has what its contract says (the floor, a status, a refusal); its neighbours
have what they have without it; nothing ends in INTERNAL, UNKNOWN or 5xx.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import sys
import tempfile
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.synthetic import make_cross_encoder
from cache.collection import Collection
from cache.open import open_store
from cache.states import PassageStates
from cache.store import Store
from checkpoint.synthetic import make_checkpoint
from decoder_server.config import NO_KV_CACHES, DecoderConfig, HttpConfig
from decoder_server.edge.engines import FLOOR_MARGIN
from decoder_server.server import DecoderServer, Gateway
from encoder_worker.config import CollectionSettings, EncoderConfig
from encoder_worker.indexing import index
from encoder_worker.server import EncoderServer
from encoder_worker.sources.files import Source
from preread.tei.v1 import tei_pb2, tei_pb2_grpc
from preread.v1 import encoder_pb2, encoder_pb2_grpc, rerank_pb2, rerank_pb2_grpc

QUERY = "What is the capital of China?"
NEIGHBOURS = (
    "The capital of China is Beijing.",
    "Gravity attracts bodies toward one another.",
    "A passage is read once, and the pooled states of its tokens are kept.",
)
ODD_AT_ONCE = 8  # in one request
TOLERANCE = 1e-4  # of margins and states: other batches differ in the last digits
EMPTY = "empty"
ORDINARY = "ordinary"
RESULTS = ("scored", "empty", "odd text differs", "neighbour differs", "server error")
DIALECTS = {
    "cohere": ("/v2/rerank", "documents"), "tei": ("/tei/rerank", "texts"), "nim": ("/v1/ranking", "passages"),
    "voyage": ("/voyage/v1/rerank", "documents"), "mixedbread": ("/v1/rerank", "input"),
    "infinity": ("/infinity/rerank", "documents"), "score": ("/score", "text_2"),
    "with ids": ("/v1/rerank", "documents"),
}  # fmt: skip

# Of each text by its place: the margin or states, EMPTY, or None where it went missing.
Answer = Sequence[Any]


class ServerError(Exception):
    """An answer that says there is a bug."""


def odd_texts(count: int, seed: int) -> list[str]:
    """Texts of 0 to 3 characters; each general category that UTF-8 can hold comes as often as any other."""
    by_category: dict[str, list[str]] = {}
    for character in map(chr, range(sys.maxunicode + 1)):
        by_category.setdefault(unicodedata.category(character), []).append(character)
    del by_category["Cs"]  # half of a surrogate pair is no valid Unicode
    categories, chance = sorted(by_category), random.Random(seed)
    by_category[ORDINARY] = sorted(set("".join(NEIGHBOURS)))

    def text(number: int) -> str:
        one = categories[number % len(categories)]
        others = ([ORDINARY] * 2, [one] * 2, chance.choices(categories, k=2))[number // len(categories) % 3]
        characters = [chance.choice(by_category[kind]) for kind in [one, *others][: chance.choice((1, 1, 2, 3))]]
        chance.shuffle(characters)
        return "".join(characters)

    return ["", *(text(number) for number in range(count - 1))]


class Served:
    """One model behind every interface, in this process, on a loop in another thread."""

    def __init__(self, server: DecoderServer, gateway: Gateway, worker: EncoderServer | None, store: Store) -> None:
        self.server, self.gateway, self.worker, self.store = server, gateway, worker, store
        (self.engine,) = server.engines.values()
        self.backend: Any = self.engine.backend
        self.channel = grpc.insecure_channel(f"127.0.0.1:{server.port}")
        self.encoder_channel = grpc.insecure_channel(f"127.0.0.1:{worker.port}") if worker is not None else None
        self.num_collections = 0
        self._alone: dict[str, tuple[Any, PassageStates | None]] = {}

    def close(self) -> None:
        for channel in (self.channel, self.encoder_channel):
            if channel is not None:
                channel.close()

    def alone(self, text: str) -> tuple[Any, PassageStates | None]:
        """Margin and states of a text, by hand, or EMPTY."""
        if text not in self._alone:
            self._alone[text] = self._by_hand(text)
        return self._alone[text]

    def _by_hand(self, text: str) -> tuple[Any, PassageStates | None]:
        if self.backend.is_empty(text):
            return EMPTY, None
        if self.worker is None:
            return float(self.backend.score_texts([(QUERY, None, text)])[0]), None
        ratio = self.backend.settings.default_compression_ratio
        states = self.worker.engine.encoder.encode_one(text, ratio)
        return float(self.backend.score(self.backend.pairs(self.backend.prompt(QUERY), [states])[0])[0]), states

    def post(self, path: str, body: Any, content_type: str = "application/json") -> Any:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.port, timeout=60)
        try:
            connection.request("POST", path, content, {"content-type": content_type})
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise ServerError(f"{path}: {response.status} {data[:200]!r}")
        return json.loads(data)

    # Interfaces: texts to an Answer.

    def rerank(self, texts: Sequence[str]) -> Answer:
        stub = rerank_pb2_grpc.RerankServiceStub(self.channel)
        candidates = [rerank_pb2.Candidate(text=text) for text in texts]
        answer = stub.Rerank(rerank_pb2.RerankRequest(query=QUERY, candidates=candidates), timeout=60)
        found = {one.index: one for one in answer.results}
        return [_status(found.get(index)) for index in range(len(texts))]

    def tei_grpc(self, texts: Sequence[str]) -> Answer:
        stub = tei_pb2_grpc.RerankStub(self.channel)
        messages = [tei_pb2.RerankStreamRequest(query=QUERY, text=text, raw_scores=True) for text in texts]
        found = {rank.index: rank.score for rank in stub.RerankStream(iter(messages), timeout=60).ranks}
        return [_floor(found.get(index)) for index in range(len(texts))]

    def over_http(self, dialect: str, texts: Sequence[str]) -> Answer:
        path, field = DIALECTS[dialect]
        body: dict[str, Any] = {"query": QUERY, field: list(texts), "return_margins": True}
        if dialect == "score":
            body["text_1"] = body.pop("query")
        if dialect == "nim":
            body[field] = [{"text": text} for text in texts]
        if dialect == "with ids":  # there an empty text is no text, and has a status
            body[field] = [{"id": f"none {i}", "text": text} if i % 2 else text for i, text in enumerate(texts)]
        answer = self.post(path, body)
        results = answer if isinstance(answer, list) else next(v for v in answer.values() if isinstance(v, list))
        found = {one["index"]: one["margin"] for one in results}
        if dialect != "with ids":
            return [_floor(found.get(index)) for index in range(len(texts))]
        told = {int(line.split("[")[1].split("]")[0]) for line in answer["meta"].get("warnings", [])}
        return [found.get(index, EMPTY if index in told else None) for index in range(len(texts))]

    def encode(self, texts: Sequence[str]) -> Answer:
        assert self.encoder_channel is not None
        stub = encoder_pb2_grpc.EncoderServiceStub(self.encoder_channel)
        passages = stub.Encode(encoder_pb2.EncodeRequest(texts=texts), timeout=60).passages
        return [_refused(one.message) if one.message else np.frombuffer(one.states, "<f4") for one in passages]

    def upsert(self, texts: Sequence[str]) -> Answer:
        assert self.encoder_channel is not None
        stub = encoder_pb2_grpc.EncoderServiceStub(self.encoder_channel)
        passages = [encoder_pb2.Passage(passage_id=str(i), text=text) for i, text in enumerate(texts)]
        name = self._name()
        message = encoder_pb2.UpsertRequest(collection=name, codec="Flat", passages=passages)
        refused = {
            one.passage_id: one.message
            for response in stub.Upsert(iter([message]), timeout=60)
            for one in response.results
            if one.status == encoder_pb2.UPSERT_STATUS_REFUSED
        }
        return self._stored(name, len(texts), refused)

    def upload(self, texts: Sequence[str], *, as_lines: bool = False) -> Answer:
        name = self._name()
        rows = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
        path = f"/v1/collections/{name}/passages"
        if as_lines:
            content = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
            answer = self.post(f"{path}?codec=Flat", content, "application/x-ndjson")
        else:
            answer = self.post(path, {"passages": rows, "codec": "Flat"})
        return self._stored(name, len(texts), {one["id"]: one["message"] for one in answer["refused"]})

    def index_file(self, texts: Sequence[str]) -> Answer:
        assert self.worker is not None
        name = self._name()
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "passages.jsonl"
            rows = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            settings = CollectionSettings(codec="Flat")
            report = index(Source([path]), self.worker.engine.encoder, self.store, name, settings)
        refused = {issue["passage_id"]: issue["message"] for issue in report.refused}
        return self._stored(name, len(texts), refused)

    def explain(self, texts: Sequence[str]) -> Answer:
        ratio = self.backend.settings.default_compression_ratio
        body = {"query": QUERY, "documents": list(texts), "compression_ratio": ratio}
        found = {one["index"]: one for one in self.post("/v1/explain", body)["results"]}
        return [
            next((s["margin"] for s in one["scores"] if s["compression_ratio"] == ratio), _refused(one["message"]))
            for one in (found[index] for index in range(len(texts)))
        ]

    def as_query(self, texts: Sequence[str]) -> Answer:
        """Each odd text as a query: the neighbours have the margins that they have under it by hand."""
        stub = rerank_pb2_grpc.RerankServiceStub(self.channel)
        candidates = [rerank_pb2.Candidate(text=one) for one in NEIGHBOURS]
        answers: list[Any] = []
        for text in texts:
            try:
                results = stub.Rerank(rerank_pb2.RerankRequest(query=text, candidates=candidates), timeout=60).results
            except grpc.RpcError as exc:
                if exc.code() is not grpc.StatusCode.INVALID_ARGUMENT or text:  # an empty query is refused
                    raise
                results = []
            whole = not text or len(results) == sum(one.HasField("margin") for one in results) == len(NEIGHBOURS)
            answers.append(self.alone(text)[0] if whole else None)
        return answers

    def _name(self) -> str:
        self.num_collections += 1
        return f"c{self.num_collections}"

    def _stored(self, name: str, num: int, refused: Mapping[str, str]) -> Answer:
        collection = Collection.open(self.store, name)
        read = collection.get_many([str(i) for i in range(num)])
        self.store.drop_collection(name)
        return [
            one.states.ravel() if isinstance(one, PassageStates) else _refused(refused.get(str(i), ""))
            for i, one in enumerate(read)
        ]


def _status(result: rerank_pb2.Result | None) -> Any:
    """Over gRPC an empty text has a status."""
    if result is None or result.HasField("margin"):
        return None if result is None else result.margin
    return _refused(result.message)


def _refused(message: str) -> str | None:
    return EMPTY if message in ("text is empty", "the text is empty") or message.endswith(" is empty") else None


def _floor(margin: float | None) -> Any:
    """Where there is no status an empty text has the floor."""
    return EMPTY if margin == FLOOR_MARGIN else margin


@contextmanager
def serving(model: Model, directory: Path) -> Iterator[Served]:
    """A model behind every interface; nothing is kept from one request to the next."""
    checkpoint = model.make(directory / "model")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(120)

    store = open_store(f"faiss:{directory / 'store'}")
    common: dict[str, Any] = {"port": 0, "device": "cpu", "dtype": "float32"}

    async def start() -> tuple[DecoderServer, Gateway, EncoderServer | None]:
        worker = EncoderServer(EncoderConfig(str(checkpoint), **common), store=store) if model.encoder else None
        if worker is not None:
            await worker.start()
        address = f"127.0.0.1:{worker.port}" if worker is not None else ""
        more = {"kv_caches": NO_KV_CACHES, "max_inline_cache_bytes": 0} if model.encoder else {"profile": model.profile}
        more |= {"max_score_cache_bytes": 0}
        config = DecoderConfig.of_one(str(checkpoint), encoder_address=address, **common, **more)
        server = DecoderServer(config, store=store)
        gateway = Gateway(HttpConfig(port=0), server)
        await gateway.start()
        await server.start()
        return server, gateway, worker

    server, gateway, worker = call(start())
    served = Served(server, gateway, worker, store)
    try:
        yield served
    finally:
        served.close()
        call(gateway.stop(1))
        call(server.stop(5))
        if worker is not None:
            call(worker.stop(0))
        store.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def lossy_checkpoint(directory: Path) -> Path:
    """A tokenizer that drops what it was not trained on, and nothing around a passage."""
    settings = {"passage_template": "{passage}", "prompt_template": "{instruction} {query} :"}
    path = make_checkpoint(directory, settings=settings)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"] |= {"byte_fallback": False, "unk_token": None}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


@dataclass(frozen=True)
class Model:
    """One that is served here."""

    make: Callable[[Path], Path]  # into a directory
    encoder: bool = False  # reads states, which a worker encodes
    profile: str = ""  # of one that reads text


MODELS = {
    "states, every byte": Model(make_checkpoint, encoder=True),
    "states, drops unknown": Model(lossy_checkpoint, encoder=True),
    "text, WordPiece": Model(partial(make_cross_encoder, architecture="BertForSequenceClassification")),
    "text, unigram": Model(partial(make_cross_encoder, architecture="XLMRobertaForSequenceClassification")),
    "text, byte level": Model(
        partial(make_cross_encoder, architecture="Qwen3ForCausalLM"), profile="Qwen/Qwen3-Reranker-0.6B"
    ),
}


def interfaces(served: Served) -> dict[str, Callable[[Sequence[str]], Answer]]:
    """By name, those that this model has."""
    found: dict[str, Callable[[Sequence[str]], Answer]] = {"gRPC Rerank": served.rerank, "TEI gRPC": served.tei_grpc}
    found |= {f"HTTP {name}": partial(served.over_http, name) for name in DIALECTS}
    found["as the query"] = served.as_query
    if served.worker is not None:
        found |= {
            "index, file": served.index_file,
            "gRPC Upsert": served.upsert,
            "gRPC Encode": served.encode,
            "HTTP upload": served.upload,
            "HTTP upload, lines": partial(served.upload, as_lines=True),
            "explain": served.explain,
        }
    return found


def run(count: int, seed: int, models: Sequence[str] = tuple(MODELS)) -> list[dict[str, Any]]:
    """One row per interface, over all models that have it.

    Args:
        count: odd texts, each sent over every interface of every model.
    """
    odd = odd_texts(count, seed)
    totals: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for number, name in enumerate(models):
            with serving(MODELS[name], Path(directory) / str(number)) as served:
                for interface, ask in interfaces(served).items():
                    total = totals.setdefault(interface, Counter())
                    total += _tally(served, ask, odd, random.Random(seed)) + Counter(models=1, texts=len(odd))
    return [
        {"interface": interface} | {column: total[column] for column in ("models", "texts", *RESULTS)}
        for interface, total in totals.items()
    ]


def _tally(
    served: Served, ask: Callable[[Sequence[str]], Answer], odd: Sequence[str], chance: random.Random
) -> Counter[str]:
    """Outcomes of the odd texts and of their neighbours, over one interface."""
    tally: Counter[str] = Counter()
    for start in range(0, len(odd), ODD_AT_ONCE):
        texts = [*odd[start : start + ODD_AT_ONCE], *NEIGHBOURS]
        chance.shuffle(texts)
        try:
            answers = ask(texts)
        except (ServerError, grpc.RpcError):
            tally["server error"] += len(texts) - len(NEIGHBOURS)
            continue
        for text, answer in zip(texts, answers, strict=True):
            margin, states = served.alone(text)
            expected = states.states.ravel() if states is not None and isinstance(answer, np.ndarray) else margin
            right = _same(answer, expected)
            if text in NEIGHBOURS:
                tally["neighbour differs"] += not right
            else:
                tally["odd text differs" if not right else "empty" if margin is EMPTY else "scored"] += 1
    return tally


def _same(answer: Any, expected: Any) -> bool:
    if answer is None or isinstance(answer, str) or isinstance(expected, str):
        return answer is not None and isinstance(answer, str) and isinstance(expected, str)
    return np.shape(answer) == np.shape(expected) and bool(np.allclose(answer, expected, rtol=0, atol=TOLERANCE))
