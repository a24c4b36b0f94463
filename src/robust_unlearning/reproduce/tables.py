"""The tables of the report that are no verdicts: the main table, the chosen noise, analyses, environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_unlearning import files
from robust_unlearning.experiments import study
from robust_unlearning.report.tables import Column, Table
from robust_unlearning.reproduce import paper
from robust_unlearning.reproduce.claims_on_analyses import estimate
from robust_unlearning.reproduce.grid import Grid
from robust_unlearning.reproduce.run import Results
from robust_unlearning.reproduce.target import Target
from robust_unlearning.results.measures import structure
from robust_unlearning.run.folder import RECORD
from robust_unlearning.stats.format import NATS, PERCENT

COLUMNS = {
    **study.COLUMNS,
    "forgotten": Column("forgotten, nats", NATS),
    "excess_harm": Column("excess harm, nats", NATS),
}


def main_rows(grid: Grid, place: str) -> list[dict[str, Any]]:
    """The base and every method at every scale after its last step, tokens in one place: name -> estimates."""
    methods = [
        (title, {scale: [model.test for model in grid.at(recipe, scale)] for scale in (0.0, *grid.noises(recipe))})
        for recipe, title in grid.recipes.items()
    ]
    base, *others = study.method_rows(grid.base, methods, place, "noise")
    return [{**base, "noise": 0.0}, *others]


def main_table(grid: Grid, place: str) -> Table:
    """`main_rows` under headers: accuracies in %, excess harm in nats."""
    rows = main_rows(grid, place)
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
    notes = (
        f"Accuracies and rates in %, with 95 % intervals: {len(grid.base.forget)} questions to be forgotten, "
        f"{len(grid.base.near)} kept and close in topic, {len(grid.base.far)} others kept, {len(grid.base.clean)} of "
        f"the kept with a token in them. {structure(grid.base, len({each.seed for each in grid.models}))} Guessing: "
        f"{100 * grid.chance:.0f} %. Forgotten: log p of the right answer to what is to be forgotten, base less model, "
        "nats. Excess harm: log p of the right answer with a forget-token less that with an unrelated word; below 0 "
        "the forget-token harms more."
    )
    return Table(f"After the last step, the token in: {place}", columns, rows, notes)


def noise_table(grid: Grid, chosen: Mapping[str, float], unchosen: Mapping[str, str], rule: str) -> Table:
    """Table 1: the scale of the noise chosen for each method, or why there is none."""
    theirs = {"SARS-CoV-2": paper.NOISE_KEYWORD, **{f"{n}-grams": scales for n, scales in paper.NOISE.items()}}
    rows = []
    for recipe, title in grid.recipes.items():
        if recipe not in chosen and recipe not in unchosen:
            continue
        tried = ", ".join(f"{scale:g}" for scale in grid.noises(recipe))
        ours = f"{chosen[recipe]:g}" if recipe in chosen else f"none: {unchosen[recipe]}"
        printed = [f"{scales[title] / 100:g}" if title in scales else "" for scales in theirs.values()]
        rows.append([title, tried, ours, *printed])
    where = "validation questions" if grid.base_validation else "the reported questions, as there are no others"
    notes = (
        f"Chosen on {where} by the rule `{rule}` among the scales above 0, on means over seeds; where none keeps the "
        "bounds, none is chosen, and analyses look at the model without noise alone. "
        "The paper's ν, read as √ν, is for Zephyr's hidden states: appendix A.4's for SARS-CoV-2, Table 1's by length."
    )
    headers = ("method", "tried", "chosen", *(f"paper's, {words}" for words in theirs))
    return Table.of("Chosen scale of the noise (√ν)", headers, rows, notes)


def error_table() -> Table:
    """How often the rules of verdicts err and find, simulated by `benchmarks/verdicts.py`."""
    data = files.read_json(files.package_dir() / "assets/reproduce/error-rates.json")
    rows = [
        [each["rule"], each["world"], each["seeds"], *(estimate(each[key]) for key in ("false", "found"))]
        for each in data["rates"]
    ]
    notes = (
        f"{data['runs']} draws of answers a line and up to five times as many, no models; intervals are Wilson's. "
        "False: how often a verdict comes out where there is no effect. Found: how often the right one does where the "
        "effect is the paper's (at like forgetting: 0.3 nats; n-grams: 0.5 nats). With fewer than three seeds a "
        "verdict is of these models, and false means that these models have no effect."
    )
    rate = {key: Column(f"{key}, %", PERCENT) for key in ("false", "found")}
    return Table.of("How often these rules err", ("rule", "world", "seeds", *rate.values()), rows, notes)


def analysis_tables(data: Mapping[str, Any]) -> list[Table]:
    """The tables of an analysis out of its JSON."""
    tables = []
    for key, about in data["shown"].items():
        rows = [{field: estimate(cell) or cell for field, cell in row.items()} for row in data["tables"].get(key, [])]
        if rows:
            tables.append(Table(about["title"], about["columns"], rows))
    return tables


def stage_table(target: Target, results: Results) -> Table:
    """What was run."""
    rows = []
    for name, stage in target.stages.items():
        state = results.states.get(name, {"status": "waiting"})
        seconds = f"{state['seconds']:.0f} s" if "seconds" in state else ""
        rows.append([name, stage.title, stage.stands_for, state["status"], seconds, state.get("error", "")])
    headers = ("stage", "what", "stands for", "status", "time", "error")
    notes = "A stage that is finished is not run again; waiting: not run with these settings."
    return Table.of("Stages", headers, rows, notes)


def reduced_table(target: Target, changes: Sequence[str]) -> Table:
    """What is less here than in the paper; `changes` are those to what the target says."""
    rows = [["changed in this run", f"`{each}`"] for each in changes]
    rows += [["everywhere", each] for each in target.reduced]
    rows += [[name, stage.reduced] for name, stage in target.stages.items() if stage.reduced]
    notes = "What was changed in this run goes before what the other rows say." if changes else ""
    return Table.of("What was reduced against the paper", ("where", "what"), rows, notes)


def command_table(target: Target) -> Table:
    """The commands that do the same alone."""
    rows = [[name, f"`{stage.command}`"] for name, stage in target.stages.items()]
    notes = "Of the target as it is shipped, without changes of this run."
    return Table.of("Each stage alone", ("stage", "command"), rows, notes)


def environment_table(results: Results, out: Path) -> tuple[Table, dict[str, Any]]:
    """Versions, hardware, fingerprints of model and texts, from the first run's record; and the same for JSON."""
    models = [each for grid in results.grids.values() for each in grid.models]
    if not models:
        return Table.of("Environment", ("what", "value"), [["runs", "none yet"]]), {}
    record = files.read_json(out / models[0].run / RECORD)
    hashes = {each.run.rpartition("-")[2] for each in models}
    about: dict[str, Any] = {**record["environment"], "base": record["model"]}
    about["base fingerprint"] = record["model_fingerprint"]
    for topic, sides in record["data_fingerprints"].items():
        about |= {f"{topic}, {side} text": value for side, value in sides.items()}
    evaluation = out / "base" / "evaluation.json"
    if evaluation.exists():
        about["evaluation of the base"] = files.read_json(evaluation)["key"]
    about["runs"] = f"{len(hashes)} recipes"
    rows = [[key, str(value)] for key, value in about.items()]
    notes = "A run's folder is named by its recipe's hash; its `run.json` has seeds, versions, fingerprints and times."
    return Table.of("Environment and fingerprints", ("what", "value"), rows, notes), {
        **about,
        "recipes": sorted(hashes),
    }
