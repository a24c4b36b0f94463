"""lm-eval's tasks, groups and tags by name.

lm-eval parses all of its YAML files (more than ten thousand) to know their names. Here only the lines that name
something are read, and a file is parsed where they are not plain: the same index in a third of the time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from robust_unlearning import files
from robust_unlearning.errors import UserError, nearest

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

NAMING = ("task", "group", "tag", "class", "include")
_LINE = re.compile(rf"""^["']?({"|".join(NAMING)})["']?[ ]*:[ ]*(.*?)[ ]*$""", re.MULTILINE)
_PLAIN = re.compile(r"""[\w./+-]+|"[\w./+ -]+"|'[\w./+ -]+'""")


def shipped_tasks() -> Path:
    """The folder of this package's own task YAMLs."""
    return files.package_dir() / "assets" / "tasks"


def shipped_groups() -> dict[str, str]:
    """The groups and tasks of this package, and what they are."""
    groups = {}
    for path in sorted(shipped_tasks().glob("*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        groups[config.get("group") or config["task"]] = config["metadata"]["about"]
    return groups


def is_task_file(path: Path) -> bool:
    """Whether a YAML file is a task or group of lm-eval rather than a suite."""
    return bool({key for key, _ in _LINE.findall(path.read_text(encoding="utf-8"))} & {"task", "group", "include"})


def task_manager(include_paths: Iterable[Path] = ()) -> TaskManager:
    """lm-eval's task manager with its own tasks, those of this package, and those of `include_paths`.

    Later ones take the place of earlier ones of their name.

    Raises:
        UserError: lm-eval is not installed, or one of the paths is no folder.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            "tasks of lm-evaluation-harness need the package lm-eval: pip install 'robust-unlearning[eval]'."
        ) from error
    folders = [shipped_tasks(), *include_paths]
    for folder in folders:
        if not files.locate(folder).is_dir():
            raise UserError(f"--include-path {str(folder)!r} is a file; name the folder that holds it.")
    manager = TaskManager(include_defaults=False, include_path=list(folders))
    manager.task_index.update({**_lm_eval_index(), **manager.task_index})
    return manager


def check_names(names: Iterable[str], manager: TaskManager, suites: Iterable[str]) -> None:
    """See that each name is a task, group or tag, or a task's YAML file.

    Raises:
        UserError: one is not; the message has the nearest name among tasks and suites.
    """
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            close = nearest(name, {*manager.task_index, *suites})
            hint = f": did you mean {close!r}?" if close else "."
            raise UserError(
                f"unknown task {name!r}{hint} Allowed: the suites {', '.join(suites)}, the groups "
                f"{', '.join(shipped_groups())}, every task of lm-evaluation-harness (lm-eval ls tasks), and YAML "
                "files of suites or tasks."
            )


@lru_cache(maxsize=1)
def _lm_eval_index() -> dict[str, Any]:
    """Name -> lm-eval's own index entry, for the tasks that come with it."""
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex

    index: dict[str, Any] = {}
    seen: dict[Path, dict[str, Any]] = {}
    for path in TaskIndex._iter_yaml_files(Path(lm_eval.tasks.__file__).parent):
        try:
            TaskIndex.process_cfg(_names_in(path, seen), path, index)
        except (OSError, ValueError, KeyError, yaml.YAMLError):
            continue  # lm-eval skips what it cannot read, too
    return index


def _names_in(path: Path, seen: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """The naming keys of a YAML file, with those that it includes."""
    if path in seen:
        return seen[path]
    lines = dict(_LINE.findall(path.read_text(encoding="utf-8")))
    names: dict[str, Any] = {key: text.strip("\"'") for key, text in lines.items() if _PLAIN.fullmatch(text)}
    if "group" in names and "task" in lines:
        names["task"] = []  # a group's members do not name it
    if names.keys() != lines.keys():
        from lm_eval.tasks._yaml_loader import load_yaml

        config = load_yaml(path, resolve_func=False, recursive=False)
        names = {key: config[key] for key in NAMING if key in config}
    included = names.pop("include", [])
    inherited: dict[str, Any] = {}
    for each in [included] if isinstance(included, str) else included:
        inherited |= _names_in((path.parent / each).resolve(), seen)
    seen[path] = inherited | names
    return seen[path]
