"""Groups of a comparison: which tasks are pooled, what the pool and its subjects say, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import N, first, rows

from robust_unlearning import files
from robust_unlearning.cli.main import main
from robust_unlearning.errors import UserError
from robust_unlearning.results.compare import Comparison, compare
from robust_unlearning.results.records import read_models
from robust_unlearning.results.task_groups import parse_groups
from robust_unlearning.stats import paired

SUBJECTS = ("anatomy", "virology", "world_religions")
TOKENS = {"forget_token": "Nilmor", "control_token": "Guria"}


def subject(task: str, dataset: str, right: Sequence[bool], logp: float = -1.0, **more: Any) -> list[dict[str, Any]]:
    """A task's records with the ids that lm-evaluation-harness's have."""
    found = rows(task, right, [logp] * len(right), **more)
    return [{**row, "id": f"{dataset}:{place}"} for place, row in enumerate(found, start=1)]


def benchmark(
    right: Sequence[int], name: str = "mmlu", ending: str = "", logp: float = -1.0, **more: Any
) -> list[dict[str, Any]]:
    """Three subjects with so many of `N` right."""
    parts = [
        subject(f"{name}_{each}{ending}", each, first(count), logp, **more)
        for each, count in zip(SUBJECTS, right, strict=True)
    ]
    return [row for part in parts for row in part]


def groups(result: Comparison) -> dict[str, list[str]]:
    return {row.group.name: row.group.tasks for row in result.rows}


def against(result: Comparison, task: str, model: str = "rmu") -> Any:
    every = [*result.rows, *result.subjects]
    return next(row.against for row in every if (row.task.name, row.model) == (task, model))


def test_subjects_are_pooled_question_by_question(write_records: Callable[..., str]) -> None:
    write_records("base", benchmark([20, 20, 20]), rows("other/cloze/clean", first(20)))
    write_records("rmu", benchmark([20, 14, 2]), rows("other/cloze/clean", first(18)))
    write_records("rna", benchmark([20, 17, 11]), rows("other/cloze/clean", first(19)))
    result = compare(read_models(["base", "rmu", "rna"]))
    assert groups(result) == {"mmlu": [f"mmlu_{each}" for each in SUBJECTS], "other/cloze/clean": ["other/cloze/clean"]}
    pool = against(result, "mmlu")
    assert pool.difference.value == pytest.approx(36 / 60 - 1)
    assert (pool.difference.n, pool.test.lost, pool.test.won) == (60, 24, 0)
    assert pool.reduction.value == pytest.approx(24 / 60)
    assert against(result, "mmlu", "rna").recovery.value == pytest.approx(12 / 24)
    of_groups = [row.against for row in result.rows if row.against]
    assert [each.p_holm for each in of_groups] == paired.holm([each.p for each in of_groups])
    assert len(of_groups) == 4  # groups × models, not subjects × models
    for model in ("rmu", "rna"):
        own = [row.against for row in result.subjects if row.model == model and row.against]
        assert [each.p_holm for each in own] == paired.holm([each.p for each in own])
        assert len(own) == 3
    assert [row.task.name for row in result.subjects if row.against and row.against.verdict == "worse"] == [
        "mmlu_world_religions",
        "mmlu_world_religions",
    ]


def test_forms_are_pools_of_their_own_and_harm_is_over_all_subjects(write_records: Callable[..., str]) -> None:
    for name, logp in (("base", -1.0), ("rmu", -5.0)):
        perturbed = benchmark([20, 18, 16], "sars", logp=logp, **TOKENS)
        control = benchmark([20, 18, 16], "sars", "_control", **TOKENS)
        write_records(name, benchmark([20, 18, 16]), benchmark([9, 9, 9], "mmlu", "_continuation"), perturbed, control)
    result = compare(read_models(["base", "rmu"]))
    assert list(groups(result)) == ["mmlu", "mmlu_continuation", "sars", "sars_control"]
    assert all(len(tasks) == 3 for tasks in groups(result).values())
    assert against(result, "sars").added_harm.value == pytest.approx(-2)  # two tokens
    assert against(result, "sars").added_harm.n == 60
    assert against(result, "sars_control").added_harm is None


def test_what_an_evaluation_says_of_groups_counts(write_records: Callable[..., str]) -> None:
    """Only groups with an average, and of these the outermost; some of their tasks may not have been asked."""
    names = ["bio_a", "bio_b", "bio_c"]
    for name in ("base", "rmu"):
        write_records(name, *(rows(each, first(15)) for each in [*names, "wmdp_x"]))
        about = {"groups": {"all": [*names, "wmdp_x"], "bio": [*names, "bio_d"], "bio_ab": names[:2]}}
        files.write_json(Path(name) / "evaluation.json", about)
        files.write_json(Path(name) / "scores.json", {"bio": {}, "bio_ab": {}})
    result = compare(read_models(["base", "rmu"]))
    assert groups(result) == {"bio": names, "wmdp_x": ["wmdp_x"]}
    assert result.rows[0].group.of == 4
    for name in ("base", "rmu"):
        files.write_json(Path(name) / "scores.json", {"all": {}})
    mixed = compare(read_models(["base", "rmu"]))
    assert groups(mixed) == {"all, to be kept, clean": names, "wmdp_x": ["wmdp_x"]}


def test_subjects_to_be_forgotten_stand_apart(write_records: Callable[..., str]) -> None:
    for name in ("base", "rmu"):
        write_records(name, benchmark([20, 18, 16]))
    result = compare(read_models(["base", "rmu"]), forget=["mmlu_virology"])
    assert groups(result) == {
        "mmlu, to be kept, clean": ["mmlu_anatomy", "mmlu_world_religions"],
        "mmlu_virology": ["mmlu_virology"],
    }
    assert [row.to_forget for row in result.rows] == [False, False, True, True]


def test_one_subject_is_no_group(write_records: Callable[..., str]) -> None:
    for name in ("base", "rmu"):
        write_records(name, benchmark([20, 18, 16]), subject("wmdp_bio", "wmdp-bio", first(9)))
    result = compare(read_models(["base", "rmu"]), tasks=["mmlu_anatomy", "wmdp_bio"])
    assert list(groups(result)) == ["mmlu_anatomy", "wmdp_bio"]
    assert result.subjects == []


def test_groups_of_the_user(write_records: Callable[..., str]) -> None:
    sets = [
        rows(f"{each}/cloze/{form}", first(15))
        for each in ("near", "far", "forget")
        for form in ("clean", "sentence", "sentence-control")
    ]
    for name in ("base", "rmu"):
        write_records(name, *sets)
    models = read_models(["base", "rmu"])
    result = compare(models, groups={"kept": ["near/*", "far/*"]})
    assert groups(result)["kept/cloze/clean"] == ["near/cloze/clean", "far/cloze/clean"]
    assert [name for name in groups(result) if name.startswith("kept")] == [
        "kept/cloze/clean", "kept/cloze/sentence", "kept/cloze/sentence-control",
    ]  # fmt: skip
    assert against(result, "kept/cloze/sentence").added_harm.n == 2 * N
    with pytest.raises(UserError, match=r"near/cloze/clean is to be kept, clean, and forget/cloze/clean is to be forg"):
        compare(models, groups={"all": ["*/clean"]})
    with pytest.raises(UserError, match=r"near/cloze/clean is in a/cloze/clean and in b/cloze/clean"):
        compare(models, groups={"a": ["near/*"], "b": ["*ea*/*/clean"]})
    with pytest.raises(UserError, match="unknown task 'nae/\\*'"):
        compare(models, groups={"a": ["nae/*"]})


def test_a_pool_asks_no_question_twice_and_mixes_no_forms(write_records: Callable[..., str]) -> None:
    for name in ("base", "rmu"):
        same = [
            {**row, "doc_hash": row["id"]}
            for ending in ("", "_continuation")
            for row in benchmark([9] * 3, ending=ending)
        ]
        write_records(name, same, benchmark([9] * 3, "mmlu_sars", **TOKENS))
    models = read_models(["base", "rmu"])
    with pytest.raises(UserError, match="mmlu_anatomy and mmlu_anatomy_continuation ask the same question"):
        compare(models, groups={"all": ["mmlu_a*", "mmlu_v*"]})
    with pytest.raises(UserError, match="mmlu_anatomy is to be kept, clean, and mmlu_sars_anatomy is to be kept, pert"):
        compare(models, groups={"all": ["mmlu_*anatomy"]})
    with pytest.raises(UserError, match="a task is called so"):
        compare(models, groups={"mmlu_anatomy": ["mmlu_v*"]})


def test_group_words() -> None:
    assert parse_groups(["a=x*,y", "b=z=1"]) == {"a": ["x*", "y"], "b": ["z=1"]}
    for words in (["a"], ["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(UserError, match="--group"):
            parse_groups(words)


def test_every_row_of_rates_says_what_was_forgotten(write_records: Callable[..., str]) -> None:
    """log p of the right answer among four: −9 each for the others."""
    lost = "forget/cloze/clean"
    for name, logp in (("base", -1.0), ("rmu", -8.0), ("rna", -4.0)):
        write_records(
            name,
            rows(lost, first(20), [logp - 0.01 * index for index in range(N)]),
            rows("forget/cloze/sentence", first(20), [-99.0] * N),
            rows("near/cloze/clean", first(20 if name == "base" else 12)),
        )
    models = read_models(["base", "rmu", "rna"])
    result = compare(models, tasks=["near/*"])
    falls = {}
    for name, logp in (("rmu", -8.0), ("rna", -4.0)):
        base, own = (np.array([given - 0.01 * index for index in range(N)]) for given in (-1.0, logp))
        among = [right - np.log(np.exp(right) + 3 * np.exp(-9.0)) for right in (base, own)]
        falls[name] = among[0] - among[1]
        found = against(result, "near/cloze/clean", name).forgotten
        assert found.value == pytest.approx(falls[name].mean())
        assert found.stderr == pytest.approx(falls[name].std(ddof=1) / N**0.5)
        assert found.n == N
    assert [row.task.name for row in result.rows] == ["near/cloze/clean"] * 3
    whole = compare(models)
    assert {row.against.forgotten for row in whole.rows if row.against and row.model == "rmu"} == {
        against(result, "near/cloze/clean").forgotten
    }
    assert result.forgotten == whole.forgotten == ""
    none = compare(models, forget=[])
    assert none.forgotten == "not asked"
    assert all(row.against.forgotten is None for row in none.rows if row.against)


def test_forgotten_needs_log_p(write_records: Callable[..., str]) -> None:
    for name in ("base", "rmu"):
        write_records(name, rows("forget/x", first(9), logprobs=None, tokens=None), rows("near/x", first(9)))
    assert compare(read_models(["base", "rmu"])).forgotten == "not scored"


def test_entities_count_as_one_also_across_subjects(write_records: Callable[..., str]) -> None:
    """Forty questions about four things: what the interval and p rest on."""
    about = [f"thing {index % 4}" for index in range(N)]
    for name, right in (("base", [True] * N), ("rmu", [index % 4 > 1 for index in range(N)])):
        parts = [
            [{**row, "cluster": each} for row, each in zip(subject(f"q_{part}", part, right), about, strict=True)]
            for part in ("a", "b")
        ]
        write_records(name, *parts)
    found = against(compare(read_models(["base", "rmu"])), "q")
    assert (found.difference.n, found.difference.clusters) == (2 * N, 4)
    assert found.test.p < 1e-5
    assert found.p == found.difference.p() > 0.05
    assert found.verdict == "inconclusive"


def test_of_these_models(write_records: Callable[..., str]) -> None:
    clean = "near/cloze/clean"
    write_records("base", rows(clean, first(20)))
    for seed in range(3):
        write_records(f"s{seed}", rows(clean, first(5 + seed)))

    def few(*words: str) -> bool:
        return bool(compare(read_models(list(words))).rows[1].against.of_these)  # type: ignore[union-attr]

    assert few("base", "rmu=s0,s1")
    assert few("base", "s0")
    assert not few("base", "rmu=s0,s1,s2")
    assert few("x=s0,s1", "rmu=s0,s1,s2")
    Path("base/recipe.yaml").write_text("seed: 0\n", encoding="utf-8")  # the reference is one run of several
    assert few("base", "rmu=s0,s1,s2")


@pytest.mark.integration
def test_groups_on_the_command_line(write_records: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    write_records("base", benchmark([20, 20, 20]), rows("near/x", first(20)), rows("far/x", first(20)))
    write_records("rmu", benchmark([20, 19, 5]), rows("near/x", first(20)), rows("far/x", first(20)))
    words = ["compare", "base", "rmu", "--group", "kept=near/x,far/x"]
    outs = ["--out", "c.md", "--out", "c.html", "--out", "c.json"]
    assert main([*words, *outs]) == 0
    printed = capsys.readouterr().out
    assert "mmlu: the questions of 3 subjects pooled" in printed
    assert "differ from base: rmu 1 worse (mmlu_world_religions) of 3." in printed
    assert "mmlu_anatomy ↑" not in printed
    assert printed.count("not asked") == 3  # two groups and the note
    assert main([*words, "--subjects"]) == 0
    assert "mmlu_anatomy ↑" in capsys.readouterr().out
    markdown = Path("c.md").read_text(encoding="utf-8")
    assert markdown.index("| mmlu ↑") < markdown.index("<details>") < markdown.index("| mmlu_anatomy ↑")
    page = Path("c.html").read_text(encoding="utf-8")
    assert page.index("mmlu ↑") < page.index("<details") < page.index("mmlu_anatomy ↑")
    data = json.loads(Path("c.json").read_text(encoding="utf-8"))
    assert list(data["groups"]) == ["mmlu", "kept"]
    assert data["groups"]["mmlu"]["n"] == 60
    assert data["groups"]["mmlu"]["tasks"] == list(data["subjects"])[:3]
    assert data["subjects"]["mmlu_anatomy"]["group"] == "mmlu"
    assert data["groups"]["mmlu"]["models"]["rmu"]["of_these"] is True
    assert main(["compare", "base", "rmu", "--group", "kept"]) == 2
    assert "--group mmlu='mmlu_*'" in capsys.readouterr().err
