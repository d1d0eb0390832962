"""A sweep's work directory: whole or absent, and the same however often it was interrupted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from cache.states import PassageStates
from tuning import EvaluationError
from tuning.progress import SILENT, StageProgress
from tuning.sweep.margins import Codecs
from tuning.sweep.workdir import SpilledStates, WorkDir

DIM = 8


def states(seed: int, num_tokens: int) -> PassageStates:
    rows = np.random.default_rng(seed).standard_normal((num_tokens, DIM)).astype(np.float32)
    return PassageStates(rows, (num_tokens,), 1, False, bytes(32))


class Source:
    """Gives two passages at a time; can break off after some chunks."""

    ratio = 1

    def __init__(self, passages: Mapping[str, PassageStates], break_after: int | None = None) -> None:
        self.passages = passages
        self.break_after = break_after
        self.requested: list[str] = []

    def chunks(
        self, passage_ids: Sequence[str], progress: StageProgress = SILENT
    ) -> Iterator[Mapping[str, PassageStates]]:
        known = [p for p in passage_ids if p in self.passages]
        self.requested += known
        for number, start in enumerate(range(0, len(known), 2)):
            if number == self.break_after:
                raise KeyboardInterrupt
            yield {p: self.passages[p] for p in known[start : start + 2]}


@pytest.fixture
def passages() -> dict[str, PassageStates]:
    return {f"p{i}": states(i, 3 + i) for i in range(6)}


def test_states_come_back_as_they_were(tmp_path: Path, passages: dict[str, PassageStates]) -> None:
    spilled = SpilledStates(tmp_path, 1, DIM, chunk_bytes=200)
    spilled.fill(Source(passages), [*passages, "gone"])
    found = {p: spilled.states(p) for chunk in spilled.chunk_ids(list(passages)) for p in chunk}
    assert list(found) == list(passages)
    for p, one in passages.items():
        assert (found[p].states == one.states).all()
        assert found[p].window_tokens == one.window_tokens
    assert len(spilled.chunk_ids(list(passages))) > 1
    assert spilled.chunk_ids(["p3", "p1"]) == [["p1", "p3"]]
    assert spilled.num_tokens == sum(one.num_tokens for one in passages.values())


@pytest.mark.parametrize("torn", [b"", b'{"seconds": 1, "passa'])
def test_a_broken_off_run_goes_on_where_it_was(tmp_path: Path, passages: dict[str, PassageStates], torn: bytes) -> None:
    with pytest.raises(KeyboardInterrupt):
        SpilledStates(tmp_path, 1, DIM).fill(Source(passages, break_after=2), list(passages))
    with (tmp_path / "passages.jsonl").open("ab") as index, (tmp_path / "states.f32").open("ab") as data:
        index.write(torn)
        data.write(b"half a chunk")
    rest = Source(passages)
    spilled = SpilledStates(tmp_path, 1, DIM)
    spilled.fill(rest, list(passages))
    assert rest.requested == ["p4", "p5"]
    for p, one in passages.items():
        assert (SpilledStates(tmp_path, 1, DIM).states(p).states == one.states).all()
    again = Source(passages)
    SpilledStates(tmp_path, 1, DIM).fill(again, list(passages))
    assert again.requested == []


def test_damage_is_told(tmp_path: Path, passages: dict[str, PassageStates]) -> None:
    SpilledStates(tmp_path, 1, DIM).fill(Source(passages), list(passages))
    (tmp_path / "states.f32").write_bytes(b"short")
    with pytest.raises(EvaluationError, match=r"states\.f32: 5 bytes, fewer than its index says"):
        SpilledStates(tmp_path, 1, DIM)
    (tmp_path / "passages.jsonl").write_text("[]\n")
    with pytest.raises(EvaluationError, match=r"passages\.jsonl: damaged"):
        SpilledStates(tmp_path, 1, DIM)


def test_states_that_are_not_finite_are_left_out_and_counted(
    tmp_path: Path, passages: dict[str, PassageStates]
) -> None:
    passages["p2"].states[0, 0] = np.nan
    passages["p5"].states[1, 1] = np.inf
    spilled = SpilledStates(tmp_path, 1, DIM)
    spilled.fill(Source(passages), list(passages))
    assert spilled.passage_ids == ["p0", "p1", "p3", "p4"]
    assert spilled.num_not_finite == SpilledStates(tmp_path, 1, DIM).num_not_finite == 2


def test_a_training_sample_is_the_same_by_seed(tmp_path: Path, passages: dict[str, PassageStates]) -> None:
    spilled = SpilledStates(tmp_path, 1, DIM)
    spilled.fill(Source(passages), list(passages))
    assert (spilled.sample(2, 5, seed=3) == spilled.sample(2, 5, seed=3)).all()
    assert spilled.sample(2, 5, seed=3).shape == (5, DIM)
    assert len(spilled.sample(1, 1000, seed=0)) == spilled.num_tokens


def test_a_codec_with_too_few_states_is_left_out_or_refused(tmp_path: Path, passages: dict[str, PassageStates]) -> None:
    work = WorkDir(tmp_path, {"x": 1})
    spilled = SpilledStates(work.path, 1, DIM)
    spilled.fill(Source(passages), list(passages))
    codecs = Codecs(spilled, work, "fallback", seed=0)
    assert codecs.get(1, "PQ4") is None
    assert codecs.left_out.keys() == {(1, "PQ4")}
    assert codecs.left_out[1, "PQ4"].startswith("sample: 33 states, PQ4 trains on at least 256")
    assert codecs.get(1, "Flat") is not None
    trained = codecs.get(1, "SQ8")
    assert trained is not None
    assert (trained.num_sample, trained.codec.table() != b"") == (33, True)
    assert codecs.few == {"SQ8": {1: 33}}
    again = Codecs(spilled, work, "fallback", seed=99).get(1, "SQ8")
    assert again is not None
    assert again.codec.table() == trained.codec.table()  # kept, not trained again
    with pytest.raises(EvaluationError, match="codec PQ4 at stored ratio 1: sample: 33 states, PQ4 trains on at least"):
        Codecs(spilled, work, "refuse", seed=0).get(1, "PQ4")


def test_a_round_trip_is_what_a_collection_would_give(tmp_path: Path, passages: dict[str, PassageStates]) -> None:
    work = WorkDir(tmp_path, {})
    trained = Codecs(SpilledStates(work.path, 1, DIM), work, "refuse", seed=0).get(1, "SQfp16")
    assert trained is not None
    for p, one in trained.roundtrip(passages).items():
        assert (one.states == passages[p].states.astype(np.float16).astype(np.float32)).all()
    assert trained.roundtrip({}) == {}


def test_factory_strings_have_file_names_of_their_own(tmp_path: Path) -> None:
    work = WorkDir(tmp_path, {})
    factories = ("OPQ16,PQ16", "OPQ16PQ16", "SQ8", "OPQ16_PQ16", "RR(8)")
    for factory in factories:
        work.save(f"codecs/r4-{factory}", table=np.array(factory))
    for factory in factories:
        kept = work.load(f"codecs/r4-{factory}")
        assert kept is not None
        assert kept["table"] == factory
    names = [path.name for path in (work.path / "codecs").iterdir()]
    assert len(names) == 5
    assert all("," not in name and "(" not in name for name in names)


def test_what_is_saved_is_whole_or_absent(tmp_path: Path) -> None:
    work = WorkDir(tmp_path, {"seed": 1})
    assert work.load("a/b") is None
    work.save("a/b", x=np.arange(3), y=np.float64(2))
    found = WorkDir(tmp_path, {"seed": 1}).load("a/b")
    assert found is not None
    assert found["x"].tolist() == [0, 1, 2]
    assert WorkDir(tmp_path, {"seed": 2}).load("a/b") is None  # other inputs, another folder
    path = work.path / "a/b.npz"
    path.write_bytes(path.read_bytes()[:40])
    assert work.load("a/b") is None


def test_two_runs_on_one_folder_are_one_too_many(tmp_path: Path) -> None:
    with (
        WorkDir(tmp_path, {}).held(),
        pytest.raises(EvaluationError, match="another run on the same inputs is working here"),
        WorkDir(tmp_path, {}).held(),
    ):
        pass
