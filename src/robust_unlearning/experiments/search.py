"""Trials: Optuna proposes values, each trial is a run folder, bad ones end early.

TPE is told the forget accuracy as its objective, and as a constraint of each retain task what it has lost beyond
what it may. Robustness to forget-tokens plays no part, so perturbed forms are not even asked.

The study lies in an SQLite file, or in any database that SQLAlchemy knows. The same command adds trials to it until
there are as many as asked for, in one process or in several at a time; a trial whose process died is taken up again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.evaluator import Evaluator, Variant, open_target
from robust_unlearning.evaluate.record import Task, logp_among_of
from robust_unlearning.evaluate.suite import Evaluation, Suite, load_suite
from robust_unlearning.experiments.ranges import Axis
from robust_unlearning.experiments.rule import Bound, Rule
from robust_unlearning.experiments.runner import bare
from robust_unlearning.recipe import Recipe, load_recipe
from robust_unlearning.results.roles import named
from robust_unlearning.run.folder import RunFolder, open_run
from robust_unlearning.train.candidate import Candidate
from robust_unlearning.train.trainer import Trainer

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Aim:
    """Fewest forget answers among settings that keep every retain task within `may_lose` of the base's accuracy.

    Attributes:
        forget: pattern of the tasks to forget, such as `forget/*`.
        retain: patterns of the tasks to keep; every other task with an accuracy where there are none.
    """

    forget: str = "forget*"
    retain: tuple[str, ...] = ()
    may_lose: float = 0.03


@dataclass(frozen=True)
class Judged:
    """What an evaluation says under an aim.

    Attributes:
        rule: `min forget where every retain task >= base - may_lose`.
        values: `forget`, the share of forget questions that are still answered, and each retain task's accuracy.
        scores: of the forget and the retain tasks, as the evaluation has them.
        retain_logp: mean log p of the right answer to retain questions, among those offered.
    """

    rule: Rule
    values: dict[str, float]
    scores: dict[str, dict[str, Any]]
    retain_logp: float

    def excesses(self, base: Judged) -> dict[str, float]:
        """By how much each retain task has lost more than it may, in accuracy; not above 0 where it keeps enough."""
        return {bound.measure: bound.excess(self.values, base.values, {}) for bound in self.rule.bounds}

    def penalised(self, base: Judged) -> float:
        """One number for pruning: forget accuracy plus every constraint's breach."""
        return self.values["forget"] + self.rule.breach(self.values, base.values, {})


def judge(evaluation: Evaluation, aim: Aim) -> Judged:
    """An evaluation as the aim sees it.

    Raises:
        UserError: the suite has nothing to forget, or nothing to retain.
    """
    scores = {task: row for task, row in evaluation.scores.items() if "acc" in row}
    tasks = [Task.parse(name) for name in scores]
    forget = [task.name for task in named(tasks, "forget", [aim.forget])]
    others = [task for task in tasks if task.name not in forget]
    retain = [task.name for task in named(others, "retain", aim.retain or ("*",))]
    right = sum(scores[task]["acc"] * scores[task]["n"] for task in forget)
    values = {"forget": right / sum(scores[task]["n"] for task in forget)}
    values |= {task: scores[task]["acc"] for task in retain}
    bounds = tuple(Bound(task, False, "base", 1.0, -aim.may_lose) for task in retain)
    rule = Rule(f"min forget where every retain task >= base - {aim.may_lose:g}", False, "forget", bounds)
    records = [record for record in evaluation.records if record.task.name in retain]
    logp = float(logp_among_of(records).mean())
    return Judged(rule, values, {task: scores[task] for task in (*forget, *retain)}, logp)


HEARTBEAT = 30
"""Seconds between a running trial's signs of life; after twice as long without one it is taken up again."""


