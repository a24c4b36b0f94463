"""A model's decoder layers one by one, called as its own forward calls them.

Shapes: b sequences, t tokens, d width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robust_unlearning.analyze.inputs import batches
from robust_unlearning.data.corpora import TokenBatch
from robust_unlearning.train.engine import BandEngine, Trunk


class Stack:
    """The layers of a whole causal language model.

    Args:
        model: its weights may be changed afterwards (a delta applied): the next call uses the new ones.
    """

    def __init__(self, model: nn.Module) -> None:
        self.engine = BandEngine(model, 0, 0, tail=True)
        self.layers = {**self.engine.layers, **self.engine.upper}

    def trunk(self, batch: TokenBatch) -> Trunk:
        """What enters layer 0, and what every layer is called with."""
        return self.engine.trunk(batch)

    def call(self, trunk: Trunk, index: int, hidden: Tensor) -> Tensor:
        """Layer `index` on hidden states [b, t, d]."""
        args, kwargs = trunk.calls[index]
        output = self.layers[index](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def states(self, trunk: Trunk) -> list[Tensor]:
        """Hidden states [b, t, d] after each of the L layers, before the final norm."""
        hidden, states = trunk.hidden, []
        for index in self.layers:
            hidden = self.call(trunk, index, hidden)
            states.append(hidden)
        return states

    def at(self, sequences: Sequence[Sequence[int]], places: Sequence[int], pad: int) -> Tensor:
        """Hidden states [L, n, d] of each of n sequences at one place, counted from its end (-1: the last token)."""
        parts, done = [], 0
        for batch in batches(sequences, pad, tokens=2048):
            trunk = self.trunk(batch)
            wanted = torch.tensor(places[done : done + len(batch.ids)], device=trunk.mask.device)
            columns = trunk.mask.sum(dim=1) + wanted
            row = torch.arange(len(columns), device=columns.device)
            parts.append(torch.stack([layer[row, columns] for layer in self.states(trunk)]).float().cpu())
            done += len(columns)
        return torch.cat(parts, dim=1)
