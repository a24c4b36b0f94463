"""Score a causal language model on multiple-choice questions, clean and perturbed, and on plain text.

A suite (YAML) names the questions, the texts and the tokens. The options of one question share its prompt, so a
prompt is run once and its key-value cache is copied for each option; prompts of equal length share a batch, so
no prompt is ever padded. The result equals scoring every full sequence by itself.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp, isfinite
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from robust_unlearning.errors import UserError
from robust_unlearning.files import BUNDLED, locate
from robust_unlearning.perturb import TokenPair, draw, match_controls, paired_forms
from robust_unlearning.questions import STYLES, Question, read_questions
from robust_unlearning.recipe import Strict, TextSource, explain
from robust_unlearning.scores import accuracy, excess_harm, nats_per_token

BUNDLED_SUITES = {"demo": BUNDLED + "suite.yaml"}
Tokens = tuple[int, ...]
Progress = Callable[[str, int, int], None]


class QuestionSet(Strict):
    """A multiple-choice set, how it is asked, and where tokens are put into it."""

    path: str
    config: str | None = None
    split: str = "test"
    styles: Annotated[tuple[Literal["cloze", "letters"], ...], Field(min_length=1)] = ("cloze",)
    perturb: tuple[Literal["parenthesis", "sentence", "option"], ...] = ()
    limit: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="use this many questions, drawn by seed and id; a smaller draw is part of a larger one",
    )


class Text(Strict):
    """Documents whose tokens are predicted: JSONL with `field`, or paragraphs of a `.txt` file."""

    path: str
    field: str = "text"
    max_tokens: Annotated[int, Field(ge=2)] = 128
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="use the first so many documents")


class Suite(Strict):
    """What an evaluation runs. Relative paths start at the working directory."""

    questions: dict[str, QuestionSet] = {}
    texts: dict[str, Text] = {}
    forget_tokens: tuple[str, ...] = ()
    control_tokens: tuple[str, ...] = ()
    seed: int = 0

    @model_validator(mode="after")
    def _complete(self) -> Suite:
        if not self.questions and not self.texts:
            raise ValueError("a suite needs questions, texts or both")
        wants = [name for name, each in self.questions.items() if each.perturb]
        if wants and not (self.forget_tokens and self.control_tokens):
            raise ValueError(f"questions.{wants[0]}.perturb needs forget_tokens and control_tokens")
        return self


@dataclass(frozen=True)
class Evaluation:
    """`scores`: task -> numbers; `records`: one per question and form. Both are ready for JSON."""

    scores: dict[str, dict[str, Any]]
    records: list[dict[str, Any]]


def load_suite(path_or_name: str | os.PathLike[str]) -> Suite:
    """A checked suite from a YAML file or a bundled name (`demo`).

    Raises:
        UserError: no such file, not YAML, unknown or missing fields, files that are not there; all in one message.
    """
    name = os.fspath(path_or_name)
    path = locate(BUNDLED_SUITES.get(name, name))
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{name}: a suite is a YAML file: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{name}: a suite is a mapping with questions, texts or both.")
    errors = []
    try:
        suite = Suite.model_validate(data)
    except ValidationError as error:
        errors = explain(error, _fields_at)
    for group in ("questions", "texts"):
        entries = data.get(group)
        for key, entry in entries.items() if isinstance(entries, dict) else ():
            given = entry.get("path") if isinstance(entry, dict) else None
            if isinstance(given, str) and not given.startswith("hub:"):
                try:
                    locate(given)
                except UserError as error:
                    errors.append(f"{group}.{key}.path: {error}")
    if errors:
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        raise UserError(f"{name}: {count}\n" + "\n".join(f"  - {line}" for line in errors))
    return suite


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Dotted names of the fields allowed where a pydantic error points."""
    model = {"questions": QuestionSet, "texts": Text}.get(str(location[0]), Suite) if location[1:] else Suite
    return [".".join([*map(str, location[:-1]), field]) for field in model.model_fields]


@dataclass(frozen=True)
class _Task:
    """One set in one style and form; `pairs` holds None for the clean form."""

    name: str
    style: str
    questions: list[Question]
    pairs: list[TokenPair | None]
    control: str = ""  # the name of the control task, for the forget form


