"""The recipe of a reranker: template, readout, padding, limits, activation.
One row per model, in profiles.toml; a user's file has the same form.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_type_hints

from msgspec import Meta
from tokenizers import Tokenizer

from checkpoint.files import CheckpointError, read_fields, read_json
from checkpoint.settings import template_fields
from checkpoint.text import single_token

# classifier: the model's own sequence-classification head, as an encoder has it.
# score: one row of weights over a decoder's last token.
# vocabulary: rows of the output embedding, for one or two answer tokens, over a decoder's last token.
# listwise: cosine of a passage's marker token and the query's, all passages in one sequence.
Head = Literal["classifier", "score", "vocabulary", "listwise"]
Activation = Literal["identity", "sigmoid"]
Padding = Literal["left", "right"]
GENERIC = "generic"  # the profile made from a checkpoint's own configuration
FILE_NAME = "preread-profile.toml"  # a checkpoint's own recipe: `preread convert-ctxl` or a user puts it there
# Longest input taken from a configuration that names more; attention on a CPU is quadratic.
MAX_GENERIC_TOKENS = 8192
# Encoders that transformers gives a classification head over the first token or a pool of all: a pair goes in.
ENCODERS = frozenset({
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "eurobert",
    "modernbert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl",
})  # fmt: skip
# These count positions from padding_idx + 1, so two of them are never used.
OFFSET_POSITIONS = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"})
# A tokenizer this large is a published one, whose answers have known ids; smaller ones are made for tests.
REAL_VOCABULARY = 10_000
ACTIVATIONS = {"Identity": "identity", "Sigmoid": "sigmoid"}  # by the class that sentence-transformers names
_Limit = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True)
class Profile:
    """One model's recipe."""

    model: str  # hub id, or what a user calls it
    architectures: tuple[str, ...]  # class names that config.json may give
    head: Head = "classifier"
    num_labels: Annotated[int, Meta(ge=1, le=2)] = 1  # 2: the margin is label 1 over label 0
    yes: str | int | None = None  # answer token, or its id; vocabulary heads only
    no: str | int | None = None  # None: the margin is the logit of `yes` alone
    answer_ids: tuple[int, ...] = ()  # what the published tokenizer gives for yes and no
    activation: Activation = "identity"
    temperature: Annotated[float, Meta(gt=0)] = 1.0  # scores are activation(margin / temperature)
    template: tuple[str, ...] = ()  # pieces, each tokenized separately; empty: the tokenizer's own pair
    instruction_format: str = ""  # what a given instruction becomes in the template; empty: none is read
    default_instruction: str = ""
    add_special_tokens: bool = False  # whether the tokenizer adds its own around a filled template
    strip: bool = False  # texts are stripped of surrounding white space
    padding: Padding = "right"
    max_tokens: _Limit = 512
    max_query_tokens: _Limit = 512
    max_instruction_tokens: _Limit = 512
    max_passage_tokens: int | None = None  # None: what the rest of max_tokens leaves
    passage_format: str = ""  # listwise only
    passage_token: str = ""  # listwise only: read out for a passage
    query_token: str = ""  # listwise only: read out for the query
    max_list_passages: _Limit = 1  # listwise only: passages per sequence
    needs_remote_code: bool = False
    refused: str = ""  # why this version cannot serve it
    license: str = ""  # said on load when given
    note: str = ""
    golden: tuple[float, ...] = ()  # published scores of four passages
    golden_are_margins: bool = False

    @property
    def listwise(self) -> bool:  # scores depend on the other candidates: never keep one per pair
        return self.head == "listwise"

    @property
    def takes_instruction(self) -> bool:
        return bool(self.instruction_format)

    def check_allowed(self, name: str, trust_remote_code: bool) -> None:
        if self.refused:
            raise CheckpointError(f"{name} cannot be served: {self.refused}")
        if self.needs_remote_code and not trust_remote_code:
            told = "runs Python code that comes with the checkpoint; allow it with trust_remote_code if you trust it"
            raise CheckpointError(f"{name} {told}")

    def check_architecture(self, config: Mapping[str, Any], name: str) -> None:
        """Raises CheckpointError where a checkpoint is not of the kind that this profile is for."""
        found = [str(item) for item in config.get("architectures") or []]
        if not set(found) & set(self.architectures):
            raise CheckpointError(
                f"{name}: config.json names the architecture {' '.join(found) or 'none'} "
                f"({config.get('model_type', 'no model_type')}); "
                f"the profile {self.model!r} is for {' or '.join(self.architectures)}"
            )
        labels = _num_labels(config)
        if self.head in ("classifier", "score") and labels != self.num_labels:
            told = f"has {labels} labels; the profile {self.model!r} needs {self.num_labels}"
            raise CheckpointError(f"{name}: config.json {told}")

    def limited(self, config: Mapping[str, Any], max_tokens: int | None) -> Profile:
        """This profile with limits that the checkpoint can hold, or with the given one."""
        positions = config.get("max_position_embeddings")
        most = positions - _offset(config) if isinstance(positions, int) else self.max_tokens
        if max_tokens is not None and not 1 <= max_tokens <= most:
            raise CheckpointError(f"max_tokens is {max_tokens}; expected 1..{most}, what the checkpoint holds")
        total = min(max_tokens or self.max_tokens, most)
        # Query and instruction may take half together, so that something of every passage is always read.
        share = total // 4 if self.takes_instruction else total // 2
        query, told = (max(1, min(most, share)) for most in (self.max_query_tokens, self.max_instruction_tokens))
        return dataclasses.replace(self, max_tokens=total, max_query_tokens=query, max_instruction_tokens=told)

    def read_answers(self, tokenizer: Tokenizer, directory: Path) -> tuple[int, ...]:
        """Token ids of the answers, checked against the published ones."""
        ids: list[int] = []
        for key, answer in (("yes", self.yes), ("no", self.no)):
            if isinstance(answer, int):
                ids.append(answer)
            elif answer is not None:
                ids.append(single_token(tokenizer, answer, f"{directory}: the {key} answer"))
        if len(set(ids)) != len(ids):
            raise CheckpointError(f"{directory}: yes and no are the same token {ids[0]}")
        if self.answer_ids and tuple(ids) != self.answer_ids and tokenizer.get_vocab_size() >= REAL_VOCABULARY:
            raise CheckpointError(
                f"{directory}: the answers are the tokens {ids}; the published tokenizer of {self.model} "
                f"has {list(self.answer_ids)}: this one is another model's"
            )
        return tuple(ids)

    @classmethod
    def named(cls, name: str, wanted: str | Profile | None = None, directory: Path | None = None) -> Profile | None:
        """The profile known before config.json is read: the wanted one, or that of this id, or the checkpoint's own.
        `wanted` is a profile, a model id of the table, or a TOML file with the row of `name` or only one row;
        `directory` is the checkpoint's, where its recipe may lie.
        """
        if isinstance(wanted, Profile):
            return wanted
        builtin = builtin_profiles()
        if wanted is None:
            # A hub cache's snapshot, or a directory laid out like the hub, goes by its `owner/name`.
            cached = re.search(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$", name)
            owner_and_name = cached.groups() if cached else name.rstrip("/").split("/")[-2:]
            known = builtin.get(name) or builtin.get("/".join(owner_and_name))
            if known is not None or directory is None or not (path := directory / FILE_NAME).exists():
                return known
            own = list(_load(path).values())
            if len(own) > 1:
                raise CheckpointError(f"{path}: has {len(own)} profiles; expected one")
            return own[0]
        if wanted in builtin:
            return builtin[wanted]
        if wanted == GENERIC:
            return None
        if not wanted.endswith(".toml"):
            models = ", ".join(sorted(builtin))
            raise CheckpointError(f"profile is {wanted!r}; expected a TOML file, {GENERIC!r}, or one of {models}")
        rows = _load(Path(wanted).expanduser())
        if name not in rows and len(rows) > 1:
            raise CheckpointError(f"{wanted}: has profiles for {', '.join(rows)}; none for {name!r}")
        return rows.get(name) or next(iter(rows.values()))

    @classmethod
    def generic(cls, name: str, config: dict[str, Any], directory: Path) -> Profile:
        """From config.json and sentence-transformers' files next to it, for an encoder with a head.
        A decoder's prompt and answer tokens stand in no configuration: guessing them gives numbers, not scores.
        """
        architecture, kind = str((config.get("architectures") or ["none"])[0]), config.get("model_type")
        if kind not in ENCODERS or not architecture.endswith("ForSequenceClassification"):
            raise CheckpointError(
                f"{name}: no profile for it, and a {architecture} ({kind}) cannot be served from its configuration "
                "alone, which says neither its prompt nor its readout; give a profile (docs/cross-encoders.md)"
            )
        labels = _num_labels(config)
        if labels not in (1, 2):
            told = f"has {labels} labels; a reranker has 1, or 2 with the second relevant"
            raise CheckpointError(f"{name}: config.json {told}")
        limits = [int(config.get("max_position_embeddings") or 512) - _offset(config), MAX_GENERIC_TOKENS]
        # The input that sentence-transformers cuts at, where it or the tokenizer says so.
        for file, key in (("sentence_bert_config", "max_seq_length"), ("tokenizer_config", "model_max_length")):
            found = read_json(directory / f"{file}.json", optional=True).get(key)
            if type(found) is int and found > 0:  # transformers stores 1e30 where there is no limit
                limits.append(found)
                break
        return cls(
            model=GENERIC,
            architectures=(architecture,),
            num_labels=labels,
            activation=_declared_activation(directory, config, labels),
            max_tokens=max(1, min(limits)),
            needs_remote_code="auto_map" in config,
        )


def builtin_profiles() -> dict[str, Profile]:
    """Every row that ships, by exact model id."""
    return _load(resources.files(__package__).joinpath("profiles.toml"))


def _load(path: Path | Traversable) -> dict[str, Profile]:
    """Rows of a TOML file, `[[profile]]` tables with `models` and any field of Profile, by exact model id."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc})") from exc
    except tomllib.TOMLDecodeError as exc:
        raise CheckpointError(f"{path}: not TOML ({exc})") from exc
    if set(document) != {"profile"}:
        raise CheckpointError(f"{path}: has {sorted(document)}; expected [[profile]] tables and nothing else")
    tables = Annotated[list[dict[str, Any]], Meta(min_length=1)]
    models = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)]
    kinds = get_type_hints(Profile, include_extras=True) | {"models": models, "golden": dict[str, tuple[float, ...]]}
    del kinds["model"]
    needed = {"models": "a list of hub ids or names", "architectures": "class names of config.json"}
    profiles: dict[str, Profile] = {}
    for number, row in enumerate(read_fields(str(path), document, {"profile": tables})["profile"], 1):
        where = f"{path}, profile {number}"
        values = read_fields(where, row, kinds)
        for key, expected in needed.items():
            if key not in values:
                raise CheckpointError(f"{where}: {key} is missing; expected {expected}")
        names, golden = values.pop("models"), values.pop("golden", {})
        if not golden.keys() <= set(names):
            raise CheckpointError(f"{where}: golden is {golden!r}; expected a table of scores by model")
        for model in names:
            if model in profiles:
                raise CheckpointError(f"{path}: {model!r} has two profiles")
            profiles[model] = Profile(model=model, golden=golden.get(model, ()), **values)
        _check(profiles[names[0]], f"{where} ({names[0]})")
    return profiles


def _check(profile: Profile, where: str) -> None:
    try:
        template_fields("".join(profile.template))  # for what all pieces together cost
        found = {name for piece in profile.template for name in template_fields(piece)}
        in_format, in_passage = template_fields(profile.instruction_format), template_fields(profile.passage_format)
    except ValueError as exc:
        raise CheckpointError(f"{where}: template is none ({exc}); braces of the text itself are doubled") from exc
    p, listwise, last = profile, profile.listwise, profile.head in ("score", "vocabulary")
    needed = {"query", "passages" if listwise else "passage"}
    allowed = needed | {"instruction"} | ({"count"} if listwise else set())
    templated = bool(p.template) or p.head != "classifier"
    answered, marked = (p.yes, p.no) != (None, None), p.passage_format and p.passage_token and p.query_token
    fits = in_passage.count("passage") == 1 and set(in_passage) <= {"passage", "index"}
    fields = f"template has the fields {sorted(found)}; expected {sorted(needed)}, allowed {sorted(allowed)}"
    place = "template names {instruction} exactly when instruction_format is given"
    form = f"instruction_format has the fields {in_format}; expected ['instruction']"
    places = f"passage_format has the fields {sorted(in_passage)}; expected ['passage'], allowed ['index', 'passage']"
    for contradiction, message in (
        (p.head == "vocabulary" and p.yes is None, "yes is missing; a vocabulary head needs an answer token or its id"),
        (p.head != "vocabulary" and answered, f"yes and no belong to a vocabulary head; head is {p.head!r}"),
        (p.num_labels == 2 and p.head != "classifier", "num_labels is 2; expected 1, or 2 with a classifier head"),
        (last and p.padding != "left", f"padding is {p.padding!r}; a readout at the last token needs left"),
        (templated and not needed <= found <= allowed, fields),
        (templated and ("instruction" in found) != p.takes_instruction, place),
        (p.takes_instruction and not p.template, "instruction_format needs a template to stand in"),
        (p.takes_instruction and in_format != ["instruction"], form),
        (listwise and len(p.template) != 1, f"template has {len(p.template)} pieces; a list is tokenized as one"),
        (listwise and not marked, "a listwise head needs passage_format, passage_token and query_token"),
        (p.passage_format and not fits, places),
    ):
        if contradiction:
            raise CheckpointError(f"{where}: {message}")


def _num_labels(config: Mapping[str, Any]) -> int:
    """As transformers reads it: the labels by name, or a count, or two."""
    names = config.get("id2label")
    return len(names) if isinstance(names, dict) and names else int(config.get("num_labels", 2))


def _offset(config: Mapping[str, Any]) -> int:
    return int(config.get("pad_token_id") or 0) + 1 if config.get("model_type") in OFFSET_POSITIONS else 0


def _declared_activation(directory: Path, raw: Mapping[str, Any], labels: int) -> Activation:
    """As sentence-transformers reads it: what a file names, else a sigmoid for one label."""
    inner = raw.get("sentence_transformers")
    declared = (
        read_json(directory / "config_sentence_transformers.json", optional=True).get("activation_fn"),
        inner.get("activation_fn") if isinstance(inner, dict) else None,
        raw.get("sbert_ce_default_activation_function"),
    )
    saved = next((one for one in declared if one is not None), None)
    if saved is None or labels == 2:  # of two labels the margin's sigmoid is the softmax
        return "sigmoid"
    name = str(saved).rpartition(".")[2]
    if name not in ACTIVATIONS:
        told = f"the activation function is {saved!r}; expected {' or '.join(ACTIVATIONS)}, or a profile"
        raise CheckpointError(f"{directory}: {told}")
    return cast(Activation, ACTIVATIONS[name])
