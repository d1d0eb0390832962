"""`preread tune` as a person runs it: table, files, the chosen configuration, and what it says when there is none."""

from __future__ import annotations

import json
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from preread_cli.commands.evaluate import tune as command
from preread_cli.failures import CommandFailed
from preread_cli.main import cli

GRID = ("--stored-ratios", "1,2", "--codecs", "Flat SQ8", "--read-ratios", "1,2,8", "--cascades", "8:3,2")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


class Tune:
    def __init__(self, beir: Path, tiny: Path, work: Path, out: Path) -> None:
        self.beir, self.out = beir, out
        self._shared = ("--model", tiny, "--device", "cpu", "--dtype", "float32", "--work-dir", work, "--out", out)

    def __call__(self, *arguments: object, grid: tuple[str, ...] = GRID, folder: bool = True) -> Result:
        own = (self.beir, *arguments) if folder else arguments
        return CliRunner().invoke(command, [*map(str, (*own, *grid, "--timed-queries", "1", *self._shared))])


@pytest.fixture
def tune(beir: Path, tiny: Path, work: Path, tmp_path: Path) -> Tune:
    return Tune(beir, tiny, work, tmp_path / "out")


def test_it_shows_a_table_and_writes_its_files(tune: Tune) -> None:
    result = tune("--all", "--run-out", tune.out / "runs")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert sum(line.lstrip(" ▶●◆").startswith(("1  Flat", "2  Flat", "1  SQ8", "2  SQ8")) for line in lines) == 14
    assert "…" not in result.output
    assert "BM25" in result.output
    names = {path.name for path in tune.out.iterdir()}
    assert names == {
        "report.html", "tune.json", "runs", "quality-bytes.png", "quality-latency.png", "quality-ratio.png",
    }  # fmt: skip
    assert len(list((tune.out / "runs").iterdir())) == 14 + 3
    document = json.loads((tune.out / "tune.json").read_text())
    assert len(document["configurations"]) == 14
    assert document["choice"] is None
    measured = document["configurations"][0]["quality"]["measures"]["nDCG@10"]
    assert measured.keys() == {"mean", "low", "high", "change", "kept"}
    assert measured["change"].keys() == {"mean", "low", "high", "p_value", "significant"}