def evaluate(
    model: Any, tokenizer: Any, suite: Suite, progress: Progress | None = None, token_budget: int = 2048
) -> Evaluation:
    """Run a suite on a loaded causal language model.

    Tasks are `SET/STYLE/clean`, `SET/STYLE/WHERE` (forget form), `SET/STYLE/WHERE-control` and `NAME/text`. A
    question task has `acc`, `stderr`, `n`, `low`, `high` and `acc_norm` (log p per byte of the option); perturbed
    ones also have `harm` (log p of the right answer less that of the clean form, nats per token), the forget form
    `excess_harm` (see `scores.excess_harm`). A text has `nats_per_token`, `stderr`, `low`, `high`, `perplexity`,
    `n` (documents) and `tokens`.

    Args:
        progress: called with (set, prompts done, prompts in all).
        token_budget: tokens run at a time; lower it where memory is short.

    Raises:
        UserError: an input cannot be read or used, or the model gives log-probabilities that are not finite.
    """
    from robust_unlearning.corpora import read_documents

    perturbs = any(source.perturb for source in suite.questions.values())
    pairs = match_controls(tokenizer, suite.forget_tokens, suite.control_tokens) if perturbs else []
    scores: dict[str, dict[str, Any]] = {}
    records: list[dict[str, Any]] = []
    for name, source in suite.questions.items():
        tasks = _tasks(name, source, pairs, suite.seed)
        asked = [STYLES[task.style](question) for task in tasks for question in task.questions]
        items = [(prompt, [" " + option for option in options]) for prompt, options in asked]
        tick = (lambda done, total, name=name: progress(name, done, total)) if progress else None
        results = option_logprobs(model, tokenizer, items, token_budget, tick)
        _require_finite([logp for result in results for logp, _ in result], name)
        scored = iter(zip(asked, results, strict=True))
        own = {
            task.name: [_record(task, i, *next(scored)) for i in range(len(task.questions))] for task in tasks
        }
        scores |= {task.name: _task_scores(task, own, suite.seed) for task in tasks}
        records += [record for rows in own.values() for record in rows]
    for name, text in suite.texts.items():
        source_text = TextSource(path=text.path, field=text.field, min_chars=1, max_documents=text.limit)
        counted = text_nats(model, tokenizer, read_documents(source_text), text.max_tokens, token_budget)
        nats, tokens = zip(*counted, strict=True)
        _require_finite(nats, name)
        mean = nats_per_token(nats, tokens, suite.seed).as_dict()
        value = mean.pop("value")
        scores[f"{name}/text"] = {
            "nats_per_token": value,
            **mean,
            "perplexity": exp(value),
            "tokens": sum(tokens),
        }
    return Evaluation(scores, records)


def _tasks(name: str, source: QuestionSet, pairs: list[TokenPair], seed: int) -> list[_Task]:
    questions = read_questions(source.path, config=source.config, split=source.split)
    if source.limit is not None:
        kept = sorted(questions, key=lambda each: draw(seed, each.id, "limit"))[: source.limit]
        questions = [each for each in questions if each in kept]
    tasks = []
    for style in dict.fromkeys(source.styles):
        base = f"{name}/{style}"
        tasks.append(_Task(f"{base}/clean", style, questions, [None] * len(questions)))
        for where in dict.fromkeys(source.perturb):
            forget, control, used = map(list, zip(*paired_forms(questions, pairs, where, seed), strict=True))
            tasks.append(_Task(f"{base}/{where}", style, forget, used, control=f"{base}/{where}-control"))
            tasks.append(_Task(f"{base}/{where}-control", style, control, used))
    return tasks


def _record(
    task: _Task, index: int, asked: tuple[str, Sequence[str]], result: list[tuple[float, int]]
) -> dict[str, Any]:
    question, pair = task.questions[index], task.pairs[index]
    logprobs = [logp for logp, _ in result]
    per_byte = [logp / len(option.encode("utf-8")) for logp, option in zip(logprobs, asked[1], strict=True)]
    prediction = int(np.argmax(logprobs))
    return {
        "task": task.name,
        "id": question.id,
        "answer": question.answer,
        "prediction": prediction,
        "correct": prediction == question.answer,
        "correct_norm": int(np.argmax(per_byte)) == question.answer,
        "logprobs": logprobs,
        "tokens": [tokens for _, tokens in result],
        "forget_token": pair.forget if pair else None,
        "control_token": pair.control if pair else None,
    }


