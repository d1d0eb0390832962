"""An absent instruction is the model's default, an empty one is empty: over every interface, old clients included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from benchmarks.synthetic import make_cross_encoder
from decoder_server.engine.engine import Engine
from decoder_server.models.cross_encoder.loading import open_cross_encoder
from preread import Client
from preread.v1 import rerank_pb2, rerank_pb2_grpc
from preread.values import Warmed
from preread_cli.main import cli

QUERY, TEXT = "the capital", "Gravity attracts bodies toward one another."
ABSENT, EMPTY = 0, 1


@pytest.fixture(scope="module")
def margins(running: Any) -> tuple[float, float]:
    """By hand: under the default, and under the template with nothing in the instruction's place."""
    backend, encoder = running.engine.backend, running.worker.engine.encoder
    settings = backend.settings
    states = encoder.encode_one(TEXT, settings.default_compression_ratio)
    prompts = [backend.prompt(QUERY, settings.default_instruction), backend.prompt(QUERY, "")]
    filled = settings.prompt_template.format(query=QUERY, instruction="")
    tokenizer = Tokenizer.from_file(str(backend.checkpoint.path / "tokenizer.json"))
    assert prompts[1].ids == tokenizer.encode(filled, add_special_tokens=False).ids
    absent, empty = (float(backend.score(backend.pairs(prompt, [states])[0])[0]) for prompt in prompts)
    assert abs(absent - empty) > 1e-3
    return absent, empty


def test_http(running: Any, margins: tuple[float, float]) -> None:
    for fields, which in (({}, ABSENT), ({"instruction": None}, ABSENT), ({"instruction": ""}, EMPTY)):
        for path, body in {
            "/v1/rerank": {"query": QUERY, "documents": [TEXT]},
            "/v1/ranking": {"query": {"text": QUERY}, "passages": [{"text": TEXT}]},
            "/tei/rerank": {"query": QUERY, "texts": [TEXT]},
            "/score": {"text_1": QUERY, "text_2": TEXT},
        }.items():
            answer = running.post(path, body | fields | {"return_margins": True}).json()
            (one,) = answer if isinstance(answer, list) else next(v for v in answer.values() if isinstance(v, list))
            assert one["margin"] == pytest.approx(margins[which], abs=1e-4), (path, fields)
        ratio = running.engine.backend.settings.default_compression_ratio
        body = {"query": QUERY, "documents": [TEXT], "compression_ratio": ratio} | fields
        (explained,) = running.post("/v1/explain", body).json()["results"]
        found = {score["compression_ratio"]: score["margin"] for score in explained["scores"]}
        assert found[ratio] == pytest.approx(margins[which], abs=1e-4)


def test_grpc_and_a_client_from_before(
    running: Any, margins: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = [rerank_pb2.Candidate(text=TEXT)]
    absent = rerank_pb2.RerankRequest(query=QUERY, candidates=candidates)
    empty = rerank_pb2.RerankRequest(query=QUERY, candidates=candidates, instruction="")
    # Before the field was optional, an empty string was not sent; now it is.
    assert len(empty.SerializeToString()) == len(absent.SerializeToString()) + 2
    with grpc.insecure_channel(f"127.0.0.1:{running.server.port}") as channel:
        stub = rerank_pb2_grpc.RerankServiceStub(channel)
        for request, which in ((absent, ABSENT), (empty, EMPTY)):
            assert stub.Rerank(request).results[0].margin == pytest.approx(margins[which], abs=1e-4)
    warmed: list[str | None] = []

    async def warm(engine: Any, request: Any) -> Warmed:
        warmed.append(request.instruction)
        return Warmed("", 0, 0, (), ())

    monkeypatch.setattr(Engine, "warm", warm)
    with grpc.insecure_channel(f"127.0.0.1:{running.server.port}") as channel:
        stub = rerank_pb2_grpc.RerankServiceStub(channel)
        for given in (None, ""):
            stub.Warm(rerank_pb2.WarmRequest(passage_ids=["a"], collection="docs", instruction=given))
    assert warmed == [None, ""]


def test_the_client_and_the_command(running: Any, margins: tuple[float, float], tmp_path: Path) -> None:
    address = f"127.0.0.1:{running.server.port}"
    candidates = tmp_path / "candidates.txt"
    candidates.write_text(f'{{"text": "{TEXT}"}}\n')
    with Client(address) as client:
        for given, which in ((None, ABSENT), ("", EMPTY)):
            answer = client.rerank(QUERY, [TEXT], instruction=given)
            assert answer.results[0].margin == pytest.approx(margins[which], abs=1e-4)
    for more, which in (([], ABSENT), (["--instruction", ""], EMPTY)):
        line = ["rerank", QUERY, "--candidates", str(candidates), "--address", address, "--json", *more]
        result = CliRunner().invoke(cli, line, prog_name="preread")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["results"][0]["margin"] == pytest.approx(margins[which], abs=1e-4)


@pytest.mark.parametrize(
    ("architecture", "profile", "words"),
    [
        ("Qwen3ForCausalLM", "Qwen/Qwen3-Reranker-0.6B", True),  # has a default: nothing takes its place
        ("JinaForRanking", "jinaai/jina-reranker-v3", False),  # has none: its words stand with an instruction only
    ],
)
def test_a_model_that_reads_text(tmp_path: Path, architecture: str, profile: str, words: bool) -> None:
    model = open_cross_encoder(
        make_cross_encoder(tmp_path / "model", architecture), device="cpu", dtype="float32", profile=profile
    )
    absent, empty, given = (model.prompt(QUERY, instruction).instruction for instruction in (None, "", "Find it"))
    assert absent == model.prompt(QUERY, model.profile.default_instruction).instruction
    assert empty == model.profile.instruction_format.format(instruction="") if words else not empty
    assert (empty == absent) != words
    assert given == model.profile.instruction_format.format(instruction="Find it")
