"""`preread rerank`: one query to a table, or a file of queries to a TREC run; a server does the work.

Queries, ids and candidates come from files or standard input ("-"); gzip and zstd are seen through, blank lines are
skipped, and a line that begins with `{` is a JSON object in files of candidates and queries. A line that cannot be read
stops the command: the message has file and line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preread.values import Candidate, Reranking, RerankOptions, Result, Summary, format_stages, id_text, join_title
from preread_cli.failures import BAD_ITEMS, CommandFailed
from preread_cli.options import (
    ADMIN_READ_SECONDS,
    client_options,
    client_settings,
    collection_option,
    json_option,
    option,
    options_of,
    store_option,
)
from preread_cli.terminal import counted_progress, print_json

if TYPE_CHECKING:
    from encoder_worker.sources import Place
    from preread import Client

Score = Callable[[str, Sequence[Candidate]], Reranking]

# Ranking a whole collection is for trying things out; beyond this a first stage chooses candidates.
MAX_WHOLE_COLLECTION = 5000
DEFAULT_TOP_N = 10
MAX_SHOWN = 5
MAX_TEXT_CHARACTERS = 400

query_options = options_of(
    option("--instruction", metavar="TEXT", help='Task instruction, instead of the model\'s own; "" for none.'),
    option(
        "--compression-ratio",
        type=click.IntRange(min=0),
        default=0,
        help="Score at this multiple of the stored ratio; 0: at the server's own default.",
    ),
    option("--model-name", metavar="NAME", default="", help="Which of the server's models; without it, the first."),
    option("--timeout-seconds", type=click.FloatRange(min=0, min_open=True), default=300.0, help="For one request."),
    json_option,
    store_option,
    client_options,
)


@click.command()
@click.argument("query", required=False)
@collection_option(help="The collection, or alias, that ids refer to.")
@option("--ids", metavar="FILE", help="Rank these passages: one id per line; - is standard input.")
@option("--candidates", metavar="FILE", help='Rank these texts: one per line, or JSON lines with "id", "text" or both.')
@option(
    "--queries", metavar="FILE", help='Rank for all of these: id<TAB>text per line, or JSON lines with "id" and "text".'
)
@option("--run", "run_file", metavar="FILE", help="With --queries: candidates of each query, a first stage's TREC run.")
@option("--depth", type=click.IntRange(min=1), default=100, help="With --run: how many candidates of each query.")
@option("--output", metavar="FILE", default="-", help="With --queries: where the TREC run goes; - is standard output.")
@option("--top-n", type=click.IntRange(min=0), help="Show this many; 0 is all.  [default: 10; with --queries all]")
@option(
    "--stages",
    metavar="RATIO:KEEP,...",
    default="",
    help="A cascade in place of one ratio: 32:100,4:20,1 scores every candidate at ratio 32, the best 100 at 4, the "
    "best 20 of those at 1.",
)
@option("--on-miss", type=click.Choice(["encode", "skip", "fail"]), help="For ids without states.  [default: server's]")
@option("--concurrency", type=click.IntRange(min=1), default=4, help="With --queries: requests in flight.")
@query_options
@click.pass_context
def rerank(ctx: click.Context, /, query: str | None, **given: Any) -> None:
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
    from preread import Client

    _check(query, given)
    options: RerankOptions = {
        "collection": given["collection"] or "",
        "instruction": given["instruction"],
        "compression_ratio": given["compression_ratio"],
        "stages": given["stages"],
        "on_miss": given["on_miss"],
        "model": given["model_name"],
        "top_n": (DEFAULT_TOP_N if query is not None else 0) if given["top_n"] is None else given["top_n"],
        "return_text": query is not None,
    }
    settings = client_settings(given, timeout_seconds=given["timeout_seconds"])
    with Client(given["address"], options=settings) as client:
        limits = {info.name: info.max_candidates for info in client.list_models()}
        # An unknown name is rejected by the server itself.
        max_candidates = limits.get(given["model_name"]) or next(iter(limits.values()))
        score = partial(rerank_in_parts, client, max_candidates=max_candidates, options=options)
        num_bad = _many_queries(score, given) if query is None else _one_query(score, query, given)
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


def _candidates(given: Mapping[str, Any]) -> Sequence[Candidate]:
    """The candidates of every query, where no run names them."""
    if given["candidates"] is not None:
        found = _read_candidates(given["candidates"])
    else:
        found = [Candidate(passage_id=passage_id) for passage_id in passage_ids(given, MAX_WHOLE_COLLECTION)]
    if not found:
        raise CommandFailed(f"{given['ids'] or given['candidates']}: nothing to rank")
    return found


def _one_query(score: Score, query: str, given: Mapping[str, Any]) -> int:
    candidates = _candidates(given)
    answer = score(query, candidates)
    if given["as_json"]:
        print_json({"query": query} | dataclasses.asdict(answer))
    else:
        _print_reranking(query, answer, len(candidates))
    return len(candidates) - answer.summary.num_scored


def _many_queries(score: Score, given: Mapping[str, Any]) -> int:
    from preread_edge.outputs import open_output
    from tuning.trec import check_ids, run_lines

    queries = _read_queries(given["queries"])
    if given["run_file"] is not None:
        candidates = _from_run(Path(given["run_file"]), queries, given["depth"])
        queries = {query_id: text for query_id, text in queries.items() if query_id in candidates}
    else:
        candidates = dict.fromkeys(queries, _candidates(given))
    if not given["as_json"]:  # now, not after hours
        check_ids(*queries)
        check_ids(*{one.passage_id for found in candidates.values() for one in found if one.passage_id})
    done: list[Reranking] = []
    with ExitStack() as stack:
        file = stack.enter_context(open_output(given["output"]))
        on_progress = stack.enter_context(counted_progress("reranking"))
        pool = ThreadPoolExecutor(given["concurrency"])  # so many requests in flight, so that the server can batch
        stack.callback(pool.shutdown, cancel_futures=True)
        answers = pool.map(score, queries.values(), [candidates[query_id] for query_id in queries])
        for (query_id, query), answer in zip(queries.items(), answers, strict=True):
            if given["as_json"]:
                row = {"query_id": query_id, "query": query} | dataclasses.asdict(answer)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                file.writelines(run_lines(query_id, run_rows(answer), "preread"))
            done.append(answer)
            on_progress(len(done), len(queries))
    return _say_done(done, sum(len(candidates[query_id]) for query_id in queries))


def _say_done(answers: Sequence[Reranking], num_candidates: int) -> int:
    """Says on standard error how a file of queries went; how many candidates were not scored."""
    summaries = [answer.summary for answer in answers]
    num_degraded = sum(summary.degraded is not None for summary in summaries)
    num_stopped = sum(summary.stopped_early for summary in summaries)
    if num_degraded:
        click.echo(
            f"{num_degraded:,} queries were scored coarser than requested: the server was under pressure", err=True
        )
    if num_stopped:
        click.echo(f"{num_stopped:,} queries were stopped early by their deadline", err=True)
    num_scored = sum(summary.num_scored for summary in summaries)
    num_bad = num_candidates - num_scored
    click.echo(f"{len(answers):,} queries, {num_scored:,} passages scored, {num_bad:,} not scored", err=True)
    for result in islice((r for answer in answers for r in answer if r.margin is None), MAX_SHOWN):
        click.echo(f"  {result.passage_id}: {result.status} {result.message}", err=True)
    return num_bad


def _from_run(path: Path, queries: Mapping[str, str], depth: int) -> dict[str, Sequence[Candidate]]:
    from tuning.trec import read_run

    run = read_run(path).run
    missing = [query_id for query_id in run if query_id not in queries]
    if missing:
        click.echo(f"{path}: {len(missing)} queries have no text and are left out, the first is {missing[0]}", err=True)
    found: dict[str, Sequence[Candidate]] = {
        q: [Candidate(passage_id=p) for p, _ in ranking[:depth]] for q, ranking in run.items() if q in queries
    }
    if not found:
        raise CommandFailed(f"{path}: holds none of the {len(queries)} queries")
    return found


# Through a server, whatever the number of candidates.


def rerank_in_parts(
    client: Client, query: str, candidates: Sequence[Candidate], max_candidates: int, options: RerankOptions
) -> Reranking:
    """Every candidate scored, best first, then those that could not be; cut to options' top_n.

    A request carries at most `max_candidates`; more are sent in several, and merged: a score does not depend on the
    other candidates. Of a cascade each request keeps as many as one would, so no less is scored than in one.
    """
    results: list[Result] = []
    parts = []
    for first in range(0, len(candidates), max_candidates):
        part = client.rerank(query, candidates[first : first + max_candidates], **options)
        results += [dataclasses.replace(result, index=result.index + first) for result in part]
        parts.append(part.summary)
    scored = [result for result in results if result.margin is not None]
    scored.sort(key=lambda r: (-len(r.stages), -(r.margin or 0.0), r.index))
    others = sorted((r for r in results if r.margin is None), key=lambda r: r.index)
    times = [dataclasses.astuple(part.timings) for part in parts]
    summary = dataclasses.replace(
        parts[0],
        timings=type(parts[0].timings)(*(sum(column) for column in zip(*times, strict=True))),
        num_scored=sum(part.num_scored for part in parts),
        stopped_early=any(part.stopped_early for part in parts),
        degraded=next((part.degraded for part in parts if part.degraded is not None), None),
    )
    return Reranking((*scored[: options.get("top_n") or None], *others), summary)


def run_rows(answer: Reranking) -> list[tuple[str, float]]:
    """The scored passages for a TREC run, whose readers sort by score alone and know each passage once.

    Margins of different stages do not compare: the last margins of a cascade's earlier stage are moved below all of
    those that came further, by so much that margins keep their order and their distances within a stage.
    """
    rows: dict[str, float] = {}
    moved, stages, lowest = 0.0, 0, 0.0
    for result in answer:
        if result.margin is None:
            continue
        if rows and len(result.stages) < stages:
            moved = min(0.0, lowest - 1.0 - result.margin)
        stages, lowest = len(result.stages), result.margin + moved
        rows.setdefault(result.passage_id or str(result.index), lowest)  # the better of two
    return list(rows.items())


def _print_reranking(query: str, answer: Reranking, num_candidates: int) -> None:
    """The ranking, then candidates that could not be scored, then where the time went."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    staged = any(result.stages for result in answer if result.margin is not None)
    for heading in ("#", "score", "margin", *(["ratio"] if staged else [])):
        table.add_column(heading, justify="right")
    table.add_column("passage")
    others = []
    for rank, result in enumerate(answer, 1):  # those that could not be scored come last
        if result.margin is None:
            others.append(f"not scored: {result.passage_id or result.index}  {result.status}  {result.message}")
            continue
        passage = Text(result.passage_id, style="bold")
        if result.text:
            line = " ".join(result.text[: 2 * MAX_TEXT_CHARACTERS].split())
            shown = line if len(line) <= MAX_TEXT_CHARACTERS else line[: MAX_TEXT_CHARACTERS - 1] + "…"
            passage.append(("  " if result.passage_id else "") + shown, style="not bold")
        ratio = [str(result.compression_ratio)] if staged else []
        table.add_row(str(rank), f"{result.score:.4f}", f"{result.margin:+.2f}", *ratio, passage)
    console.print(Text(query, style="bold"))
    console.print(table)
    for line in others:
        console.print(Text(line))
    console.print(Text(_summary_line(answer.summary, num_candidates), style="dim"))
    for line in _reading_notes(answer.summary):
        console.print(Text(line, style="yellow"))


