"""The stages that look at the main stage's models: the paper's theory, layers, activations, and hard negatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from robust_unlearning import files
from robust_unlearning.analyze import activations, harmfulness, inputs, ngram_answers, noise_sensitivity
from robust_unlearning.analyze.output import Report, write
from robust_unlearning.analyze.variants import Variants
from robust_unlearning.data.corpora import read_documents
from robust_unlearning.data.questions import shows_options
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.evaluator import Evaluator, open_target
from robust_unlearning.evaluate.record import Record
from robust_unlearning.evaluate.suite import Suite
from robust_unlearning.experiments.runner import Say, bare, scored
from robust_unlearning.recipe import TextSource
from robust_unlearning.reproduce.grid import Grid, Model, suites_of
from robust_unlearning.reproduce.target import Stage, Target
from robust_unlearning.reproduce.theory import report
from robust_unlearning.reproduce.theory.measure import TheorySettings
from robust_unlearning.run.folder import open_run


def models_of(stage: Stage, grid: Grid, chosen: Mapping[str, float]) -> list[Model]:
    """The models an analysis looks at, the first seed's, without and with the chosen noise.

    Where no scale of the noise was chosen, the one without alone.

    Raises:
        UserError: the main stage has no model of a recipe.
    """
    models: list[Model] = []
    for recipe in stage.recipes:
        scales = [0.0, *([chosen[recipe]] if stage.rna and recipe in chosen else [])]
        by_scale = [grid.at(recipe, scale) for scale in scales]
        if not by_scale[0]:
            raise UserError(f"the main stage has no model of {recipe}; it has {', '.join(grid.recipes) or 'none'}.")
        models += [seeds[0] for seeds in by_scale if seeds]
    return models


def analyse(
    target: Target, stage: Stage, grid: Grid, chosen: Mapping[str, float], out: Path, folder: Path, say: Say
) -> dict[str, Any]:
    """Run an analysis and write its tables and figure into `folder`/analysis; returns its numbers."""
    models = models_of(stage, grid, chosen)
    if stage.kind == "ngrams":
        analysis, more = _ngrams(target, stage, models, out, folder, say)
    else:
        labels = {str(out / model.run): model.label for model in models}
        variants = Variants(list(labels))
        variants.all = [replace(variant, name=labels.get(variant.name, variant.name)) for variant in variants.all]
        analysis = _analysis(target, stage, variants, lambda name: say(f"  measuring {name}"))
        layers = {model.label: open_run(out / model.run).recipe.layer for model in models}
        more = {"layers": layers, "depth": variants.depth}
    if without := [grid.recipes[recipe] for recipe in stage.recipes if stage.rna and recipe not in chosen]:
        text = f"Looked at without RNA only, as no scale of the noise was chosen: {', '.join(without)}."
        analysis = replace(analysis, notes=[*analysis.notes, text])
    subjects = [{key: getattr(model, key) for key in ("label", "recipe", "title", "noise")} for model in models]
    return {**as_data(analysis, folder), "subjects": subjects, **more}


def as_data(analysis: Report, folder: Path) -> dict[str, Any]:
    """Write an analysis into `folder`/analysis; returns its numbers, notes, and how its tables are headed."""
    write(analysis, folder)
    data = files.read_json(folder / "analysis" / f"{analysis.name}.json")
    shown = {
        table.key: {"title": table.title, "columns": dict(zip(table.columns, table.headers, strict=True))}
        for table in analysis.tables
    }
    return {**data, "name": analysis.name, "notes": list(analysis.notes), "shown": shown}


def _analysis(target: Target, stage: Stage, variants: Variants, tick: Callable[[str], None]) -> Report:
    """The analysis of one kind, with the stage's sizes."""
    documents = {side: variants.documents(side, stage.documents, stage.max_tokens) for side in ("forget", "retain")}
    if stage.kind == "noise-sensitivity":
        settings = noise_sensitivity.ProbeSettings(probes=stage.probes)
        return noise_sensitivity.analyse(variants, documents["forget"], settings, tick)
    questions = inputs.prompts(_harmless(target), variants.tokenizer, stage.questions)
    if stage.kind == "activations":
        return activations.analyse(variants, documents, questions, tick)
    used = TheorySettings(variants.layer(None), draws=stage.draws, probes=stage.probes)
    return report.analyse(variants, questions, documents["forget"], used, tick, {})


