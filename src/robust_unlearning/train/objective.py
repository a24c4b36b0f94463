"""What a candidate minimises: a forget loss and a retain loss, each of hidden states or of log-probabilities.

The four kinds combine freely. Each takes what the band gave for a batch and returns a `LossTerm`; none of them knows
a method by name.

Shapes: b sequences, t tokens, d width, n predicted tokens of a batch, V size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from robust_unlearning.data.corpora import TokenBatch, derived_seed
from robust_unlearning.methods.losses import hidden_mse, token_kl, token_logp, token_mse
from robust_unlearning.methods.noise import RandomNoiseAugmentation
from robust_unlearning.methods.table import (
    LogProbs,
    Preference,
    PreferenceSettings,
    Representation,
    Steering,
    draw_direction,
)
from robust_unlearning.recipe import Recipe
from robust_unlearning.train.engine import BandEngine, RowLoss, Trunk, Weights, losses_by_row


class BatchForward:
    """This process's rows of a batch as seen through the engine; the same for all candidates.

    Each part is computed when first asked for.

    Args:
        whole: the batch of all processes, padded to one width.
        reference_logp: [b] log-probabilities of this process's rows under the reference, where a loss asks for them.
        rows: which rows are this process's; all, where there is one process.
    """

    def __init__(
        self, engine: BandEngine, whole: TokenBatch, reference_logp: Tensor | None = None, rows: slice = slice(None)
    ) -> None:
        self.engine = engine
        self.whole = whole
        self.rows = rows
        self.batch = whole.rows(rows)
        self.reference_logp = reference_logp

    @cached_property
    def token_share(self) -> float:
        """This process's tokens over those of all: what its mean over tokens counts for in the mean over all."""
        return self.batch.tokens / self.whole.tokens

    @property
    def sequence_share(self) -> float:
        """This process's sequences over those of all."""
        return len(self.batch.ids) / len(self.whole.ids)

    @cached_property
    def predictions(self) -> int:
        """Tokens predicted in the whole batch: all but what is given of each sequence."""
        return int(self.whole.predicted.sum())

    @cached_property
    def predicted(self) -> Tensor:
        """[b, t - 1] True where the next token is predicted; n of them in all."""
        return self.batch.predicted.to(self.engine.device)

    @cached_property
    def trunk(self) -> Trunk:
        """What enters the band."""
        return self.engine.trunk(self.batch)

    @cached_property
    def reference(self) -> Tensor:
        """The base's hidden states [b, t, d] after the band."""
        return self.engine.reference(self.trunk)

    @cached_property
    def final(self) -> Tensor:
        """What the base's LM head reads [b, t, d]."""
        return self.engine.reference_tail(self.trunk, self.reference)

    @property
    def mask(self) -> Tensor:
        """[b, t], 1 for a token and 0 for padding."""
        return self.trunk.mask

    def noised(self, rna: RandomNoiseAugmentation | None) -> Tensor:
        """The reference after the band under RNA. What lies below the noise is not run again."""
        last = self.engine.last
        if rna is None or min(rna.layers) > last:
            return self.reference
        with rna.part(self.rows, len(self.whole.ids)):
            if rna.site == "block" and min(rna.layers) == last:
                return rna.noisy(self.reference)
            return self.engine.reference(self.trunk, rna)

    def noised_final(self, rna: RandomNoiseAugmentation | None) -> Tensor:
        """What the base's LM head reads under RNA, noise in band and tail."""
        if rna is None:
            return self.final
        hidden = self.noised(rna)
        with rna.part(self.rows, len(self.whole.ids)):
            return self.engine.reference_tail(self.trunk, hidden, rna)

    def predicting(self, final: Tensor) -> Tensor:
        """Rows [n, d] of what the LM head reads [b, t, d] that predict a token."""
        return final[:, :-1][self.predicted]

    def losses(self, final: Tensor, loss: RowLoss) -> Tensor:
        """The loss [n] of each predicted token from its logits."""
        return losses_by_row(self.predicting(final), self.engine.head, loss, self.engine.vocabulary)

    def sequence_logp(self, final: Tensor) -> LogProbs:
        """log p of each sequence after what is given of it, from what the LM head reads [b, t, d]; no pad counts."""
        targets = self.trunk.ids[:, 1:][self.predicted]
        logp = self.losses(final, lambda logits, rows: token_logp(logits, targets[rows]))
        sums = torch.zeros(len(self.predicted), dtype=logp.dtype, device=logp.device)
        sums = sums.index_add(0, self.predicted.nonzero()[:, 0], logp)
        return LogProbs(sums, self.predicted.sum(dim=1), self.reference_logp)


@dataclass
class LossTerm:
    """One loss term and what is worth writing down about it.

    Attributes:
        loss: scalar, gradients attached: this process's part of a mean over the whole batch.
        hidden: [b, t, d] after the band, detached.
        measures: name -> scalar tensor, for `metrics.jsonl`: parts of means likewise.
    """

    loss: Tensor
    hidden: Tensor
    measures: dict[str, Tensor] = field(default_factory=dict)


