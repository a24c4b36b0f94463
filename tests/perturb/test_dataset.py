"""A perturbed set on disk: it holds what was drawn, its manifest rebuilds it, and every layout gives the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from quiz import KEYWORDS, SUBJECTS, contents, some_questions, tokens_of, write_hub

from robust_unlearning import files
from robust_unlearning.cli.main import main
from robust_unlearning.data.questions import read_questions
from robust_unlearning.errors import UserError
from robust_unlearning.perturb.dataset import Source, make_set, rebuild
from robust_unlearning.perturb.forms import (
    Perturbation,
)
from robust_unlearning.perturb.keywords import read_keywords
from robust_unlearning.perturb.places import (
    perturb,
    replace_options,
)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return write_hub(tmp_path / "quiz", some_questions(40))


def test_the_set_holds_what_was_drawn(hub: Path, tmp_path: Path) -> None:
    settings = Perturbation(count=2, seed=3, control=True)
    made = make_set(Source(path=str(hub)), read_keywords(KEYWORDS), settings, tmp_path / "out")
    clean = {each.id: each for each in read_questions(hub)}
    perturbed = {each.id: each for each in read_questions(made.folder)}
    control = {each.id: each for each in read_questions(made.folder / "control")}
    records = [json.loads(line) for line in (made.folder / "replaced.jsonl").read_text("utf-8").splitlines()]
    assert perturbed.keys() == control.keys() == clean.keys() == {each["id"] for each in records}
    for record in records:
        question = clean[record["id"]]
        assert [question.choices[index] for index in record["options"]] == record["replaced"]
        assert perturbed[question.id] == replace_options(question, record["keywords"], record["options"])
        assert control[question.id] == replace_options(question, record["controls"], record["options"])
    tokens = {each["id"]: ("; ".join(each["keywords"]), "; ".join(each["controls"])) for each in records}
    for folder in (made.folder, made.folder / "control"):
        assert tokens_of(folder) == tokens
    manifest = json.loads((made.folder / "manifest.json").read_text("utf-8"))
    assert manifest["counts"]["perturbed"] == 40
    assert sum(manifest["counts"]["keywords"].values()) == 80
    assert manifest["source"]["sha256"].keys() == {f"{subject}/test-00000-of-00001.parquet" for subject in SUBJECTS}
    for name, digest in manifest["files"].items():
        assert files.sha256_file(made.folder / name) == digest
    unlisted = {"manifest.json", "tasks/_location_yaml"}
    assert contents(made.folder).keys() - manifest["files"].keys() == unlisted


@pytest.mark.integration
def test_the_manifest_rebuilds_the_set_byte_for_byte(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": word, "class": "similar"} for word in KEYWORDS]
    files.write_jsonl(tmp_path / "k.jsonl", rows)
    words = ["--keywords", str(tmp_path / "k.jsonl"), "--where", "sentence", "--count", "2", "--control", "--seed", "7"]
    assert main(["perturb", str(hub), *words, "--to", str(tmp_path / "one")]) == 0
    (tmp_path / "k.jsonl").unlink()
    manifest = str(tmp_path / "one" / "manifest.json")
    assert main(["perturb", "--from", manifest, "--to", str(tmp_path / "two")]) == 0
    printed = capsys.readouterr().out
    assert "controls of gain of function had to be taken from these questions of 3 subjects" in printed
    assert "name another text, --control-from CORPUS" in printed
    assert "not every byte" not in printed
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert json.loads(one["manifest.json"])["keywords"] == rows
    assert one.pop("tasks/_location_yaml") != two.pop("tasks/_location_yaml")
    assert one == two

    hub.rename(tmp_path / "moved")
    assert main(["perturb", "--from", manifest, "--to", str(tmp_path / "three")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["perturb", str(tmp_path / "moved"), "--from", manifest, "--to", str(tmp_path / "three")]) == 0
    assert contents(tmp_path / "three")["manifest.json"] == one["manifest.json"]

    shard = tmp_path / "moved" / "anatomy" / "test-00000-of-00001.parquet"
    shard.write_bytes((tmp_path / "moved" / "us_foreign_policy" / shard.name).read_bytes())
    assert main(["perturb", str(tmp_path / "moved"), "--from", manifest, "--to", str(tmp_path / "four")]) == 2
    assert f"1 of 3 files differ, the first is 'anatomy/{shard.name}'" in capsys.readouterr().err
    assert not (tmp_path / "four").exists()


def test_a_manifest_that_was_changed_or_is_none_is_refused(hub: Path, tmp_path: Path) -> None:
    made = make_set(Source(path=str(hub)), read_keywords(["ricin"]), Perturbation(), tmp_path / "one")
    changed = json.loads((made.folder / "manifest.json").read_text("utf-8"))
    changed["settings"]["seed"] = 1
    files.write_json(tmp_path / "changed.json", changed)
    with pytest.raises(UserError, match="other rows than the manifest's set"):
        rebuild(tmp_path / "changed.json", tmp_path / "two")
    changed["settings"]["seed"] = 0
    changed["files"]["README.md"] = "0" * 64
    files.write_json(tmp_path / "changed.json", changed)
    assert (
        "every row is the same, but not every byte" in rebuild(tmp_path / "changed.json", tmp_path / "same rows").note
    )
    files.write_json(tmp_path / "none.json", {"world": {}})
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    for name, why in {"none.json": "name: required, and not given", "lines.jsonl": "Extra data"}.items():
        with pytest.raises(
            UserError, match=f"'.*{name}' is no manifest.json of unlearn perturb, or is damaged: .*{why}"
        ):
            rebuild(tmp_path / name, tmp_path / "two")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("layout", ["one config", "jsonl", "csv"])
def test_other_layouts_give_the_same_subjects(layout: str, tmp_path: Path) -> None:
    questions = some_questions(20)
    if layout == "one config":  # as the authors' mmlu-sars-cov-2: one split, subjects in a column
        source = write_hub(tmp_path / "mmlu-sars-cov-2", questions, one_config=True)
    elif layout == "jsonl":
        source = tmp_path / "q.jsonl"
        rows = [{"question": q.question, "subject": q.subject, "choices": q.choices} for q in questions]
        files.write_jsonl(source, [row | {"answer": q.answer} for row, q in zip(rows, questions, strict=True)])
    else:
        source = tmp_path / "q.csv"
        lines = [f'"{q.question}",{q.subject},{",".join(q.choices)},{"ABCD"[q.answer]}' for q in questions]
        source.write_text("\n".join(["question,subject,A,B,C,D,answer", *lines]), encoding="utf-8")
    made = make_set(Source(path=str(source)), read_keywords(["ricin"]), Perturbation(), tmp_path / "out")
    written = read_questions(made.folder)
    assert Counter(each.subject for each in written) == Counter(each.subject for each in questions)
    expected = {each.id: perturb(each, "ricin", "option", 0) for each in read_questions(source)}
    assert {each.id: each for each in written} == expected
    for subject in SUBJECTS:
        assert (made.folder / subject / "test-00000-of-00001.parquet").exists()


def test_subjects_of_any_name_have_configs(tmp_path: Path) -> None:
    subjects = ["", "all", "C++ / Java", "C Java", "解剖学"]
    base = some_questions(10)
    rows = [
        {"question": q.question, "subject": subjects[i % 5], "choices": q.choices, "answer": q.answer}
        for i, q in enumerate(base)
    ]
    files.write_jsonl(tmp_path / "q.jsonl", rows)
    made = make_set(
        Source(path=str(tmp_path / "q.jsonl")), read_keywords(["ricin"]), Perturbation(where="end"), tmp_path / "out"
    )
    configs = {path.name for path in made.folder.iterdir() if path.is_dir()}
    assert configs == {"questions", "all_2", "C_Java", "C_Java_2", "解剖学", "tasks"}
    assert len(read_questions(made.folder)) == 10


def test_tasks_do_not_take_the_name_of_their_source(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would be called as their source, 'quiz'"):
        make_set(Source(path=str(hub)), read_keywords(["ricin"]), Perturbation(), tmp_path / "other" / "Quiz")
