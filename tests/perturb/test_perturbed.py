"""`unlearn perturb`: what it draws, what it writes, that its manifest rebuilds it, and that lm-eval can ask it."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest

from robust_unlearning import files
from robust_unlearning.analyze import harmfulness
from robust_unlearning.cli.main import main
from robust_unlearning.data.questions import Question, letters_prompt, read_questions
from robust_unlearning.errors import UserError
from robust_unlearning.perturb.controls import CONTROLS, HARMLESS, match_harmless
from robust_unlearning.perturb.dataset import Source, make_set, rebuild
from robust_unlearning.perturb.forms import (
    KEYWORD_IS_A_CHOICE,
    NO_CONTROL,
    NO_SUCH_OPTION,
    RIGHT_OPTION,
    TOO_FEW_OPTIONS,
    Perturbation,
    perturbation,
    perturbed_forms,
)
from robust_unlearning.perturb.keywords import Keyword, read_keywords
from robust_unlearning.perturb.lm_eval_tasks import relocate
from robust_unlearning.perturb.places import options_to_replace, perturb, perturb_with, replace_options

NOUNS = ["apple", "river", "stone", "ladder", "cloud", "button", "candle", "meadow", "pencil", "bridge"]
SUBJECTS = ["anatomy", "high_school_biology", "us_foreign_policy"]
KEYWORDS = ["SARS-CoV-2", "ricin", "keylogger", "gain of function", "anthrax"]


def some_questions(count: int, seed: int = 0, choices: tuple[int, int] = (4, 4)) -> list[Question]:
    rng = random.Random(seed)
    made = []
    for index in range(count):
        options = tuple(rng.sample(NOUNS, rng.randint(*choices)))
        text = f" Which of these did {rng.choice(NOUNS)} number {index} see,\nif any? "
        made.append(Question(f"q{index}", text, options, rng.randrange(len(options)), rng.choice(SUBJECTS)))
    return made


def write_hub(folder: Path, questions: list[Question], split: str = "test", one_config: bool = False) -> Path:
    """A data set as the hub lays it out: a config for each subject, or a single one with a column of subjects."""
    import pyarrow
    import pyarrow.parquet

    configs: dict[str, list[dict[str, Any]]] = {}
    for each in questions:
        row = {"question": each.question, "subject": each.subject, "choices": list(each.choices), "answer": each.answer}
        configs.setdefault("data" if one_config else each.subject, []).append(row)
    for config, rows in configs.items():
        (folder / config).mkdir(parents=True)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / config / f"{split}-00000-of-00001.parquet"
        )
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return write_hub(tmp_path / "quiz", some_questions(40))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tokens_of(folder: Path) -> dict[str, tuple[str, str | None]]:
    """Id -> forget_token and control_token, as the data set's rows have them."""
    import pyarrow.parquet

    rows = [row for path in folder.glob("*/*.parquet") for row in pyarrow.parquet.read_table(path).to_pylist()]
    return {row["id"]: (row["forget_token"], row["control_token"]) for row in rows}


def controls_for(keywords: list[str]) -> dict[str, list[str]]:
    return {keyword: ["waterwheel", "trombone", "lasagne"] for keyword in keywords}


@pytest.mark.parametrize("where", ["option", "begin", "end", "parenthesis", "sentence"])
def test_only_what_was_asked_for_changes(where: str) -> None:
    for seed in range(25):
        questions = some_questions(20, seed, choices=(4, 6))
        count = 1 + seed % 3
        settings = Perturbation(where=where, count=count, seed=seed, control=True)
        forms, left_out = perturbed_forms(questions, KEYWORDS, controls_for(KEYWORDS), settings)
        assert not left_out
        for form, question in zip(forms, questions, strict=True):
            assert form.clean == question
            assert len(set(form.keywords)) == len(set(form.controls)) == count
            assert form.control is not None
            for changed, words in ((form.perturbed, form.keywords), (form.control, form.controls)):
                assert (changed.id, changed.answer, changed.subject) == (question.id, question.answer, question.subject)
                assert changed.choices[question.answer] == question.choices[question.answer]
                assert len({choice.casefold() for choice in changed.choices}) == len(question.choices)
                differ = [i for i, (a, b) in enumerate(zip(changed.choices, question.choices, strict=True)) if a != b]
                if where == "option":
                    assert changed.question == question.question
                    assert sorted(form.options) == differ
                    assert len(differ) == count
                    assert [changed.choices[index] for index in form.options] == list(words)
                else:
                    assert not differ
                    assert question.question in changed.question
                    assert all(changed.question.count(word) == 1 for word in words)
                    assert form.options == ()


