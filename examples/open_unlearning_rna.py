"""RNA in open-unlearning: a mixin for its trainers whose retain loss asks a reference model.

There `GradDiff` and what descends from it (NPO, DPO, RMU and others) keep a frozen `ref_model` and have a method
`compute_retain_loss(model, retain_inputs)` that asks it: with `retain_loss_type: KL`, and RMU with `EMBED_DIFF`.
The noise is put into the reference for the length of that call, so that forget losses, which ask the same reference,
see it clean (Algorithm 1 of the paper). In open-unlearning's `src/trainer/__init__.py`:

    from open_unlearning_rna import with_noise
    _register_trainer(with_noise(NPO))          # its name is NPO_RNA: `handler: NPO_RNA` in the trainer's YAML
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robust_unlearning import RandomNoiseAugmentation


class NoisyReference:
    """Mixin: noise on the reference while it reads retain text.

    Args (the trainer's `method_args` in its YAML):
        noise_layers: indices of decoder layers, from 0; for RMU none above the layer of its `module_regex`.
        noise_std: √ν, in units of the hidden state there.
        noise_seed: of the noise.
    """

    def __init__(
        self, *args: Any, noise_layers: Sequence[int], noise_std: float, noise_seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "ref_model", None) is None or self.retain_loss_type == "NLL":
            raise ValueError("RNA changes a retain loss that asks the reference: set retain_loss_type to KL (or RMU's)")
        self.rna = RandomNoiseAugmentation(noise_layers, noise_std, noise_seed)

    def compute_retain_loss(self, model: Any, retain_inputs: Any) -> Any:
        """The trainer's own retain loss, its reference noised: a fresh draw for every token and call."""
        with self.rna.attach(self.ref_model):
            return super().compute_retain_loss(model=model, retain_inputs=retain_inputs)


def with_noise(trainer: type) -> type:
    """The trainer's class with RNA, named as it is with `_RNA` at the end."""
    return type(f"{trainer.__name__}_RNA", (NoisyReference, trainer), {"__doc__": trainer.__doc__})
