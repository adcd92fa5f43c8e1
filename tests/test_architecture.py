"""The house rules of DESIGN 2, read from the source: who imports whom, how long files are, what help costs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ortho_cli

ROOT = Path(ortho_cli.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))
MAX_LINES = 400
REASONED_LINES = 300
# Rooms from the ground up; a room imports from those below it, never from one on its own floor.
FLOORS = (
    {"errors"},
    {"registry"},
    {"recipe", "linalg"},
    {"checkpoints"},
    {"methods", "models"},
    {"surgery", "tasks", "analysis"},
    {"training"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {"torch", "numpy", "pydantic", "accelerate", "transformers", "diffusers", "peft", "matplotlib", "plotly"}
MAY_IMPORT_TORCH = {"linalg", "methods", "models", "tasks", "training", "analysis"}
MAY_IMPORT_ACCELERATE = {"training"}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "core", "misc"}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0].removesuffix(".py")


def imports_of(path: Path, *, top_level: bool = False) -> list[tuple[str, int]]:
    """Absolute names of imported modules with their lines; relative imports resolved, TYPE_CHECKING blocks left out."""
    tree = ast.parse(path.read_text("utf-8"))
    package = ["ortho_cli", *path.relative_to(ROOT).parts[:-1]]
    found: list[tuple[str, int]] = []

    def visit(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import) and not (top_level and inside):
                found.extend((alias.name, child.lineno) for alias in child.names)
            if isinstance(child, ast.ImportFrom) and not (top_level and inside):
                base = package[: len(package) - child.level + 1] if child.level else []
                stem = ".".join([*base, *([child.module] if child.module else [])])
                found.append((stem, child.lineno))
                if stem in ("ortho_cli", ".".join(package)):
                    found.extend((f"{stem}.{alias.name}", child.lineno) for alias in child.names)
            visit(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(tree, False)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_downwards_only(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":  # the table of contents imports lazily, from everywhere
        return
    assert room in FLOOR, f"{room} stands in no floor of the house"
    for name, line in imports_of(path):
        parts = name.split(".")
        if parts[0] != "ortho_cli" or len(parts) < 2 or parts[1].startswith("__"):
            continue
        other = parts[1]
        assert other == room or FLOOR[other] < FLOOR[room], f"{path}:{line}: {room} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_modules_load_only_where_they_work(path: Path) -> None:
    room = room_of(path)
    for name, line in imports_of(path, top_level=True):
        top = name.split(".")[0]
        allowed = (top in ("torch", "numpy") and room in MAY_IMPORT_TORCH) or (top == "pydantic" and room == "recipe")
        allowed = allowed or (top == "accelerate" and room in MAY_IMPORT_ACCELERATE)
        assert top not in HEAVY or allowed, f"{path}:{line} imports {top} before it is needed"


def test_files_have_one_idea_each() -> None:
    for path in FILES:
        text = path.read_text("utf-8")
        lines = text.count("\n")
        assert lines <= MAX_LINES, f"{path} has {lines} lines"
        if lines > REASONED_LINES:
            assert re.search(r"(?i)over 300 lines", text), f"{path} has {lines} lines and gives no reason"
        assert path.stem not in FORBIDDEN_NAMES, path


def test_every_module_says_what_it_is() -> None:
    for path in FILES:
        if path.read_text("utf-8").strip():
            assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path


def test_the_public_names_are_sorted_and_exist() -> None:
    assert sorted(ortho_cli.__all__) == ortho_cli.__all__
    assert set(ortho_cli.__all__) == set(ortho_cli._API)
    for name in ortho_cli.__all__:
        assert getattr(ortho_cli, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ortho_cli.nonsense  # noqa: B018


def test_registry_entries_resolve() -> None:
    from ortho_cli.errors import UsageError
    from ortho_cli.registry import TABLES, names, resolve

    for table in TABLES:
        for name in names(table):
            assert resolve(table, name) is not None
    with pytest.raises(UsageError, match="no dialect 'keft'") as caught:
        resolve("dialects", "keft")
    assert "did you mean 'peft'" in str(caught.value.hint)


VERBS = [
    [], ["inspect"], ["add-hra"], ["factorize"], ["merge"], ["unmerge"], ["combine"], ["convert"], ["train"],
    ["sweep"], ["evaluate"], ["generate"], ["extract"], ["doctor"], ["demo"],
    ["bench"], ["bench", "surgery"], ["bench", "gor"], ["bench", "hra"],
    ["bench", "frobenius"], ["bench", "factorize"], ["bench", "polar"], ["bench", "stability"], ["bench", "oialr"],
    ["bench", "whiten"], ["bench", "nog"], ["bench", "geometry"], ["bench", "llm"],
    ["analyze"], ["analyze", "runs"], ["analyze", "spectrum"], ["analyze", "stability"],
    ["analyze", "orthogonality"], ["analyze", "adapter"], ["analyze", "conditioning"],
    ["recipe"], ["recipe", "list"], ["recipe", "show"], ["recipe", "check"], ["recipe", "schema"], ["recipe", "copy"],
]  # fmt: skip


def test_every_verb_is_in_the_list_above() -> None:
    from ortho_cli.cli.app import app

    groups = {group.name: group.typer_instance for group in app.registered_groups}
    commands = [[command.name] for command in app.registered_commands]
    for name, group in groups.items():
        assert group is not None
        named = [(command.name, command.callback) for command in group.registered_commands]
        commands += [[name], *([name, own or callback.__name__] for own, callback in named if callback is not None)]
    assert sorted(map(str, [[], *commands])) == sorted(map(str, VERBS))


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_loads_nothing_heavy(verb: list[str]) -> None:
    script = (
        "import json, sys\n"
        "from ortho_cli.cli.app import app\n"
        "try:\n    app(sys.argv[1:], prog_name='ortho')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "sys.stderr.write(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *verb, "--help"], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stderr)}
    assert not loaded & (HEAVY | {"yaml", "huggingface_hub", "safetensors", "sklearn"})
    assert "Usage: ortho" in done.stdout
    if verb not in ([], ["recipe"], ["bench"], ["analyze"]):
        assert "Example" in done.stdout or verb[0] == "recipe"
