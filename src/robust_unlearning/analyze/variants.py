"""The models of an analysis: a base and any number of its deltas, over one loaded base, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robust_unlearning.analyze.inputs import recipe_documents, rows
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.evaluator import Variant, open_target
from robust_unlearning.models import checkpoint
from robust_unlearning.models.layers import check_layers
from robust_unlearning.recipe import Recipe


class Variants:
    """A base and its deltas. The base itself is always the first, whether it was named or not.

    Iterating gives each `Variant`; its `applied(model)` puts it in place.

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
        given = [open_target(name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code) for name in names]
        bases = list(dict.fromkeys(variant.base for variant in given))
        if len(bases) != 1:
            raise UserError(
                f"the targets have {len(bases)} bases: {', '.join(bases)}. An analysis compares a base with its own "
                "deltas; give run folders or delta files of one base, and run the others by themselves."
            )
        options = {key: any(variant.options[key] for variant in given) for key in given[0].options}
        deltas = [variant for variant in given if variant.delta is not None]
        self.all = [Variant(bases[0], bases[0], None, None, options), *deltas]
        self.checkpoint = checkpoint.resolve(bases[0], **options)
        for variant in deltas:
            assert variant.delta is not None
            variant.delta.check_base(self.checkpoint)
        self.model = checkpoint.load_causal_lm(self.checkpoint, "float32", checkpoint.pick_device(device))
        self.tokenizer: Any = checkpoint.load_tokenizer(self.checkpoint)

    @property
    def about(self) -> dict[str, Any]:
        """What was analysed, for a report."""
        return {"base": self.checkpoint.name, "targets": [variant.name for variant in self.all]}

    @property
    def depth(self) -> int:
        """How many decoder layers the model has."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def pad(self) -> int:
        """What sequences are padded with; padding is masked, so its value plays no part."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)

    def documents(self, side: str, limit: int, max_tokens: int) -> list[tuple[int, ...]]:
        """The first delta's `forget` or `retain` texts as tokens, see `inputs.recipe_documents` and `inputs.rows`."""
        return rows(self.tokenizer, recipe_documents(self.recipe(), side, limit), max_tokens)

    def recipe(self) -> Recipe:
        """The recipe of the first delta, whose texts and layer are used where the user names none.

        Raises:
            UserError: there is no delta.
        """
        recipe = next(filter(None, (variant.recipe() for variant in self.all)), None)
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
            layers = {recipe.layer for variant in self.all if (recipe := variant.recipe())}
            if len(layers) > 1:
                raise UserError(f"the targets were trained at layers {sorted(layers)}; choose one with --layer.")
            (given,) = layers
        check_layers([given], self.depth, "--layer")
        return given
