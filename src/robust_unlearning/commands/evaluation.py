"""Scores of models: eval."""

from __future__ import annotations

import argparse
from pathlib import Path

from robust_unlearning.commands import AddVerb, in_processes, processes_option, unsafe_options
from robust_unlearning.errors import UserError


def add(verb: AddVerb) -> None:
    """Register the verbs."""
    evaluation = verb("eval", _eval, "score a run folder, a delta file or a model")
    evaluation.add_argument("target", help="run folder, delta file, model folder, GGUF file, hub id or bundled model")
    evaluation.add_argument(
        "--tasks", required=True, help="'demo', 'planted' or a suite's YAML file; several with commas"
    )
    evaluation.add_argument("--out", help="folder for scores.json and records.jsonl (default: the run folder)")
    evaluation.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    evaluation.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    processes_option(evaluation)
    unsafe_options(evaluation)


def _eval(arguments: argparse.Namespace) -> None:
    if in_processes(arguments):
        return
    from robust_unlearning.evaluate import format_scores, load_suite
    from robust_unlearning.progress import EvaluationProgress
    from robust_unlearning.targets import Evaluator, open_target

    suites = {name: load_suite(name) for name in arguments.tasks.split(",")}
    target = open_target(
        arguments.target, allow_pickle=arguments.allow_pickle, trust_remote_code=arguments.trust_remote_code
    )
    out = arguments.out or target.folder
    if out is None:
        raise UserError(
            f"{arguments.target!r} is no run folder and no delta file; if it is a model, say where its scores go: "
            "--out DIR"
        )
    evaluator = Evaluator(arguments.dtype, arguments.device)
    folder = Path(out)
    for name, suite in suites.items():
        place = folder if len(suites) == 1 else folder / "scores" / Path(name).stem
        with EvaluationProgress() as progress:
            result = evaluator.evaluate(target, suite, place, progress.tick)
        print(format_scores(result.scores))
        print(f"written to {place / 'scores.json'}, one line a question in {place / 'records.jsonl'}")
