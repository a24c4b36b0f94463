"""Tasks of lm-evaluation-harness: loaded, run on a model, and turned into scores and records.

The harness makes the prompts, the metrics and the averages of groups; the scores are those that `lm_eval` gives.
What is added: data from local copies, a faster scorer, intervals, and a record of every question.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from robust_unlearning.data.questions import LETTERS
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.local_datasets import local_data
from robust_unlearning.evaluate.record import Record, Task
from robust_unlearning.evaluate.suite import BUNDLED_SUITES, Evaluation, Progress, Suite, load_suite, require_finite
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
        data_root: folder of local copies of data sets, see `local_datasets`; None for the hub.
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
            for doc in [*islice(task.eval_docs, self.limit), *examples]:
                digest.update(json.dumps(doc, sort_keys=True, default=_plainly).encode())
        groups = {name: group.child_names for name, group in self.loaded["groups"].items()}
        digest.update(json.dumps(groups, sort_keys=True).encode())
        return digest.hexdigest()

    def question_texts(self) -> set[tuple[str, tuple[str, ...]]]:
        """Every question with its choices: `question` and `choices` of its row, else what the task makes of it."""
        texts = set()
        for task in self.loaded["tasks"].values():
            for doc in islice(task.eval_docs, self.limit):
                text = doc.get("question") or task.doc_to_text(doc)
                choices = doc.get("choices") or (task.doc_to_choice(doc) if task.config.doc_to_choice else ())
                texts.add((str(text), tuple(map(str, choices))))
        return texts

    def about(self) -> dict[str, Any]:
        """Settings and versions, for the record of an evaluation."""
        tasks = {
            name: {"version": str(task.VERSION), "num_fewshot": task.get_config("num_fewshot")}
            for name, task in self.loaded["tasks"].items()
        }
        packages = {package: version(package) for package in ("lm_eval", "datasets", "transformers", "torch")}
        settings = {"scorer": self.scorer, "limit": self.limit, "packages": packages}
        return {"tasks": tasks, "groups": self._groups(), **settings}

    def run(
        self,
        model: Any,
        tokenizer: Any,
        progress: Progress | None = None,
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
        scores = {}
        for name, members in {**self._groups(), **{name: [name] for name in self.loaded["tasks"]}}.items():
            names = list(dict.fromkeys(members))
            row = _row(results["results"][name], [record for task in names for record in records[task]])
            if not row:
                continue  # a group without an average
            counts = [results["n-samples"][task] for task in names]
            if sum(count["effective"] for count in counts) < (all_of := sum(count["original"] for count in counts)):
                row |= {"partial": True, "of": all_of}
            kinds = {_scored(self.loaded["tasks"][task]) for task in names}
            scores[name] = row | {"scored": kinds.pop() if len(kinds) == 1 else "mixed"}
        return scores

    def _groups(self) -> dict[str, list[str]]:
        """Group -> its tasks; a group stands before the groups that are in it."""
        groups = {
            name: [task.task_name for task in group.get_all_tasks()] for name, group in self.loaded["groups"].items()
        }
        return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


TaskSet = Suite | Harness
"""What an evaluation runs."""


def load_task_sets(tasks: str, limit: int | None = None, **settings: Any) -> dict[str, TaskSet]:
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

    task_sets: dict[str, TaskSet] = {name: load_suite(name).limited(limit) for name in names if is_suite(name)}
    if others := tuple(name for name in dict.fromkeys(names) if not is_suite(name)):
        harness = Harness(others, limit=limit, **settings)
        _ = harness.manager  # an unknown name is found before anything is loaded
        task_sets["lm-eval"] = harness
    return task_sets


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
    doc = sample["doc"]
    name = Task(task.task_name)
    number = f"{task.get_config('dataset_name') or name}:{sample['doc_id'] + 1}"
    id = str(doc.get("id") or number)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
        answer = _answer(task.doc_to_text(doc) if task.multiple_input else sample["target"], choices)
        pairs = zip(sample["filtered_resps"], sample["arguments"], choices, strict=False)  # some ask more than choices
        scored = [(float(logp), counted[tuple(texts)]) for (logp, _), texts, _ in pairs]
        record = Record.of_choices(name, id, answer, choices, scored)
        record = replace(record, correct=bool(sample.get("acc", record.correct)))
    else:
        metrics = {key: sample[key] for key in sample["metrics"] if isinstance(sample[key], int | float)}
        record = Record(name, id, correct=bool(metrics["acc"]) if "acc" in metrics else None, metrics=metrics)
    return replace(
        record,
        forget_token=doc.get("forget_token"),
        cluster=None if doc.get("cluster") in (None, "") else str(doc["cluster"]),
        control_token=doc.get("control_token"),
        doc_hash=sample["doc_hash"],
        filter=None if sample["filter"] == "none" else sample["filter"],
    )


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
