"""Console transcripts in Markdown pages: what is typed, and what must be seen.

A block of the language `console` holds commands, `$ command` (continued by lines `> …`, as bash shows them), each
followed by what is seen, standard output and error together. Nothing after a command means that nothing is seen.

- `...` in a line stands for any text; alone in a line, for any lines.
- Spaces compare as any run of spaces: widths of columns vary.
- Numbers that vary between runs and machines compare as any of their kind: those with a decimal point, of ten or more
  (hexadecimal) digits, before `ms`, `s` or a unit per second, and dates with times. All others compare as written.
- `^C` is Ctrl-C, typed once everything above it has been seen.
- What follows `[y/N]: ` is typed as the answer.
- Standard input, output and error are a terminal of 120 columns; colours do not count.
- A command exits with 0, unless `echo $?` is the next.
- `preread serve` and `preread encode-worker` keep running, as in a terminal next to the others: only what follows them
  must have been seen. Another one of the same kind replaces them, so that they may have the same ports.
- Blocks of a page run in order, in one directory. `<!-- console … -->` is a block that readers do not see.
- A block of another language after the line `<!-- NAME -->` is the file of that name.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SERVERS = ("serve", "encode-worker")
_FENCE = re.compile(r"^(?P<fence>```+)(?P<language>\w*)\s*$|^(?P<hidden><!-- console)$")
_FILE = re.compile(r"<!-- ([\w-]+\.\w+) -->")
_ANSWERED = re.compile(r"(.*\[y/N\]: )(\w+)$")
_SPAN = re.compile(r"(?<!`)`((?:preread|curl|grpcurl)\s[^`]*)`(?!`)")
_COMMANDS = ("preread", "curl", "grpcurl")
# What varies, and as what it compares. The order counts: the first that matches a place is taken.
_VARYING = (
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.\d]*)?(?:\+00:00|Z)?",
    r"(?<![\w])[0-9a-f]{10,}(?![\w])",
    r"[-+−]?\d[\d,]*\.\d+(?:e-?\d+)?",
    r"\d[\d,]*(?= (?:ms|s)\b| \w+/s)",
)
_TOKEN = re.compile(
    "|".join([r"(?P<any>\.\.\.)", r"(?P<space> +)", *(f"(?P<v{n}>{one})" for n, one in enumerate(_VARYING))])
)


@dataclass
class Step:
    """A command and the lines that must be seen after it."""

    command: str
    line: int
    after: list[str] = field(default_factory=list)

    @property
    def server(self) -> str | None:
        """Which server it starts, if it starts one."""
        named = (next((word for word in words[1:] if word[0] != "-"), "") for words in typed(self.command))
        return next((name for name in named if name in SERVERS), None)

    @property
    def seen(self) -> list[str]:
        return [line for line in self.after if line != "^C"]

    @property
    def interrupted(self) -> list[list[str]]:
        """For every Ctrl-C the lines that are seen before it."""
        places = [place for place, line in enumerate(self.after) if line == "^C"]
        return [[line for line in self.after[:place] if line != "^C"] for place in places]

    @property
    def answers(self) -> list[str]:
        return [found[2] + "\n" for line in self.after if (found := _ANSWERED.match(line))]


@dataclass
class Block:
    """A block of a page; `language` is "span" for code within a sentence, and "" for an indented or unmarked one."""

    language: str
    line: int
    lines: list[str]
    file: str | None = None

    def steps(self) -> list[Step]:
        """What a console block types. Raises ValueError where it begins with something that is seen."""
        steps: list[Step] = []
        for number, line in enumerate(self.lines, self.line + 1):
            if line.startswith("$ "):
                steps.append(Step(line[2:], number))
            elif not steps:
                raise ValueError(f"line {number} is seen before anything is typed: {line!r}")
            elif line.startswith("> ") and not steps[-1].after:
                steps[-1].command += "\n" + line[2:]
            else:
                steps[-1].after.append(line)
        return steps

    def commands(self) -> Iterator[str]:
        """Commands of `preread`, `curl` and `grpcurl` in it, run or not."""
        if self.language == "console":
            yield from (step.command for step in self.steps())
            return
        for line in re.sub(r"\\\n\s*", "", "\n".join(self.lines)).split("\n"):
            if line.split(" ")[0] in _COMMANDS and line.split(" ")[1:]:
                yield line


def blocks(page: Path) -> list[Block]:
    """Every block and span of code of a page, in order."""
    found: list[Block] = []
    closing, prose = "", []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if closing:
            if line == closing:
                closing = ""
            else:
                found[-1].lines.append(line)
        elif opened := _FENCE.match(line):
            found += _spans(prose)
            named = _FILE.fullmatch(prose[-1][1]) if prose else None
            closing, prose = opened["fence"] or "-->", []
            language = opened["language"] or ("console" if opened["hidden"] else "")
            found.append(Block(language, number, [], file=named[1] if named else None))
        elif line.startswith("    "):
            found.append(Block("", number, [line.strip()]))
        else:
            prose.append((number, line))
    if closing:
        raise ValueError(f"{page.name}: the last block does not end")
    return found + list(_spans(prose))


def _spans(prose: list[tuple[int, str]]) -> Iterator[Block]:
    """Spans may go over the end of a line."""
    text = "\n".join(line for _, line in prose)
    for found in _SPAN.finditer(text):
        yield Block("span", prose[text[: found.start()].count("\n")][0], [found[1].replace("\n", " ")])


def typed(command: str) -> list[list[str]]:
    """The `preread …` commands in a line of bash, as lists of words."""
    lexer = shlex.shlex(
        re.sub(r"<<'?(\w+)'?\n.*\n\1", "", command, flags=re.DOTALL), posix=True, punctuation_chars=True
    )
    lexer.whitespace_split = True
    runs: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("();<>|&"):
            runs.append([])
        else:
            runs[-1].append(word)
    return [run[run.index("preread") :] for run in runs if "preread" in run[:2]]


def pattern(seen: Iterable[str], *, more: bool = False) -> re.Pattern[str]:
    """Matches a whole output that has these lines; with `more`, one that begins with them."""
    return re.compile("".join(map(_line, seen)) + (r"(?:.*\n)*" if more else "") + r"\Z")


def _line(line: str) -> str:
    if line.strip() == "...":
        return r"(?:.*\n)*?"
    if asked := _ANSWERED.match(line):  # what is typed is shown by a terminal only
        return _text(asked[1])
    return _text(line.rstrip()) + r" *\n"


def _text(line: str) -> str:
    written, end = "", 0
    for found in _TOKEN.finditer(line):
        kind = found.lastgroup or ""
        written += re.escape(line[end : found.start()])
        written += {"any": ".*", "space": " +"}.get(kind) or _VARYING[int(kind[1:])]
        end = found.end()
    return written + re.escape(line[end:])
