"""Teaching a planted world to a model: lessons in, a checkpoint (or a LoRA adapter) with its log and exam out.

What is taught at a step depends only on the plan, the step's number and when the start was over, so a stopped
training continues as if it had not been stopped.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from robust_unlearning import files
from robust_unlearning.data.corpora import collate
from robust_unlearning.data.questions import STYLES, Asking, letters_prompt
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.likelihood import option_logprobs
from robust_unlearning.evaluate.suite import accuracy_score
from robust_unlearning.models import checkpoint
from robust_unlearning.planted.adapter import add_adapter, save_adapter
from robust_unlearning.planted.lessons import Curriculum, Lesson, distracted, lesson
from robust_unlearning.planted.students import make_tiny, make_tokenizer
from robust_unlearning.planted.teaching_plan import TeachingPlan
from robust_unlearning.planted.world import Entity, Role, World, make_world
from robust_unlearning.run.folder import environment
from robust_unlearning.stats.estimates import accuracy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOG, STATE, EXAM, PLAN = "log.jsonl", "state.pt", "exam.json", "plan.yaml"
BLOCK = 4
"""Batches drawn together and sorted by length, to save padding."""
SAMPLE = 64
"""Questions of each form in the exams between the first step and the last."""

_About = tuple[Sequence[Entity], Curriculum]
"""Whose facts are asked, and how the questions are distracted."""
_RETAINED: tuple[Role, ...] = ("near", "far", "control")
_CALM = Curriculum(option=0, front=0)
_FORMS: dict[str, tuple[tuple[Role, ...], Curriculum]] = {
    "forget/clean": (("forget",), _CALM),
    "retain/clean": (_RETAINED, _CALM),
    "retain/option": (_RETAINED, Curriculum(option=1, front=0)),
    "retain/front": (_RETAINED, Curriculum(option=0, front=1)),
}
"""Forms of the exam: roles of the domains whose facts are asked, and how the questions are distracted."""


def lessons_of(world: World, plan: TeachingPlan, step: int, started: int | None = 0) -> list[Lesson]:
    """The lessons of a step, counted from 0: of like length, drawn with the others of their block.

    Args:
        started: the step with which the start was over; None while it lasts.
    """
    rng = random.Random(f"{plan.seed} lessons {step // BLOCK}")
    taught = [(world, plan.curriculum)]
    left = 0.0
    if plan.start:
        taught.append((world.part(plan.start.part), plan.start.curriculum))
        left = 1 if started is None else 1 - (step // BLOCK * BLOCK - started) / plan.start.fade
    drawn = [lesson(*taught[rng.random() < left], rng) for _ in range(BLOCK * plan.batch_size)]
    drawn.sort(key=lambda parts: sum(len(part.text) for part in parts))
    order = rng.sample(range(BLOCK), BLOCK)
    start = order[step % BLOCK] * plan.batch_size
    return drawn[start : start + plan.batch_size]


def encode(lessons: list[Lesson], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids and loss weights, each [b, t], padded on the right; a token has the weight of the part it begins in."""
    rows, weights = [], []
    for parts in lessons:
        encoded = tokenizer("".join(part.text for part in parts), return_offsets_mapping=True, verbose=False)
        ends, end = [], 0
        for part in parts:
            end += len(part.text)
            ends.append((end, part.weight))
        row = [next(weight for end, weight in ends if last <= end) for _, last in encoded["offset_mapping"]]
        rows.append(encoded["input_ids"])
        weights.append(torch.tensor(row))
    return collate(rows, tokenizer.pad_token_id).ids, nn.utils.rnn.pad_sequence(weights, batch_first=True)


