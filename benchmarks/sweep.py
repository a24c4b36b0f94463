"""Ten noise scales: one sweep, against ten runs of this library, against ten runs with two whole models.

    python benchmarks/sweep.py                      # SmolLM2-135M, the demo's texts
    python benchmarks/sweep.py --steps 2 --points 3

README.md beside this file says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from engine import HERE, machine, median_interval
from measure import Spec, make_recipe, two_model_step

from robust_unlearning import files

WARMUP = 1
"""Steps of every run, and of the sweep, that are not timed."""


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="bundled name, folder, GGUF file or hub id")
    parser.add_argument("--points", type=int, default=10, help="noise scales, the first of them none (default 10)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of every point (default 5)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of each side (default 4)")
    parser.add_argument("--tokens", type=int, default=96, help="longest sequence (default 96)")
    parser.add_argument("--layer", type=int, default=7, help="l (default 7)")
    parser.add_argument("--out", type=Path, help="JSON (default benchmarks/results/sweep-MODEL.json)")
    given = parser.parse_args()
    spec = Spec("ours", "rmu", given.model, None, given.layer, given.steps, given.batch, given.tokens, "cpu", 0.0)
    scales = [round(0.01 * index, 2) for index in range(given.points)]
    with tempfile.TemporaryDirectory() as temporary:
        record = measure(spec, scales, Path(temporary))
    out = given.out or HERE / "results" / f"sweep-{Path(given.model).stem}.json"
    files.write_json(out, record)
    print(f"{json.dumps(record['summary'], indent=2)}\nwritten to {out}")


def measure(spec: Spec, scales: Sequence[float], folder: Path) -> dict[str, Any]:
    """CPU and wall seconds of every timed step, and how far the sweep's weights are from the separate runs'.

    The points are gone through one by one, each with its separate run and its run with two models; the sweep's
    steps are taken in between, spread evenly, so that slow spells of the machine fall on all.
    """
    import torch

    from robust_unlearning.run.folder import RunFolder, environment
    from robust_unlearning.train.trainer import Trainer

    recipes = [replace_steps(make_recipe(spec, scale), spec.steps) for scale in scales]

    def trainer(name: str, chosen: Sequence[int]) -> Trainer:
        return Trainer([RunFolder.open(folder / name / str(index), recipes[index]) for index in chosen])

    together = trainer("sweep", range(len(scales)))
    sweep = [timed(together.advance, number, together.candidates) for number in range(WARMUP)]
    separate, plain, alone = [], [], []
    taken = 0
    for index in range(len(scales)):
        own = trainer("separate", [index])
        separate.append([timed(own.advance, step, own.candidates) for step in range(WARMUP + spec.steps)])
        alone.append(own.candidates[0])
        batches = [own.batches(step)[1:3] for step in range(WARMUP + spec.steps)]
        update = two_model_step(replace(spec, implementation="release"), recipes[index], torch.device("cpu"))
        plain.append([timed(update, forget.batch, retain.batch) for forget, retain in batches])
        del own, update  # their models go before the next ones come
        while taken * len(scales) < (index + 1) * spec.steps:
            number = WARMUP + taken
            sweep.append(timed(together.advance, number, together.candidates))
            taken += 1
        print(f"point {index + 1} of {len(scales)}", file=sys.stderr, flush=True)
    pairs = zip(together.candidates, alone, strict=True)
    apart = [(one.masters[key] - other.masters[key]).abs().max().item() for one, other in pairs for key in one.masters]
    seconds = {
        "sweep": np.array(sweep)[WARMUP:],  # [steps, (cpu, wall)]
        "separate": np.array(separate)[:, WARMUP:].sum(axis=0),  # all points of a step together
        "two_models": np.array(plain)[:, WARMUP:].sum(axis=0),
    }
    setting = {
        "model": spec.model, "points": len(scales), "noise_std": list(scales), "steps": spec.steps, "warmup": WARMUP,
        "batch": spec.batch, "tokens": spec.tokens, "layer": spec.layer, "load_average": os.getloadavg()[0],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }  # fmt: skip
    return {
        "setting": setting,
        "environment": {**environment("cpu"), **machine()},
        "summary": {
            kind: {
                "seconds_per_step_of_all_points": {
                    name: median_interval(each[:, column]) for name, each in seconds.items()
                },
                "sweep_over_separate": median_interval(seconds["sweep"][:, column] / seconds["separate"][:, column]),
                "sweep_over_two_models": median_interval(
                    seconds["sweep"][:, column] / seconds["two_models"][:, column]
                ),
            }
            for column, kind in enumerate(("cpu", "wall"))
        }
        | {"greatest_difference_of_weights": max(apart)},
        "seconds": {name: each.tolist() for name, each in seconds.items()},
    }


def replace_steps(recipe: Any, steps: int) -> Any:
    """The recipe with so many timed steps, logged at the last only."""
    return recipe.model_copy(update={"steps": WARMUP + steps, "log_every": WARMUP + steps})


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """CPU seconds of this process, and seconds of the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    work(*arguments)
    return time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    main()
