"""Laws of knobs: one field gives flag, variable, key, bounds and default; a command cannot differ from a library."""

from __future__ import annotations

import dataclasses

import click
import pytest

from decoder_server.config import DecoderConfig, HttpConfig, KvCacheConfig, ModelConfig
from encoder_worker.config import CollectionSettings, EncoderConfig, IndexOptions, WriteThroughConfig
from preread_cli.commands.evaluate import evaluate, tune
from preread_cli.commands.index import index
from preread_cli.commands.serve import encode_worker, serve
from preread_cli.flags import from_options
from preread_edge.settings import Config, knob
from tuning.config import EvaluationSettings, Limits, SweepSettings

PAIRS = [
    (serve, DecoderConfig),
    (serve, HttpConfig),
    (serve, KvCacheConfig),
    (serve, WriteThroughConfig),
    (encode_worker, EncoderConfig),
    (index, IndexOptions),
    (index, CollectionSettings),
    (evaluate, EvaluationSettings),
    (tune, SweepSettings),
    (tune, Limits),
]
# Of a model, which `--model NAME=CHECKPOINT,KEY=VALUE` names.
MODEL_KEYS = {"--backend", "--runtime", "--profile", "--trust-remote-code"}


def options_of(command: click.Command) -> dict[str, click.Option]:
    return {one.opts[-1]: one for one in command.params if isinstance(one, click.Option)}


@pytest.mark.parametrize(("command", "settings"), PAIRS, ids=lambda one: one.__name__ if isinstance(one, type) else "")
def test_every_knob_is_a_flag_with_its_variable(command: click.Command, settings: type[Config]) -> None:
    options = options_of(command)
    for one in settings.knobs():
        option = options[one.flag.split("/")[0]]
        assert option.envvar == "PREREAD_" + one.option_name.upper()
        assert str(option.help).startswith(one.help)


@pytest.mark.parametrize(("command", "settings"), PAIRS, ids=lambda one: one.__name__ if isinstance(one, type) else "")
def test_a_command_without_flags_is_the_library_without_arguments(
    command: click.Command, settings: type[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {
        DecoderConfig: {"models": (ModelConfig("m"),)},
        EncoderConfig: {"checkpoint": "m"},
        HttpConfig: {"port": 8080},  # on the command line there is no HTTP without --http-port
    }.get(settings, {})
    required = ["passages.jsonl", "-c", "docs"] if command is index else []
    params = command.make_context(str(command.name), [*required, "--model", "m"]).params
    assert from_options(settings, params, **needed) == settings(**needed)


def test_every_field_that_can_be_set_is_a_knob() -> None:
    plain = {
        settings: {one.name for one in dataclasses.fields(settings)} - {one.name for one in settings.knobs()}
        for settings in (DecoderConfig, HttpConfig, KvCacheConfig, EncoderConfig, ModelConfig)
    }
    assert plain == {
        DecoderConfig: {"models"},
        HttpConfig: set(),
        KvCacheConfig: set(),
        EncoderConfig: {"checkpoint"},
        ModelConfig: {"checkpoint", "kv_caches", "encoder_in_process"},
    }
    flags = {one.flag for one in ModelConfig.knobs()}
    assert flags - set(options_of(serve)) == MODEL_KEYS


@dataclasses.dataclass(frozen=True)
class Example(Config):
    num_items: int = knob(3, "Items.", at_least=1)
    wait_seconds: float | None = knob(None, "Wait.", above=0)
    share: float = knob(0.5, "Share.", at_least=0, at_most=1)
    form: str = knob("a", "Form.", choices=("a", "b"), flag="--the-form")
    key: str = knob("", "Key.", is_secret=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_items": 0}, "num_items is 0; expected at least 1"),
        ({"wait_seconds": 0.0}, "wait_seconds is 0.0; expected more than 0"),
        ({"share": 1.5}, "share is 1.5; expected 0..1"),
        ({"form": "c"}, "form is 'c'; expected a, b"),
    ],
)
def test_bounds_hold_for_the_library_too(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Example(**wrong)  # type: ignore[arg-type]  # that is the point


def test_what_a_field_says_of_itself() -> None:
    found = {one.name: one for one in Example.knobs()}
    assert (found["num_items"].flag, found["form"].flag) == ("--num-items", "--the-form")
    assert (found["wait_seconds"].kind, found["wait_seconds"].default) == ("float", None)
    assert "secret" not in repr(Example(key="secret"))
