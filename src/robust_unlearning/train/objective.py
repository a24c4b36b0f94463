"""What a candidate minimises: a forget loss and a retain loss, each of hidden states or of log-probabilities.

The four kinds combine freely. Each takes what the band gave for a batch and returns a `Term`; none of them knows
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
from robust_unlearning.methods.table import LogProbs, Preference, Representation, Steering, Temper, draw_direction
from robust_unlearning.recipe import Recipe
from robust_unlearning.train.engine import BandEngine, Trunk, Weights
from robust_unlearning.train.lm_head import losses_by_row


class View:
    """This process's rows of a batch as seen through the engine; the same for all candidates.

    Each part is computed when first asked for.

    Args:
        whole: the batch of all processes, padded to one width.
        logp: [b] reference log-probabilities of this process's rows, where a loss asks for them.
        rows: which rows are this process's; all, where there is one process.
    """

    def __init__(
        self, engine: BandEngine, whole: TokenBatch, logp: Tensor | None = None, rows: slice = slice(None)
    ) -> None:
        self.engine = engine
        self.whole = whole
        self.rows = rows
        self.batch = whole.rows(rows)
        self.logp = logp

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
        """Tokens predicted in the whole batch: all but each sequence's first."""
        return int(self.whole.mask[:, 1:].sum())

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


@dataclass
class Term:
    """One loss term and what is worth writing down about it.

    Attributes:
        loss: scalar, gradients attached: this process's part of a mean over the whole batch.
        hidden: [b, t, d] after the band, detached.
        measures: name -> scalar tensor, for `metrics.jsonl`: parts of means likewise.
    """

    loss: Tensor
    hidden: Tensor
    measures: dict[str, Tensor] = field(default_factory=dict)


def predicted(trunk: Trunk) -> Tensor:
    """[b, t - 1] True where the next token is a real one and so is predicted."""
    return trunk.mask[:, 1:].bool()


def sequence_logp(engine: BandEngine, trunk: Trunk, final: Tensor) -> LogProbs:
    """log p of each sequence from what the LM head reads [b, t, d]; the first token is given, pads never counted."""
    wanted = predicted(trunk)
    targets = trunk.ids[:, 1:][wanted]

    def loss(logits: Tensor, rows: slice) -> Tensor:
        return token_logp(logits, targets[rows])

    logp = losses_by_row(final[:, :-1][wanted], engine.head, loss, engine.vocabulary)
    sums = torch.zeros(len(wanted), dtype=logp.dtype, device=logp.device)
    return LogProbs(sums.index_add(0, wanted.nonzero()[:, 0], logp), wanted.sum(dim=1))


class Steered:
    """The forget loss of a representation method: hidden states at layer l pushed to a target (Eq. 2)."""

    def __init__(self, recipe: Recipe, spec: Representation, width: int, device: torch.device) -> None:
        self.spec = spec
        self.steering = {
            topic: Steering(
                draw_direction(spec.direction, width, derived_seed(recipe.seed, "steering", topic)).to(device),
                recipe.of_topic(topic, spec.scale_field),
                keep_first=recipe.coefficient == "first_batch",
            )
            for topic in recipe.topics
        }

    def term(self, weights: Weights, topic: str, forget: View, refusals: View | None) -> Term:
        """Mean squared distance to the method's target."""
        hidden = forget.engine.band(forget.trunk, weights)
        steering, seen = self.steering[topic], forget
        if steering.keep_first and steering.frozen_norm is None and forget.sequence_share < 1:
            seen = View(forget.engine, forget.whole)  # the norm that is kept is a mean over the whole batch
        known = seen.reference if self.spec.needs_reference else None
        target = self.spec.target(steering, known, seen.mask)
        return Term(hidden_mse(hidden, target, forget.mask) * forget.token_share, hidden.detach())

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, as named tensors."""
        state = {}
        for topic, steering in self.steering.items():
            state[f"{topic}/direction"] = steering.direction
            state[f"{topic}/scale"] = torch.tensor(steering.scale, dtype=torch.float64)
            if steering.frozen_norm is not None:
                state[f"{topic}/frozen_norm"] = steering.frozen_norm
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue where the run that gave `state` stopped."""
        for topic, steering in self.steering.items():
            steering.scale = state[f"{topic}/scale"].item()
            frozen = state.get(f"{topic}/frozen_norm")
            steering.frozen_norm = None if frozen is None else frozen.to(steering.direction.device)


class Preferred:
    """The forget loss of a preference method: log-probabilities of forget sequences and refusals (Eq. 3 and 4)."""

    steering: Mapping[str, Steering] = {}

    def __init__(self, recipe: Recipe, spec: Preference) -> None:
        self.spec, self.recipe = spec, recipe
        self.temper = Temper(recipe.temperature, recipe.margin, recipe.log_ratio)

    def term(self, weights: Weights, topic: str, forget: View, refusals: View | None) -> Term:
        """The method's loss; nats a forget token are measured too."""
        own, hidden = self._logp(weights, forget)
        measures = {"forget_nats": -(own.logp.detach().sum() / forget.predictions)}
        preferred = None
        if self.spec.needs_refusals:
            assert refusals is not None
            preferred, _ = self._logp(weights, refusals)
            measures["refusal_nats"] = -(preferred.logp.detach().sum() / refusals.predictions)
        return Term(self.spec.loss(own, preferred, self.temper) * forget.sequence_share, hidden, measures)

    def _logp(self, weights: Weights, view: View) -> tuple[LogProbs, Tensor]:
        hidden = view.engine.band(view.trunk, weights)
        final = view.engine.tail(view.trunk, hidden, recompute=self.recipe.recompute_tail)
        found = sequence_logp(view.engine, view.trunk, final)
        return LogProbs(found.logp, found.length, view.logp), hidden.detach()

    def state(self) -> dict[str, Tensor]:
        """Nothing: the loss has no memory."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to load."""


def forget_objective(recipe: Recipe, width: int, device: torch.device) -> Steered | Preferred:
    """The forget loss of the recipe's method."""
    if isinstance(recipe.spec, Representation):
        return Steered(recipe, recipe.spec, width, device)
    assert isinstance(recipe.spec, Preference)
    return Preferred(recipe, recipe.spec)


def retain_term(recipe: Recipe, weights: Weights, view: View, rna: RandomNoiseAugmentation | None) -> Term:
    """The retain loss against the reference, under RNA where the recipe has it (Eq. 2; Algorithm 1)."""
    engine = view.engine
    hidden = engine.band(view.trunk, weights)
    if recipe.kept_by == "hidden_mse":
        return Term(hidden_mse(hidden, view.noised(rna), view.mask) * view.token_share, hidden.detach())
    final = engine.tail(view.trunk, hidden, recompute=recipe.recompute_tail)
    wanted = predicted(view.trunk)
    known = view.noised_final(rna)[:, :-1][wanted]

    def loss(logits: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            reference = engine.head(known[rows])
        return token_kl(logits, reference, recipe.kl) if recipe.kept_by == "kl" else token_mse(logits, reference)

    losses = losses_by_row(final[:, :-1][wanted], engine.head, loss, engine.vocabulary)
    return Term(losses.sum() / view.predictions, hidden.detach())
