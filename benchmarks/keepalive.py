"""Calls and connections that are quiet for ten minutes, from clients that ping: do they end well?

python -m benchmarks.keepalive                 ten minutes, from Python and Node (npm fetches @grpc/grpc-js)
python -m benchmarks.keepalive --no-node --seconds 60

Every call sends one message, is quiet, and sends another; it is well when both were answered. An Upsert stream holds
the encoder worker's port, a RerankStream of tei.v1 (many messages, one response) the reranking server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from benchmarks.common import report, tiny_checkpoint
from benchmarks.servers import started
from preread import AsyncClient, ClientOptions, Passage
from preread.tei.v1 import tei_pb2, tei_pb2_grpc
from preread.v1 import encoder_pb2, encoder_pb2_grpc, rerank_pb2, rerank_pb2_grpc

ROOT = Path(__file__).parent.parent
PING_SECONDS = 10
PINGING = [
    ("grpc.keepalive_time_ms", PING_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # one connection per call
    ("grpc.enable_retries", 0),
]
NODE = """
const grpc = require('@grpc/grpc-js'), loader = require('@grpc/proto-loader');
const [address, encoder, seconds, protos] = process.argv.slice(2);
const load = (file) => grpc.loadPackageDefinition(loader.loadSync(file, {keepCase: true, includeDirs: [protos]}));
const options = {'grpc.keepalive_time_ms': 10000, 'grpc.keepalive_timeout_ms': 5000,
                 'grpc.keepalive_permit_without_calls': 1};
const {EncoderService} = load('preread/v1/encoder.proto').preread.v1, {Rerank} = load('tei/v1/tei.proto').tei.v1;
const quiet = Number(seconds) * 1000, plain = grpc.credentials.createInsecure();
function upsert(done) {
  const call = new EncoderService(encoder, plain, options).Upsert();
  let answers = 0;
  call.on('data', () => { answers += 1; });
  call.on('error', (error) => done('upsert', error.message));
  call.on('end', () => done('upsert', answers === 2 ? 'well' : `${answers} answers`));
  call.write({collection: 'node', passages: [{passage_id: 'a', text: 'one'}]});
  setTimeout(() => { call.write({passages: [{passage_id: 'b', text: 'two'}]}); call.end(); }, quiet);
}
function rerank(done) {
  const call = new Rerank(address, plain, options).RerankStream((error, response) =>
    done('rerank', error ? error.message : response.ranks.length === 2 ? 'well' : 'too few ranks'));
  call.write({query: 'q', text: 'one'});
  setTimeout(() => { call.write({query: 'q', text: 'two'}); call.end(); }, quiet);
}
const ended = {};
const done = (name, how) => {
  if (!(name in ended)) ended[name] = how;
  if (Object.keys(ended).length === 2) { console.log(JSON.stringify(ended)); process.exit(0); }
};
upsert(done); rerank(done);
"""


@contextmanager
def serving() -> Iterator[tuple[str, str]]:
    """Addresses of a server and of the worker inside it, both on the tiny checkpoint."""
    with (
        tempfile.TemporaryDirectory() as folder,
        started(tiny_checkpoint(), f"faiss:{folder}/store") as said,
    ):
        yield said["listening"].split()[0], said["encoder"].split()[0]


async def upsert(encoder: str, seconds: float, collection: str) -> str:
    """An upload by the stubs, with a pause in it."""

    async def messages() -> AsyncIterator[encoder_pb2.UpsertRequest]:
        for name, wait in (("a", 0.0), ("b", seconds)):
            await asyncio.sleep(wait)
            passages = [encoder_pb2.Passage(passage_id=name, text=f"passage {name}")]
            yield encoder_pb2.UpsertRequest(collection=collection, passages=passages)

    async with grpc.aio.insecure_channel(encoder, PINGING) as channel:
        answers = [one async for one in encoder_pb2_grpc.EncoderServiceStub(channel).Upsert(messages())]
    return "well" if len(answers) == 2 else f"{len(answers)} answers"


async def rerank(address: str, seconds: float) -> str:
    """One response to texts with a pause between them."""

    async def messages() -> AsyncIterator[tei_pb2.RerankStreamRequest]:
        for text, wait in (("one", 0.0), ("two", seconds)):
            await asyncio.sleep(wait)
            yield tei_pb2.RerankStreamRequest(query="q", text=text)

    async with grpc.aio.insecure_channel(address, PINGING) as channel:
        answer = await tei_pb2_grpc.RerankStub(channel).RerankStream(messages())
    return "well" if len(answer.ranks) == 2 else "too few ranks"


async def no_call(address: str, seconds: float) -> str:
    """Pings on a connection without a call, and then a call."""
    async with grpc.aio.insecure_channel(address, PINGING) as channel:
        stub = rerank_pb2_grpc.RerankServiceStub(channel)
        await stub.ListModels(rerank_pb2.ListModelsRequest())
        await asyncio.sleep(seconds)
        await stub.ListModels(rerank_pb2.ListModelsRequest())
    return "well"


async def our_client(address: str, encoder: str, seconds: float) -> str:
    """An upload by preread.AsyncClient, as it comes."""

    async def passages() -> AsyncIterator[Passage]:
        yield Passage("a", "one")
        await asyncio.sleep(seconds)
        yield Passage("b", "two")

    options = ClientOptions(timeout_seconds=None)
    async with AsyncClient(address, encoder_address=encoder, options=options) as client:
        results = [one async for one in client.upsert(passages(), collection="ours")]
    return "well" if len(results) == 2 else f"{len(results)} results"


async def node(address: str, encoder: str, seconds: float) -> dict[str, str]:
    """The same two calls by @grpc/grpc-js, which npm puts into a directory that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        install = ["npm", "install", "--silent", "--prefix", folder, "@grpc/grpc-js", "@grpc/proto-loader"]
        await asyncio.to_thread(subprocess.run, install, check=True, stdout=subprocess.DEVNULL)
        script = Path(folder) / "calls.js"
        script.write_text(NODE)
        process = await asyncio.create_subprocess_exec(
            "node", str(script), address, encoder, str(seconds), str(ROOT / "proto"), stdout=subprocess.PIPE
        )
        out, _ = await process.communicate()
    ended: dict[str, str] = json.loads(out)
    return ended


