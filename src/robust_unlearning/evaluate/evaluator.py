"""What can be evaluated (a run folder, a delta file, any model) and the files that an evaluation leaves.

Many deltas of one base are scored over one loaded model: each is put in place, scored, and taken out again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_unlearning import files
from robust_unlearning.evaluate.record import Record
from robust_unlearning.evaluate.suite import Evaluation, Plan
from robust_unlearning.models import checkpoint
from robust_unlearning.parallel.processes import join
from robust_unlearning.run import delta as deltas
from robust_unlearning.run.delta import Delta
from robust_unlearning.run.folder import RECIPE, SCORES, environment, open_run

RECORDS, ABOUT, KEPT = files.RECORDS, "evaluation.json", "evaluations"


@dataclass(frozen=True)
class Target:
    """A base model with or without a delta.

    Attributes:
        name: as the user gave it.
        base: the model's name.
        delta: what is put on top of it.
        folder: where its scores go unless told otherwise; None for a bare model.
        options: `allow_pickle` and `trust_remote_code`, as its recipe or the user set them.
    """

    name: str
    base: str
    delta: Delta | None
    folder: Path | None
    options: dict[str, bool]


def open_target(name: str, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Target:
    """The target that a run folder, a delta file, a model folder, a GGUF file, a hub id or a bundled name means.

    Raises:
        UserError: a run folder without a delta, a file of another kind, a path where nothing is.
    """
    path = Path(name).expanduser()
    if checkpoint.is_path(name):
        files.locate(name)
    is_run = (path / RECIPE).exists()
    if not is_run and path.suffix != ".safetensors":
        options = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
        return Target(name, name, None, None, options)
    delta = deltas.load_delta(path)
    recipe = delta.provenance["recipe"]
    options = {
        "allow_pickle": allow_pickle or recipe["allow_pickle"],
        "trust_remote_code": trust_remote_code or recipe["trust_remote_code"],
    }
    folder = path if is_run else path.with_suffix("")
    return Target(name, delta.provenance["model"], delta, folder, options)


class Evaluator:
    """Scores targets one after the other, loading a base only when it changes.

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

    def _load(self, target: Target) -> tuple[checkpoint.Checkpoint, Any, Any]:
        if self._loaded is None or self._loaded[0] != target.base:
            self._loaded = None  # free the old one before the new one comes
            base = checkpoint.resolve(target.base, **target.options)
            model = checkpoint.load_causal_lm(base, self.dtype, self.device)
            self._loaded = (target.base, base, model, checkpoint.load_tokenizer(base))
        return self._loaded[1:]

    def _key(self, target: Target, plan: Plan) -> str:
        """What an evaluation's result depends on, hashed: target, plan and its files, type, budget, version."""
        digest = hashlib.sha256(plan.fingerprint().encode())
        if target.delta is not None:
            digest.update(target.delta.digest().encode())
        else:  # a model folder may change under its name
            folder = checkpoint.resolve(target.base, **target.options).folder
            stats = {file.name: file.stat() for file in sorted(folder.glob("*.safetensors"))}
            digest.update(repr([(name, each.st_size, each.st_mtime_ns) for name, each in stats.items()]).encode())
        versions = environment(str(self.device))
        digest.update(json.dumps([target.base, self.dtype, self.token_budget, versions["robust_unlearning"]]).encode())
        return digest.hexdigest()[:16]

    def evaluate(
        self,
        target: Target,
        plan: Plan,
        folder: Path | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Evaluation:
        """Score a target; with `folder`, write `scores.json`, `records.jsonl` and `evaluation.json` there.

        Every evaluation is kept in `folder`/evaluations by its key, and one that is there already is not run again;
        the three files of `folder` are those of the latest one asked for. The key covers the target, the plan and
        its files, the type and this package's version. A run folder's model card is written again with its scores.

        Raises:
            UserError: the delta does not fit its base, or the plan cannot be run.
        """
        if folder is None:
            return self._run(target, plan, progress)
        key = self.processes.on_first(lambda: self._key(target, plan))
        kept = folder / KEPT / key
        if not self.processes.on_first((kept / ABOUT).exists):
            result = self._run(target, plan, progress)
            about = {"key": key, "target": target.name, "base": target.base, "dtype": self.dtype, **plan.about()}
            about["environment"] = environment(str(self.device))
            self.processes.on_first(lambda: _keep(kept, result, about))
        return self.processes.on_first(lambda: _show(folder, kept))

    def _run(self, target: Target, plan: Plan, progress: Callable[[str, int, int], None] | None = None) -> Evaluation:
        base, model, tokenizer = self._load(target)
        if target.delta is None:
            return plan.run(model, tokenizer, progress, self.token_budget, self.processes)
        target.delta.check_base(base)
        with target.delta.applied(model):
            return plan.run(model, tokenizer, progress, self.token_budget, self.processes)


def _keep(kept: Path, result: Evaluation, about: dict[str, Any]) -> None:
    """Write an evaluation into a folder of its own, what it is about last."""
    files.write_jsonl(kept / RECORDS, (record.as_dict() for record in result.records))
    files.write_json(kept / SCORES, result.scores)
    files.write_json(kept / ABOUT, about)


def _show(folder: Path, kept: Path) -> Evaluation:
    """Make a kept evaluation the one that a folder shows."""
    (folder / ABOUT).unlink(missing_ok=True)  # never a key beside another evaluation's scores
    for name in (RECORDS, SCORES, ABOUT):
        files.write_text(folder / name, (kept / name).read_text(encoding="utf-8"))
    if (folder / RECIPE).exists():
        open_run(folder).write_card()
    with (kept / RECORDS).open(encoding="utf-8") as lines:
        records = [Record.from_dict(json.loads(line)) for line in lines]
    return Evaluation(files.read_json(kept / SCORES), records)
