"""What a search found: a line for each trial, the best one, and the files that say so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_unlearning import files
from robust_unlearning.run.folder import open_run

if TYPE_CHECKING:
    import optuna


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
