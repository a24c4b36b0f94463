"""A model as a function of its hidden states at one layer: what it puts out, and what it loses, when they move.

Shapes: b sequences, t tokens, d width, n sequences in all, V size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robust_unlearning.analyze.derivatives import Function
from robust_unlearning.analyze.inputs import batches
from robust_unlearning.data.corpora import TokenBatch
from robust_unlearning.stats.estimates import Array
from robust_unlearning.train.engine import BandEngine, Trunk


class Latent:
    """The part of a whole causal language model above the output z of layer l.

    Args:
        model: its weights may be changed afterwards (a delta applied): the next call uses the new ones.
        layer: l.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.engine = BandEngine(model, layer, layer, tail=True)

    def enter(self, batch: TokenBatch) -> tuple[Trunk, Tensor]:
        """What the layers are called with, and z [b, t, d]."""
        trunk = self.engine.trunk(batch)
        return trunk, self.engine.reference(trunk)

    def output(self, trunk: Trunk) -> Function:
        """z -> what the LM head reads at each sequence's last token [b, d]."""
        row, last = _last(trunk)
        return lambda hidden: self.engine.tail(trunk, hidden)[row, last]

    def answer_loss(self, trunk: Trunk, answers: Sequence[int]) -> Function:
        """z -> −log p [b] of one token after each sequence, in nats."""
        row, last = _last(trunk)
        wanted = torch.tensor(answers, device=row.device)

        def losses(hidden: Tensor) -> Tensor:
            logits = self.engine.head(self.engine.tail(trunk, hidden)[row, last])
            return logits.logsumexp(dim=-1) - logits[row, wanted]

        return losses

    def text_loss(self, trunk: Trunk) -> Function:
        """z -> mean −log p [b] of each sequence's tokens but the first, in nats a token."""
        predicted = trunk.mask[:, 1:].to(torch.float32)

        def losses(hidden: Tensor) -> Tensor:
            logits = self.engine.head(self.engine.tail(trunk, hidden)[:, :-1])
            logp = logits.gather(-1, trunk.ids[:, 1:, None])[..., 0] - logits.logsumexp(dim=-1)
            return -(logp * predicted).sum(dim=1) / predicted.sum(dim=1)

        return losses

    def states(self, sequences: Sequence[Sequence[int]], pad: int) -> Array:
        """z [n, d] at each sequence's last token, float64."""
        states = []
        for batch in batches(sequences, pad):
            trunk, hidden = self.enter(batch)
            states.append(hidden[_last(trunk)])
        return torch.cat(states).cpu().double().numpy()


def _last(trunk: Trunk) -> tuple[Tensor, Tensor]:
    """Row and column of each sequence's last token."""
    last = trunk.mask.sum(dim=1) - 1
    return torch.arange(len(last), device=last.device), last
