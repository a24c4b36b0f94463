"""How often the rules of verdicts err where there is no effect, and how often they find one that is there.

    python benchmarks/verdicts.py                      # all worlds, 1, 3, 5 and 10 seeds; minutes on one core
    python benchmarks/verdicts.py --runs 200 --to /tmp/rates.json

Answers are drawn, not models: a change of each question, of each method, in each training seed, made of what seeds,
entities, words and questions add. The rules are the ones of the reports: `Effect`, `complete` and `whole` of
`reproduce.verdicts`, the matching of `experiments.matched`, `stats.means` for small samples. The rates that a report
prints are those of its own file, `assets/reproduce/error-rates.json`, written here by default.

With fewer seeds than an interval needs, a verdict is of these models and no others: there the worlds give all seeds
of a method one mean, so that an effect that these models do not have is none.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robust_unlearning import files
from robust_unlearning.experiments.matched import effect_of, match, rising
from robust_unlearning.reproduce import paper
from robust_unlearning.reproduce.verdicts import Outcome, complete, whole
from robust_unlearning.stats.effects import Effect
from robust_unlearning.stats.estimates import Array, Estimate, accuracy
from robust_unlearning.stats.factors import FEWEST_SEEDS, Groups
from robust_unlearning.stats.means import mean_interval
from robust_unlearning.stats.ratios import mean_excess

SEEDS = (1, 3, 5, 10)
METHODS = 9
MORE = {"a row": 5, "the claim, nine methods: RNA": 3}
"""How a rule's name begins -> how many times more often it is drawn: most rests on these."""
ENTITIES, EACH, WORDS = 64, 3, 32
"""As in the planted world: 192 perturbed questions, 3 about each of 64 entities, with one of 32 words in them."""


@dataclass(frozen=True)
class World:
    """Standard deviations of what a change of accuracy is made of, in shares.

    Attributes:
        seed: of training seeds; half of the variance is shared by all methods of a seed.
        entity, word: of entities and words, the same in all seeds; half shared by all methods.
        question: of everything else.
        words: how many words there are.
    """

    seed: float
    entity: float
    word: float
    question: float = 0.35
    words: int = WORDS


WORLDS = {
    "seeds differ most": World(0.10, 0.10, 0.05),
    "entities differ most": World(0.02, 0.35, 0.05),
    "words differ most": World(0.02, 0.10, 0.25),
    "questions differ most": World(0.01, 0.02, 0.02),
    "words differ most, and are four": World(0.02, 0.10, 0.25, words=4),
}


def normal(rng: np.random.Generator, sd: float, *shape: int) -> Array:
    """Normal numbers for methods (the first axis), half of the variance shared by all of them."""
    shared = rng.normal(size=(1, *shape[1:]))
    return sd * (shared + rng.normal(size=shape)) / np.sqrt(2)


def effects(rng: np.random.Generator, world: World, seeds: int, means: Array) -> list[Effect]:
    """An effect for each method, `means` [methods] in expectation."""
    n, methods = ENTITIES * EACH, len(means)
    entity, word = np.repeat(np.arange(ENTITIES), EACH), rng.permutation(np.arange(n) % world.words)
    of_seed = normal(rng, world.seed, methods, seeds) if seeds >= FEWEST_SEEDS else np.zeros((methods, seeds))
    of_question = (
        normal(rng, world.entity, methods, ENTITIES)[:, entity] + normal(rng, world.word, methods, world.words)[:, word]
    )
    rest = rng.normal(size=(methods, seeds, n)) * world.question
    changes = means[:, None, None] + of_seed[:, :, None] + of_question[:, None] + rest
    groups = Groups(entity, word)
    return [Effect(dict(enumerate(rows)), groups) for rows in changes]


def claim_words(claim: str, rows: list[Outcome]) -> str:
    """The word for one claim among complete rows."""
    return whole([each for each in complete(rows) if each.claim == claim]).finding


Draw = Callable[[np.random.Generator, World, int], str]


def rows_of(claim: str, means: Array) -> Draw:
    """A whole claim over methods with these mean changes."""

    def draw(rng: np.random.Generator, world: World, seeds: int) -> str:
        found = effects(rng, world, seeds, means)
        return claim_words(claim, [Outcome(claim, str(index), each) for index, each in enumerate(found)])

    return draw


def row_of(claim: str, mean: float) -> Draw:
    """A single row."""

    def draw(rng: np.random.Generator, world: World, seeds: int) -> str:
        return Outcome(claim, "", effects(rng, world, seeds, np.array([mean]))[0]).finding

    return draw


