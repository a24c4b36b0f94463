"""Time and memory of a training step: this library's engine against two whole models (`two_model.py`).

    python benchmarks/engine.py --model smollm2-135m
    python benchmarks/engine.py --shape zephyr-7b

Each implementation runs in a child process of its own (`measure.py`), one after the other, in interleaved
rounds; README.md beside this file says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from measure import FIRST, METHODS, RNA, SHAPES, Spec, work

from robust_unlearning import files

HERE = Path(__file__).resolve().parent
IMPLEMENTATIONS = {"rmu": ("ours", "release", "frozen"), "npo-kl": ("ours", FIRST, "release", "frozen")}
ROUNDS = 3
RESAMPLES = 4000


def median_interval(values: Sequence[float] | np.ndarray) -> dict[str, float | int]:
    """Median with the 95 % percentile interval of a bootstrap over the values, and their count."""
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.quantile(np.median(data[drawn], axis=1), [0.025, 0.975])
    return {"median": float(np.median(data)), "low": float(low), "high": float(high), "n": len(data)}


def summarise(rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """The table's numbers from every child's measurements; ratios of time pair steps on equal batches."""
    kind = "gpu_peak" if "gpu_peak" in rounds[0]["ours"]["memory"] else "peak"
    names = [name for name in rounds[0] if name != RNA]
    pooled = {name: np.concatenate([each[name]["seconds"][0] for each in rounds]) for name in names}
    tokens = np.concatenate([each["ours"]["tokens"] for each in rounds])
    peaks = {name: [each[name]["memory"][kind] for each in rounds] for name in names}
    summary: dict[str, Any] = {"memory_kind": kind, "implementations": {}}
    for name in names:
        summary["implementations"][name] = {
            "seconds_per_step": median_interval(pooled[name]),
            "round_medians": [float(np.median(each[name]["seconds"][0])) for each in rounds],
            "tokens_per_second": median_interval(tokens / pooled[name]),
            "time_ratio_to_ours": median_interval(pooled[name] / pooled["ours"]),
            "peak_bytes": {"max": max(peaks[name]), "min": min(peaks[name]), "n": len(rounds)},
            "after_import_bytes": max(each[name]["memory"]["after_import"] for each in rounds),
            "memory_ratio_to_ours": max(peaks[name]) / max(peaks["ours"]),
            "first_losses": rounds[0][name]["first_losses"][0],
        }
    pairs = [np.asarray(each[RNA]["seconds"]) for each in rounds]
    summary["rna_overhead_percent"] = median_interval(
        np.concatenate([100 * (noisy - plain) / plain for plain, noisy in pairs])
    )
    return summary


def table(record: dict[str, Any]) -> str:
    """The record as plain text."""
    setting, summary = record["setting"], record["summary"]
    gpu = summary["memory_kind"] == "gpu_peak"

    def interval(entry: dict[str, Any], digits: int) -> str:
        median, low, high = (f"{entry[key]:,.{digits}f}" for key in ("median", "low", "high"))
        return f"{median} ({low} to {high})"

    rows = [("", "s/step", "time / ours", "tokens/s", "peak MiB", "peak / ours", "after import MiB")]
    for name, each in summary["implementations"].items():
        peak = each["peak_bytes"]
        rows.append(
            (
                name,
                interval(each["seconds_per_step"], 4),
                interval(each["time_ratio_to_ours"], 2),
                interval(each["tokens_per_second"], 0),
                f"{peak['max'] / 2**20:,.0f} (n = {peak['n']}, least {peak['min'] / 2**20:,.0f})",
                f"{each['memory_ratio_to_ours']:.2f}",
                "-" if gpu else f"{each['after_import_bytes'] / 2**20:,.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    count = summary["implementations"]["ours"]["seconds_per_step"]["n"]
    environment = record["environment"]
    lines = [
        f"{setting['method']}, {setting['shape'] or setting['model']}, layer {setting['layer']}, "
        f"batch {setting['batch']} of up to {setting['tokens']} tokens, {environment['device']}, "
        f"threads {environment['threads']}, torch {environment['torch']}, transformers {environment['transformers']}",
        f"medians over {count} steps ({ROUNDS} rounds of {setting['steps']}) with 95 % bootstrap intervals; "
        f"peak {'GPU memory allocated by torch' if gpu else 'resident set'}, the greatest of {ROUNDS} rounds",
        "",
        *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows),
        "",
        "forget loss, retain loss of the first 3 steps (not timed):",
    ]
    for name, each in summary["implementations"].items():
        steps = "   ".join(f"{forget:.6g}, {retain:.4g}" for forget, retain in each["first_losses"])
        lines.append(f"{name.ljust(widths[0])}  {steps}")
    overhead = summary["rna_overhead_percent"]
    lines += [
        "",
        f"RNA (noise_std {setting['noise_std']:g}) adds {interval(overhead, 2)} % to a step of ours "
        f"(median of {overhead['n']} paired differences)",
    ]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """The processor, and the commit of the checkout when git can tell it (`-dirty`: with changes)."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    found = [line.partition(":")[2].strip() for line in names if line.startswith("model name")]

    def git(*arguments: str) -> str | None:
        command = ["git", "--no-optional-locks", "-C", str(HERE), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    commit = git("rev-parse", "HEAD")
    dirty = commit is not None and bool(git("status", "--porcelain", "--", ".", "../src"))
    return {
        "processor": found[0] if found else platform.processor(),
        "cores": os.cpu_count(),
        "commit": f"{commit}-dirty" if dirty else commit,
    }


def run_child(spec: Spec) -> dict[str, Any]:
    """Measure `spec` in a child process (of this process's group, so that an interrupt reaches it too)."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "result.json"
        worker = ["--worker", json.dumps(asdict(spec)), "--out", str(out)]
        status = subprocess.run([sys.executable, str(Path(__file__).resolve()), *worker], check=False)
        if status.returncode:
            raise SystemExit(f"{spec.implementation}: its process ended with status {status.returncode}.")
        return files.read_json(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Time and memory of a training step.")
    parser.add_argument("--model", default="smollm2-135m", help="bundled name, folder, GGUF file or hub id")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, no checkpoint")
    parser.add_argument("--method", choices=METHODS, default="rmu")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each child (default 20)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of each side (default 4)")
    parser.add_argument("--tokens", type=int, help="longest sequence (default 96; the shape's with --shape)")
    parser.add_argument("--layer", type=int, default=7, help="l (default 7)")
    parser.add_argument("--noise-std", type=float, default=0.03, help="√ν of RNA (default 0.03)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="JSON (default benchmarks/results/MODEL.json)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        files.write_json(given.out, work(Spec(**json.loads(given.worker))))
        return
    if given.steps < 1:
        parser.error("--steps must be at least 1")
    tokens = given.tokens or (SHAPES[given.shape].tokens if given.shape else 96)
    fields = ("method", "model", "shape", "layer", "steps", "batch", "device", "noise_std")
    setting = {**{field: getattr(given, field) for field in fields}, "tokens": tokens}
    rounds: list[dict[str, Any]] = []
    for number in range(1, ROUNDS + 1):
        rounds.append({})
        for name in (*IMPLEMENTATIONS[given.method], RNA):
            result = rounds[-1][name] = run_child(Spec(implementation=name, **setting))
            median = np.median(result["seconds"][0])
            print(f"round {number}/{ROUNDS}  {name:<8} {median:.4f} s/step", file=sys.stderr, flush=True)
    environment = {**rounds[0]["ours"]["environment"], **machine()}
    record = {"setting": setting, "environment": environment, "summary": summarise(rounds), "rounds": rounds}
    suffix = "" if given.method == "rmu" else f"-{given.method}"
    out = given.out or HERE / "results" / f"{Path(given.shape or given.model).stem}{suffix}.json"
    files.write_json(out, record)
    print(f"{table(record)}\n\nwritten to {out}")


if __name__ == "__main__":
    main()
