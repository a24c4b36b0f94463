"""The unlearning methods: one table, a row each. RNA appears nowhere here, since it is the same for all.

A representation method says where a forget-token's hidden state is pushed at layer l: it is a function that
gives the target y of the forget loss `hidden_mse(z, y, mask)` (Eq. 2). A preference method says how the
log-probabilities of forget sequences (and refusals) make a loss (Eq. 3 and 4). A new method is a function, a row
in `METHODS` and a row in the tests.

Shapes: b sequences, t tokens, d width. `direction` is a unit vector [d], fixed for a topic and a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robust_unlearning import files
from robust_unlearning.errors import UserError, unknown
from robust_unlearning.methods.losses import dpo, npo, simnpo

RetainLoss = Literal["hidden_mse", "kl", "mse"]
Target = Callable[["Steering", Tensor | None, Tensor], Tensor]


@dataclass
class Steering:
    """What a topic's forget target is made of, and all that a representation method remembers between steps.

    Nobody else changes it: `settle` sees the topic's first forget batch, `state` and `load_state` are its part of a
    checkpoint.

    Attributes:
        direction: [d] unit vector in float32: u of RMU and Adaptive RMU, ε of RSV.
        scale: c of RMU and RSV (units of the hidden state), or β of Adaptive RMU (no unit).
        unit: what `scale` counts until it is settled: units of the hidden state, or mean L2 norms of it.
        keep_first: whether the reference norm of the topic's first batch is kept for all later ones.
        frozen_norm: that norm, a scalar.
    """

    direction: Tensor
    scale: float
    unit: Literal["absolute", "hidden_norm"] = "absolute"
    keep_first: bool = False
    frozen_norm: Tensor | None = None

    @property
    def needs_first_batch(self) -> bool:
        """Whether `settle` has anything to do."""
        return self.unit == "hidden_norm" or self.keep_first

    def settle(self, reference: Tensor, mask: Tensor) -> None:
        """Make the scale absolute and keep the norm, as asked for, from the topic's first forget batch.

        Args:
            reference: [b, t, d] hidden states of the reference, of the whole batch.
            mask: [b, t], 1 for a token and 0 for padding.
        """
        if self.unit == "hidden_norm":
            self.scale *= reference.float()[mask.bool()].norm(dim=-1).mean().item()
            self.unit = "absolute"
        if self.keep_first:
            self.frozen_norm = sequence_norms(reference, mask).mean()

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, as named tensors."""
        state = {"direction": self.direction, "scale": torch.tensor(self.scale, dtype=torch.float64)}
        return state if self.frozen_norm is None else {**state, "frozen_norm": self.frozen_norm}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue where the run that gave `state` stopped; the direction is drawn again from the seed."""
        self.scale = state["scale"].item()
        if "frozen_norm" in state:
            self.frozen_norm = state["frozen_norm"].to(self.direction.device)


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of a batch of sequences.

    Attributes:
        logp: [b] of whole sequences, in nats.
        length: [b] tokens predicted in each.
        reference: [b] under the reference; None where the method does not ask for it.
    """

    logp: Tensor
    length: Tensor
    reference: Tensor | None = None

    def pair(self, log_ratio: Literal["sequence", "token_mean"]) -> tuple[Tensor, Tensor]:
        """(model's, reference's) log-probability [b] of each sequence, or its mean over the sequence's tokens."""
        assert self.reference is not None
        each = self.length if log_ratio == "token_mean" else torch.ones_like(self.length)
        return self.logp / each, self.reference / each


@dataclass(frozen=True)
class PreferenceSettings:
    """What tempers a preference loss: β, γ, and whether log-ratios are of sequences or means over their tokens."""

    temperature: float
    margin: float
    log_ratio: Literal["sequence", "token_mean"]


PreferenceLoss = Callable[[LogProbs, LogProbs | None, PreferenceSettings], Tensor]
"""Forget sequences, refusals (where the method needs them) and tempering -> a scalar."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    Attributes:
        name: as written in a recipe.
        title: as written in a table or a figure.
        needs_reference: whether the reference must read the forget batch too.
        retain_loss: the retain loss where the recipe names none.
        summary: the forget loss in one line.
        paper: where the method comes from.
        citation: key of its BibTeX entry, for model cards.
    """

    name: str
    title: str
    needs_reference: bool
    retain_loss: RetainLoss
    summary: str
    paper: str
    citation: str

    @property
    def bibtex(self) -> str:
        """Its citation."""
        return citation(self.citation)


@dataclass(frozen=True, kw_only=True)
class Representation(Method):
    """A method that pushes hidden states at layer l to a target.

    Attributes:
        target: gives the forget target from the steering, the reference's hidden states and the mask.
        direction: how the topic's unit vector is drawn.
        scale_field: the recipe field that scales it.
    """

    retain_loss: RetainLoss = "hidden_mse"
    target: Target
    direction: Literal["uniform", "gaussian"]
    scale_field: Literal["steering_scale", "adaptive_scale"]


@dataclass(frozen=True, kw_only=True)
class Preference(Method):
    """A method that makes forget sequences less likely.

    Attributes:
        loss: the forget loss.
        needs_refusals: whether refusals are preferred to the forget sequences.
    """

    retain_loss: RetainLoss = "kl"
    loss: PreferenceLoss
    needs_refusals: bool = False


