"""How a reranker wants to be served: template, readout, padding, limits, activation. One row per model.

The rows live in profiles.toml; a user's file has the same form. Does not know tokens or tensors.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from checkpoint.errors import CheckpointError
from checkpoint.settings import template_fields

# classifier: the model's own sequence-classification head, as an encoder has it.
# score: one row of weights over a decoder's last token.
# vocabulary: rows of the output embedding, for one or two answer tokens, over a decoder's last token.
# listwise: cosine of a passage's marker token and the query's, all passages in one sequence.
Head = Literal["classifier", "score", "vocabulary", "listwise"]
Activation = Literal["identity", "sigmoid"]
Padding = Literal["left", "right"]
GENERIC = "generic"  # the profile made from a checkpoint's own configuration


@dataclass(frozen=True)
class Profile:
    """One model's recipe."""

    model: str  # hub id, or what a user calls it
    architectures: tuple[str, ...]  # class names that config.json may give
    head: Head = "classifier"
    num_labels: int = 1  # 2: the margin is label 1 over label 0
    yes: str | int | None = None  # answer token, or its id; vocabulary heads only
    no: str | int | None = None  # None: the margin is the logit of `yes` alone
    answer_ids: tuple[int, ...] = ()  # what the published tokenizer gives for yes and no
    activation: Activation = "identity"
    temperature: float = 1.0  # scores are activation(margin / temperature)
    template: tuple[str, ...] = ()  # pieces, each tokenized by itself; empty: the tokenizer's own pair (query, passage)
    instruction_format: str = ""  # what a given instruction becomes in the template; empty: none is read
    default_instruction: str = ""
    add_special_tokens: bool = False  # whether the tokenizer adds its own around a filled template
    strip: bool = False  # texts are stripped of surrounding white space
    padding: Padding = "right"
    max_tokens: int = 512
    max_query_tokens: int = 512
    max_instruction_tokens: int = 512
    max_passage_tokens: int | None = None  # None: what the rest of max_tokens leaves
    passage_format: str = ""  # listwise only
    passage_token: str = ""  # listwise only: read out for a passage
    query_token: str = ""  # listwise only: read out for the query
    max_list_passages: int = 1  # listwise only: passages per sequence
    needs_remote_code: bool = False
    refused: str = ""  # why this version cannot serve it
    license: str = ""  # said on load when given
    note: str = ""
    golden: tuple[float, ...] = ()  # published scores of four passages
    golden_are_margins: bool = False

    @property
    def listwise(self) -> bool:
        """Scores depend on the other candidates: never keep one per pair."""
        return self.head == "listwise"

    @property
    def takes_instruction(self) -> bool:
        return bool(self.instruction_format)

    @property
    def restricted(self) -> bool:
        """Whether its licence is one that a user must be told of."""
        return self.license not in ("", "Apache-2.0", "MIT")

    @property
    def fields(self) -> set[str]:
        template_fields("".join(self.template))  # for what all pieces together cost
        return {name for piece in self.template for name in template_fields(piece)}


def builtin_profiles() -> dict[str, Profile]:
    """Every row that ships, by exact model id."""
    text = resources.files(__package__).joinpath("profiles.toml").read_text(encoding="utf-8")
    return parse_profiles(text, "profiles.toml")


def load_profiles(path: Path) -> dict[str, Profile]:
    """Rows of a user's file, by exact model id.

    Raises:
        CheckpointError: unreadable, not TOML, or a row that makes no sense.
    """
    try:
        return parse_profiles(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc})") from exc


