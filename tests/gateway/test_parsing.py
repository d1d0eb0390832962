"""Laws of JSON in steps: as json reads and writes it, however it is cut; and no step is long."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import pytest

from decoder_server.edge.http import json_steps
from preread.errors import InvalidRequest
from preread_edge.steps import SMALL_BYTES, stepped

BITS = ("a", '"', "\\", "\n", "é", "中", "😀", "\ud800", "\udc00", "{", "[", ",", ":", "/", " ", "\\u", "\x7f")
DAMAGE = b'"\\[]{},: \xff\x00audc0\n'


def text(rng: random.Random) -> str:
    return "".join(rng.choice(BITS) for _ in range(rng.choice([0, 1, 3, 10, 60, 300])))


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if kind < 0.5 or depth > 4:
        return rng.choice([text(rng), text(rng), rng.randint(-5, 10**12), rng.random(), None, True])
    if kind < 0.75:
        return [value(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 5, 20]))]
    return {text(rng): value(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 5]))}


def damaged(rng: random.Random, data: bytes) -> bytes:
    broken = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(broken))
        cut = rng.choice([0, 1])
        broken[at : at + cut] = rng.choice([b"", bytes([rng.choice(DAMAGE)])]) if len(broken) > 1 else b"0"
    return bytes(broken)


def nothing() -> None:
    """No rest between steps."""


@pytest.mark.parametrize("block", [32, 40, 101, 1000])
def test_a_document_is_what_json_reads(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(json_steps, "BLOCK_BYTES", block)
    rng = random.Random(block)
    num_read = 0
    for _ in range(60 if block < 100 else 300):
        document = value(rng)
        data = json.dumps(document, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 0, 1])).encode(
            "utf-8", "surrogatepass"
        )
        data = damaged(rng, data) if rng.random() < 0.5 else data
        try:
            expected = json_steps.DECODER.decode(data.decode("utf-8", "surrogatepass"))
        except ValueError:
            with pytest.raises(InvalidRequest, match="expected JSON"):
                json_steps.parse_in_steps(nothing, data, "body")
            continue
        num_read += 1
        assert json_steps.parse_in_steps(nothing, data, "body") == expected
    assert num_read > 20


@pytest.mark.parametrize("block", [1, 7, 64])
def test_a_document_is_written_as_json_writes_it(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(json_steps, "BLOCK_BYTES", block)
    rng = random.Random(block)
    for _ in range(100):
        document = json.loads(json.dumps(value(rng)).replace("\\ud800", "x").replace("\\udc00", "y"))
        assert b"".join(json_steps.render_in_steps(nothing, document)) == json_steps.ENCODER.encode(document).encode()
    with pytest.raises(ValueError, match="JSON compliant"):
        json_steps.render_in_steps(nothing, [float("nan")])


def test_a_nested_document_is_written_in_few_pieces_however_deep() -> None:
    deep: Any = [1] * 2000
    for _ in range(90):
        deep = [deep, 1]
    for document in (
        [{"a": [[1]] * 100} for _ in range(500)],
        [deep] * 20,
        {str(i): {"b": [i]} for i in range(50_000)},
    ):
        found = list(json_steps.pieces(document))
        assert "".join(found) == json_steps.ENCODER.encode(document)
        assert len(found) < 110_000
        assert max(map(len, found)) <= json_steps.BLOCK_BYTES + 20 * json_steps.SHORT_VALUES


MIB = 1 << 20
# Each of 8 MiB.
FINE = {
    "plain": b'{"query": "' + b"some words " * (8 * MIB // 11) + b'"}',
    "escapes": b'["' + b"\\n" * (4 * MIB) + b'"]',
    "pairs of escapes": b'["' + b"\\ud83d\\ude00" * (8 * MIB // 12) + b'"]',
    "quotes": b'["' + b'\\"' * (4 * MIB) + b'"]',
    "backslashes": b'["' + b"\\\\" * (4 * MIB) + b'"]',
    "three bytes": b'["' + "中".encode() * (8 * MIB // 3) + b'"]',
    "four bytes": b'["' + "😀".encode() * (2 * MIB) + b'"]',
    "a name": b'{"' + b"\\u4e2d" * (8 * MIB // 6) + b'": 1}',
    "many texts": b"[" + b",".join([b'"' + b"words " * 1400 + b'"'] * 1000) + b"]",
    "space": b"[" + b" " * (8 * MIB) + b"1]",
    "numbers": b"[" + b"0," * 400_000 + b"1]",
}
REFUSED = {
    "nested": b"[" * (8 * MIB),
    "arrays": b"[" + b"[]," * (8 * MIB // 3) + b"1]",
    "objects": b"[" + b'{"a":{}},' * (8 * MIB // 9) + b"1]",
    "one number": b"[" + b"1" * (8 * MIB) + b"]",
    "zeros": b"\x00" * (8 * MIB),
    "no end": b'["' + b"a" * (8 * MIB),
}


def longest_step(data: bytes) -> tuple[Any, float]:
    """What was read, None where it was refused; and the longest step, in processor time."""
    longest, last = 0.0, time.thread_time()

    def step() -> None:
        nonlocal longest, last
        longest, last = max(longest, time.thread_time() - last), time.thread_time()

    try:
        document = json_steps.parse_in_steps(step, data, "body")
    except InvalidRequest as exc:
        document = None
        longest = max(longest, len(str(exc)) / 500)
    step()
    return document, longest


@pytest.mark.parametrize("data", FINE.values(), ids=FINE)
def test_no_step_is_long(data: bytes) -> None:
    document, longest = longest_step(data)
    assert document == json.loads(data)
    assert longest < 0.5


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_what_would_be_too_much_is_refused_before_it_is_read(data: bytes) -> None:
    document, longest = longest_step(data)
    assert document is None
    assert longest < 0.5, "or the message is long"


async def test_the_loop_goes_on_meanwhile_and_work_for_nobody_ends() -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def endless(step: Any) -> None:
        try:
            while True:
                sum(range(1000))
                step()
        finally:
            loop.call_soon_threadsafe(ended.set)

    work = asyncio.ensure_future(stepped(endless))
    await asyncio.sleep(0.05)
    short = await stepped(lambda step: "done")
    assert short == "done"
    work.cancel()
    await asyncio.wait_for(ended.wait(), 10)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"top_n": %s}' % (b"9" * 5000), "a number of too many digits"),
        (b'{"query": "a\xff"}', "bytes that are not utf-8, from byte"),
        (b'{"query": NaN}', "NaN is not JSON"),
    ],
)
@pytest.mark.parametrize("is_large", [False, True])
async def test_a_reason_is_no_text_of_an_exception(content: bytes, says: str, is_large: bool) -> None:
    content = content + b" " * SMALL_BYTES if is_large else content
    with pytest.raises(InvalidRequest) as refused:
        await json_steps.parse(content)
    assert says in str(refused.value)
    assert "sys." not in str(refused.value)
    assert "codec" not in str(refused.value)
