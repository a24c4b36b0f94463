"""What unlearning did to hidden states, and what a forget-token does to a harmless question's, layer by layer.

Texts: cosine to the base and L2 norm on forget and retain documents, means over a document's tokens. Questions: the
backdoor picture of section 5.1. Where unlearning has tied forget-tokens to a steering direction u, a forget-token in a
question should pull its states toward u, at the token itself and at the token before the answer, and an unrelated word
in the same place should not.

Shapes: L layers, n documents or questions, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from robust_unlearning.analyze.inputs import Prompt, batches, clusters_of, groups_of, joined, structure
from robust_unlearning.analyze.output import Panel, Report, side
from robust_unlearning.analyze.stack import Stack
from robust_unlearning.analyze.variants import Variants
from robust_unlearning.evaluate.evaluator import Variant
from robust_unlearning.report.tables import Table
from robust_unlearning.stats.estimates import Array
from robust_unlearning.stats.factors import Groups
from robust_unlearning.stats.format import NATS, shown
from robust_unlearning.stats.means import mean_interval, paired_difference


@dataclass(frozen=True)
class Texts:
    """Documents under a model and its base: arrays [L, n]."""

    cosine: Array
    norm: Array
    base_norm: Array


def compare_texts(states: Sequence[Tensor], base: Sequence[Tensor], mask: Tensor) -> Texts:
    """Hidden states of L layers, each [b, t, d], of a model and of its base; `mask` [b, t] is 1 on tokens."""
    weight = mask / mask.sum(dim=1, keepdim=True)

    def over_tokens(values: Sequence[Tensor]) -> Array:
        return torch.stack([(layer * weight).sum(dim=1) for layer in values]).cpu().double().numpy()

    return Texts(
        over_tokens([cosine_similarity(a, b, dim=-1) for a, b in zip(states, base, strict=True)]),
        over_tokens([layer.norm(dim=-1) for layer in states]),
        over_tokens([layer.norm(dim=-1) for layer in base]),
    )


@dataclass(frozen=True)
class Pull:
    """A question's states at one place under a model: arrays [L, n].

    Attributes:
        forget, control: ‖h_form − h_clean‖ / ‖h_clean‖; None at the token itself, which the clean form has not.
        toward: form -> cosine of its state to the steering direction, the largest over the run's topics; empty for
            models that were not steered.
    """

    forget: Array | None
    control: Array | None
    toward: Mapping[str, Array]


def pull(states: Mapping[str, Tensor], directions: Tensor | None) -> Pull:
    """States [L, n, d] of the forms (`clean` may be missing), and steering directions [topics, d]."""
    clean = states.get("clean")

    def moved(form: str) -> Array | None:
        if clean is None:
            return None
        return ((states[form] - clean).norm(dim=-1) / clean.norm(dim=-1)).double().numpy()

    toward = {}
    if directions is not None:
        for form, hidden in states.items():
            cosines = cosine_similarity(hidden[..., None, :], directions, dim=-1)  # [L, n, topics]
            toward[form] = cosines.amax(dim=-1).double().numpy()
    return Pull(moved("forget"), moved("control"), toward)


def question_states(stack: Stack, group: Sequence[Prompt], pad: int) -> dict[str, dict[str, Tensor]]:
    """Place (`answer`, `token`) -> form -> states [L, n, d]."""
    last, inside = [-1] * len(group), [prompt.token_place for prompt in group]
    places = {"answer": (last, ("clean", "forget", "control")), "token": (inside, ("forget", "control"))}
    return {
        place: {form: stack.at([getattr(prompt, form) for prompt in group], columns, pad) for form in forms}
        for place, (columns, forms) in places.items()
    }


def steering(variant: Variant) -> Tensor | None:
    """The run's steering directions [topics, d]; None where there are none."""
    path = variant.folder / "steering.safetensors" if variant.folder else None
    if path is None or not path.exists():
        return None
    from safetensors.torch import load_file

    return torch.stack(list(load_file(path).values())).float()


def analyse(
    variants: Variants,
    texts: Mapping[str, Sequence[Sequence[int]]],
    questions: Mapping[str, Sequence[Prompt]],
    tick: Callable[[str], None],
) -> Report:
    """All models on the same texts and questions.

    Args:
        texts: `forget` and `retain` documents, as tokens.
        questions: where the token stands -> prompts.
        tick: called with the name of each model when it begins.
    """
    stack = Stack(variants.model)
    text_rows: list[Row] = []
    question_rows: dict[str, list[Row]] = {"answer": [], "token": []}
    for variant in variants.all:
        tick(variant.name)
        if variant.delta is not None:
            for text, sequences in texts.items():
                compared = _texts(stack, variants, variant, sequences)
                text_rows += [_text_row(variant.name, text, compared, layer) for layer in stack.layers]
        with variant.applied(variants.model):
            for where, group in questions.items():
                for place, forms in question_states(stack, group, variants.pad).items():
                    pulled = pull(forms, steering(variant))
                    groups = {form: clusters_of(group) if form == "clean" else groups_of(group) for form in forms}
                    rows = [_question_row(variant.name, where, place, pulled, layer, groups) for layer in stack.layers]
                    question_rows[place] += rows if place == "answer" or pulled.toward else []
    tables = [
        Table("Forget and retain text: model against base", _TEXT_COLUMNS, text_rows, key="texts"),
        Table("Questions at the token before the answer: form against clean", _ANSWER_COLUMNS, question_rows["answer"],
              key="answer"),
        Table("Questions at the token that was put in: forget-token against control word", _TOKEN_COLUMNS,
              question_rows["token"], key="token"),
    ]  # fmt: skip
    notes = [
        f"95 % intervals over documents or questions (n). {structure(questions)} Layers count from 0; a row shows the "
        "layer's output. Shifts are over ‖h_clean‖. Cosines to u: the largest over the run's steering directions.",
        *_notes(variants, question_rows),
    ]
    about = {
        **variants.about,
        "documents": {key: len(value) for key, value in texts.items()},
        "questions": {key: len(value) for key, value in questions.items()},
    }
    where = next(iter(questions))
    panels = [
        Panel(f"shift at the answer, token in {where}, over ‖h_clean‖\nforget-token less control word",
              _lines(question_rows["answer"], variants, where, "excess")),
        Panel(f"cosine to u at the token, in {where}\nforget-token less control word",
              _lines(question_rows["token"], variants, where, "excess_toward")),
    ]  # fmt: skip
    return Report(
        "activations",
        "Activations",
        about,
        notes,
        [table for table in tables if table.rows],
        [panel for panel in panels if any(panel.lines.values())],
        "layer",
    )


