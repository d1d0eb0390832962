"""MTEB: a cross-encoder for mteb.evaluate, and the command that fills a table of a benchmark.

python -m preread.integrations.mteb BEIR --first-stage mteb/baseline-bm25s --top-k 100
python -m preread.integrations.mteb MIRACLReranking --collection "miracl-{subset}"
python -m preread.integrations.mteb my-beir-folder --first-stage mteb/baseline-bm25s
"""

import argparse
import gzip
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

from preread.channel import LOCAL_ADDRESS, ClientOptions
from preread.integrations import needs_extra
from preread.integrations.ranker import Ranker, Settings, Target, sortable_scores
from preread.values import Candidate, RerankOptions

with needs_extra("mteb"):
    import mteb
    import numpy as np
    from datasets import Dataset
    from mteb.abstasks import AbsTask, AbsTaskRetrieval
    from mteb.abstasks.aggregated_task import AbsTaskAggregate
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.model_meta import ModelMeta
    from tqdm import tqdm  # type: ignore[import-untyped]


class PrereadCrossEncoder:
    """Scores the pairs of MTEB's reranking: one request for each query, several in flight.

    By the task's ids where `collection` is set: its name, in which {task}, {subset} and {split} are replaced. The
    scores are margins, the logits of the probabilities. Raises PrereadError.
    """

    def __init__(
        self, client: Target = LOCAL_ADDRESS, *, task_instructions: bool = False, **settings: Unpack[Settings]
    ) -> None:
        """With `task_instructions` the instruction is the query's, else the task's prompt for queries.

        Without them it is the setting's, else the model's, and a query's instruction is part of its text, as MTEB
        gives it to models.
        """
        self._task_instructions, self._ranker = task_instructions, Ranker(client, **settings)
        served = self._served_model()
        known = {**self._ranker.options, "task_instructions": task_instructions}
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": f"preread/{served[0]}",
                "revision": served[1],
                "experiment_kwargs": {name: str(value) for name, value in known.items() if name != "timeout"},
            }
        )

    def _served_model(self) -> tuple[str, str]:
        """Name and revision, the encoder's fingerprint, for the folder of results."""
        wanted, client = self._ranker.options.get("model", ""), self._ranker.connect()
        models = client.list_models() if hasattr(client, "list_models") else ()
        found = next((one for one in models if one.name == wanted or not wanted), None)
        name = found.name if found else wanted or "model"
        return name.replace("/", "__"), found.encoder.fingerprint if found and found.encoder else "none"

    def predict(
        self, inputs1: Any, inputs2: Any, *, task_metadata: TaskMetadata, hf_split: str, hf_subset: str, **kwargs: Any
    ) -> "np.ndarray[Any, Any]":
        """Scores of pairs of the loaders' rows, in their order: float64 (num_pairs,)."""
        common: RerankOptions = {}
        if collection := self._ranker.options.get("collection"):
            names = {"{task}": task_metadata.name, "{subset}": hf_subset, "{split}": hf_split}
            for name, value in names.items():
                collection = collection.replace(name, value)
            common["collection"] = collection
        groups: dict[tuple[str, str | None], list[int]] = {}  # (query, instruction) -> its pairs
        candidates: list[Candidate] = []
        for i, (query, document) in enumerate(zip(_rows(inputs1), _rows(inputs2), strict=True)):
            groups.setdefault(self._query(query, task_metadata), []).append(i)
            candidates.append(self._ranker.candidate(f"pair {i}", document["text"], document, document.get("id")))
        requests = [
            (query, [candidates[i] for i in pairs], RerankOptions(**common, instruction=instruction))
            for (query, instruction), pairs in groups.items()
        ]
        scores = np.zeros(len(candidates))
        hidden = not kwargs.get("show_progress_bar", True)
        rankings = tqdm(self._ranker.rank_many(requests), "Queries", len(requests), disable=hidden)
        for pairs, results in zip(groups.values(), rankings, strict=True):
            scores[[pairs[one.index] for one in results]] = sortable_scores(results)
        return scores

    def _query(self, row: dict[str, Any], task: TaskMetadata) -> tuple[str, str | None]:
        if not self._task_instructions:
            return row["text"], None
        prompt = task.prompt.get("query") if isinstance(task.prompt, dict) else task.prompt
        return row.get("query", row["text"]), row.get("instruction") or prompt


