"""Trunk, band, tail and LM head: the only place a model is called during training.

The trunk is the embedding and the layers below the band. It runs once a batch, without gradients, through the
model's own forward; stand-ins at the band's places note what each band layer is called with (hidden states,
masks, position embeddings), so that the band can be called again and again with any set of its weights:
none, for the reference, which is the base itself, or a candidate's. The tail is the layers above the band, the
final norm and the LM head; it is there only when the engine is given a whole model and a loss asks for it.

The LM head is applied to some rows at a time, so that memory does not grow with tokens × vocabulary: every loss of
log-probabilities is a function of one token's logits. The losses of these rows and the gradients to their hidden
states are taken at once, and the logits are forgotten before the next rows. The head is frozen and gets no gradient.

Shapes: b sequences, t tokens, n of them predicted, d width, V size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robust_unlearning.data.corpora import TokenBatch
from robust_unlearning.errors import UserError
from robust_unlearning.methods.noise import RandomNoiseAugmentation
from robust_unlearning.models.layers import check_layers, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = Mapping[int, Mapping[str, Tensor]]
"""Band weights: layer index -> name inside the layer -> tensor."""
RowLoss = Callable[[Tensor, slice], Tensor]
"""Logits [rows, V] and which rows they are -> losses [rows]."""
CHUNK_BYTES = 64 * 1024**2
"""Logits held at a time, in float32."""


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
        calls: layer index -> the other arguments that layer is called with, in band and tail.
        ids: [b, t] tokens.
        mask: [b, t], 1 for a token and 0 for padding.
    """

    hidden: Tensor
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
    ids: Tensor
    mask: Tensor