GAINS = np.array([paper.PERTURBED_RNA[2][title] - paper.PERTURBED[2][title] for title in paper.METHODS]) / 100
"""What RNA won back in the paper, by method (Table 2)."""
NONE = np.zeros(METHODS)
# rule -> (draws without effect, words that are false then, draws with the effect of the paper, the word that is true)
RULES: dict[str, tuple[Draw, tuple[str, ...], Draw, str]] = {
    "a row: RNA wins accuracy back": (
        row_of("recovers", 0.0), ("holds", "does not hold"), row_of("recovers", float(GAINS.mean())), "holds"),
    "the claim, nine methods: RNA wins accuracy back": (
        rows_of("recovers", NONE), ("holds", "does not hold", "mixed"), rows_of("recovers", GAINS), "holds"),
    "the claim, nine methods: accuracy stays within 5 points": (
        rows_of("keeps-forgetting", NONE + 0.05), ("holds",), rows_of("keeps-forgetting", NONE), "holds"),
}  # fmt: skip


CURVES: dict[str, Callable[[Array], Array]] = {
    "-f²": lambda f: -(f**2) / 2,
    "-√f": lambda f: -np.sqrt(f),
    "straight": lambda f: -0.6 * f,
    "steep in the middle": lambda f: -1 / (1 + np.exp(-6 * (f - 1))),
    "a cliff": lambda f: -1 / (1 + np.exp(-12 * (f - 0.7))),
    "with a kink": lambda f: -np.maximum(0.0, f - 0.8),
}
LINES = {
    "seven snapshots": (30, 40, 50, 60, 70, 80, 100),
    "four snapshots": (50, 70, 85, 100),
}
"""Steps after which a run is scored, as `reproduce tiny` has them for the two families."""


