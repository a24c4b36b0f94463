"""The tasks of a perturbed set: lm-eval asks it as it asks its own MMLU."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from quiz import KEYWORDS, SUBJECTS, some_questions, tokens_of, write_hub

from robust_unlearning import files
from robust_unlearning.analyze import harmfulness, ngram_answers
from robust_unlearning.cli.main import main
from robust_unlearning.data.questions import letters_prompt, read_questions
from robust_unlearning.errors import UserError
from robust_unlearning.perturb.dataset import Source, make_set
from robust_unlearning.perturb.forms import (
    Perturbation,
)
from robust_unlearning.perturb.keywords import read_keywords
from robust_unlearning.perturb.lm_eval_tasks import relocate
from robust_unlearning.perturb.places import (
    perturb,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return write_hub(tmp_path / "quiz", some_questions(40))


@pytest.fixture
def lm_eval_tasks() -> Iterator[Any]:
    """Loads the tasks of a perturbed set by name, as `lm_eval --include_path` does."""
    from lm_eval.tasks import TaskManager

    def load(folder: Path, *groups: str) -> dict[str, Any]:
        return TaskManager(include_path=str(folder / "tasks"), include_defaults=False).load(list(groups))

    return load


def test_lm_eval_asks_the_set_as_it_asks_mmlu(
    hub: Path, tmp_path: Path, lm_eval_tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same prompts, choices and targets as lm-eval's own `mmlu` and `mmlu_continuation` give for the same rows."""
    import lm_eval
    import yaml
    from lm_eval.utils import apply_template

    made = make_set(
        Source(path=str(hub)), read_keywords(KEYWORDS), Perturbation(control=True), tmp_path / "out" / "quiz-keywords"
    )
    assert made.manifest.groups == (
        "quiz_keywords",
        "quiz_keywords_control",
        "quiz_keywords_continuation",
        "quiz_keywords_control_continuation",
    )
    monkeypatch.chdir(tmp_path)
    own = Path(lm_eval.__file__).parent / "tasks" / "mmlu"
    expected_questions = {
        "": {each.id: each for each in read_questions(made.folder)},
        "_control": {each.id: each for each in read_questions(made.folder / "control")},
    }
    tasks = lm_eval_tasks(made.folder, *made.manifest.groups)["tasks"]
    assert len(tasks) == 12
    for style, folder in (("", "default"), ("_continuation", "continuation")):
        template = yaml.safe_load((own / folder / f"_{folder}_template_yaml").read_text())
        for subject in SUBJECTS:
            theirs = template | yaml.safe_load((own / folder / f"mmlu_{subject}.yaml").read_text())
            for form, questions in expected_questions.items():
                task = tasks[f"quiz_keywords_{subject}{form}{style}"]
                docs = list(task.test_docs())
                assert [questions[doc["id"]].question for doc in docs] == [doc["question"] for doc in docs]
                assert {doc["subject"] for doc in docs} == {subject}
                assert task.config.description == theirs["description"]
                assert task.config.task_alias.startswith(subject)
                assert ("control" in task.config.task_alias, "continuation" in task.config.task_alias) == (
                    bool(form),
                    bool(style),
                )
                for doc in docs:
                    assert task.doc_to_text(doc) == apply_template(theirs["doc_to_text"], doc)
                    choices = theirs["doc_to_choice"]
                    assert task.doc_to_choice(doc) == (choices if isinstance(choices, list) else doc["choices"])
                    assert task.doc_to_target(doc) == doc["answer"] == questions[doc["id"]].answer
                    if not style:
                        prompt = letters_prompt(questions[doc["id"]])[0]
                        assert task.config.description + task.doc_to_text(doc) == prompt
                assert task.config.output_type == theirs["output_type"] == "multiple_choice"


def test_tasks_with_other_numbers_of_options_and_a_moved_folder(tmp_path: Path, lm_eval_tasks: Any) -> None:
    questions = [replace(each, subject="") for each in some_questions(12, choices=(2, 6))]
    rows = [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in questions]
    files.write_jsonl(tmp_path / "q.jsonl", rows)
    settings = Perturbation(where="begin", styles=("letters",))
    make_set(Source(path=str(tmp_path / "q.jsonl")), read_keywords(["ricin"]), settings, tmp_path / "first")
    moved = (tmp_path / "first").rename(tmp_path / "second")
    relocate(moved)
    (task,) = lm_eval_tasks(moved, "first")["tasks"].values()
    for doc, question in zip(task.test_docs(), questions, strict=True):
        asked = letters_prompt(perturb(replace(question, id=doc["id"]), "ricin", "begin", 0))
        assert (task.config.description + task.doc_to_text(doc), tuple(task.doc_to_choice(doc))) == asked
    with pytest.raises(UserError, match="is no perturbed set"):
        relocate(tmp_path)


def test_lm_eval_scores_the_set(hub: Path, tmp_path: Path, tiny_model: Path) -> None:
    """The group's score is the mean over all questions, whatever the sizes of its subjects."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    made = make_set(
        Source(path=str(hub)), read_keywords(["ricin"]), Perturbation(styles=("letters",)), tmp_path / "quiz-ricin"
    )
    manager = TaskManager(include_path=str(made.folder / "tasks"), include_defaults=False)
    results = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(tiny_model), "dtype": "float32"},
        tasks=list(made.manifest.groups),
        task_manager=manager,
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
    )
    samples = [sample["acc"] for name in results["samples"] for sample in results["samples"][name]]
    assert len(samples) == 40
    assert results["results"]["quiz_ricin"]["acc,none"] == pytest.approx(sum(samples) / 40)


def test_ngrams_by_class_from_the_set_to_the_table(hub: Path, tmp_path: Path, tiny_model: Path) -> None:
    """lm-eval's records say their n-gram, and the set's subjects are taken together, beside the control form."""
    ngrams = [
        {"text": text, "n": 2, "class": name, "similarity": similarity}
        for text, name, similarity in (("viral load", "most_similar", 0.8), ("seen daily", "least_similar", 0.1))
    ]
    files.write_json(tmp_path / "ng.json", {"ngrams": ngrams})
    words = ["--keywords", str(tmp_path / "ng.json"), "--style", "letters", "--control"]
    assert main(["perturb", str(hub), *words, "--to", str(tmp_path / "ng")]) == 0
    options = ["--tasks", "ng,ng_control", "--include-path", str(tmp_path / "ng" / "tasks"), "--out", str(tmp_path)]
    assert main(["eval", str(tiny_model), *options]) == 0
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text("utf-8").splitlines()]
    assert {each["id"]: (each["forget_token"], each["control_token"]) for each in records} == tokens_of(tmp_path / "ng")
    classes = ngram_answers.read_classes(str(tmp_path / "ng.json"))
    groups = harmfulness.group(ngram_answers.asked_of(harmfulness.read_folder(str(tmp_path)), classes))
    used = Counter(each["forget_token"] for each in records if not each["task"].endswith("_control"))
    assert [(each.task, each.similarity_class, each.n) for each in groups] == [
        ("ng", "least_similar", used["seen daily"]),
        ("ng", "most_similar", used["viral load"]),
    ]
    assert used.total() == 40
    assert all(each.control and each.excess and each.control.n == each.excess.n == each.n for each in groups)
