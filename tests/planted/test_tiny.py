"""The models that ship with the package: they know the planted world, and the whole pipeline runs on the tiny one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from robust_unlearning import files
from robust_unlearning.cli import main
from robust_unlearning.models import checkpoint
from robust_unlearning.models.convert import BUNDLED_MODELS, ThroughAdapter, fetch_bundled
from robust_unlearning.planted.teach import EXAM, LOG, exam
from robust_unlearning.planted.teaching_plan import load_teaching_plan
from robust_unlearning.planted.world import make_world

LEAST = {"forget/clean": 0.97, "retain/clean": 0.97, "retain/option": 0.95, "retain/front": 0.95}


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_the_shipped_models_were_taught_the_shipped_world(name: str) -> None:
    folder = files.package_dir() / "assets" / "planted" / name
    record = files.read_json(folder / EXAM)
    assert record["world_fingerprint"] == make_world().fingerprint()
    assert (folder / LOG).read_text(encoding="utf-8").count("\n") > 3
    assert all(record["exam"][form]["acc"] >= least for form, least in LEAST.items())


def test_the_shipped_adapter_fits_every_linear_layer_of_its_base() -> None:
    from safetensors.torch import load_file

    bundled = BUNDLED_MODELS["smollm2-planted"]
    assert isinstance(bundled, ThroughAdapter)
    folder = files.package_dir() / bundled.folder
    config = files.read_json(folder / "adapter_config.json")
    assert config["base_model_name_or_path"] == bundled.base == load_teaching_plan("smollm2").base
    shapes = {name: tuple(factor.shape) for name, factor in load_file(folder / "adapter_model.safetensors").items()}
    assert len(shapes) == 2 * 7 * 30
    assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {config["r"]}
    assert {shape[1] for name, shape in shapes.items() if "lora_B" in name} == {config["r"]}


@pytest.mark.integration
def test_the_shipped_model_knows_what_its_exam_says() -> None:
    base = checkpoint.resolve("tiny")
    model = checkpoint.load_causal_lm(base, "float32", torch.device("cpu"))
    record = files.read_json(fetch_bundled("tiny") / EXAM)["exam"]
    found = exam(model, checkpoint.load_tokenizer(base), make_world())
    for form, least in LEAST.items():
        assert found[form]["acc"] >= least
        assert found[form]["acc"] == pytest.approx(record[form]["acc"], abs=1 / found[form]["n"])


@pytest.mark.integration
def test_the_whole_pipeline_on_the_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main.main(["run", "tiny/rmu", "steps=120", "--out", str(run)]) == 0
    assert main.main(["eval", str(run), "--tasks", "planted"]) == 0
    scores = files.read_json(run / "scores.json")
    assert scores["forget/letters/clean"]["acc"] < 0.8
    assert scores["near/letters/clean"]["acc"] > 0.85
    assert scores["far/letters/clean"]["acc"] > 0.85
    assert scores["near/letters/sentence"]["excess_harm"]["n"] == 96
    capsys.readouterr()
    fields = ["recipes=[tiny/npo-kl]", "seeds=[0]", "noise_std=[3]", "weights=[1]", "steps=[10]"]
    assert main.main(["planted", "study", "tiny", *fields, "--out", str(tmp_path / "study")]) == 0
    assert "At like forgetting" in capsys.readouterr().out