async def all_calls(address: str, encoder: str, seconds: float, with_node: bool) -> list[list[object]]:
    calls: dict[str, Any] = {
        f"Python, a ping every {PING_SECONDS} s: Upsert": upsert(encoder, seconds, "python"),
        f"Python, a ping every {PING_SECONDS} s: RerankStream": rerank(address, seconds),
        f"Python, a ping every {PING_SECONDS} s: no call": no_call(address, seconds),
        "preread.AsyncClient, upsert": our_client(address, encoder, seconds),
    }
    if with_node:
        calls[f"Node, a ping every {PING_SECONDS} s"] = node(address, encoder, seconds)

    async def timed(name: str, call: Any) -> list[list[object]]:
        begin = time.perf_counter()
        try:
            ended = await call
        except Exception as exc:  # whatever ended it is the finding
            ended = f"{type(exc).__name__}: {exc.details() if isinstance(exc, grpc.RpcError) else exc}"
        took = time.perf_counter() - begin
        several = {f"{name}: {one}": how for one, how in ended.items()} if isinstance(ended, dict) else {name: ended}
        return [[one, took, how] for one, how in several.items()]

    rows = await asyncio.gather(*(timed(name, call) for name, call in calls.items()))
    return [row for some in rows for row in some]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long each is quiet")
    parser.add_argument("--no-node", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    with serving() as (address, encoder):
        rows = asyncio.run(all_calls(address, encoder, args.seconds, not args.no_node))
    report("keepalive", ["call", "seconds", "ended"], rows, seconds=args.seconds)
    return int(any(row[2] != "well" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
