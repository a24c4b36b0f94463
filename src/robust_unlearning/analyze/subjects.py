"""The models of an analysis: a base and any number of its deltas, over one loaded base, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.evaluator import Target, open_target
from robust_unlearning.models import checkpoint
from robust_unlearning.models.layers import check_layers
from robust_unlearning.recipe import Recipe


class Subjects:
    """What is compared. The base itself is always the first, whether it was named or not.

    Args:
        names: run folders, delta files, or the base, all of one base.
        device: `auto`, or a torch device.

    Raises:
        UserError: targets of several bases, a delta that does not fit, or what `open_target` raises.
    """

    def __init__(
        self,
        names: Sequence[str],
        device: str = "auto",
        *,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        found = [open_target(each, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code) for each in names]
        bases = list(dict.fromkeys(each.base for each in found))
        if len(bases) != 1:
            raise UserError(
                f"the targets have {len(bases)} bases: {', '.join(bases)}. An analysis compares a base with its own "
                "deltas; give run folders or delta files of one base, and run the others by themselves."
            )
        options = {key: any(each.options[key] for each in found) for key in found[0].options}
        deltas = [each for each in found if each.delta is not None]
        self.targets: list[Target] = [Target(bases[0], bases[0], None, None, options), *deltas]
        self.checkpoint = checkpoint.resolve(bases[0], **options)
        for target in deltas:
            assert target.delta is not None
            target.delta.check_base(self.checkpoint)
        self.model = checkpoint.load_causal_lm(self.checkpoint, "float32", checkpoint.pick_device(device))
        self.tokenizer: Any = checkpoint.load_tokenizer(self.checkpoint)

    @property
    def depth(self) -> int:
        """How many decoder layers the model has."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def pad(self) -> int:
        """What sequences are padded with; padding is masked, so its value plays no part."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(each for each in known if each is not None)

    @contextmanager
    def applied(self, target: Target) -> Iterator[nn.Module]:
        """The model with the target's delta in place, and the base's own tensors afterwards."""
        if target.delta is None:
            yield self.model
        else:
            with target.delta.applied(self.model):
                yield self.model

    def recipe(self) -> Recipe:
        """The recipe of the first delta, whose texts and layer are used where the user names none.

        Raises:
            UserError: there is no delta.
        """
        recipe = next((found for each in self.targets if (found := recipe_of(each))), None)
        if recipe is None:
            raise UserError(
                f"{self.checkpoint.name!r} is a bare model, so no recipe says which texts or layer to use: "
                "name them (--texts, --layer), or give a run folder too."
            )
        return recipe

    def layer(self, given: int | None) -> int:
        """The layer given, else the one that all deltas were trained at.

        Raises:
            UserError: the model has no such layer; none given, and the deltas have several or there are none.
        """
        if given is None:
            self.recipe()
            layers = {recipe.layer for each in self.targets if (recipe := recipe_of(each))}
            if len(layers) > 1:
                raise UserError(f"the targets were trained at layers {sorted(layers)}; choose one with --layer.")
            (given,) = layers
        check_layers([given], self.depth, "--layer")
        return given


def recipe_of(target: Target) -> Recipe | None:
    """The recipe of a target's delta; None for a bare model."""
    return Recipe.model_validate(target.delta.provenance["recipe"]) if target.delta is not None else None
