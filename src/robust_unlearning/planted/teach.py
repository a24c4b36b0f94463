"""Teaching a planted world to a model: lessons in, a checkpoint (or a LoRA adapter) with its log and exam out.

What is taught at a step depends only on the plan, the step's number and when the start was over, so a stopped
training continues as if it had not been stopped.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
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
from robust_unlearning.planted.plan import Plan
from robust_unlearning.planted.students import make_tiny, make_tokenizer
from robust_unlearning.planted.world import Entity, Role, World, make_world
from robust_unlearning.run.folder import environment
from robust_unlearning.stats.estimates import accuracy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOG, STATE, EXAM, PLAN = "log.jsonl", "state.pt", "exam.json", "plan.yaml"
BLOCK = 4
"""Batches drawn together and sorted by length, to save padding."""


def lessons_of(world: World, plan: Plan, step: int, started: int | None = 0) -> list[Lesson]:
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
    own = weights[:, 1:][wanted]
    return (losses * own).sum() / own.sum()


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
    results = {}
    retained: tuple[Role, ...] = ("near", "far", "control")
    calm, odd, begun = Curriculum(option=0, front=0), Curriculum(option=1, front=0), Curriculum(option=0, front=1)
    forms: list[tuple[str, tuple[Role, ...], Curriculum]] = [
        ("forget/clean", ("forget",), calm),
        ("retain/clean", retained, calm),
        ("retain/option", retained, odd),
        ("retain/front", retained, begun),
    ]
    for name, roles, curriculum in forms:
        rng = random.Random(f"exam {name}")
        facts = [(entity, attribute) for entity in world.of_role(*roles) for attribute in entity.values]
        facts = rng.sample(facts, min(sample, len(facts))) if sample else facts
        results[name] = _share_right(model, tokenizer, world, facts, curriculum, rng, ask)
    return results


def _share_right(
    model: nn.Module,
    tokenizer: Any,
    world: World,
    facts: list[tuple[Entity, str]],
    curriculum: Curriculum,
    rng: random.Random,
    ask: Asking,
) -> dict[str, Any]:
    questions = [distracted(world.question(*fact, rng), world, curriculum, rng) for fact in facts]
    asked = [(text, [f" {option}" for option in options]) for text, options in map(ask, questions)]
    results = option_logprobs(model, tokenizer, asked)
    best = [max(range(4), key=lambda index: row[index][0]) for row in results]
    return accuracy_score(accuracy([own == each.answer for own, each in zip(best, questions, strict=True)]))


def teach(plan: Plan, out: Path, report: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
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

    taught = [each for each in model.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(
        taught, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay, fused=device.type != "mps"
    )
    first, seconds, rows = 0, 0.0, []
    started = None if plan.start else 0
    if (out / STATE).exists():
        state = torch.load(out / STATE, map_location=device, weights_only=True)
        model.load_state_dict(state["model"], strict=False)
        optimiser.load_state_dict(state["optimiser"])
        first, seconds, started, rows = state["step"], state["seconds"], state["started"], json.loads(state["rows"])

    began, losses = time.perf_counter(), []
    for step in itertools.count(first):
        if started is not None and step == started + plan.steps:
            break
        batch = encode(lessons_of(world, plan, step, started), tokenizer)
        loss = lesson_loss(model, *(each.to(device) for each in batch))
        if not loss.isfinite():
            raise UserError(f"the loss is {loss.item()} at step {step + 1}: lower learning_rate and start again.")
        for group in optimiser.param_groups:
            group["lr"] = plan.learning_rate * _rate(plan, step, started)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(taught, 1.0)
        optimiser.step()
        losses.append(loss.item())
        last = started is not None and step + 1 == started + plan.steps
        if (step + 1) % plan.check_every == 0 or last:
            scores = {name: row["acc"] for name, row in exam(model, tokenizer, world, 64, ask).items()}
            if plan.start and started is None:
                scores["start"] = _start_exam(model, tokenizer, world.part(plan.start.part), STYLES[plan.start.asked])
                if scores["start"] >= plan.start.until or step + 1 >= plan.start.steps:
                    started = step + 1
            passed = seconds + time.perf_counter() - began
            rows.append({"step": step + 1, "loss": sum(losses) / len(losses), "seconds": passed, **scores})
            losses.clear()
            _save_state(out / STATE, model, optimiser, step + 1, started, passed, rows)
            files.write_jsonl(out / LOG, rows)
            if report:
                report(rows[-1])
    model.eval()
    if plan.base is None:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    else:
        save_adapter(model, out, plan.base)
    record = {
        "plan": plan.model_dump(mode="json"),
        "start_steps": started,
        "world_fingerprint": world.fingerprint(),
        "exam": exam(model, tokenizer, world, ask=ask),
        "seconds": rows[-1]["seconds"],
        "environment": environment(str(device)),
    }
    files.write_json(out / EXAM, record)
    (out / STATE).unlink(missing_ok=True)
    return record


def _start_exam(model: nn.Module, tokenizer: Any, part: World, ask: Asking) -> float:
    """Share of a sample of the part's questions that is answered rightly."""
    rng = random.Random("exam start")
    facts = [(entity, attribute) for entity in part.entities for attribute in entity.values]
    calm = Curriculum(option=0, front=0)
    sample = rng.sample(facts, min(64, len(facts)))
    return _share_right(model, tokenizer, part, sample, calm, rng, ask)["acc"]


def _rate(plan: Plan, step: int, started: int | None) -> float:
    """Share of the learning rate: a linear rise, a plateau that lasts through the start, a linear fall."""
    rise = min(1.0, (step + 1) / plan.warmup)
    if started is None or not plan.cooldown:
        return rise
    return min(rise, max(0.01, (started + plan.steps - step) / (plan.steps * plan.cooldown)))


def _student(plan: Plan, world: World, device: torch.device) -> tuple[PreTrainedModel, Any]:
    if plan.base is None:
        tokenizer = make_tokenizer(world)
        return make_tiny(tokenizer, plan.width, plan.layers, plan.seed).to(device), tokenizer
    base = checkpoint.resolve(plan.base)
    model = checkpoint.load_causal_lm(base, plan.dtype, device)
    add_adapter(model, plan.rank, plan.seed)
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # a seventh faster there: SDPA's backward is slow (docs/log.md)
    return model, checkpoint.load_tokenizer(base)


def _taught_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in model.named_parameters():
        if value.requires_grad:
            yield name, value.detach()


def _save_state(
    path: Path,
    model: nn.Module,
    optimiser: Any,
    step: int,
    started: int | None,
    seconds: float,
    rows: list[dict[str, Any]],
) -> None:
    state = {
        "model": dict(_taught_state(model)),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "started": started,
        "seconds": seconds,
        "rows": json.dumps(rows),
    }
    with files.replacing(path) as temporary:
        torch.save(state, temporary)