def _summary_line(summary: Summary, num_candidates: int) -> str:
    times = summary.timings
    line = (
        f"{summary.num_scored} of {num_candidates} scored by {summary.model} "
        f"in {times.total_seconds * 1000:,.0f} ms (compute {times.compute_seconds * 1000:,.0f} ms)"
    )
    if summary.stages:
        line += f", scored in stages {format_stages(summary.stages)}"
    elif summary.compression_ratio:
        line += f", scored at ratio {summary.compression_ratio}"
    return line + (", the query was cut" if summary.query_truncated else "")


def _reading_notes(summary: Summary) -> Iterator[str]:
    """For a person who compares these scores with others."""
    if summary.degraded is not None:
        requested = format_stages(summary.degraded.stages) or str(summary.degraded.compression_ratio)
        yield f"scored coarser than {requested}: the server was under pressure ({summary.degraded.reason})"
    if summary.stopped_early:
        yield "the deadline came before the last stage was through: these are the finished scores"


# From files, and from the store.


def _read_candidates(source: str) -> list[Candidate]:
    """One text per line, or one object with `id` (or `_id`), `text`, or both; a `title` goes before the text."""
    candidates = []
    for where, line, row in _rows(source):
        if row is None:
            candidates.append(Candidate(text=line))
            continue
        passage_id, text, title = _text(where, row, "id", "_id"), _text(where, row, "text"), _text(where, row, "title")
        if passage_id is None and text is None:
            raise CommandFailed(f"{where}: neither id nor text; expected one or both")
        candidates.append(Candidate(passage_id, text if text is None else join_title(title, text)))
    return candidates


