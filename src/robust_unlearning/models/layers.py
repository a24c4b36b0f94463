"""Finding the decoder layers of any Hugging Face causal LM by structure, and its tensors by name pattern.

No architecture is named here: the decoder layers are the `ModuleList` whose length is the config's
`num_hidden_layers`. Layer indices count from 0, as in `model.layers[7]` and as in the paper's l = 7.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from robust_unlearning.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

Key = tuple[int, str]
"""A tensor inside the decoder layers: layer index, name inside the layer."""
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The dotted name of the list of decoder layers inside `model`, and the list itself.

    Raises:
        UserError: no list of modules has the length that the model's config gives.
    """
    from torch import nn

    config = getattr(model, "config", None)
    count = config.get_text_config().num_hidden_layers if config is not None else None
    lists = {name: each for name, each in model.named_modules() if isinstance(each, nn.ModuleList) and len(each)}
    fitting = {name: each for name, each in lists.items() if count is None or len(each) == count}
    # Several fit when, say, a layer holds as many experts: the outermost is the decoder's.
    for name in sorted(fitting, key=lambda each: each.count(".")):
        return name, fitting[name]
    seen = ", ".join(f"{name} ({len(each)})" for name, each in lists.items()) or "none"
    raise UserError(
        f"{type(model).__name__} has no list of {count} decoder layers; its module lists are: {seen}. "
        "Only decoder-only transformers of transformers are supported."
    )


def mlp(layer: nn.Module) -> nn.Module:
    """The feed-forward block of a decoder layer.

    Raises:
        UserError: the layer has no child of a known name.
    """
    for name in MLP_NAMES:
        block: nn.Module | None = getattr(layer, name, None)
        if block is not None:
            return block
    children = ", ".join(name for name, _ in layer.named_children())
    raise UserError(
        f"{type(layer).__name__} has no feed-forward block named one of {', '.join(MLP_NAMES)} "
        f"(its parts: {children}); use the site 'block' instead of 'mlp'."
    )


def check_layers(wanted: Iterable[int], count: int, field: str) -> None:
    """Raise a `UserError` unless every index in `wanted` names one of `count` layers."""
    wrong = [each for each in wanted if not 0 <= each < count]
    if wrong:
        raise UserError(f"{field}: the model has layers 0 to {count - 1}; given {', '.join(map(str, wrong))}.")


def trained_tensors(
    layers: nn.ModuleList | Mapping[int, nn.Module], chosen: Iterable[int], pattern: str
) -> dict[Key, Tensor]:
    """The parameters of the `chosen` layers that `pattern` selects, by layer and name inside it.

    `pattern` is `all`, or a shell pattern for the dotted name inside the layer, with or without the final
    `.weight`: `mlp.down_proj`, `mlp.*`, `self_attn.o_proj.weight`.

    Raises:
        UserError: nothing in a layer matches; the message names the nearest and all tensors of the layer.
    """
    tensors: dict[Key, Tensor] = {}
    for index in chosen:
        named = dict(layers[index].named_parameters())
        short = {name: name.removesuffix(".weight") for name in named}
        matching = [name for name in named if any(fnmatchcase(form, pattern) for form in (name, short[name]))]
        if not matching and pattern != "all":
            close = nearest(pattern, short.values())
            hint = f" did you mean {close!r}?" if close else ""
            raise UserError(
                f"train_tensors: {pattern!r} matches no tensor of {type(layers[index]).__name__};{hint} "
                f"Allowed: 'all' or a pattern over {', '.join(named)}."
            )
        tensors |= {(index, name): named[name] for name in (named if pattern == "all" else matching)}
    return tensors
