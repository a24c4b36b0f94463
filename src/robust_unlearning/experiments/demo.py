"""`unlearn demo`: base against RMU against RMU with RNA on a small real model, compared at like forgetting.

Noise that has merely stopped the forgetting looks like a cure and is not. So RMU is also stopped early, at
`SNAPSHOTS`, which traces what robustness each degree of forgetting costs without noise; RNA's models are set
against the point of that line where RMU has forgotten as much. And because noise also slows the forgetting, RMU
with a heavier retain weight, `SLOWER`, is trained as a control: slow without noise.

Every model is a run folder or a snapshot in the demo's folder, and every evaluation is kept, so a demo that was
stopped continues where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.evaluator import Evaluator, Variant, open_target
from robust_unlearning.evaluate.suite import Suite, load_suite
from robust_unlearning.experiments.demo_summary import Level, Measured, report
from robust_unlearning.models.checkpoint import pick_device, quick_dtype
from robust_unlearning.recipe import Recipe, load_recipe
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.progress import EvaluationProgress, TrainingProgress
from robust_unlearning.train.trainer import Trainer

RECIPE = "smollm2/rmu"
NOISE_LEVELS = (1.0, 3.0)
NOISE_SEEDS = (0, 1, 2)
SNAPSHOTS = (30, 45, 60)
SLOWER = 300
"""Retain weight of the control, against 100 of the others."""
OWN_FIELDS = {
    "noise_std",
    "noise_variance",
    "noise_seed",
    "retain_weight",
    "snapshots",
    "topics.astronomy.retain_weight",
}
"""What makes the demo's models differ, so no override may set it."""


@dataclass(frozen=True)
class Plan:
    """The demo's runs: RMU with its snapshots, the slower control, RNA at each noise level and seed of the noise."""

    rmu: RunFolder
    slower: RunFolder
    rna: dict[float, list[RunFolder]]

    @property
    def runs(self) -> list[RunFolder]:
        """All runs, RMU first."""
        return [self.rmu, self.slower, *(run for runs in self.rna.values() for run in runs)]


def plan(out: Path, overrides: Sequence[str]) -> Plan:
    """Open the run folders of the demo in `out`, continuing those that are there.

    Raises:
        UserError: an override of what makes the demo's models differ.
    """
    taken = {text.partition("=")[0].strip() for text in overrides} & OWN_FIELDS
    if taken:
        raise UserError(f"the demo sets {', '.join(sorted(taken))} itself; use `unlearn run {RECIPE}` to choose.")
    dtype = quick_dtype(pick_device("auto"))
    steps = load_recipe(RECIPE, overrides).steps
    snapshots = [step for step in SNAPSHOTS if step < steps]

    def opened(name: str, *changes: str) -> RunFolder:
        recipe = load_recipe(RECIPE, [f"dtype={dtype}", *overrides, *changes])
        return RunFolder.open(out / "runs" / name, recipe, resume=True)

    rmu = opened("rmu", f"snapshots={snapshots}")
    rna = {
        std: [opened(f"rna-{std:g}-seed{seed}", f"noise_std={std}", f"noise_seed={seed}") for seed in NOISE_SEEDS]
        for std in NOISE_LEVELS
    }
    return Plan(rmu, opened("rmu-slower", f"retain_weight={SLOWER}"), rna)


def train(plan: Plan) -> None:
    """Train what is not finished, all candidates side by side over the same batches."""
    waiting = [run for run in plan.runs if run.status != "finished"]
    if not waiting:
        print("training: all runs are there already")
        return
    print(f"training {len(waiting)} candidates side by side: one trunk, one reference, {len(waiting)} bands")
    trainer = Trainer(waiting)
    names = {id(each): each.run.path.name for each in trainer.candidates}
    with TrainingProgress(sum(run.recipe.steps for run in waiting), names) as progress:
        trainer.train(progress.row)


def run_demo(out: Path, overrides: Sequence[str] = ()) -> None:
    """Train, evaluate, print the table, and write `demo.md`, `demo.json` and the figure into `out`.

    Args:
        out: the demo's folder; one that was begun before, with the same overrides, is continued.
        overrides: `field=value` changes to the recipe of every run.

    Raises:
        UserError: the folder holds a demo with other settings, or a run failed.
    """
    suite = load_suite("demo")
    runs = plan(out, overrides)
    train(runs)
    evaluator = Evaluator(runs.rmu.recipe.dtype, runs.rmu.recipe.device)

    def measured(name: str, target: Variant, folder: Path) -> Measured:
        print(f"evaluating {name}", flush=True)
        with EvaluationProgress(name) as progress:
            return Measured.of(name, evaluator.evaluate(target, suite, folder, progress.tick))

    def of_run(name: str, run: RunFolder) -> Measured:
        return measured(name, open_target(str(run.path)), run.path)

    last = runs.rmu.recipe.steps
    base = measured("base", open_target(runs.rmu.recipe.model), out / "base")
    stopped = []
    for step in runs.rmu.recipe.snapshots:
        path = runs.rmu.snapshot(step)
        stopped.append((step, measured(f"RMU, step {step}", open_target(str(path)), path.with_suffix(""))))
    rmu = of_run(f"RMU, step {last}", runs.rmu)
    slower = of_run(f"RMU, retain weight {SLOWER:g}", runs.slower)
    levels = [
        Level(std, [of_run(f"RNA {std:g}, seed {run.recipe.noise_seed}", run) for run in group])
        for std, group in runs.rna.items()
    ]
    text = report(base, [*stopped, (last, rmu)], slower, levels, out, _about(suite, runs.rmu.recipe))
    print()
    print(text)
    print(f"\nwritten: {out / 'demo.md'}, .json, .png, .svg, .csv; runs in {out / 'runs'}")


def _about(suite: Suite, recipe: Recipe) -> str:
    general, forget = suite.questions["general"], suite.questions["astronomy"]
    held_out = files.locate(suite.texts["forget"].path).read_text(encoding="utf-8").splitlines()
    return (
        f"{recipe.model}, {recipe.title} at layer {recipe.layer}, {recipe.steps} steps of {recipe.batch_size} × "
        f"{recipe.max_tokens} tokens, {recipe.dtype}; general questions {general.path}, forget questions {forget.path} "
        f"(answer texts scored); {len(held_out)} held-out passages of forget text"
    )
