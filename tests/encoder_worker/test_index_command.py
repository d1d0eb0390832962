"""`preread index` as a process: killed and resumed, told to stop, fed hostile input."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from cache.collection import Collection
from cache.open import open_store
from cache.states import text_digest
from encoder_worker.passage_encoder import PassageEncoder

RunIndex = Callable[..., tuple[int, str, str]]


def stats(tmp_path: Path, collection: str = "docs") -> int:
    store = open_store(f"faiss:{tmp_path / 'store'}")
    try:
        return store.stats(collection).num_passages
    finally:
        store.close()


def wait_for_passages(tmp_path: Path, process: subprocess.Popen[bytes]) -> int:
    """Returns when the store has acknowledged something."""
    deadline = time.monotonic() + 60
    while (num_passages := stats(tmp_path)) == 0:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return num_passages


def feed(process: subprocess.Popen[bytes], texts: list[str]) -> None:
    """Lines on standard input, which is left open: the run cannot end."""
    assert process.stdin is not None
    rows = (json.dumps({"id": f"p{i}", "text": text}) + "\n" for i, text in enumerate(texts))
    process.stdin.write("".join(rows).encode())
    process.stdin.flush()


def test_killed_and_resumed(
    tmp_path: Path,
    preread: Callable[..., subprocess.Popen[bytes]],
    run_index: RunIndex,
    encoder: PassageEncoder,
    real_texts: list[str],
    jsonl: Callable[[list[str]], Path],
) -> None:
    """SIGKILL in the middle: what was acknowledged is there, whole, and only the rest is encoded."""
    texts = [f"{i} {text}"[:160] for i, text in enumerate((real_texts * 2)[:5200])]
    path = jsonl(texts)
    process = preread("index", path, "-c", "docs")
    wait_for_passages(tmp_path, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = stats(tmp_path)
    assert 0 < kept < len(texts)

    short = jsonl(texts[:4500])
    code, out, _ = run_index(short, "-c", "docs", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["num_unchanged"] > 0
    assert report["num_stored"] == 4500 - report["num_unchanged"]
    store = open_store(f"faiss:{tmp_path / 'store'}")
    collection = Collection.open(store, "docs", fingerprint=encoder.identity.fingerprint)
    assert collection.digests([f"p{i}" for i in range(4500)]) == [text_digest(text) for text in texts[:4500]]
    assert not any(damage for *_, damage in collection.verify())
    store.close()


def test_told_to_stop_it_stores_what_it_encoded(
    tmp_path: Path, preread: Callable[..., subprocess.Popen[bytes]], real_texts: list[str]
) -> None:
    process = preread("index", "-", "--format", "jsonl", "-c", "docs", stdin=subprocess.PIPE)
    feed(process, [f"{i} {text}"[:200] for i, text in enumerate((real_texts * 2)[:5000])])
    wait_for_passages(tmp_path, process)  # a first window of 4,096 was read; the next one never fills
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"interrupted" in err
    stored = int(out.decode().split(" stored")[0].split()[-1].replace(",", ""))
    assert stats(tmp_path) == stored > 0


@pytest.mark.parametrize("damage", ["overwritten", "removed"])
def test_a_store_that_goes_away_ends_the_run_with_its_counts(
    tmp_path: Path, preread: Callable[..., subprocess.Popen[bytes]], real_texts: list[str], damage: str
) -> None:
    report_file = tmp_path / "report.json"
    arguments = ("-", "--format", "jsonl", "-c", "docs", "--report", report_file)
    process = preread("index", *arguments, stdin=subprocess.PIPE)
    texts = [f"{i} {text}"[:200] for i, text in enumerate((real_texts * 2)[:4500])]
    feed(process, texts)
    wait_for_passages(tmp_path, process)
    if damage == "removed":
        shutil.rmtree(tmp_path / "store")
    for file in (tmp_path / "store").glob("catalogue.sqlite*"):
        file.write_bytes(b"overwritten" * 1000)
    out, err = process.communicate(timeout=60)
    assert (tmp_path / "store" / "catalogue.sqlite").exists() == (damage != "removed")
    assert process.returncode == 3, err
    written = json.loads(report_file.read_text())
    assert 0 < written["num_stored"] < written["num_read"]
    assert f"{written['num_read']:,} read, {written['num_stored']:,} stored".encode() in out
    assert b"run again to go on from here\npreread: error: " in err
    assert err.decode().splitlines()[-1] == f"preread: error: {written['stopped_by']}"


def test_a_second_run_of_a_collection_is_refused_by_name_or_waits(
    tmp_path: Path, preread: Callable[..., subprocess.Popen[bytes]], run_index: RunIndex, jsonl: Callable[..., Path]
) -> None:
    path = jsonl(["text 0", "text 1"])
    with closing(open_store(f"faiss:{tmp_path / 'store'}")) as store:
        with store.lease("docs"):
            code, out, err = run_index(path, "-c", "docs")
            assert (code, out) == (3, "")
            assert f"collection 'docs' is being written by process {os.getpid()} on " in err
            assert run_index(path, "-c", "others")[0] == 0
            waiting = preread("index", path, "-c", "docs", "--wait", stderr=subprocess.PIPE)
            assert waiting.stderr is not None
            while b"waiting: collection 'docs' is being written" not in (line := waiting.stderr.readline()):
                assert line, waiting.poll()
        out, err = waiting.communicate(timeout=60)
        assert waiting.returncode == 0, err
        assert b"2 stored" in out
        with store.lease("docs", shared=True):  # an upload
            assert run_index(path, "-c", "docs")[0] == 3
    assert run_index(path, "-c", "docs")[0] == 0


def test_stored_passages_that_the_input_lacks_are_counted(
    tmp_path: Path, run_index: RunIndex, jsonl: Callable[[list[str]], Path]
) -> None:
    run_index(jsonl([f"text {i}" for i in range(5)]), "-c", "docs")
    path = jsonl(["text 0", "another text", "a new text"])
    with path.open("a") as more:
        more.write('{"id": "p1", "text": "again"}\n')
    report_file = tmp_path / "report.json"
    code, out, err = run_index(path, "-c", "docs", "--report", report_file)
    assert code == 1, err
    assert "\n2 stored passages are not in this input, or were refused in it; they stay" in out
    assert json.loads(report_file.read_text())["num_not_in_input"] == 2
    code, out, err = run_index(path, "-c", "docs", "--strict", "--json")
    assert json.loads(out)["num_not_in_input"] is None  # not read to its end
    code, out, err = run_index(jsonl(["text 0"]), "-c", "docs")
    assert "4 stored passages are not in this input; they stay\n--not-in-input FILE lists" in out


def test_ids_that_the_input_lacks_are_listed_for_their_removal(
    tmp_path: Path, run_index: RunIndex, jsonl: Callable[[list[str]], Path]
) -> None:
    """Those of refused lines are in the input, and an id that no line can hold is told, not written as another one."""
    run_index(jsonl([f"text {i}" for i in range(5)]), "-c", "docs")
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"id": "p1\\np2", "text": "two lines"}\n')
    run_index(odd, "-c", "docs")
    path, gone = jsonl(["text 0", "text 1"]), tmp_path / "gone.txt"
    with path.open("a") as more:
        more.write('{"id": "p2", "text": " "}\n')
    code, out, err = run_index(path, "-c", "docs", "--strict", "--not-in-input", gone)
    assert not gone.exists()
    assert f"{gone}: not written, because the input was not read to its end" in err
    for dry in (["--dry-run"], []):
        code, out, err = run_index(path, "-c", "docs", "--not-in-input", gone, *dry)
        assert code == 1, err
        assert gone.read_text() == "p3\np4\n"
        assert "left out, no line of a file can hold it: 'p1\\np2'" in err
    assert f"`preread collection remove docs --ids {gone}` removes them" in out
    code, out, err = run_index(path, "-c", "docs", "--not-in-input", "-")
    assert out == "p3\np4\n"
    assert run_index(path, "-c", "docs", "--not-in-input", "-", "--json")[0] == 2
    assert run_index(path, "-c", "new", "--dry-run", "--not-in-input", "-")[1] == ""


def test_columns_are_told_and_kept(tmp_path: Path, run_index: RunIndex) -> None:
    path = tmp_path / "p.csv"
    path.write_text("docid;Content\n1;some text\n")
    code, out, err = run_index(path, "-c", "docs")
    assert code == 2
    assert "looks like a header" in err
    assert "--id-field and --text-field" in err
    code, out, err = run_index(path, "-c", "docs", "--id-field", "docid", "--text-field", "content", "--json")
    assert code == 0, err
    assert f"{path}: semicolons separate; columns docid, Content\n" in err
    assert json.loads(out)["columns"] == [
        {"source": str(path), "id": "docid", "text": "Content", "title": None, "separator": ";"}
    ]
    code, out, err = run_index(path, "-c", "other", "--no-header")
    assert (code, "2 read, 2 stored" in out) == (0, True)
    code, out, err = run_index("-", "-c", "docs")
    assert code == 2
    assert "give --format, one of jsonl, tsv, csv, parquet, text." in err


def test_every_bad_line_is_in_the_report(
    tmp_path: Path, run_index: RunIndex, jsonl: Callable[[list[str]], Path]
) -> None:
    path = jsonl(["first", "second"])
    with path.open("ab") as more:
        more.write(b'{"id": "p0", "text": "again"}\n{"id": "x", "text": ""}\nnot json\n\xff\n')
        more.write(b'{"id": "big", "text": "' + b"z" * 3000 + b'"}\n')
    report_file = tmp_path / "report.json"
    code, out, err = run_index(path, "-c", "docs", "--max-line-bytes", 2000, "--report", report_file)
    assert code == 1, err
    assert "7 read, 2 stored, 0 unchanged, 5 refused" in out
    written = json.loads(report_file.read_text())
    assert [(entry["line"], entry["reason"]) for entry in written["refused"]] == [
        (3, "duplicate_id"), (4, "empty_text"), (5, "broken_json"), (6, "invalid_utf8"), (7, "line_too_long"),
    ]  # fmt: skip
    for line in range(3, 8):
        assert f"refused: {path}:{line}" in out
    code, out, err = run_index(path, "-c", "again", "--max-line-bytes", 2000, "--report", "-")
    assert json.loads(out)["refused"] == written["refused"]
    code, out, err = run_index(path, "-c", "docs", "--strict")
    assert code == 2
    assert f"stopped at {path}:3" in err


def test_standard_input_cut_passages_and_an_alias(
    tmp_path: Path, preread: Callable[..., subprocess.Popen[bytes]]
) -> None:
    arguments = ("-", "--format", "csv", "-c", "docs", "--alias", "live", "--max-passage-tokens", 32)
    process = preread("index", *arguments, stdin=subprocess.PIPE)
    out, err = process.communicate(gzip.compress(b"id,text\n1,short\n2," + b"word " * 100 + b"\n"), timeout=60)
    assert process.returncode == 0, err
    assert out.count(b"cut at 32 tokens") == 1  # one example, not a line each
    assert b"warning: 1 passages are over the token limit and are cut (standard input:3 (id 2): cut at 32" in out
    store = open_store(f"faiss:{tmp_path / 'store'}")
    assert Collection.open(store, "live").stats().num_truncated == 1
    store.close()


def test_a_dry_run_leaves_no_trace(tmp_path: Path, run_index: RunIndex, jsonl: Callable[[list[str]], Path]) -> None:
    code, out, err = run_index(jsonl(["first", "second"]), "-c", "docs", "--dry-run")
    assert code == 0, err
    assert "would encode  2 passages" in out
    assert "tokens/s" in out
    assert not (tmp_path / "store").exists()


def test_one_clear_error_and_the_exit_code(
    tmp_path: Path, run_index: RunIndex, jsonl: Callable[[list[str]], Path]
) -> None:
    path = jsonl(["text"])
    for arguments, expected in [
        ([tmp_path / "gone.jsonl", "-c", "docs"], "no such file or folder"),
        ([path, "-c", "docs", "--max-passage-tokens", 10_000_000], "max_passage_tokens is 10000000"),
        ([path, "-c", "bad name"], "collection: 'bad name'"),
        ([path, "-c", "docs", "--codec", "zip"], "'zip' is unknown"),
        ([path, "-c", "docs", "--codec", "PQ16"], "PQ16 trains on at least 256"),
    ]:
        code, _, err = run_index(*arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert expected in err