def test_one_keyword_is_what_perturb_does() -> None:
    for question in some_questions(30, choices=(2, 6)):
        for where in ("option", "begin", "end", "parenthesis", "sentence"):
            assert perturb_with(question, ["ricin"], where, 4) == perturb(question, "ricin", where, 4)


def test_forms_of_several_keywords() -> None:
    question = Question("q", "Why?", ("so", "not so", "never"), 0)
    assert perturb_with(question, ["a1", "b2"], "parenthesis", 0).question == "(a1, b2) Why?"
    assert perturb_with(question, ["a1", "b2"], "end", 0).question == "Why? a1, b2"
    assert "a1, b2 and c3" in perturb_with(question, ["a1", "b2", "c3"], "sentence", 0).question
    assert set(perturb_with(question, ["a1", "b2"], "option", 0).choices[1:]) == {"a1", "b2"}
    assert perturb_with(question, ["a1"], "option", 0, [2]).choices == ("so", "not so", "a1")


def test_draws_do_not_depend_on_the_order_of_questions_or_keywords() -> None:
    questions = some_questions(60)
    settings = Perturbation(count=2, seed=5, control=True)
    whole, _ = perturbed_forms(questions, KEYWORDS, controls_for(KEYWORDS), settings)
    part, _ = perturbed_forms(questions[::-3], KEYWORDS[::-1], controls_for(KEYWORDS), settings)
    by_id = {form.clean.id: form for form in whole}
    assert all(by_id[form.clean.id] == form for form in part)
    other, _ = perturbed_forms(questions, KEYWORDS, controls_for(KEYWORDS), settings.model_copy(update={"seed": 6}))
    assert other != whole
    assert {index for form in whole for index in form.options} == {0, 1, 2, 3}
    assert {word for form in whole for word in form.keywords} == set(KEYWORDS)


def test_options_drawn_are_wrong_ones_and_all_different() -> None:
    for question in some_questions(30, choices=(2, 6)):
        for count in range(1, len(question.choices)):
            drawn = options_to_replace(question, count, 1)
            assert len(set(drawn)) == count
            assert question.answer not in drawn
        with pytest.raises(UserError, match=f"it has {len(question.choices) - 1} wrong ones"):
            options_to_replace(question, len(question.choices), 1)


def test_replace_options_errors() -> None:
    question = Question("q", "Why?", ("so", "not so", "never"), 0)
    for tokens, options in ((["x"], [0]), (["x"], [3]), (["x", "y"], [1, 1]), (["x"], [1, 2])):
        with pytest.raises(UserError, match=r"give each token one of the wrong options \[1, 2\]"):
            replace_options(question, tokens, options)
    for tokens in (["x", "X "], ["so", "y"], ["never", "y"]):
        with pytest.raises(UserError, match="already"):
            replace_options(question, tokens, [1, 2])