def parse_profiles(text: str, source: str) -> dict[str, Profile]:
    """Rows of a TOML document: `[[profile]]` tables, each with `models` and any field of Profile."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise CheckpointError(f"{source}: not TOML ({exc})") from exc
    rows = document.get("profile")
    if not isinstance(rows, list) or not rows or set(document) != {"profile"}:
        raise CheckpointError(f"{source}: has {sorted(document)}; expected [[profile]] tables and nothing else")
    profiles: dict[str, Profile] = {}
    for number, row in enumerate(rows, 1):
        for profile in _profiles(row, f"{source}, profile {number}"):
            if profile.model in profiles:
                raise CheckpointError(f"{source}: {profile.model!r} has two profiles")
            profiles[profile.model] = profile
    return profiles


def _profiles(row: Mapping[str, Any], where: str) -> list[Profile]:
    values = dict(row)
    models, golden = values.pop("models", None), values.pop("golden", {})
    if not isinstance(models, list) or not models or not all(isinstance(name, str) and name for name in models):
        raise CheckpointError(f"{where}: models is {models!r}; expected a list of hub ids or names")
    where = f"{where} ({models[0]})"
    if not isinstance(golden, dict) or not golden.keys() <= set(models):
        raise CheckpointError(f"{where}: golden is {golden!r}; expected a table of scores by model")
    known = {field.name: field for field in dataclasses.fields(Profile) if field.name not in ("model", "golden")}
    for key, value in values.items():
        if key not in known:
            raise CheckpointError(f"{where}: unknown field {key!r}; known: models, golden, {', '.join(known)}")
        values[key] = _checked(where, key, value, str(known[key].type))
    if "architectures" not in values:
        raise CheckpointError(f"{where}: architectures is missing; expected class names as config.json gives them")
    profiles = [Profile(model=name, golden=tuple(golden.get(name, ())), **values) for name in models]
    check_profile(profiles[0], where)
    return profiles


def _checked(where: str, key: str, value: Any, annotation: str) -> Any:
    """`value` as the field wants it, or an error that names both."""
    choices = {"Head": get_args(Head), "Activation": get_args(Activation), "Padding": get_args(Padding)}
    if annotation in choices:
        if value not in choices[annotation]:
            raise CheckpointError(f"{where}: {key} is {value!r}; expected one of {', '.join(choices[annotation])}")
        return value
    if annotation.startswith("tuple["):
        kind = {"str": str, "int": int, "float": float}[annotation[len("tuple[") :].split(",")[0]]
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise CheckpointError(f"{where}: {key} is {value!r}; expected a list of {kind.__name__}")
        return tuple(value)
    kinds = {"str": str, "int": int, "float": float, "bool": bool}
    allowed = [kinds[name] for name in annotation.split(" | ") if name in kinds]
    if allowed == [float] and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        raise CheckpointError(f"{where}: {key} is {value!r}; expected {' or '.join(k.__name__ for k in allowed)}")
    return value


def check_profile(profile: Profile, where: str) -> None:
    """Raises CheckpointError where fields contradict each other."""

    def fail(text: str) -> None:
        raise CheckpointError(f"{where}: {text}")

    if profile.head == "vocabulary" and profile.yes is None:
        fail("yes is missing; a vocabulary head needs an answer token or its id")
    if profile.head != "vocabulary" and (profile.yes is not None or profile.no is not None):
        fail(f"yes and no belong to a vocabulary head; head is {profile.head!r}")
    if profile.num_labels not in (1, 2) or (profile.num_labels == 2 and profile.head != "classifier"):
        fail(f"num_labels is {profile.num_labels}; expected 1, or 2 with a classifier head")
    if profile.temperature <= 0:
        fail(f"temperature is {profile.temperature}; expected more than 0")
    if profile.head in ("score", "vocabulary") and profile.padding != "left":
        fail(f"padding is {profile.padding!r}; a readout at the last token needs left")
    limits = ("max_tokens", "max_query_tokens", "max_instruction_tokens", "max_list_passages")
    for name in limits:
        if getattr(profile, name) < 1:
            fail(f"{name} is {getattr(profile, name)}; expected at least 1")
    needed = {"query", "passages" if profile.listwise else "passage"}
    allowed = needed | {"instruction"} | ({"count"} if profile.listwise else set())
    try:
        found = profile.fields
        in_format = template_fields(profile.instruction_format)
        in_passage = template_fields(profile.passage_format)
    except ValueError as exc:
        raise CheckpointError(f"{where}: template is none ({exc}); braces of the text itself are doubled") from exc
    if profile.template or profile.head != "classifier":
        if not needed <= found <= allowed:
            fail(f"template has the fields {sorted(found)}; expected {sorted(needed)}, allowed {sorted(allowed)}")
        if ("instruction" in found) != profile.takes_instruction:
            fail("template names {instruction} exactly when instruction_format is given")
    if profile.takes_instruction and not profile.template:
        fail("instruction_format needs a template to stand in")
    if profile.takes_instruction and in_format != ["instruction"]:
        fail(f"instruction_format has the fields {in_format}; expected ['instruction']")
    if profile.listwise and len(profile.template) != 1:
        fail(f"template has {len(profile.template)} pieces; a list is tokenized as one")
    if profile.listwise and not (profile.passage_format and profile.passage_token and profile.query_token):
        fail("a listwise head needs passage_format, passage_token and query_token")
    if profile.passage_format and (in_passage.count("passage") != 1 or not set(in_passage) <= {"passage", "index"}):
        fail(f"passage_format has the fields {sorted(in_passage)}; expected ['passage'], allowed ['index', 'passage']")