def _texts(stack: Stack, variants: Variants, variant: Variant, sequences: Sequence[Sequence[int]]) -> Texts:
    """The same batches through the base and through the variant."""
    parts = []
    for batch in batches(sequences, variants.pad, tokens=2048):
        trunk = stack.trunk(batch)
        base = stack.states(trunk)
        with variant.applied(variants.model):
            states = stack.states(trunk)  # what enters layer 0 is the embedding, which no delta changes
        parts.append(compare_texts(states, base, trunk.mask))
    return joined(parts)


Row = dict[str, Any]
_TOWARD = {"clean": "clean_toward", "forget": "forget_toward", "control": "control_toward"}
_TEXT_COLUMNS = {
    "target": "model", "text": "text", "layer": "layer", "cosine": "cosine to base", "norm": "norm",
    "base_norm": "base's norm", "n": "n",
}  # fmt: skip
_ANSWER_COLUMNS = {
    "target": "model", "where": "token in", "layer": "layer", "forget": "shift, forget-token",
    "control": "shift, control", "excess": "difference", "clean_toward": "cos u, clean",
    "forget_toward": "forget-token", "control_toward": "control", "excess_toward": "forget-token − control", "n": "n",
}  # fmt: skip
_TOKEN_COLUMNS = {
    "target": "model", "where": "token in", "layer": "layer", "forget_toward": "cos u, forget-token",
    "control_toward": "control", "excess_toward": "difference", "n": "n",
}  # fmt: skip


def _text_row(name: str, text: str, compared: Texts, layer: int) -> Row:
    numbers = {key: mean_interval(values[layer]) for key, values in vars(compared).items()}
    return {"target": name, "text": text, "layer": layer, **numbers, "n": compared.cosine.shape[1]}


def _question_row(name: str, where: str, place: str, pulled: Pull, layer: int, groups: Mapping[str, Groups]) -> Row:
    """One row; `groups` say of each form how the questions hang together."""
    row: Row = {"target": name, "where": where, "place": place, "layer": layer}
    row |= dict.fromkeys(["forget", "control", "excess", *_TOWARD.values(), "excess_toward"])
    words = groups["forget"]
    if pulled.forget is not None and pulled.control is not None:
        forget, control = pulled.forget[layer], pulled.control[layer]
        row |= {"forget": mean_interval(forget, words), "control": mean_interval(control, words)}
        row |= {"excess": paired_difference(forget, control, words), "n": len(forget)}
    if pulled.toward:
        row |= {_TOWARD[form]: mean_interval(cosines[layer], groups[form]) for form, cosines in pulled.toward.items()}
        forget, control = pulled.toward["forget"][layer], pulled.toward["control"][layer]
        row |= {"excess_toward": paired_difference(forget, control, words), "n": len(forget)}
    return row


def _lines(rows: Sequence[Row], variants: Variants, where: str, field: str) -> dict[str, list[tuple[float, Any]]]:
    """A line over layers for each model; an empty one where there is nothing, so that colours mean the same model."""
    lines: dict[str, list[tuple[float, Any]]] = {variant.name: [] for variant in variants.all}
    for row in rows:
        if row["where"] == where and row[field]:
            lines[row["target"]].append((row["layer"], row[field]))
    return lines


def _notes(variants: Variants, rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """At each delta's own layer: does a forget-token move the answer's state more than a control word, and toward u?"""
    notes = []
    words = {"higher": "more than", "lower": "less than", "the same": "as much as"}
    measured = {"answer": ("excess", "moves the answer's state"), "token": ("excess_toward", "is pulled toward u")}
    layers = {variant.name: recipe.layer for variant in variants.all if (recipe := variant.recipe())}
    for name, layer in layers.items():
        for place, (field, what) in measured.items():
            for row in rows[place]:
                if (row["target"], row["layer"]) == (name, layer):
                    word = words.get(side(row[field]), "not clearly more or less than")
                    notes.append(
                        f"{name}, layer {layer}, token in {row['where']}: a forget-token {what} {word} a control word "
                        f"({shown(row[field], NATS)}, n={row['n']})."
                    )
    return notes
