"""The per-question view: harmless questions that a forget-token flipped to wrong, and what noise did to them.

It reads the records (`records.jsonl`) that evaluations of a base, an unlearned model and its RNA twin left, and makes
the questions again from the suite: a record names its question and its tokens, and where a token goes follows from the
suite's seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from robust_unlearning import files
from robust_unlearning.data.questions import LETTERS, Question, read_questions
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import Record, Task
from robust_unlearning.evaluate.suite import Suite
from robust_unlearning.perturb.places import WHERE, perturb
from robust_unlearning.report.tables import Column, Table
from robust_unlearning.results.records import AnswerSource, Key, read_source
from robust_unlearning.stats.format import NumberForm

BACK, STAYED, BY_RNA, KEPT, LOST, BASE_WRONG = (
    "flipped, flipped back", "flipped, stayed wrong", "flipped by RNA", "right in all three", "lost anyway",
    "base wrong",
)  # fmt: skip
KINDS = {
    BACK: "the unlearned model is wrong with the forget-token and right without it; RNA is right again",
    STAYED: "the unlearned model is wrong with the forget-token and right without it; RNA is wrong too",
    BY_RNA: "the unlearned model is right with the forget-token, RNA is wrong",
    KEPT: "all three models are right with the forget-token",
    LOST: "the unlearned model is wrong with the forget-token and without it, so the token did not flip it",
    BASE_WRONG: "the base itself is wrong with the forget-token; every other kind is of questions that it answers",
}
"""Each perturbed question is of one of these kinds."""
SHOWN = (BACK, STAYED, BY_RNA)
"""The kinds that are shown question by question."""
CONTROL_RIGHT = "control right"
FORMS = {"forget": "with the forget-token", "control": "with an unrelated word", "clean": "as it was"}
"""Forms in which a question was asked, in words."""


@dataclass(frozen=True)
class Case:
    """One question with a forget-token in it, and what the three models said to it.

    Attributes:
        task: of the forget form, `SET/STYLE/WHERE`.
        clean: the question as it was.
        asked: the question with the forget-token in it.
        forget: the forget-token.
        control: the unrelated word that stands in its place in the control form.
        kind: one of `KINDS`.
        answers: for base, unlearned model and RNA, form ("forget", "control", "clean") -> what was said; forms that
            were not asked are left out.
    """

    task: str
    clean: Question
    asked: Question
    forget: str
    control: str
    kind: str
    answers: tuple[Mapping[str, Record], Mapping[str, Record], Mapping[str, Record]]

    @property
    def replaced(self) -> int | None:
        """The option that the token stands in place of; None where it stands in the question."""
        pairs = zip(self.clean.choices, self.asked.choices, strict=True)
        return next((index for index, (before, after) in enumerate(pairs) if before != after), None)

    @property
    def parts(self) -> list[tuple[str, bool]]:
        """The asked question's text in parts, each with whether it is the token that was put in."""
        text, clean = self.asked.question, self.clean.question
        start = text.find(self.forget) if text.endswith(clean) else text.rfind(self.forget)
        if text == clean or start < 0:
            return [(text, False)]
        end = start + len(self.forget)
        parts = [(text[:start], False), (text[start:end], True), (text[end:], False)]
        return [(part, token) for part, token in parts if part]

    def was_asked(self, form: str) -> bool:
        """Whether any of the three was asked the question in this form."""
        return any(form in forms for forms in self.answers)

    def logprobs(self, models: Sequence[str]) -> Table:
        """Log p of each option, a row for each model and form."""
        letters = [Column(letter, NumberForm(".3f")) for letter in LETTERS[: len(self.asked.choices)]]
        rows = [
            [f"{name}, {FORMS[form]}", *answer.logprobs]
            for name, forms in zip(models, self.answers, strict=True)
            for form, answer in forms.items()
        ]
        return Table.of("Log-probabilities of the options", ["log p, nats", *letters], rows)

    @property
    def change(self) -> float:
        """How far the probability of the right answer moved, by which cases are sorted: what RNA gave back, or took
        where it flipped the question, or, where it stayed wrong, what unlearning took.
        """
        base, unlearned, rna = (each["forget"].shares[self.clean.answer] for each in self.answers)
        return {BACK: rna - unlearned, BY_RNA: unlearned - rna}.get(self.kind, base - unlearned)


