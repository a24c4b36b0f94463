"""Tasks of lm-evaluation-harness: loaded, run on a model, and turned into scores and records.

The harness makes the prompts, the metrics and the averages of groups; the scores are those that `lm_eval` gives.
What is added: data from local copies, a faster scorer, intervals, and a record of every question.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from robust_unlearning.data.questions import LETTERS
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.local_datasets import local_data
from robust_unlearning.evaluate.record import Record, Task
from robust_unlearning.evaluate.suite import BUNDLED_SUITES, Evaluation, Plan, load_suite, require_finite
from robust_unlearning.evaluate.task_index import check_names, is_task_file, task_manager
from robust_unlearning.parallel.processes import Processes
from robust_unlearning.stats.estimates import accuracy

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""lm-eval's own defaults."""


@dataclass(frozen=True)
class Harness:
    """What an evaluation by lm-evaluation-harness runs.

    Attributes:
        names: tasks, groups and tags of lm-eval or of this package, or YAML files of tasks.
        data_root: folder of local copies of data sets, see `task_data`; None for the hub.
        include_paths: folders of further task YAMLs.
        scorer: `fast`, or `hf` for lm-eval's own model class.
        limit: only the first so many questions of each task; scores are then marked as partial.
        num_fewshot: worked examples before each question; None for what each task says (0 if it says nothing).
    """

    names: tuple[str, ...]
    data_root: Path | None = None
    include_paths: tuple[Path, ...] = ()
    scorer: str = "fast"
    limit: int | None = None
    num_fewshot: int | None = None

    @cached_property
    def manager(self) -> TaskManager:
        """lm-eval's task manager, which knows every one of `names`.

        Raises:
            UserError: lm-eval is missing, an unknown name, or a path that is not there.
        """
        manager = task_manager(self.include_paths)
        check_names(self.names, manager, BUNDLED_SUITES)
        return manager

    @cached_property
    def loaded(self) -> dict[str, Any]:
        """`tasks` and `groups` by name, with their data; loaded once.

        Raises:
            UserError: as for `manager`; data that is not there, or a task that cannot be made.
        """
        manager = self.manager
        _seed_everything()
        with local_data(self.data_root), _only_errors("lm_eval"):
            try:
                loaded = manager.load(list(self.names))
            except UserError:
                raise
            except (KeyError, ValueError, TypeError, OSError, ImportError) as error:
                raise UserError(f"lm-eval cannot load {', '.join(self.names)}: {error}") from error
        for task in loaded["tasks"].values():
            default = task.get_config("num_fewshot")
            if default is None or (default != 0 and self.num_fewshot is not None):
                task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
        return dict(loaded)

    def fingerprint(self) -> str:
        """What the scores depend on besides the model, hashed: tasks, their questions, settings, versions."""
        digest = hashlib.sha256(json.dumps(self.about(), sort_keys=True).encode())
        for name, task in self.loaded["tasks"].items():
            config = {key: value for key, value in task.dump_config().items() if key != "metadata"}
            digest.update(json.dumps([name, config], sort_keys=True, default=_plainly).encode())
            examples = task.sampler.df if task.get_config("num_fewshot") else []
            for doc in [*_first(task.eval_docs, self.limit), *examples]:
                digest.update(json.dumps(doc, sort_keys=True, default=_plainly).encode())
        groups = {name: group.child_names for name, group in self.loaded["groups"].items()}
        digest.update(json.dumps(groups, sort_keys=True).encode())
        return digest.hexdigest()

    def asked(self) -> set[tuple[str, tuple[str, ...]]]:
        """Every question with its choices: `question` and `choices` of its row, else what the task makes of it."""
        found = set()
        for task in self.loaded["tasks"].values():
            for doc in _first(task.eval_docs, self.limit):
                text = doc.get("question") or task.doc_to_text(doc)
                choices = doc.get("choices") or (task.doc_to_choice(doc) if task.config.doc_to_choice else ())
                found.add((str(text), tuple(map(str, choices))))
        return found

    def about(self) -> dict[str, Any]:
        """Settings and versions, for the record of an evaluation."""
        tasks = {
            name: {"version": str(task.VERSION), "num_fewshot": task.get_config("num_fewshot")}
            for name, task in self.loaded["tasks"].items()
        }
        groups = {name: [each.task_name for each in group.get_all_tasks()] for name, group in self._groups()}
        packages = {each: version(each) for each in ("lm_eval", "datasets", "transformers", "torch")}
        return {"tasks": tasks, "groups": groups, "scorer": self.scorer, "limit": self.limit, "packages": packages}

    def run(
        self,
        model: Any,
        tokenizer: Any,
        progress: Callable[[str, int, int], None] | None = None,
        token_budget: int | None = None,
        processes: Processes | None = None,
    ) -> Evaluation:
        """Score a loaded model, in one process.

        A task or a group has the metrics that lm-eval gives it under lm-eval's names (without `,none`). Where
        `acc` is among them: `acc`, `stderr`, `n`, `low`, `high`, and `scored`, which says whether letters or the
        answers' texts were scored. Under a limit that leaves questions out, `partial` is true and `of` counts all.
        The interval is Wilson's over the questions; for a group that weights its tasks equally whatever their
        size it is the normal one.

        A record has the fields of a suite's record, and `doc_hash`, lm-eval's hash of the row of data.

        Raises:
            UserError: several processes, log-probabilities that are not finite, or a continuation without a token.
        """
        if processes is not None and processes.count > 1:
            raise UserError(
                f"tasks of lm-evaluation-harness run in one process, not {processes.count}; leave out --processes."
            )
        from lm_eval.evaluator import evaluate

        from robust_unlearning.evaluate.fast_lm import SCORERS

        tick = partial(progress, "lm-eval") if progress else None
        with _only_errors("lm_eval"):
            scorer = SCORERS[self.scorer](model, tokenizer, token_budget, tick)
        _seed_everything()
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=SEEDS["fewshot"])
        with _quiet(), _only_errors("transformers.tokenization_utils_base"):
            results = evaluate(lm=scorer, task_dict=self.loaded, limit=self.limit)
        records = {
            name: [_record(task, sample, scorer.continuation_tokens) for sample in results["samples"][name]]
            for name, task in self.loaded["tasks"].items()
        }
        for name, rows in records.items():
            require_finite([logp for record in rows for logp in record.logprobs], name)
        return Evaluation(self._scores(results, records), [row for rows in records.values() for row in rows])

    def _scores(self, results: Mapping[str, Any], records: Mapping[str, list[Record]]) -> dict[str, Any]:
        """Groups, the outermost first, then tasks."""
        members = {name: [each.task_name for each in group.get_all_tasks()] for name, group in self._groups()}
        scores = {}
        for name, own in {**members, **{name: [name] for name in self.loaded["tasks"]}}.items():
            names = list(dict.fromkeys(own))
            row = _row(results["results"][name], [record for each in names for record in records[each]])
            if not row:
                continue  # a group without an average
            counts = [results["n-samples"][each] for each in names]
            if sum(each["effective"] for each in counts) < (of := sum(each["original"] for each in counts)):
                row |= {"partial": True, "of": of}
            kinds = {_scored(self.loaded["tasks"][each]) for each in names}
            scores[name] = row | {"scored": kinds.pop() if len(kinds) == 1 else "mixed"}
        return scores

    def _groups(self) -> Iterator[tuple[str, Any]]:
        """Groups with their members after them."""
        groups = self.loaded["groups"]
        yield from sorted(groups.items(), key=lambda item: -len(item[1].get_all_tasks()))


