"""Search for recipes that forget the planted world's forget domains and keep the others, on the validation split.

    python benchmarks/search_planted.py tiny/rmu --log benchmarks/results/search-tiny-rmu.jsonl

The rule: of all settings that keep near and far accuracy within 3 points of the base, the one that answers fewest
forget questions, where fewer than chance is no better than chance; ties go to the one whose retain questions'
log-probabilities fell least. Robustness to forget-tokens plays no part, and the test split is not read. Every setting
is a line of the log.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

from robust_unlearning import files
from robust_unlearning.evaluate.record import Record, logp_among_of, right_of
from robust_unlearning.evaluate.suite import Evaluation, load_suite
from robust_unlearning.experiments.grid import override_words, point_of
from robust_unlearning.experiments.runner import Runner
from robust_unlearning.methods.table import Representation
from robust_unlearning.recipe import load_recipe

MAY_LOSE = 0.03
CHANCE = 0.25


def main() -> None:
    """Train the grid, score it, write the log and print the chosen setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--suite", default="planted-validation", help="planted-texts-validation for SmolLM2")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 3, 10], help="of representation methods")
    parser.add_argument("--weights", type=float, nargs="+", default=[1, 10, 100])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--seed", type=int, default=100, help="unlike those of the reported studies")
    given = parser.parse_args()

    # no option form: robustness plays no part in the choice, so it is not even measured
    suite = load_suite(given.suite)
    plain = {name: each.model_copy(update={"perturb": ()}) for name, each in suite.questions.items()}
    suite = suite.model_copy(update={"questions": plain})
    recipe = load_recipe(given.recipe)
    scale_field = recipe.spec.scale_field if isinstance(recipe.spec, Representation) else None
    scales = given.scales if scale_field else [1.0]
    *earlier, last = given.steps
    points = []
    for layer, scale, weight, rate in itertools.product(given.layers, scales, given.weights, given.rates):
        setting = {"layer": layer, "retain_weight": weight, "learning_rate": rate}
        setting |= {scale_field: scale} if scale_field else {}
        words = override_words({**setting, "seed": given.seed, "steps": last, "snapshots": earlier})
        points.append(point_of(given.recipe, setting, words, earlier=earlier))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        runner = Runner(points, {"suite": suite}, Path(temporary), _scores, one_base=True).run()
        base = runner.base["suite"]
        for point in points:
            scored = [(step, runner.models.get((point.name, step))) for step in given.steps]
            rows += [{**point.fields, "steps": step, **scores["suite"]} for step, scores in scored if scores]
            if point.name in runner.failed:
                rows.append({**point.fields, "failed": runner.failed[point.name]})
    best = choose(rows, base)
    files.write_jsonl(given.log, [{"base": base, "seed": given.seed, "recipe": given.recipe}, *rows, {"chosen": best}])
    print(f"base {base}\nchosen {best}")


def choose(rows: list[dict[str, Any]], base: dict[str, float]) -> dict[str, Any] | None:
    """The setting the rule in this module's docstring names; None where none keeps enough."""
    kept = [
        row for row in rows if "failed" not in row and all(row[key] >= base[key] - MAY_LOSE for key in ("near", "far"))
    ]
    return min(kept, key=lambda row: (max(CHANCE, row["forget"]), -row["retain_logp"])) if kept else None


def _scores(evaluation: Evaluation) -> dict[str, float]:
    def records(*sets: str) -> list[Record]:
        return [record for record in evaluation.records if record.task.set in sets]

    sets = {"forget": ("forget",), "near": ("near",), "far": ("far", "control")}
    accuracies = {name: float(right_of(records(*each)).mean()) for name, each in sets.items()}
    forget, retain = records("forget"), records("near", "far", "control")
    logps = {"forget_logp": logp_among_of(forget), "retain_logp": logp_among_of(retain)}
    return {**accuracies, **{name: float(values.mean()) for name, values in logps.items()}}


if __name__ == "__main__":
    main()