def _task_scores(task: _Task, records: dict[str, list[dict[str, Any]]], seed: int) -> dict[str, Any]:
    own = records[task.name]
    row = accuracy([record["correct"] for record in own])
    row["acc_norm"] = float(np.mean([record["correct_norm"] for record in own]))
    if task.pairs[0] is None:
        return row
    clean = {each["id"]: each for each in records[task.name.rsplit("/", 1)[0] + "/clean"]}

    def right(rows: Iterable[dict[str, Any]]) -> list[float]:
        return [each["logprobs"][each["answer"]] for each in rows]

    other = records[task.control] if task.control else own
    counts = [each["tokens"][each["answer"]] for each in own]
    before = right(clean[each["id"]] for each in own)
    harm = excess_harm(right(own), right(other), counts, before, seed)
    if harm.forget:
        row["harm"] = harm.forget.as_dict()
    return row | ({"excess_harm": harm.excess.as_dict()} if task.control else {})


def _require_finite(values: Iterable[float], name: str) -> None:
    if not all(map(isfinite, values)):
        raise UserError(
            f"{name}: the model's log-probabilities are not finite: its weights hold NaN, or its dtype overflows. "
            "Check the training run, or evaluate in bfloat16 or float32."
        )


def option_logprobs(
    model: Any,
    tokenizer: Any,
    items: Sequence[tuple[str, Sequence[str]]],
    token_budget: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[tuple[float, int]]]:
    """log p(continuation | prompt) of every continuation of every item, scored in groups that share a prompt.

    As lm-evaluation-harness does it, prompt and prompt + continuation are encoded, and the continuation's tokens
    are those after the prompt's length. Equal prompts are run once. log p is logit - logsumexp in float32.
    A model whose cache cannot be copied per option (recurrent state, for one) is scored on full sequences.

    Args:
        items: (prompt, continuations with their leading space).
        token_budget: prompt tokens, and option tokens, run at a time (one prompt at least).
        progress: called with (prompts done, prompts in all).

    Returns:
        For each item, (sum of log p in nats, tokens) per continuation.

    Raises:
        UserError: an empty prompt, or a continuation that adds no token to its prompt.
    """
    pad = _pad_id(tokenizer)
    encoded = _encode(tokenizer, items)
    options: dict[Tokens, dict[Tokens, float]] = {}
    for pairs in encoded:
        for prompt, continuation in pairs:
            options.setdefault(prompt, {})[continuation] = 0.0
    done = 0
    with _scoring(model):
        for prompts in _prompt_batches(options, token_budget):
            owners = [(row, each) for row, prompt in enumerate(prompts) for each in options[prompt]]
            scored = _cached_logps(model, prompts, owners, pad)
            if scored is None:
                pairs = [(prompt, each) for prompt in options for each in options[prompt]]
                sequences = [((*prompt, *each), len(prompt)) for prompt, each in pairs]
                for (prompt, each), logp in zip(
                    pairs, _full_logps(model, sequences, pad, token_budget), strict=True
                ):
                    options[prompt][each] = logp
                break
            for (row, each), logp in zip(owners, scored, strict=True):
                options[prompts[row]][each] = logp
            done += len(prompts)
            if progress:
                progress(done, len(options))
    return [[(options[prompt][each], len(each)) for prompt, each in pairs] for pairs in encoded]