@dataclass(frozen=True)
class Search:
    """What is searched.

    Attributes:
        recipe: name or file of the recipe.
        axes: fields and the values they may take.
        fixed: overrides that every trial has.
        suite: name or file of the suite that decides.
        out: folder of the study and its runs.
        rungs: steps at which a trial is scored on `subset` questions of each set, and ended if others did better.
    """

    recipe: str
    axes: tuple[Axis, ...]
    fixed: tuple[str, ...]
    suite: str
    out: Path
    aim: Aim = field(default_factory=Aim)
    rungs: tuple[int, ...] | None = None
    subset: int = 32

    def recipe_with(self, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe of a trial."""
        return load_recipe(self.recipe, [*self.fixed, *overrides])

    def name(self) -> str:
        """The study's name: another search in the same storage has another. It must stay the same from version to
        version, as a study goes on under it.
        """
        plain, aim = self.recipe_with([axis.ends()[0] for axis in self.axes]).content_hash(), self.aim
        rule = f"Rule(forget={aim.forget!r}, retain={aim.retain!r}, may_lose={aim.may_lose!r})"
        text = f"({plain!r}, {self.axes!r}, {self.suite!r}, {rule}, {self.rungs!r}, {self.subset!r})"
        return f"{Path(self.recipe).stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def rungs_of(self, recipe: Recipe) -> tuple[int, ...]:
        """Steps at which a trial is scored early: those asked for, or a quarter and half of its steps."""
        every, rungs = recipe.log_every, self.rungs
        if rungs is None:
            rungs = (recipe.steps // 4 // every * every, recipe.steps // 2 // every * every)
        return tuple(step for step in rungs if 0 < step < recipe.steps)


def check(search: Search) -> Suite:
    """See that every end of the space is a recipe and that the rungs can be reached; the suite as it will be asked.

    Raises:
        UserError: something cannot work.
    """
    first = [axis.ends()[0] for axis in search.axes]
    recipe = search.recipe_with(first)
    for axis in search.axes:
        for end in axis.ends()[1:]:
            search.recipe_with([*first, end])
    missed = [step for step in search.rungs or () if step % recipe.log_every or step < 1]
    if missed:
        raise UserError(f"--prune-at {missed}: a trial is looked at when it logs, every {recipe.log_every} steps.")
    suite = load_suite(search.suite)
    plain = {name: each.model_copy(update={"perturb": ()}) for name, each in suite.questions.items()}
    return suite.model_copy(update={"questions": plain, "texts": {}})


def run_search(
    search: Search,
    trials: int,
    *,
    sampler: str = "tpe",
    seed: int | None = None,
    storage: str | None = None,
    tell: Callable[[str], None] = print,
) -> optuna.Study:
    """Run trials until the study has `trials`, those of other processes counted in.

    Args:
        sampler: `tpe` or `random`.
        seed: of the sampler; searches that run at the same time need unlike ones.
        storage: URL of the study's database; `study.sqlite` in the search's folder where there is none.
        tell: called with a line for each trial.

    Raises:
        UserError: see `check`; or a trial failed otherwise than by a loss that is not finite.
    """
    import optuna

    worker = _Worker(search, check(search))
    study = _open_study(search, storage, sampler, seed)
    counted = {optuna.trial.TrialState[name] for name in ("COMPLETE", "PRUNED", "RUNNING")}
    while True:
        optuna.storages.fail_stale_trials(study)
        if sum(trial.state in counted for trial in study.get_trials(deepcopy=False)) >= trials:
            return study
        study.optimize(worker.objective, n_trials=1, callbacks=[lambda _study, trial: tell(describe(trial))])


def _open_study(search: Search, storage: str | None, sampler: str, seed: int | None) -> optuna.Study:
    """The study in its database, made if it is not there."""
    import warnings

    import optuna
    from filelock import FileLock
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    search.out.mkdir(parents=True, exist_ok=True)
    url = storage or f"sqlite:///{(search.out / 'study.sqlite').absolute()}"
    wait = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    with FileLock(search.out / ".study.lock"):  # tables are made once
        try:
            database = optuna.storages.RDBStorage(
                url,
                engine_kwargs=wait,
                heartbeat_interval=HEARTBEAT,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
            return optuna.create_study(
                storage=database,
                study_name=search.name(),
                sampler=kinds[sampler](seed=seed),
                pruner=optuna.pruners.MedianPruner(),
                load_if_exists=True,
            )
        except (SQLAlchemyError, ImportError, ValueError) as error:
            raise UserError(f"--storage: no study can be kept there ({error}).") from error


class _Worker:
    """Runs trials: trains a run folder, looks at it at the rungs, scores it."""

    def __init__(self, search: Search, suite: Suite) -> None:
        recipe = search.recipe_with([axis.ends()[0] for axis in search.axes])
        self.search, self.suite = search, suite
        self.few = suite.limited(search.subset)
        self.evaluator = Evaluator(recipe.dtype, recipe.device)
        self.base, self.base_few = (
            judge(self.evaluator.evaluate(bare(recipe), task_set, search.out / name), search.aim)
            for name, task_set in (("base", self.suite), ("base-subset", self.few))
        )

    def objective(self, trial: optuna.Trial) -> float:
        """Forget accuracy of one setting, constraints set; the run folder is reused where it is finished."""
        from filelock import FileLock

        recipe = self.search.recipe_with([axis.suggest(trial) for axis in self.search.axes])
        folder = self.search.out / "runs" / recipe.content_hash()
        folder.parent.mkdir(parents=True, exist_ok=True)
        trial.set_user_attr("run", folder.name)
        with FileLock(folder.with_suffix(".lock")):
            self._train(trial, RunFolder.open(folder, recipe, resume=True))
            judged = judge(self.evaluator.evaluate(open_target(str(folder)), self.suite, folder), self.search.aim)
        return self._note(trial, judged, self.base)

    def _train(self, trial: optuna.Trial, run: RunFolder) -> None:
        import optuna

        if run.status == "finished":
            return
        try:
            trainer = Trainer([run])
            rungs = self.search.rungs_of(run.recipe)

            def look(candidate: Candidate, row: dict[str, Any]) -> None:
                if row["step"] in rungs:
                    self._look(trial, run, trainer, candidate)

            trainer.train(look)
        except KeyboardInterrupt:
            trial.study.enqueue_trial(trial.params)  # the next one to work on the study continues it
            raise
        except UserError as error:
            if run.status != "failed":
                raise
            trial.set_user_attr("error", str(error))
            for bound in self.base.rule.bounds:
                trial.set_constraint(bound.measure, 1.0)
            raise optuna.TrialPruned from error

    def _look(self, trial: optuna.Trial, run: RunFolder, trainer: Trainer, candidate: Candidate) -> None:
        """Score an unfinished run on a few questions, and end it where the median of the others did better."""
        import optuna

        recipe = run.recipe
        variant = Variant(run.path.name, recipe.model, trainer.delta(candidate), None, recipe.model_options)
        judged = judge(self.evaluator.evaluate(variant, self.few), self.search.aim)
        trial.report(judged.penalised(self.base_few), candidate.step)
        if trial.should_prune():
            trial.set_user_attr("pruned_at", candidate.step)
            self._note(trial, judged, self.base_few)
            raise optuna.TrialPruned

    def _note(self, trial: optuna.Trial, judged: Judged, base: Judged) -> float:
        for task, excess in judged.excesses(base).items():
            trial.set_constraint(task, excess)
        trial.set_user_attr("scores", judged.scores)
        trial.set_user_attr("retain_logp", judged.retain_logp)
        return judged.values["forget"]


def describe(trial: optuna.trial.FrozenTrial) -> str:
    """A trial in one line."""
    setting = " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in trial.params.items()
    )
    line = f"trial {trial.number}: {setting}: "
    if "error" in trial.user_attrs:
        return line + trial.user_attrs["error"]
    if "scores" not in trial.user_attrs:
        return line + trial.state.name.lower()
    scores = trial.user_attrs["scores"]
    line += ", ".join(
        f"{task} {row['acc']:.1%} [{row['low']:.1%}, {row['high']:.1%}] (n={row['n']})" for task, row in scores.items()
    )
    lost = [task for task, excess in trial.constraints.items() if excess > 0]
    line += f"; loses too much on {', '.join(lost)}" if lost else "; keeps enough"
    return line + (f"; pruned at step {trial.user_attrs['pruned_at']}" if "pruned_at" in trial.user_attrs else "")


def best_trial(study: optuna.Study) -> optuna.trial.FrozenTrial | None:
    """Of the finished trials that keep enough, the one with fewest forget answers; then the likeliest retain answers.

    None where no trial keeps enough.
    """
    kept = [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.name == "COMPLETE" and all(excess <= 0 for excess in trial.constraints.values())
    ]
    return min(kept, key=lambda trial: (trial.value, -trial.user_attrs["retain_logp"]), default=None)


def write_results(out: Path, study: optuna.Study, about: dict[str, Any]) -> optuna.trial.FrozenTrial | None:
    """Write `search.json` (every trial) and `best.yaml` (the recipe of the best one); returns that trial.

    Args:
        out: the search's folder.
        about: what was searched, and by which rule.
    """
    best = best_trial(study)
    rows = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "params": trial.params,
            "looks": trial.intermediate_values,
            "constraints": trial.constraints,
            **trial.user_attrs,
        }
        for trial in study.get_trials(deepcopy=False)
    ]
    chosen = best.number if best else None
    files.write_json(out / "search.json", {"study": study.study_name, **about, "best": chosen, "trials": rows})
    if best:
        files.write_text(out / "best.yaml", open_run(out / "runs" / best.user_attrs["run"]).recipe.as_yaml())
    return best
