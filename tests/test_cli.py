"""The whole command line on a small model: run, resume, eval, apply, and what it says when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from robust_unlearning.cli import main


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
    recipe_file: Path, suite_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    assert main(["eval", str(out / "snapshots" / "step-4.safetensors"), "--tasks", str(suite_file)]) == 0
    assert "q/cloze/option" not in scores  # a cloze prompt shows no options
    assert (out / "snapshots" / "step-4" / "scores.json").exists()

    target = tmp_path / "model"
    assert main(["apply", str(out), "--to", str(target)]) == 0
    assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert "from_pretrained" in capsys.readouterr().out
    from transformers import AutoModelForCausalLM

    from robust_unlearning import delta, models

    ids = torch.tensor([[5, 6, 7, 8]])
    base = models.load_causal_lm(models.resolve(record["model"]), "auto", torch.device("cpu"))
    with delta.load_delta(out).applied(base), torch.no_grad():
        expected = base(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(target)(input_ids=ids).logits, expected)
    assert "unlearned by RMU" in (target / "README.md").read_text()

    assert main(["eval", str(target), "--tasks", str(suite_file), "--out", str(tmp_path / "applied")]) == 0
    assert json.loads((tmp_path / "applied" / "scores.json").read_text()) == scores


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "smollm2/rnu"], "did you mean 'smollm2/rmu'"),
        (["run", "smollm2/rmu", "noise_sdt=1", "steps=0"], "2 errors"),
        (["eval", "nowhere.gguf", "--tasks", "demo", "--out", "x"], "no such file"),
        (["eval", "smollm2-135m", "--tasks", "demo"], "--out"),
        (["eval", "x", "--tasks", "dmo"], "dmo"),
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


def test_words_that_are_no_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["list", "noise_std=1"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit):
        main(["run", "smollm2/rmu", "--fast"])
