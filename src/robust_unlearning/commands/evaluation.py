"""Scores of models: eval."""

from __future__ import annotations

import argparse
from pathlib import Path

from robust_unlearning.commands import (
    AddVerb,
    harness_data,
    harness_data_options,
    in_processes,
    processes_option,
    unsafe_options,
)
from robust_unlearning.errors import UserError


def add(verb: AddVerb) -> None:
    """Register the verbs."""
    evaluation = verb("eval", _eval, "score a run folder, a delta file or a model")
    evaluation.add_argument("target", help="run folder, delta file, model folder, GGUF file, hub id or bundled model")
    evaluation.add_argument(
        "--tasks",
        required=True,
        help="a suite ('demo', 'planted', a YAML file), or tasks and groups of lm-evaluation-harness (mmlu, wmdp_bio, "
        "a task's YAML file); several with commas. 'unlearn list tasks' shows those of this package",
    )
    evaluation.add_argument("--out", help="folder for scores.json and records.jsonl (default: the run folder)")
    evaluation.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    evaluation.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    processes_option(evaluation)
    evaluation.add_argument(
        "--batch-tokens", type=_positive, metavar="N", help="tokens run at a time (default: by the model's width)"
    )
    harness = evaluation.add_argument_group("tasks of lm-evaluation-harness")
    harness_data_options(harness)
    harness.add_argument("--scorer", default="fast", choices=["fast", "hf"], help="hf: lm-eval's own (default: fast)")
    harness.add_argument("--num-fewshot", type=int, metavar="N", help="worked examples before each question")
    harness.add_argument(
        "--limit", type=_positive, metavar="N", help="only the first N questions of each task: partial scores"
    )
    unsafe_options(evaluation)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _eval(arguments: argparse.Namespace) -> None:
    if in_processes(arguments):
        return
    from robust_unlearning.evaluate import format_scores
    from robust_unlearning.harness import load_plans
    from robust_unlearning.progress import EvaluationProgress
    from robust_unlearning.targets import Evaluator, open_target

    plans = load_plans(
        arguments.tasks,
        scorer=arguments.scorer,
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        **harness_data(arguments),
    )
    target = open_target(
        arguments.target, allow_pickle=arguments.allow_pickle, trust_remote_code=arguments.trust_remote_code
    )
    out = arguments.out or target.folder
    if out is None:
        raise UserError(
            f"{arguments.target!r} is {_kind(arguments.target)}, not a run folder, so its scores have no place of "
            "their own: give --out DIR, for example --out runs/base"
        )
    evaluator = Evaluator(arguments.dtype, arguments.device, arguments.batch_tokens)
    folder = Path(out)
    for name, plan in plans.items():
        place = folder if len(plans) == 1 else folder / "scores" / Path(name).stem
        with EvaluationProgress() as progress:
            result = evaluator.evaluate(target, plan, place, progress.tick)
        print(format_scores(result.scores))
        if any(row.get("partial") for row in result.scores.values()):
            print(f"partial: only the first {arguments.limit} questions of each task were asked (--limit)")
        print(f"written to {place / 'scores.json'}, one line a question in {place / 'records.jsonl'}")


def _kind(name: str) -> str:
    """What sort of model a target is that is no run folder and no delta file."""
    from robust_unlearning.conversion import BUNDLED_MODELS

    if name in BUNDLED_MODELS:
        return "a bundled model"
    path = Path(name).expanduser()
    return "a folder without recipe.yaml" if path.is_dir() else "a file" if path.is_file() else "no folder here"