def test_questions_that_cannot_be_perturbed_are_left_out_and_counted() -> None:
    two = Question("two", "Which?", ("apple", "river"), 0)
    four = Question("four", "Which?", ("apple", "Ricin", "stone", "cloud"), 2)
    right = Question("right", "Which?", ("river", "apple", "stone", "ladder"), 3)

    def reasons(settings: Perturbation, *keywords: str, controls: tuple[str, ...] = ("trombone",)) -> dict[str, int]:
        given = dict.fromkeys(keywords, controls)
        forms, left_out = perturbed_forms([two, four, right], keywords, given, settings)
        assert len(forms) + left_out.total() == 3
        return dict(left_out)

    assert reasons(Perturbation(), "ricin") == {KEYWORD_IS_A_CHOICE: 1}
    assert reasons(Perturbation(), "ricin", "anthrax") == {}
    assert reasons(Perturbation(count=2), "anthrax", "botulin") == {TOO_FEW_OPTIONS: 1}
    assert reasons(Perturbation(options=(3,)), "anthrax") == {NO_SUCH_OPTION: 1, RIGHT_OPTION: 1}
    assert reasons(Perturbation(control=True), "anthrax", controls=("cloud", "ladder")) == {}
    assert reasons(Perturbation(control=True), "anthrax", controls=("ladder",)) == {NO_CONTROL: 1}
    with pytest.raises(UserError, match="none of the 1 questions can be perturbed"):
        perturbed_forms([two], ["ricin"], {}, Perturbation(count=1, options=(0,)))


@pytest.mark.parametrize(
    ("typed", "indices"), [("C", (2,)), ("c", (2,)), ("2", (2,)), ("B,C", (1, 2)), ("0, 3", (0, 3))]
)
def test_options_as_letters_or_indices(typed: str, indices: tuple[int, ...]) -> None:
    settings = perturbation("option", None, typed)
    assert (settings.options, settings.count) == (indices, len(indices))


