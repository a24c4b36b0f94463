"""The whole command line on a small model: run, resume, eval, apply, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from robust_unlearning.cli.main import main


@pytest.fixture
def recipe_file(tiny_recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe), encoding="utf-8")
    return path


@pytest.fixture
def suite_file(tmp_path: Path) -> Path:
    rows = [
        {"question": f"what is number {index}?", "choices": ["one", "two", "three", "four"], "answer": index % 4}
        for index in range(6)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "t.jsonl").write_text('{"text": "a plain text of some words"}\n' * 3, encoding="utf-8")
    suite = {
        "questions": {
            "q": {
                "path": str(tmp_path / "q.jsonl"),
                "styles": ["cloze", "letters"],
                "perturb": ["parenthesis", "option"],
            }
        },
        "texts": {"t": {"path": str(tmp_path / "t.jsonl")}},
        "forget_tokens": ["nebula"],
        "control_tokens": ["carpet"],
    }
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(suite), encoding="utf-8")
    return path


def test_run_eval_apply(
    recipe_file: Path,
    suite_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    assert main(["run", str(recipe_file), "noise_std=0.1", "--out", str(out), "snapshots=[4]"]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["noise_std"] == 0.1
    assert record["noise_variance"] == pytest.approx(0.01)
    assert {"seeds", "environment", "model_fingerprint", "data_fingerprints", "tokens_per_second"} <= record.keys()
    for name in ("recipe.yaml", "metrics.jsonl", "delta.safetensors", "README.md"):
        assert (out / name).stat().st_size
    assert not (out / "checkpoint.safetensors").exists()

    assert main(["eval", str(out), "--tasks", str(suite_file)]) == 0
    printed = capsys.readouterr().out
    scores = json.loads((out / "scores.json").read_text())
    assert {"q/cloze/clean", "q/letters/option", "q/letters/option-control", "t/text"} <= scores.keys()
    assert scores["q/cloze/clean"].keys() >= {"acc", "stderr", "n"}
    assert scores["q/letters/option"]["excess_harm"].keys() >= {"value", "low", "high", "n"}
    assert "q/letters/option" in printed
    assert "q/cloze/clean" in (out / "README.md").read_text()
    first = (out / "evaluation.json").read_bytes()
    assert main(["eval", str(out), "--tasks", str(suite_file)]) == 0
    assert (out / "evaluation.json").read_bytes() == first
    monkeypatch.chdir(out.parent.parent)
    close = f"{out.parent.name}/{out.name}"
    for options in ([], ["--out", "x"]):
        assert main(["eval", f"{close}x", "--tasks", str(suite_file), *options]) == 2
        assert f"no such file or folder: '{close}x'" in (said := capsys.readouterr().err)
        assert f"Did you mean '{close}'?" in said
    assert main(["eval", str(out / "snapshots" / "step-4.safetensors"), "--tasks", str(suite_file)]) == 0
    assert "q/cloze/option" not in scores  # a cloze prompt shows no options
    assert (out / "snapshots" / "step-4" / "scores.json").exists()

    target = tmp_path / "model"
    assert main(["apply", str(out), "--to", str(target)]) == 0
    assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert "from_pretrained" in capsys.readouterr().out
    from transformers import AutoModelForCausalLM

    from robust_unlearning.models import checkpoint
    from robust_unlearning.run import delta

    ids = torch.tensor([[5, 6, 7, 8]])
    base = checkpoint.load_causal_lm(checkpoint.resolve(record["model"]), "auto", torch.device("cpu"))
    with delta.load_delta(out).applied(base), torch.no_grad():
        expected = base(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(target)(input_ids=ids).logits, expected)
    assert "unlearned by RMU" in (target / "README.md").read_text()

    several = ["eval", str(target), str(out), "--tasks", str(suite_file), "--out", str(tmp_path / "scored")]
    capsys.readouterr()
    assert main([*several, "--limit", "100"]) == 0
    assert f"\n{target}\n" in capsys.readouterr().out
    for each in (target, out):
        assert json.loads((tmp_path / "scored" / each.name / "scores.json").read_text()) == scores
    assert main(["eval", str(out), str(target), "--tasks", str(suite_file)]) == 2
    assert "is a folder without recipe.yaml, not a run folder" in capsys.readouterr().err
    assert main(["eval", str(out), str(out), "--tasks", str(suite_file)]) == 2
    assert "two targets would write to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "smollm2/rnu"], "did you mean 'smollm2/rmu'"),
        (["run", "smollm2/rmu", "noise_sdt=1", "steps=0"], "2 errors"),
        (["eval", "nowhere.gguf", "--tasks", "demo", "--out", "x"], "no such file"),
        (["eval", "smollm2-135m", "--tasks", "demo"], "--out"),
        (["eval", "org/name", "--tasks", "demo"], "'org/name' is no folder here, not a run folder"),
        (["eval", "a/b/name", "--tasks", "demo"], "no such file or folder: 'a/b/name'"),
        (["eval", "x", "--tasks", "dmo"], "dmo"),
        (["eval", "x", "--tasks", ""], "names no task"),
        (["apply", "nowhere", "--to", "x"], "no such file or folder"),
    ],
)
def test_mistakes_are_one_message_and_exit_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err.lower()
    assert says in error
    assert "traceback" not in error
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_asks_for_resume(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["run", str(recipe_file), "--out", str(out), "steering_scale=1e30", "learning_rate=1e30"]) == 2
    assert "not finite" in capsys.readouterr().err
    words = ["run", str(recipe_file), "--out", str(out), "steering_scale=1e30", "learning_rate=1e30"]
    assert main(words) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["run", str(recipe_file), "--out", str(out)]) == 2
    assert "another recipe: " in capsys.readouterr().err


def test_a_start_that_failed_does_not_claim_the_folder(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["run", str(recipe_file), "--out", str(out), "layer=40"]) == 2
    assert "layers 0 to 5" in capsys.readouterr().err
    assert main(["run", str(recipe_file), "--out", str(out)]) == 0


def test_a_damaged_checkpoint_and_a_file_in_the_way_are_messages(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["run", str(recipe_file), "--out", str(out)]
    assert main(words) == 0
    (out / "run.json").unlink()
    (out / "checkpoint.safetensors").write_bytes(b"cut off")
    assert main([*words, "--resume"]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert main(["apply", str(out), "--to", str(recipe_file / "model")]) == 2
    assert "traceback" not in capsys.readouterr().err.lower()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evla", "x"], "unknown verb 'evla': did you mean 'eval'?"),
        (["analyze", "theroy"], "unknown word 'theroy': did you mean 'theory'?"),
        (["eval", "tiny", "--taks", "planted"], "unknown option '--taks': did you mean '--tasks'?"),
        (["eval", "tiny", "--tasks", "demo", "--scorer", "hff"], "unknown --scorer 'hff': did you mean 'hf'?"),
        (["run", "smollm2/rmu", "--fast"], "unknown option '--fast'"),
        (["run", "smollm2/rmu", "--noise_std=1"], "Fields of a recipe have no dashes: noise_std=1"),
        (["apply", "x", "noise_std=1", "--to", "y"], "unlearn apply takes no 'noise_std=1'"),
        (["apply", "x"], "the following arguments are required: --to. Run `unlearn apply --help`."),
        (["plan"], "the following arguments are required: recipe. Run"),
        ([], "the following arguments are required: VERB. Run `unlearn --help`."),
        (["eval", "tiny", "--tasks", "planted"], "'tiny' is a bundled model, not a run folder"),
    ],
)
def test_misspelt_words_are_told_like_other_mistakes(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("unlearn: ")
    assert says in error
    assert "usage:" not in error


def test_abbreviated_options_and_loose_fields_are_still_taken(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["run", str(recipe_file), "steps=1", "--ou", str(out), "seed=3"]) == 0
    assert json.loads((out / "run.json").read_text())["seeds"]["seed"] == 3


def test_a_log_line_tells_of_every_topic(
    tiny_recipe: dict[str, Any], texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_recipe["topics"]["charms"] = {"forget": str(texts["second"])}
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe), encoding="utf-8")
    printed, rows = {}, {}
    for every in (1, 4):
        out = tmp_path / str(every)
        assert main(["run", str(path), f"log_every={every}", "--out", str(out)]) == 0
        printed[every] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
        rows[every] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {row["topic"] for row in rows[4]} == {"spells"}  # the topics take turns: of each fourth step it is one
    assert all("1 step)" in line and "last step" not in line for line in printed[1])
    for number, line in enumerate(printed[4]):
        for topic in ("spells", "charms"):
            steps = [row for row in rows[1][4 * number : 4 * number + 4] if row["topic"] == topic]
            mean = sum(row["forget_loss"] for row in steps) / len(steps)
            found = re.search(rf"{topic}: loss \S+ \(forget (\S+), retain \S+; mean of 2 steps\)", line)
            assert found
            assert float(found[1]) == pytest.approx(mean, rel=1e-3)
        assert "; last step, spells: forget cos" in line
    shared = ("forget_loss", "retain_loss", "forget_cosine")
    assert [[row[key] for key in shared] for row in rows[4]] == [
        [row[key] for key in shared] for row in rows[1] if row["step"] % 4 == 0
    ]


@pytest.mark.parametrize("verb", ["run", "sweep", "planted train", "planted study", "reproduce"])
@pytest.mark.parametrize(
    ("text", "said"),
    [("layer: 3\n\tsteps: 2\n", "is a YAML file, and this is none: line 2: "), ("- 1\n", "is a mapping")],
)
def test_a_file_that_is_none(
    verb: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    assert main([*verb.split(), str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert said in error
    assert not (tmp_path / "out").exists()
