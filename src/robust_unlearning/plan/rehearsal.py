"""A training step rehearsed on tensors without data: the engine's own code, its FLOPs and its live bytes.

The model is built from its config inside torch's FakeTensorMode: every tensor has a shape and a type and no
memory. Band, tail, LM head, losses and the backward pass then run as in training, over batches without
padding, and a `Meter` notes what each part costs. What depends on a tensor's values cannot run so: the engine's check
of its own parts is left out, and a model that routes tokens by their values cannot be planned.

Shapes: b sequences, t tokens, n = b (t - 1) predicted tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from robust_unlearning.data.corpora import TokenBatch
from robust_unlearning.errors import UserError
from robust_unlearning.methods.losses import token_kl, token_logp, token_mse
from robust_unlearning.methods.table import Preference
from robust_unlearning.models import checkpoint
from robust_unlearning.models.checkpoint import Checkpoint
from robust_unlearning.models.convert import quiet
from robust_unlearning.models.layers import trained_tensors
from robust_unlearning.parallel.processes import Processes
from robust_unlearning.plan.meter import Meter
from robust_unlearning.recipe import Recipe
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.candidate import Candidate, Key
from robust_unlearning.train.engine import BandEngine, Weights, losses_by_row
from robust_unlearning.train.objective import View
from robust_unlearning.train.references import BLOCK
from robust_unlearning.train.step import band_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")
TRUNK, REFERENCE, NOISED, BAND, TAIL, HEAD, LOSS, BAND_BACK, TAIL_BACK, GRADIENTS, METRICS, CAST = (
    "trunk", "reference", "reference under RNA", "band", "tail", "LM head", "losses", "band backward",
    "tail backward", "gradients", "metrics", "trained tensors, cast",
)  # fmt: skip
SHARED = {TRUNK, REFERENCE, METRICS}
"""Parts that candidates trained side by side have in common."""


class _Unchecked(BandEngine):
    """An engine whose tensors have no values to compare."""

    def _compare(self, whole: Tensor, parts: Tensor, tokens: Tensor, what: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Stage:
    """A model without data, ready to rehearse on.

    Attributes:
        model: truncated after layer l, or whole where a loss needs the tail.
        trained: the trained tensors.
        depth: layers of the base, all of them.
        stored: type of the checkpoint's tensors, as its config says (float32 where it does not).
    """

    recipe: Recipe
    engine: BandEngine
    model: PreTrainedModel
    trained: dict[Key, Tensor]
    depth: int
    stored: torch.dtype


@contextmanager
def without_data(name: str) -> Iterator[None]:
    """Tensors made inside have no data.

    Raises:
        UserError: the model `name` asks for a tensor's value.
    """
    try:
        with FakeTensorMode(), quiet():
            yield
    except DataDependentOutputException as error:
        raise UserError(
            f"{name}: its forward depends on values ({error.func}), so it cannot be planned without its weights."
        ) from error


def types(recipe: Recipe, base: Checkpoint) -> tuple[torch.dtype, torch.dtype]:
    """The checkpoint's type by its config, float32 where that says none, and the type of the forward pass."""
    stored = getattr(checkpoint.read_config(base), "dtype", None) or torch.float32
    return stored, stored if recipe.dtype == "auto" else getattr(torch, recipe.dtype)


def set_stage(recipe: Recipe, base: Checkpoint) -> Stage:
    """Build the part of the model that the recipe uses, from the config alone. Call inside `without_data`.

    Raises:
        UserError: the recipe names layers or tensors that the model does not have.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    stored, dtype = types(recipe, base)
    auto = AutoModelForCausalLM if recipe.needs_tail else AutoModel
    config = checkpoint.read_config(base, None if recipe.needs_tail else recipe.layer + 1)
    model = auto.from_config(config, dtype=dtype, trust_remote_code=base.trust_remote_code)
    model.eval().requires_grad_(False)
    lowest = min([*recipe.band_layers, *recipe.noised_layers, recipe.layer])
    engine = _Unchecked(model, lowest, recipe.layer, tail=recipe.needs_tail)
    trained = trained_tensors(engine.layers, recipe.band_layers, recipe.train_tensors)
    depth = checkpoint.read_config(base).get_text_config().num_hidden_layers
    return Stage(recipe, engine, model, trained, depth, stored)


def rehearse_step(stage: Stage, widths: Mapping[str, int]) -> Meter:
    """One step as every step but the first is: gradients of the step before are there when it begins.

    Args:
        widths: t of the forget and the retain batch, and of the refusals where the method needs them.
    """
    recipe, engine = stage.recipe, stage.engine
    candidate = Candidate(RunFolder(Path(), recipe), stage.trained, engine.width, Processes(CPU))
    views = {side: View(engine, _batch(recipe.batch_size, width)) for side, width in widths.items()}
    with Meter() as meter:
        meter.part = ("", GRADIENTS)
        for master in candidate.masters.values():
            master.grad = torch.zeros_like(master)
        meter.part = ("", CAST)
        weights = band_weights(candidate)
        loss = recipe.forget_weight * _forget(meter, candidate, weights, views)
        loss = loss + recipe.retain_weight * _retain(meter, candidate, weights, views["retain"])
        candidate.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for side in ("forget", "retain"):
            meter.part = (side, METRICS)
            _ = views[side].reference
    return meter


def rehearse_scoring(stage: Stage, width: int) -> Meter:
    """The reference's log-probabilities of one block of sequences of `width` tokens."""
    engine = stage.engine
    view = View(engine, _batch(BLOCK, width))
    with Meter() as meter, torch.no_grad():
        meter.part = ("", "scoring")
        _sum_by_row(engine, view.final, view.batch.ids)
    return meter