def mends(curve: str, steps: tuple[int, ...], cure: float) -> Draw:
    """RNA against none on one curve of harm over forgetting, RNA slower and less harmful by `cure` nats.

    Each draw has its own speed, end and pace of the forgetting; questions are the same in all seeds of a draw.
    """
    harm_at, at = CURVES[curve], np.array(steps)

    def draw(rng: np.random.Generator, world: World, seeds: int) -> str:
        n, m = ENTITIES * EACH, 96
        entity, of_forget = np.repeat(np.arange(ENTITIES), EACH), np.repeat(np.arange(m // EACH), EACH)
        forget, harm = 0.3 * rng.normal(size=m // EACH)[of_forget], 0.5 * rng.normal(size=ENTITIES)[entity]
        speed, end, middle, pace = rng.uniform((0.7, 1.5, 45, 5), (1.0, 4.0, 85, 12))

        def line(own_speed: float, less: float) -> list[tuple[Array, Array]]:
            true = end / (1 + np.exp(-(at * own_speed * rng.normal(1, 0.02) - middle) / pace))
            noise = 0.2 * rng.normal(size=(len(at), m + n))
            return [
                (value * (1 + forget) + each[:m], (harm_at(np.array(value)) + less) * (1 + harm) + each[m:])
                for value, each in zip(true, noise, strict=True)
            ]

        def counted(points: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
            return [points[index] for index in rising([float(each.mean()) for each, _ in points])]

        found = {}
        for seed in range(seeds):
            plain = counted([(np.zeros(m), np.zeros(n)), *line(1.0, 0.0)])
            found[seed] = [each for model in counted(line(speed, cure)) if (each := match(model, plain))]
        effect = effect_of(found, Groups(entity), Groups(of_forget))
        return Outcome("mends", "", effect).finding if effect else "no match"

    return draw


def answers(drop: float, claim: str) -> Draw:
    """Answers right or wrong: a few of 192 questions are lost, the same in all seeds, and none is won."""

    def draw(rng: np.random.Generator, world: World, seeds: int) -> str:
        lost = -(rng.random(ENTITIES * EACH) < drop).astype(float)
        effect = Effect(dict.fromkeys(range(seeds), lost), Groups(np.repeat(np.arange(ENTITIES), EACH)), answers=True)
        return Outcome(claim, "", effect).finding

    return draw


def ngrams(effect: float) -> Draw:
    """Ten n-grams of each class in 1,000 questions; n-grams differ by 0.3 nats, questions by 1."""

    def draw(rng: np.random.Generator, world: World, seeds: int) -> str:
        grams = rng.integers(10, size=(2, 500))
        values = rng.normal(size=(2, 10))[[[0], [1]], grams] * 0.3 + rng.normal(size=(2, 500)) + [[0.0], [effect]]
        least, most = (mean_interval(row, Groups(words=words)) for row, words in zip(values, grams, strict=True))
        parts = (*least.parts, *most.parts)
        difference = Estimate((most.value or 0.0) - (least.value or 0.0), n=1000, parts=parts).at(0.95)
        return Outcome("similarity", "", difference).finding

    return draw


def theorem(means: Array) -> Draw:
    """A claim on every case: probabilities less the theorem's, eight rows of 64 questions in one model."""

    def draw(rng: np.random.Generator, world: World, seeds: int) -> str:
        rows = [mean_interval(mean + rng.normal(0, 0.3, 64)) for mean in means]
        return claim_words("rejection", [Outcome("rejection", str(index), row) for index, row in enumerate(rows)])

    return draw


def pairs(ratio: float) -> Draw:
    """RNA's time over none in eight pairs of runs, whose log ratios vary by 4 %."""

    def draw(rng: np.random.Generator, world: World, seeds: int) -> str:
        return Outcome("free", "", mean_excess(np.log(ratio) + rng.normal(0, 0.04, 8))).finding

    return draw


def small_samples(runs: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """How often an interval of a mean covers it, of a few values."""
    for name, of, mean in (
        ("normal", lambda size: rng.normal(size=size), 0.0),
        ("skewed (exponential)", lambda size: rng.exponential(size=size), 1.0),
    ):
        for n in (6, 8, 12, 30):
            ends = [(each.low, each.high) for each in (mean_interval(of(n)) for _ in range(runs))]
            covered = [float(low <= mean <= high) for low, high in ends]
            yield {"values": name, "n": n, "covered": accuracy(covered).as_dict()}


def rate(
    draw: Draw, words: tuple[str, ...], world: World, seeds: int, runs: int, seed: int
) -> tuple[Any, Counter[str]]:
    """How often one of `words` comes out, with Wilson's interval, and how often each word does."""
    rng = np.random.default_rng([seed, seeds, *map(ord, repr(world)[:20])])
    counts = Counter(draw(rng, world, seeds) for _ in range(runs))
    hits = sum(counts[word] for word in words)
    return accuracy([1.0] * hits + [0.0] * (runs - hits)), counts


def simulate(runs: int) -> dict[str, Any]:
    """All rates."""
    rows = []

    def add(rule: str, world: str, seeds: int, null: Draw, false: tuple[str, ...], there: Draw, true: str) -> None:
        of = WORLDS.get(world, World(0, 0, 0))
        draws = runs * next((times for begin, times in MORE.items() if rule.startswith(begin)), 1)
        wrong, null_words = rate(null, false, of, seeds, draws, 1)
        found, words = rate(there, (true,), of, seeds, draws, 2)
        rows.append(
            {"rule": rule, "world": world, "seeds": seeds, "false": wrong.as_dict(), "found": found.as_dict()}
            | {"words_without_effect": dict(null_words), "words_with_effect": dict(words)}
        )
        print(f"{rule}; {world}; {seeds} seeds: false {wrong}, found {found}", flush=True)

    for rule, (null, false, there, true) in RULES.items():
        for world in WORLDS:
            for seeds in SEEDS:
                add(rule, world, seeds, null, false, there, true)
    for curve, (line, steps), seeds in itertools.product(CURVES, LINES.items(), (1, 3, 5)):
        false = ("holds", "does not hold")
        null, there = mends(curve, steps, 0.0), mends(curve, steps, 0.3)
        add("RNA mends at like forgetting", f"{curve}, {line}", seeds, null, false, there, "holds")
    for seeds in (1, 3):
        null, there = answers(0.05, "keeps-forgetting"), answers(0.005, "keeps-forgetting")
        add("a row: stays within 5 points, few answers lost", "192 questions", seeds, null, ("holds",), there, "holds")
    add("n-grams, most less least similar", "ten n-grams a class", 1, ngrams(0.0), ("holds", "does not hold"),
        ngrams(-0.5), "holds")  # fmt: skip
    eight = np.zeros(8)
    add("a claim on every case: within 0.1 of the theorem", "eight rows, 64 questions", 1, theorem(eight + 0.1),
        ("does not hold",), theorem(eight + 0.3 * (np.arange(8) == 0)), "does not hold")  # fmt: skip
    add("RNA costs no time", "eight pairs of runs", 1, pairs(1.05), ("holds",), pairs(1.0), "holds")
    samples = list(small_samples(runs, np.random.default_rng(3)))
    return {"runs": runs, "rates": rows, "small_samples": samples}


def main() -> None:
    """Simulate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1000, help="draws of each rate")
    parser.add_argument("--to", type=Path, default=files.package_dir() / "assets/reproduce/error-rates.json")
    given = parser.parse_args()
    files.write_json(given.to, simulate(given.runs))


if __name__ == "__main__":
    main()