def text_nats(
    model: Any, tokenizer: Any, texts: Sequence[str], max_tokens: int, token_budget: int = 2048
) -> list[tuple[float, int]]:
    """(sum of -log p in nats, tokens predicted) per document, cut to `max_tokens` tokens.

    The first token of a document (the beginning-of-text token where the tokenizer sets one) is not predicted; a
    document of fewer than two tokens gives (0, 0). Padding is on the right and never counted.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"] if texts else []
    sequences = [(tuple(each), 1) for each in encoded]
    with _scoring(model):
        logps = _full_logps(model, sequences, _pad_id(tokenizer), token_budget)
    return [(-logp, max(0, len(each) - 1)) for logp, each in zip(logps, encoded, strict=True)]


def _encode(tokenizer: Any, items: Sequence[tuple[str, Sequence[str]]]) -> list[list[tuple[Tokens, Tokens]]]:
    """(prompt tokens, continuation tokens) per continuation of each item."""
    texts = [text for prompt, ends in items for text in (prompt, *(prompt + end for end in ends))]
    ids = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else [])
    encoded = []
    for prompt, ends in items:
        cut = len(next(ids))
        wholes = [tuple(next(ids)) for _ in ends]
        for end, whole in zip(ends, wholes, strict=True):
            if not 0 < cut < len(whole):
                raise UserError(f"{end!r} adds no token after the prompt {prompt[-60:]!r}, or that is empty.")
        encoded.append([(whole[:cut], whole[cut:]) for whole in wholes])
    return encoded


def _prompt_batches(options: dict[Tokens, dict[Tokens, float]], budget: int) -> Iterator[list[Tokens]]:
    """Prompts in groups of equal length, within the budget for prompt tokens and for option tokens."""
    batch: list[Tokens] = []
    rows = width = 0
    for prompt in sorted(options, key=lambda each: (-len(each), each)):
        own, longest = len(options[prompt]), max(map(len, options[prompt]))
        full = (len(batch) + 1) * len(prompt) > budget or (rows + own) * max(width, longest) > budget
        if batch and (full or len(prompt) != len(batch[0])):
            yield batch
            batch, rows, width = [], 0, 0
        batch.append(prompt)
        rows, width = rows + own, max(width, longest)
    if batch:
        yield batch


def _cached_logps(
    model: Any, prompts: list[Tokens], owners: list[tuple[int, Tokens]], pad: int
) -> list[float] | None:
    """log p of each (row of its prompt, continuation); None where the model's cache cannot be copied.

    `prompts` are of equal length. Options are padded on the right; no attention mask is needed, because no
    token sees what comes after it.
    """
    import torch

    device = next(model.parameters()).device
    output = model(input_ids=torch.tensor(prompts, device=device), use_cache=True, **_keep(model, 1))
    row = torch.tensor([each for each, _ in owners], device=device)
    firsts = torch.tensor([continuation[0] for _, continuation in owners], device=device)
    last = output.logits[:, -1].float()
    total = last[row, firsts] - last.logsumexp(dim=-1)[row]
    longer = [index for index, (_, continuation) in enumerate(owners) if len(continuation) > 1]
    if longer:
        cache = getattr(output, "past_key_values", None)
        if not _can_copy(cache):
            return None
        cache.batch_select_indices(row[longer])  # [prompts, …] -> [options, …]
        tails = [owners[index][1] for index in longer]
        ids, real = _padded([tail[:-1] for tail in tails], pad, device)
        targets, _ = _padded([tail[1:] for tail in tails], pad, device)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        total[longer] += _token_logps(logits, targets).masked_fill(~real, 0).sum(dim=1)
    return total.tolist()


def _can_copy(cache: Any) -> bool:
    """Whether copying rows of this cache is known to copy all that a model remembers of a prompt."""
    from transformers import cache_utils

    kinds = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    return type(cache) is cache_utils.DynamicCache and all(type(layer) in kinds for layer in cache.layers)


def _full_logps(model: Any, sequences: Sequence[tuple[Tokens, int]], pad: int, budget: int) -> list[float]:
    """For each (tokens, start), the sum of log p of the tokens from `start` (at least 1) on, longest first."""
    device = next(model.parameters()).device
    result = [0.0] * len(sequences)
    order = [index for index, (ids, start) in enumerate(sequences) if len(ids) > start]
    order.sort(key=lambda index: -len(sequences[index][0]))
    while order:
        rows = max(1, budget // len(sequences[order[0]][0]))
        batch, order = order[:rows], order[rows:]
        ids, real = _padded([sequences[index][0] for index in batch], pad, device)
        starts = [sequences[index][1] for index in batch]
        first = min(starts)
        keep = (
            ids.shape[1] - first + 1
        )  # the positions that predict tokens `first` … last, and the last itself
        logits = model(input_ids=ids, use_cache=False, **_keep(model, keep)).logits[:, -keep:-1]
        for line, start in enumerate(starts):
            real[line, :start] = False
        sums = _token_logps(logits, ids[:, first:]).masked_fill(~real[:, first:], 0).sum(dim=1)
        for index, logp in zip(batch, sums.tolist(), strict=True):
            result[index] = logp
    return result


def _token_logps(logits: Any, targets: Any) -> Any:
    """log p [b, t] in float32 of tokens [b, t] under logits [b, t, vocabulary], one row at a time for memory."""
    import torch

    norm = torch.stack([row.float().logsumexp(dim=-1) for row in logits])
    return logits.gather(-1, targets[..., None])[..., 0].float() - norm


def _padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Any, Any]:
    """Token ids [b, t] padded on the right, and True where a token is real."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def _keep(model: Any, positions: int) -> dict[str, int]:
    """The argument that limits logits to the last positions, for models that take it."""
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": positions} if takes else {}


def _pad_id(tokenizer: Any) -> int:
    given = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((each for each in given if each is not None), 0)


@contextmanager
def _scoring(model: Any) -> Iterator[None]:
    """Evaluation mode, no gradients; the model's mode is put back afterwards."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
