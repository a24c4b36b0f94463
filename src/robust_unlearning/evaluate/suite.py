"""Score a causal language model on multiple-choice questions, clean and perturbed, and on plain text.

A suite (YAML) names the questions, the texts and the tokens. Scoring itself is in `likelihood.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import exp, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from robust_unlearning.data.corpora import HUB, read_documents
from robust_unlearning.data.questions import STYLES, Question, shows_options
from robust_unlearning.errors import UserError, explain, unknown
from robust_unlearning.evaluate.likelihood import option_logprobs, text_nats
from robust_unlearning.evaluate.record import Record, Task, by_task, excess_of, groups_of
from robust_unlearning.files import locate, read_yaml, sha256_file
from robust_unlearning.parallel.processes import Processes
from robust_unlearning.perturb.controls import match_controls
from robust_unlearning.perturb.forms import Form, QuestionSet
from robust_unlearning.recipe import Strict, TextSource
from robust_unlearning.stats.estimates import Estimate, accuracy
from robust_unlearning.stats.means import mean_interval, nats_per_token

Progress = Callable[[str, int, int], None]
BUNDLED_SUITES = {
    "demo": "demo:suite.yaml",
    "planted": "planted:suite.yaml",
    "planted-validation": "planted:suite-validation.yaml",
    "planted-texts": "planted:suite-texts.yaml",
    "planted-texts-validation": "planted:suite-texts-validation.yaml",
}


class Text(Strict):
    """Documents whose tokens are predicted: JSONL with `field`, or paragraphs of a `.txt` file."""

    path: str
    field: str = "text"
    max_tokens: int = Field(128, ge=2)
    limit: int | None = Field(None, ge=1, description="use the first so many documents")

    def source(self) -> TextSource:
        """Where the documents are read from."""
        limits = {"min_chars": 1, "max_documents": self.limit}
        return TextSource.model_validate({"path": self.path, "field": self.field, **limits})


class Suite(Strict):
    """What an evaluation runs. Relative paths start at the working directory."""

    questions: dict[str, QuestionSet] = Field(default_factory=dict)
    texts: dict[str, Text] = Field(default_factory=dict)
    forget_tokens: tuple[str, ...] = ()
    control_tokens: tuple[str, ...] = ()
    seed: int = 0

    def limited(self, limit: int | None) -> Suite:
        """With at most so many questions and documents of each set."""
        if limit is None:
            return self

        def cut(entry: Any) -> Any:
            return entry.model_copy(update={"limit": min(limit, entry.limit or limit)})

        questions = {name: cut(entry) for name, entry in self.questions.items()}
        texts = {name: cut(entry) for name, entry in self.texts.items()}
        return self.model_copy(update={"questions": questions, "texts": texts})

    def fingerprint(self) -> str:
        """What the scores depend on besides the model, hashed: the suite and the files that it names."""
        digest = hashlib.sha256(self.model_dump_json().encode())
        entries: list[QuestionSet | Text] = [*self.questions.values(), *self.texts.values()]
        for entry in entries:
            if not entry.path.startswith(HUB):
                path = locate(entry.path)
                for file in filter(Path.is_file, sorted(path.rglob("*")) if path.is_dir() else [path]):
                    digest.update(sha256_file(file).encode())
        return digest.hexdigest()

    def question_texts(self) -> set[tuple[str, tuple[str, ...]]]:
        """Every question with its choices, as it is before a token is put in."""
        return {
            (question.question, question.choices) for source in self.questions.values() for question in source.read()
        }

    def about(self) -> dict[str, Any]:
        """The suite, for the record of an evaluation."""
        return {"suite": self.model_dump(mode="json")}

    def run(
        self,
        model: Any,
        tokenizer: Any,
        progress: Progress | None = None,
        token_budget: int | None = None,
        processes: Processes | None = None,
    ) -> Evaluation:
        """Score a loaded causal language model.

        Tasks are `SET/STYLE/clean`, `SET/STYLE/WHERE` (forget form), `SET/STYLE/WHERE-control` and `NAME/text`. A
        question task has `acc`, `stderr`, `n`, `low`, `high` and `acc_norm` (log p per byte of the option). In
        perturbed ones `harm` is log p of the right answer less that of the clean form, in nats per token; the
        forget form also has `excess_harm` (see `record.excess_of`). A text has `nats_per_token`, `stderr`,
        `low`, `high`, `perplexity`, `n` (documents) and `tokens`.

        Args:
            progress: called with (set, sequences done, sequences in all).
            token_budget: tokens run at a time, see `likelihood.default_budget`.
            processes: they divide the prompts and documents; each must call this, and gets the whole result.

        Raises:
            UserError: an input cannot be read or used, or the model's log-probabilities are not finite.
        """
        map_split = processes.map_split if processes else _alone
        perturbs = any(source.perturb for source in self.questions.values())
        pairs = match_controls(tokenizer, self.forget_tokens, self.control_tokens) if perturbs else {}
        scores: dict[str, dict[str, Any]] = {}
        records: list[Record] = []
        known: dict[str, Content] = {}
        for name, source in self.questions.items():
            forms = source.forms(pairs, self.seed)
            across = names_across(name, [question for question, _ in forms["clean", False]], known)
            prompts = [
                (Task(name, style, form, control), question, pair, *STYLES[style](question))
                for style in dict.fromkeys(source.styles)
                for (form, control), questions in forms.items()
                if shows_options(style) or form != "option"
                for question, pair in questions
            ]
            items = [(prompt, [" " + option for option in options]) for *_, prompt, options in prompts]
            tick = partial(progress, name) if progress else None
            score = partial(option_logprobs, model, tokenizer, token_budget=token_budget, progress=tick)
            set_records = [
                _record(task, question, pair, options, scored, across.get(question.id))
                for (task, question, pair, _, options), scored in zip(prompts, map_split(items, score), strict=True)
            ]
            require_finite((logp for record in set_records for logp in record.logprobs), name)
            tasks = by_task(set_records)
            scores |= {task.name: _task_scores(task, tasks) for task in tasks}
            records += set_records
        for name, text in self.texts.items():
            documents = read_documents(text.source())
            count = partial(text_nats, model, tokenizer, max_tokens=text.max_tokens, token_budget=token_budget)
            nats, tokens = zip(*map_split(documents, count), strict=True)
            require_finite(nats, name)
            row = nats_per_token(nats, tokens).as_dict()
            mean = row.pop("value")
            row["perplexity"] = exp(min(mean, 700.0))  # a float holds no more
            scores[f"{name}/text"] = {"nats_per_token": mean, **row, "tokens": sum(tokens)}
        return Evaluation(scores, records)


@dataclass(frozen=True)
class Evaluation:
    """`scores`: task's name -> numbers, ready for JSON; `records`: one per question and form."""

    scores: dict[str, dict[str, Any]]
    records: list[Record]