def _batch(sequences: int, width: int) -> TokenBatch:
    ids = torch.ones(sequences, width, dtype=torch.long)
    return TokenBatch(ids, torch.ones_like(ids))


def _forget(meter: Meter, candidate: Candidate, weights: Weights, views: Mapping[str, View]) -> Tensor:
    """The forget loss."""
    recipe, view = candidate.recipe, views["forget"]
    if isinstance(recipe.spec, Preference):
        pushed = _log_probabilities(meter, recipe, weights, view, "forget")
        if recipe.spec.needs_refusals:
            pushed = pushed - _log_probabilities(meter, recipe, weights, views["refusals"], "refusals")
        return pushed
    hidden = _band(meter, weights, view, "forget")
    target = torch.zeros(view.engine.width)
    if recipe.spec.needs_reference:
        meter.part = ("forget", REFERENCE)
        target = view.reference.float()
    meter.part = ("forget", LOSS)
    return _mean_square(hidden, target)


def _retain(meter: Meter, candidate: Candidate, weights: Weights, view: View) -> Tensor:
    """The retain loss."""
    recipe, engine, rna = candidate.recipe, view.engine, candidate.rna
    hidden = _band(meter, weights, view, "retain")
    at_last = rna is None or (rna.site == "block" and min(rna.layers) == engine.last)
    if recipe.kept_by == "hidden_mse":
        meter.part = ("retain", REFERENCE if at_last else NOISED)
        target = view.noised(rna)
        meter.part = ("retain", LOSS)
        return _mean_square(hidden, target)
    final = _tail(meter, recipe, view, hidden, "retain")
    meter.part = ("retain", REFERENCE if rna is None else NOISED)
    known = _rows(view.noised_final(rna))

    def loss(logits: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            reference = engine.head(known[rows])
        return token_kl(logits, reference, recipe.kl) if recipe.kept_by == "kl" else token_mse(logits, reference)

    meter.part = ("retain", HEAD)
    return losses_by_row(_rows(final), engine.head, loss, engine.vocabulary).mean()


def _log_probabilities(meter: Meter, recipe: Recipe, weights: Weights, view: View, side: str) -> Tensor:
    final = _tail(meter, recipe, view, _band(meter, weights, view, side), side)
    meter.part = (side, HEAD)
    return _sum_by_row(view.engine, final, view.batch.ids)


def _band(meter: Meter, weights: Weights, view: View, side: str) -> Tensor:
    """Band output [b, t, d]; its gradient opens the band's backward pass."""
    meter.part = (side, TRUNK)
    trunk = view.trunk
    meter.part = (side, BAND)
    hidden = view.engine.band(trunk, weights)
    hidden.register_hook(_opens(meter, side, BAND_BACK))
    return hidden


def _tail(meter: Meter, recipe: Recipe, view: View, hidden: Tensor, side: str) -> Tensor:
    """Tail output [b, t, d]; its gradient opens the tail's backward pass."""
    meter.part = (side, TAIL)
    final = view.engine.tail(view.trunk, hidden, recompute=recipe.recompute_tail)
    final.register_hook(_opens(meter, side, TAIL_BACK))
    return final


def _opens(meter: Meter, side: str, part: str) -> Callable[[Tensor], None]:
    def hook(_gradient: Tensor) -> None:
        meter.part = (side, part)

    return hook


def _rows(final: Tensor) -> Tensor:
    """[n, d] copies of the states that predict a token."""
    return final[:, :-1].reshape(-1, final.shape[-1])


def _sum_by_row(engine: BandEngine, final: Tensor, ids: Tensor) -> Tensor:
    targets = ids[:, 1:].reshape(-1)

    def loss(logits: Tensor, rows: slice) -> Tensor:
        return token_logp(logits, targets[rows])

    return losses_by_row(_rows(final), engine.head, loss, engine.vocabulary).sum()


def _mean_square(hidden: Tensor, target: Tensor) -> Any:
    """`losses.hidden_mse` of batches without padding; the mask's check there asks for a value."""
    return (hidden.float() - target.float()).square().mean(dim=-1).mean()