class ForgetObjective:
    """The forget loss of a recipe. One that remembers nothing between steps has no steering and no state."""

    steering: Mapping[str, Steering] = {}
    """Topic -> what its target is made of."""

    def settle(self, topic: str, first: BatchForward) -> None:
        """Take from a topic's first forget batch, seen whole, what is to hold for all its batches."""
        if topic in self.steering and self.steering[topic].needs_first_batch:
            self.steering[topic].settle(first.reference, first.mask)

    def term(self, weights: Weights, topic: str, forget: BatchForward, refusals: BatchForward | None) -> LossTerm:
        """The forget loss of a step under `weights`."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, as named tensors."""
        return {f"{topic}/{name}": value for topic, own in self.steering.items() for name, value in own.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue where the run that gave `state` stopped."""
        for topic, steering in self.steering.items():
            steering.load_state(below(f"{topic}/", state))


class RepresentationObjective(ForgetObjective):
    """The forget loss of a representation method: hidden states at layer l pushed to a target (Eq. 2)."""

    def __init__(self, recipe: Recipe, spec: Representation, width: int, device: torch.device) -> None:
        self.spec = spec
        adaptive = spec.scale_field == "adaptive_scale"
        self.steering = {
            topic: Steering(
                draw_direction(spec.direction, width, derived_seed(recipe.seed, "steering", topic)).to(device),
                recipe.of_topic(topic, spec.scale_field),
                unit=recipe.steering_unit,
                keep_first=adaptive and recipe.coefficient == "first_batch",
            )
            for topic in recipe.topics
        }

    def term(self, weights: Weights, topic: str, forget: BatchForward, refusals: BatchForward | None) -> LossTerm:
        """Mean squared distance to the method's target."""
        hidden = forget.engine.band(forget.trunk, weights)
        reference = forget.reference if self.spec.needs_reference else None
        target = self.spec.target(self.steering[topic], reference, forget.mask)
        return LossTerm(hidden_mse(hidden, target, forget.mask) * forget.token_share, hidden.detach())


class PreferenceObjective(ForgetObjective):
    """The forget loss of a preference method: log-probabilities of forget sequences and refusals (Eq. 3 and 4)."""

    def __init__(self, recipe: Recipe, spec: Preference) -> None:
        self.spec, self.recipe = spec, recipe
        self.settings = PreferenceSettings(recipe.temperature, recipe.margin, recipe.log_ratio)

    def term(self, weights: Weights, topic: str, forget: BatchForward, refusals: BatchForward | None) -> LossTerm:
        """The method's loss; nats a forget token are measured too."""
        rejected, hidden = self._logp(weights, forget)
        measures = {"forget_nats": -(rejected.logp.detach().sum() / forget.predictions)}
        preferred = None
        if self.spec.needs_refusals:
            assert refusals is not None
            preferred, _ = self._logp(weights, refusals)
            measures["refusal_nats"] = -(preferred.logp.detach().sum() / refusals.predictions)
        return LossTerm(self.spec.loss(rejected, preferred, self.settings) * forget.sequence_share, hidden, measures)

    def _logp(self, weights: Weights, forward: BatchForward) -> tuple[LogProbs, Tensor]:
        hidden = forward.engine.band(forward.trunk, weights)
        final = forward.engine.tail(forward.trunk, hidden, recompute=self.recipe.recompute_tail)
        return forward.sequence_logp(final), hidden.detach()


def forget_objective(recipe: Recipe, width: int, device: torch.device) -> ForgetObjective:
    """The forget loss of the recipe's method."""
    if isinstance(recipe.spec, Representation):
        return RepresentationObjective(recipe, recipe.spec, width, device)
    assert isinstance(recipe.spec, Preference)
    return PreferenceObjective(recipe, recipe.spec)


def retain_term(
    recipe: Recipe, weights: Weights, retain: BatchForward, rna: RandomNoiseAugmentation | None
) -> LossTerm:
    """The retain loss against the reference, under RNA where the recipe has it (Eq. 2; Algorithm 1)."""
    engine = retain.engine
    hidden = engine.band(retain.trunk, weights)
    if recipe.retain_kind == "hidden_mse":
        return LossTerm(hidden_mse(hidden, retain.noised(rna), retain.mask) * retain.token_share, hidden.detach())
    final = engine.tail(retain.trunk, hidden, recompute=recipe.recompute_tail)
    reference = retain.predicting(retain.noised_final(rna))

    def loss(logits: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            wanted = engine.head(reference[rows])
        return token_kl(logits, wanted, recipe.kl) if recipe.retain_kind == "kl" else token_mse(logits, wanted)

    return LossTerm(retain.losses(final, loss).sum() / retain.predictions, hidden.detach())


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The named tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
