"""`preread rerank`: one query to a table, or a file of queries to a TREC run.

In files, or standard input ("-"), gzip and zstd are seen through, blank lines skipped; `{` begins a line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import preread
from preread.values import (
    Candidate,
    Reranking,
    RerankOptions,
    Result,
    Summary,
    format_stages,
    id_text,
    join_title,
    parse_stages,
    ranked,
)
from preread_cli import flags
from preread_cli.failures import BAD_ITEMS, UNAVAILABLE, CommandFailed, told
from preread_cli.flags import option
from preread_cli.models import model_option
from preread_cli.passages import MAX_SHOWN, passage_ids
from preread_cli.terminal import print_json, progress_bar
from preread_edge.outputs import is_stdout, open_output
from preread_edge.tables import NUMBER, TEXT, Cell, Column, Table, print_parts

if TYPE_CHECKING:
    from encoder_worker.sources import Place

Score = Callable[[Sequence[str], Sequence[Candidate]], list[Reranking]]

MAX_WHOLE_COLLECTION = 5000  # to try things out with; beyond this a first stage chooses candidates
DEFAULT_TOP_N = 10
MAX_TEXT_CHARACTERS = 400
QUERIES_PER_CALL = 32  # over the same candidates: a passage is computed once for them; more save hardly more


@click.command()
@click.argument("query", required=False)
@flags.collection(help="The collection, or alias, that ids refer to.")
@option("--ids", metavar="FILE", help="Rank these passages: one id per line; - is standard input.")
@option("--candidates", metavar="FILE", help='Rank these texts: one per line, or JSON lines with "id", "text" or both.')
@option("--queries", metavar="FILE", help='Rank for these: id<TAB>text per line, or JSON lines with "id" and "text".')
@option("--run", "run_file", metavar="FILE", help="With --queries: candidates of each query, a first stage's TREC run.")
@option("--depth", type=flags.COUNT, default=100, help="With --run: candidates to take per query.")
@option("--output", metavar="FILE", default="-", help="With --queries: where the TREC run goes; - is standard output.")
@option("--top-n", type=click.IntRange(min=0), help="Show this many; 0 is all.  [default: 10; with --queries all]")
@option(
    "--stages",
    metavar="RATIO:KEEP,...",
    default="",
    help="A cascade in place of one ratio: 32:100,8:20,4 scores all at 32, the best 100 at 8, their best 20 at 4. "
    "What the collection cannot give is scored at the next ratio that it can.",
)
@option("--on-miss", type=click.Choice(["encode", "skip", "fail"]), help="For ids without states.  [default: server's]")
@option(
    "--concurrency",
    type=flags.COUNT,
    default=4,
    help="With --queries: queries in flight; without --run 32 are one request.",
)
@option("--local", is_flag=True, help="Call no server: load --model in this process, over --store.")
@model_option
@flags.store
@flags.query
@click.pass_context
def rerank(ctx: click.Context, /, query: str | None, **given: Any) -> None:
    """Rank passages for a query, or for a file of queries.

    Without --ids, --candidates or --run the whole collection is ranked, up to 5,000 passages.
    A server must be running, `preread serve`, unless --local is given. With --queries, --json writes a line of JSON
    for each query to --output, in place of the TREC run.

    \b
    Examples:
      preread rerank "why is the sky blue" --collection docs
      preread rerank "why is the sky blue" --candidates passages.txt
      preread rerank "why is the sky blue" --candidates passages.txt --local
      search "why is the sky blue" | preread rerank "why is the sky blue" -c docs --ids -
      preread rerank --queries queries.tsv --run bm25.run -c docs --output reranked.run
    """
    _check(query, given)
    if not given["local"] and (named := {"model", "store"} & flags.typed(ctx)):
        raise click.UsageError(f"--{min(named)} goes with --local: a server has its own (--model-name names a model).")
    options: RerankOptions = {
        "collection": given["collection"] or "",
        "instruction": given["instruction"],
        "compression_ratio": given["compression_ratio"],
        "stages": given["stages"],
        "on_miss": given["on_miss"],
        "model": given["model_name"],
        "top_n": (DEFAULT_TOP_N if query is not None else 0) if given["top_n"] is None else given["top_n"],
        "return_text": query is not None,
        "timeout": given["timeout_seconds"],  # of each query
    }
    with _client(given, flags.LONG_RETRY_SECONDS if query is None else flags.SHORT_RETRY_SECONDS) as client:
        models = {info.name: info for info in client.list_models()}
        if not models:
            raise CommandFailed(f"the server at {given['address']} is still loading its models", UNAVAILABLE)
        # the server rejects unknown names
        model = models.get(given["model_name"]) or next(iter(models.values()))
        score = partial(_rerank_in_parts, client, max_candidates=model.max_candidates, options=options)
        if query is None:
            # A model that reads text shares nothing between queries.
            shares = given["run_file"] is None and model.encoder is not None
            num_bad = _many_queries(client, score, given, QUERIES_PER_CALL if shares else 1)
        else:
            candidates = _candidates(client, given)
            (answer,) = score([query], candidates)
            num_bad = len(candidates) - answer.summary.num_scored
            if given["as_json"]:
                print_json({"query": query} | dataclasses.asdict(answer))
            else:
                _print_reranking(query, answer, len(candidates), _fitted(given["stages"], answer.summary))
    if num_bad:
        ctx.exit(BAD_ITEMS)


@contextmanager
def _client(given: Mapping[str, Any], retry_seconds: float) -> Iterator[preread.Client]:
    """Of a server, or --local. Where no server answers, the error says that none is needed."""
    settings = flags.client_settings(given, retry_seconds)
    if given["local"]:
        from checkpoint.compute import tune_process
        from preread_local import Reranker

        tune_process()
        with Reranker(given["model"], store=given["store"], timeout_seconds=given["timeout_seconds"]) as reranker:
            yield reranker
        return
    try:
        with preread.Client(flags.addresses(given), options=settings) as client:
            yield client
    except preread.Unavailable as exc:
        if exc.reason not in ("UNREACHABLE", "NO_ANSWER"):
            raise
        raise CommandFailed(f"{told(exc)} --local needs no server", UNAVAILABLE) from exc


def _check(query: str | None, given: Mapping[str, Any]) -> None:
    files = {name: given[name] for name in ("queries", "ids", "candidates", "run_file") if given[name] is not None}
    has_passages = given["collection"] is not None or "candidates" in files
    wrong = {
        "Give a QUERY, or a file of them with --queries.": (query is None) == ("queries" not in files),
        "--ids, --candidates and --run exclude one another.": len(files.keys() - {"queries"}) > 1,
        "- is standard input, which can be read once: name a file for all but one.": [*files.values()].count("-") > 1,
        "--run goes with --queries.": "run_file" in files and query is not None,
        "Name the --collection that holds the passages, or give texts with --candidates.": not has_passages,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise click.UsageError(message)


def _many_queries(client: preread.Client, score: Score, given: Mapping[str, Any], per_call: int) -> int:
    """A line or a TREC run for each query, and on standard error how it went; how many candidates were not scored.

    Each call has `per_call` queries, which then have the same candidates.
    """
    from tuning.trec import check_ids, run_lines

    queries = _read_queries(given["queries"])
    if given["run_file"] is not None:
        candidates = _from_run(Path(given["run_file"]), queries, given["depth"])
        queries = {query_id: text for query_id, text in queries.items() if query_id in candidates}
    else:
        candidates = dict.fromkeys(queries, _candidates(client, given))
    if not given["as_json"]:  # now, not after hours
        check_ids(*queries)
        check_ids(*{one.passage_id for found in candidates.values() for one in found if one.passage_id})
    done: list[Reranking] = []
    with ExitStack() as stack:
        file = stack.enter_context(open_output(given["output"]))
        mixed = is_stdout(given["output"]) and sys.stdout.isatty()  # a bar would run into the rows
        on_progress = None if mixed else stack.enter_context(progress_bar("reranking", "queries"))
        # So many requests in flight, so that the server can batch; one of many queries fills its batches alone.
        pool = ThreadPoolExecutor(max(1, given["concurrency"] // per_call))
        stack.callback(pool.shutdown, cancel_futures=True)
        ids = list(queries)
        calls = [ids[first : first + per_call] for first in range(0, len(ids), per_call)]
        texts = ([queries[query_id] for query_id in call] for call in calls)
        answers = chain.from_iterable(pool.map(score, texts, [candidates[call[0]] for call in calls]))
        for (query_id, query), answer in zip(queries.items(), answers, strict=True):
            if given["as_json"]:
                row = {"query_id": query_id, "query": query} | dataclasses.asdict(answer)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                file.writelines(run_lines(query_id, run_rows(answer), "preread"))
            done.append(answer)
            if on_progress is not None:
                on_progress(len(done), len(queries))
    summaries = [answer.summary for answer in done]
    if note := next(filter(None, (_fitted(given["stages"], summary) for summary in summaries)), ""):
        print_parts(note, err=True)
    if num_degraded := sum(summary.degraded is not None for summary in summaries):
        print_parts(f"{num_degraded:,} queries were scored coarser: the server was under pressure", err=True)
    if num_stopped := sum(summary.stopped_early for summary in summaries):
        print_parts(f"{num_stopped:,} queries were stopped early by their deadline", err=True)
    num_scored = sum(summary.num_scored for summary in summaries)
    num_bad = sum(len(candidates[query_id]) for query_id in queries) - num_scored
    print_parts(f"{len(done):,} queries, {num_scored:,} passages scored, {num_bad:,} not scored", err=True)
    for result in islice((r for answer in done for r in answer if r.margin is None), MAX_SHOWN):
        print_parts(f"  {result.passage_id}: {result.status} {result.message}", err=True)
    return num_bad


def _from_run(path: Path, queries: Mapping[str, str], depth: int) -> dict[str, Sequence[Candidate]]:
    from tuning.trec import read_run

    run = read_run(path).run
    missing = [query_id for query_id in run if query_id not in queries]
    if missing:
        told = f"{len(missing):,} queries have no text and are left out, the first is {missing[0]}"
        print_parts(f"{path}: {told}", err=True)
    if len(missing) == len(run):
        raise CommandFailed(f"{path}: holds none of the {len(queries)} queries")
    known = {query_id: ranking[:depth] for query_id, ranking in run.items() if query_id in queries}
    return {query_id: [Candidate(passage_id=p) for p, _ in ranking] for query_id, ranking in known.items()}


def _rerank_in_parts(
    client: preread.Client,
    queries: Sequence[str],
    candidates: Sequence[Candidate],
    max_candidates: int,
    options: RerankOptions,
) -> list[Reranking]:
    """For each query every candidate scored, best first, then those that could not be; cut to options' top_n.

    A request carries at most `max_candidates`; more are sent in several, and merged: a score does not depend on the
    other candidates. Of a cascade each request keeps as many as one would, so no less is scored than in one.
    """
    firsts = range(0, len(candidates), max_candidates)
    parts = [_rerank(client, queries, candidates[first : first + max_candidates], options) for first in firsts]
    return [_merged(own, firsts, options.get("top_n") or 0) for own in zip(*parts, strict=True)]


def _rerank(
    client: preread.Client, queries: Sequence[str], candidates: Sequence[Candidate], options: RerankOptions
) -> list[Reranking]:
    """One request, or, where a full queue has no room for that of many queries, smaller ones."""
    if len(queries) == 1:
        return [client.rerank(queries[0], candidates, **options)]
    try:
        seconds = (options["timeout"] or 0.0) * len(queries)
        return client.rerank_many(queries, candidates, **(options | {"timeout": seconds}))
    except preread.Overloaded:
        middle = len(queries) // 2
        halves = queries[:middle], queries[middle:]
        return [answer for half in halves for answer in _rerank(client, half, candidates, options)]


def _merged(answers: Sequence[Reranking], firsts: Iterable[int], top_n: int) -> Reranking:
    """The responses to requests whose candidates begin at `firsts`, as one."""
    results: list[Result] = []
    for first, answer in zip(firsts, answers, strict=True):
        results += [dataclasses.replace(result, index=result.index + first) for result in answer]
    parts, ids = [answer.summary for answer in answers], [answer.request_id for answer in answers]
    times = [dataclasses.astuple(part.timings) for part in parts]
    summary = dataclasses.replace(
        parts[0],
        timings=type(parts[0].timings)(*map(sum, zip(*times, strict=True))),
        num_scored=sum(part.num_scored for part in parts),
        stopped_early=any(part.stopped_early for part in parts),
        degraded=next((part.degraded for part in parts if part.degraded is not None), None),
    )
    return Reranking(tuple(ranked(results, top_n)), summary, ",".join(ids))


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


def _fitted(stages: str, summary: Summary) -> str:
    """Which stages the server planned in place of those that were given, and why; "": the same, or none were given."""
    planned, given = (summary.degraded or summary).stages, parse_stages(stages) if stages else ()
    if not given or not planned or planned == given:
        return ""
    lacking = {one.compression_ratio for one in given} - {one.compression_ratio for one in planned}
    why = f"no multiple of the stored ratio: {', '.join(map(str, sorted(lacking, reverse=True)))}"
    return f"stages {format_stages(planned)} in place of {format_stages(given)}; {why}"


def _print_reranking(query: str, answer: Reranking, num_candidates: int, note: str) -> None:
    """The ranking, then candidates that could not be scored, then where the time went, and a note."""
    staged = any(result.stages for result in answer if result.margin is not None)
    headings = ("#", "score", "margin", *(["ratio"] if staged else []))
    table = Table([*(Column(heading, NUMBER) for heading in headings), Column("passage", TEXT)], num_keys=len(headings))
    others: list[Cell] = []
    for rank, result in enumerate(answer, 1):  # those that could not be scored come last
        if result.margin is None:
            others.append(f"not scored: {result.passage_id or result.index}  {result.status}  {result.message}")
            continue
        line = " ".join((result.text or "")[: 2 * MAX_TEXT_CHARACTERS].split())
        shown = line if len(line) <= MAX_TEXT_CHARACTERS else line[: MAX_TEXT_CHARACTERS - 1] + "…"
        passage = "  ".join(filter(None, (result.passage_id, shown)))
        ratio = [str(result.compression_ratio)] if staged else []
        table.add(str(rank), f"{result.score:.4f}", f"{result.margin:+.2f}", *ratio, passage)
    summary, times = answer.summary, answer.summary.timings
    how = f"in {times.total_seconds * 1000:,.0f} ms (compute {times.compute_seconds * 1000:,.0f} ms)"
    if summary.stages:
        how += f", scored in stages {format_stages(summary.stages)}"
    elif summary.compression_ratio:
        how += f", scored at ratio {summary.compression_ratio}"
    cut = ", the query was cut" if summary.query_truncated else ""
    told: list[Cell] = [(f"{summary.num_scored} of {num_candidates} scored by {summary.model} {how}{cut}", "dim")]
    told += [(note, "yellow")] if note else []
    if summary.degraded is not None:
        requested = format_stages(summary.degraded.stages) or str(summary.degraded.compression_ratio)
        pressure = f"the server was under pressure ({summary.degraded.reason})"
        told.append((f"scored coarser than {requested}: {pressure}", "yellow"))
    if summary.stopped_early:
        late = "the deadline came before the last stage was through: these are the finished scores"
        told.append((late, "yellow"))
    print_parts((query, "bold"), table, *others, *told)


def _candidates(client: preread.Client, given: Mapping[str, Any]) -> Sequence[Candidate]:
    """The candidates of every query, where no run names them: ids, those of the whole collection, or texts.

    A text is a line, or an object with `id` (or `_id`), `text`, or both; a `title` goes before the text.
    """
    candidates = []
    if given["candidates"] is None:
        candidates = [Candidate(passage_id=one) for one in passage_ids(client, given, MAX_WHOLE_COLLECTION)]
    for where, line, row in _rows(given["candidates"]) if given["candidates"] is not None else ():
        if row is None:
            candidates.append(Candidate(text=line))
            continue
        passage_id, text, title = _text(where, row, "id", "_id"), _text(where, row, "text"), _text(where, row, "title")
        if passage_id is None and text is None:
            raise CommandFailed(f"{where}: neither id nor text; expected one or both")
        candidates.append(Candidate(passage_id, text if text is None else join_title(title, text)))
    if not candidates:
        raise CommandFailed(f"{given['ids'] or given['candidates']}: nothing to rank")
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
