"""`unlearn perturb`: what it says, and that a mistake is one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quiz import contents, some_questions, write_hub

from robust_unlearning.cli.main import main
from robust_unlearning.data.questions import read_questions
from robust_unlearning.perturb.forms import (
    NO_SUCH_OPTION,
    RIGHT_OPTION,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return write_hub(tmp_path / "quiz", some_questions(40))


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
