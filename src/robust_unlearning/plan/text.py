"""A plan as one reads it in a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from robust_unlearning.errors import UserError
from robust_unlearning.plan.plan import Change, Plan
from robust_unlearning.report.tables import text_table

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from `80GiB`, `24GB`, `512MiB` or a plain number.

    Raises:
        UserError: it is written otherwise.
    """
    written = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmgt]i?|)b?\s*", text.lower())
    count = int(float(written[1]) * _UNITS[written[2]]) if written else 0
    if count < 1:
        raise UserError(f"memory {text!r}: write a number and a unit, for example 80GiB, 24GB or 512MiB.")
    return count


def size(count: float) -> str:
    """Bytes with a binary unit."""
    if abs(count) < 1024:
        return f"{count:,.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if abs(count) < 1024:
            return f"{count:,.1f} {unit}"
    return f"{count / 1024:,.2f} TiB"


def flops(count: float) -> str:
    """Floating-point operations with a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(count) < 1000:
            return f"{count:,.1f} {prefix}FLOP"
        count /= 1000
    return f"{count:,.1f} EFLOP"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:,.2g} s" if seconds < 10 else f"{seconds:,.0f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def format_plan(plan: Plan, flops_per_second: float | None, bytes_per_second: float) -> str:
    """The plan as one aligned table, what it rests on above it.

    Args:
        flops_per_second: a sustained rate; None leaves seconds of computing out.
        bytes_per_second: of reading.
    """
    loaded, depth = plan.layers
    rest = "" if loaded == depth else ", the others are never read"
    points = "" if plan.points == 1 else f", {plan.points} candidates side by side"
    wide = ", ".join(f"{side} {each.width:.0f} (at most {each.widest})" for side, each in plan.lengths.items())
    head = [
        f"{plan.title} on {plan.model}, {plan.dtype} on {plan.device}",
        f"layers 0 to {loaded - 1} of {depth}{rest}; band {plan.band[0]} to {plan.band[1]}, {plan.trained:,} trained "
        "parameters",
        f"{plan.steps} steps{points}; mean length of a batch's sequences: {wide}",
        plan.lengths_from,
    ]
    rows: list[tuple[str, str]] = []
    rows += _section("read from disk", plan.read, size)
    if plan.again:
        rows.append(("  again, for fingerprints", size(plan.again)))
    rows += _section(f"memory, at its peak ({plan.peak_phase})", plan.memory[plan.peak_phase], size)
    others = {phase: sum(parts.values()) for phase, parts in plan.memory.items() if phase != plan.peak_phase}
    rows += [(f"  at {phase}", size(each)) for phase, each in others.items()]
    for phase, parts in plan.host.items():
        rows += _section(f"host memory, {phase}", parts, size)
    rows += _section("a step's FLOPs, mean of the run", plan.flops, flops)
    if plan.once:
        rows += _section("FLOPs once, unless an earlier run left them", plan.once, flops)
    rows.append((f"FLOPs of the run, {plan.steps} steps", flops(plan.total_flops)))
    rows += _section("disk", plan.disk, size)
    rows += _seconds(plan, flops_per_second, bytes_per_second)
    return "\n".join([*head, "", text_table(("part", "cost"), rows)])


def _section(title: str, parts: Mapping[str, float], unit: Callable[[float], str]) -> list[tuple[str, str]]:
    return [(title, unit(sum(parts.values()))), *((f"  {part}", unit(cost)) for part, cost in parts.items())]


def _seconds(plan: Plan, flops_per_second: float | None, bytes_per_second: float) -> list[tuple[str, str]]:
    found = plan.seconds(flops_per_second or float("inf"), bytes_per_second)
    rows = [(f"reading at {bytes_per_second / 1e9:g} GB/s", duration(found["reading"]))]
    if flops_per_second is not None:
        rate = f"{flops_per_second / 1e12:g} TFLOP/s sustained"
        rows.append((f"computing at {rate}", duration(found["once"] + found["steps"])))
        rows.append(("  a step", duration(found["steps"] / plan.steps)))
    return rows


def format_fit(plan: Plan, memory: int, ways: Sequence[Change]) -> str:
    """Whether the plan's peak fits into `memory` bytes, and what each change would come to."""
    share = f"{size(plan.peak)} of {size(memory)}"
    if plan.peak <= memory:
        return f"fits: {share}, {plan.peak / memory:.0%}"
    lines = [f"does not fit: {share}. Changes that lower it:"]
    for way in sorted(ways, key=lambda each: each.peak):
        if way.peak < plan.peak:
            lines.append(f"  {size(way.peak):>11}  {'fits' if way.peak <= memory else 'does not'}  {way.text}")
    return "\n".join(lines)
