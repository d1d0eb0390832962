"""Every architecture's margin is the published readout, computed by hand with transformers in float32, pair by pair."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.synthetic import Size
from decoder_server.models.cross_encoder.loading import open_cross_encoder
from decoder_server.models.cross_encoder.profiles import builtin_profiles

QUERY = "What is the capital of China?"
INSTRUCTION = "Prefer short answers."
PASSAGES = [
    "The capital of China is Beijing.",
    "Gravity attracts bodies toward one another. " * 6,
    "수도는 서울이다.",
    "no",
]
LONG = Size(positions=4096)
TOLERANCE = 2e-5  # float32, another order of additions


def classifier(directory: Path, passages: list[str]) -> NDArray[np.float32]:
    """logits of one pair at a time, right as transformers gives them."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        rows = [model(**tokenizer(QUERY, p, return_tensors="pt")).logits[0] for p in passages]
    return torch.stack(rows).numpy()  # (passages, labels)


def causal(directory: Path, prompts: list[str], *, add_special_tokens: bool = False) -> NDArray[np.float32]:
    """Logits over the whole vocabulary at the last token, one prompt at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            ids = tokenizer(prompt, add_special_tokens=add_special_tokens, return_tensors="pt").input_ids
            rows.append(model(input_ids=ids).logits[0, -1])
    return torch.stack(rows).numpy()  # (prompts, vocabulary)


def sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("architecture", "profile"),
    [
        ("XLMRobertaForSequenceClassification", "BAAI/bge-reranker-v2-m3"),
        ("BertForSequenceClassification", "cross-encoder/ms-marco-MiniLM-L6-v2"),
        ("ModernBertForSequenceClassification", "ibm-granite/granite-embedding-reranker-english-r2"),
        ("DebertaV2ForSequenceClassification", "mixedbread-ai/mxbai-rerank-base-v1"),
    ],
)
def test_an_encoder_with_one_label(tiny: Callable[..., Path], architecture: str, profile: str) -> None:
    directory = tiny(architecture)
    model = open_cross_encoder(directory, profile=profile, dtype="float32")
    margins = model.score_texts([(QUERY, None, p) for p in PASSAGES])
    expected = classifier(directory, PASSAGES)[:, 0]
    np.testing.assert_allclose(margins, expected, atol=TOLERANCE)
    published = expected if model.profile.activation == "identity" else sigmoid(expected)
    np.testing.assert_allclose(model.activation(margins), published, atol=TOLERANCE)


def test_an_encoder_with_two_labels_is_the_softmax_of_the_second(tiny: Callable[..., Path]) -> None:
    directory = tiny("BertForSequenceClassification", num_labels=2)
    profile = "amberoad/bert-multilingual-passage-reranking-msmarco"
    model = open_cross_encoder(directory, profile=profile, dtype="float32")
    margins = model.score_texts([(QUERY, None, p) for p in PASSAGES])
    logits = classifier(directory, PASSAGES)
    np.testing.assert_allclose(margins, logits[:, 1] - logits[:, 0], atol=TOLERANCE)
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(model.activation(margins), softmax[:, 1], atol=TOLERANCE)


CTXL = (
    "Check whether a given document contains information helpful to answer the query.\n"
    "<Document> {passage}\n<Query> {query} ??"
)
QWEN = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: {query}\n"
    "<Document>: {passage}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
ZERANK = "<|im_start|>system\n{query}<|im_end|>\n<|im_start|>user\n{passage}<|im_end|>\n<|im_start|>assistant\n"
MXBAI = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nquery: {query}\ndocument: {passage}\nYou are a search relevance expert who evaluates how well "
    "documents match search queries. For each query-document pair, carefully analyze the semantic relationship "
    "between them, then provide your binary relevance judgment (0 for not relevant, 1 for relevant).\n"
    "Relevance:<|im_end|>\n<|im_start|>assistant\n"
)


def filled(template: str, passages: list[str]) -> list[str]:
    return [template.format(query=QUERY, passage=p) for p in passages]


def token(directory: Path, text: str) -> int:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    (id_,) = tokenizer(text, add_special_tokens=False).input_ids
    return int(id_)


def test_ctxl_is_the_first_column_of_the_last_token(tiny: Callable[..., Path]) -> None:
    directory = tiny("Qwen3ForCausalLM")
    profile = "ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b"
    model = open_cross_encoder(directory, profile=profile, dtype="float32")
    margins = model.score_texts([(QUERY, None, p) for p in PASSAGES])
    np.testing.assert_allclose(margins, causal(directory, filled(CTXL, PASSAGES))[:, 0], atol=TOLERANCE)
    np.testing.assert_array_equal(model.activation(margins), margins)


def test_ctxl_takes_an_instruction_behind_the_query(tiny: Callable[..., Path]) -> None:
    directory = tiny("Qwen3ForCausalLM")
    profile = "ContextualAI/ctxl-rerank-v2-instruct-multilingual-2b"
    model = open_cross_encoder(directory, profile=profile, dtype="float32")
    margins = model.score_texts([(QUERY, INSTRUCTION, p) for p in PASSAGES])
    prompts = filled(CTXL.replace("{query}", "{query} " + INSTRUCTION), PASSAGES)
    np.testing.assert_allclose(margins, causal(directory, prompts)[:, 0], atol=TOLERANCE)


def test_ctxl_is_read_from_shards_and_from_a_tied_head(tiny: Callable[..., Path]) -> None:
    profile = "ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b"
    sharded = tiny("Qwen3ForCausalLM", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    tied = tiny("Qwen3ForCausalLM", config={"tie_word_embeddings": True})
    for directory in (sharded, tied):
        model = open_cross_encoder(directory, profile=profile, dtype="float32")
        margins = model.score_texts([(QUERY, None, p) for p in PASSAGES])
        np.testing.assert_allclose(margins, causal(directory, filled(CTXL, PASSAGES))[:, 0], atol=TOLERANCE)


def test_a_character_that_pads_is_read_as_the_published_tokenizer_reads_it(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(tiny("Qwen3ForCausalLM"), tmp_path / "copy"))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "+"}))
    profile = "ContextualAI/ctxl-rerank-v2-instruct-multilingual-2b"
    model = open_cross_encoder(directory, profile=profile, dtype="float32")
    passages = ["C++ is a language", "1+1", *PASSAGES]
    margins = model.score_texts([(QUERY, None, p) for p in passages])
    np.testing.assert_allclose(margins, causal(directory, filled(CTXL, passages))[:, 0], atol=TOLERANCE)


def test_ctxl_converted_is_the_score_row_of_the_last_token(tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    directory = tiny("Qwen3ForSequenceClassification")
    model = open_cross_encoder(directory, profile="sigridjineth/ctxl-rerank-v2-1b-seq-cls", dtype="float32")
    margins = model.score_texts([(QUERY, None, p) for p in PASSAGES])
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    reference: Any = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [float(reference(**tokenizer(t, return_tensors="pt")).logits) for t in filled(CTXL, PASSAGES)]
    np.testing.assert_allclose(margins, expected, atol=TOLERANCE)


def test_ctxl_6b_lets_the_tokenizer_add_its_own_beginning(tiny: Callable[..., Path]) -> None:
    directory = tiny("MistralForCausalLM")
    profile = "ContextualAI/ctxl-rerank-v2-instruct-multilingual-6b"
    model = open_cross_encoder(directory, profile=profile, dtype="float32")
    assert model.read([(QUERY, None, "x")])[0].ids[:2].count(token(directory, "<s>")) == 1
    margins = model.score_texts([(QUERY, None, p) for p in PASSAGES])
    expected = causal(directory, filled(CTXL, PASSAGES), add_special_tokens=True)[:, 0]
    np.testing.assert_allclose(margins, expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("architecture", "profile", "template", "answers"),
    [
        ("Qwen3ForCausalLM", "Qwen/Qwen3-Reranker-0.6B", QWEN, ("yes", "no")),
        ("Qwen2ForCausalLM", "mixedbread-ai/mxbai-rerank-large-v2", MXBAI, ("1", "0")),
    ],
)
def test_two_answer_tokens(
    tiny: Callable[..., Path], architecture: str, profile: str, template: str, answers: tuple[str, str]
) -> None:
    directory = tiny(architecture)
    model = open_cross_encoder(directory, profile=profile, dtype="float32")
    margins = model.score_texts([(QUERY, None, p) for p in PASSAGES])
    logits = causal(directory, filled(template, PASSAGES))
    yes, no = (token(directory, answer) for answer in answers)
    np.testing.assert_allclose(margins, logits[:, yes] - logits[:, no], atol=TOLERANCE)
    if model.profile.activation == "sigmoid":
        both = np.exp(logits[:, [yes, no]])
        np.testing.assert_allclose(model.activation(margins), both[:, 0] / both.sum(1), atol=TOLERANCE)


def test_zerank_is_a_sigmoid_of_one_logit_over_five(tiny: Callable[..., Path]) -> None:
    directory = tiny("Qwen3ForCausalLM")
    model = open_cross_encoder(directory, profile="zeroentropy/zerank-1-small", dtype="float32")
    margins = model.score_texts([(f" {QUERY}\n", None, f"{p} ") for p in PASSAGES])  # texts are stripped
    logits = causal(directory, filled(ZERANK, [p.strip() for p in PASSAGES]))[:, token(directory, "Yes")]
    np.testing.assert_allclose(margins, logits, atol=TOLERANCE)
    np.testing.assert_allclose(model.activation(margins), sigmoid(logits / 5), atol=TOLERANCE)


def test_gemma_joins_pieces_and_reads_a_capital_yes(tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tiny("GemmaForCausalLM")
    model = open_cross_encoder(directory, profile="BAAI/bge-reranker-v2-gemma", dtype="float32")
    margins = model.score_texts([(QUERY, None, p) for p in PASSAGES])
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    reference: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    prompt = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query "
        "by providing a prediction of either 'Yes' or 'No'."
    )
    for margin, passage in zip(margins, PASSAGES, strict=True):
        row = [tokenizer.bos_token_id, *ids(f"A: {QUERY}"), *ids("\n"), *ids(f"B: {passage}"), *ids("\n"), *ids(prompt)]
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([row])).logits[0, -1, token(directory, "Yes")]
        assert margin == pytest.approx(float(expected), abs=TOLERANCE)


def listwise_by_hand(directory: Path, blocks: list[list[str]], instruction: str = "") -> NDArray[np.float32]:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, Qwen3Model

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    reference: Any = Qwen3Model.from_pretrained(directory, dtype=torch.float32).eval()
    weights = load_file(directory / "model.safetensors")
    passages, queries, shares = [], [], []
    for block in blocks:
        listed = "\n".join(f'<passage id="{i}">\n{p}<|embed_token|>\n</passage>' for i, p in enumerate(block))
        prompt = (
            "<|im_start|>system\nYou are a search relevance expert who can determine a ranking of the passages based "
            "on how relevant they are to the query. If the query is a question, how relevant a passage is depends on "
            "how well it answers the question. If not, try to analyze the intent of the query and assess how well "
            "each passage satisfies the intent. If an instruction is provided, you should follow the instruction "
            "when determining the ranking.<|im_end|>\n<|im_start|>user\n"
            f"I will provide you with {len(block)} passages, each indicated by a numerical identifier. "
            f"Rank the passages based on their relevance to query: {QUERY}\n"
            + (f"<instruct>\n{instruction}\n</instruct>\n" if instruction else "")
            + f"{listed}\n<query>\n{QUERY}<|rerank_token|>\n</query><|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = reference(input_ids=ids).last_hidden_state[0]
            projected = torch.relu(hidden @ weights["projector.0.weight"].T) @ weights["projector.2.weight"].T
        passages.append(projected[ids[0] == tokenizer.convert_tokens_to_ids("<|embed_token|>")].numpy())
        queries.append(projected[ids[0] == tokenizer.convert_tokens_to_ids("<|rerank_token|>")][0].numpy())
        shares.append(((1 + cosine(passages[-1], queries[-1])) / 2).max())
    return cosine(np.concatenate(passages), np.average(queries, axis=0, weights=shares))


def cosine(rows: NDArray[np.float32], vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows @ vector / (np.linalg.norm(rows, axis=1) * np.linalg.norm(vector))


def test_a_listwise_model_reads_all_passages_at_once(tiny: Callable[..., Path]) -> None:
    directory = tiny("JinaForRanking", size=LONG)
    model = open_cross_encoder(directory, profile="jinaai/jina-reranker-v3", dtype="float32")
    assert model.profile.listwise
    margins = model.score_texts([(QUERY, None, p) for p in PASSAGES])
    np.testing.assert_allclose(margins, listwise_by_hand(directory, [PASSAGES]), atol=TOLERANCE)
    told = model.score_texts([(QUERY, INSTRUCTION, p) for p in PASSAGES])
    np.testing.assert_allclose(told, listwise_by_hand(directory, [PASSAGES], INSTRUCTION), atol=TOLERANCE)
    alone = model.score_texts([(QUERY, None, PASSAGES[0])])
    assert abs(float(alone[0] - margins[0])) > 1e-3  # which is why no score may be kept per pair


def test_a_long_list_is_read_in_blocks_with_one_mean_query(tiny: Callable[..., Path]) -> None:
    directory = tiny("JinaForRanking", size=LONG)
    profile = dataclasses.replace(builtin_profiles()["jinaai/jina-reranker-v3"], max_list_passages=3)
    model = open_cross_encoder(directory, profile=profile, dtype="float32")
    margins = model.score_texts([(QUERY, None, p) for p in PASSAGES])
    np.testing.assert_allclose(margins, listwise_by_hand(directory, [PASSAGES[:3], PASSAGES[3:]]), atol=TOLERANCE)


def test_two_queries_are_two_lists(tiny: Callable[..., Path]) -> None:
    directory = tiny("JinaForRanking", size=LONG)
    model = open_cross_encoder(directory, profile="jinaai/jina-reranker-v3", dtype="float32")
    texts = [(query, None, p) for p in PASSAGES for query in (QUERY, "gravity")]
    margins = model.score_texts(texts)
    np.testing.assert_array_equal(margins[::2], model.score_texts(texts[::2]))
    np.testing.assert_array_equal(margins[1::2], model.score_texts(texts[1::2]))


def test_an_older_checkpoint_has_only_a_word_list(tiny: Callable[..., Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny("BertForSequenceClassification", num_labels=2), tmp_path / "copy"))
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    words = open_cross_encoder(
        tiny("BertForSequenceClassification", num_labels=2), profile="generic"
    )._reader.tokenizers.exact.get_vocab()
    (directory / "vocab.txt").write_text("\n".join(sorted(words, key=words.__getitem__)) + "\n")
    profile = "amberoad/bert-multilingual-passage-reranking-msmarco"
    model = open_cross_encoder(directory, profile=profile, dtype="float32")
    margins = model.score_texts([(QUERY, None, p) for p in PASSAGES])
    logits = classifier(tiny("BertForSequenceClassification", num_labels=2), PASSAGES)
    np.testing.assert_allclose(margins, logits[:, 1] - logits[:, 0], atol=TOLERANCE)
