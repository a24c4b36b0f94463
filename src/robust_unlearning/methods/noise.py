"""Random Noise Augmentation (RNA), and nothing else: Gaussian noise on a model's representations.

Algorithm 1 of the paper: while the frozen reference reads retain data, δ ~ N(0, νI) is added to its
representation at chosen layers, a fresh draw for every token and every call. `noise_std` is √ν.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robust_unlearning.models import layers as structure

Site = Literal["block", "mlp"]


class SharedNoise:
    """Standard normal tensors, each drawn once for all who ask for it from equal generators.

    A draw depends on the generator's state and the shape, and on nothing else. So noises of one seed that are
    asked for side by side, whatever their scales, share one draw (common random numbers), and each is what it
    would be alone, to the bit.

    Args:
        part: entered with a draw's key by all who ask for it, so that a caller may count its seconds.
    """

    def __init__(self, part: Callable[[Hashable], AbstractContextManager[Any]] = nullcontext) -> None:
        self._part = part
        self._known: dict[tuple[torch.Size, bytes], tuple[Tensor, Tensor]] = {}

    def normal(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """N(0, 1) of a shape, in float32 on the generator's device, which is left as if it had drawn."""
        key = shape, generator.get_state().numpy().tobytes()
        with self._part(key):
            if key not in self._known:
                values = _normal(shape, generator)
                self._known[key] = values, generator.get_state()
        values, after = self._known[key]
        generator.set_state(after)
        return values

    def clear(self) -> None:
        """Forget what was drawn, for its memory."""
        self._known.clear()


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=generator.device).normal_(generator=generator)


class RandomNoiseAugmentation:
    """Adds N(0, std²) noise to the representations of chosen layers while attached to a model.

    >>> rna = RandomNoiseAugmentation(layers=[7], std=0.03, seed=0)
    >>> with rna.attach(reference), torch.no_grad():       # doctest: +SKIP
    ...     target = reference(**retain_batch)             # the randomised target of the retain loss

    It works on any Hugging Face decoder-only model, inside anyone's training loop. The noise comes from a
    generator of its own, so attaching it changes no other random draw; with `std=0` nothing is attached and
    nothing drawn, so the model's output is the same to the bit. The hooks come off when the block ends, also
    by an exception.

    Args:
        layers: indices of decoder layers, from 0.
        std: √ν, in units of the hidden state. Give this or `variance`, not both.
        seed: seed of the noise.
        variance: ν itself.
        site: `block` adds the noise to the decoder block's output (the residual stream), `mlp` to the
            feed-forward block's output, before it joins the residual stream.

    Raises:
        ValueError: both or neither of `std` and `variance`, or a negative or non-finite one; no layer.
        UserError: on attaching, a layer the model does not have.
    """

    def __init__(
        self,
        layers: Sequence[int],
        std: float | None = None,
        seed: int = 0,
        *,
        variance: float | None = None,
        site: Site = "block",
    ) -> None:
        if (std is None) == (variance is None):
            raise ValueError("give exactly one of std (√ν) and variance (ν)")
        scale = math.sqrt(variance) if variance is not None and variance >= 0 else std
        if scale is None or not math.isfinite(scale) or scale < 0:
            raise ValueError(f"the noise scale must be finite and at least 0, given {std=}, {variance=}")
        if not layers:
            raise ValueError("name at least one layer")
        if site not in ("block", "mlp"):
            raise ValueError(f"site must be 'block' or 'mlp', given {site!r}")
        self.layers = tuple(layers)
        self.std = scale
        self.variance = variance if variance is not None else scale**2
        self.seed = seed
        self.site = site
        self.shared: SharedNoise | None = None
        """Set where several noises of one seed are asked for side by side."""
        self._generators: dict[str, torch.Generator] = {}
        self._part: tuple[slice, int] | None = None

    def _generator(self, device: torch.device) -> torch.Generator:
        key = str(device)
        if key not in self._generators:
            self._generators[key] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[key]

    def noisy(self, hidden: Tensor) -> Tensor:
        """`hidden` + δ, δ ~ N(0, std² I) of the same shape, drawn in float32 on the tensor's device."""
        generator = self._generator(hidden.device)
        rows, of = self._part or (slice(None), len(hidden))
        draw = self.shared.normal if self.shared is not None else _normal
        delta = draw(torch.Size((of, *hidden.shape[1:])), generator) * self.std
        return hidden + delta[rows].to(hidden.dtype)

    @contextmanager
    def part(self, rows: slice, of: int) -> Iterator[None]:
        """Inside the block, what is noised are `rows` of a batch of `of` sequences.

        The noise is drawn for the whole batch, so that a sequence gets the same however the batch is divided.
        """
        self._part = (rows, of)
        try:
            yield
        finally:
            self._part = None

    def _hook(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # older layer classes return (hidden, …)
            return (self.noisy(output[0]), *output[1:])
        return self.noisy(output)

    @contextmanager
    def attach(self, model: nn.Module | Mapping[int, nn.Module]) -> Iterator[RandomNoiseAugmentation]:
        """Noise the chosen layers of `model` inside the block.

        Args:
            model: a model, or some of its decoder layers by index; chosen layers that are not among them are not
                noised here.
        """
        if self.std == 0:
            yield self
            return
        if isinstance(model, nn.Module):
            _, found = structure.decoder_layers(model)
            structure.check_layers(self.layers, len(found), "layers")
            targets = [found[index] for index in self.layers]
        else:
            targets = [model[index] for index in self.layers if index in model]
        place: Callable[[nn.Module], nn.Module] = structure.mlp if self.site == "mlp" else (lambda layer: layer)
        # before other hooks, so that transformers' own, which collect hidden states, see the noise
        handles = [place(layer).register_forward_hook(self._hook, prepend=True) for layer in targets]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def state_dict(self) -> dict[str, Tensor]:
        """The generators' states, by device: what a resumed run needs to draw the same noise."""
        return {device: generator.get_state() for device, generator in self._generators.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue drawing where the run that saved `state` stopped."""
        for device, value in state.items():
            self._generator(torch.device(device)).set_state(value.cpu())
