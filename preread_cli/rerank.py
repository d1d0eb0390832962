"""`preread rerank`: one query to a table, or a file of queries to a TREC run. Asks a server; loads no model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import click

from preread_cli.failures import BAD_ITEMS, CommandFailed
from preread_cli.options import (
    address_option,
    client_options,
    collection_option,
    json_option,
    option,
    store_option,
    tls_options,
)

# Asking for a whole collection is for trying things out; ranking needs a first stage beyond this.
MAX_WHOLE_COLLECTION = 5000
DEFAULT_TOP_N = 10


@click.command()
@click.argument("query", required=False)
@collection_option(required=False, help="The collection, or alias, that ids refer to.")
@option("--ids", metavar="FILE", help="Rank these passages: one id per line; - is standard input.")
@option("--candidates", metavar="FILE", help='Rank these texts: one per line, or JSON lines with "id", "text" or both.')
@option("--queries", metavar="FILE", help='Ask all of these: id<TAB>text per line, or JSON lines with "id" and "text".')
@option("--run", "run_file", metavar="FILE", help="With --queries: candidates of each query, a first stage's TREC run.")
@option("--depth", type=click.IntRange(min=1), default=100, help="With --run: how many candidates of each query.")
@option("--output", metavar="FILE", default="-", help="With --queries: where the TREC run goes; - is standard output.")
@option("--top-n", type=click.IntRange(min=0), help="Show this many; 0 is all.  [default: 10; with --queries all]")
@option("--instruction", metavar="TEXT", help='What to look for, instead of the model\'s own task; "" for nothing.')
@option(
    "--compression-ratio",
    type=click.IntRange(min=0),
    default=0,
    help="Read at this multiple of the stored ratio; 0: at the server's own default.",
)
@option(
    "--stages",
    metavar="RATIO:KEEP,...",
    default="",
    help="A cascade in place of one ratio: 32:100,4:20,1 reads every candidate at ratio 32, the best 100 at 4, the "
    "best 20 of those at 1.",
)
@option("--on-miss", type=click.Choice(["encode", "skip", "fail"]), help="For ids without states.  [default: server's]")
@option("--model-name", metavar="NAME", default="", help="Which of the server's models; without it, the first.")
@option("--concurrency", type=click.IntRange(min=1), default=4, help="With --queries: requests under way at a time.")
@option("--timeout-seconds", type=click.FloatRange(min=0, min_open=True), default=300.0, help="For one request.")
@json_option
@store_option
@address_option
@tls_options
@click.pass_context
def command(ctx: click.Context, /, query: str | None, **given: Any) -> None:
    """Rank passages for a query, or for a file of queries.

    Without --ids, --candidates or --run the whole collection is ranked, up to 5,000 passages; its ids are
    read from --store. A server must be running: `preread serve`.

    \b
    Examples:
      preread rerank "why is the sky blue" --collection docs
      preread rerank "why is the sky blue" --candidates passages.txt
      search "why is the sky blue" | preread rerank "why is the sky blue" -c docs --ids -
      preread rerank --queries queries.tsv --run bm25.run -c docs --output reranked.run
    """
    from preread import Client, Unavailable

    _check(query, given)
    options: dict[str, Any] = {
        "collection": given["collection"] or "",
        "instruction": given["instruction"],
        "compression_ratio": given["compression_ratio"],
        "stages": given["stages"],
        "on_miss": given["on_miss"],
        "model": given["model_name"],
    }
    try:
        with Client(
            given["address"], options=client_options(given, timeout_seconds=given["timeout_seconds"])
        ) as client:
            max_candidates = _max_candidates(client, given["model_name"])
            if query is not None:
                num_bad = _one_query(client, query, given, max_candidates, options)
            else:
                num_bad = _many_queries(client, given, max_candidates, options)
    except Unavailable as exc:
        raise CommandFailed(f"{exc}; is `preread serve` running there?", 3) from exc
    if num_bad:
        ctx.exit(BAD_ITEMS)


def _check(query: str | None, given: Mapping[str, Any]) -> None:
    if (query is None) == (given["queries"] is None):
        raise click.UsageError("Give a QUERY, or a file of them with --queries.")
    sources = [name for name in ("ids", "candidates", "run_file") if given[name] is not None]
    if len(sources) > 1:
        raise click.UsageError("--ids, --candidates and --run exclude one another.")
    if sum(given[name] == "-" for name in ("queries", "ids", "candidates", "run_file")) > 1:
        raise click.UsageError("- is standard input, which can be read once: name a file for all but one.")
    if given["run_file"] is not None and query is not None:
        raise click.UsageError("--run goes with --queries.")
    if given["collection"] is None and given["candidates"] is None:
        raise click.UsageError("Name the --collection that holds the passages, or give texts with --candidates.")


def _max_candidates(client: Any, model: str) -> int:
    limits = {info.name: info.max_candidates for info in client.list_models()}
    return int(limits.get(model) or next(iter(limits.values())))  # an unknown name is refused by the server itself


def _candidates(given: Mapping[str, Any]) -> Sequence[Any]:
    """What every query is ranked against, when no run says it."""
    from preread_cli.inputs import read_candidates, read_ids

    if given["ids"] is not None:
        found = read_ids(given["ids"])
    elif given["candidates"] is not None:
        found = read_candidates(given["candidates"])
    else:
        return _whole_collection(given["store"], given["collection"])
    if not found:
        raise CommandFailed(f"{given['ids'] or given['candidates']}: nothing to rank")
    return found


def _whole_collection(store_url: str, name: str) -> Sequence[Any]:
    from preread import Candidate
    from preread_cli.inputs import stored_ids

    otherwise = (
        f"without --ids or --run at most {MAX_WHOLE_COLLECTION:,} are ranked. Let a first stage choose candidates"
    )
    ids = stored_ids(store_url, name, max_passages=MAX_WHOLE_COLLECTION, otherwise=otherwise)
    return [Candidate(passage_id=passage_id) for passage_id in ids]


def _one_query(client: Any, query: str, given: Mapping[str, Any], max_candidates: int, options: Any) -> int:
    from preread_cli.ranking import rerank
    from preread_cli.tables import print_reranking

    top_n = DEFAULT_TOP_N if given["top_n"] is None else given["top_n"]
    options |= {"top_n": top_n, "return_text": True}
    candidates = _candidates(given)
    answer = rerank(client, query, candidates, max_candidates, options)
    if given["as_json"]:
        click.echo(json.dumps({"query": query} | asdict(answer), ensure_ascii=False, indent=2))
    else:
        print_reranking(query, answer, len(candidates))
    return len(candidates) - answer.summary.num_scored


def _many_queries(client: Any, given: Mapping[str, Any], max_candidates: int, options: Any) -> int:
    from rich.console import Console
    from rich.progress import track

    from preread_cli.inputs import read_queries
    from preread_cli.ranking import rerank_all
    from preread_edge.outputs import open_output
    from tuning.trec import check_ids

    queries = read_queries(given["queries"])
    if given["run_file"] is not None:
        candidates = _from_run(Path(given["run_file"]), queries, given["depth"])
        queries = {query_id: text for query_id, text in queries.items() if query_id in candidates}
    else:
        candidates = dict.fromkeys(queries, _candidates(given))
    if not given["as_json"]:  # now, not after hours
        check_ids(*queries)
        check_ids(*{one.passage_id for found in candidates.values() for one in found if one.passage_id})
    answers = rerank_all(
        client, queries, candidates, max_candidates, options | {"top_n": given["top_n"] or 0}, given["concurrency"]
    )
    console = Console(stderr=True)
    done = []
    with open_output(given["output"]) as file:
        bar = track(answers, "reranking", total=len(queries), console=console, disable=not console.is_terminal)
        for query_id, answer in bar:
            file.writelines(_lines(query_id, queries[query_id], answer, as_json=given["as_json"]))
            done.append(answer)
    _tell_what_was_read(done)
    num_scored = sum(answer.summary.num_scored for answer in done)
    num_bad = sum(len(candidates[query_id]) for query_id in queries) - num_scored
    click.echo(f"{len(done):,} queries, {num_scored:,} passages scored, {num_bad:,} not scored", err=True)
    for result in islice((r for answer in done for r in answer if r.margin is None), 5):
        click.echo(f"  {result.passage_id}: {result.status} {result.message}", err=True)
    return num_bad


def _lines(query_id: str, query: str, answer: Any, *, as_json: bool) -> list[str]:
    """Lines written for one query."""
    from preread_cli.ranking import run_rows
    from tuning.trec import run_lines

    if as_json:
        return [json.dumps({"query_id": query_id, "query": query} | asdict(answer), ensure_ascii=False) + "\n"]
    return run_lines(query_id, run_rows(answer), "preread")


def _tell_what_was_read(answers: Sequence[Any]) -> None:
    num_degraded = sum(answer.summary.degraded is not None for answer in answers)
    num_stopped = sum(answer.summary.stopped_early for answer in answers)
    if num_degraded:
        click.echo(f"{num_degraded:,} queries were read coarser than asked: the server was under pressure", err=True)
    if num_stopped:
        click.echo(f"{num_stopped:,} queries were stopped early by their deadline", err=True)


def _from_run(path: Path, queries: Mapping[str, str], depth: int) -> dict[str, Sequence[Any]]:
    from preread import Candidate
    from tuning.trec import read_run

    run = read_run(path).run
    missing = [query_id for query_id in run if query_id not in queries]
    if missing:
        click.echo(f"{path}: {len(missing)} queries have no text and are left out, the first is {missing[0]}", err=True)
    found: dict[str, Sequence[Any]] = {
        q: [Candidate(passage_id=p) for p, _ in ranking[:depth]] for q, ranking in run.items() if q in queries
    }
    if not found:
        raise CommandFailed(f"{path}: holds none of the {len(queries)} queries")
    return found
