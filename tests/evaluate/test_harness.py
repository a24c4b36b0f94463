"""lm-evaluation-harness: its own scores on local data, by both scorers, from run folders and applied models."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import byte_tokenizer, random_model

from robust_unlearning import files
from robust_unlearning.cli import main
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.harness import Harness
from robust_unlearning.stats.estimates import accuracy

pytestmark = pytest.mark.integration

WORDS = ["apple", "river", "stone", "tall ladder", "cloud", "button", "ox", "meadow"]
SIZES = {"alpha": 9, "beta": 4}
TASK = {
    "dataset_path": "org/quiz",
    "test_split": "test",
    "fewshot_split": "dev",
    "fewshot_config": {"sampler": "first_n"},
    "output_type": "multiple_choice",
    "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nAnswer:",
    "doc_to_choice": ["A", "B", "C"],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}
AVERAGE = [{"metric": "acc", "weight_by_size": True}]


def write_quiz(folder: Path, seed: int = 0) -> None:
    """A data set as it lies on the hub: a README.md that lists its configs, and parquet files."""
    import pyarrow
    import pyarrow.parquet

    draw = np.random.default_rng(seed)
    configs = []
    for name, size in SIZES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, rows in (("test", size), ("dev", 2)):
            table = [
                {
                    "question": f"Which {name} is {index} of {split}?",
                    "choices": draw.choice(WORDS, size=3, replace=False).tolist(),
                    "answer": int(draw.integers(3)),
                }
                for index in range(rows)
            ]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / name / f"{split}-0.parquet")
        data_files = [{"split": split, "path": f"{name}/{split}-*"} for split in ("test", "dev")]
        configs.append({"config_name": name, "data_files": data_files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with one data set."""
    write_quiz(tmp_path / "data" / "org" / "quiz")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks by letter and by text, an average of two by size, one without regard to size, and one without any."""
    folder = tmp_path_factory.mktemp("tasks")
    description = "Questions with answers.\n\n"
    letters = {f"quiz_{name}": {**TASK, "dataset_name": name, "description": description} for name in SIZES}
    texts = {
        "quiz_texts": {
            **{key: value for key, value in TASK.items() if key != "metric_list"},
            "dataset_name": "alpha",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
        }
    }
    for name, task in {**letters, **texts}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}))
    groups = {
        "quiz": {"task": list(letters), "aggregate_metric_list": AVERAGE},
        "quiz_even": {"task": list(letters), "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}]},
        "quiz_all": {"task": ["quiz", "quiz_texts"]},
    }
    for name, group in groups.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, **group, "metadata": {"version": 1}}))
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("llama", vocab_size=300, max_position_embeddings=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> Path:
    """The same model on disk."""
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def by_lm_eval(model: Path, root: Path, tasks: Path, names: list[str], **options: Any) -> dict[str, Any]:
    """What lm-eval itself gives, told by its own means where the data lies."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    copies = tasks.parent / "copies"
    copies.mkdir(exist_ok=True)
    for path in tasks.glob("*.yaml"):
        text = path.read_text().replace("dataset_path: org/quiz", f"dataset_path: {root / 'org' / 'quiz'}")
        (copies / path.name).write_text(text)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=names,
        device="cpu",
        batch_size=4,
        task_manager=TaskManager(include_defaults=False, include_path=str(copies)),
        **options,
    )
    assert results
    return dict(results)


def evaluate(*words: Any) -> int:
    return main.main(["eval", *map(str, words)])