def _read_queries(source: str) -> dict[str, str]:
    """query id -> text: `id<TAB>text` per line, or one object with `id` (or `_id`) and `text`."""
    queries: dict[str, str] = {}
    for where, line, row in _rows(source):
        if row is not None:
            query_id, text = _text(where, row, "id", "_id"), _text(where, row, "text")
            if query_id is None or text is None:
                raise CommandFailed(f"{where}: fields {', '.join(row)}; expected id and text")
        else:
            query_id, tab, text = line.partition("\t")
            if not tab:
                raise CommandFailed(f"{where}: no tab; expected id<TAB>text, or a JSON object")
        if query_id in queries:
            raise CommandFailed(f"{where}: query id {query_id!r} a second time")
        queries[query_id] = text
    if not queries:
        raise CommandFailed(f"{source}: no queries")
    return queries


def _rows(source: str) -> Iterator[tuple[Place, str, dict[str, Any] | None]]:
    """(file:line, text, the JSON object that it is, if it begins like one) of every line that is not blank."""
    from tuning.trec import JudgedFile

    for where, line in JudgedFile(source).lines():
        try:
            yield where, line, json.loads(line) if line.startswith("{") else None
        except (ValueError, RecursionError) as exc:
            raise CommandFailed(f"{where}: begins with {{ and is not JSON ({exc})") from exc


