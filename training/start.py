"""`python -m training start`: a trimmed vocabulary, and weights that already compute a soft MaxSim.

The residual stream is divided. CONTENT holds a piece's static vector; encoder layer 0 copies it into COPY, which is
empty in every prompt token. In decoder layer 0 queries read CONTENT and keys read COPY: the attention of a prompt token
over the passage states is a match, and [CLS], whose COPY holds one reserved direction that every query carries a little
of, is the rival it must beat. Values carry two flags, one seen on passage states only and one on prompt tokens only, so
that the mass won and the mass lost land in two scratch ranges whose ratio survives the post-norm. In decoder layer 1
the last token averages those ranges over the prompt, with a weight that grows with RARITY. The yes and no rows of the
tied embedding read them. Everything else starts almost silent.

Reasons: T5Gemma2's post-norms add unit-size updates, so silent layers need small post-norm weights; self and passage
share k_proj and v_proj, so a flag must tell them apart; queries are rotated by RoPE and passage keys are not, so theta
is large and strong components sit in the slow half. The vocabulary's pieces are a subset of MiniLM's, so the teacher
can read text cut by the trimmed tokenizer. A word that lost its own piece falls apart into shorter pieces, down to
single letters; only unseen scripts become [UNK].
"""

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Encoding, Tokenizer
from torch.nn.functional import pad as pad_left
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

from training.collections import read_jsonl
from training.model import MINI, TrainableCheckpoint
from training.teacher import MINILM_FOLDER

HIDDEN, HEAD = 384, 160
CONTENT, COPY = slice(0, 160), slice(160, 320)
PASSAGE_FLAG, PROMPT_FLAG, RARITY = slice(320, 328), slice(328, 332), slice(332, 336)
WON, LOST = slice(336, 360), slice(360, 384)
SINK = HEAD // 2 - 1  # the slowest RoPE pair is (79, 159): 79 is the reserved direction, 159 stays empty
WIDTH = HEAD - 2  # content components in use
# The start is tuned by these three.
SINK_SHARE = 1.2  # how much of every query points at [CLS]
SHARPNESS = 1.0  # added to the query norm weight of decoder layer 0
RARITY_NORM = -0.6  # query norm weight of decoder layer 1: how strongly rare words win
SPECIAL = ("[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]")


def _config(vocab_size: int, intermediate_size: int) -> T5Gemma2Config:
    """Two encoder and three decoder layers, and a vision tower of a few thousand parameters that text never touches."""
    rope = {"rope_type": "default", "rope_theta": 1e8}
    text = {
        "vocab_size": vocab_size, "hidden_size": HIDDEN, "intermediate_size": intermediate_size,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": HEAD, "query_pre_attn_scalar": 256,
        "sliding_window": 1024, "max_position_embeddings": 8192, "dropout_rate": 0.0,
        "pad_token_id": 0, "bos_token_id": 4, "eos_token_id": 5,
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 224, "patch_size": 14,
    }  # fmt: skip
    image: dict[str, Any] = {"eoi_token_index": 1, "image_token_index": 2}
    encoder = {"text_config": text | {"num_hidden_layers": 2}, "vision_config": vision, "boi_token_index": 1, **image}
    return T5Gemma2Config(encoder=encoder, decoder=text | {"num_hidden_layers": 3}, **image)