def _harmless(target: Target) -> Suite:
    """The target's suite, tokens only in what is to be kept."""
    return inputs.harmless(suites_of(target)[0], target.roles.model_dump(exclude={"related"}))


def _ngrams(
    target: Target, stage: Stage, models: list[Model], out: Path, folder: Path, say: Say
) -> tuple[Report, dict[str, Any]]:
    """Hard negatives: n-grams by their likeness to their document in place of an option.

    Classes over all documents (Figure 4) on models without noise, and the n-grams most like each document (Tables 2 to
    5) on all: two selections, asked and tabled by themselves.
    """
    from robust_unlearning.perturb.embedders import load_embedder
    from robust_unlearning.perturb.ngrams import NgramSettings, select_ngrams

    texts = [text for corpus in stage.corpora for text in read_documents(TextSource.model_validate({"path": corpus}))]
    embedder = load_embedder(stage.embedder)
    by_class = NgramSettings(n=stage.n, each=stage.each, sample=stage.sample)
    by_document = NgramSettings(n=stage.n, per_document=stage.per_document)
    count = min(stage.documents, len(texts))
    spread = [texts[index * len(texts) // count] for index in range(count)]
    recipe = open_run(out / models[0].run).recipe
    evaluator = Evaluator(recipe.dtype, recipe.device)
    variants = {"base": (bare(recipe), out / "base")}
    variants |= {model.label: (open_target(str(out / model.run)), out / model.run) for model in models}
    plain = ["base", *(model.label for model in models if not model.noise)]
    reports, more, suite = [], {}, _harmless(target)
    for settings, documents, labels in ((by_class, texts, plain), (by_document, spread, list(variants))):
        say(f"  n-grams of {len(documents)} documents: {settings.reading.replace('_', ' ')}")
        record, _ = select_ngrams(documents, embedder, settings, files.cache_dir() / "ngrams")
        path = folder / f"ngrams-{settings.reading}.json"
        files.write_json(path, record)
        classes = ngram_answers.read_classes(str(path))
        records: dict[str, list[Record]] = {}
        for label in labels:
            say(f"  {label} on {', '.join(map(str, stage.n))}-grams")
            variant, place = variants[label]
            for n in stage.n:
                asked = with_ngrams(suite, [ngram.text for ngram in classes.values() if ngram.n == n])
                kept = place / "scores" / f"{n}-grams-{settings.reading}"
                rows = scored(evaluator, variant, asked, kept).records
                records.setdefault(label, []).extend(replace(row, id=f"{n}:{row.id}") for row in rows)
        reports.append(harmfulness.analyse(records, classes))
        more[settings.reading] = ngram_answers.answers(records, classes) | {"similarity": record["similarity"]}
    first, second = reports
    tables, notes = [*first.tables, *second.tables], [*first.notes, *second.notes]
    return replace(first, tables=tables, notes=notes), more


def with_ngrams(suite: Suite, ngrams: Sequence[str]) -> Suite:
    """The suite's questions that tokens are put into, with n-grams as forget-tokens, in place of an option where
    options are shown; what plays no part in that is left out.
    """
    questions = {}
    for name, source in suite.questions.items():
        if source.perturb:
            place = "option" if any(map(shows_options, source.styles)) else source.perturb[0]
            questions[name] = source.model_copy(update={"perturb": (place,)})
    return suite.model_copy(update={"questions": questions, "forget_tokens": tuple(ngrams), "texts": {}})
