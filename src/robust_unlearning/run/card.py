"""The model card of a run: what was done, to what, how it scored, whom to cite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robust_unlearning.methods.table import RNA_CITATION, citation
from robust_unlearning.recipe import Recipe
from robust_unlearning.stats.format import NATS, NumberForm, interval


def model_card(recipe: Recipe, record: dict[str, Any], scores: dict[str, Any]) -> str:
    """The README of a run folder or of an applied model: what was done, to what, how it scored, whom to cite.

    Args:
        record: what `run.json` says; empty before the first write.
        scores: of the latest evaluation, task -> numbers; empty where there was none.
    """
    rna = (
        f"RNA with noise_std {recipe.rna_std:g} (variance {recipe.rna_variance:g}) at layers "
        f"{list(recipe.noised_layers)}, site {recipe.noise_site}"
        if recipe.rna_std
        else "no RNA"
    )
    lines = [
        "---",
        "library_name: transformers",
        *([f"base_model: {recipe.model}"] if "/" in recipe.model and not recipe.model.startswith((".", "/")) else []),
        "tags: [machine-unlearning, robust-unlearning]",
        "---",
        f"# {recipe.model}, unlearned by {recipe.title}",
        "",
        f"Forgotten: {', '.join(recipe.topics)}. Method: {recipe.title} ({recipe.spec.summary}), {rna}, "
        f"{recipe.steps} steps at learning rate {recipe.learning_rate:g}. "
        f"Changed: `{recipe.train_tensors}` of layers {', '.join(map(str, recipe.band_layers))}; "
        "every other tensor is the base's, byte for byte.",
        "",
        "Unlearning of this kind hides knowledge rather than erasing it; fine-tuning may bring it back. An "
        "unlearned model may answer wrongly when a word of the forgotten domain stands in a harmless question: "
        "see the perturbed scores below, if there are any.",
        "",
        "## Scores",
        "",
        *(_score_lines(scores) or ["None yet: run `unlearn eval` on this folder."]),
        "",
        "## Provenance",
        "",
        f"- base: `{recipe.model}`, fingerprint `{record.get('model_fingerprint', 'unknown')}`",
        *(
            f"- {topic}: " + ", ".join(f"{side} text `{value}`" for side, value in each.items()) + " (fingerprints)"
            for topic, each in record.get("data_fingerprints", {}).items()
        ),
        f"- recipe hash `{recipe.content_hash()}`, seed {recipe.seed}, status {record.get('status')}",
        *(f"- {key}: {value}" for key, value in record.get("environment", {}).items()),
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe.as_yaml().rstrip(),
        "```",
        "",
        "## Citation",
        "",
        "```bibtex",
        *dict.fromkeys([recipe.spec.bibtex, *([citation(RNA_CITATION)] if recipe.rna_std else [])]),
        "```",
        "",
    ]
    return "\n".join(lines)


def _score_lines(scores: dict[str, Any]) -> list[str]:
    lines = []
    for task, score in scores.items():
        if "acc" in score:
            stderr = "" if score["stderr"] is None else f" ± {100 * score['stderr']:.1f}"
            kind = f", {score['scored']} scored" if "scored" in score else ""
            lines.append(f"| {task}{kind} | {100 * score['acc']:.1f}{stderr} % | {counted(score)} questions |")
        elif "perplexity" in score:
            nats = f"{score['nats_per_token']:.3f} {interval(score['low'], score['high'], NumberForm('.3f', '.3f'))}"
            lines.append(f"| {task} | {nats} nats a token | {score['n']} documents |")
        if "excess_harm" in score:
            harm = score["excess_harm"]
            nats = f"{harm['value']:+.3f} {interval(harm['low'], harm['high'], NATS)}"
            lines.append(f"| {task}, excess harm | {nats} nats a token | {harm['n']} questions |")
    return ["| task | score | n |", "|---|---|---|", *lines] if lines else []


def counted(row: Mapping[str, Any]) -> str:
    """How many questions a score rests on; says so where that is not all of them."""
    return f"{row['n']} of {row['of']} (partial)" if row.get("partial") else str(row["n"])
