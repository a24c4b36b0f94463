"""The shape of the package: import order, sizes, light start, documents that match the code."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from robust_unlearning import files
from robust_unlearning.cli.main import main
from robust_unlearning.recipe import recipe_names, recipe_path

PACKAGE = files.package_dir()
ROOT = Path(__file__).parent.parent
# fmt: off
ORDER = [
    "errors", "files", "parallel", "stats", "models", "methods", "losses", "recipe", "data", "run", "train", "perturb",
    "evaluate", "results", "report", "analyze", "plan", "planted", "experiments", "reproduce", "cli",
]
# fmt: on
"""The rooms of the package. A room imports only those before it, inside functions too."""


def _imports(path: Path) -> set[str]:
    """Rooms of this package that a file imports, wherever in the file."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "robust_unlearning":
            rooms |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("robust_unlearning."):
            rooms.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {each.name.split(".")[1] for each in node.names if each.name.startswith("robust_unlearning.")}
    return rooms


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_those_before_it(room: str) -> None:
    single = PACKAGE / f"{room}.py"
    for path in [single] if single.exists() else sorted((PACKAGE / room).rglob("*.py")):
        later = {name for name in _imports(path) if name in ORDER and ORDER.index(name) > ORDER.index(room)}
        assert not later, f"{path.relative_to(PACKAGE)} imports {later}"


def test_the_root_holds_the_rooms_and_nothing_else() -> None:
    entries = {path.stem for path in PACKAGE.iterdir()} - {"__init__", "__main__", "__pycache__", "py"}
    assert entries == {*ORDER, "assets"}
    assert len(entries) <= 22


def test_every_data_file_lies_in_assets() -> None:
    beside = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    code = {path for path in beside if path.suffix == ".py" or path.name == "py.typed"}
    assert {path.parts[0] for path in beside - code} == {"assets"}


def test_a_class_name_has_one_meaning() -> None:
    names = Counter(
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in names.items() if count > 1]


def test_no_file_passes_400_lines() -> None:
    files_of_both = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files_of_both}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_the_architecture_page_names_every_room_and_only_files_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    listed = [name.rstrip("/").removesuffix(".py") for row in rooms for name in re.findall(r"`([^`]+)`", row)]
    assert listed == [room for room in [*ORDER, "assets"] if room != "losses"]
    paths = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", text)) - {"tests/test_structure.py"}
    assert not [path for path in paths if not (PACKAGE / path).exists()]
    order = ", ".join(room for room in ORDER if room != "losses")
    assert order in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_installed_command_is_a_function() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, name = scripts["unlearn"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


@pytest.mark.integration
def test_help_needs_no_heavy_library() -> None:
    script = (
        "import sys; from robust_unlearning.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'datasets'} & sys.modules.keys()\n"
        "sys.exit(1 if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "unlearn apply" in done.stdout


def test_a_recipe_says_what_it_is_and_how_to_run_it() -> None:
    for name in recipe_names():
        text = recipe_path(name).read_text(encoding="utf-8")
        assert f"unlearn run {name}" in text, name
