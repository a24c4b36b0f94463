"""`unlearn compare`: from the records that evaluations leave to tables, JSON and Markdown, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from answers import N, first, rows

from robust_unlearning import files
from robust_unlearning.cli.main import main
from robust_unlearning.errors import UserError
from robust_unlearning.results.compare import compare
from robust_unlearning.results.records import read_models, shared_tasks
from robust_unlearning.stats import paired

CLEAN, FORM, CONTROL, LOST = (
    "near/cloze/clean",
    "near/cloze/sentence",
    "near/cloze/sentence-control",
    "forget/cloze/clean",
)


@pytest.fixture
def three(write_records: Callable[..., str]) -> list[str]:
    """base, rmu, rna: on the perturbed form 20, 10 and 15 of 20 right; log p −1, −5 and −3 there."""
    for name, right, logp in (("base", 20, -1.0), ("rmu", 10, -5.0), ("rna", 15, -3.0)):
        write_records(
            name,
            rows(LOST, first(20 if name == "base" else 5)),
            rows(CLEAN, first(20)),
            rows(FORM, first(right), [logp - 0.1 * index for index in range(N)]),
            rows(CONTROL, first(20), [-1.5 - 0.1 * index for index in range(N)]),
        )
    return ["base", "rmu", "rna"]


def row_of(result: Any, task: str, model: str) -> Any:
    return next(row for row in result.rows if (row.task.name, row.model) == (task, model))


def test_numbers(three: list[str]) -> None:
    result = compare(read_models(three))
    assert (result.reference, result.unlearned, result.forget_tasks) == ("base", "rmu", [LOST])
    assert [row.model for row in result.rows[:3]] == three
    rmu, rna = (row_of(result, FORM, name).against for name in ("rmu", "rna"))
    assert row_of(result, FORM, "base").against is None
    assert row_of(result, FORM, "rmu").accuracy.value == 0.5
    assert (rmu.difference.value, rna.difference.value) == (-0.5, -0.25)
    assert (rmu.test.lost, rmu.test.won, rmu.test.p) == (10, 0, pytest.approx(2 / 2**10))
    assert (rna.test.lost, rna.test.p) == (5, pytest.approx(2 / 2**5))
    assert (rmu.reduction.value, rna.reduction.value) == (0.5, 0.25)
    assert (rmu.recovery, rna.recovery.value) == (None, 0.5)
    assert rna.recovery.low < 0.5 < rna.recovery.high
    assert rmu.logp.value == pytest.approx(-4)
    assert rmu.logp_per_token.value == pytest.approx(-2)
    assert rmu.added_harm.value == pytest.approx(-2)  # log p −5 in place of −1 under the forget-token, two tokens
    assert rmu.added_harm.low == pytest.approx(-2)  # one word and no spread
    assert row_of(result, CLEAN, "rmu").against.added_harm is None
    assert row_of(result, CLEAN, "rna").against.recovery.value is None


@pytest.mark.parametrize(
    ("form", "control"),
    [
        ("sars_anatomy", "sars_anatomy_control"),
        ("sars_anatomy_continuation", "sars_anatomy_control_continuation"),
        ("sars_quality_control", "sars_quality_control_control"),
        ("sars_anatomy", "sars_control_anatomy"),
    ],
)
def test_perturbed_sets_are_joined_with_their_controls(
    form: str, control: str, write_records: Callable[..., str]
) -> None:
    tokens = {"forget_token": "Nilmor", "control_token": "Guria"}
    for name, logp, right in (("base", -1.0, 20), ("rmu", -5.0, 18)):
        perturbed = rows(form, first(right), [logp] * N, **tokens)
        write_records(name, perturbed, rows(control, first(right), [-1.5] * N, **tokens))
    result = compare(read_models(["base", "rmu"]), flips=4)
    assert row_of(result, form, "rmu").against.added_harm.value == pytest.approx(-2)
    assert row_of(result, control, "rmu").against.added_harm is None
    assert {(flip.task, flip.token) for flip in result.flips} == {(form, "Nilmor"), (control, "Guria")}


def test_holm_runs_over_the_whole_table_and_verdicts_know_the_direction(three: list[str]) -> None:
    result = compare(read_models(three))
    tested = [row.against for row in result.rows if row.against]
    assert [each.p_holm for each in tested] == paired.holm([each.p for each in tested])
    assert all(each.p == max(each.test.p, each.difference.p()) for each in tested)
    assert len(tested) == 8
    assert row_of(result, LOST, "rmu").against.verdict == "better"  # forgotten, as it should be
    assert row_of(result, FORM, "rmu").against.verdict == "worse"
    assert row_of(result, FORM, "rna").against.verdict == "inconclusive"  # p = 0.06
    assert row_of(compare(read_models(three), forget=[]), LOST, "rmu").against.verdict == "worse"
    other = compare(read_models(three), base="rmu", tasks=["near/*"])
    assert [row.model for row in other.rows[:3]] == ["rmu", "base", "rna"]
    assert other.unlearned == "base"
    assert row_of(other, FORM, "base").against.verdict == "better"


def test_seeds(write_records: Callable[..., str]) -> None:
    rng = np.random.default_rng(0)
    base, seeds = rng.random(N) < 0.9, rng.random((3, N)) < 0.5
    write_records("base", rows(CLEAN, base.tolist()))
    for index, right in enumerate(seeds):
        write_records(f"s{index}", rows(CLEAN, right.tolist(), rng.normal(size=N)))
    result = compare(read_models(["base", "rmu=s0,s1,s2"]), level=0.9)
    row = result.rows[1]
    assert row.by_seed == pytest.approx(seeds.mean(axis=1))
    assert row.accuracy.value == pytest.approx(seeds.mean())
    assert row.accuracy.seeds == row.against.difference.seeds == 3
    assert row.against.difference.value == pytest.approx(seeds.mean() - base.mean())
    assert row.against.test == paired.paired_test([base], seeds)
    assert row.against.spread == paired.standard_errors(seeds, [base])
    assert row.against.spread.by_seed == pytest.approx(seeds.mean(axis=1).std(ddof=1) / 3**0.5)
    numbers = result.as_dict()["groups"][CLEAN]["models"]["rmu"]
    assert numbers["difference_stderr_by_seed"] == row.against.spread.by_seed
    assert numbers["accuracy_by_seed"] == row.by_seed


@pytest.mark.integration
def test_runs_with_equal_seeds_are_paired(
    write_records: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, more in (("rmu", 0), ("rna", 1)):
        for seed, right in enumerate((4, 9, 14)):
            write_records(f"{name}{seed}", rows(CLEAN, first(right + more)))
            Path(f"{name}{seed}/recipe.yaml").write_text(f"seed: {seed}\n")
    words = ["rmu=rmu0,rmu1,rmu2", "rna=rna0,rna1,rna2"]
    paired = compare(read_models(words))
    apart = compare(read_models([words[0], "rna=rna2,rna1,rna0"]))
    assert (paired.paired_seeds, apart.paired_seeds) == ([0, 1, 2], [])
    narrow, wide = (row_of(each, CLEAN, "rna").against for each in (paired, apart))
    assert (narrow.spread.by_seed, narrow.difference.value) == (pytest.approx(0, abs=1e-12), pytest.approx(0.05))
    assert narrow.difference.high - narrow.difference.low < wide.difference.high - wide.difference.low
    assert main(["compare", *words]) == 0
    assert "equal seeds (0, 1, 2) are paired" in capsys.readouterr().out


def test_only_questions_that_all_were_asked(write_records: Callable[..., str]) -> None:
    write_records("a", rows(CLEAN, first(12)), rows(FORM, first(20)), rows("extra/x", first(3)))
    other = rows(FORM, first(20))
    other[0]["forget_token"] = "Steror"  # another question, as another word stands in it
    write_records("b", list(reversed(rows(CLEAN, first(8))))[:15], other)
    result = compare(read_models(["a", "b"]), flips=9)
    clean = result.rows[0].task
    assert (len(clean.records), clean.left_out) == (15, 5)
    assert [record.id for record in clean.records] == [f"q:{index}" for index in range(5, 20)]
    assert result.rows[1].against is not None
    assert (result.rows[1].against.test.lost, result.rows[1].against.test.won) == (4, 0)  # questions 8 to 11
    assert (len(result.rows[2].task.records), result.rows[2].task.left_out) == (19, 2)
    assert result.missing == ["extra/x"]
    assert [flip.id for flip in result.flips] == ["q:8", "q:9", "q:10", "q:11"]


def test_flips_are_sorted_by_the_fall_of_log_p(write_records: Callable[..., str]) -> None:
    falls = np.random.default_rng(1).permutation(N) + 1.0
    write_records("base", rows(FORM, first(15)))
    write_records("rmu", rows(FORM, [False] * 10 + [True] * 10, -1 - falls))
    flips = compare(read_models(["base", "rmu"]), flips=5).flips
    expected = np.argsort(-falls[:10])[:5]
    assert [flip.id for flip in flips] == [f"q:{index}" for index in expected]
    assert [flip.logp for flip in flips] == pytest.approx(-falls[expected])
    flip, answer = flips[0], int(expected[0]) % 4
    assert (flip.task, flip.model, flip.token, flip.right) == (FORM, "rmu", "Nilmor", answer)
    assert (flip.reference_said, flip.model_said) == ([answer], [(answer + 1) % 4])


@pytest.mark.integration
def test_answers_without_choices_are_compared_as_right_and_wrong(write_records: Callable[..., str]) -> None:
    free = {"answer": "12", "prediction": "|twelve|\nor " + "so " * 40, "logprobs": None, "tokens": None}
    write_records("a", rows("gsm8k", first(20), **free))
    write_records("b", rows("gsm8k", first(9), **free))
    assert main(["compare", "a", "b", "--flips", "1", "--out", "c.md"]) == 0
    assert Path("c.md").read_text(encoding="utf-8").count("\\|twelve\\| or so so") == 2
    result = compare(read_models(["a", "b"]), flips=1)
    assert result.rows[1].against is not None
    assert result.rows[1].against.logp is None
    assert result.flips[0].model_said == [free["prediction"]]


@pytest.mark.integration
def test_command_line(three: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "compare",
        *three,
        "--flips",
        "2",
        "--level",
        "0.9",
        "--out",
        "out/c.json",
        "--out",
        "out/c.md",
        "--out",
        "out/c.html",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert f"{LOST} ↓" in printed
    assert f"{FORM} ↑" in printed
    assert "90 % intervals" in printed
    assert "undefined: unlearning lost nothing, so there is nothing to recover." in printed
    line = next(line for line in printed.splitlines() if line.split()[:2] == ["rmu", "20"] and "worse" in line)
    assert "50.0 [" in line
    assert line.split()[-8:] == ["10", "0", "0.002", "0.012", "worse,", "of", "these", "models"]
    assert printed.count("fewer than 3 training seeds") == 1
    data = json.loads(Path("out/c.json").read_text(encoding="utf-8"))
    numbers = data["groups"][FORM]["models"]["rna"]
    assert numbers["test"] == {"lost": 5, "won": 0, "p": pytest.approx(1 / 16), "name": paired.MCNEMAR}
    assert numbers["recovery"]["value"] == 0.5
    assert data["groups"][CLEAN]["models"]["rna"]["recovery"]["value"] is None
    assert data["groups"][LOST]["to_be_forgotten"]
    assert len(data["flips"]) == 4
    markdown = Path("out/c.md").read_text(encoding="utf-8")
    assert f"| {FORM} ↑ | rmu | 20 | 50.0 [" in markdown
    assert markdown.count("## ") == 3
    assert f"{FORM} ↑".replace("/", "/<wbr>") in Path("out/c.html").read_text(encoding="utf-8")
    for flag, value in (("--unlearned", "rna"), ("--base", "rmu")):
        assert main(["compare", *three, flag, value]) == 0
    assert f"Reference: {three[1]}" in capsys.readouterr().out


@pytest.mark.integration
def test_seeds_on_the_command_line(three: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "base", "both=rmu,rna", "--tasks", "near/*"]) == 0
    printed = capsys.readouterr().out
    assert "Spread over seeds" in printed
    assert "sign-flip" in printed
    assert "both (2 seeds: rmu, rna)" in printed


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["base"], "two models or more"),
        (["base", "nowhere"], "unlearn eval nowhere --tasks SUITE --out DIR"),
        (["base", "empty"], "unlearn eval MODEL --tasks SUITE --out empty"),
        (["base", "run"], "Evaluate it first: unlearn eval run --tasks SUITE\n"),
        (["base", "base/delta.safetensors"], "unlearn eval base/delta.safetensors --tasks SUITE --out DIR"),
        (["base", "model"], "unlearn eval model --tasks SUITE --out DIR"),
        (["base", "base"], "two models are called 'base'"),
        (["base", "rmu,rna"], "NAME=rmu,rna"),
        (["base", "x=rmu,,rna"], "names no folder"),
        (["base", "rmu", "--base", "bse"], "did you mean 'base'"),
        (["base", "rmu", "--unlearned", "rmu"], "and a third"),
        (["base", "rmu", "--tasks", "near/cloze/claen"], "did you mean 'near/cloze/clean'"),
        (["base", "rmu", "--tasks", "near/*,fra/*"], "unknown task 'fra/*'"),
        (["base", "rmu", "--forget", "frget/*"], "unknown task 'frget/*'"),
        (["base", "rmu", "--level", "95"], "between 0 and 1"),
        (["base", "rmu", "--out", "c.txt"], "'.txt'"),
        (["base", "rmu", "--flips", "-1"], "0 for none"),
        (["base", "other"], "no task in common"),
        (["base", "apart"], "is in all records up to apart/records.jsonl: compare it with base/records.jsonl"),
        (["base", "changed"], "the right answer to question 'q:0' of near/cloze/clean is 0 (of 4 choices) in base/rec"),
        (["base", "cut"], "cut/records.jsonl, line 1: not JSON"),
        (["base", "bare"], "lacks answer, prediction"),
        (["base", "twice"], "Compare one of the two: twice/records.jsonl or twice/scores/again/records.jsonl"),
    ],
)
def test_mistakes(
    words: list[str], says: str, three: list[str], write_records: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("empty", "run", "model", "cut", "bare"):
        Path(name).mkdir()
    Path("run/recipe.yaml").write_text("topics: {}\n")
    Path("model/config.json").write_text("{}")
    Path("base/delta.safetensors").touch()
    Path("cut/records.jsonl").write_text('{"task": "a", "i\n')
    Path("bare/records.jsonl").write_text('{"task": "a", "id": "b", "correct": true}\n')
    write_records("other", rows("far/cloze/clean", first(3)))
    write_records("apart", rows(CLEAN, first(3), id="elsewhere")[:1])
    write_records("changed", rows(CLEAN, first(20), answer=1))
    write_records("twice", rows(CLEAN, first(3)))
    write_records("twice/scores/again", rows(CLEAN, first(2)))
    assert main(["compare", *words]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert "Right answers" not in printed.out
    assert not Path("c.txt").exists()


def test_both_files_are_named_when_the_data_differ(three: list[str], write_records: Callable[..., str]) -> None:
    write_records("changed", rows(CLEAN, first(20), answer=1))
    with pytest.raises(UserError, match=r"base/records.jsonl .* changed/records.jsonl"):
        shared_tasks(read_models(["base", "changed"]))


@pytest.mark.integration
def test_runs_evaluated_on_two_suites(
    tiny_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, topic in (("one", "spells"), ("two", "rest")):
        choices = ["badu", "fegro", "hika", "lummo"]
        questions = [{"question": f"badu {index}?", "choices": choices, "answer": index % 4} for index in range(8)]
        files.write_jsonl(tmp_path / f"{name}.jsonl", questions)
        suite = {
            "questions": {topic: {"path": f"{name}.jsonl", "perturb": ["parenthesis"]}},
            "forget_tokens": ["natnat"],
            "control_tokens": ["zuzu"],
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny_recipe), encoding="utf-8")
    assert main(["run", "mine.yaml", "--out", "run"]) == 0
    assert main(["eval", "run", "--tasks", "one.yaml,two.yaml"]) == 0
    assert main(["eval", str(tiny_recipe["model"]), "--tasks", "one.yaml,two.yaml", "--out", "base"]) == 0
    capsys.readouterr()
    assert main(["compare", "base", "run", "--out", "c.json"]) == 0
    printed = capsys.readouterr().out
    assert "spells/cloze/clean ↓" in printed  # the run's recipe says what is to be forgotten
    assert "rest/cloze/clean ↑" in printed
    data = files.read_json(tmp_path / "c.json")
    for suite_name in ("one", "two"):
        scores = {
            each: files.read_json(tmp_path / each / "scores" / suite_name / "scores.json") for each in ("base", "run")
        }
        for task, row in scores["run"].items():
            numbers = data["groups"][task]["models"]["run"]
            assert numbers["accuracy"]["value"] == row["acc"]
            if "excess_harm" in row:
                added = row["excess_harm"]["value"] - scores["base"][task]["excess_harm"]["value"]
                assert numbers["added_harm"]["value"] == pytest.approx(added)