@dataclass(frozen=True)
class Flips:
    """The view of one base, one unlearned model and its RNA twin.

    Attributes:
        models: what the three are called.
        cases: every perturbed question, in the order of the records.
        limit: how many are shown of each kind in `SHOWN`.
    """

    models: tuple[str, str, str]
    cases: Sequence[Case]
    limit: int

    def counts(self) -> dict[str, Counter[str]]:
        """Task -> kind -> questions, over all questions."""
        counts: dict[str, Counter[str]] = {}
        for case in self.cases:
            counts.setdefault(case.task, Counter())[case.kind] += 1
        return counts

    def summary(self) -> Table:
        """How many questions of each task are of each kind, and how many flips an unrelated word does not cause."""
        rows = []
        for task, counts in self.counts().items():
            flipped = [case for case in self.cases if case.task == task and case.kind in (BACK, STAYED)]
            controls = [bool(case.answers[1]["control"].correct) for case in flipped if "control" in case.answers[1]]
            right = f"{sum(controls)} of {len(controls)}"
            rows.append([task, counts.total(), *(counts[kind] for kind in KINDS), right])
        return Table.of("Perturbed questions by what became of them", ["task", "n", *KINDS, CONTROL_RIGHT], rows)

    def meanings(self) -> dict[str, str]:
        """What the columns of `summary` count."""
        right = "of the flipped, those that the unlearned model answers with an unrelated word in the token's place"
        return {**KINDS, CONTROL_RIGHT: right}

    def numbers(self) -> Table:
        """Every question: its tokens, its kind, what the three said, and p of the right answer among the options."""
        columns = [f"{model}_{what}" for what in ("right", "p_right") for model in ("base", "unlearned", "rna")]
        rows = []
        for case in self.cases:
            records = [forms["forget"] for forms in case.answers]
            shares = [f"{record.shares[case.clean.answer]:.6f}" for record in records]
            about = [case.task, case.clean.id, case.forget, case.control, case.kind]
            rows.append([*about, *(int(record.right) for record in records), *shares])
        return Table.of("Questions", ["task", "id", "forget_token", "control_token", "kind", *columns], rows)

    def of_kind(self, kind: str) -> list[Case]:
        """The cases of a kind, the largest change first."""
        return sorted((case for case in self.cases if case.kind == kind), key=lambda case: -case.change)


def flips(
    questions: Mapping[str, Mapping[str, Question]],
    seed: int,
    models: Mapping[str, AnswerSource],
    limit: int = 6,
) -> Flips:
    """The view from records and the questions that they are of.

    Args:
        questions: set's name -> id -> the question as it was.
        seed: of the suite, which says where the tokens went.
        models: name -> records, in the order base, unlearned, RNA.
        limit: how many to show of each kind in `SHOWN`.

    Raises:
        UserError: no perturbed question that all three were asked, a question that is not in its set, or one whose
            right answer is another there.
    """
    base, unlearned, rna = models.values()
    cases = []
    for task, records in base.tasks.items():
        if task.form in WHERE and not task.control:
            shared = (key for key in records if all(key in each.tasks.get(task, {}) for each in (unlearned, rna)))
            for key in shared:
                clean = _question(questions.get(task.set, {}), key[0], task, records[key].answer)
                answers = (_forms(base, task, key), _forms(unlearned, task, key), _forms(rna, task, key))
                asked = perturb(clean, key[1], task.form, seed)
                cases.append(Case(task.name, clean, asked, key[1], key[2], _kind(answers), answers))
    if not cases:
        raise UserError(
            "the three models have no perturbed question in common. Evaluate all three on one suite whose sets have "
            f"`perturb`; the base has: {', '.join(map(str, base.tasks))}."
        )
    first, second, third = models
    return Flips((first, second, third), cases, limit)


def read_flips(folders: Mapping[str, Path], limit: int = 6) -> Flips:
    """The view from the folders that `unlearn eval --tasks SUITE` wrote, name -> folder: base, unlearned, RNA.

    Raises:
        UserError: not three folders, a folder whose latest evaluation is not of a suite or is of another suite than
            the first one's, questions that are not there any more, and what `flips` raises.
    """
    if len(folders) != 3:
        raise UserError(f"give three folders: base, unlearned, RNA; given: {', '.join(folders) or 'none'}.")
    suites = {name: files.read_json(folder / "evaluation.json").get("suite") for name, folder in folders.items()}
    first, *others = suites.items()
    for name, suite in (first, *others):
        if suite is None or suite != first[1]:
            what = "is not of a suite" if suite is None else f"is of another suite than that of {first[0]}"
            again = "unlearn eval MODEL --tasks SUITE --out FOLDER"
            raise UserError(f"the evaluation in {str(folders[name])!r} ({name}) {what}. Evaluate it so: {again}")
    suite = Suite.model_validate(first[1])
    questions = {
        name: {each.id: each for each in read_questions(source.path, config=source.config, split=source.split)}
        for name, source in suite.questions.items()
        if source.perturb
    }
    models = {name: read_source(str(folder / files.RECORDS)) for name, folder in folders.items()}  # of this suite only
    return flips(questions, suite.seed, models, limit)


def _question(questions: Mapping[str, Question], of: str, task: Task, answer: int) -> Question:
    question = questions.get(of)
    if question is None or question.answer != answer:
        what = "is not in the set any more" if question is None else "has another right answer there"
        raise UserError(
            f"{task}: question {of!r} of the records {what}. Evaluate the models again on the set as it is."
        )
    return question


def _forms(source: AnswerSource, task: Task, key: Key) -> dict[str, Record]:
    """The forget form and, where they were asked, the control form and the clean one."""
    records = {
        "forget": source.tasks[task].get(key),
        "control": source.tasks.get(task.control_form, {}).get(key),
        "clean": source.tasks.get(task.clean_form, {}).get((key[0], "", "")),
    }
    return {form: record for form, record in records.items() if record is not None}


def _kind(answers: Sequence[Mapping[str, Record]]) -> str:
    """Which of `KINDS`. Without the token means the clean form, or the control form where that was not asked."""
    base, unlearned, rna = answers
    if not base["forget"].correct:
        return BASE_WRONG
    if unlearned["forget"].correct:
        return KEPT if rna["forget"].correct else BY_RNA
    without = unlearned.get("clean") or unlearned.get("control")
    if without is None or not without.correct:
        return LOST
    return BACK if rna["forget"].correct else STAYED
