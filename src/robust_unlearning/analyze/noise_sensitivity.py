"""Noise sensitivity of a model's layers (Appendix C, Eq. 33): how much noise at a layer's input shows behind it.

The paper writes, for layer g with Jacobian J_g and ξ ~ N(0, I),

    S = E_ξ E_z ‖J_g(z + ξ) − J_g(z)‖² / ‖J_g(z)‖²

and "J_g is the Jacobian of layer g at input z". That can be read in two ways, and both are measured here:

- `applied`: the Jacobian at z, applied to z + ξ and to z: ‖Jξ‖² / ‖Jz‖². It is the noise sensitivity of Arora et
  al. 2018, whom the paper cites, for a layer replaced by its linear map; E_ξ ‖Jξ‖² = ‖J‖_F².
- `moved`: the Jacobian at z + ξ less the Jacobian at z: ‖J(z + ξ) − J(z)‖_F² / ‖J(z)‖_F². It is 0 for a linear map.

Either norm is estimated from Jacobian-vector products with K Gaussian probes v ~ N(0, I), since
‖A‖_F² = E ‖Av‖² (Hutchinson), and E ‖Jξ‖² with them, since ξ is such a probe; no Jacobian is formed. z is a
document's whole sequence of hidden states [t, d], as attention ties its tokens together, and each document gives one
ratio.

Shapes: b documents, t tokens, d width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_unlearning.analyze.derivatives import Function, gaussian, jvp, squares
from robust_unlearning.analyze.inputs import batches
from robust_unlearning.analyze.output import Panel, Report, side
from robust_unlearning.analyze.stack import Stack
from robust_unlearning.analyze.variants import Variants
from robust_unlearning.report.tables import Table
from robust_unlearning.stats.estimates import Array, Estimate
from robust_unlearning.stats.means import mean_interval, paired_difference


@dataclass(frozen=True)
class Probed:
    """A layer's answer to noise, one number a document [b].

    Attributes:
        applied: ‖Jξ‖² / ‖Jz‖².
        moved: ‖J(z + ξ) − J(z)‖_F² / ‖J(z)‖_F².
        gain: ‖J‖_F / √(tokens · d): how much longer a random direction comes out of the layer.
        norm: mean L2 norm of the layer's input over tokens.
    """

    applied: Tensor
    moved: Tensor
    gain: Tensor
    norm: Tensor


def probe(layer: Function, at: Tensor, mask: Tensor, probes: int, std: float, generator: torch.Generator) -> Probed:
    """Noise sensitivity of one layer at inputs `at` [b, t, d]; `mask` [b, t] is 1 on tokens.

    Args:
        layer: [b, t, d] -> [b, t, d'].
        probes: K, draws of ξ and of the direction v that the Jacobians are compared along.
        std: of ξ; 1 in the paper. `applied` grows with its square.
    """
    whole = squares(jvp(layer, at, at * mask[..., None]), mask)
    moved, jacobian = torch.zeros_like(whole), torch.zeros_like(whole)
    for _ in range(probes):
        noise, direction = std * gaussian(at, mask, generator), gaussian(at, mask, generator)
        here = jvp(layer, at, direction)
        jacobian += squares(here, mask)
        moved += squares(jvp(layer, at + noise, direction) - here, mask)
    tokens = mask.sum(dim=1)
    gain = (jacobian / probes / (tokens * at.shape[-1])).sqrt()
    norm = (at.norm(dim=-1) * mask).sum(dim=1) / tokens
    return Probed(std**2 * jacobian / probes / whole, moved / jacobian, gain, norm)


@dataclass(frozen=True)
class ProbeSettings:
    """What is probed: layers (None: all), probes a document, the noise's std, and the seed of both."""

    layers: Sequence[int] | None = None
    probes: int = 4
    std: float = 1.0
    seed: int = 0


def measure(stack: Stack, documents: Sequence[Sequence[int]], pad: int, settings: ProbeSettings) -> dict[int, Probed]:
    """Each layer's answer to noise on documents, numbers in the documents' order."""
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = list(stack.layers) if settings.layers is None else list(settings.layers)
    parts: dict[int, list[Probed]] = {index: [] for index in chosen}
    for batch in batches(documents, pad):
        trunk = stack.trunk(batch)
        inputs = [trunk.hidden, *stack.states(trunk)]
        for index in chosen:
            layer = partial(stack.call, trunk, index)
            parts[index].append(probe(layer, inputs[index], trunk.mask, settings.probes, settings.std, generator))
    return {index: _joined(of_layer) for index, of_layer in parts.items()}


def _joined(parts: Iterable[Probed]) -> Probed:
    columns = zip(*((part.applied, part.moved, part.gain, part.norm) for part in parts), strict=True)
    return Probed(*(torch.cat(column).cpu().double() for column in columns))


COLUMNS = {
    "layer": "layer",
    "target": "model",
    "applied": "‖Jξ‖²/‖Jz‖²",
    "applied_change": "against base",
    "moved": "‖J(z+ξ)−J(z)‖²/‖J(z)‖²",
    "moved_change": "against base",
    "gain": "gain of J",
    "norm": "‖z‖ a token",
    "n": "n",
}


def analyse(
    variants: Variants, documents: Sequence[Sequence[int]], settings: ProbeSettings, tick: Callable[[str], None]
) -> Report:
    """Measure every model on the same documents with the same draws, and compare each with the base.

    Args:
        tick: called with the name of each model when it begins.
    """
    stack = Stack(variants.model)
    rows, thirds, base = [], [], None
    for variant in variants.all:
        tick(variant.name)
        with variant.applied(variants.model):
            probed = measure(stack, documents, variants.pad, settings)
        base = base or probed
        for layer, answer in probed.items():
            rows.append(_row(layer, variant.name, answer, base[layer] if variant.delta is not None else None))
        if variant.delta is not None and settings.layers is None:
            thirds += _thirds(variant.name, probed, base)
    rows.sort(key=lambda row: row["layer"])
    notes = [
        f"ξ ~ N(0, {settings.std:g}² I); {settings.probes} probes a document, {len(documents)} documents, 95 % "
        "intervals over documents (they hold the probes' error too). Two readings of Eq. 33, see the module. A layer's "
        "input is the output of the layer before it; layers count from 0. Against base: the ratio to the base's, less "
        "1, mean over documents.",
        "Where the gain of J stays as it is, the first reading falls as ‖z‖² grows, and says no more than that.",
    ]
    names = [variant.name for variant in variants.all if variant.delta is not None]
    panels = []
    for reading in ("applied", "moved") if names else ():
        title, field = COLUMNS[reading], f"{reading}_change"
        lines = {name: [(row["layer"], row[field]) for row in rows if row["target"] == name] for name in names}
        panels.append(Panel(f"{title}\nagainst the base (0 is the same, −1 is none left)", lines))
        counts = "; ".join(f"{name}: {_counted(points)}" for name, points in lines.items())
        notes.append(f"The paper expects unlearned models below the base. By {title}: {counts}.")
    about = {
        **variants.about,
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "probes": settings.probes,
        "noise_std": settings.std,
        "seed": settings.seed,
    }
    tables = [Table("By layer", COLUMNS, rows, key="layers")]
    if thirds:
        tables.append(Table("Where it falls most: the middle third of the layers", THIRDS, thirds, key="thirds"))
        notes.append(
            "The paper sees the greatest falls in the middle layers (Figure 7, right). By thirds of the layers: mean "
            "ln of the ratio to the base's over the middle third less that over another third, document by document; "
            "below 0 it falls more in the middle."
        )
    return Report("noise-sensitivity", "Noise sensitivity (Eq. 33)", about, notes, tables, panels, "layer")


THIRDS = {"target": "model", "reading": "reading", "against": "against the", "difference": "difference of ln", "n": "n"}
READINGS = {field: COLUMNS[field] for field in ("applied", "moved")}


def _thirds(name: str, probed: Mapping[int, Probed], base: Mapping[int, Probed]) -> list[dict[str, Any]]:
    """Both readings, the middle third of L layers against the last and the first; third ⌊3 i / L⌋ for layer i.

    None where a ratio is 0, or for fewer than three layers.
    """
    rows: list[dict[str, Any]] = []
    for field, reading in READINGS.items() if len(probed) > 2 else ():
        by_third: dict[int, list[Array]] = {}
        for layer, answer in probed.items():
            ratio = (getattr(answer, field) / getattr(base[layer], field)).numpy()
            with np.errstate(divide="ignore"):
                by_third.setdefault(3 * layer // len(probed), []).append(np.log(ratio))
        first, middle, last = (np.mean(by_third[third], axis=0) for third in range(3))
        for against, other in (("last third", last), ("first third", first)):
            if np.isfinite(middle - other).all():
                about = {"target": name, "reading": reading, "against": against, "n": len(middle)}
                rows.append({**about, "difference": paired_difference(middle, other)})
    return rows


def _row(layer: int, name: str, answer: Probed, base: Probed | None) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer, "target": name, "n": len(answer.applied)}
    for field in ("applied", "moved", "gain", "norm"):
        row[field] = mean_interval(getattr(answer, field).numpy())
    for field in ("applied", "moved"):
        change = None if base is None else getattr(answer, field) / getattr(base, field) - 1
        row[f"{field}_change"] = None if change is None else mean_interval(change.numpy())
    return row


def _counted(points: Sequence[tuple[float, Estimate]]) -> str:
    """At how many layers a model is lower than the base, higher, the same, or neither clearly."""
    counts = Counter(side(change) for _, change in points)
    return ", ".join(f"{word} at {n} of {len(points)} layers" for word, n in counts.items())
