"""Questions per second: this library's scorer against lm-evaluation-harness's own, on MMLU, clean and perturbed.

    python benchmarks/scoring.py DATA                  # DATA: a copy of cais/mmlu as it lies on the hub
    python benchmarks/scoring.py DATA --tokens SARS-CoV-2 Cable-HD-4    # two perturbed forms: a keyword, a control
    python benchmarks/scoring.py DATA --count          # only count the tokens that each runs, over all subjects

Both score the same lm-eval tasks on the same loaded model in float32, subject by subject, each going first every
other time. They must answer every question alike. README.md beside this file says how to read the numbers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from robust_unlearning import files
from robust_unlearning.data.questions import Question, letters_prompt, read_questions
from robust_unlearning.evaluate.harness import Harness
from robust_unlearning.evaluate.suite import Evaluation
from robust_unlearning.models import checkpoint
from robust_unlearning.perturb.places import perturb
from robust_unlearning.run.folder import environment

SUBJECTS = (
    "anatomy,astronomy,college_biology,computer_security,human_aging,marketing,nutrition,philosophy,sociology,"
    "world_religions"
)


def forms_of(tokens: Sequence[str]) -> dict[str, str | None]:
    """The forms in which every question is asked: `clean`, and with each token in place of a wrong option."""
    return {"clean": None, **{f"perturbed{number}": token for number, token in enumerate(tokens, start=1)}}


def in_form(questions: list[Question], token: str | None) -> list[Question]:
    """The questions as a form asks them."""
    return [perturb(each, token, "option", seed=0) for each in questions] if token else questions


def without(questions: list[Question], tokens: Sequence[str]) -> list[Question]:
    """The questions of which no token is a choice, in whatever case."""
    taken = {token.casefold() for token in tokens}
    return [each for each in questions if taken.isdisjoint(choice.strip().casefold() for choice in each.choices)]


def write_tasks(data: Path, subjects: list[str], limit: int | None, tokens: Sequence[str], to: Path) -> None:
    """A data set per form in hub layout under `to`/data, and a task for each of its subjects.

    The tasks are lm-eval's MMLU tasks but for the data set.
    """
    import lm_eval.tasks
    import pyarrow
    import pyarrow.parquet

    template = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default" / "_default_template_yaml"
    for form, token in forms_of(tokens).items():
        configs = []
        for subject in subjects:
            name = subject.replace("_", " ")
            places = {"test": f"{subject}/test-00000-of-00001.parquet", "dev": f"{subject}/dev-00000-of-00001.parquet"}
            for split, place in places.items():
                questions = read_questions(data, config=subject, split=split)
                if split == "test":
                    questions = in_form(without(questions, tokens)[:limit], token)
                rows = [
                    {"id": each.id, "question": each.question, "choices": list(each.choices), "answer": each.answer}
                    for each in questions
                ]
                (to / "data" / form / subject).mkdir(parents=True, exist_ok=True)
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), to / "data" / form / place)
            listed = "".join(f"  - split: {split}\n    path: {place}\n" for split, place in places.items())
            configs.append(f"- config_name: {subject}\n  data_files:\n{listed}")
            (to / f"{form}_{subject}.yaml").write_text(
                f"include: {template}\ntask: {form}_{subject}\ndataset_path: {form}\ndataset_name: {subject}\n"
                f'description: "The following are multiple choice questions (with answers) about {name}.\\n\\n"\n'
            )
        (to / "data" / form / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")


def run(harness: Harness, model: Any, tokenizer: Any) -> tuple[Evaluation, dict[str, float]]:
    """An evaluation with its seconds, of the clock and of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = harness.run(model, tokenizer)
    return result, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def compare(fast: Evaluation, hf: Evaluation) -> dict[str, Any]:
    """That both answer alike, and how far apart their log-probabilities are."""
    differences, margins = [], []
    for ours, theirs in zip(fast.records, hf.records, strict=True):
        assert (ours.task, ours.id) == (theirs.task, theirs.id)
        assert ours.prediction == theirs.prediction, (ours, theirs)
        differences.append(np.abs(np.subtract(ours.logprobs, theirs.logprobs)).max())
        second, first = np.sort(theirs.logprobs)[-2:]
        margins.append(first - second)
    assert {name: row["acc"] for name, row in fast.scores.items()} == {
        name: row["acc"] for name, row in hf.scores.items()
    }
    return {"questions": len(differences), "largest_difference": max(differences), "smallest_margin": min(margins)}


def measure(arguments: argparse.Namespace, subjects: list[str], tasks: Path) -> dict[str, Any]:
    """Every subject by both scorers, in alternating order."""
    device = checkpoint.pick_device(arguments.device)
    base = checkpoint.resolve(arguments.model)
    model, tokenizer = checkpoint.load_causal_lm(base, "float32", device), checkpoint.load_tokenizer(base)
    blocks = []
    for number, subject in enumerate(subjects):
        names = tuple(f"{form}_{subject}" for form in forms_of(arguments.tokens))
        fast = Harness(names, tasks / "data", (tasks,), "fast", num_fewshot=arguments.num_fewshot)
        hf = replace(fast, scorer="hf")
        assert fast.fingerprint() != hf.fingerprint()  # and so both have their data loaded
        order = (fast, hf) if number % 2 else (hf, fast)
        done = {each.scorer: run(each, model, tokenizer) for each in order}
        checked = compare(done["fast"][0], done["hf"][0])
        seconds = {scorer: spent for scorer, (_, spent) in done.items()}
        blocks.append({"subject": subject, **checked, "seconds": seconds, "load_average": os.getloadavg()[0]})
        ratio = seconds["hf"]["cpu"] / seconds["fast"]["cpu"]
        print(f"{subject}: {checked['questions']} questions, ratio {ratio:.2f} (cpu)", flush=True)
    return {"blocks": blocks, **summarise(blocks), "environment": environment(str(device))}


