"""The per-question view as HTML: counts over all questions, then a card a question with a bar for each option."""

from __future__ import annotations

from collections.abc import Sequence

from robust_unlearning.data.questions import LETTERS
from robust_unlearning.report.flips import BACK, KINDS, SHOWN, STAYED, Answer, Case, Flips
from robust_unlearning.report.markup import Names, attribute, download, plain, table, text
from robust_unlearning.report.tables import csv_table

FORMS = {"forget": "with the forget-token", "control": "with an unrelated word", "clean": "as it was"}

CONTROL_RIGHT = "of the flipped, those that the unlearned model answers with an unrelated word in the token's place"


def flips_view(view: Flips, names: Names, within: str) -> str:
    """The counts, what the kinds mean, and the cards of each kind that is shown."""
    base, unlearned, rna = view.models
    name = names.new(f"{within}-questions")
    parts = [
        f"<p>{len(view.cases)} questions with a forget-token in them, asked of {plain(base)} (the base), "
        f"{plain(unlearned)} (unlearned) and {plain(rna)} (unlearned with noise, RNA). Each is of one kind.</p>",
        _counts(view, within),
    ]
    for kind in SHOWN:
        found = view.of_kind(kind)
        cards = "\n".join(_card(case, view.models) for case in found[: view.limit])
        shown = f"{min(len(found), view.limit)} of {len(found)} shown, the largest change first" if found else "none"
        parts.append(f'<h3>{text(_sentence(kind))} <span class="note">{shown}</span></h3>')
        parts.append(f"<p>{text(_sentence(KINDS[kind]))}.</p>\n{cards}")
    return f'<div class="questions" id="{name}">{"".join(parts)}</div>'


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _counts(view: Flips, within: str) -> str:
    """How many questions of each task are of each kind, and the CSV of every question."""
    rows = []
    for task, own in view.counts().items():
        flipped = [case for case in view.cases if case.task == task and case.kind in (BACK, STAYED)]
        controls = [case.answers[1]["control"] for case in flipped if "control" in case.answers[1]]
        right = f"{sum(each.correct for each in controls)} of {len(controls)}"
        rows.append([task, str(own.total()), *(str(own[kind]) for kind in KINDS), right])
    label = "Perturbed questions by what became of them"
    numbers = csv_table(COLUMNS, map(_row, view.cases)).encode()
    link = download(f"{within}-questions.csv", numbers, "every question, CSV")
    meanings = "".join(
        f"<div><dt>{text(column)}</dt><dd>{text(what)}</dd></div>"
        for column, what in {**KINDS, "control right": CONTROL_RIGHT}.items()
    )
    headers = ["task", "n", *KINDS, "control right"]
    return (
        f'<figure class="table"><figcaption><strong>{label}</strong> <span class="files">{link}</span></figcaption>'
        f'{table(headers, rows, label)}<dl class="notes">{meanings}</dl></figure>'
    )


COLUMNS = (
    "task", "id", "forget_token", "control_token", "kind", "base_right", "unlearned_right", "rna_right", "base_p_right",
    "unlearned_p_right", "rna_p_right",
)  # fmt: skip
"""Of the CSV of every question; p is that of the right answer among the options."""


def _row(case: Case) -> list[object]:
    said = [each["forget"] for each in case.answers]
    right = [int(each.correct) for each in said]
    shares = [f"{each.shares[case.clean.answer]:.6f}" for each in said]
    return [case.task, case.clean.id, case.forget, case.control, case.kind, *right, *shares]


def _card(case: Case, models: Sequence[str]) -> str:
    """A question: its text with the token marked, a row an option with a bar a model, what was said without it."""
    asked = "".join(f"<mark>{plain(part)}</mark>" if token else plain(part) for part, token in case.parts)
    head = "".join(f'<th scope="col">{plain(name)}</th>' for name in models)
    options = "".join(_option(case, index, models) for index in range(len(case.asked.choices)))
    others = "".join(_otherwise(case, form, models) for form in ("clean", "control"))
    return f"""<article class="card">
<header>{plain(case.task)} · {plain(case.clean.id)}</header>
<p class="asked">{asked}</p>
<table class="options"><thead><tr><th scope="col">option, probability among the options</th>{head}</tr></thead>
<tbody>{options}</tbody><tfoot>{others}</tfoot></table>
<details class="numbers"><summary>Log-probabilities</summary>{_logprobs(case, models)}</details>
</article>"""


def _option(case: Case, index: int, models: Sequence[str]) -> str:
    choice = plain(case.asked.choices[index])
    if index == case.replaced:
        choice = (
            f'<mark>{choice}</mark> <span class="note">in place of <del>{plain(case.clean.choices[index])}</del></span>'
        )
    right = index == case.clean.answer
    label = f'<span class="letter">{LETTERS[index]}</span> {choice}' + (
        ' <span class="right">right answer</span>' if right else ""
    )
    cells = []
    for name, forms in zip(models, case.answers, strict=True):
        answer = forms["forget"]
        share, chosen = answer.shares[index], index == answer.prediction
        sign = f' <span aria-hidden="true">{"✓" if right else "✗"}</span>' if chosen else ""
        kind = f"bar {('good' if right else 'bad') if chosen else ''}".strip()
        said = f"{name}: {_percent(share)}" + (", chosen" if chosen else "")
        cells.append(
            f'<td><span class="{kind}" aria-label="{attribute(said)}" role="img" style="--share: {100 * share:.1f}%">'
            f"<i></i><b>{_percent(share)}{sign}</b></span></td>"
        )
    return f'<tr{" class=answer" if right else ""}><th scope="row">{label}</th>{"".join(cells)}</tr>'


def _otherwise(case: Case, form: str, models: Sequence[str]) -> str:
    """The row of what the models chose in another form; nothing where none was asked it."""
    if not any(form in forms for forms in case.answers):
        return ""
    label = FORMS[form] + (f" ({case.control})" if form == "control" else "")
    cells = "".join(f"<td>{_chose(forms.get(form))}</td>" for forms in case.answers)
    return f'<tr><th scope="row">{plain(label)}</th>{cells}</tr>'


def _chose(answer: Answer | None) -> str:
    if answer is None:
        return "not asked"
    kind, sign, word = ("good", "✓", "right") if answer.correct else ("bad", "✗", "wrong")
    return f'<span class="{kind}">{LETTERS[answer.prediction]} {sign}<span class="unseen"> {word}</span></span>'


def _logprobs(case: Case, models: Sequence[str]) -> str:
    letters = [LETTERS[index] for index in range(len(case.asked.choices))]
    rows = [
        [f"{name}, {FORMS[form]}", *(f"{each:.3f}" for each in answer.logprobs)]
        for name, forms in zip(models, case.answers, strict=True)
        for form, answer in forms.items()
    ]
    return table(["log p, nats", *letters], rows, "Log-probabilities of the options")


def _percent(share: float) -> str:
    return "< 1 %" if 0 < share < 0.01 else "> 99 %" if 0.99 < share < 1 else f"{100 * share:.0f} %"
