"""Scoring: sharing prompts equals scoring each full sequence alone, and scores follow from the records."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, byte_tokenizer, random_model

from robust_unlearning import files
from robust_unlearning.data.questions import cloze_prompt, letters_prompt, read_questions
from robust_unlearning.errors import UserError
from robust_unlearning.evaluate import likelihood as module
from robust_unlearning.evaluate import prefix_tree
from robust_unlearning.evaluate.prefix_tree import Tree
from robust_unlearning.evaluate.record import Record
from robust_unlearning.evaluate.score_table import format_scores
from robust_unlearning.evaluate.suite import (
    QuestionSet,
    Suite,
    Text,
    load_suite,
    option_logprobs,
    text_nats,
)

WORDS = ["apple", "river", "stone", "tall ladder", "cloud", "button", "ox", "meadow"]
ITEMS = [
    ("Question: one?\nAnswer:", [" a", " river", " tall ladder"]),
    ("Question: two?\nAnswer:", [" river", " b"]),  # as long as the first
    ("Question: one?\nAnswer:", [" river", " stone", " river"]),  # the first again
    ("A rather longer question, as some are?", [" yes", " no", " who knows"]),
    ("Pick:", [" A", " B", " C", " D"]),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def small(family: str, **changes: Any) -> Any:
    return random_model(family, vocab_size=300, max_position_embeddings=512, num_hidden_layers=4, **changes)


@pytest.fixture(scope="module")
def llama() -> Any:
    return small("llama")


@torch.no_grad()
def alone(model: Any, tokenizer: Any, prompt: str, continuation: str) -> tuple[float, int]:
    """log p of a continuation by running its full sequence alone."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + continuation)["input_ids"]])
    logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return float(logps[start - 1 :].sum()), ids.shape[1] - start


def check(model: Any, tokenizer: Any, items: Any = ITEMS, **options: Any) -> None:
    results = option_logprobs(model, tokenizer, items, **options)
    assert [len(each) for each in results] == [len(ends) for _, ends in items]
    for (prompt, ends), result in zip(items, results, strict=True):
        for end, (logp, tokens) in zip(ends, result, strict=True):
            expected, count = alone(model, tokenizer, prompt, end)
            assert tokens == count
            assert logp == pytest.approx(expected, abs=1e-4, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt_neox", "gpt2"])
def test_options_equal_full_sequences(family: str, tokenizer: Any) -> None:
    check(small(family), tokenizer)  # the windows of 4 tokens are shorter than prompts and options


@pytest.mark.parametrize("budget", [1, 40, 100_000])
def test_budget_does_not_change_results(budget: int, llama: Any, tokenizer: Any) -> None:
    check(llama, tokenizer, token_budget=budget)


def test_bfloat16_is_close(tokenizer: Any) -> None:
    model = small("llama")
    exact = option_logprobs(model, tokenizer, ITEMS)
    rough = option_logprobs(model.to(torch.bfloat16), tokenizer, ITEMS)
    for (a, _), (b, _) in zip(chain(*exact), chain(*rough), strict=True):
        assert a == pytest.approx(b, rel=0.05, abs=0.5)


def test_recurrent_models_fall_back_to_full_sequences(tokenizer: Any) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=2)
    check(MambaForCausalLM(config).eval(), tokenizer)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "phi3", "qwen3", "gpt_neox", "gpt2"])
def test_stems_and_trees_equal_full_sequences(family: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "PASS", 8)
    wide = {"sliding_window": 512} if "sliding_window" in FAMILIES[family][1] else {}
    model = small(family, **wide)
    assert module._takes_trees(model, longest=500)
    header = "A header that all of these have in common.\n\n"
    items = [(f"{header}{prompt}", ends) for prompt, ends in ITEMS]
    budget = 90
    starts = dict.fromkeys(run_sequences(tokenizer, items), 99)
    stems = [batch[0].stem for batch in prefix_tree.batches(starts, budget)]
    assert len(stems) > 1
    assert any(stems)
    check(model, tokenizer, [*items, *ITEMS], token_budget=budget)