def test_a_run_folder_scores_as_lm_eval_scores_the_applied_model(
    tmp_path: Path,
    folder: Path,
    root: Path,
    tasks: Path,
    tiny_recipe: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe | {"model": str(folder), "steering_scale": 50}))
    run = tmp_path / "run"
    assert main.main(["run", str(tmp_path / "recipe.yaml"), "--out", str(run)]) == 0
    assert main.main(["apply", str(run), "--to", str(tmp_path / "applied")]) == 0
    options = ["--data-root", root, "--include-path", tasks, "--num-fewshot", 1]
    assert evaluate(run, "--tasks", "quiz_all", *options) == 0
    shown = capsys.readouterr().out
    scores = files.read_json(run / "scores.json")
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]

    theirs = by_lm_eval(tmp_path / "applied", root, tasks, ["quiz_all"], num_fewshot=1)
    base = by_lm_eval(folder, root, tasks, ["quiz_all"], num_fewshot=1)
    assert list(scores) == ["quiz", "quiz_alpha", "quiz_beta", "quiz_texts"]
    for name, row in scores.items():
        own = theirs["results"][name]
        assert row["acc"] == own["acc,none"]
        assert row["stderr"] == pytest.approx(own["acc_stderr,none"])
        assert row["n"] == own["sample_len"]
        assert name in shown
    assert scores["quiz_texts"]["acc_norm"] == theirs["results"]["quiz_texts"]["acc_norm,none"]
    assert {name: row["scored"] for name, row in scores.items()} == {
        "quiz": "letters",
        "quiz_alpha": "letters",
        "quiz_beta": "letters",
        "quiz_texts": "answer texts",
    }
    samples = [each | {"task": name} for name in list(scores)[1:] for each in theirs["samples"][name]]
    unlike = 0.0
    for record, sample in zip(records, samples, strict=True):
        logprobs = [logp for logp, _ in sample["filtered_resps"]]
        assert record["logprobs"] == pytest.approx(logprobs, abs=1e-4)
        assert record["prediction"] == int(np.argmax(logprobs))
        assert record["correct"] == bool(sample["acc"])
        assert (record["task"], record["doc_hash"]) == (sample["task"], sample["doc_hash"])
        assert record["answer"] == sample["target"]
    for record, sample in zip(
        records, [each for name in list(scores)[1:] for each in base["samples"][name]], strict=True
    ):
        unlike = max(unlike, *np.abs(np.subtract(record["logprobs"], [logp for logp, _ in sample["filtered_resps"]])))
    assert unlike > 0.01  # it was not the base that was scored
    assert records[0]["id"] == "alpha:1"
    assert records[0]["tokens"] == [2, 2, 2]  # a space and a letter
    assert "letters scored" in (run / "README.md").read_text()

    monkeypatch.setattr(Harness, "run", None)  # the second time nothing is run
    assert evaluate(run, "--tasks", "quiz_all", *options) == 0
    monkeypatch.undo()
    write_quiz(root / "org" / "quiz", seed=1)  # the same files with other questions
    assert evaluate(run, "--tasks", "quiz_all", *options) == 0
    direct = tmp_path / "direct.yaml"  # a task that names the folder itself reads it as it is now, too
    direct.write_text(
        yaml.safe_dump({"task": "direct", **TASK, "dataset_path": f"{root}/org/quiz", "dataset_name": "beta"})
    )
    now = Harness((str(direct),)).loaded["tasks"]["direct"].eval_docs["choices"]
    write_quiz(root / "org" / "quiz", seed=2)
    assert Harness((str(direct),)).loaded["tasks"]["direct"].eval_docs["choices"] != now
    again = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert {each["doc_hash"] for each in again} != {each["doc_hash"] for each in records}


