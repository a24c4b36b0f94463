"""The examples of docs/in-other-trainers.md: in transformers' own Trainer, in TRL where it is, and in a stand-in."""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from robust_unlearning import RandomNoiseAugmentation
from robust_unlearning.methods.losses import logit_kl

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = [{"input_ids": [5, 9, 12, 7], "attention_mask": [1, 1, 1, 1], "labels": [5, 9, 12, 7]}] * 4
RETAIN = [
    {
        "input_ids": torch.tensor([[4, 8, 15, 16], [23, 42, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
    }
]


def example(name: str) -> ModuleType:
    """A file of `examples/`, imported."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def arguments(out: Path, **changes: Any) -> Any:
    from transformers import TrainingArguments

    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}
    return TrainingArguments(output_dir=str(out), use_cpu=True, save_strategy="no", **{**settings, **changes})


def kept_losses(model: Any, out: Path, std: float, **options: Any) -> list[float]:
    """The retain losses of two steps of transformers' Trainer with the example's mixin."""
    from transformers import Trainer

    class Keeping(example("trl_rna").NoisyRetain, Trainer):  # type: ignore[misc]
        def retain_loss(self, model: Any, batch: Any) -> torch.Tensor:
            loss = super().retain_loss(model, batch)
            seen.append(loss.item())
            return loss

    seen: list[float] = []
    rna = RandomNoiseAugmentation(layers=[2], std=std, seed=0)
    trainer = Keeping(
        model=model,
        args=arguments(out),
        train_dataset=ROWS,
        retain=RETAIN,
        rna=rna,
        retain_weight=10.0,
        **options,
    )
    trainer.train()
    return seen


def test_transformers_own_trainer_keeps_by_a_noised_reference(tiny_model: Path, tmp_path: Path) -> None:
    reference = load(tiny_model).eval()
    clean = kept_losses(load(tiny_model), tmp_path, 0.0, reference=reference)
    noised = kept_losses(load(tiny_model), tmp_path, 0.5, reference=reference)
    assert clean[0] == pytest.approx(0.0, abs=1e-6)  # before the first update the model is its reference
    assert noised == kept_losses(load(tiny_model), tmp_path, 0.5, reference=reference)
    assert clean[1] > 0

    model, batch = load(tiny_model).eval(), RETAIN[0]
    with torch.no_grad():
        with RandomNoiseAugmentation(layers=[2], std=0.5, seed=0).attach(reference):
            target = reference(**batch).logits
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        predicting = [(row, position) for row, length in enumerate(lengths) for position in range(length - 1)]
        rows, positions = map(list, zip(*predicting, strict=True))
        log_p, log_q = (each[rows, positions].log_softmax(-1) for each in (target, model(**batch).logits))
        expected = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
        assert torch.equal(reference(**batch).logits, model(**batch).logits)  # no hook has stayed
    assert noised[0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_peft_model_is_its_own_reference(tiny_model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load(tiny_model), peft.LoraConfig(target_modules=["down_proj"], r=2))
    other = kept_losses(load(tiny_model), tmp_path, 0.5, reference=load(tiny_model).eval())
    assert kept_losses(adapted, tmp_path, 0.5)[0] == pytest.approx(other[0], rel=1e-5)
    with pytest.raises(ValueError, match="reference"):
        kept_losses(load(tiny_model), tmp_path, 0.5)


def test_trl_takes_the_mixin(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from robust_unlearning.models.convert import fetch_bundled

    rows = [{"prompt": "Where does Nilmor live?", "chosen": " I do not know.", "rejected": " In the marshes."}] * 4
    retain = ["The clock stands in the hall.", "The island lies in the north."]
    out = tmp_path / "model"
    trainer = example("trl_rna").forget_by_dpo(
        str(fetch_bundled("tiny")), rows, retain, str(out), max_steps=2, use_cpu=True
    )
    assert trainer.state.global_step == 2
    assert (out / "model.safetensors").exists()


def stand_in() -> tuple[type, type]:
    """Trainers with the parts of open-unlearning's GradDiff and NPO that the mixin leans on, written for this test."""
    from transformers import Trainer

    class GradDiff(Trainer):
        def __init__(
            self, *args: Any, gamma: float = 1.0, alpha: float = 1.0, retain_loss_type: str = "NLL", **kwargs: Any
        ) -> None:
            super().__init__(*args, **kwargs)
            self.gamma, self.alpha, self.retain_loss_type = gamma, alpha, retain_loss_type
            self.ref_model = deepcopy(self.model).eval() if retain_loss_type == "KL" else None
            self.seen: list[tuple[float, float]] = []

        def compute_retain_loss(self, model: Any, retain_inputs: Any) -> Any:
            if self.retain_loss_type == "NLL":
                return model(**retain_inputs).loss
            with torch.no_grad():
                target = self.ref_model(**retain_inputs).logits
            return logit_kl(model(**retain_inputs).logits, target, retain_inputs["attention_mask"])

        def forget_loss(self, model: Any, inputs: Any) -> Any:
            return -model(**inputs).loss

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            forget = self.forget_loss(model, inputs["forget"])
            retain = self.compute_retain_loss(model=model, retain_inputs=inputs["retain"])
            self.seen.append((forget.item(), retain.item()))
            return self.gamma * forget + self.alpha * retain

    class NPO(GradDiff):
        def forget_loss(self, model: Any, inputs: Any) -> Any:
            with torch.no_grad():
                reference = self.ref_model(**inputs).loss
            return -2 / 0.1 * torch.nn.functional.logsigmoid(0.1 * (model(**inputs).loss - reference))

    return GradDiff, NPO


@pytest.mark.parametrize("kind", [0, 1], ids=["GradDiff", "NPO"])
def test_open_unlearnings_pattern(kind: int, tiny_model: Path, tmp_path: Path) -> None:
    plain = stand_in()[kind]
    noisy = example("open_unlearning_rna").with_noise(plain)
    assert noisy.__name__ == f"{plain.__name__}_RNA"
    row = {key: torch.tensor(value) for key, value in ROWS[0].items()}
    data = [{"forget": row, "retain": {key: value.flip(0) for key, value in row.items()}}] * 4

    def losses(trainer: type, **options: Any) -> list[tuple[float, float]]:
        made = trainer(
            model=load(tiny_model),
            args=arguments(tmp_path, remove_unused_columns=False),
            train_dataset=data,
            data_collator=default_collate,
            retain_loss_type="KL",
            **options,
        )
        made.train()
        assert not any(layer._forward_hooks for layer in made.ref_model.model.layers)
        return made.seen

    clean, same = losses(plain), losses(noisy, noise_layers=[2], noise_std=0.0)
    noised = losses(noisy, noise_layers=[2], noise_std=0.5)
    assert clean == same
    assert noised[0][0] == clean[0][0]  # the forget loss asks the reference without noise
    assert clean[0][1] == pytest.approx(0.0, abs=1e-6)
    assert noised[0][1] > 0.001
    with pytest.raises(ValueError, match="retain_loss_type"):
        noisy(model=load(tiny_model), args=arguments(tmp_path), noise_layers=[2], noise_std=0.5)


def test_retain_text_goes_round(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    module = example("trl_rna")
    made = module.batches(AutoTokenizer.from_pretrained(tiny_model), ["baba du", "feba", "kaba mo or"], size=2)
    assert [len(each["input_ids"]) for each in made] == [2, 1]
    assert all(each["input_ids"].shape == each["attention_mask"].shape for each in made)