class Page(HTMLParser):
    """URLs a browser would fetch, and the texts it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.shown: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value and value[0] != "#"]
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


def test_the_page_needs_nothing_else(tune: Tune) -> None:
    assert tune("--max-loss", "100%").exit_code == 0
    text = (tune.out / "report.html").read_text()
    page = Page(text)
    assert page.fetched == []
    assert not any(word in text.split("</style>")[1] for word in ("@import", "url(http"))
    assert page.tags.count("svg") == 3
    assert page.tags.count("script") == 1
    assert len(page.ids) == len(set(page.ids))
    shown = " ".join(page.shown)
    for part in (
        "Chosen: stored at",
        "Wins and losses",
        "why are there tides in the sea",
        "Pareto front",
        "2 SQ8 read 8:3,2",
    ):
        assert part in shown


def test_texts_in_the_page_stay_texts(tune: Tune, beir: Path) -> None:
    queries = beir / "queries.jsonl"
    rows = [json.loads(line) for line in queries.read_text().splitlines()]
    for row in rows:
        row["text"] += " </script><script>alert(1)</script> & <b>"
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Queries are shown where a configuration wins or loses; the instruction always is.
    assert tune("--max-loss", "100%", "--instruction", "Find </script><script>alert(1)</script>").exit_code == 0
    page = Page((tune.out / "report.html").read_text())
    assert page.tags.count("script") == 1
    assert any("<script>alert(1)</script>" in one for one in page.shown)


@pytest.mark.parametrize(
    ("limits", "grid", "expected"),
    [
        (("--max-bytes", "3KiB"), GRID, {"index": {"codec": "SQ8", "compression-ratio": 2}}),
        (("--max-loss", "100%"), (*GRID[:4], "--read-ratios", "8", "--cascades", "none"), {"serve": {"read-ratio": 8}}),
        (
            ("--max-loss", "100%", "--split"),
            (
                "--stored-ratios",
                "2",
                "--codecs",
                "SQ8",
                "--read-ratios",
                "64",
                "--cascades",
                "8:3,2",
                "--prefer",
                "quality",
            ),
            {"index": {"compression-ratio": 2, "codec": "SQ8", "split": True}},
        ),
    ],
)
def test_what_is_chosen_configures_index_and_serve(
    tune: Tune, tiny: Path, limits: tuple[str, ...], grid: tuple[str, ...], expected: dict[str, dict[str, object]]
) -> None:
    result = tune(*limits, grid=grid)
    assert result.exit_code == 0, result.output
    text = (tune.out / "preread.toml").read_text()
    document = tomllib.loads(text)
    for table, values in expected.items():
        assert values.items() <= document[table].items()
    assert document["model"] == str(tiny)
    for name in ("index", "serve"):
        one = cli.get_command(click.Context(cli), name)
        assert one is not None
        needed = ["x.jsonl", "-c", "docs"] if name == "index" else []
        given = ["--config", str(tune.out / "preread.toml"), *needed]  # raises for what the command does not take
        found = one.make_context(name, given, parent=click.Context(cli, info_name="preread")).params
        assert str(tiny) in (found.get("model"), *found.get("models", ()))  # serve may have several
        flags = [f"--{key}={value}" if value is not True else f"--{key}" for key, value in document[name].items()]
        one.make_context(name, [*flags, *needed])
    choice = json.loads((tune.out / "tune.json").read_text())["choice"]
    assert choice["keeps_all_limits"]
    assert text.startswith(f"# {choice['name']}: chosen by preread tune")


def test_where_nothing_keeps_the_limits_the_nearest_is_named(tune: Tune) -> None:
    assert tune("--max-loss", "100%").exit_code == 0
    result = tune("--max-loss", "100%", "--max-bytes", "50")
    assert isinstance(result.exception, click.ClickException | SystemExit)
    failed = result.output + str(CommandFailed.of(result.exception, debug=False).format_message())
    assert "no configuration keeps the limits; the nearest is 2 SQ8 read " in failed
    assert "bytes a passage, expected at most 50" in failed
    assert not (tune.out / "preread.toml").exists()  # nor that of the run before
    assert "No configuration keeps the limits (" in (tune.out / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-loss", "1"], "'1'; expected a percentage, such as 1%"),
        (["--max-bytes", "8 stones"], "'8 stones'; expected a number of bytes, such as 8KiB or 8192"),
        (["--max-latency", "50"], "'50'; expected a time with its unit, such as 50ms or 0.5s"),
        (["--max-latency", "50ms", "--timed-queries", "0"], "--max-latency needs --timed-queries of at least 1."),
        (["--stored-ratios", "1;2"], "expected integers with commas between them"),
        (["--stored-ratios", "3"], "read ratio is 1; no stored ratio of 3 can give it"),
        (["--codecs", "Flat ZIP9"], "codec: 'ZIP9' is unknown, expected one of Flat, SQfp16"),
        (["--cascades", "2,8:1"], "stages"),
        (["--codecs", "PQ4x10", "--few-samples", "refuse"], "codec PQ4x10 at stored ratio 1: sample: "),
        (["--collection", "nowhere"], "collection: 'nowhere' does not exist"),
        (["--queries-split", "dev"], "no judged query of split 'dev'"),
    ],
)
def test_bad_input_ends_in_one_line(tune: Tune, tmp_path: Path, arguments: list[str], message: str) -> None:
    if "--collection" in arguments:
        arguments = [*arguments, "--store", f"faiss:{tmp_path / 'empty'}"]
    result = CliRunner().invoke(
        command, [str(tune.beir), *GRID, *map(str, tune._shared), "--timed-queries", "1", *arguments]
    )
    error = result.exception
    assert error is not None
    text = result.output if isinstance(error, SystemExit) else CommandFailed.of(error, debug=False).format_message()
    assert message in text
    assert (result.exit_code if isinstance(error, SystemExit) else CommandFailed.of(error, debug=False).exit_code) == 2


def test_queries_without_judgements_will_do(tune: Tune, beir: Path) -> None:
    (beir / "qrels.tsv").unlink()
    result = tune()
    assert result.exit_code == 0, result.output
    assert "judged by r = 1 itself" in result.output
    assert "5 queries" in result.output


def test_judgements_may_be_json_lines(tune: Tune, beir: Path) -> None:
    lines = (beir / "qrels.tsv").read_text().splitlines()[1:]
    rows = [dict(zip(("query_id", "passage_id", "score"), line.split("\t"), strict=True)) for line in lines]
    before = _qualities(tune)
    (beir / "qrels.tsv").unlink()
    (beir / "qrels.jsonl").write_text("".join(json.dumps(row | {"score": int(row["score"])}) + "\n" for row in rows))
    assert _qualities(tune) == before
    (beir / "qrels.jsonl").write_text('{"query_id": "q1", "score": 1}\n')
    error = tune().exception
    assert error is not None
    assert "qrels.jsonl:1: fields query_id, score; expected query-id, corpus-id and an integer score" in str(error)


def test_a_run_file_of_its_own_gives_the_same_again(tune: Tune) -> None:
    assert tune("--run-out", tune.out / "runs").exit_code == 0
    before = _qualities(tune)
    assert _qualities(tune, "--run", tune.out / "runs" / "first-stage.run") == before


def _qualities(tune: Tune, *arguments: object) -> list[object]:
    assert tune(*arguments).exit_code == 0
    return [one["quality"] for one in json.loads((tune.out / "tune.json").read_text())["configurations"]]


def test_a_cascade_is_served_as_stages(tune: Tune) -> None:
    grid = ("--stored-ratios", "2", "--codecs", "SQ8", "--read-ratios", "8", "--cascades", "8:3,2")
    assert tune("--max-loss", "100%", "--prefer", "latency", grid=grid).exit_code == 0
    report = json.loads((tune.out / "tune.json").read_text())
    cascade = next(one for one in report["configurations"] if one["name"] == "2 SQ8 read 8:3,2")
    assert cascade["stages"] == [{"compression_ratio": 8, "keep": 3}, {"compression_ratio": 2, "keep": 0}]


def test_odd_lines_are_said_and_left_out(tune: Tune) -> None:
    with (tune.beir / "corpus.jsonl").open("a") as file:
        file.write('{"_id": 1.5, "text": "x"}\n')
    with (tune.beir / "queries.jsonl").open("a") as file:
        file.write('{"_id": "q1", "text": "again"}\n')
    result = tune()
    assert result.exit_code == 0, result.output
    assert [line.split(": ")[1].rpartition("/")[2] for line in result.stderr.splitlines() if "refused" in line] == [
        "corpus.jsonl:8", "queries.jsonl:6",
    ]  # fmt: skip
    notes = json.loads((tune.out / "tune.json").read_text())["notes"]
    assert "2 lines of the judged files cannot be used: left out" in notes