class BandEngine:
    """Runs a model as trunk, band (layer `first` to layer `last` inclusive) and, where asked, tail.

    Args:
        model: a base model, whole or truncated after layer `last`; its weights are never changed.
        first: the band's first layer.
        last: the band's last layer, whose output the losses on hidden states see.
        tail: whether the layers above and the LM head will be asked for; the model must then be a whole one.

    Raises:
        UserError: the model has no such layers, or its parts cannot be called on their own with the same result
            (checked with two short sequences).
    """

    def __init__(self, model: PreTrainedModel, first: int, last: int, *, tail: bool = False) -> None:
        self.model = model
        self.first, self.last = first, last
        _, self._places = decoder_layers(model)
        check_layers([first, last], len(self._places), "layer")
        top = len(self._places) if tail else last + 1
        self.layers: dict[int, nn.Module] = {index: self._places[index] for index in range(first, last + 1)}
        self.upper: dict[int, nn.Module] = {index: self._places[index] for index in range(last + 1, top)}
        self._returns_tuple: dict[int, bool] = {}
        self._final_norm: nn.Module | None = None
        text = model.config.get_text_config()
        self.width, self.vocabulary = text.hidden_size, text.vocab_size
        self._softcap: float | None = getattr(text, "final_logit_softcapping", None)
        self._check(tail)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def _check(self, tail: bool) -> None:
        """Compare the parts with the model's own forward on a probe, and find the final norm."""
        ids = torch.tensor([[1, 2, 3, 4], [2, 3, 1, 1]], device=self.device)
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], device=self.device)
        outputs: dict[int, Any] = {}
        inside = {id(module) for layer in self._places for module in layer.modules()}
        highest = max([*self.layers, *self.upper])

        def note(index: int) -> Any:
            return lambda _module, _args, output: outputs.__setitem__(index, output)

        def find(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and highest in outputs and args[0] is _hidden(outputs[highest]) and self._final_norm is None:
                self._final_norm = module

        layers = {**self.layers, **self.upper}
        handles = [layer.register_forward_hook(note(index)) for index, layer in layers.items()]
        if tail:
            outside = [module for module in self.model.modules() if id(module) not in inside]
            handles += [module.register_forward_pre_hook(find) for module in outside]
        try:
            with torch.no_grad():
                output = self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self._returns_tuple = {index: isinstance(each, tuple) for index, each in outputs.items()}
        trunk = self.trunk(TokenBatch(ids, mask))
        hidden, tokens = self.reference(trunk), mask.bool()
        self._compare(_hidden(outputs[self.last]), hidden, tokens, f"layers {self.first} to {self.last}")
        if tail:
            with torch.no_grad():
                logits = self.head(self.tail(trunk, hidden))
            self._compare(output.logits, logits, tokens, f"layers {self.last + 1} to {highest} and the LM head")

    def _compare(self, whole: Tensor, parts: Tensor, tokens: Tensor, what: str) -> None:
        whole, parts = whole[tokens], parts[tokens]
        if not torch.allclose(whole.float(), parts.float(), rtol=1e-3, atol=1e-3):
            worst = (whole - parts).abs().max().item()
            raise UserError(
                f"{type(self.model).__name__}: {what}, called on their own, give another result than the whole model "
                f"(up to {worst:.3g} apart); it cannot be unlearned here."
            )

    @contextmanager
    def _standing_in(self) -> Iterator[dict[int, _StandIn]]:
        """Stand-ins at the places of band and tail, the real layers back afterwards whatever happens."""
        layers = {**self.layers, **self.upper}
        stand_ins = {
            index: _StandIn(layer, self._returns_tuple[index], index == max(layers)) for index, layer in layers.items()
        }
        try:
            for index, stand_in in stand_ins.items():
                self._places[index] = stand_in
            yield stand_ins
        finally:
            for index, layer in layers.items():
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
        return Trunk(hidden, calls, batch.ids, batch.mask)

    def band(self, trunk: Trunk, weights: Weights) -> Tensor:
        """Hidden states [b, t, d] after the band with `weights` in the places of the base's own.

        Gradients reach the weights that require them, and nothing else.
        """
        hidden = trunk.hidden
        for index, layer in self.layers.items():
            args, kwargs = trunk.calls[index]
            if index in weights:
                output = torch.func.functional_call(layer, dict(weights[index]), (hidden, *args), kwargs)
            else:
                output = layer(hidden, *args, **kwargs)
            hidden = _hidden(output)
        return hidden

    def tail(self, trunk: Trunk, hidden: Tensor, *, recompute: bool = False) -> Tensor:
        """What the LM head reads [b, t, d], from the band's output: the layers above, and the final norm.

        Gradients pass through to `hidden`; the tail's own weights are frozen.

        Args:
            recompute: keep only each layer's input for the backward pass, and run the layer again there.
        """
        for index, layer in self.upper.items():
            args, kwargs = trunk.calls[index]
            if recompute and hidden.requires_grad:
                output = checkpoint(layer, hidden, *args, use_reentrant=False, **kwargs)
            else:
                output = layer(hidden, *args, **kwargs)
            hidden = _hidden(output)
        if self._final_norm is not None:
            hidden = self._final_norm(hidden)
        return hidden

    def head(self, rows: Tensor) -> Tensor:
        """Logits [n, V] of rows [n, d] of the tail's output."""
        logits: Tensor = self.model.get_output_embeddings()(rows)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    @torch.no_grad()
    def reference(self, trunk: Trunk, rna: RandomNoiseAugmentation | None = None) -> Tensor:
        """Hidden states [b, t, d] of the base after the band, with RNA's noise if given."""
        with rna.attach(self.layers) if rna is not None else nullcontext():
            return self.band(trunk, {})

    @torch.no_grad()
    def reference_tail(self, trunk: Trunk, hidden: Tensor, rna: RandomNoiseAugmentation | None = None) -> Tensor:
        """What the LM head of the base reads [b, t, d], from its band's output, with RNA's noise in the tail."""
        with rna.attach(self.upper) if rna is not None else nullcontext():
            return self.tail(trunk, hidden)


def _hidden(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A layer's hidden states; older layer classes return (hidden, …)."""
    return output[0] if isinstance(output, tuple) else output


def losses_by_row(hidden: Tensor, head: Callable[[Tensor], Tensor], loss: RowLoss, vocabulary: int) -> Tensor:
    """`loss(head(hidden), …)` [n], chunk by chunk, differentiable once with respect to `hidden` [n, d].

    Args:
        hidden: [n, d] what the head reads.
        head: hidden states -> logits [rows, V]; its weights get no gradient.
        loss: the loss of each row from its logits alone.
        vocabulary: V, which decides how many rows a chunk has.
    """
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    losses: Tensor = _ByRow.apply(hidden, head, loss, rows)  # type: ignore[no-untyped-call]
    return losses


class _ByRow(torch.autograd.Function):
    """Forward takes the gradients too, while it has the logits; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Callable[[Tensor], Tensor], loss: RowLoss, rows: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        values, gradients = [], []
        for first in range(0, max(1, len(hidden)), rows):  # no rows, no losses
            chunk = slice(first, min(first + rows, len(hidden)))
            part = hidden[chunk].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                losses = loss(head(part), chunk)
                if wanted:
                    gradients.append(torch.autograd.grad(losses.sum(), part)[0])
            values.append(losses.detach())
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * grad[:, None].to(gradients.dtype), None, None, None