def test_trees_are_not_trusted_blindly(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._takes_trees(llama, longest=500)
    assert not module._takes_trees(small("mistral"), longest=5)  # its window is 4

    def everything(batch: list[Tree], dtype: Any, device: Any) -> torch.Tensor:
        width = max(len(each.ids) for each in batch)
        return torch.zeros(len(batch), 1, width, len(batch[0].stem) + width)

    monkeypatch.setattr(module, "_tree_mask", everything)
    assert not module._takes_trees(llama, longest=500)


def test_fall_back_and_models_without_logits_to_keep(
    llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_takes_trees", lambda model, longest: False)
    check(llama, tokenizer)
    check(llama, tokenizer, token_budget=1)
    forward = llama.forward

    def plain(input_ids: Any, use_cache: bool = False) -> Any:
        return forward(input_ids, use_cache=use_cache)

    monkeypatch.setattr(llama, "forward", plain)
    check(llama, tokenizer)


def run_sequences(tokenizer: Any, items: Any) -> set[tuple[int, ...]]:
    """What has to be run: prompts with their continuations but for the last token."""
    return {tuple(tokenizer(prompt + end)["input_ids"][:-1]) for prompt, ends in items for end in ends}


def run_lengths(model: Any, tokenizer: Any, **options: Any) -> list[int]:
    """Tokens of each forward pass over `ITEMS`, three times given."""
    lengths: list[int] = []
    seen: list[tuple[int, int]] = []
    with model.model.embed_tokens.register_forward_pre_hook(lambda _, args: lengths.append(args[0].numel())):
        option_logprobs(model, tokenizer, ITEMS * 3, progress=lambda done, total: seen.append((done, total)), **options)
    assert seen[-1][0] == seen[-1][1] == len(sequences(tokenizer))
    return lengths


def sequences(tokenizer: Any) -> set[tuple[int, ...]]:
    """What has to be run for `ITEMS`."""
    return run_sequences(tokenizer, ITEMS)


def test_what_sequences_begin_with_is_run_once(tokenizer: Any) -> None:
    model = small("llama")
    beginnings = {each[:length] for each in sequences(tokenizer) for length in range(1, len(each) + 1)}
    *_, run = run_lengths(model, tokenizer)
    assert len(beginnings) < run < len(beginnings) + prefix_tree.PASS < sum(map(len, sequences(tokenizer)))  # padding
    assert sum(run_lengths(model, tokenizer, token_budget=60)) > len(beginnings)  # begun anew in each of more batches


def test_windows_shorter_than_the_sequences_are_scored_in_full(tokenizer: Any) -> None:
    full = sum(map(len, sequences(tokenizer)))
    assert sum(run_lengths(small("mistral"), tokenizer, token_budget=1)) == full
    assert sum(run_lengths(small("mistral", sliding_window=512), tokenizer)) < full


def test_a_merge_across_the_boundary_is_scored_as_the_harness_does(llama: Any, tokenizer: Any) -> None:
    # "riv" + "er" is one word, and "e" + "r" one token: the prompt's last token changes with what follows
    prompt, ends = "the rive", ["r flows", "n"]
    (result,) = option_logprobs(llama, tokenizer, [(prompt, ends)])
    assert result[0][1] == len(tokenizer(prompt + ends[0])["input_ids"]) - len(tokenizer(prompt)["input_ids"])
    check(llama, tokenizer, [(prompt, ends)])


def test_continuations_without_tokens_are_refused(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="adds no token"):
        option_logprobs(llama, tokenizer, [("Pick:", [" A", ""])])
    assert option_logprobs(llama, tokenizer, []) == []


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("budget", [1, 2048])
def test_texts_equal_each_alone(family: str, budget: int, tokenizer: Any) -> None:
    model = small(family)
    texts = ["one", "a much longer text, cut at some point, and so shorter than it was", "x", "", "two words"]
    results = text_nats(model, tokenizer, texts, max_tokens=20, token_budget=budget)
    for text, (nats, tokens) in zip(texts, results, strict=True):
        ids = tokenizer(text)["input_ids"][:20]
        assert tokens == len(ids) - 1
        if tokens:
            loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.detach()
            assert nats == pytest.approx(float(loss) * tokens, abs=1e-4, rel=1e-5)
    assert results[3] == (0.0, 0)


@pytest.mark.integration
def test_mode_and_gradients_are_left_as_found(llama: Any, tokenizer: Any) -> None:
    llama.train()
    option_logprobs(llama, tokenizer, ITEMS[:1])
    assert llama.training
    assert torch.is_grad_enabled()
    with pytest.raises(UserError):
        option_logprobs(llama, tokenizer, [("", [""])])
    llama.eval()
    text_nats(llama, tokenizer, ["one"], 8)
    assert not llama.training


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Questions, a text and a suite."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(12):
        choices = rng.choice(WORDS, size=4, replace=False).tolist()
        rows.append({"question": f"Which is {index}?", "choices": choices, "answer": int(rng.integers(4))})
    files.write_jsonl(tmp_path / "set.jsonl", rows)
    files.write_jsonl(tmp_path / "text.jsonl", [{"body": f"Text {index} of some words."} for index in range(5)])
    (tmp_path / "suite.yaml").write_text(
        f"questions:\n  set: {{path: {tmp_path}/set.jsonl, styles: [cloze, letters], perturb: [option]}}\n"
        f"texts:\n  plain: {{path: {tmp_path}/text.jsonl, field: body, max_tokens: 16, limit: 4}}\n"
        "forget_tokens: [supernova, comet]\ncontrol_tokens: [bakery, violin]\n"
    )
    return tmp_path


def test_evaluate(folder: Path, llama: Any, tokenizer: Any) -> None:
    suite = load_suite(folder / "suite.yaml")
    ticks: list[tuple[str, int, int]] = []
    result = suite.run(llama, tokenizer, progress=lambda *each: ticks.append(each))
    forms = ["clean", "option", "option-control"]
    tasks = ["set/cloze/clean", *(f"set/letters/{form}" for form in forms)]  # a cloze prompt shows no options
    assert list(result.scores) == [*tasks, "plain/text"]
    assert len(result.records) == 12 * len(tasks)
    name, done, total = ticks[-1]
    assert (name, done) == ("set", total)
    assert total >= 12 * len(tasks)  # distinct sequences; a question has several where its answers are texts
    assert json.loads(json.dumps(result.scores, allow_nan=False)) == result.scores
    lines = json.loads(json.dumps([record.as_dict() for record in result.records], allow_nan=False))
    assert [Record.from_dict(line) for line in lines] == result.records

    by_task = {task: [each for each in result.records if each.task.name == task] for task in tasks}
    questions = {each.id: each for each in read_questions(folder / "set.jsonl")}
    for task in tasks:
        own, row = by_task[task], result.scores[task]
        assert [each.id for each in own] == list(questions)
        assert row["acc"] == np.mean([each.prediction == each.answer for each in own])
        assert row["low"] <= row["acc"] <= row["high"]
        assert row["n"] == 12
        for each in own:
            assert each.prediction == int(np.argmax(each.logprobs))
            assert (each.forget_token in ("supernova", "comet")) == (not task.endswith("clean"))
    for prompt, task in ((cloze_prompt, "set/cloze/clean"), (letters_prompt, "set/letters/clean")):
        norm = []
        for each in by_task[task]:
            text, options = prompt(questions[each.id])
            expected = [alone(llama, tokenizer, text, " " + option) for option in options]
            assert list(each.logprobs) == pytest.approx([logp for logp, _ in expected], abs=1e-3)
            assert list(each.tokens) == [tokens for _, tokens in expected]
            per_byte = [logp / len(option) for (logp, _), option in zip(expected, options, strict=True)]
            norm.append(int(np.argmax(per_byte)) == each.answer)
        assert result.scores[task]["acc_norm"] == pytest.approx(np.mean(norm))

    def right(form: str) -> Any:
        rows = by_task[f"set/letters/{form}"]
        return np.array([each.logprobs[each.answer] / each.tokens[each.answer] for each in rows])

    forget, control = result.scores["set/letters/option"], result.scores["set/letters/option-control"]
    assert forget["excess_harm"]["value"] == pytest.approx((right("option") - right("option-control")).mean())
    assert forget["harm"]["value"] == pytest.approx((right("option") - right("clean")).mean())
    assert control["harm"]["value"] == pytest.approx((right("option-control") - right("clean")).mean())
    assert "excess_harm" not in control
    assert "set/cloze/option" not in result.scores  # it would be 0, which reads as robust and means nothing

    nats = text_nats(llama, tokenizer, [f"Text {index} of some words." for index in range(4)], 16)
    text = result.scores["plain/text"]
    mean = sum(each for each, _ in nats) / sum(tokens for _, tokens in nats)
    assert text["nats_per_token"] == pytest.approx(mean)
    assert text["perplexity"] == pytest.approx(np.exp(mean))
    assert (text["n"], text["tokens"]) == (4, 60)
    assert all(task in format_scores(result.scores) for task in result.scores)


def test_evaluate_says_when_a_model_is_broken(folder: Path, tokenizer: Any) -> None:
    model = small("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="set: log p is not finite"):
        load_suite(folder / "suite.yaml").run(model, tokenizer)


def test_suite_errors_come_together(folder: Path) -> None:
    path = folder / "wrong.yaml"
    path.write_text(
        "questions:\n  set: {path: nowhere.jsonl, style: [cloze]}\n  other: {pth: x, styles: [letter]}\n"
        "texts: {plain: {path: 'demo:retain_heldot.jsonl', max_tokens: 1}}\nforget_token: [comet]\n"
    )
    with pytest.raises(UserError) as caught:
        load_suite(path)
    for part in (
        "questions.set.path: no such file or folder: 'nowhere.jsonl'",
        "'questions.set.style': did you mean 'styles'",
        "'questions.other.pth': did you mean 'path'",
        "questions.other.path: required",
        "questions.other.styles.0: input should be 'cloze', 'letters' or 'texts'",
        "did you mean 'demo:retain_heldout.jsonl'",
        "texts.plain.max_tokens",
        "'forget_token': did you mean 'forget_tokens'",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "a suite is a mapping"),
        ("a: [", "a suite is a YAML file, and this is none: line 1: "),
        ("seed: 1", "neither questions nor texts"),
        (
            "questions: {q: {path: 'demo:general_questions.jsonl', perturb: [option]}}",
            "questions.q.perturb needs forget_tokens and control_tokens",
        ),
    ],
)
def test_suites_that_cannot_run(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        load_suite(tmp_path / "suite.yaml")


def test_bundled_suite_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "assets" / "demo").mkdir(parents=True)
    (folder / "suite.yaml").rename(folder / "assets" / "demo" / "suite.yaml")
    monkeypatch.setattr(files, "package_dir", lambda: folder)
    suite = load_suite("demo")
    assert suite.texts["plain"] == Text(path=f"{folder}/text.jsonl", field="body", max_tokens=16, limit=4)
    assert Suite(questions={"q": QuestionSet(path="x")}).questions["q"].styles == ("cloze",)
    with pytest.raises(UserError, match="no such file"):
        load_suite("demos.yaml")