def test_groups_average_as_lm_eval_does(
    model: Any,
    tokenizer: Any,
    root: Path,
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tokenizer, "model_max_length", 8)
    with caplog.filtering(lambda record: "longer than" in record.getMessage()):
        logging.getLogger("transformers").addHandler(caplog.handler)
        result = Harness(("quiz",), root, (tasks,)).run(model, tokenizer)
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records  # texts beyond the window are cut without a word
    alpha, beta = (result.scores[f"quiz_{name}"] for name in SIZES)
    row = result.scores["quiz"]
    assert row["acc"] == pytest.approx((9 * alpha["acc"] + 4 * beta["acc"]) / 13)
    assert row["n"] == 13
    wilson = accuracy([each.right for each in result.records])
    assert (row["low"], row["high"]) == (wilson.low, wilson.high)

    even = Harness(("quiz_even",), root, (tasks,)).run(model, tokenizer).scores["quiz_even"]
    assert even["acc"] == pytest.approx((alpha["acc"] + beta["acc"]) / 2)
    assert even["high"] - even["low"] <= 2 * 1.96 * even["stderr"] + 1e-3  # no count of questions behind it


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_scorers_agree(family: str, tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance

    from robust_unlearning.evaluate.fast_lm import FastLM, PlainLM

    model = random_model(family, vocab_size=300, max_position_embeddings=48)  # mistral's window is 4 tokens
    pairs = [
        ("Pick one:", " A"),
        ("Pick one:", " B"),
        ("Pick one: ", "A"),  # the space moves to what follows
        ("Pick one:", " tall ladder"),
        ("Pick one:", " tall lad"),
        ("", "no context at all"),
        ("word " * 30, "cut on the left"),
        ("word " * 30, " A"),
        ("Pick one:", " A"),
    ]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("short", "a longer text, in windows " * 5)]
    plain, fast = PlainLM(model, tokenizer), FastLM(model, tokenizer)
    expected = plain.loglikelihood(asked)
    for (ours, greedy), (theirs, also) in zip(fast.loglikelihood(asked), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3, rel=1e-5)
        assert greedy == also
    assert fast.continuation_tokens == plain.continuation_tokens
    assert fast.loglikelihood_rolling(texts) == pytest.approx(plain.loglikelihood_rolling(texts), rel=1e-5)
    context = tokenizer("Pick one:")["input_ids"]
    best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    for scorer in (plain, fast):
        assert [greedy for _, greedy in scorer._loglikelihood_tokens([(None, context, [best])])] == [True]
    with pytest.raises(UserError, match="takes 1 to 48"):
        fast.loglikelihood([Instance("loglikelihood", {}, ("Pick one:", " too long" * 20), 0)])


def test_hf_scorer_and_limit(
    folder: Path, tmp_path: Path, root: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tasks", "quiz", "--data-root", root, "--include-path", tasks, "--limit", 5]
    rows = {}
    for scorer in ("fast", "hf"):
        assert evaluate(folder, *options, "--scorer", scorer, "--out", tmp_path / scorer) == 0
        shown = capsys.readouterr().out
        assert "9 of 13 (partial)" in shown
        assert "5 of 9 (partial)" in shown
        assert "partial: at most the first 5 questions" in shown
        scores = files.read_json(tmp_path / scorer / "scores.json")
        assert scores["quiz_alpha"]["partial"]
        assert scores["quiz"]["of"] == 13
        assert "partial" not in scores["quiz_beta"]  # it has four questions
        rows[scorer] = [json.loads(line) for line in (tmp_path / scorer / "records.jsonl").read_text().splitlines()]
        about = files.read_json(tmp_path / scorer / "evaluation.json")
        assert (about["limit"], about["scorer"]) == (5, scorer)
    for ours, theirs in zip(rows["fast"], rows["hf"], strict=True):
        assert ours.pop("logprobs") == pytest.approx(theirs.pop("logprobs"), abs=1e-4)
        assert ours == theirs


def test_task_files_and_suites_side_by_side(folder: Path, tmp_path: Path, root: Path, tasks: Path) -> None:
    files.write_jsonl(tmp_path / "set.jsonl", [{"question": "Which?", "choices": ["a", "b"], "answer": 0}] * 3)
    (tmp_path / "suite.yaml").write_text(f"questions: {{set: {{path: {tmp_path}/set.jsonl}}}}\n")
    both = f"{tmp_path / 'suite.yaml'},{tasks / 'quiz_beta.yaml'}"
    assert evaluate(folder, "--tasks", both, "--data-root", root, "--limit", 2, "--out", tmp_path / "out") == 0
    for plan, task in (("suite", "set/cloze/clean"), ("lm-eval", "quiz_beta")):
        scores = files.read_json(tmp_path / "out" / "scores" / plan / "scores.json")
        assert [(name, row["n"]) for name, row in scores.items()] == [(task, 2)]


def test_a_sweep_over_tasks(
    tmp_path: Path,
    folder: Path,
    root: Path,
    tasks: Path,
    tiny_recipe: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe | {"model": str(folder), "steps": 2}))
    data = ["--include-path", str(tasks), "--data-root", str(root), "--retain", "quiz_*"]
    words = [
        "sweep",
        str(tmp_path / "recipe.yaml"),
        "noise_std=0,1",
        "--out",
        str(tmp_path / "out"),
        "--limit",
        "3",
        *data,
    ]
    assert main.main([*words, "--tasks", "quiz", "--validation", "quiz_alpha"]) == 2
    assert "3 questions are both in" in capsys.readouterr().err
    rule = ["--select", "max retain where retain>=0*base"]
    assert main.main([*words, "--tasks", "quiz_beta", "--validation", "quiz_alpha", *rule]) == 0
    assert "chosen noise_std=" in capsys.readouterr().out
    (point, _) = files.read_json(tmp_path / "out" / "sweep.json")["points"]
    run = tmp_path / "out" / point["folder"]
    assert point["scores"]["quiz_beta"]["retain"] == files.read_json(run / "scores.json")["quiz_beta"]["acc"]
    validation = files.read_json(run / "scores" / "quiz_alpha" / "scores.json")
    assert [(name, row["n"]) for name, row in validation.items()] == [("quiz_alpha", 3)]


