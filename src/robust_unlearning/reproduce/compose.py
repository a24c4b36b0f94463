"""The report of a reproduction: `report.html` and `reproduce.json`, from whatever stages are finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.report.flips import Flips, read_flips
from robust_unlearning.report.page import Block, Details, Figure, Page, Section, write_page
from robust_unlearning.reproduce import claims, claims_on_analyses, claims_on_grids, claims_on_ngrams, figures, tables
from robust_unlearning.reproduce.claims import percent
from robust_unlearning.reproduce.figures import FORGET, PERTURBED
from robust_unlearning.reproduce.grid import Grid
from robust_unlearning.reproduce.run import Results
from robust_unlearning.reproduce.target import Stage, Target, folder_of, main_name
from robust_unlearning.reproduce.verdicts import CLAIMS, RULE, Outcome, claim_table, complete, headline, summary_table
from robust_unlearning.results.measures import forget, retained, right

PAGE, NUMBERS = "report.html", "reproduce.json"
FIGURES = "figures"


def outcomes(target: Target, results: Results) -> list[Outcome]:
    """Every row, in the order of the claims; a claim whose stage is not done has one row that says so."""
    grids, chosen = results.grids, results.chosen
    main = grids.get(main_name(target))
    rows: list[Outcome] = []
    if main:
        rows += claims.main_claims(main, chosen, results.unchosen)
    if noises := grids.get("figure3") if "figure3" in target.stages else main:
        rows += claims_on_grids.noise_claims(noises, chosen)
    of_stage: dict[str, Callable[[Grid], list[Outcome]]] = {
        "layers": claims_on_grids.layer_of_unlearning_claims,
        "figure2": claims_on_grids.coefficient_claims,
        "figure8": partial(claims_on_grids.layer_claims, claim="single-layer"),
        "figure9": partial(claims_on_grids.layer_claims, claim="region"),
        "figure10": claims_on_grids.all_layer_claims,
    }
    rows += [row for stage, rows_of in of_stage.items() if stage in grids for row in rows_of(grids[stage])]
    of_kind = {
        "ngrams": claims_on_ngrams.ngram_claims,
        "noise-sensitivity": claims_on_analyses.sensitivity_claims,
        "theory": claims_on_analyses.theory_claims,
        "activations": claims_on_analyses.backdoor_claims,
        "time": claims_on_analyses.time_claims,
    }
    for kind, rows_of in of_kind.items():
        name = next((name for name, stage in target.stages.items() if stage.kind == kind), "")
        rows += rows_of(results.analyses[name]) if name in results.analyses else []
    return complete(rows)


def write_report(name: str, target: Target, results: Results, out: Path, changes: Sequence[str] = ()) -> Path:
    """Write the page and the numbers; returns the page's path.

    Args:
        changes: `field=value` words by which the target differs from what its name says.
    """
    rows = outcomes(target, results)
    grid = results.grids.get(main_name(target))
    environment, about = tables.environment_table(results, out)
    sections = [_what(target, results, changes), _verdicts(rows)]
    if grid is not None:
        sections += [_main(target, grid, results, out), _questions(grid, results, out)]
    for key, stage in target.stages.items():
        if stage.kind != "main" and results.states.get(key, {}).get("status") == "finished":
            sections.append(_stage(key, stage, results, out))
    sections.append(Section("environment", "Environment", [environment]))
    done = sum(state["status"] == "finished" for state in results.states.values())
    lead = (
        f"{target.about} {done} of {len(target.stages)} stages are finished. {headline(rows)} "
        f"{_forgotten(grid)}Every number has the interval or the count that it rests on; "
        "the paper's own numbers stand beside ours where it prints them."
    )
    write_page(Page(f"The paper, reproduced: {name}", lead, sections), out / PAGE)
    numbers = {
        "target": target.model_dump(mode="json"),
        "changes": list(changes),
        "stages": results.states,
        "chosen_noise": results.chosen,
        "no_noise_chosen": results.unchosen,
        "claims": {claim: {"text": about.text, "paper": about.paper} for claim, about in CLAIMS.items()},
        "outcomes": [each.as_dict() for each in rows],
        "main": {place: tables.main_table(grid, place).as_json() for place in grid.places} if grid else {},
        "failed_runs": {key: dict(each.failed) for key, each in results.grids.items() if each.failed},
        "analyses": {key: each["tables"] for key, each in results.analyses.items()},
        "environment": about,
    }
    files.write_json(out / NUMBERS, numbers)
    return out / PAGE


def _forgotten(grid: Grid | None) -> str:
    """Whether the models without noise have forgotten anything, in a sentence."""
    if grid is None:
        return ""
    plain = {title: grid.at(recipe, 0) for recipe, title in grid.recipes.items()}
    shares = {title: figures.estimate(models, forget) for title, models in plain.items() if models}
    if not shares:
        return ""
    least, most = (choose(shares, key=lambda title: shares[title].value or 0.0) for choose in (min, max))
    spans = [f"{percent(shares[title])} ({title})" for title in (least, most)]
    base = figures.of_base(grid, forget)
    return f"Of the questions to be forgotten the base answers {percent(base)}, the models {spans[0]} to {spans[1]}. "


def _what(target: Target, results: Results, changes: Sequence[str]) -> Section:
    reduced = tables.reduced_table(target, changes)
    blocks: list[Block] = [tables.stage_table(target, results), *([reduced] if reduced.rows else [])]
    failed = [f"{key}: {run}: {why}" for key, each in results.grids.items() for run, why in each.failed.items()]
    if failed:
        blocks.append(Details(f"{len(failed)} runs failed", failed))
    blocks.append(Details("The command of each stage alone", [tables.command_table(target)]))
    return Section("what", "What was run", blocks)


def _verdicts(rows: Sequence[Outcome]) -> Section:
    rates = Details("How often these rules err, and how often they find what is there", [tables.error_table()])
    blocks: list[Block] = [summary_table(rows), RULE, rates]
    judged = [row for row in rows if row.finding != "not run"]
    for claim, about in CLAIMS.items():
        if count := sum(row.claim == claim for row in judged):
            blocks.append(Details(f"{about.text}: {count} row{'s' * (count > 1)}", [claim_table(claim, judged)]))
    return Section("verdicts", "What became of the claims", blocks)


def _main(target: Target, grid: Grid, results: Results, out: Path) -> Section:
    path = out / FIGURES
    first, *others = grid.places
    blocks: list[Block] = [tables.main_table(grid, first)]
    blocks += [Details(f"The same, the token in: {place}", [tables.main_table(grid, place)]) for place in others]
    blocks += _drawn(
        lambda: figures.overview(grid, results.chosen, path / "figure1.png"),
        lambda: figures.curve(grid, results.chosen, path / "trade-off.png"),
        lambda: figures.over_field(
            grid, figures.noise_key, "the scale of the noise", path / "figure3-seeds.png", figures.ACCURACIES
        ),
    )
    if results.chosen or results.unchosen:
        blocks.append(tables.noise_table(grid, results.chosen, results.unchosen, target.rule))
    return Section("main", "Methods without and with RNA", blocks, target.stages[main_name(target)].stands_for)


def _drawn(*draw: Callable[[], Figure]) -> list[Block]:
    """Figures, or the sentence that says why there is none."""
    blocks: list[Block] = []
    for each in draw:
        try:
            blocks.append(each())
        except UserError as error:
            return [f"No figure: {error}"]
    return blocks


def _questions(grid: Grid, results: Results, out: Path) -> Section:
    """Single questions that flipped: the method on which RNA, at its chosen noise, changed most, by family."""
    blocks: list[Block] = []
    for name, recipes in figures.families(grid).items():
        pairs = [(recipe, grid.pairs(recipe, results.chosen[recipe])) for recipe in recipes if recipe in results.chosen]
        pairs = [(recipe, each) for recipe, each in pairs if each]
        if not pairs:
            continue

        def gained(pair: Any) -> float:
            plain, rna = pair[1][0]
            return float(right(rna.test).mean() - right(plain.test).mean())

        recipe, ((plain, rna), *_) = max(pairs, key=gained)
        title = grid.recipes[recipe]
        folders = {"base": out / "base", title: out / plain.scores, f"{title} + RNA {rna.noise:g}": out / rna.scores}
        try:
            view: Flips | str = read_flips(folders)
        except UserError as error:
            view = f"{title}: {error}"
        blocks.append(Details(f"{name}: {title}, seed {plain.seed}", [view]))
    text = (
        "Of each family the method on which RNA changed most is shown, one seed: an example to look at, no evidence; "
        "that is in the verdicts."
    )
    return Section("questions", "Questions that flipped, and flipped back", [text, *blocks])


def _stage(key: str, stage: Stage, results: Results, out: Path) -> Section:
    blocks: list[Block] = [f"Reduced: {stage.reduced}."] if stage.reduced else []
    if key in results.analyses:
        data = results.analyses[key]
        first, *others = data["notes"] or [""]
        blocks += (
            [first, Details(f"{len(others)} findings, a sentence each", others)] if len(others) > 4 else data["notes"]
        )
        png = folder_of(out, key) / "analysis" / f"{data['name']}.png"
        if png.exists():
            blocks.append(Figure.saved(stage.title, "95 % intervals.", png))
        blocks += [Details(each.title, [each]) for each in tables.analysis_tables(data)]
    else:
        blocks += _drawn(lambda: _grid_figure(key, results.grids[key], out / FIGURES / f"{key}.png"))
    return Section(key, stage.title, blocks, stage.stands_for)


def _grid_figure(key: str, grid: Grid, path: Path) -> Figure:
    """The figure of a stage: over c or β, over layers, or over the noise, whichever its models differ in."""
    both = {PERTURBED: right, FORGET: forget}
    fields = {name for each in grid.models for name in each.fields}
    if fields & {"steering_scale", "adaptive_scale"}:
        return figures.over_field(grid, figures.coefficient_key, "c or β", path, both, together=True)
    if "layer" in fields:
        return figures.over_field(grid, figures.unlearned_layer_key, "the layer l", path, both, together=True)
    if len({tuple(each.fields.get("noise_layers") or ()) for each in grid.models if each.noise}) > 1:
        return figures.over_field(grid, figures.layers_key, "the layers of the noise", path, {PERTURBED: right})
    measures = {PERTURBED: right} if key != "figure10" else {PERTURBED: right, "accuracy on what is kept": retained}
    return figures.over_field(grid, figures.noise_key, "the scale of the noise", path, measures)
