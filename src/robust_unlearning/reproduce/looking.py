"""The stages that look at the main stage's models: the paper's theory, layers, activations, and hard negatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from robust_unlearning import files
from robust_unlearning.analyze import activations, harmfulness, inputs, noise_sensitivity
from robust_unlearning.analyze.output import Report, write
from robust_unlearning.analyze.variants import Variants
from robust_unlearning.data.corpora import read_documents
from robust_unlearning.data.questions import shows_options
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import Record
from robust_unlearning.evaluate.suite import Suite
from robust_unlearning.recipe import TextSource
from robust_unlearning.reproduce.grid import Scorer, suites_of
from robust_unlearning.reproduce.results import Grid, Model
from robust_unlearning.reproduce.target import Stage, Target
from robust_unlearning.reproduce.theory import report
from robust_unlearning.reproduce.theory.measure import TheorySettings
from robust_unlearning.run.folder import open_run

Say = Callable[[str], None]


def variants_of(stage: Stage, grid: Grid, chosen: Mapping[str, float]) -> list[tuple[str, Model]]:
    """The models an analysis looks at, the first seed's: a label and the model, without and with the chosen noise.

    Raises:
        UserError: the main stage has no model of a recipe.
    """
    found: list[tuple[str, Model]] = []
    for recipe in stage.recipes:
        scales = [0.0, *([chosen[recipe]] if stage.rna and recipe in chosen else [])]
        own = [grid.at(recipe, scale) for scale in scales]
        if not own[0]:
            raise UserError(f"the main stage has no model of {recipe}; it has {', '.join(grid.recipes) or 'none'}.")
        found += [(label(models[0]), models[0]) for models in own if models]
    return found


def label(model: Model) -> str:
    """What tables call a model."""
    return model.title + (f" + RNA {model.noise:g}" if model.noise else "")


def look(
    target: Target, stage: Stage, grid: Grid, chosen: Mapping[str, float], out: Path, folder: Path, say: Say
) -> dict[str, Any]:
    """Run an analysis and write its tables and figure into `folder`/analysis; returns its numbers."""
    own = variants_of(stage, grid, chosen)
    names = {str(out / model.run): text for text, model in own}
    if stage.kind == "ngrams":
        return _ngrams(target, stage, own, out, folder, say)
    variants = Variants(list(names))
    found = _report(target, stage, variants, lambda name: say(f"  measuring {names.get(name, name)}"))
    layers = {text: open_run(out / model.run).recipe.layer for text, model in own}
    return {**_written(_renamed(found, names), own, folder), "layers": layers, "depth": variants.depth}


def _written(report: Report, own: list[tuple[str, Model]], folder: Path) -> dict[str, Any]:
    """Write a report; its numbers, and what a page needs to show them."""
    write(report, folder)
    data = files.read_json(folder / "analysis" / f"{report.name}.json")
    shown = {
        table.key: {"title": table.title, "columns": dict(zip(table.columns, table.headers, strict=True))}
        for table in report.tables
    }
    return {**data, "name": report.name, "notes": list(report.notes), "shown": shown, "subjects": _listed(own)}


def _listed(own: list[tuple[str, Model]]) -> list[dict[str, Any]]:
    return [{"label": text, "recipe": each.recipe, "title": each.title, "noise": each.noise} for text, each in own]


def _report(target: Target, stage: Stage, variants: Variants, tick: Callable[[str], None]) -> Report:
    """The analysis of one kind, with the stage's sizes."""
    documents = {side: variants.documents(side, stage.documents, stage.max_tokens) for side in ("forget", "retain")}
    if stage.kind == "noise-sensitivity":
        settings = noise_sensitivity.Settings(probes=stage.probes)
        return noise_sensitivity.analyse(variants, documents["forget"], settings, tick)
    questions = inputs.prompts(suites_of(target)[0], variants.tokenizer, stage.questions)
    if stage.kind == "activations":
        return activations.analyse(variants, documents, questions, tick)
    used = TheorySettings(variants.layer(None), draws=stage.draws, probes=stage.probes)
    return report.analyse(variants, questions, documents["forget"], used, tick, {})


def _renamed(report: Report, names: Mapping[str, str]) -> Report:
    """The report with labels in place of run folders."""

    def text(value: Any) -> Any:
        if isinstance(value, str):
            for path, name in names.items():
                value = value.replace(path, name)
        return value

    tables = [
        replace(table, rows=[{key: text(value) for key, value in row.items()} for row in table.rows])
        for table in report.tables
    ]
    panels = [
        type(panel)(panel.y_label, {text(name): points for name, points in panel.lines.items()})
        for panel in report.panels
    ]
    about = {key: [text(each) for each in value] if isinstance(value, list) else value for key, value in
             report.about.items()}  # fmt: skip
    return Report(
        report.name, report.title, about, [text(each) for each in report.notes], tables, panels, report.x_label
    )


def _ngrams(
    target: Target, stage: Stage, own: list[tuple[str, Model]], out: Path, folder: Path, say: Say
) -> dict[str, Any]:
    """Hard negatives: n-grams by their likeness to their document in place of an option (Figure 4, Tables 2 to 5)."""
    from robust_unlearning.perturb.embedders import load_embedder
    from robust_unlearning.perturb.ngrams import NgramSettings, select_ngrams

    texts = [text for corpus in stage.corpora for text in read_documents(TextSource.model_validate({"path": corpus}))]
    settings = NgramSettings(n=stage.n, each=stage.each, sample=stage.sample)
    say(f"  n-grams of {len(texts)} documents")
    record, _ = select_ngrams(texts, load_embedder(stage.embedder), settings, files.cache_dir() / "ngrams")
    path = folder / "ngrams.json"
    files.write_json(path, record)
    classes = harmfulness.read_classes(str(path))
    suite = suites_of(target)[0]
    recipe = open_run(out / own[0][1].run).recipe
    scorer = Scorer(target, recipe)
    records: dict[str, list[Record]] = {}
    right: dict[str, dict[str, list[bool]]] = {}
    places = [
        ("base", recipe.model, out / "base"),
        *((text, str(out / each.run), out / each.run) for text, each in own),
    ]
    for text, name, place in places:
        say(f"  {text} on {', '.join(map(str, stage.n))}-grams")
        for n in stage.n:
            asked = _with_ngrams(suite, [each.text for each in classes.values() if each.n == n])
            rows = scorer.evaluate(name, asked, place / "scores" / f"{n}-grams").records
            records.setdefault(text, []).extend(replace(record, id=f"{n}:{record.id}") for record in rows)
            odd = [record for record in rows if record.task.perturbed and not record.task.control]
            right.setdefault(text, {})[str(n)] = [bool(record.correct) for record in odd]
    report = harmfulness.analyse(records, classes)
    return {**_written(report, own, folder), "right": right, "similarity": record["similarity"]}


def _with_ngrams(suite: Suite, ngrams: list[str]) -> Suite:
    """The suite's perturbed questions with n-grams as forget-tokens, in place of an option where options are shown."""
    questions = {}
    for name, each in suite.questions.items():
        if each.perturb:
            place = "option" if any(map(shows_options, each.styles)) else each.perturb[0]
            questions[name] = each.model_copy(update={"perturb": (place,)})
    return suite.model_copy(update={"questions": questions, "forget_tokens": tuple(ngrams), "texts": {}})
