"""The shape of the package: import order, sizes, light start, documents that match the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from robust_unlearning import files
from robust_unlearning.recipe import recipe_names, recipe_path

PACKAGE = files.package_dir()
ROOT = Path(__file__).parent.parent
# fmt: off
ORDER = [
    "errors", "files", "launch", "distributed", "layers", "losses", "lm_head", "noise", "methods", "recipe",
    "corpora", "questions", "scores", "score_table", "comparison", "answers", "compare", "perturb", "prefix_tree",
    "perturbed", "likelihood", "evaluate", "fast_lm", "task_data", "task_index", "harness", "conversion", "models",
    "band", "delta", "runs", "objective", "references", "candidate", "train", "targets", "analysis", "embedders",
    "ngrams", "progress", "report", "planner", "search", "sweep", "planted", "reproduce", "demo", "commands", "cli",
]
# fmt: on


def _imports(path: Path) -> set[str]:
    """Modules of this package that a file imports at its top level."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module == "robust_unlearning":
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("robust_unlearning."):
            found.add(str(node.module).split(".")[1])
    return found


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_those_above_it(name: str) -> None:
    single = PACKAGE / f"{name}.py"
    for path in [single] if single.exists() else sorted((PACKAGE / name).glob("*.py")):
        below = {each for each in _imports(path) if each in ORDER and ORDER.index(each) > ORDER.index(name)}
        assert not below, f"{path.name} imports {below}"


def test_every_module_has_its_place_in_the_order() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert modules | folders == set(ORDER)
    assert ", ".join(ORDER) in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_help_needs_no_heavy_library() -> None:
    script = (
        "import sys; from robust_unlearning.cli import main\n"
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
