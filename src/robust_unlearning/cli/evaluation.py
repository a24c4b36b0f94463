"""Scores of models: eval."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from robust_unlearning.cli import (
    AddVerb,
    in_processes,
    positive,
    processes_option,
    task_options,
    task_settings,
    unsafe_options,
)
from robust_unlearning.errors import UserError

if TYPE_CHECKING:
    from robust_unlearning.evaluate.evaluator import Variant


def add(verb: AddVerb) -> None:
    """Register the verbs."""
    evaluation = verb(
        "eval", _eval, "score run folders, delta files or models; a base that several share is loaded once"
    )
    evaluation.add_argument(
        "targets",
        nargs="+",
        metavar="target",
        help="run folder, delta file, model folder, GGUF file, hub id or bundled model",
    )
    evaluation.add_argument(
        "--tasks",
        required=True,
        help="a suite ('demo', 'planted', a YAML file), or tasks and groups of lm-evaluation-harness (mmlu, wmdp_bio, "
        "a task's YAML file); several with commas. 'unlearn list tasks' shows those of this package",
    )
    evaluation.add_argument(
        "--out",
        help="folder for scores.json and records.jsonl; for several targets a folder each in it (default: the run)",
    )
    evaluation.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    evaluation.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    processes_option(evaluation)
    evaluation.add_argument(
        "--batch-tokens", type=positive, metavar="N", help="tokens run at a time (default: by the model's width)"
    )
    task_options(evaluation)
    harness = evaluation.add_argument_group("tasks of lm-evaluation-harness")
    harness.add_argument("--scorer", default="fast", choices=["fast", "hf"], help="hf: lm-eval's own (default: fast)")
    harness.add_argument("--num-fewshot", type=int, metavar="N", help="worked examples before each question")
    unsafe_options(evaluation)


def _eval(arguments: argparse.Namespace) -> None:
    if in_processes(arguments):
        return
    from robust_unlearning.evaluate.evaluator import KEPT, Evaluator, open_target
    from robust_unlearning.evaluate.harness import load_task_sets
    from robust_unlearning.evaluate.score_table import format_scores
    from robust_unlearning.train.progress import EvaluationProgress

    task_sets = load_task_sets(
        arguments.tasks, scorer=arguments.scorer, num_fewshot=arguments.num_fewshot, **task_settings(arguments)
    )
    if not task_sets:
        raise UserError(f"--tasks {arguments.tasks!r} names no task. 'unlearn list tasks' shows some.")
    options = {"allow_pickle": arguments.allow_pickle, "trust_remote_code": arguments.trust_remote_code}
    variants = [open_target(name, **options) for name in arguments.targets]
    folders = _folders(variants, arguments.out)
    evaluator = Evaluator(arguments.dtype, arguments.device, arguments.batch_tokens)
    for variant, folder in zip(variants, folders, strict=True):
        for name, task_set in task_sets.items():
            place = folder if len(task_sets) == 1 else folder / "scores" / Path(name).stem
            with EvaluationProgress(variant.name if len(variants) > 1 else "") as progress:
                result = evaluator.evaluate(variant, task_set, place, progress.tick)
            if len(variants) > 1:
                print(f"\n{variant.name}\n")
            print(format_scores(result.scores))
            if arguments.limit:
                print(f"partial: at most the first {arguments.limit} questions of each task or set (--limit)")
            print(f"written to {place / 'scores.json'}, one line a question in {place / 'records.jsonl'}", flush=True)
            if len(list((place / KEPT).iterdir())) > 1:
                print(f"earlier evaluations are still in {place / KEPT}; 'unlearn compare' reads each of those folders")


def _folders(variants: list[Variant], out: str | None) -> list[Path]:
    """Where the scores of each model go.

    Raises:
        UserError: a model without a folder of its own and no `out`, or two that would get the same.
    """
    for variant in variants:
        if out is None and variant.folder is None:
            raise UserError(
                f"{variant.name!r} is {_kind(variant.name)}, not a run folder, so its scores have no place of "
                "their own: give --out DIR, for example --out runs/base"
            )
    if len(variants) == 1:
        return [Path(out or variants[0].folder or "")]
    folders = [Path(out, Path(variant.name).name) if out else Path(variant.folder or "") for variant in variants]
    if twice := sorted({str(folder) for folder in folders if folders.count(folder) > 1}):
        raise UserError(f"two targets would write to {', '.join(twice)}: score them one by one, each with its --out.")
    return folders


def _kind(name: str) -> str:
    """What sort of model a target is that is no run folder and no delta file.

    Raises:
        UserError: it is nothing here, and looks like a path that is misspelt.
    """
    from robust_unlearning import files
    from robust_unlearning.models.convert import BUNDLED_MODELS

    if name in BUNDLED_MODELS:
        return "a bundled model"
    path = Path(name).expanduser()
    if path.is_dir():
        return "a folder without recipe.yaml"
    if path.is_file():
        return "a file"
    close = files.nearest_path(path)
    if len(path.parts) > 1 and (close or path.parent.is_dir()):
        files.locate(name)
    return f"no folder here (did you mean {str(close)!r}?)" if close else "no folder here"
