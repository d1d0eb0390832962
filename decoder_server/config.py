"""Everything a reranking server, its models and its gateway can be told, checked once. The CLI makes options of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import preread
from preread.values import Stage, format_stages, parse_stages, stages_problem
from preread_edge.settings import MIB, Config, ListenConfig, LoadConfig, ServerConfig, knob

if TYPE_CHECKING:
    from preread.channel import TlsFiles

# Sent by clients that were not given a model: the 4D AI Kit's example, infinity_client's default.
DEFAULT_NAMES = frozenset({"default", "default/not-specified"})
ANY_MODEL = "*"
SHIPPED_MODEL = Path(preread.__file__).parent / "models" / "preread-mini"  # in a checkout, and in the servers' wheel
# Of HTTP bodies; decoder_server/edge/http/dialects.py has their shapes.
DIALECTS = (
    "cohere", "jina", "vllm", "tei", "nim", "voyage", "mixedbread", "infinity", "pinecone", "sglang", "isaacus",
    "weaviate",
)  # fmt: skip


def parse_lookup(text: str) -> tuple[str, ...] | None:
    """`docs,faq`: these, in this order; `none`: no collection; `all`, or nothing: None. Raises ValueError."""
    names = tuple(name.strip() for name in text.split(","))
    if names in (("",), ("all",)):
        return None
    if names == ("none",):
        return ()
    if "" in names or len({*names}) < len(names) or {"all", "none"}.intersection(names):
        raise ValueError(f"lookup is {text!r:.200}; expected names of collections, each once, or all, or none")
    return names


@dataclass(frozen=True)
class KvCacheConfig(Config):
    """Budgets of one model's KV and prefix caches."""

    max_keys_bytes: int = knob(
        256 * MIB, "Memory for the KV cache, the keys and values of passages, per model; 0: no cache.",
        flag="--keys-cache-bytes", at_least=0,
    )  # fmt: skip
    max_prefix_bytes: int = knob(
        256 * MIB,
        "Memory for the prefix cache, instructions read over passages, per model: a query under the same instruction "
        "continues from there; 0: no cache.",
        flag="--prefix-cache-bytes", at_least=0,
    )  # fmt: skip
    form: str = knob(
        "auto",
        "Number format of --keys-cache-bytes and --prefix-cache-bytes; auto: as computed. int8 holds nearly twice as "
        "much as bfloat16 and moves scores a little.",
        flag="--cache-format", choices=("auto", "bfloat16", "int8"),
    )  # fmt: skip


NO_KV_CACHES = KvCacheConfig(0, 0)


