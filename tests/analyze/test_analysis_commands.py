"""The analyses' reports and their commands, on made-up records and on a small model."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import WORDS

from robust_unlearning import files
from robust_unlearning.analyze import harmfulness, ngram_answers, output
from robust_unlearning.cli import main
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.record import Record
from robust_unlearning.stats.estimates import Estimate
from robust_unlearning.train.trainer import unlearn


def harmful_records(count: int = 40) -> list[dict[str, Any]]:
    """`near` n-grams cost a nat and every other answer, `far` ones nothing."""
    records = []
    for index in range(count):
        token = ("ba du", "ka mo", "ba da", "ka ma")[index % 4]
        harmed = token.startswith("ba")
        noise = 0.01 * (index % 5)
        for form, logp, right in (
            ("clean", -1.0, True),
            ("option", -2.0 + noise if harmed else -1.0 - noise, not harmed or index // 4 % 2 == 0),
            ("option-control", -1.0, True),
        ):
            held = None if form == "clean" else token
            records.append(
                {"task": f"facts/letters/{form}", "id": str(index), "answer": 0, "correct": right, "tokens": [1, 1],
                 "logprobs": [logp, -3], "forget_token": held, "control_token": held and "zu"}
            )  # fmt: skip
    return records


def typed(rows: Iterable[dict[str, Any]]) -> list[Record]:
    return [Record.from_dict(row) for row in rows]


CLASSES = {
    "ngrams": [
        {"text": "ba du", "n": 2, "class": "most", "similarity": 0.8},
        {"text": "ba da", "n": 2, "class": "most", "similarity": 0.7},
        {"text": "ka mo", "n": 2, "class": "least", "similarity": 0.1},
        {"text": "ka ma", "n": 2, "class": "least", "similarity": 0.2},
    ]
}


@pytest.mark.integration
def test_harmfulness_by_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_jsonl(tmp_path / "rmu" / "records.jsonl", harmful_records())
    files.write_json(tmp_path / "ngrams.json", CLASSES)
    words = ["analyze", "harmfulness", f"rmu={tmp_path / 'rmu'}", "--classes", str(tmp_path / "ngrams.json")]
    assert main.main([*words, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "the n-gram is the unit: 2 n-grams of each class" in printed
    assert "class 'most' is more harmful than class 'least'" in printed
    least, most = files.read_json(tmp_path / "analysis" / "harmfulness.json")["tables"]["classes"]
    assert (least["similarity_class"], most["similarity_class"]) == ("least", "most")
    assert most["accuracy"]["value"] == 0.5
    assert least["accuracy"]["value"] == most["control"]["value"] == most["clean"]["value"] == 1
    assert most["excess"]["high"] < -0.9
    assert least["excess"]["value"] == pytest.approx(-0.01 * 2, abs=0.01)
    rows = list(csv.DictReader((tmp_path / "analysis" / "harmfulness-classes.csv").open(encoding="utf-8")))
    assert [row["n"] for row in rows] == ["20", "20"]
    assert float(rows[1]["excess_high"]) == most["excess"]["high"]


def test_harmfulness_of_perturbed_sets_is_that_of_suites() -> None:
    """Their control form has another name, and their clean form is another task of the same questions and style."""
    classes = {each["text"]: ngram_answers.Ngram.model_validate(each) for each in CLASSES["ngrams"]}
    names = {"clean": "mmlu_facts", "option": "ng_facts", "option-control": "ng_facts_control"}
    suite = harmful_records()
    records = [{**each, "task": names[each["task"].rsplit("/", 1)[1]]} for each in suite]
    others = [  # asked as well: in another style, and with other right answers
        {**each, "task": task, "correct": False, **change}
        for each in records
        if each["task"] == "mmlu_facts"
        for task, change in (("a_continuation", {}), ("b", {"tokens": [2, 2]}), ("c", {"answer": 1}))
    ]
    expected = [replace(each, task="ng_facts") for each in grouped(suite, classes)]
    assert grouped([*others, *records], classes) == expected
    unpaired = [{**each, "control_token": "other"} if each["task"] == "ng_facts_control" else each for each in records]
    assert all(each.clean and not each.control for each in grouped(unpaired, classes))


def grouped(rows: Iterable[dict[str, Any]], classes: Mapping[str, ngram_answers.Ngram]) -> list[harmfulness.Group]:
    return harmfulness.group(ngram_answers.asked_of(typed(rows), classes))


def test_harmfulness_says_what_is_missing(tmp_path: Path) -> None:
    classes = ngram_answers.Ngram.model_validate({"text": "ba dur", "n": 2, "class": "most", "similarity": 1})
    with pytest.raises(UserError, match=r"none of the 4 forget-tokens .*nearest: 'ba dur'"):
        grouped(harmful_records(), {"ba dur": classes})
    with pytest.raises(UserError, match="no record has a forget-token"):
        grouped((row for row in harmful_records() if row["forget_token"] is None), {"ba dur": classes})
    with pytest.raises(UserError, match=r"unlearn eval TARGET"):
        harmfulness.read_folder(str(tmp_path))
    files.write_json(tmp_path / "wrong.json", {"ngrams": [{"text": "ba", "n": 0, "class": "a"}]})
    with pytest.raises(UserError, match=r"n-gram 0: .*n: .*similarity: required"):
        ngram_answers.read_classes(str(tmp_path / "wrong.json"))


def test_a_report_on_disk(tmp_path: Path) -> None:
    estimate = Estimate(1.5, 1.25, 1.75, n=9)
    table = output.Table(
        "Numbers", {"name": "model", "x": "x"}, [{"name": "a", "x": estimate}, {"name": "b", "x": ""}], key="t"
    )
    text = output.write(output.Report("sum", "Sum", {"seed": 0}, ["A note."], [table]), tmp_path)
    assert "1.5 [1.25, 1.75]" in text
    assert (tmp_path / "analysis" / "sum-t.csv").read_text() == "name,x,x_low,x_high,x_n\na,1.5,1.25,1.75,9\nb,,,,\n"
    assert json.loads((tmp_path / "analysis" / "sum.json").read_text())["tables"]["t"][0]["x"]["low"] == 1.25
    assert "| a | 1.5 [1.25, 1.75] |" in (tmp_path / "analysis" / "sum.md").read_text()


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.1, 0.2, "higher"), (-2, -1, "lower"), (0, 0, "the same"), (-1, 1, "inconclusive")],
)
def test_what_an_interval_says(low: float, high: float, said: str) -> None:
    assert output.side(Estimate(0, low, high)) == said


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of 24 made-up questions, perturbed in front."""
    folder = tmp_path_factory.mktemp("suite")
    rows = [
        {"question": " ".join(WORDS[index : index + 5]), "choices": WORDS[index + 5 : index + 9], "answer": index % 4}
        for index in range(24)
    ]
    files.write_jsonl(folder / "questions.jsonl", rows)
    entry = {"path": str(folder / "questions.jsonl"), "styles": ["letters"], "perturb": ["option"]}
    tokens = {"forget_tokens": WORDS[200:204], "control_tokens": WORDS[220:224]}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"questions": {"odd": entry}, **tokens}), encoding="utf-8")
    return folder / "suite.yaml"


