"""A training step rehearsed on tensors without data: training's own code, its FLOPs and its live bytes.

The model is built from its config inside torch's FakeTensorMode: every tensor has a shape and a type and no
memory. A candidate's losses, their backward pass and the metrics then run as in training, over batches without
padding, and a `Meter` notes what each part costs. What asks for a tensor's value is answered as such batches and
finite losses would. A model that routes tokens by their values cannot be planned.

Shapes: b sequences, t tokens, d width.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from robust_unlearning.data.corpora import TokenBatch
from robust_unlearning.errors import UserError
from robust_unlearning.methods.noise import RandomNoiseAugmentation
from robust_unlearning.models import checkpoint
from robust_unlearning.models.checkpoint import Checkpoint
from robust_unlearning.models.convert import quiet
from robust_unlearning.models.layers import trained_tensors
from robust_unlearning.parallel.processes import Processes
from robust_unlearning.plan.meter import Meter
from robust_unlearning.recipe import Recipe
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.candidate import Candidate, Key, metrics_row
from robust_unlearning.train.engine import BandEngine
from robust_unlearning.train.objective import BatchForward
from robust_unlearning.train.references import BLOCK
from robust_unlearning.train.step import StepBatch, step_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")
TRUNK, REFERENCE, NOISED, BAND, TAIL, HEAD, LOSS, BAND_BACK, TAIL_BACK, GRADIENTS, METRICS, CAST = (
    "trunk", "reference", "reference under RNA", "band", "tail", "LM head", "losses", "band backward",
    "tail backward", "gradients", "metrics", "trained tensors, cast",
)  # fmt: skip
SHARED = {TRUNK, REFERENCE, METRICS}
"""Parts that candidates trained side by side have in common."""

_aten = torch.ops.aten
_COMPARISONS = {getattr(_aten, name).Scalar: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


class _Answers(TorchDispatchMode):
    """Answers what training asks of its tensors' values: every number is 1, every condition holds, no mask hides.

    Inside a model's own modules nothing is answered, as a forward pass that depends on values has no one cost.
    """

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self._compared = WeakIdKeyDictionary()

    def entering(self, *_call: object) -> None:
        """Hook: a module's forward pass begins."""
        self._depth += 1

    def leaving(self, *_call: object) -> None:
        """Hook: it is over."""
        self._depth -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, or answer it."""
        if self._depth == 0:
            if func is _aten._local_scalar_dense.default:
                return self._compared.get(args[0], 1.0 if args[0].is_floating_point() else 1)
            if func is _aten.allclose.default:
                return True
            if func is _aten.nonzero.default:
                return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
            if func is _aten.index.Tensor and args[1][0].dtype == torch.bool:
                return args[0].flatten(0, args[1][0].ndim - 1).clone()
        out = func(*args, **(kwargs or {}))
        if func in _COMPARISONS:
            self._compared[out] = _COMPARISONS[func](1, args[1])
        return out


_ENGINE_PARTS = {
    "trunk": TRUNK, "band": BAND, "tail": TAIL, "head": HEAD, "reference": REFERENCE, "reference_tail": REFERENCE,
}  # fmt: skip
_BACKWARD = {BAND: BAND_BACK, TAIL: TAIL_BACK}


class _Noted:
    """An engine as the batch of one side uses it: the meter is told which part runs, and for which side.

    A part lasts until the next begins: between the engine's parts run the losses, after the LM head what is made of
    its logits.
    """

    def __init__(self, engine: BandEngine, meter: Meter, side: str, only: str = "") -> None:
        self._engine, self._meter, self._side, self._only = engine, meter, side, only

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._engine, name)
        return partial(self._run, _ENGINE_PARTS[name], attribute) if name in _ENGINE_PARTS else attribute

    def _begins(self, part: str, _gradient: Tensor | None = None) -> None:
        self._meter.part = (self._side, self._only or part)

    def _run(self, part: str, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self._begins(NOISED if any(isinstance(value, RandomNoiseAugmentation) for value in args) else part)
        output = method(*args, **options)
        if part in _BACKWARD:
            output.register_hook(partial(self._begins, _BACKWARD[part]))
        if part != HEAD:
            self._begins(LOSS)
        return output


@dataclass(frozen=True)
class Rehearsal:
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
        answers = _Answers()
        hooks = (
            register_module_forward_pre_hook(answers.entering),
            register_module_forward_hook(answers.leaving, always_call=True),
        )
        with FakeTensorMode(), answers, quiet(), hooks[0], hooks[1]:
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"{name}: its forward depends on values ({error.func}), so it cannot be planned without its weights."
        ) from error


def types(recipe: Recipe, base: Checkpoint) -> tuple[torch.dtype, torch.dtype]:
    """The checkpoint's type by its config, float32 where that says none, and the type of the forward pass."""
    stored = getattr(checkpoint.read_config(base), "dtype", None) or torch.float32
    return stored, stored if recipe.dtype == "auto" else getattr(torch, recipe.dtype)


def prepare(recipe: Recipe, base: Checkpoint) -> Rehearsal:
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
    engine = BandEngine(model, lowest, recipe.layer, tail=recipe.needs_tail)
    trained = trained_tensors(engine.layers, recipe.band_layers, recipe.train_tensors)
    depth = checkpoint.read_config(base).get_text_config().num_hidden_layers
    return Rehearsal(recipe, engine, model, trained, depth, stored)


def rehearse_step(rehearsal: Rehearsal, widths: Mapping[str, int]) -> Meter:
    """One step as every step but the first is: gradients of the step before are there when it begins.

    Args:
        widths: t of the forget and the retain batch, and of the refusals where the method needs them.
    """
    recipe, meter = rehearsal.recipe, Meter()
    candidate = Candidate(RunFolder(Path(), recipe), rehearsal.trained, rehearsal.engine.width, Processes(CPU))
    views = {side: _view(rehearsal, meter, side, recipe.batch_size, width) for side, width in widths.items()}
    batch = StepBatch(next(iter(recipe.topics)), **views)
    with meter:
        meter.part = ("", GRADIENTS)
        for master in candidate.masters.values():
            master.grad = torch.zeros_like(master)
        meter.part = ("", CAST)
        losses = step_losses(candidate, batch)
        candidate.optimiser.zero_grad(set_to_none=True)
        losses.total.backward()
        for side in ("forget", "retain"):
            views[side].engine = cast(BandEngine, _Noted(rehearsal.engine, meter, side, only=METRICS))
        metrics_row(candidate, batch, losses)
    return meter


def rehearse_scoring(rehearsal: Rehearsal, width: int) -> Meter:
    """The reference's log-probabilities of one block of sequences of `width` tokens."""
    meter = Meter()
    view = _view(rehearsal, meter, "", BLOCK, width)
    with meter, torch.no_grad():
        view.sequence_logp(view.final)
    return meter


def _view(rehearsal: Rehearsal, meter: Meter, side: str, sequences: int, width: int) -> BatchForward:
    ids = torch.ones(sequences, width, dtype=torch.long)
    engine = cast(BandEngine, _Noted(rehearsal.engine, meter, side))
    return BatchForward(engine, TokenBatch(ids, torch.ones_like(ids)), torch.zeros(sequences))