@dataclass(frozen=True)
class ModelConfig(LoadConfig):
    """One model of a server: under which name, and how it is loaded. A knob is a flag, a key of `--model`, or both."""

    checkpoint: str  # directory or hub id
    name: str = knob(
        "", "Name of the (first) model to clients.", flag="--served-model-name", shown_default="its directory's name"
    )
    backend: str = knob(
        "auto", "auto: fbnl for a T5Gemma 2 checkpoint, else cross_encoder.", choices=("auto", "fbnl", "cross_encoder")
    )
    runtime: str = knob("torch", "Runtime of a cross-encoder.", choices=("torch", "onnx", "onnx-int8"))
    profile: str = knob("", "A cross-encoder's profile.", shown_default="by id, else from its own configuration")
    trust_remote_code: bool = knob(False, "Run Python that a cross-encoder's checkpoint brings.")
    # "": nothing is encoded on demand
    encoder_address: str = knob("", "Use this encoder worker instead of one in this process.", metavar="HOST:PORT")
    encoder_api_key: str = knob("", "Shown to the worker at --encoder-address.", metavar="KEY", is_secret=True)
    encoder_in_process: bool = False  # that worker is a part of this process, which is not ready without it
    kv_caches: KvCacheConfig = field(default_factory=KvCacheConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoint:
            raise ValueError("checkpoint is empty; expected a directory or a hub id")

    @property
    def served_name(self) -> str:
        return self.name or Path(self.checkpoint.rstrip("/")).name


@dataclass(frozen=True)
class HttpConfig(ListenConfig):
    """Configuration of one Gateway."""

    port: int = knob(
        8080,
        "Answer HTTP here too, on --host: Cohere, Jina, vLLM, TEI, NIM, Voyage and other dialects. 0 takes a free port "
        "and prints it.",
        flag="--http-port", at_least=0, at_most=65535,
    )  # fmt: skip
    model_aliases: tuple[str, ...] = knob(
        (), "HTTP clients may call the (first) model by this name too; '*': by any. May be repeated.",
        flag="--model-alias", metavar="NAME",
    )  # fmt: skip
    dialect: str = knob(
        "auto",
        "Dialect of every HTTP reranking body, unless the path begins with another: /tei/rerank. auto: told by the "
        "path, the headers and the body.",
        choices=("auto", *DIALECTS),
    )  # fmt: skip
    max_body_bytes: int = knob(
        64 * MIB, "Largest HTTP request body; NDJSON uploads are read line by line and may be longer.", at_least=1
    )
    max_line_bytes: int = knob(16 * MIB, "Longest line of an NDJSON upload.", at_least=1)
    max_search_bytes: int = knob(
        128 * MIB,
        "Memory for the indexes of collections that are searched by words over HTTP; building one takes up to four "
        "times its size. 0: no search.",
        flag="--search-cache-bytes", at_least=0,
    )  # fmt: skip
    timeout_seconds: float = knob(
        120.0, "Longest time an HTTP reranking request may take.", flag="--http-timeout-seconds", above=0
    )
    header_seconds: float = knob(
        10.0, "Longest time until the header of an HTTP request is complete.", flag="--http-header-seconds", above=0
    )
    allowed_hosts: tuple[str, ...] = knob(
        (),
        "A name that HTTP callers may use for this server (.example.com: and every name below it), next to loopback's "
        "and the address of the connection. If keys are required, any name is accepted. May be repeated.",
        flag="--allowed-host", metavar="NAME",
    )  # fmt: skip
    allowed_origins: tuple[str, ...] = knob(
        (), "Web pages of this origin (https://app.example.com) may call, next to the server's own. '*': of any, where "
        "keys are required. May be repeated.",
        flag="--allow-origin", metavar="ORIGIN",
    )  # fmt: skip


@dataclass(frozen=True)
class DecoderConfig(ServerConfig):
    """Configuration of one DecoderServer. Counts are `num_*`, limits `max_*`, units come last."""

    models: tuple[ModelConfig, ...]  # the first is the default
    port: int = knob(50051, "gRPC port; 0 takes a free one and prints it.", at_least=0, at_most=65535)
    read_budget_seconds: float = knob(
        0.1,
        "Longest time a request waits for each read of a Redis store, the collection's name and manifest included; "
        "bytes that arrive extend it by 10 ms a megabyte. Candidates that needed the store are then FAILED, or encoded "
        "where they have a text.",
        above=0,
    )
    max_staleness_seconds: float = knob(
        1.0, "Longest time until a moved alias or a replaced passage is noticed.", at_least=0
    )
    read_ratio: int | None = knob(
        None, "Compression ratio of requests that name none; where a collection cannot give it, its next multiple.",
        at_least=1, shown_default="as stored",
    )  # fmt: skip
    stages: tuple[Stage, ...] = knob(
        (),
        "A cascade for requests that name no ratio: 32:100,8:20,4 scores every candidate at ratio 32, the best 100 at "
        "8, the best 20 of those at 4; where a collection cannot give a ratio, its next multiple.",
        metavar="RATIO:KEEP,...", parse=parse_stages,
    )  # fmt: skip
    lookup: tuple[str, ...] | None = knob(
        None,
        "Collections, or aliases, in which texts without a stored id are looked up, in this order: those that are "
        "stored are not encoded again. all: the first 8 by name that this model's encoder wrote; none: no lookup.",
        metavar="NAME,...", parse=parse_lookup, shown_default="all",
    )  # fmt: skip
    write_through: str = knob(
        "",
        "Have the encoder worker keep the states of texts that it encodes on demand in this collection, which holds "
        "nothing else and is looked into last: they are not encoded again, by any server of the store.",
        metavar="NAME",
    )
    degrade: bool = knob(
        False,
        "Score at a coarser ratio when a request would miss its deadline or the queue fills; the response says so, "
        "and preread_degraded_requests_total counts it.",
    )
    degrade_queue_share: float = knob(
        0.5, "With --degrade: share of the queue limits above which requests are scored coarser.",
        at_least=0, at_most=1, metavar="SHARE",
    )  # fmt: skip
    max_batch_tokens: int | None = knob(
        None, "Prompt tokens and states per batch.", at_least=1, shown_default="measured"
    )
    max_queue_requests: int = knob(256, "Requests in flight before new ones are rejected.", at_least=1)
    max_queue_tokens: int = knob(1_000_000, "Tokens in flight before new requests are rejected.", at_least=1)
    max_queue_seconds: float = knob(
        30.0, "Seconds of work in flight, at the measured rate, before new requests are rejected; 0: no such limit.",
        at_least=0,
    )  # fmt: skip
    max_candidates: int = knob(1000, "Candidates of one request.", at_least=1)
    max_request_tokens: int | None = knob(
        None, "Prompt tokens and states of one request, over all its pairs.", at_least=1, shown_default="no limit"
    )
    max_query_bytes: int = knob(
        1 * MIB,
        "Longest query, and longest instruction, that is tokenized. A query over the model's token limit, far below, "
        "is cut, and the response says so.",
        at_least=1,
    )
    max_instruction_tokens: int = knob(
        512, "Longest instruction; a longer one is rejected: half an instruction may say the opposite.", at_least=1
    )
    max_text_bytes: int = knob(1 * MIB, "Longest text of one candidate.", at_least=1)
    max_store_cache_bytes: int = knob(
        256 * MIB, "Memory for the read cache of stored states; 0: no cache.", flag="--cache-bytes", at_least=0
    )
    max_inline_cache_bytes: int | None = knob(
        None, "Memory for the states of texts that came with requests.",
        flag="--inline-cache-bytes", at_least=0, shown_default="as --cache-bytes",
    )  # fmt: skip
    max_score_cache_bytes: int = knob(
        16 * MIB,
        "Memory for the score cache, margins of earlier requests, per model: a pair of query and passage that comes "
        "again costs no forward pass; 24 bytes a pair, 0: no cache.",
        flag="--score-cache-bytes", at_least=0,
    )  # fmt: skip
    encode_timeout_seconds: float = knob(60.0, "Longest time to wait for texts to be encoded on demand.", above=0)
    encoder_tls_ca_file: str = knob("", "Reach that worker with TLS, trusting this certificate (PEM).", is_file=True)
    encoder_tls_cert_file: str = knob("", "Show that worker this certificate (PEM), for mutual TLS.", is_file=True)
    encoder_tls_key_file: str = knob("", "The key of --encoder-tls-cert-file (PEM).", is_file=True)
    max_connection_age_seconds: float = knob(
        0.0, "Age at which a gRPC client is told to reconnect, and so finds servers that were added; 0: never.",
        at_least=0,
    )  # fmt: skip
    log_text: bool = knob(False, "Log queries and instructions too; passages never.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise ValueError("models is empty; expected at least one")
        names = [model.served_name for model in self.models]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two models are called {twice.pop()!r}; give them names: name=checkpoint")
        if self.stages and (problem := stages_problem(self.stages)):
            raise ValueError("{} is {}; expected {}".format(*problem))
        if self.stages and self.read_ratio is not None:
            both = f"stages ({format_stages(self.stages)}) and read_ratio ({self.read_ratio})"
            raise ValueError(f"{both} are mutually exclusive")
        if self.write_through and self.lookup == ():
            expected = "a lookup too, else what is kept is never found"
            raise ValueError(f"write_through is {self.write_through!r} and lookup is none; expected {expected}")
        if bool(self.encoder_tls_cert_file) != bool(self.encoder_tls_key_file):
            raise ValueError("encoder_tls_cert_file and encoder_tls_key_file go together; only one of them is given")

    @property
    def encoder_tls(self) -> TlsFiles | None:
        """How the encoder worker is reached; None: in plain text."""
        from preread.channel import TlsFiles  # loads gRPC

        files = (self.encoder_tls_ca_file, self.encoder_tls_cert_file, self.encoder_tls_key_file)
        return TlsFiles(*(name or None for name in files)) if any(files) else None

    @classmethod
    def of_one(cls, checkpoint: str, **fields: Any) -> DecoderConfig:
        """A server of one model; `fields` are those of the model and of the server."""
        own = {one.name: fields.pop(one.name) for one in dataclasses.fields(ModelConfig) if one.name in fields}
        return cls((ModelConfig(checkpoint, **own),), **fields)