def rmu_target(steering: Steering, reference: Tensor | None, mask: Tensor) -> Tensor:
    """y = c·u, the same for every token (RMU; Eq. 2). Returns [d]."""
    return steering.scale * steering.direction


def adaptive_rmu_target(steering: Steering, reference: Tensor | None, mask: Tensor) -> Tensor:
    """y = β·‖z_ref‖₂·u, with the reference's own norm (Adaptive RMU; section 2.2.1). Returns [b, 1, d].

    ‖z_ref‖₂ is the mean over a sequence's unmasked tokens of the L2 norm of the reference's hidden state, so
    each forget sequence has its own coefficient. With `keep_first` it is one number, the mean norm of the topic's
    first batch, as in the authors' release.
    """
    assert reference is not None
    frozen = steering.frozen_norm
    norm = sequence_norms(reference, mask)[:, None, None] if frozen is None else frozen
    return steering.scale * norm * steering.direction


def sequence_norms(reference: Tensor, mask: Tensor) -> Tensor:
    """Mean L2 norm [b] of each sequence's unmasked hidden states [b, t, d]."""
    weight = mask.to(torch.float32)
    return (reference.float().norm(dim=-1) * weight).sum(dim=1) / weight.sum(dim=1)


def rsv_target(steering: Steering, reference: Tensor | None, mask: Tensor) -> Tensor:
    """y = z_ref + c·ε: the reference's own state, moved along a random unit vector (RSV). Returns [b, t, d]."""
    assert reference is not None
    return reference.float() + steering.scale * steering.direction


def npo_loss(forget: LogProbs, refusals: LogProbs | None, settings: PreferenceSettings) -> Tensor:
    """NPO of the forget sequences (Eq. 3)."""
    return npo(*forget.pair(settings.log_ratio), settings.temperature)


def simnpo_loss(forget: LogProbs, refusals: LogProbs | None, settings: PreferenceSettings) -> Tensor:
    """SimNPO of the forget sequences (Eq. 4); it divides by their lengths itself."""
    return simnpo(forget.logp, forget.length, settings.temperature, settings.margin)


def dpo_loss(forget: LogProbs, refusals: LogProbs | None, settings: PreferenceSettings) -> Tensor:
    """DPO with a refusal preferred to each forget sequence (section 2.2.2)."""
    assert refusals is not None
    return dpo(*refusals.pair(settings.log_ratio), *forget.pair(settings.log_ratio), settings.temperature)


RNA_CITATION = "huutien2025robustness"


def citation(key: str) -> str:
    """The BibTeX entry of that key in `assets/citations.bib`."""
    entries = (files.package_dir() / "assets" / "citations.bib").read_text(encoding="utf-8").strip().split("\n\n")
    return next(entry for entry in entries if f"{{{key}," in entry)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Representation(
            name="rmu",
            title="RMU",
            target=rmu_target,
            direction="uniform",
            scale_field="steering_scale",
            needs_reference=False,
            summary="push forget-tokens to c·u, u a random unit vector",
            paper="Li et al. 2024 (WMDP), Eq. 2 of Huu-Tien et al. 2025",
            citation="li2024wmdp",
        ),
        Representation(
            name="adaptive_rmu",
            title="Adaptive RMU",
            target=adaptive_rmu_target,
            direction="uniform",
            scale_field="adaptive_scale",
            needs_reference=True,
            summary="push forget-tokens to β·‖z_ref‖·u, scaled by the reference's own norm",
            paper="Dang et al. 2025",
            citation="dang2025effects",
        ),
        Representation(
            name="rsv",
            title="RSV",
            target=rsv_target,
            direction="gaussian",
            scale_field="steering_scale",
            needs_reference=True,
            summary="push forget-tokens to z_ref + c·ε, ε a random unit vector",
            paper="Huu-Tien et al. 2025, section 2.2.1",
            citation=RNA_CITATION,
        ),
        Preference(
            name="npo",
            title="NPO",
            loss=npo_loss,
            needs_reference=True,
            summary="make forget text less likely than under the reference, ever more gently",
            paper="Zhang et al. 2024, Eq. 3 of Huu-Tien et al. 2025",
            citation="zhang2024negative",
        ),
        Preference(
            name="simnpo",
            title="SimNPO",
            loss=simnpo_loss,
            needs_reference=False,
            summary="make forget text unlikely for its length, without a reference",
            paper="Fan et al. 2024, Eq. 4 of Huu-Tien et al. 2025",
            citation="fan2024simplicity",
        ),
        Preference(
            name="dpo",
            title="DPO",
            loss=dpo_loss,
            needs_reference=True,
            needs_refusals=True,
            summary="prefer refusals to forget text",
            paper="Rafailov et al. 2023, section 2.2.2 of Huu-Tien et al. 2025",
            citation="rafailov2023direct",
        ),
    )
}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    if name not in METHODS:
        raise UserError(unknown("method", name, METHODS, "Run `unlearn list methods`."))
    return METHODS[name]


def draw_direction(kind: Literal["uniform", "gaussian"], width: int, seed: int) -> Tensor:
    """A unit vector [width] in float32, always drawn on the CPU so that a seed means the same everywhere.

    `uniform`: each element from U[0, 1] (RMU); `gaussian`: from N(0, 1) (RSV; any covariance μI gives the same
    unit vector). Then divided by its L2 norm.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand if kind == "uniform" else torch.randn
    vector = draw(width, generator=generator, dtype=torch.float32)
    return vector / vector.norm()