def load_suite(path_or_name: str | os.PathLike[str]) -> Suite:
    """A checked suite from a YAML file or one of `BUNDLED_SUITES`.

    Raises:
        UserError: no such file, not YAML, unknown or missing fields, paths where nothing is; all at once.
    """
    name = os.fspath(path_or_name)
    if name not in BUNDLED_SUITES and not Path(name).suffix and not Path(name).exists() and ":" not in name:
        raise UserError(unknown("suite", name, BUNDLED_SUITES, "Or give a suite's YAML file."))
    path = locate(BUNDLED_SUITES.get(name, name))
    data = read_yaml(path, "suite")
    if not isinstance(data, dict):
        raise UserError(f"{name}: a suite is a mapping with questions, texts or both.")
    errors = []
    try:
        suite = Suite.model_validate(data)
    except ValidationError as error:
        errors = explain(error.errors(), Suite)
    else:
        if not suite.questions and not suite.texts:
            errors = ["it has neither questions nor texts."]
        wants = [key for key, source in suite.questions.items() if source.perturb]
        if wants and not (suite.forget_tokens and suite.control_tokens):
            errors = [f"questions.{wants[0]}.perturb needs forget_tokens and control_tokens."]
    errors += _missing_files(data)
    if errors:
        raise UserError("\n  - ".join([f"the suite {name} cannot be run:", *errors]))
    return suite


