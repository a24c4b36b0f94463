"""The planner against measurement: predicted peak memory and the peak that a run records, each in a fresh process.

    python benchmarks/planner.py                      # smollm2/rmu and smollm2/npo-kl, in float32 and bfloat16
    python benchmarks/planner.py --recipes tiny/rmu --steps 4

On a CPU the peak is the process's resident set (`run.json`, `peak_memory`), loading included. The ratio is
prediction over measurement. With each goes the command's time to plan. Llama-3-70B and Llama-3.1-405B are planned
from their configs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import machine

from robust_unlearning import files

HERE = Path(__file__).resolve().parent
LARGE = {
    "llama-3-70b": ("paper/zephyr-7b-rmu", "paper/zephyr-7b-npo-kl"),
    "llama-3.1-405b": ("paper/zephyr-7b-rmu",),
}
"""Configs that are planned only, with the recipes whose settings they take."""


def unlearn(*words: str) -> tuple[str, float]:
    """What the command printed, and its seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "robust_unlearning", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout, time.perf_counter() - began


def compare(recipe: str, dtype: str, steps: int) -> dict[str, Any]:
    """A recipe's planned and measured peak, in bytes, on the CPU."""
    words = [recipe, f"dtype={dtype}", f"steps={steps}", "device=cpu"]
    printed, seconds = unlearn("plan", *words, "--json")
    plan = json.loads(printed)
    with tempfile.TemporaryDirectory() as folder:
        unlearn("run", *words, "--out", folder)
        record = files.read_json(Path(folder) / "run.json")
    measured = record["peak_memory"]["resident_bytes"]
    return {
        "recipe": recipe,
        "dtype": dtype,
        "steps": steps,
        "predicted_bytes": plan["peak_bytes"],
        "measured_bytes": measured,
        "ratio": plan["peak_bytes"] / measured,
        "peak_phase": plan["peak_phase"],
        "parts": plan["memory"],
        "flops_per_step": sum(plan["flops"].values()),
        "achieved_flops_per_second": steps * sum(plan["flops"].values()) / record["seconds"]["train"],
        "planning_seconds": seconds,
        "environment": record["environment"],
    }


def large(config: str, recipe: str) -> dict[str, Any]:
    """The plan of a model that is not here."""
    words = [recipe, "device=cuda", "--config", str(HERE / "configs" / f"{config}.json"), "--json"]
    printed, seconds = unlearn("plan", *words)
    return {"config": config, "recipe": recipe, "planning_seconds": seconds, "plan": json.loads(printed)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Planned against measured peak memory.")
    parser.add_argument("--recipes", nargs="+", default=["smollm2/rmu", "smollm2/npo-kl"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=20, help="of each run (default 20)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "planner.json")
    given = parser.parse_args(arguments)
    compared = []
    for recipe in given.recipes:
        for dtype in given.dtypes:
            row = compare(recipe, dtype, given.steps)
            compared.append(row)
            predicted, measured = row["predicted_bytes"] / 2**20, row["measured_bytes"] / 2**20
            print(
                f"{recipe:<16} {dtype:<9} predicted {predicted:,.0f} MiB ({row['peak_phase']}), measured "
                f"{measured:,.0f} MiB, ratio {row['ratio']:.3f} (n=1 run of {given.steps} steps)",
                flush=True,
            )
    planned = [large(config, recipe) for config, recipes in LARGE.items() for recipe in recipes]
    for row in planned:
        print(f"{row['config']:<16} {row['recipe']}: planned in {row['planning_seconds']:.0f} s")
    files.write_json(given.out, {"machine": machine(), "compared": compared, "planned": planned})
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