@torch.no_grad()
def soft_maxsim_model(
    vectors: torch.Tensor, rarity: torch.Tensor, answers: tuple[int, int], intermediate_size: int = 768
) -> Any:
    """A T5Gemma2 with the starting weights.

    vectors: (vocab, WIDTH), strongest component last; rarity: (vocab,); answers: ids of the yes and the no token
    """
    model: Any = T5Gemma2ForConditionalGeneration(_config(len(vectors), intermediate_size))
    encoder, decoder = model.model.encoder.text_model, model.model.decoder
    embedding, root, eye = encoder.embed_tokens.weight, math.sqrt(HIDDEN), torch.eye(HEAD)
    size = 1.5 * math.sqrt(WIDTH) / root
    # Head positions for content components, weakest first, the pair (SINK, SINK + HEAD/2) left out.
    rope_order = torch.arange(HEAD).view(2, -1).T.flatten()[:WIDTH]
    embedding.zero_()
    embedding[:, rope_order] = torch.nn.functional.normalize(vectors, dim=1) * size
    embedding[: len(SPECIAL), CONTENT] = 0
    embedding[SPECIAL.index("[CLS]"), COPY.start + SINK] = size
    embedding[:, PASSAGE_FLAG] = embedding[:, PROMPT_FLAG] = 1 / root
    embedding[:, RARITY] = ((rarity - 2.0).clamp(min=-1, max=6) / 3 / root)[:, None]
    embedding[: len(SPECIAL), RARITY] = -1 / root
    for token, sign in zip(answers, (1, -1), strict=True):
        embedding[token, WON] = sign * 2 / root
        embedding[token, LOST] = -sign * 2 / root
    for layer in (*encoder.layers, *decoder.layers):  # 1 + weight = 0.1
        layer.post_self_attn_layernorm.weight.fill_(-0.9)
        layer.post_feedforward_layernorm.weight.fill_(-0.9)
    # Encoder layer 0: attend to like tokens, copy CONTENT into COPY: a lightly contextual copy.
    q, k, v, o = _projections(encoder.layers[0], 0.0, 0.0, 0.0, 0.0, post_norm=0.0)
    k[:, CONTENT] = v[:, CONTENT] = eye
    q[:, CONTENT], o[COPY] = eye.repeat(2, 1), eye.repeat(1, 2) / 2
    encoder.norm.weight[PASSAGE_FLAG] = 1.0
    encoder.norm.weight[PROMPT_FLAG.start :] = -1.0  # RARITY, WON and LOST too: passages show none of them
    for layer in decoder.layers:
        layer.pre_self_attn_layernorm.weight[PASSAGE_FLAG] = -1.0
    _match_layer(decoder.layers[0], eye)
    _gather_layer(decoder.layers[1])
    return model


def _projections(layer: Any, *stds: float, post_norm: float) -> list[torch.Tensor]:
    """Weights of a layer's q, k, v and o, drawn with these deviations; its attention's post-norm is set."""
    layer.post_self_attn_layernorm.weight.fill_(post_norm)
    weights = [getattr(layer.self_attn, f"{name}_proj").weight for name in "qkvo"]
    for weight, std in zip(weights, stds, strict=True):
        if std:
            weight.normal_(std=std)
        else:  # draws no numbers
            weight.zero_()
    return weights


def _match_layer(layer: Any, eye: torch.Tensor) -> None:
    """Decoder layer 0: WON <- attention mass on the passage, LOST <- mass on the prompt."""
    q, k, v, o = _projections(layer, 0.01, 0.001, 0.02, 0.01, post_norm=0.0)
    layer.self_attn.q_norm.weight.fill_(SHARPNESS)
    k[:, COPY] += eye
    v[0:8, PASSAGE_FLAG] += torch.eye(8)
    v[8:16, PROMPT_FLAG] += torch.eye(4).repeat(2, 1)
    for start in (0, HEAD):
        q[start : start + HEAD, CONTENT] += eye
        q[start + SINK, PROMPT_FLAG] += 2 * SINK_SHARE
        o[WON, start : start + 8] += torch.eye(8).repeat(3, 1)
        o[LOST, start + 8 : start + 16] += 2 * torch.eye(8).repeat(3, 1)  # passages carry their flag doubled