def load_plans(tasks: str, limit: int | None = None, **settings: Any) -> dict[str, Plan]:
    """What `--tasks` means: each suite by its name, and under `lm-eval` all tasks of the harness together.

    Args:
        tasks: names of suites and tasks, and YAML files of either, with commas.
        limit: only the first so many questions of each task or set.
        settings: further fields of `Harness`.

    Raises:
        UserError: a name or file that is neither, or a suite that cannot be run.
    """
    names = [name for name in tasks.split(",") if name]

    def is_suite(name: str) -> bool:
        path = Path(name)
        is_file = path.suffix in {".yaml", ".yml"} or len(path.parts) > 1
        return name in BUNDLED_SUITES or (is_file and not (path.is_file() and is_task_file(path)))

    plans: dict[str, Plan] = {name: load_suite(name).limited(limit) for name in names if is_suite(name)}
    if others := tuple(name for name in dict.fromkeys(names) if not is_suite(name)):
        harness = Harness(others, limit=limit, **settings)
        _ = harness.manager  # an unknown name is found before anything is loaded
        plans["lm-eval"] = harness
    return plans


def _row(metrics: Mapping[str, Any], records: list[Record]) -> dict[str, Any]:
    """lm-eval's metrics of a task or a group, with the interval of its accuracy; empty where there are none."""
    row: dict[str, Any] = {}
    for key, value in metrics.items():
        if "," in key:
            metric, kind = key.split(",", 1)
            row[metric if kind == "none" else key] = None if value == "N/A" else float(value)
    if row:
        row["n"] = metrics["sample_len"]
    if "acc" in row:
        stderr = row.pop("acc_stderr")
        interval = _interval(row["acc"], stderr, [record.correct for record in records if record.correct is not None])
        row = {"acc": row.pop("acc"), "stderr": stderr, "n": row.pop("n"), **interval, **row}
    return row