def _missing_files(data: dict[str, Any]) -> list[str]:
    """A sentence for each path of a suite (unchecked, as read from YAML) where nothing is."""
    errors = []
    for group in ("questions", "texts"):
        entries = data.get(group)
        for key, entry in entries.items() if isinstance(entries, dict) else ():
            path = entry.get("path") if isinstance(entry, dict) else None
            try:
                locate(path if isinstance(path, str) else ".")
            except UserError as error:
                errors.append(f"{group}.{key}.path: {error}")
    return errors


def _alone(items: Sequence[Any], function: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
    """`Processes.map_split` where there is one process."""
    return list(function(items))


Content = tuple[str, tuple[str, ...], int]
"""A question's text, choices and answer."""


def names_across(name: str, questions: Iterable[Question], known: dict[str, Content]) -> dict[str, str]:
    """Ids of a set's questions that do not tell them among all sets of a suite -> what does.

    A question that an earlier set has under another id gets that one; one whose id an earlier set has for another
    question gets `SET/ID`. Two questions of one set stay two, whatever they say.

    Args:
        known: the names so far, each with what it stands for; this set's are added.
    """
    earlier: dict[Content, str] = {}
    for id, content in known.items():
        earlier.setdefault(content, id)
    found: dict[str, str] = {}
    taken: set[str] = set()
    added: dict[str, Content] = {}
    for question in questions:
        id, content = question.id, (question.question, question.choices, question.answer)
        there = id if known.get(id) == content else earlier.get(content)
        if there is None or there in taken:
            there = f"{name}/{id}" if id in known else id
        taken.add(there)
        added.setdefault(there, content)
        if there != id:
            found[id] = there
    for there, content in added.items():
        known.setdefault(there, content)
    return found


def _record(
    task: Task,
    question: Question,
    pair: Form | None,
    options: Sequence[str],
    scored: Sequence[tuple[float, int]],
    across: str | None,
) -> Record:
    record = replace(Record.of_choices(task, question.id, question.answer, options, scored), across=across)
    return replace(record, cluster=question.cluster or None, **(pair.tokens if pair else {}))


def accuracy_score(share: Estimate) -> dict[str, Any]:
    """An accuracy as `scores.json` has it."""
    return {"acc": share.value, "stderr": share.stderr, "n": share.n, "low": share.low, "high": share.high}


def _task_scores(task: Task, tasks: Mapping[Task, Sequence[Record]]) -> dict[str, Any]:
    """The scores of one task from the records of all tasks of its set."""
    records = tasks[task]
    row = accuracy_score(accuracy([record.right for record in records]))
    row["acc_norm"] = float(np.mean([record.correct_norm for record in records]))
    if not task.perturbed:
        return row
    clean, groups = {record.id: record for record in tasks[task.clean_form]}, groups_of(records)
    row["harm"] = mean_interval(excess_of(records, [clean[record.id] for record in records]), groups).as_dict()
    if not task.control and task.control_form in tasks:
        row["excess_harm"] = mean_interval(excess_of(records, tasks[task.control_form]), groups).as_dict()
    return row


def require_finite(values: Iterable[float], name: str) -> None:
    """Raise UserError if a log-probability of the task `name` is not a number."""
    if not all(map(isfinite, values)):
        raise UserError(
            f"{name}: log p is not finite: the model's weights hold NaN, or its dtype overflows. "
            "Check the training run, or evaluate in bfloat16 or float32."
        )
