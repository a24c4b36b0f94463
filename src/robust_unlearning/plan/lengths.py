"""How long the batches of a run are: from its corpora where they are at hand and small, else the most they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from robust_unlearning import files
from robust_unlearning.data.corpora import HUB
from robust_unlearning.data.sides import read_corpora, source_of
from robust_unlearning.errors import UserError
from robust_unlearning.methods.table import Preference
from robust_unlearning.models import checkpoint
from robust_unlearning.models.checkpoint import Checkpoint
from robust_unlearning.plan.meter import Flops
from robust_unlearning.recipe import Recipe, TextSource
from robust_unlearning.train.references import BLOCK

CHEAP_BYTES = 16 * 1024**2
"""Corpora larger than this in all are not read for a plan."""


@dataclass(frozen=True)
class Lengths:
    """The batches of one side (`forget`, `retain` or `refusals`) over a run.

    Attributes:
        widest: tokens of the widest batch's sequences, padding included.
        width: mean over the batches of their width, for what grows with the tokens.
        square: mean of the widths' squares, for attention.
        predicted: mean number of predicted tokens of a batch, padding left out, for the LM head.
        blocks: blocks of sequences that hold one of the run's, for what is computed once a run.
    """

    widest: int
    width: float
    square: float
    predicted: float
    blocks: int

    def mean_flops(self, widest: Flops) -> float:
        """FLOPs of a mean batch from those of the widest."""
        return widest.linear * self.width / self.widest + widest.attention * self.square / self.widest**2


def batch_lengths(recipe: Recipe, base: Checkpoint) -> tuple[dict[str, Lengths], str]:
    """The lengths of each side, and a sentence that says what they are taken from."""
    why = _not_cheap([source_of(recipe, topic, side) for topic in recipe.topics for side in _sides(recipe)])
    if not why:
        try:
            return _from_corpora(recipe, base), "lengths of the batches: from the corpora"
        except UserError as error:
            why = str(error)
    return upper_bounds(recipe), f"lengths of the batches: max_tokens, an upper bound ({why.rstrip('.')})"


def _sides(recipe: Recipe) -> list[str]:
    refuses = isinstance(recipe.spec, Preference) and recipe.spec.needs_refusals
    return ["forget", "retain", *(["refusals"] if refuses else [])]


def _not_cheap(sources: list[TextSource]) -> str:
    """Why these corpora are not read; nothing when they are."""
    total = 0
    for source in sources:
        if source.path.startswith(HUB) or source.format == "hub":
            return f"{source.path} is a data set of the hub"
        try:
            path = files.locate(source.path)
        except UserError:
            return f"{source.path} is not here"
        if path.is_dir():
            return f"{source.path} is a folder"
        total += path.stat().st_size
    return "" if total <= CHEAP_BYTES else f"the corpora hold {total / 2**20:,.0f} MiB"


def _from_corpora(recipe: Recipe, base: Checkpoint) -> dict[str, Lengths]:
    tokenizer = checkpoint.load_tokenizer(base)
    lengths, sides = {}, _sides(recipe)
    corpora = {topic: read_corpora(recipe, topic, sides, tokenizer) for topic in recipe.topics}
    for side in sides:
        widths, predicted, blocks = [], [], 0
        for position, topic in enumerate(recipe.topics):
            corpus = corpora[topic][side]
            turns = len(range(position, recipe.steps, len(recipe.topics)))
            batches = [corpus.row_indices(number) for number in range(turns)]
            blocks += len({index // BLOCK for indices in batches for index in indices})
            for indices in batches:
                rows = [len(corpus.row(index)) for index in indices]
                widths.append(max(rows))
                predicted.append(sum(rows) - sum(map(corpus.given, indices)))
        lengths[side] = _summary(widths, predicted, blocks)
    return lengths


def upper_bounds(recipe: Recipe) -> dict[str, Lengths]:
    """The lengths of each side if every sequence were as long as `max_tokens` lets it be."""
    turns = {topic: len(range(at, recipe.steps, len(recipe.topics))) for at, topic in enumerate(recipe.topics)}
    widths = [recipe.of_topic(topic, "max_tokens") for topic, count in turns.items() for _ in range(count)]
    predicted = [recipe.batch_size * (width - 1) for width in widths]
    return {side: _summary(widths, predicted, recipe.steps * recipe.batch_size) for side in _sides(recipe)}


def _summary(widths: list[int], predicted: list[int], blocks: int) -> Lengths:
    count = len(widths)
    square = math.fsum(width * width for width in widths) / count
    return Lengths(max(widths), sum(widths) / count, square, sum(predicted) / count, blocks)


def config_of(recipe: Recipe, config: Path | None) -> Checkpoint:
    """Where the config of the recipe's model lies; its weights need not be there.

    Args:
        config: a config in JSON, or a folder with a config.json, in place of the recipe's model.

    Raises:
        UserError: there is none, or it asks for code of its own and the recipe does not allow that.
    """
    path = Path(recipe.model).expanduser() if config is None else files.locate(config)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".gguf" or (config is None and not path.is_file()):
        try:
            return checkpoint.resolve(recipe.model, **recipe.model_options)
        except UserError as error:
            raise UserError(f"{error} A plan needs no weights: its config.json is enough, --config FILE.") from error
    described = files.read_json(path)
    if "auto_map" in described and not recipe.trust_remote_code:
        raise UserError(
            f"{path}: the model brings Python code of its own; read it, then set trust_remote_code=true if you "
            "trust it."
        )
    name = recipe.model if config is None else str(config)
    folder = path.parent if path.name == "config.json" else path  # transformers reads a config from either
    return Checkpoint(name=name, folder=folder, trust_remote_code=recipe.trust_remote_code)