@pytest.mark.integration
def test_every_analysis_runs_on_a_base_and_two_runs(
    tiny_recipe: dict[str, Any], suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from robust_unlearning.recipe import load_recipe

    runs = [str(tmp_path / name) for name in ("rmu", "rna")]
    for run, changes in zip(runs, ({}, {"noise_std": 0.5}), strict=True):
        unlearn(load_recipe({**tiny_recipe, "steps": 4, **changes}), run)
    end = ["--out", str(tmp_path), "--device", "cpu"]

    assert main.main(["analyze", "noise-sensitivity", *runs, "--documents", "4", "--probes", "1", *end]) == 0
    rows = files.read_json(tmp_path / "analysis" / "noise-sensitivity.json")["tables"]["layers"]
    assert len(rows) == 6 * 3  # layers, and base and two runs
    first = [row for row in rows if row["layer"] == 0]
    assert first[0]["applied"] == first[1]["applied"]  # below the band nothing has changed
    assert first[1]["applied_change"]["value"] == 0
    thirds = files.read_json(tmp_path / "analysis" / "noise-sensitivity.json")["tables"]["thirds"]
    assert len(thirds) == 2 * 2 * 2  # runs, readings, the two other thirds

    sizes = ["--documents", "3", "--draws", "20", "--probes", "1", "--questions", "24"]
    assert main.main(["analyze", "theory", *runs, "--tasks", str(suite), *sizes, *end]) == 0
    tables = files.read_json(tmp_path / "analysis" / "theory.json")["tables"]
    assert {row["n"] for row in tables["shift"]} == {24}
    assert len(tables["output"]) == 3 * 5
    assert [(row["target"], round(row["first_order"], 3)) for row in tables["growth"]][:2] == [
        (str(tiny_recipe["model"]), 2.408), (str(tiny_recipe["model"]), 2.197),
    ]  # fmt: skip
    assert len(tables["growth"]) == 3 * 3
    assert {row["difference"]["words"] for row in tables["rejection"]} == {4}
    assert {row["target"] for row in tables["rejection"]} == {str(tiny_recipe["model"]), runs[0]}
    assert [(row["target"], row["against"]) for row in tables["trained"]] == [(runs[1], runs[0])]

    assert main.main(["analyze", "activations", runs[0], "--tasks", str(suite), "--documents", "4", *end]) == 0
    tables = files.read_json(tmp_path / "analysis" / "activations.json")["tables"]
    layers = {row["layer"]: row["cosine"]["value"] for row in tables["texts"] if row["text"] == "forget"}
    assert layers[0] == pytest.approx(1)
    assert layers[3] < 1
    assert len(tables["answer"]) == 2 * 6
    assert len(tables["token"]) == 6  # of the run: the base has no steering direction
    assert "a forget-token" in capsys.readouterr().out


@pytest.mark.integration
def test_theory_without_targets_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["analyze", "theory", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "refuted in 9 of 12 rows" in out
    assert "holds in all 12 rows" in out


@pytest.mark.integration
def test_what_an_analysis_refuses(tiny_model: Path, suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_model)
    for words, said in (
        (["noise-sensitivity", model], "no recipe says which texts or layer"),
        (["noise-sensitivity", model, "--layer", "nine"], "give the number of a layer"),
        (["noise-sensitivity", model, "tiny"], "have 2 bases"),
        (["theory", model], "theory on models needs questions"),
        (["theory", model, "--tasks", str(suite)], "bare model"),
        (["theory", model, "--tasks", str(suite), "--layer", "9"], "layers 0 to 5"),
    ):
        assert main.main(["analyze", *words]) == 2
        assert said in capsys.readouterr().err
