"""What the documents for operators name is there, and what they have to know of is named."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from server.cli import app
from server.config import ServeConfig
from server.gateway import create_app
from server.settings import _OWN_KEYS, CONFIG_KEYS
from server.telemetry.config import TRACES_PATH
from tests.unit.server.scripted import services_of

ROOT = Path(__file__).parents[3]
NAMES = ("README.md", "deploy/README.md", "deploy/RUNBOOK.md", "deploy/METRICS.md")
DOCUMENTS = {name: (ROOT / name).read_text() for name in NAMES}
README = DOCUMENTS["README.md"]
VARIABLES = {*CONFIG_KEYS, *_OWN_KEYS}
COMMANDS = typer.main.get_command(app)
CALLED = r"(?:^|/|(?<!-n)\s|\()darkroom "
"""The command's name before a command; not that of a namespace (``kubectl -n darkroom``)."""


def code(text: str) -> Iterator[str]:
    """Everything that is set as code: in backticks, in fences, or indented."""
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        yield from block.splitlines()
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", text)
    yield from re.findall(r"^    (.+)$", text, re.MULTILINE)


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a configuration; those of lists as of one."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in inner_sections(field.annotation):
            yield from keys_of(inner, f"{prefix}{name}.")


def inner_sections(annotation: Any) -> list[type[BaseModel]]:
    parts = [annotation, *getattr(annotation, "__args__", ())]
    return [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


def commands_of(command: Any) -> dict[str, Any]:
    """Those below a command; none below one that has none. Typer brings a click of its own."""
    return getattr(command, "commands", {})


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_are_named_exist(name: str) -> None:
    known = set(keys_of(ServeConfig))
    sections = "|".join(sorted({key.partition(".")[0] for key in known}))
    named = {
        key.replace("[]", "")
        for text in code(DOCUMENTS[name])
        for key in re.findall(rf"(?<![\w./-])(?:{sections})(?:\[\])?(?:\.[a-z_]+)+(?![\w(/])", text)
        if not key.endswith((".md", ".py", ".yaml", ".yml", ".json"))
    }
    assert named - known == set()
    assert len(named) >= {"README.md": 5, "deploy/README.md": 5}.get(name, 0)


@pytest.mark.parametrize("name", NAMES)
def test_commands_that_are_named_exist(name: str) -> None:
    for text in code(DOCUMENTS[name]):
        for words in re.findall(rf"{CALLED}((?:[a-z|-]+ ?)+)", text):
            first, *rest = words.split()
            if first.startswith("-"):
                continue
            assert first in commands_of(COMMANDS), text
            below = commands_of(commands_of(COMMANDS)[first])
            for second in rest[0].split("|") if rest and below else ():
                assert second.startswith("-") or second in below, text


@pytest.mark.parametrize("name", NAMES)
def test_flags_of_commands_that_are_named_exist(name: str) -> None:
    for text in code(DOCUMENTS[name]):
        found = re.search(rf"{CALLED}([a-z]+)(?: ([a-z]+))?(.*)", text)
        if found is None:
            continue
        command = commands_of(COMMANDS)[found[1]]
        command = commands_of(command).get(found[2] or "", command)
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        for flag in re.findall(r"(?<=\s)--[a-z][a-z-]+", found[3]):
            assert flag in known | {"--help"}, text


def test_variables_are_those_of_the_table() -> None:
    table = README[README.index("## Settings") :]
    assert set(re.findall(r"`((?:DARKROOM|OTEL)_[A-Z_]+)`", table)) == VARIABLES
    shown = (ROOT / ".env.example").read_text()
    composed = "".join(path.read_text() for path in ROOT.glob("docker-compose*.yml"))
    for name, text in DOCUMENTS.items():
        for variable in re.findall(r"\bDARKROOM_[A-Z_]+\b", text.replace("DARKROOM_*", "")):
            assert variable in VARIABLES or variable in shown or variable in composed, name


def test_every_command_is_in_the_table() -> None:
    for command in commands_of(COMMANDS):
        assert f"| `darkroom {command}" in README


@pytest.mark.parametrize("name", NAMES)
def test_routes_that_are_named_exist(name: str) -> None:
    paths = {
        re.sub(r"\{\w+\}", "{}", path) for path in create_app(services_of()).openapi()["paths"]
    }
    for text in code(DOCUMENTS[name]):
        for path in re.findall(r"(?<![\w.])/(?:v1|sdapi/v1)/[\w/{}-]+", text):
            if path == TRACES_PATH:  # of the collector, not of ours
                continue
            wanted = re.sub(r"\{\w+\}|\bID\b", "{}", path.rstrip("/"))
            assert wanted in paths or any(known.startswith(wanted + "/") for known in paths), path


@pytest.mark.parametrize("name", NAMES)
def test_modules_and_targets_that_are_named_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in code(DOCUMENTS[name]):
        for module in re.findall(r"python -m ([\w.]+)", text):
            assert importlib.util.find_spec(module) is not None, module
        for target in re.findall(r"(?:^|\s)make ([a-z-]+)", text):
            assert target in targets, target
