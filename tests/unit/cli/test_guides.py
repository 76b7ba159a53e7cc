"""What documents and messages tell people to type: each command and each option is there. And links lead somewhere.

What is between the words may be anything: the commands are parsed, not run. Decisions and the changelog are history."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from podwire.cli.main import main

ROOT = Path(__file__).parents[3]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = [path for path in DOCUMENTS if "decisions" not in path.parts and path.name != "cli.md"]
MODULES = sorted((ROOT / "src").rglob("*.py"))

_BLOCK = re.compile(r"^( *)```(?:sh|text)?\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"^    (podwire .*)$", re.MULTILINE)
_SPAN = re.compile(r"`(podwire [^`]+)`")
_BEFORE = {"--", "do", "if", "sudo", "then"}
"""Words behind which a command begins, beside the beginning of a line, a list or a pipe."""
_SEPARATES = re.compile(r"[;&|()<>]+")


def commands_of(text: str) -> Iterator[str]:
    """All podwire commands in a Markdown text, in blocks and in its sentences, less their redirections."""
    lines = [line for _, block in _BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    rest = _BLOCK.sub("", text)
    for line in (*lines, *_INDENTED.findall(rest), *_SPAN.findall(rest)):
        if "podwire " in line:
            yield from _in_line(re.sub(r"\s#.*", "", line))


def _in_line(line: str) -> Iterator[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    part: list[str] = []
    for word in (*lexer, ";"):
        if not _SEPARATES.fullmatch(word):
            part.append(word)
            continue
        for place, started in enumerate(part):
            if started == "podwire" and (place == 0 or part[place - 1] in _BEFORE):
                yield shlex.join(part[place:])
                break
        part = []


def what_is_wrong(line: str) -> str:
    """Why podwire has no such command; "" if it has."""
    words = shlex.split(line)[1:]
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        known = command.get_command(click.Context(command), words[0])
        if known is None:
            return f"{words[0]!r} is no command of {command.name}"
        command, words = known, words[1:]
    return _wrong_options(command, words[: words.index("--")] if "--" in words else words)


def _wrong_options(command: click.Command, words: list[str]) -> str:
    context = click.Context(command, info_name=command.name)
    if command.name == "exec":  # what comes behind TARGET is another program's
        context.allow_interspersed_args = False
    try:
        given, more, _ = command.make_parser(context).parse_args(words)
    except click.BadOptionUsage:  # an option named without its value
        return ""
    except click.UsageError as error:
        return error.format_message()
    if any(word != "…" for word in more):
        return f"{more} is too much"
    for parameter in command.params:
        value, choice = given.get(str(parameter.name)), parameter.type
        if isinstance(choice, click.Choice) and isinstance(value, str) and value.islower() and value not in choice.choices:
            return f"{value!r} is none of {choice.choices}"
    return ""


FOUND = sorted({(str(path.relative_to(ROOT)), line) for path in GUIDES for line in commands_of(path.read_text())})


@pytest.mark.parametrize(("where", "line"), FOUND)
def test_the_documents_commands_are_there(where: str, line: str) -> None:
    assert not what_is_wrong(line), f"{where}: {line}: {what_is_wrong(line)}"


def test_there_are_many() -> None:
    assert len(FOUND) > 100


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("podwire lab up --nodes 3 -f FILE", ""),
        ("podwire lab exec world -- ls -l", ""),
        ("podwire proxy --masquerade-all -v=4", ""),
        ("podwire lap up", "'lap' is no command"),
        ("podwire lab start", "'start' is no command"),
        ("podwire lab up --node-count 3", "No such option"),
        ("podwire lab up --ip-family ipx", "'ipx' is none of"),
        ("podwire ipam ls ADDRESS", "['ADDRESS'] is too much"),
    ],
)
def test_what_is_not_there_would_be_found(line: str, wrong: str) -> None:
    found = what_is_wrong(line)
    assert found.startswith(wrong) if wrong else not found


def test_messages_name_commands_that_are_there() -> None:
    for path in MODULES:
        text = re.sub(r"\{[^{}]*\}", "X", re.sub(r'"\s*\n\s*f?"', "", path.read_text()))
        for line in _SPAN.findall(text):
            assert not what_is_wrong(line), f"{path}: {line}: {what_is_wrong(line)}"


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "cli.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        linked = (path.parent / file) if file else path
        assert linked.exists(), f"{path.name} links to {target}"
        if heading:
            assert heading in _anchors(linked), f"{path.name} links to {target}"


def _anchors(path: Path) -> set[str]:
    """As GitHub names headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
