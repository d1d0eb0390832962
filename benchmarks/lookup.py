"""Passages sent as texts by Cohere's client: encoded on demand, found stored by their text, and asked for by id.

    scripts/test-conformance -k nothing || true    # sets up the clients' environment, .venv-conformance
    python -m benchmarks.lookup [--model nano|mini] [--requests 5] [--quick]

100 passages of 344 tokens are indexed by `preread index` at r = 4. A real `preread serve` answers HTTP requests of one
client in another process, which asks again as soon as it is answered: cohere's ClientV2 with the passages as
`documents`, or the same request with their ids. Every row is the median over requests with another query each, but the
last, whose query comes again and whose margins are known.
`caches off` is without KV and prefix caches, and without the one of states encoded on demand; `caches hot` has all
passages in both. nano has random weights in the shape of KaLM-Reranker-V1-Nano; mini is the shipped model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.collection_size import MODEL
from benchmarks.common import nano_checkpoint, report, start, tiny_checkpoint
from benchmarks.many import QUERY
from benchmarks.servers import TIERS, indexed, metrics, started, texts_of
from checkpoint import Checkpoint

NUM_PASSAGES, PASSAGE_TOKENS = 100, 344
WARM_UP, COLD_WARM_UP = 3, 1  # requests that do not count: caches keep what they miss twice
OFF = ["--keys-cache-bytes", "0", "--prefix-cache-bytes", "0", "--inline-cache-bytes", "0"]
# Of each server: its flags, and how it is asked, by row.
SERVERS: list[tuple[list[str], dict[str, str]]] = [
    ([*OFF, "--lookup", "none"], {"encoded on demand, caches off": "texts"}),
    (OFF, {"found by text, caches off": "texts", "by id, caches off": "ids"}),
    (TIERS, {"found by text, caches hot": "texts", "by id, caches hot": "ids"}),
    (["--score-cache-bytes", str(1 << 20)], {"the same query again, by text": "again"}),
]
COLUMNS = ["request", "ms, p50", "speedup", "found", "in the model, ms"]
# Runs in the clients' environment, which knows nothing of ours.
CLIENT = """
import json, sys, time
import cohere, httpx
given = json.load(sys.stdin)
client = cohere.ClientV2(api_key="anything", base_url=given["url"], timeout=600)
web = httpx.Client(base_url=given["url"], timeout=600)
def ask(number):
    query = given["query"] if given["how"] == "again" else f"{given['query']} {number}"
    begin = time.perf_counter()
    if given["how"] != "ids":
        answer = client.rerank(model=given["model"], query=query, documents=given["documents"])
        assert len(answer.results) == len(given["documents"])
    else:
        body = {"query": query, "collection": "docs", "passage_ids": given["ids"]}
        answer = web.post("/v2/rerank", json=body)
        assert len(answer.json()["results"]) == len(given["ids"])
    return time.perf_counter() - begin
for number in range(given["warm_up"]):
    ask(number)
times = [ask(1000 + number) for number in range(given["requests"])]
body = {"query": given["query"], "documents": given["documents"]}
found = web.post("/v2/rerank", json=body).headers.get("x-preread-lookup", "") if given["how"] != "ids" else ""
json.dump({"times": times, "found": found}, sys.stdout)
"""


def ask(
    python: Path, url: str, how: str, texts: dict[str, str], num_requests: int, warm_up: int, model: str
) -> dict[str, Any]:
    """Seconds of each request after the first, and how many texts were found."""
    given = {"url": url, "how": how, "documents": [*texts.values()], "ids": [*texts], "model": model}
    given |= {"query": QUERY, "requests": num_requests, "warm_up": warm_up}
    command = [str(python), "-c", CLIENT]
    answer = subprocess.run(command, input=json.dumps(given), stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(answer.stdout)
    return told


def model_seconds(url: str) -> float:
    """Seconds of all forward passes so far."""
    return metrics(url)["preread_forward_seconds_sum"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("nano", "mini"), default="nano")
    parser.add_argument("--requests", type=int, default=5, help="of each row")
    parser.add_argument("--python", type=Path, default=Path(".venv-conformance/bin/python"), help="has cohere")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the command")
    args = parser.parse_args()
    start()
    model = tiny_checkpoint() if args.quick else nano_checkpoint() if args.model == "nano" else MODEL
    checkpoint = Checkpoint.open(model)
    make = texts_of(lambda text: len(checkpoint.text.passages([text])[0].ids))
    texts = {f"p{i}": make(PASSAGE_TOKENS) for i in range(NUM_PASSAGES)}
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = indexed(texts, model, Path(folder))
        for flags, asked in SERVERS:
            with started(model, store, "--http-port", "0", "--served-model-name", "model", *flags) as said:
                url = said["http"].split()[0]
                for name, how in asked.items():
                    before = model_seconds(url)
                    warm_up = COLD_WARM_UP if name.endswith("off") else WARM_UP
                    told = ask(args.python, url, how, texts, args.requests, warm_up, "model")
                    num_asked = args.requests + warm_up + (how != "ids")
                    in_model = (model_seconds(url) - before) / num_asked
                    seconds = sorted(told["times"])[len(told["times"]) // 2]
                    rows.append([name, seconds * 1e3, 0.0, told["found"], in_model * 1e3])
                    print(f"{name}: {seconds * 1e3:.0f} ms {told['found']}", flush=True)
    for row in rows:
        row[2] = rows[0][1] / row[1]
    report(
        f"lookup-{args.model}", COLUMNS, rows, quick=args.quick, model=args.model, passages=NUM_PASSAGES,
        passage_tokens=PASSAGE_TOKENS, ratio=4,
    )  # fmt: skip


if __name__ == "__main__":
    main()
