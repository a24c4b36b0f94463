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

from robust_unlearning.analyze.inputs import Prompt, batches, joined
from robust_unlearning.analyze.output import Panel, Report, side
from robust_unlearning.analyze.stack import Stack
from robust_unlearning.analyze.subjects import Subjects, recipe_of
from robust_unlearning.evaluate.evaluator import Target
from robust_unlearning.report.tables import Table
from robust_unlearning.stats.estimates import Array, mean_interval, paired_difference


@dataclass(frozen=True)
class Texts:
    """Documents under a model and its base: arrays [L, n]."""

    cosine: Array
    norm: Array
    base_norm: Array


def compare_texts(own: Sequence[Tensor], base: Sequence[Tensor], mask: Tensor) -> Texts:
    """Hidden states of L layers, each [b, t, d], of a model and of its base; `mask` [b, t] is 1 on tokens."""
    weight = mask / mask.sum(dim=1, keepdim=True)

    def over_tokens(values: Sequence[Tensor]) -> Array:
        return torch.stack([(each * weight).sum(dim=1) for each in values]).cpu().double().numpy()

    return Texts(
        over_tokens([cosine_similarity(a, b, dim=-1) for a, b in zip(own, base, strict=True)]),
        over_tokens([each.norm(dim=-1) for each in own]),
        over_tokens([each.norm(dim=-1) for each in base]),
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
        for form, each in states.items():
            cosines = cosine_similarity(each[..., None, :], directions, dim=-1)  # [L, n, topics]
            toward[form] = cosines.amax(dim=-1).double().numpy()
    return Pull(moved("forget"), moved("control"), toward)


def question_states(stack: Stack, group: Sequence[Prompt], pad: int) -> dict[str, dict[str, Tensor]]:
    """Place (`answer`, `token`) -> form -> states [L, n, d]."""
    last = [-1] * len(group)
    inside = [each.token_place for each in group]
    places = {"answer": (last, ("clean", "forget", "control")), "token": (inside, ("forget", "control"))}
    return {
        place: {form: stack.at([getattr(each, form) for each in group], where, pad) for form in forms}
        for place, (where, forms) in places.items()
    }


def steering(target: Target) -> Tensor | None:
    """The run's steering directions [topics, d]; None where there are none."""
    path = target.folder / "steering.safetensors" if target.folder else None
    if path is None or not path.exists():
        return None
    from safetensors.torch import load_file

    return torch.stack(list(load_file(path).values())).float()


def analyse(
    subjects: Subjects,
    texts: Mapping[str, Sequence[Sequence[int]]],
    questions: Mapping[str, Sequence[Prompt]],
    tick: Callable[[str], None],
) -> Report:
    """All targets on the same texts and questions.

    Args:
        texts: `forget` and `retain` documents, as tokens.
        questions: where the token stands -> prompts.
        tick: called with the name of each target when it begins.
    """
    stack = Stack(subjects.model)
    text_rows, question_rows = [], []
    for target in subjects.targets:
        tick(target.name)
        if target.delta is not None:
            for text, sequences in texts.items():
                found = _texts(stack, subjects, target, sequences)
                text_rows += [_text_row(target.name, text, found, layer) for layer in stack.layers]
        with subjects.applied(target):
            for where, group in questions.items():
                states = question_states(stack, group, subjects.pad)
                for place, forms in states.items():
                    own = pull(forms, steering(target))
                    question_rows += [_question_row(target.name, where, place, own, layer) for layer in stack.layers]
    tables = [
        Table("Forget and retain text: model against base", _TEXT_COLUMNS, text_rows, key="texts"),
        Table("Questions at the token before the answer: form against clean", _ANSWER_COLUMNS,
              [row for row in question_rows if row["place"] == "answer"], key="answer"),
        Table("Questions at the token that was put in: forget-token against control word", _TOKEN_COLUMNS,
              [row for row in question_rows if row["place"] == "token" and row["forget_toward"] != ""], key="token"),
    ]  # fmt: skip
    tables = [each for each in tables if each.rows]
    notes = [
        "95 % intervals over documents or questions (n). Layers count from 0; a row shows the layer's output. Shifts "
        "are over ‖h_clean‖. Cosines to u: the largest over the run's steering directions.",
        *_notes(subjects, question_rows),
    ]
    about = {
        "base": subjects.checkpoint.name,
        "targets": [each.name for each in subjects.targets],
        "documents": {key: len(value) for key, value in texts.items()},
        "questions": {key: len(value) for key, value in questions.items()},
    }
    where, names = next(iter(questions)), [each.name for each in subjects.targets]
    panels = [
        Panel(f"shift at the answer, token in {where}, over ‖h_clean‖\nforget-token less control word",
              _lines(question_rows, names, where, "answer", "excess")),
        Panel(f"cosine to u at the token, in {where}\nforget-token less control word",
              _lines(question_rows, names, where, "token", "excess_toward")),
    ]  # fmt: skip
    panels = [each for each in panels if any(each.lines.values())]
    return Report("activations", "Activations", about, notes, tables, panels, "layer")


def _texts(stack: Stack, subjects: Subjects, target: Target, sequences: Sequence[Sequence[int]]) -> Texts:
    """The same batches through the base and through the target."""
    parts = []
    for batch in batches(sequences, subjects.pad, tokens=2048):
        trunk = stack.trunk(batch)
        base = stack.states(trunk)
        with subjects.applied(target):
            own = stack.states(trunk)  # what enters layer 0 is the embedding, which no delta changes
        parts.append(compare_texts(own, base, trunk.mask))
    return joined(parts)


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


def _text_row(name: str, text: str, found: Texts, layer: int) -> dict[str, Any]:
    numbers = {key: mean_interval(values[layer]) for key, values in vars(found).items()}
    return {"target": name, "text": text, "layer": layer, **numbers, "n": found.cosine.shape[1]}


def _question_row(name: str, where: str, place: str, own: Pull, layer: int) -> dict[str, Any]:
    row: dict[str, Any] = {"target": name, "where": where, "place": place, "layer": layer}
    row |= dict.fromkeys(("forget", "control", "excess", "excess_toward"), "")
    row |= dict.fromkeys((f"{form}_toward" for form in ("clean", "forget", "control")), "")
    if own.forget is not None and own.control is not None:
        row |= {"forget": mean_interval(own.forget[layer]), "control": mean_interval(own.control[layer])}
        row |= {"excess": paired_difference(own.forget[layer], own.control[layer]), "n": own.forget.shape[1]}
    if own.toward:
        row |= {f"{form}_toward": mean_interval(each[layer]) for form, each in own.toward.items()}
        row["excess_toward"] = paired_difference(own.toward["forget"][layer], own.toward["control"][layer])
        row["n"] = own.toward["forget"].shape[1]
    return row


def _lines(
    rows: Sequence[dict[str, Any]], names: Sequence[str], where: str, place: str, field: str
) -> dict[str, list[tuple[float, Any]]]:
    """A line over layers for each model; an empty one where there is nothing, so that colours mean the same model."""
    lines: dict[str, list[tuple[float, Any]]] = {name: [] for name in names}
    for row in rows:
        if (row["where"], row["place"]) == (where, place) and row[field] != "":
            lines[row["target"]].append((row["layer"], row[field]))
    return lines


def _notes(subjects: Subjects, rows: Sequence[dict[str, Any]]) -> list[str]:
    """At each delta's own layer: does a forget-token move the answer's state more than a control word, and toward u?"""
    notes = []
    for target in subjects.targets:
        recipe = recipe_of(target)
        for row in rows:
            if recipe is None or row["target"] != target.name or row["layer"] != recipe.layer:
                continue
            field = "excess" if row["place"] == "answer" else "excess_toward"
            if row[field] == "":
                continue
            said = {"higher": "more than", "lower": "less than", "the same": "as much as"}
            word = said.get(side(row[field]), "not clearly more or less than")
            what = "moves the answer's state" if field == "excess" else "is pulled toward u"
            notes.append(
                f"{target.name}, layer {recipe.layer}, token in {row['where']}: a forget-token {what} {word} a control "
                f"word ({row[field].value:+.3f} [{row[field].low:+.3f}, {row[field].high:+.3f}], n={row['n']})."
            )
    return notes