def test_keywords_from_words_and_files(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("ricin\n\n gain of function \nRICIN\n", encoding="utf-8")
    assert [each.text for each in read_keywords(["SARS-CoV-2"], str(tmp_path / "w.txt"))] == [
        "SARS-CoV-2",
        "ricin",
        "gain of function",
    ]
    ngrams = [{"text": "viral load of the", "class": "similar", "n": 4}, "ricin"]
    expected = [Keyword("viral load of the", {"class": "similar", "n": 4}), Keyword("ricin")]
    files.write_jsonl(tmp_path / "n.jsonl", ngrams)
    files.write_json(tmp_path / "n.json", ngrams)
    files.write_json(tmp_path / "o.json", {"model": "m", "ngrams": ngrams})
    for name in ("n.jsonl", "n.json", "o.json"):
        assert read_keywords(file=str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"txt": "ricin"}', "line 1: no 'text'; the keyword has txt. Rename 'txt'"),
        ("a.jsonl", "ricin", "line 1: not JSON"),
        ("a.json", '{"words": []}', "give an array of keywords"),
        ("a.json", '[" "]', "item 1: ' ' is no keyword"),
        ("a.txt", "\n", "holds no keywords"),
    ],
)
def test_keyword_file_errors(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_keywords(file=str(tmp_path / name))
    assert says in str(caught.value)


class SyllableTokenizer:
    """A token for every three characters."""

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[0] * -(-len(text) // 3) for text in texts]}


@pytest.mark.parametrize("tokenizer", [None, SyllableTokenizer()])
def test_controls_are_the_nearest_by_length_and_frequency(tokenizer: Any) -> None:
    rng = random.Random(1)
    words = ["".join(rng.choices("bdfgklmnprst", k=rng.randint(3, 14))) for _ in range(300)]
    text = " ".join(rng.choices(words, k=6000) + ["Ricin"] * 9)
    counts = Counter(text.split())
    (seen, unseen), total = match_harmless(["ricin", "SARS-CoV-2"], [text], subjects=None, tokenizer=tokenizer)
    assert total == 6009
    assert (seen.keyword.count, unseen.keyword.count) == (9, 0)
    for matched in (seen, unseen):
        wanted = matched.keyword
        distances = {}
        for word in set(words) & set(counts):
            distances[word] = abs(log(len(word) / wanted.characters)) + abs(
                log((1 + counts[word]) / (1 + wanted.count))
            )
            if tokenizer:
                size, size_wanted = (-(-(1 + each) // 3) for each in (len(word), wanted.characters))
                distances[word] += abs(log(size / size_wanted))
        best = sorted(distances.values())[:CONTROLS]
        assert matched.distances == pytest.approx(best)
        assert [distances[each.text] for each in matched.controls] == pytest.approx(best)
        assert all(each.count == counts[each.text] for each in matched.controls)


def test_controls_are_spelled_as_most_often_and_count_every_spelling() -> None:
    (matched,), _ = match_harmless(["ricin"], ["Paris paris. Paris is wet", "PARIS"], subjects=None)
    found = {each.text: each.count for each in matched.controls}
    assert found == {"Paris": 4, "wet": 1}


def test_controls_keep_away_from_the_keywords() -> None:
    text = "viruses virology vire toxic toxins viral-load cloud stone river apple candle " + "virus " * 3
    matched, _ = match_harmless(["virus", "toxin", "viral load"], [text], subjects=[""])
    by_keyword = {each.keyword.text: {control.text for control in each.controls} for each in matched}
    bundled = set(files.locate(HARMLESS).read_text(encoding="utf-8").split())
    allowed = bundled | {"virology", "vire", "toxic", "viral-load", "cloud", "stone", "river", "apple", "candle"}
    assert by_keyword["virus"] <= allowed
    assert by_keyword["toxin"] <= allowed
    assert not any("viral" in text or "load" in text for text in by_keyword["viral load"])
    assert all(each.words == 2 for each in matched[2].controls)
    with pytest.raises(UserError, match="no control of 4 words for keyword 'a b c d'"):
        match_harmless(["a b c d"], ["one two. three four, five"], subjects=[""])


def test_controls_are_whole_phrases() -> None:
    """None begins or ends in a function word, a letter or a number, and none crosses punctuation or a blank."""
    text = (
        "The old lamp of her aunt shone - bright as day. Nobody's lamp 12 burns; lamp x burns, the aunt's ___ cat"
        " 'grey owl' sleeps"
    )
    one, two, three = match_harmless(["ricin", "ricin cloud", "ricin in bottles"], [text])[0]
    words = {
        "old",
        "lamp",
        "aunt",
        "shone",
        "bright",
        "day",
        "Nobody's",
        "burns",
        "aunt's",
        "cat",
        "grey",
        "owl",
        "sleeps",
    }
    assert {each.text for each in one.controls} <= words
    assert {each.text for each in two.controls} == {"old lamp", "aunt shone", "Nobody's lamp", "grey owl"}
    assert {each.text for each in three.controls} == {"bright as day", "lamp 12 burns", "lamp x burns"}


def test_controls_from_questions_are_of_no_subject() -> None:
    """Words of one subject's topic are left alone; a set of one subject takes the bundled words, and says otherwise."""
    keywords = ["influenza", "swine influenza", "swine influenza strain"]
    subjects = ["virology", "history", "law", "physics", "art"]
    texts = [
        "hepatitis infection. " * 6 + "swine influenza. " * 6 + "Take steady pressure",
        *["steady pressure rises"] * 4,
    ]
    bundled = {word.casefold() for word in files.locate(HARMLESS).read_text("utf-8").split()}
    one, two, three = match_harmless(keywords, texts, subjects=subjects)[0]
    assert {each.text.casefold() for each in one.controls} <= {*bundled, "steady", "pressure", "rises"}
    assert "steady pressure" in {each.text for each in two.controls}
    assert not one.own_words
    assert not two.own_words
    assert [each.text for each in three.controls] == ["Take steady pressure", "steady pressure rises"]
    assert three.own_words  # "take" stands in one subject only
    own, pair, long = match_harmless(keywords, [*texts, "polio spreads far"], subjects=["virology"] * 6)[0]
    assert {each.text.casefold() for each in own.controls} <= bundled
    assert {word for each in pair.controls for word in each.text.split()} <= bundled
    assert not own.own_words
    assert not pair.own_words
    assert (long.own_words, long.as_dict()["own_words"]) == (True, True)


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
    assert made.groups == (
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
    tasks = lm_eval_tasks(made.folder, *made.groups)["tasks"]
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
        tasks=list(made.groups),
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
    groups = harmfulness.group(
        harmfulness.read_folder(str(tmp_path)), harmfulness.read_classes(str(tmp_path / "ng.json"))
    )
    used = Counter(each["forget_token"] for each in records if not each["task"].endswith("_control"))
    assert [(each.task, each.similarity_class, each.n) for each in groups] == [
        ("ng", "least_similar", used["seen daily"]),
        ("ng", "most_similar", used["viral load"]),
    ]
    assert used.total() == 40
    assert all(each.control and each.excess and each.control.n == each.excess.n == each.n for each in groups)


def test_the_command_says_what_it_did(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quiz-c"
    words = ["perturb", str(hub), "--keyword", "ricin", "--option", "C", "--style", "letters", "--to", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    right = sum(each.answer == 2 for each in read_questions(hub))
    assert f"{40 - right} of 40 questions perturbed in 3 subjects; option, 1 a question, 1 of 1 keywords" in printed
    assert f"left out: {right} ({RIGHT_OPTION})" in printed
    assert printed.rstrip().endswith("--tasks quiz_c")
    assert all(each.choices[2] == "ricin" for each in read_questions(out))
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_command_takes_a_corpus_and_a_tokenizer(
    hub: Path, tmp_path: Path, tiny_model: Path, texts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--keyword", "ricin", "--where", "begin", "--config", "anatomy", "--control"]
    sources = ["--control-from", str(texts["retain"]), "--tokenizer", str(tiny_model)]
    assert main(["perturb", str(hub), *words, *sources, "--to", str(tmp_path / "out")]) == 0
    corpus = " ".join(json.loads(line)["text"] for line in texts["retain"].read_text("utf-8").splitlines())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))
    assert manifest["controls"]["words_counted"] == len(corpus.split())
    (matched,) = manifest["controls"]["keywords"]
    assert matched["tokens"] == 1
    assert all(each["count"] == corpus.split().count(each["text"]) > 0 for each in matched["controls"])
    assert "8 controls of ricin (5 characters, 1 tokens, 0×)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["SOURCE"], "no keywords given. Give --keyword"),
        (["--keyword", "ricin"], "no questions given"),
        (["SOURCE", "--keyword", "ricin", "--where", "sentense"], "did you mean 'sentence'"),
        (["SOURCE", "--keyword", "ricin", "--style", "letter"], "did you mean 'letters'"),
        (["SOURCE", "--keyword", "ricin", "--count", "0"], "give a count of 1 or more"),
        (["SOURCE", "--keyword", "ricin", "--count", "2"], "2 keywords a question need 2 different ones, but 1 given"),
        (["SOURCE", *[f"--keyword=k{i}" for i in range(4)], "--count", "4"], "They have up to 3 wrong options"),
        (["SOURCE", "--keyword", "ricin", "--option", "E"], f"{NO_SUCH_OPTION}: 40"),
        (["SOURCE", "--keyword", "ricin", "--option", "right"], "--option 'right' is no option"),
        (["SOURCE", "--keyword", "ricin", "--option", "B,1"], "names one option twice"),
        (["SOURCE", "--keyword", "ricin", "--option", "B", "--count", "2"], "leave the count out"),
        (["SOURCE", "--keyword", "ricin", "--option", "B", "--where", "end"], "leave one of them out"),
        (["SOURCE", "--keyword", "ricin", "--tokenizer", "tiny"], "add --control"),
        (["SOURCE", "--keyword", "ricin", "--config", "anatomi"], "did you mean 'anatomy'"),
        (["SOURCE", "--keyword", "ricin", "--split", "tset"], "did you mean 'test'"),
        (["SOURCE", "--keywords", "no.txt"], "no such file"),
        (["SOURCEx", "--keyword", "ricin"], "Did you mean"),
        (["--from", "no.json", "--keyword", "ricin"], "leave --keyword out"),
        (["--from", "no.json"], "no such file"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(
    words: list[str], says: str, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path)
    given = [word.replace("SOURCE", str(hub)) for word in words]
    assert main(["perturb", *given, "--to", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_tasks_do_not_take_the_name_of_their_source(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would be called as their source, 'quiz'"):
        make_set(Source(path=str(hub)), read_keywords(["ricin"]), Perturbation(), tmp_path / "other" / "Quiz")