def _rows(loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for batch in loader:
        names = [name for name in ("id", "text", "query", "instruction") if name in batch]
        yield from (
            dict(zip(names, values, strict=True)) for values in zip(*(batch[one] for one in names), strict=True)
        )


class FolderTask(AbsTaskRetrieval):
    """A folder in BEIR's format: corpus.jsonl and queries.jsonl, plain or .gz, and qrels.tsv or qrels/test.tsv."""

    _folder: Path
    data_loaded: bool = False

    @classmethod
    def of(cls, folder: Path) -> "FolderTask":
        """A task of a class for this folder: MTEB looks for metadata in the class."""
        name = folder.resolve().name
        metadata = TaskMetadata(
            name=name, description=f"Files of {name}", type="Retrieval", main_score="ndcg_at_10",
            dataset={"path": str(folder), "revision": "local"}, eval_langs=["eng-Latn"],
        )  # fmt: skip
        made: FolderTask = type(name, (cls,), {"metadata": metadata, "_folder": folder})()
        made._qrels()
        return made

    def _qrels(self) -> Path:
        choices = self._folder / "qrels.tsv", self._folder / "qrels" / "test.tsv"
        if (found := next((one for one in choices if one.exists()), None)) is None:
            raise ValueError(f"the folder {self._folder} has no judgements; expected qrels.tsv or qrels/test.tsv")
        return found

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        if self.data_loaded:
            return
        judged: dict[str, dict[str, int]] = {}
        for line in self._qrels().read_text(encoding="utf-8").splitlines()[1:]:  # after the names of columns
            query_id, document_id, grade = line.split("\t")
            judged.setdefault(query_id, {})[document_id] = int(grade)
        queries = [row for row in self._read("queries") if row["id"] in judged]
        split = {"corpus": Dataset.from_list(self._read("corpus")), "queries": Dataset.from_list(queries)}
        self.dataset = cast(Any, {"default": {"test": {**split, "relevant_docs": judged, "top_ranked": None}}})
        self.data_loaded = True

    def _read(self, name: str) -> list[dict[str, str]]:
        path = self._folder / f"{name}.jsonl"
        zipped = path.with_suffix(".jsonl.gz")
        with gzip.open(zipped, "rt", encoding="utf-8") if zipped.exists() else path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return [{"id": str(row["_id"]), "title": row.get("title") or "", "text": row["text"]} for row in rows]


def find_tasks(name: str) -> Sequence[AbsTask]:
    """Of a folder in BEIR's format, a benchmark of MTEB or one of its tasks. Raises KeyError, ValueError."""
    if Path(name).is_dir():
        return [FolderTask.of(Path(name))]
    if name in {one.name for one in mteb.get_benchmarks()}:
        return list(mteb.get_benchmark(name).tasks)
    return [mteb.get_task(name)]


def parts_of(task: AbsTask) -> Sequence[AbsTask]:
    """The task, or those whose mean it is."""
    return list(task.metadata.tasks) if isinstance(task, AbsTaskAggregate) else [task]


def needs_first_stage(task: AbsTask) -> bool:
    """Whether a task, or a part of one, comes without candidates; those of the type Reranking have them."""
    return any(isinstance(one, AbsTaskRetrieval) and "Reranking" not in one.metadata.type for one in parts_of(task))


def rerank_first_stage(tasks: Sequence[AbsTask], first_stage: str, top_k: int, folder: Path) -> None:
    """Makes each retrieval task rerank the first `top_k` of a first stage: a model of MTEB, or predictions it saved.

    A model's predictions are written into `folder`.
    """
    searches = [one for task in tasks for one in parts_of(task) if needs_first_stage(one)]
    has_predictions = Path(first_stage).is_dir()
    if not has_predictions and searches:
        mteb.evaluate(mteb.get_model(first_stage), searches, prediction_folder=folder, cache=None)
    for one in searches:
        cast(AbsTaskRetrieval, one).convert_to_reranking(first_stage if has_predictions else folder, top_k=top_k)


def evaluate(
    model: PrereadCrossEncoder, task: AbsTask, first_stage: str | None, top_k: int, output: Path | None
) -> float:
    """The main score of a task, whose data are in memory only so long. Results are saved in `output`."""
    cache = mteb.ResultCache(output) if output else None
    with tempfile.TemporaryDirectory() as folder:
        if first_stage and needs_first_stage(task):
            rerank_first_stage([task], first_stage, top_k, Path(folder))
            known = (model.mteb_model_meta.experiment_kwargs or {}) | {"first_stage": first_stage, "top_k": str(top_k)}
            meta = model.mteb_model_meta.model_copy(update={"experiment_kwargs": known})
            model.mteb_model_meta = meta  # results of another first stage are saved in another folder
        (result,) = mteb.evaluate(model, task, cache=cache).task_results
    for one in parts_of(task):
        if one.data_loaded:
            one.unload_data()
    return float(result.get_score())


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluates; writes a line for each task, when it is done, and the mean to standard output."""
    parser = argument_parser()
    given = parser.parse_args(arguments)
    try:
        tasks = [task for name in given.names for task in find_tasks(name)]
    except (KeyError, ValueError) as exc:
        parser.error(str(exc.args[0]))
    if not given.first_stage and (wanting := [one.metadata.name for one in tasks if needs_first_stage(one)]):
        parser.error(
            f"{', '.join(wanting)}: retrieval without candidates; expected --first-stage, whose best are ranked"
        )
    settings = {name: value for name, value in vars(given).items() if name in Settings.__optional_keys__}
    settings |= {"client_options": ClientOptions(api_key=os.environ.get("PREREAD_API_KEY"))}
    model = PrereadCrossEncoder(given.address, task_instructions=given.task_instructions, **cast(Settings, settings))
    scores = []
    for task in tasks:
        scores.append(evaluate(model, task, given.first_stage, given.top_k, given.output))
        sys.stdout.write(f"{task.metadata.name}\t{task.metadata.main_score}\t{scores[-1]:.4f}\n")
        sys.stdout.flush()
    sys.stdout.write(f"mean of {len(scores)}\t\t{sum(scores) / len(scores):.4f}\n")


def argument_parser() -> argparse.ArgumentParser:
    """Of the command; options that are settings of components have their names."""
    parser = argparse.ArgumentParser(prog="python -m preread.integrations.mteb", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="benchmark or task of MTEB, or folder in BEIR's format")
    add("--first-stage", metavar="MODEL|FOLDER", help="model of mteb, or a folder of its predictions")
    add("--top-k", type=int, default=100, help="candidates of a query from the first stage [100]")
    add("--address", default=LOCAL_ADDRESS, help=f"of the server [{LOCAL_ADDRESS}]; its key: PREREAD_API_KEY")
    add("--output", type=Path, metavar="FOLDER", help="for results, which a second run continues")
    add("--task-instructions", action="store_true", help="the tasks' prompts in place of --instruction")
    for name in ("--collection", "--instruction", "--stages", "--model"):
        add(name)
    add("--compression-ratio", type=int)
    return parser


if __name__ == "__main__":
    main()