def _gather_layer(layer: Any) -> None:
    """Decoder layer 1: the last token averages WON and LOST over the prompt, rare words first."""
    q, k, v, o = _projections(layer, 0.002, 0.002, 0.01, 0.01, post_norm=0.5)
    layer.self_attn.q_norm.weight.fill_(RARITY_NORM)
    k[SINK, RARITY] += 0.25
    k[SINK + HEAD // 2, PROMPT_FLAG] += 0.25
    v[16:40, WON] += torch.eye(24)
    v[40:64, LOST] += torch.eye(24)
    for start in (0, HEAD):
        q[start + SINK, PROMPT_FLAG] += 0.5
        o[WON, start + 16 : start + 40] += torch.eye(24)
        o[LOST, start + 40 : start + 64] += torch.eye(24)


def trim(tokenizer_json: str, texts: list[str], size: int, corpus_share: float = 0.65) -> Tokenizer:
    """Keep letters, then the pieces most frequent in `texts`, then MiniLM's own order (roughly English frequency)."""
    state = json.loads(tokenizer_json)
    state["post_processor"] = state["padding"] = state["truncation"] = None  # templates write [CLS] and [SEP]
    full = Tokenizer.from_str(json.dumps(state))
    old = sorted(full.get_vocab().items(), key=lambda item: item[1])
    counts = Counter(token for encoding in _encodings(full, texts) for token in encoding.tokens)
    latin = [piece for piece, _ in old if len(piece.removeprefix("##")) == 1 and ord(piece[-1]) < 0x250]
    keep = dict.fromkeys([*SPECIAL, "yes", "no", *latin])
    for pieces, limit in ((counts.most_common(), size * corpus_share), (old, size)):
        for piece, _ in pieces:
            if len(keep) >= limit:
                break
            if not piece.startswith("[") and all(ord(c) < 0x250 or 0x2010 <= ord(c) < 0x2040 for c in piece):
                keep.setdefault(piece)
    state["model"]["vocab"] = {piece: i for i, piece in enumerate(keep)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    state["added_tokens"] = [{"id": i, "content": piece, **flags, "special": True} for i, piece in enumerate(SPECIAL)]
    return Tokenizer.from_str(json.dumps(state))


def _encodings(tokenizer: Tokenizer, texts: list[str]) -> Iterator[Encoding]:
    for start in range(0, len(texts), 2000):
        yield from tokenizer.encode_batch(texts[start : start + 2000], add_special_tokens=False)


@torch.inference_mode()
def _token_vectors(tokenizer: Tokenizer, texts: list[str], max_tokens: int = 64) -> torch.Tensor:
    """One 384-d vector per piece: the mean of its teacher states over `texts`, shrunk to the piece read alone.

    -> (vocab, 384). A piece seen n times takes n/(n+4) of the mean in context and the rest of its lone state.
    """
    minilm: Any = SentenceTransformer(str(MINILM_FOLDER), device="cpu")
    read, full = minilm[0].auto_model, minilm.tokenizer
    size, cls, sep = tokenizer.get_vocab_size(), full.cls_token_id, full.sep_token_id
    to_teacher = torch.tensor(full.convert_tokens_to_ids([tokenizer.id_to_token(i) for i in range(size)]))
    alone = torch.zeros(size, 384)
    for rows in torch.split(torch.arange(size), 1024):
        ids = pad_left(pad_left(to_teacher[rows, None], (1, 0), value=cls), (0, 1), value=sep)
        alone[rows] = read(ids, torch.ones_like(ids)).last_hidden_state[:, 1]
    total, count = torch.zeros(size, 384), torch.zeros(size)
    encoded = sorted((e.ids[:max_tokens] for e in tokenizer.encode_batch(texts, add_special_tokens=False)), key=len)
    for start in tqdm(range(0, len(encoded), 64), desc="piece vectors", mininterval=5):
        part = [torch.tensor(ids, dtype=torch.long) for ids in encoded[start : start + 64]]
        own = pad_sequence(part, batch_first=True)  # pieces; 0 = padding
        inside = own > 0
        ids = pad_left(torch.where(inside, to_teacher[own], 0), (1, 0), value=cls)
        states = read(ids, pad_left(inside.long(), (1, 0), value=1)).last_hidden_state[:, 1:]
        total.index_add_(0, own[inside], states[inside])
        count.index_add_(0, own[inside], torch.ones(int(inside.sum())))
    weight = (count / (count + 4))[:, None]
    return weight * total / count.clamp(min=1)[:, None] + (1 - weight) * alone


def start(data: Path, out: Path, vocab_size: int = 15000, seed: int = 0, num_texts: int = 30000) -> None:
    """Texts of the data step -> a checkpoint with a trimmed vocabulary and soft-MaxSim weights, the same for a seed."""
    torch.manual_seed(seed)
    texts = [row["text"] for _, row in read_jsonl(data / "texts.jsonl")]
    tokenizer = trim((MINILM_FOLDER / "tokenizer.json").read_text(encoding="utf-8"), texts, vocab_size)
    sample = random.Random(seed).sample(texts, min(num_texts, len(texts)))
    cache = out / "vectors.pt"
    if not cache.exists():
        out.mkdir(parents=True, exist_ok=True)
        with torch.autocast("cpu", torch.bfloat16):
            torch.save(_token_vectors(tokenizer, sample), cache)
    vectors = torch.load(cache, weights_only=True)
    centred = vectors - vectors[len(SPECIAL) :].mean(0)
    directions = torch.linalg.svd(centred[len(SPECIAL) :], full_matrices=False)[2][:WIDTH]
    principal = torch.flip(centred @ directions.T, [1])  # (vocab, WIDTH), the strongest last
    seen = torch.zeros(len(vectors))  # passages with the piece
    for encoding in _encodings(tokenizer, texts):
        seen[torch.tensor(sorted(set(encoding.ids)), dtype=torch.long)] += 1
    checkpoint = TrainableCheckpoint(None, tokenizer, MINI)
    rarity = math.log(len(texts)) - torch.log1p(seen)
    checkpoint.model = soft_maxsim_model(principal, rarity, checkpoint.answers)
    checkpoint.save(out)
