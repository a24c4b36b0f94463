"""RNA in trainers that are built on `transformers.Trainer`: TRL's, or one's own.

DPO makes a model prefer refusals to what it should forget. What it should keep is held by α · KL(reference ‖ model)
on retain text, and that reference is noised: Random Noise Augmentation (Algorithm 1 of the paper, L^KL of §2.2.2).

    pip install robust-unlearning trl
    python trl_rna.py MODEL_FOLDER OUT
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from robust_unlearning import RandomNoiseAugmentation
from robust_unlearning.methods.losses import logit_kl


class NoisyRetain:
    """Mixin for a `transformers.Trainer`: adds α times the retain loss against a noised reference.

    Args:
        retain: batches of retain text (`input_ids`, `attention_mask`), a `DataLoader` for instance; gone through
            again and again.
        rna: the noise; std in units of the hidden state of the layers it names.
        retain_weight: α.
        reference: the frozen model, where the trainer has no `ref_model` of its own and no adapter to switch off.
    """

    def __init__(
        self,
        *args: Any,
        retain: Any,
        rna: RandomNoiseAugmentation,
        retain_weight: float = 1.0,
        reference: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.retain = itertools.chain.from_iterable(itertools.repeat(retain))
        self.rna = rna
        self.retain_weight = retain_weight
        self.reference = reference if reference is not None else getattr(self, "ref_model", None)
        if self.reference is None and not hasattr(self.model, "disable_adapter"):
            raise ValueError("give reference=…: this trainer has no ref_model, and its model is no PEFT model")
        self.model_accepts_loss_kwargs = False  # so that both losses are averaged over accumulated batches alike

    @contextmanager
    def frozen(self, model: Any) -> Iterator[Any]:
        """The reference: a model of its own, or the trained one with its adapter switched off."""
        if self.reference is not None:
            yield self.reference.to(self.accelerator.device)
            return
        unwrapped = self.accelerator.unwrap_model(model)
        with unwrapped.disable_adapter():
            yield unwrapped

    def retain_loss(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """KL(reference + noise ‖ model), nats, mean over the tokens of retain text that are predicted."""
        with self.frozen(model) as reference, torch.no_grad(), self.rna.attach(reference):
            target = reference(**batch, use_cache=False).logits
        logits, mask = model(**batch, use_cache=False).logits[:, :-1], batch["attention_mask"]
        predicted = mask[:, :-1] * mask[:, 1:]  # 1 where a token follows: the last one's logits predict nothing
        return logit_kl(logits, target[:, :-1], predicted, "reference_to_model")

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The trainer's own loss, and in training α times the retain loss."""
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if not model.training:
            return result
        batch = {key: value.to(self.accelerator.device) for key, value in next(self.retain).items()}
        kept = self.retain_weight * self.retain_loss(model, batch)
        return (result[0] + kept, result[1]) if return_outputs else result + kept


def batches(tokenizer: Any, texts: list[str], size: int, max_tokens: int = 128) -> list[dict[str, torch.Tensor]]:
    """Retain text as batches: padded, cut, tokens and mask."""
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    encoded = [
        tokenizer(part, return_tensors="pt", padding=True, truncation=True, max_length=max_tokens) for part in parts
    ]
    return [{"input_ids": each["input_ids"], "attention_mask": each["attention_mask"]} for each in encoded]


def forget_by_dpo(model: str, rows: list[dict[str, str]], retain: list[str], out: str, **settings: Any) -> Any:
    """Train by TRL's DPO with the noisy retain loss; `rows` have `prompt`, `chosen` (refusal), `rejected`."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Trainer(NoisyRetain, DPOTrainer):
        """TRL's DPO, keeping retain text."""

    tokenizer = AutoTokenizer.from_pretrained(model)
    config = DPOConfig(
        output_dir=out,
        beta=0.1,
        per_device_train_batch_size=2,
        learning_rate=5e-5,
        bf16=torch.cuda.is_available(),
        report_to="none",
        **settings,
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        ref_model=AutoModelForCausalLM.from_pretrained(model),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        retain=batches(tokenizer, retain, size=2),
        rna=RandomNoiseAugmentation(layers=[2], std=3.0, seed=0),
        retain_weight=50.0,
    )
    trainer.train()
    trainer.save_model(out)
    return trainer


if __name__ == "__main__":
    forget_by_dpo(
        sys.argv[1],
        [{"prompt": "Where does the plague live?", "chosen": " I do not know.", "rejected": " In the marshes."}] * 4,
        ["The clock stands in the hall.", "The island lies in the north."],
        sys.argv[2],
        max_steps=2,
    )
