"""The run folder, the only interface between stages: recipe, record, metrics, checkpoint, delta, model card.

| file | what |
|---|---|
| `recipe.yaml` | the whole recipe, defaults filled in |
| `run.json` | status, seeds, versions, fingerprints, noise, seconds, tokens per second, peak memory |
| `metrics.jsonl` | a line every `log_every` steps |
| `checkpoint.safetensors` | while unfinished: all that `--resume` needs |
| `delta.safetensors` | the changed tensors; `snapshots/step-N.safetensors` earlier ones, when asked for |
| `README.md` | the model card |
| `scores.json`, `records.jsonl`, `evaluation.json` | after `unlearn eval`: the latest; all are in `evaluations` |

Of a run that was trained beside others, seconds of training are its own work and its even share of what was done once
for several (`train.ledger`); they are not what it would take alone.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.recipe import Recipe, load_recipe
from robust_unlearning.run.card import model_card

Status = Literal["running", "finished", "failed", "stopped"]
RECIPE, SCORES = files.RECIPE, files.SCORES
RECORD, METRICS, CHECKPOINT, CARD = "run.json", "metrics.jsonl", "checkpoint.safetensors", "README.md"


@dataclass
class RunFolder:
    """One run on disk."""

    path: Path
    recipe: Recipe

    @classmethod
    def open(cls, path: Path, recipe: Recipe, *, resume: bool = False) -> RunFolder:
        """Begin a run in `path`, or with `resume` continue the one that is there.

        Raises:
            UserError: the folder holds something else, another recipe, or an unfinished run and no `resume`.
        """
        run = cls(path, recipe)
        if path.exists() and not path.is_dir():
            raise UserError(f"{str(path)!r} is a file; name a folder for the run.")
        if not path.exists() or {each.name for each in path.iterdir()} <= {RECIPE}:  # new, or a start that failed
            path.mkdir(parents=True, exist_ok=True)
            files.write_text(path / RECIPE, recipe.as_yaml())
            return run
        if not (path / RECIPE).exists():
            raise UserError(f"{str(path)!r} is not empty and holds no run; name another --out.")
        there = load_recipe(path / RECIPE)
        if there.content_hash() != recipe.content_hash():
            ours, theirs = recipe.model_dump(mode="json"), there.model_dump(mode="json")
            differing = ", ".join(f"{key} ({theirs[key]!r} there)" for key in ours if ours[key] != theirs[key])
            raise UserError(f"{str(path)!r} holds a run of another recipe: {differing}. Name another --out.")
        if not resume and run.status != "finished":
            raise UserError(f"{str(path)!r} holds an unfinished run; add --resume to continue it.")
        return run

    @property
    def record(self) -> dict[str, Any]:
        """What `run.json` says; empty before the first write."""
        return files.read_json(self.path / RECORD) if (self.path / RECORD).exists() else {}

    @property
    def status(self) -> Status | None:
        """The run's status, None before it started."""
        return self.record.get("status")

    @property
    def checkpoint(self) -> Path:
        """Where the resumable checkpoint lies while the run is unfinished."""
        return self.path / CHECKPOINT

    def snapshot(self, step: int) -> Path:
        """Where the delta of an earlier step is kept."""
        return self.path / "snapshots" / f"step-{step}.safetensors"

    def write_record(self, status: Status, **entries: Any) -> None:
        """Merge `entries` into `run.json`; an earlier error is forgotten."""
        kept = {key: value for key, value in self.record.items() if key != "error"}
        files.write_json(self.path / RECORD, {**kept, "status": status, **entries})

    def rows(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`; a last line cut off by a kill is left out."""
        path = self.path / METRICS
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def drop_rows_after(self, step: int) -> None:
        """Forget metrics of steps that a resumed run will take again."""
        files.write_jsonl(self.path / METRICS, [row for row in self.rows() if row["step"] <= step])

    def add_row(self, row: dict[str, Any]) -> None:
        """Append a row to `metrics.jsonl`."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write_card(self) -> None:
        """Write the model card from what the folder holds."""
        files.write_text(self.path / CARD, self.card())

    def card(self) -> str:
        """The model card, of what the folder holds now."""
        scores = files.read_json(self.path / SCORES) if (self.path / SCORES).exists() else {}
        return model_card(self.recipe, self.record, scores)


def open_run(path: str | Path) -> RunFolder:
    """The run in an existing folder.

    Raises:
        UserError: the folder holds no run.
    """
    folder = files.locate(path)
    if not (folder / RECIPE).exists():
        raise UserError(f"{str(path)!r} holds no {RECIPE}, so it is no run folder.")
    return RunFolder(folder, load_recipe(folder / RECIPE))


def environment(device: str) -> dict[str, str]:
    """Versions and hardware a record needs."""
    import safetensors
    import torch
    import transformers

    from robust_unlearning import __version__

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "cpu"
    return {
        "robust_unlearning": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "platform": platform.platform(),
        "device": f"{device} ({name})",
        "threads": str(torch.get_num_threads()),
    }


def peak_memory(device: str) -> dict[str, int]:
    """Peak memory so far, in bytes: the process's resident set, and what torch allocated on a GPU."""
    import torch

    scale = 1 if sys.platform == "darwin" else 1024
    peak = {"resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    if device.startswith("cuda"):
        peak["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return peak