def lesson_loss(model: PreTrainedModel, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of -log p over tokens 1 to t - 1, in nats; tokens of weight 0 never reach the LM head.

    Pads stand on the right and have weight 0, so that no token sees one and no mask is needed.
    """
    wanted = weights[:, 1:] > 0
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, :-1][wanted]).float()
    losses = nn.functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
    counted = weights[:, 1:][wanted]
    return (losses * counted).sum() / counted.sum()


def exam(
    model: nn.Module, tokenizer: Any, world: World, sample: int | None = None, ask: Asking = letters_prompt
) -> dict[str, dict[str, Any]]:
    """Accuracy in questions from memory, by role, and distracted in every question of what is retained.

    Forms: `clean`; `option`, a wrong option replaced by an entity from anywhere; `front`, a name or a fact about
    another entity in front of the question. Distractions are those of the lessons, drawn anew.

    Args:
        sample: ask so many questions of each form, drawn evenly, instead of all.
        ask: the style of the questions.
    """
    return {
        name: _accuracy(model, tokenizer, world, name, (world.of_role(*roles), curriculum), sample, ask)
        for name, (roles, curriculum) in _FORMS.items()
    }


def _accuracy(
    model: nn.Module, tokenizer: Any, world: World, name: str, about: _About, sample: int | None, ask: Asking
) -> dict[str, Any]:
    """Accuracy in questions about the facts of some entities; what is drawn follows from the `name`."""
    entities, curriculum = about
    rng = random.Random(f"exam {name}")
    facts = [(entity, attribute) for entity in entities for attribute in entity.values]
    facts = rng.sample(facts, min(sample, len(facts))) if sample else facts
    questions = [distracted(world.question(*fact, rng), world, curriculum, rng) for fact in facts]
    prompts = [(text, [f" {option}" for option in options]) for text, options in map(ask, questions)]
    answers = option_logprobs(model, tokenizer, prompts)
    best = [max(range(4), key=lambda index: options[index][0]) for options in answers]
    right = [choice == question.answer for choice, question in zip(best, questions, strict=True)]
    return accuracy_score(accuracy(right))


@dataclass
class _Progress:
    """How far a teaching has come: what is saved beside weights and optimiser.

    Attributes:
        step: steps taken.
        started: the step with which the start was over; None while it lasts.
        seconds: since the first step, pauses left out.
        rows: of the log.
    """

    step: int
    started: int | None
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def over(self, plan: TeachingPlan) -> bool:
        """Whether the last step has been taken."""
        return self.started is not None and self.step == self.started + plan.steps


def teach(plan: TeachingPlan, out: Path, report: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Teach by a plan, writing the model (or the adapter), `log.jsonl` and `exam.json` into `out`.

    A folder that holds a training with the same plan is continued, or left as it is where that is finished.

    Returns:
        The record in `exam.json`: the exam over all questions, the plan, the world's fingerprint, seconds, the
        environment.

    Raises:
        UserError: the folder holds another plan's training, or the loss is not finite.
    """
    world = make_world(plan.world)
    ask = STYLES[plan.curriculum.style]
    device = checkpoint.pick_device(plan.device)
    model, tokenizer = _student(plan, world, device)
    out.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False)
    if (out / PLAN).exists() and (out / PLAN).read_text(encoding="utf-8") != text:
        raise UserError(f"{out} holds a training by another plan; give another --out, or remove it.")
    files.write_text(out / PLAN, text)
    if (out / EXAM).exists():
        return files.read_json(out / EXAM)

    taught = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimiser = torch.optim.AdamW(
        taught.values(),
        lr=plan.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=plan.weight_decay,
        fused=device.type != "mps",
    )
    progress = _load_state(out / STATE, model, optimiser) or _Progress(0, None if plan.start else 0)
    began, losses = time.perf_counter() - progress.seconds, []
    while not progress.over(plan):
        batch = encode(lessons_of(world, plan, progress.step, progress.started), tokenizer)
        loss = lesson_loss(model, *(part.to(device) for part in batch))
        if not loss.isfinite():
            raise UserError(
                f"the loss is {loss.item()} at step {progress.step + 1}: lower learning_rate and start again."
            )
        for group in optimiser.param_groups:
            group["lr"] = plan.learning_rate * _rate(plan, progress)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(taught.values(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        progress.step += 1
        if progress.step % plan.check_every == 0 or progress.over(plan):
            scores = {name: row["acc"] for name, row in exam(model, tokenizer, world, SAMPLE, ask).items()}
            if plan.start and progress.started is None:
                part = world.part(plan.start.part)
                about, start_ask = (part.entities, _CALM), STYLES[plan.start.asked]
                scores["start"] = _accuracy(model, tokenizer, part, "start", about, SAMPLE, start_ask)["acc"]
                if scores["start"] >= plan.start.until or progress.step >= plan.start.steps:
                    progress.started = progress.step
            progress.seconds = time.perf_counter() - began
            row = {"step": progress.step, "loss": sum(losses) / len(losses), "seconds": progress.seconds, **scores}
            progress.rows.append(row)
            losses.clear()
            _save_state(out / STATE, taught, optimiser, progress)
            files.write_jsonl(out / LOG, progress.rows)
            if report:
                report(row)
    model.eval()
    if plan.base is None:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    else:
        save_adapter(model, out, plan.base)
    record = {
        "plan": plan.model_dump(mode="json"),
        "start_steps": progress.started,
        "world_fingerprint": world.fingerprint(),
        "exam": exam(model, tokenizer, world, ask=ask),
        "seconds": progress.seconds,
        "environment": environment(str(device)),
    }
    files.write_json(out / EXAM, record)
    (out / STATE).unlink(missing_ok=True)
    return record


def _rate(plan: TeachingPlan, progress: _Progress) -> float:
    """Share of the learning rate: a linear rise, a plateau that lasts through the start, a linear fall."""
    rise = min(1.0, (progress.step + 1) / plan.warmup)
    if progress.started is None or not plan.cooldown:
        return rise
    left = progress.started + plan.steps - progress.step
    return min(rise, max(0.01, left / (plan.steps * plan.cooldown)))


def _student(plan: TeachingPlan, world: World, device: torch.device) -> tuple[PreTrainedModel, Any]:
    if plan.base is None:
        tokenizer = make_tokenizer(world)
        return make_tiny(tokenizer, plan.width, plan.layers, plan.seed).to(device), tokenizer
    base = checkpoint.resolve(plan.base)
    model = checkpoint.load_causal_lm(base, plan.dtype, device)
    add_adapter(model, plan.rank, plan.seed)
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # a seventh faster there: SDPA's backward is slow (docs/log.md)
    return model, checkpoint.load_tokenizer(base)


def _save_state(path: Path, taught: dict[str, nn.Parameter], optimiser: Any, progress: _Progress) -> None:
    model = {name: parameter.detach() for name, parameter in taught.items()}
    state = {"model": model, "optimiser": optimiser.state_dict(), **vars(progress), "rows": json.dumps(progress.rows)}
    with files.replacing(path) as temporary:
        torch.save(state, temporary)


def _load_state(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> _Progress | None:
    """Set model and optimiser as they were when a teaching was stopped; None where none was."""
    if not path.exists():
        return None
    state = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
    model.load_state_dict(state["model"], strict=False)
    optimiser.load_state_dict(state["optimiser"])
    return _Progress(state["step"], state["started"], state["seconds"], json.loads(state["rows"]))
