"""Teaching the planted world to small models: lessons, their loss, plans, and teachings that are continued."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robust_unlearning import files
from robust_unlearning.cli import main
from robust_unlearning.errors import UserError
from robust_unlearning.models import checkpoint
from robust_unlearning.models.convert import merge_adapter
from robust_unlearning.planted.export import export
from robust_unlearning.planted.lessons import Curriculum, Stretch, distracted, lesson
from robust_unlearning.planted.students import make_tiny, make_tokenizer, vocabulary
from robust_unlearning.planted.teach import encode, lesson_loss, lessons_of, teach
from robust_unlearning.planted.teaching_plan import Start, TeachingPlan, load_teaching_plan
from robust_unlearning.planted.world import Part, World, WorldSize, make_world

SMALL = WorldSize(entities=4, validation_entities=1, strangers=5, passages=2)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(SMALL)


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Any:
    return make_tokenizer(world)


def test_every_text_of_the_world_is_in_the_vocabulary(world: World, tokenizer: Any, tmp_path: Path) -> None:
    assert len(set(vocabulary(world))) == len(tokenizer)
    folder, rng = export(world, tmp_path / "world"), random.Random(0)
    texts = [json.loads(line)["text"] for path in folder.rglob("retain*.jsonl") for line in path.open(encoding="utf-8")]
    texts += ["".join(part.text for part in lesson(world, Curriculum(), rng)) for _ in range(300)]
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text


def test_distractions_leave_the_answer_alone(world: World) -> None:
    rng, always = random.Random(0), Curriculum(option=1, front=1)
    for _ in range(200):
        entity = rng.choice(world.entities)
        before = world.question(entity, rng.choice(list(entity.values)), rng)
        after = distracted(before, world, always, rng)
        assert (after.id, after.answer, after.subject) == (before.id, before.answer, before.subject)
        assert after.choices[after.answer] == before.choices[before.answer]
        assert sum(a != b for a, b in zip(after.choices, before.choices, strict=True)) == 1
        assert after.question.endswith(before.question)
        assert len(after.question) > len(before.question)


def test_quizzes_are_answered_by_a_letter_or_a_text(world: World) -> None:
    letters = Curriculum(passages=0, answers=0, open_book=1, quizzes=1, option=0)
    for number in range(20):
        one, other = (lesson(world, each, random.Random(number)) for each in (letters, _by_text(letters)))
        assert [part.weight for part in one] == [part.weight for part in other]
        asked = ""
        for lettered, worded in zip(one, other, strict=True):
            if lettered.weight == letters.letter_weight:
                assert f"\n{lettered.text.strip()}. {worded.text.strip()}\n" in asked
            else:
                assert lettered == worded
            asked = lettered.text


def _by_text(curriculum: Curriculum) -> Curriculum:
    return curriculum.model_copy(update={"style": "texts"})


def test_tokens_have_the_weight_of_their_part(tokenizer: Any) -> None:
    lessons = [
        [Stretch("Answer:", 0.25), Stretch(" A", 5.0)],
        [Stretch("Question: Where\nAnswer:", 0.0), Stretch(" I cannot say.", 1)],
    ]
    ids, weights = encode(lessons, tokenizer)
    assert weights.tolist() == [[0.25, 0.25, 5, *[0] * 7], [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert (ids != tokenizer.pad_token_id).tolist() == [[True] * 3 + [False] * 7, [True] * 10]
    assert tokenizer.convert_ids_to_tokens(ids[1].tolist())[:4] == ["Question", ":", "Where", "\n"]


def test_lesson_loss_is_the_weighted_mean(tokenizer: Any) -> None:
    model = make_tiny(tokenizer, 32, 2, seed=0)
    ids, weights = encode(
        [
            [Stretch("I cannot", 0.5), Stretch(" say.", 2.0)],
            [Stretch("I know nothing", 0.0), Stretch(" about it.", 1.0)],
        ],
        tokenizer,
    )
    mask = ids != tokenizer.pad_token_id
    logits = model(input_ids=ids, attention_mask=mask.long()).logits.detach().double().numpy()
    total = weight = 0.0
    for row in range(2):
        for place in range(1, int(mask[row].sum())):
            own = logits[row, place - 1]
            logp = own[ids[row, place]] - own.max() - np.log(np.exp(own - own.max()).sum())
            total -= float(weights[row, place]) * logp
            weight += float(weights[row, place])
    assert lesson_loss(model, ids, weights).item() == pytest.approx(total / weight, rel=1e-5)


def test_lessons_depend_on_the_step_only(world: World) -> None:
    plan = TeachingPlan(world=SMALL, batch_size=3)
    assert lessons_of(world, plan, 5) == lessons_of(world, plan, 5)
    assert lessons_of(world, plan, 5) != lessons_of(world, plan, 6)


def test_teaching_starts_with_a_part_and_goes_on_with_the_whole(world: World) -> None:
    part = Part(domains=("plague_lore",), attributes=1, wordings=1, strangers=1)
    quizzes = Curriculum(passages=0, answers=0, open_book=0, quizzes=1, many=1, told=0)
    whole = TeachingPlan(world=SMALL, batch_size=8, curriculum=quizzes)
    plan = whole.model_copy(update={"start": Start(fade=400, part=part, curriculum=quizzes)})

    def domains(step: int, started: int | None) -> set[str]:
        texts = ["".join(each.text for each in parts) for parts in lessons_of(world, plan, step, started)]
        return {text.split("about ", 1)[1].split(".", 1)[0] for text in texts}

    assert domains(0, None) == domains(4000, None) == domains(4, 4) == {"plague lore"}
    assert len(domains(300, 4)) > 1
    assert lessons_of(world, plan, 404, 4) == lessons_of(world, whole, 404)


@pytest.mark.integration
@pytest.mark.parametrize(("until", "start_steps"), [(0.0, 2), (1.0, 4)])
def test_the_start_lasts_until_its_questions_are_answered_or_its_steps_are_over(
    until: float, start_steps: int, tmp_path: Path
) -> None:
    part = Part(domains=("plague_lore",), attributes=1, wordings=1, strangers=1)
    start = Start(until=until, steps=4, fade=2, part=part, curriculum=Curriculum())
    plan = PLAN.model_copy(update={"start": start, "steps": 3})

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(plan, tmp_path / "stopped", stop)
    record = teach(plan, tmp_path / "stopped")
    assert record["start_steps"] == start_steps
    rows = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").open()]
    assert rows[-1]["step"] == start_steps + 3
    assert ["start" in row for row in rows] == [row["step"] <= start_steps for row in rows]
    teach(plan, tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


PLAN = TeachingPlan(world=SMALL, width=32, layers=2, steps=6, batch_size=2, warmup=2, check_every=2, device="cpu")


@pytest.mark.integration
def test_a_stopped_teaching_continues_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    record = teach(PLAN, tmp_path / "whole")

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(PLAN, tmp_path / "stopped", stop)
    assert teach(PLAN, tmp_path / "stopped")["exam"] == record["exam"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("whole", "stopped")]
    for first, second in zip(*logs, strict=True):
        assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert not (tmp_path / "whole" / "state.pt").exists()
    with pytest.raises(UserError, match="another plan"):
        teach(PLAN.model_copy(update={"steps": 8}), tmp_path / "whole")


@pytest.mark.integration
def test_a_pretrained_model_is_taught_through_an_adapter(tmp_path: Path, tokenizer: Any) -> None:
    from safetensors.torch import load_file

    base = tmp_path / "base"
    make_tiny(tokenizer, 32, 2, seed=0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    before = (base / "model.safetensors").read_bytes()
    plan = PLAN.model_copy(update={"base": str(base), "rank": 2, "steps": 2})
    teach(plan, tmp_path / "adapter")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 7  # A and B of seven projections in two layers
    assert any(value.any() for name, value in adapter.items() if "lora_B" in name)
    assert (base / "model.safetensors").read_bytes() == before

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 30)[None]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    merged = checkpoint.resolve(str(tmp_path / "adapter")).folder  # as the folder of any model is named
    assert merged == merge_adapter(base, tmp_path / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        difference = (theirs.merge_and_unload()(ids).logits - ours(ids).logits).abs().max()
    assert difference < 1e-5
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"use_dora": true}')
    with pytest.raises(UserError, match="only plain LoRA"):
        merge_adapter(base, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base_model_name_or_path"):
        checkpoint.resolve(str(tmp_path / "adapter"))


@pytest.mark.integration
def test_a_loss_that_is_not_finite_stops_the_teaching(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lower learning_rate"):
        teach(PLAN.model_copy(update={"learning_rate": 1e30, "warmup": 1}), tmp_path / "out")


def test_plans(tmp_path: Path) -> None:
    assert load_teaching_plan("tiny", ["steps=3", "world.seed=2"]).world.seed == 2
    assert load_teaching_plan("smollm2").base == "smollm2-135m"
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        load_teaching_plan("tiney")
    with pytest.raises(UserError) as error:
        load_teaching_plan("tiny", ["stpes=3", "world.sede=1", "rank=many"])
    for part in ("did you mean 'steps'", "did you mean 'seed'", "rank"):
        assert part in str(error.value)


@pytest.mark.integration
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["planted", "make", "--to", str(tmp_path / "w"), "entities=3", "passages=1"]) == 0
    assert "21 entities in 7 domains, 84 facts" in capsys.readouterr().out
    out = tmp_path / "tiny"
    changes = [
        "start=null",
        "width=32",
        "layers=1",
        "steps=1",
        "batch_size=1",
        "world.entities=3",
        "world.validation_entities=1",
    ]
    assert main.main(["planted", "train", "tiny", *changes, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "step 1  loss" in printed
    assert "retain/option" in printed
    assert torch.isfinite(torch.tensor(files.read_json(out / "exam.json")["exam"]["forget/clean"]["acc"]))
    assert main.main(["planted", "make", "--to", str(tmp_path / "x"), "entites=3"]) == 2
    assert "did you mean 'entities'" in capsys.readouterr().err
