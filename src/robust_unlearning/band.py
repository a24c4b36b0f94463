"""Trunk and band: the only place a model is called during training.

The trunk is the embedding and the layers below the band. It runs once a batch, without gradients, through the
model's own forward; stand-ins at the band's places note what each band layer is called with (hidden states,
masks, position embeddings), so that the band can be called again and again with any set of its weights:
none, for the reference, which is the base itself, or a candidate's.

Shapes: b sequences, t tokens, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_unlearning.corpora import TokenBatch
from robust_unlearning.errors import UserError
from robust_unlearning.layers import check_layers, decoder_layers
from robust_unlearning.noise import RandomNoiseAugmentation

Weights = Mapping[int, Mapping[str, Tensor]]
"""Band weights: layer index -> name inside the layer -> tensor."""


class _Reached(Exception):
    """The trunk has been run as far as it is needed."""


class _StandIn(nn.Module):
    """Takes a band layer's place while the trunk runs: notes its call, passes the hidden states on."""

    def __init__(self, layer: nn.Module, returns_tuple: bool, last: bool) -> None:
        super().__init__()
        self._held = [layer]  # in a list, so that it is no submodule
        self._returns_tuple = returns_tuple
        self._last = last
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._held[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.call = (args, kwargs)
        if self._last:
            raise _Reached
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if self._returns_tuple else hidden


@dataclass(frozen=True)
class Trunk:
    """What the trunk made of a batch.

    Attributes:
        hidden: [b, t, d] hidden states that enter the band.
        calls: layer index -> the other arguments that layer is called with.
        mask: [b, t], 1 for a token and 0 for padding.
    """

    hidden: Tensor
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
    mask: Tensor


class BandEngine:
    """Runs a model as trunk and band, from layer `first` to layer `last` inclusive.

    Args:
        model: a base model, whole or truncated after layer `last`; its weights are never changed.
        first: the band's first layer.
        last: the band's last layer, whose output the losses see.

    Raises:
        UserError: the model has no such layers, or its layers cannot be called on their own with the same
            result (checked with two short sequences, to the bit on CPU).
    """

    def __init__(self, model: nn.Module, first: int, last: int) -> None:
        self.model = model
        self.first, self.last = first, last
        _, self._places = decoder_layers(model)
        check_layers([first, last], len(self._places), "layer")
        self.layers: dict[int, nn.Module] = {index: self._places[index] for index in range(first, last + 1)}
        self._returns_tuple: dict[int, bool] = {}
        self.width = model.config.get_text_config().hidden_size
        self._check()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def _check(self) -> None:
        """Compare trunk and band with the model's own forward on a probe."""
        ids = torch.tensor([[1, 2, 3, 4], [2, 3, 1, 1]], device=self.device)
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], device=self.device)
        outputs: dict[int, Any] = {}

        def note(index: int) -> Any:
            return lambda _module, _args, output: outputs.__setitem__(index, output)

        handles = [layer.register_forward_hook(note(index)) for index, layer in self.layers.items()]
        try:
            with torch.no_grad():
                self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self._returns_tuple = {index: isinstance(output, tuple) for index, output in outputs.items()}
        whole = outputs[self.last][0] if self._returns_tuple[self.last] else outputs[self.last]
        parts = self.reference(self.trunk(TokenBatch(ids, mask)))
        tokens = mask.bool()
        if not torch.allclose(whole[tokens].float(), parts[tokens].float(), rtol=1e-3, atol=1e-3):
            worst = (whole - parts)[tokens].abs().max().item()
            raise UserError(
                f"{type(self.model).__name__}: layers {self.first} to {self.last}, called on their own, give "
                f"other hidden states than the whole model (up to {worst:.3g} apart); it cannot be unlearned here."
            )

    @contextmanager
    def _standing_in(self) -> Iterator[dict[int, _StandIn]]:
        """Stand-ins at the band's places, the real layers back afterwards whatever happens."""
        stand_ins = {
            index: _StandIn(layer, self._returns_tuple[index], index == self.last)
            for index, layer in self.layers.items()
        }
        try:
            for index, stand_in in stand_ins.items():
                self._places[index] = stand_in
            yield stand_ins
        finally:
            for index, layer in self.layers.items():
                self._places[index] = layer

    @torch.no_grad()
    def trunk(self, batch: TokenBatch) -> Trunk:
        """Run embedding and trunk on a batch (ids and mask [b, t]) without gradients."""
        batch = batch.to(self.device)
        with self._standing_in() as stand_ins, suppress(_Reached):
            self.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        calls = {}
        hidden = None
        for index, stand_in in stand_ins.items():
            assert stand_in.call is not None
            args, kwargs = stand_in.call
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            if hidden is None:
                hidden = args[0] if args else kwargs["hidden_states"]
            calls[index] = (args[1:], rest)
        assert hidden is not None
        return Trunk(hidden, calls, batch.mask)

    def band(self, trunk: Trunk, weights: Weights) -> Tensor:
        """Hidden states [b, t, d] after the band with `weights` in the places of the base's own.

        Gradients reach the weights that require them, and nothing else.
        """
        hidden = trunk.hidden
        for index, layer in self.layers.items():
            args, kwargs = trunk.calls[index]
            own = weights.get(index)
            if own:
                output = torch.func.functional_call(layer, dict(own), (hidden, *args), kwargs)
            else:
                output = layer(hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    @torch.no_grad()
    def reference(self, trunk: Trunk, rna: RandomNoiseAugmentation | None = None) -> Tensor:
        """Hidden states [b, t, d] of the base after the band, with RNA's noise if given."""
        with rna.attach(self.layers) if rna is not None else nullcontext():
            return self.band(trunk, {})
