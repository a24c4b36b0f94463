"""lm-evaluation-harness tasks for a perturbed set: one a subject, and a group that averages them by size.

Two styles, each asked exactly as lm-eval asks its own MMLU, so that the clean score and the perturbed one differ
in the perturbation only:

- letters: `mmlu`, zero-shot, the paper's form (Figure 6);
- continuation: `mmlu_continuation`, where the answer texts are scored, for models too small for letters. Its
  prompt does not show the options, so a keyword in place of one is never read before the right answer.

A task finds its data by an absolute path, which stands in one file, `tasks/_location_yaml`; `relocate` rewrites it
after the folder has been moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from robust_unlearning import files
from robust_unlearning.errors import UserError

TASKS = "tasks"
LOCATION = "_location_yaml"
ZERO_SHOT = {"num_fewshot": 0}  # else lm-eval would take its examples from the perturbed questions themselves
STYLES = {
    "letters": {
        "doc_to_text": (
            "{{question.strip()}}\n{% for choice in choices %}"
            "{{'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[loop.index0]}}. {{choice}}\n{% endfor %}Answer:"
        ),
        "doc_to_choice": "{{'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[:choices|length]|list}}",
    },
    "continuation": {"doc_to_text": "Question: {{question.strip()}}\nAnswer:", "doc_to_choice": "choices"},
}
METRICS = {"letters": ("acc",), "continuation": ("acc", "acc_norm")}
HEADS = {
    "letters": "The following are multiple choice questions (with answers){about}.\n\n",
    "continuation": "The following are questions (with answers){about}.\n\n",
}
VERSION = {"metadata": {"version": 1}}


def write_tasks(
    folder: Path, name: str, subjects: Mapping[str, str], control: bool, styles: Sequence[str], split: str, home: Path
) -> list[str]:
    """Write `folder/tasks` and return the groups' names.

    A group is called `NAME`, with `_control` and `_continuation` added where they apply; a task has its subject
    after NAME.

    Args:
        subjects: config of the data set -> its subject ('' if none).
        control: whether there is a second form, in configs named `CONFIG-control`.
        home: where the folder will lie.
    """
    tasks = folder / TASKS
    shared = {"include": LOCATION, "test_split": split, "output_type": "multiple_choice"}
    groups = []
    for style in styles:
        scored = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in METRICS[style]]
        asked = {**STYLES[style], "metric_list": scored, "doc_to_target": "answer"}
        _dump(tasks / f"_{style}_yaml", {**shared, **asked, **ZERO_SHOT, **VERSION})
        for form in ("", "_control")[: 1 + control]:
            place = tasks / (style + form)
            ending = form + ("_continuation" if style == "continuation" else "")
            note = f" ({ending[1:].replace('_', ', ')})" if ending else ""
            for config, subject in subjects.items():
                task = {"include": f"../_{style}_yaml", "task": f"{name}_{config}{ending}", "task_alias": config + note}
                task["dataset_name"] = config + form.replace("_", "-")
                about = f" about {subject.replace('_', ' ')}" if subject else ""
                _dump(place / f"{config}.yaml", {**task, "description": HEADS[style].format(about=about)})
            averaged = [{"metric": metric, "weight_by_size": True} for metric in METRICS[style]]
            groups.append(name + ending)
            group = {"group": groups[-1], "task": [f"{name}_{config}{ending}" for config in subjects]}
            _dump(place / "_group.yaml", {**group, "aggregate_metric_list": averaged, **VERSION})
    _dump(tasks / LOCATION, {"dataset_path": str(home.absolute())})
    return groups


def relocate(folder: Path) -> None:
    """Let the tasks of a perturbed set find their data where the folder lies now.

    Raises:
        UserError: the folder holds no such tasks.
    """
    if not (folder / TASKS / LOCATION).exists():
        raise UserError(f"{str(folder)!r} is no perturbed set: it has no {TASKS}/{LOCATION}.")
    files.write_text(folder / TASKS / LOCATION, _yaml({"dataset_path": str(folder.absolute())}))


def _dump(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_yaml(value), encoding="utf-8")


class _Dumper(yaml.SafeDumper):
    """Writes line breaks as \\n, so that a prompt's template stands in one line."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
