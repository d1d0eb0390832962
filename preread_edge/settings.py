"""Knobs: fields `max_connections: int = knob(1024, "Help.", at_least=1)`, each with its flag, bounds and help.

`--max-connections`, PREREAD_MAX_CONNECTIONS, the TOML key `max-connections` and the docs' tables follow from the field.
Imports only the standard library: a help text must not load gRPC or torch.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A field that can be set from outside."""

    help: str
    name: str = ""
    kind: str = ""  # the field's type as written, without `| None`: int, float, str, bool, tuple[str, ...]
    default: Any = None
    flag: str = ""  # `--some-flag`; from the name where none is given
    at_least: int | None = None
    above: int | None = None
    at_most: int | None = None
    choices: tuple[str, ...] = ()
    metavar: str = ""
    shown_default: str = ""  # for the help, where the default itself says nothing: None, ""
    is_file: bool = False
    is_secret: bool = False
    parse: Callable[[str], Any] | None = None  # from the command line's text, with its own check; raises ValueError

    @property
    def option_name(self) -> str:
        """`--some-flag/--no-some-flag` -> some_flag, the command line's name for the value."""
        return self.flag.split("/")[0].removeprefix("--").replace("-", "_")

    def check(self, value: Any) -> None:
        """Raises ValueError where a value is out of bounds; None is no value."""
        if value is None:
            return
        limits = ((operator.ge, self.at_least), (operator.gt, self.above), (operator.le, self.at_most))
        fits = all(limit is None or is_within(value, limit) for is_within, limit in limits)
        expected = f"at least {self.at_least}" if self.above is None else f"more than {self.above}"
        if self.at_most is not None:
            expected = f"{self.at_least or 0}..{self.at_most}"
        if self.choices:
            fits, expected = value in self.choices, ", ".join(self.choices)
        if not fits:
            raise ValueError(f"{self.name} is {value!r}; expected {expected}")


def knob(default: Any, help: str, **details: Any) -> Any:
    """A dataclass field with its knob; `details` are Knob's attributes."""
    one = Knob(help=help, **details)
    return field(default=default, repr=not one.is_secret, metadata={"knob": one})


@dataclass(frozen=True)
class Config:
    """Base of every configuration: knobs are checked when it is made."""

    def __post_init__(self) -> None:
        for one in self.knobs():
            one.check(getattr(self, one.name))

    @classmethod
    def knobs(cls) -> Iterator[Knob]:
        """In the order of the fields."""
        for one in dataclasses.fields(cls):
            if given := one.metadata.get("knob"):
                kind = str(getattr(one.type, "__name__", one.type)).removesuffix(" | None")
                flag = given.flag or "--" + one.name.replace("_", "-")
                yield dataclasses.replace(given, name=one.name, kind=kind, default=one.default, flag=flag)

    def values_of(self, kind: "type[Config]") -> dict[str, Any]:
        """By name, those of the knobs that this configuration shares with another kind."""
        return {one.name: getattr(self, one.name) for one in kind.knobs()}


@dataclass(frozen=True, kw_only=True)
class ListenConfig(Config):
    """Knobs of everything that listens."""

    host: str = knob("127.0.0.1", "Address to listen on; 0.0.0.0 for every interface.")
    max_connections: int = knob(
        1024, "gRPC calls, and HTTP connections, at a time; others are told when to retry, probes pass.", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class ServerConfig(ListenConfig):
    """Knobs of both gRPC servers."""

    store: str = knob(
        "faiss:./preread-data",
        "Where states are kept: faiss:PATH (a directory, no server), redis://HOST:PORT/DB, rediss://..., "
        "redis+cluster://..., or memory: (gone when the process ends).",
        metavar="URL",
        is_secret=True,  # it may hold a password
    )
    max_message_bytes: int = knob(64 * MIB, "Largest gRPC message.", at_least=1)
    tls_cert_file: str = knob("", "Speak TLS with this certificate (PEM).", is_file=True)
    tls_key_file: str = knob("", "The key of --tls-cert-file (PEM).", is_file=True)
    tls_client_ca_file: str = knob("", "Require a client certificate signed by this authority (PEM).", is_file=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            given, missing = ("cert", "key") if self.tls_cert_file else ("key", "cert")
            raise ValueError(f"tls_{given}_file is given without tls_{missing}_file; expected both or neither")
        if self.tls_client_ca_file and not self.tls_cert_file:
            raise ValueError("tls_client_ca_file is given without tls_cert_file and tls_key_file; expected all three")


@dataclass(frozen=True, kw_only=True)
class LoadConfig(Config):
    """Knobs of everything that loads a model."""

    device: str = knob("auto", "Where to compute; auto takes CUDA where there is any.", metavar="auto|cpu|cuda[:N]")
    dtype: str = knob(
        "auto",
        "Number format; auto takes bfloat16 only where the hardware multiplies it natively.",
        choices=("auto", "float32", "bfloat16"),
    )
    max_passage_tokens: int | None = knob(
        None, "Passage limit; part of the encoder's fingerprint.", at_least=1, shown_default="the checkpoint's"
    )
    read_control_tokens: bool = knob(
        False,
        "Read <end_of_turn> and the like in queries and passages as control tokens, as KaLM's own code does: a text "
        "can then write the prompt. For comparing with it; part of the encoder's fingerprint.",
    )
