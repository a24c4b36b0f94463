"""The plan of a teaching: the world, the lessons, the student and the optimisation. Two plans are shipped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from robust_unlearning.files import shipped_or_own
from robust_unlearning.planted.lessons import Curriculum
from robust_unlearning.planted.world import Part, WorldSize
from robust_unlearning.recipe import Strict, checked


class Start(Strict):
    """What is taught first: a part of the world or some kinds of lesson, until the model answers questions."""

    asked: Literal["letters", "texts", "cloze"] = Field("letters", description="the style of the questions")
    until: float = Field(0.9, ge=0, le=1, description="share of the part's questions to be answered")
    steps: int = Field(12000, ge=1, description="at most; after so many it goes on with the whole world all the same")
    fade: int = Field(1, ge=1, description="steps in which they give way to lessons of the whole world")
    part: Part
    curriculum: Curriculum


class TeachingPlan(Strict):
    """What is taught, to whom, and how long. `base: null` stands for a model made from nothing."""

    base: str | None = Field(None, description="a model to teach through a LoRA adapter")
    rank: int = Field(8, ge=1, description="of the adapter")
    width: int = Field(128, ge=32, multiple_of=32, description="of a model made from nothing")
    layers: int = Field(8, ge=1)
    world: WorldSize = WorldSize()
    curriculum: Curriculum = Curriculum()
    start: Start | None = None
    steps: int = Field(5000, ge=1, description="after the start, if there is one")
    batch_size: int = Field(24, ge=1, description="lessons a step")
    learning_rate: float = Field(1.5e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(200, ge=1)
    cooldown: float = Field(0.4, ge=0, le=1, description="share of the steps over which the rate falls to nothing")
    seed: int = Field(0, ge=0)
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen base")
    device: str = "auto"
    check_every: int = Field(250, ge=1, description="steps between exams of a sample, and between saved states")


def load_teaching_plan(name: str, overrides: Iterable[str] = ()) -> TeachingPlan:
    """A shipped plan (`tiny`, `smollm2`), or a YAML file of the user's own, with `field=value` overrides.

    Raises:
        UserError: no such plan, or fields that are unknown or wrong; all of them in one message.
    """
    data = shipped_or_own("plan", name, "assets/planted/plans", "curriculum, steps and others")
    return checked(TeachingPlan, data, overrides, f"plan {name}")