def test_names_and_data_that_are_not_there(
    folder: Path, tmp_path: Path, root: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*words: Any) -> str:
        assert evaluate(folder, "--out", tmp_path / "none", *words) == 2
        assert not (tmp_path / "none").exists()
        return capsys.readouterr().err

    own = ["--include-path", tasks, "--data-root", root]
    assert "did you mean 'quiz_alpha'" in error("--tasks", "quiz_alpa", *own)
    assert "did you mean 'demo'" in error("--tasks", "demoo")
    assert "did you mean 'mmlu_anatomy'" in error("--tasks", "mmlu_anatomi")
    assert "no such file" in error("--tasks", "nowhere.yaml")
    assert "'0' is not a number of at least 1" in error("--tasks", "demo", "--limit", 0)
    assert "no folder" in error("--tasks", "quiz", "--include-path", tasks, "--data-root", tmp_path / "absent")
    assert "no such file or folder" in error("--tasks", "quiz", "--include-path", tmp_path / "absent")
    missing = error("--tasks", "wmdp_bio", "--data-root", root)
    for part in ("'cais/wmdp'", str(root / "cais" / "wmdp"), str(root / "wmdp"), "there is org"):
        assert part in missing
    assert f"Did you mean --data-root {root}?" in error(
        *own[:2], "--tasks", "quiz", "--data-root", root / "org" / "quiz"
    )
    assert f"Did you mean --data-root {root}?" in error(*own[:2], "--tasks", "quiz", "--data-root", root.parent)
    (root / "org" / "quiz").rename(root / "quiz")  # without the organisation it is found as well
    assert evaluate(folder, "--tasks", "quiz_beta", *own, "--out", tmp_path / "found") == 0
    other = tmp_path / "gamma.yaml"
    other.write_text(yaml.safe_dump({"task": "gamma", **TASK, "dataset_name": "alpa"}))
    capsys.readouterr()
    assert "unknown config of org/quiz 'alpa': did you mean 'alpha'" in error("--tasks", other, "--data-root", root)
    assert "copy, say where: --data-root" in error("--tasks", other)  # offline, so the hub has nothing
    (root / "quiz" / "README.md").unlink()
    assert "has no README.md, whose head lists the configs of org/quiz" in error("--tasks", "quiz", *own)
    write_quiz(root / "quiz")
    (root / "quiz" / "beta" / "test-0.parquet").write_text("junk")
    assert re.match(
        r"unlearn: \S+ cannot be read .*beta/test-0.parquet' with error", error("--tasks", "quiz_beta", *own)
    )
    other.write_text(yaml.safe_dump({"task": "gamma", **TASK, "dataset_path": str(tmp_path / "gone")}))
    for options in ((), ("--data-root", root)):
        assert f"the folder {tmp_path / 'gone'}, which is not there" in (moved := error("--tasks", other, *options))
        assert "its tasks/_location_yaml names where it lies" in moved
