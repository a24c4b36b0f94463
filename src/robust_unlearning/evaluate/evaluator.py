"""What can be evaluated (a run folder, a delta file, any model) and the files that an evaluation leaves.

Many deltas of one base are scored over one loaded model: each is put in place, scored, and taken out again.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_unlearning import files
from robust_unlearning.evaluate.harness import TaskSet
from robust_unlearning.evaluate.record import read_records
from robust_unlearning.evaluate.suite import Evaluation, Progress
from robust_unlearning.models import checkpoint
from robust_unlearning.parallel.processes import join
from robust_unlearning.recipe import Recipe
from robust_unlearning.run import delta as deltas
from robust_unlearning.run.delta import Delta
from robust_unlearning.run.folder import RECIPE, SCORES, environment, open_run

if TYPE_CHECKING:
    from torch import nn

RECORDS, ABOUT, KEPT = files.RECORDS, files.ABOUT, "evaluations"


@dataclass(frozen=True)
class Variant:
    """A base model, or a base model with a delta on top.

    Attributes:
        name: as the user gave it.
        base: the model's name.
        delta: what is put on top of it; None for the base itself.
        folder: where its scores go unless told otherwise; None for a bare model.
        options: `allow_pickle` and `trust_remote_code`, as its recipe or the user set them.
    """

    name: str
    base: str
    delta: Delta | None
    folder: Path | None
    options: dict[str, bool]

    def applied(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Its loaded base, with the delta in place inside the block and the base's own tensors afterwards."""
        return nullcontext(model) if self.delta is None else self.delta.applied(model)

    def recipe(self) -> Recipe | None:
        """What the delta was trained by; None for a base."""
        return None if self.delta is None else Recipe.model_validate(self.delta.provenance["recipe"])


def open_target(name: str, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Variant:
    """The model that a run folder, a delta file, a model folder, a GGUF file, a hub id or a bundled name means.

    Raises:
        UserError: a run folder without a delta, a file of another kind, a path where nothing is.
    """
    path = Path(name).expanduser()
    if checkpoint.is_path(name):
        files.locate(name)
    is_run = (path / RECIPE).exists()
    if not is_run and path.suffix != ".safetensors":
        options = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
        return Variant(name, name, None, None, options)
    delta = deltas.load_delta(path)
    recipe = delta.provenance["recipe"]
    options = {
        "allow_pickle": allow_pickle or recipe["allow_pickle"],
        "trust_remote_code": trust_remote_code or recipe["trust_remote_code"],
    }
    folder = path if is_run else path.with_suffix("")
    return Variant(name, delta.provenance["model"], delta, folder, options)


class Evaluator:
    """Scores models one after the other, loading a base only when it changes.

    Args:
        dtype: of the forward pass, `auto` for the checkpoint's own.
        device: `auto`, or a torch device.
        token_budget: tokens run at a time, see `likelihood.default_budget`.
    """

    def __init__(self, dtype: str = "auto", device: str = "auto", token_budget: int | None = None) -> None:
        self.dtype = dtype
        self.token_budget = token_budget
        self.processes = join(checkpoint.pick_device(device))
        self.device = self.processes.device
        self._loaded: tuple[str, checkpoint.Checkpoint, Any, Any] | None = None

    def _load(self, variant: Variant) -> tuple[checkpoint.Checkpoint, Any, Any]:
        if self._loaded is None or self._loaded[0] != variant.base:
            self._loaded = None  # free the old one before the new one comes
            base = checkpoint.resolve(variant.base, **variant.options)
            model = checkpoint.load_causal_lm(base, self.dtype, self.device)
            self._loaded = (variant.base, base, model, checkpoint.load_tokenizer(base))
        return self._loaded[1:]

    def _key(self, variant: Variant, task_set: TaskSet) -> str:
        """What an evaluation's result depends on, hashed: model, tasks and their files, type, budget, version."""
        digest = hashlib.sha256(task_set.fingerprint().encode())
        if variant.delta is not None:
            digest.update(variant.delta.digest().encode())
        else:  # a model folder may change under its name
            folder = checkpoint.resolve(variant.base, **variant.options).folder
            stats = {file.name: file.stat() for file in sorted(folder.glob("*.safetensors"))}
            digest.update(repr([(name, each.st_size, each.st_mtime_ns) for name, each in stats.items()]).encode())
        versions = environment(str(self.device))
        digest.update(json.dumps([variant.base, self.dtype, self.token_budget, versions["robust_unlearning"]]).encode())
        return digest.hexdigest()[:16]

    def evaluate(
        self,
        variant: Variant,
        task_set: TaskSet,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Score a model; with `folder`, write `scores.json`, `records.jsonl` and `evaluation.json` there.

        Every evaluation is kept in `folder`/evaluations by its key, and one that is there already is not run again;
        the three files of `folder` are those of the latest one asked for. The key covers the model, the tasks and
        their files, the type and this package's version. A run folder's model card is written again with its scores.

        Raises:
            UserError: the delta does not fit its base, or the tasks cannot be run.
        """
        if folder is None:
            return self._run(variant, task_set, progress)
        key = self.processes.on_rank_zero(lambda: self._key(variant, task_set))
        place = folder / KEPT / key
        if not self.processes.on_rank_zero((place / ABOUT).exists):
            result = self._run(variant, task_set, progress)
            about = {"key": key, "target": variant.name, "base": variant.base, "dtype": self.dtype, **task_set.about()}
            about["environment"] = environment(str(self.device))
            self.processes.on_rank_zero(lambda: _keep(place, result, about))
        return self.processes.on_rank_zero(lambda: _show(folder, place))

    def _run(self, variant: Variant, task_set: TaskSet, progress: Progress | None) -> Evaluation:
        base, model, tokenizer = self._load(variant)
        if variant.delta is not None:
            variant.delta.check_base(base)
        with variant.applied(model):
            return task_set.run(model, tokenizer, progress, self.token_budget, self.processes)


def _keep(place: Path, result: Evaluation, about: dict[str, Any]) -> None:
    """Write an evaluation into a folder of its own, what it is about last."""
    files.write_jsonl(place / RECORDS, (record.as_dict() for record in result.records))
    files.write_json(place / SCORES, result.scores)
    files.write_json(place / ABOUT, about)


def _show(folder: Path, place: Path) -> Evaluation:
    """Make a kept evaluation the one that a folder shows."""
    (folder / ABOUT).unlink(missing_ok=True)  # never a key beside another evaluation's scores
    for name in (RECORDS, SCORES, ABOUT):
        files.write_text(folder / name, (place / name).read_text(encoding="utf-8"))
    if (folder / RECIPE).exists():
        open_run(folder).write_card()
    return Evaluation(files.read_json(place / SCORES), read_records(place / RECORDS))