def _interval(acc: float, stderr: float | None, correct: list[bool]) -> dict[str, float | None]:
    """`low` and `high` of 95 %: Wilson's where `acc` is the share of right answers, else from the standard error."""
    wilson = accuracy(correct) if correct else None
    if wilson and wilson.value is not None and abs(wilson.value - acc) < 1e-9:
        return {"low": wilson.low, "high": wilson.high}
    if stderr is None:
        return {"low": None, "high": None}
    half = NormalDist().inv_cdf(0.975) * stderr
    return {"low": max(0.0, acc - half), "high": min(1.0, acc + half)}


def _record(task: Any, sample: Mapping[str, Any], counted: Mapping[tuple[str, str], int]) -> Record:
    """One question's record from what lm-eval logs of it."""
    doc, number = sample["doc"], sample["doc_id"]
    record = Record(
        task=Task(task.task_name),
        id=str(doc.get("id") or f"{task.get_config('dataset_name') or task.task_name}:{number + 1}"),
        forget_token=doc.get("forget_token"),
        control_token=doc.get("control_token"),
        doc_hash=sample["doc_hash"],
        filter=None if sample["filter"] == "none" else sample["filter"],
    )
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
        logprobs = [float(logp) for logp, _ in sample["filtered_resps"][: len(choices)]]
        per_byte = [logp / len(choice.encode()) for logp, choice in zip(logprobs, choices, strict=True)]
        answer = _answer(task.doc_to_text(doc) if task.multiple_input else sample["target"], choices)
        prediction = int(np.argmax(logprobs))
        return replace(
            record,
            answer=answer,
            prediction=prediction,
            correct=bool(sample.get("acc", prediction == answer)),
            correct_norm=int(np.argmax(per_byte)) == answer,
            logprobs=tuple(logprobs),
            tokens=tuple(counted[tuple(each)] for each in sample["arguments"][: len(choices)]),
        )
    metrics = {key: sample[key] for key in sample["metrics"] if isinstance(sample[key], int | float)}
    return replace(record, metrics=metrics, correct=bool(metrics["acc"]) if "acc" in metrics else None)


def _answer(target: Any, choices: list[str]) -> int | None:
    """The index of the right choice; the first of several, None where the data has none."""
    if isinstance(target, list):
        return _answer(target[0], choices) if target else None
    if isinstance(target, str):
        return choices.index(target) if target in choices else None
    return int(target) if target < len(choices) else None


def _scored(task: Any) -> str:
    """What a task's accuracy compares: `letters`, `answer texts`, or for other kinds of task lm-eval's name of it."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return str(task.OUTPUT_TYPE)
    choices = task.doc_to_choice(task.eval_docs[0])
    return "letters" if choices == list(LETTERS[: len(choices)]) else "answer texts"


def _plainly(value: Any) -> str:
    """What JSON has no form for, without its address in memory."""
    return str(getattr(value, "__qualname__", None) or value)


def _first(docs: Any, limit: int | None) -> Iterator[Any]:
    for index, doc in enumerate(docs):
        if limit is not None and index >= limit:
            return
        yield doc


def _seed_everything() -> None:
    """As lm-eval does before it loads and runs tasks: some of them draw."""
    import torch

    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])


@contextmanager
def _only_errors(name: str) -> Iterator[None]:
    """Of a logger. lm-eval warns of every default that a task relies on, and of a model that is loaded already;
    transformers warns of a text beyond the model's window, which is cut before it is run.
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for each task whose prompts are made, nor for lm-eval's requests."""
    import lm_eval.api.task

    original = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = partial(original, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = original