def summarise(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Questions per second, and the ratio with a 95 % bootstrap over subjects."""
    questions = sum(each["questions"] for each in blocks)
    picks = np.random.default_rng(0).integers(len(blocks), size=(4000, len(blocks)))
    summary: dict[str, Any] = {"questions": questions}
    for clock in ("cpu", "wall"):
        hf, fast = (np.array([each["seconds"][scorer][clock] for each in blocks]) for scorer in ("hf", "fast"))
        ratios = hf[picks].sum(axis=1) / fast[picks].sum(axis=1)
        low, high = np.quantile(ratios, [0.025, 0.975])
        summary[clock] = {
            "hf_questions_per_second": questions / hf.sum(),
            "fast_questions_per_second": questions / fast.sum(),
            "ratio": hf.sum() / fast.sum(),
            "low": low,
            "high": high,
            "subjects": len(blocks),
        }
    return summary


def count(arguments: argparse.Namespace, subjects: list[str]) -> dict[str, Any]:
    """Tokens that each scorer runs through the model, padding counted; nothing is run."""
    from robust_unlearning.evaluate.likelihood import default_budget
    from robust_unlearning.evaluate.prefix_tree import batches, padded

    base = checkpoint.resolve(arguments.model)
    tokenizer, budget = checkpoint.load_tokenizer(base), default_budget(checkpoint.pick_device(arguments.device))
    sequences = set()
    asked = 0
    for subject in subjects:
        header = "".join(
            letters_prompt(each)[0].split("\n\n", 1)[1] + f" {'ABCD'[each.answer]}\n\n"
            for each in read_questions(arguments.data, config=subject, split="dev")[: arguments.num_fewshot]
        )
        questions = without(read_questions(arguments.data, config=subject), arguments.tokens)
        for token in forms_of(arguments.tokens).values():
            for question in in_form(questions, token):
                first, rest = letters_prompt(question)[0].split("\n\n", 1)
                sequences.add(tuple(tokenizer(f"{first}\n\n{header}{rest}")["input_ids"]))
                asked += 1
    lengths = sorted(map(len, sequences), reverse=True)
    theirs = [lengths[start : start + arguments.batch] for start in range(0, len(lengths), arguments.batch)]
    ours = list(batches({each: len(each) - 1 for each in sequences}, budget))
    stems = {batch[0].stem for batch in ours}
    result = {
        "questions": asked,
        "hf_tokens": sum(len(batch) * batch[0] for batch in theirs),
        "fast_tokens": sum(map(padded, ours)) + sum(map(len, stems)),
    }
    return {**result, "ratio": result["hf_tokens"] / result["fast_tokens"]}


def main() -> None:
    """Measure or count, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a copy of cais/mmlu as it lies on the hub")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--subjects", default=SUBJECTS, help="with commas (--count: all of them)")
    parser.add_argument("--limit", type=int, default=50, help="questions of a subject")
    parser.add_argument("--num-fewshot", type=int, default=0)
    parser.add_argument(
        "--tokens",
        nargs="+",
        default=["SARS-CoV-2"],
        help="a perturbed form each: it replaces a wrong option",
    )
    parser.add_argument("--batch", type=int, default=8, help="sequences that lm-eval's hf runs at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", action="store_true", help="only count tokens")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    setting = {key: str(value) for key, value in vars(arguments).items() if key not in ("data", "out")}
    if arguments.count:
        every = sorted(
            each.name for each in arguments.data.iterdir() if (each / "test-00000-of-00001.parquet").exists()
        )
        record = count(arguments, [each for each in every if each != "all"])
        print(
            f"{record['questions']} questions, {arguments.num_fewshot} shots: hf runs {record['hf_tokens']:,} tokens, "
            f"fast {record['fast_tokens']:,}: {record['ratio']:.2f} times fewer"
        )
    else:
        subjects = arguments.subjects.split(",")
        with tempfile.TemporaryDirectory() as folder:
            write_tasks(arguments.data, subjects, arguments.limit, arguments.tokens, Path(folder))
            record = measure(arguments, subjects, Path(folder))
        for clock in ("cpu", "wall"):
            each = record[clock]
            print(
                f"{clock} time: fast {each['fast_questions_per_second']:.2f} questions/s, hf "
                f"{each['hf_questions_per_second']:.2f}: ratio {each['ratio']:.2f} ({each['low']:.2f} to "
                f"{each['high']:.2f}; {record['questions']} questions of {each['subjects']} subjects)"
            )
        print("every prediction equal")
    if arguments.out:
        files.write_json(arguments.out, {"setting": setting, **record})


if __name__ == "__main__":
    main()