def _text(where: Place, row: dict[str, Any], *names: str) -> str | None:
    """The first of the fields that is there; an integer is taken as its digits."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        return None
    value = id_text(row[name])
    if value is None:
        raise CommandFailed(f"{where}: {name} is {row[name]!r}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as exc:  # JSON can spell half a surrogate pair
        raise CommandFailed(f"{where}: {name} is not valid Unicode: {exc.reason}") from exc
    return value


def passage_ids(given: Mapping[str, Any], max_stored: int | None = None) -> list[str]:
    """Those of --ids, one a line; without it those of the whole --collection, sorted.

    Raises:
        CommandFailed: a collection of more than `max_stored`, or of none.
    """
    from cache.collection import Collection
    from cache.open import open_store
    from tuning.trec import JudgedFile

    if given["ids"] is not None:
        return [line.strip() for _, line in JudgedFile(given["ids"]).lines()]
    with closing(open_store(given["store"], read_budget_seconds=ADMIN_READ_SECONDS)) as store:
        collection = Collection.open(store, given["collection"])
        num_passages = collection.stats().num_passages
        if max_stored is not None and num_passages > max_stored:
            raise CommandFailed(
                f"collection {given['collection']!r} has {num_passages:,} passages; without --ids or --run at most "
                f"{max_stored:,} are ranked. Let a first stage choose candidates"
            )
        ids = sorted(passage_id for passage_id, _ in islice(store.scan(collection.name), max_stored))
    if not ids:
        raise CommandFailed(f"collection {given['collection']!r} is empty")
    return ids
