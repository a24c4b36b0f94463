"""Score a causal language model on multiple-choice questions, clean and perturbed, and on plain text.

A suite (YAML) names the questions, the texts and the tokens. The options of one question share its prompt, so
a prompt is run once and its key-value cache is copied for each option; prompts of equal length share a batch,
so no prompt is ever padded. The result equals scoring every full sequence by itself.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import exp, isfinite
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, Field, ValidationError

from robust_unlearning.errors import UserError
from robust_unlearning.files import BUNDLED, locate
from robust_unlearning.perturb import QuestionSet, TokenPair, match_controls
from robust_unlearning.questions import STYLES, Question
from robust_unlearning.recipe import Strict, TextSource, explain
from robust_unlearning.scores import accuracy, excess_harm, nats_per_token
from robust_unlearning.scores import format_scores as format_scores

Tokens = tuple[int, ...]
Progress = Callable[[str, int, int], None]


class Text(Strict):
    """Documents whose tokens are predicted: JSONL with `field`, or paragraphs of a `.txt` file."""

    path: str
    field: str = "text"
    max_tokens: int = Field(128, ge=2)
    limit: int | None = Field(None, ge=1, description="use the first so many documents")


class Suite(Strict):
    """What an evaluation runs. Relative paths start at the working directory."""

    questions: dict[str, QuestionSet] = Field(default_factory=dict)
    texts: dict[str, Text] = Field(default_factory=dict)
    forget_tokens: tuple[str, ...] = ()
    control_tokens: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """`scores`: task -> numbers; `records`: one per question and form. Both are ready for JSON."""

    scores: dict[str, dict[str, Any]]
    records: list[dict[str, Any]]


def load_suite(path_or_name: str | os.PathLike[str]) -> Suite:
    """A checked suite from a YAML file or a bundled name (`demo`).

    Raises:
        UserError: no such file, not YAML, unknown or missing fields, paths where nothing is; all at once.
    """
    name = os.fspath(path_or_name)
    path = locate(BUNDLED + "suite.yaml" if name == "demo" else name)
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
    else:
        if not suite.questions and not suite.texts:
            errors = ["it has neither questions nor texts."]
        wants = [key for key, each in suite.questions.items() if each.perturb]
        if wants and not (suite.forget_tokens and suite.control_tokens):
            errors = [f"questions.{wants[0]}.perturb needs forget_tokens and control_tokens."]
    errors += _missing_files(data)
    if errors:
        raise UserError("\n  - ".join([f"the suite {name} cannot be run:", *errors]))
    return suite


def _missing_files(data: dict[str, Any]) -> list[str]:
    """A sentence for each path of a suite (unchecked, as read from YAML) where nothing is."""
    errors = []
    for group in ("questions", "texts"):
        entries = data.get(group)
        for key, entry in entries.items() if isinstance(entries, dict) else ():
            path = entry.get("path") if isinstance(entry, dict) else None
            try:
                locate(path if isinstance(path, str) else ".")
            except UserError as error:
                errors.append(f"{group}.{key}.path: {error}")
    return errors


def _fields_at(location: tuple[int | str, ...]) -> Iterable[str]:
    """Names of the fields allowed where a pydantic error points."""
    models: dict[str, type[BaseModel]] = {"questions": QuestionSet, "texts": Text}
    model = models.get(str(location[0]), Suite) if len(location) > 1 else Suite
    return model.model_fields


def evaluate(
    model: Any, tokenizer: Any, suite: Suite, progress: Progress | None = None, token_budget: int = 2048
) -> Evaluation:
    """Run a suite on a loaded causal language model.

    Tasks are `SET/STYLE/clean`, `SET/STYLE/WHERE` (forget form), `SET/STYLE/WHERE-control` and `NAME/text`. A
    question task has `acc`, `stderr`, `n`, `low`, `high` and `acc_norm` (log p per byte of the option). In
    perturbed ones `harm` is log p of the right answer less that of the clean form, in nats per token; the
    forget form also has `excess_harm` (see `scores.excess_harm`). A text has `nats_per_token`, `stderr`,
    `low`, `high`, `perplexity`, `n` (documents) and `tokens`.

    Args:
        progress: called with (set, prompts done, prompts in all).
        token_budget: tokens run at a time; lower it where memory is short.

    Raises:
        UserError: an input cannot be read or used, or the model's log-probabilities are not finite.
    """
    from robust_unlearning.corpora import read_documents

    perturbs = any(source.perturb for source in suite.questions.values())
    pairs = match_controls(tokenizer, suite.forget_tokens, suite.control_tokens) if perturbs else []
    scores: dict[str, dict[str, Any]] = {}
    records: list[dict[str, Any]] = []
    for name, source in suite.questions.items():
        forms = source.forms(pairs, suite.seed)
        asked = [
            (f"{name}/{style}/{form}", question, pair, *STYLES[style](question))
            for style in dict.fromkeys(source.styles)
            for form, questions in forms.items()
            for question, pair in questions
        ]
        items = [(prompt, [" " + option for option in options]) for *_, prompt, options in asked]
        tick = partial(progress, name) if progress else None
        results = option_logprobs(model, tokenizer, items, token_budget, tick)
        _require_finite([logp for result in results for logp, _ in result], name)
        tasks: dict[str, list[dict[str, Any]]] = {}
        for (task, question, pair, _, options), result in zip(asked, results, strict=True):
            tasks.setdefault(task, []).append({"task": task, **_record(question, pair, options, result)})
        scores |= {task: _task_scores(task, tasks, suite.seed) for task in tasks}
        records += [record for rows in tasks.values() for record in rows]
    for name, text in suite.texts.items():
        limits = {"min_chars": 1, "max_documents": text.limit}
        corpus = TextSource.model_validate({"path": text.path, "field": text.field, **limits})
        counted = text_nats(model, tokenizer, read_documents(corpus), text.max_tokens, token_budget)
        nats, tokens = zip(*counted, strict=True)
        _require_finite(nats, name)
        row = nats_per_token(nats, tokens, suite.seed).as_dict()
        mean = row.pop("value")
        row["perplexity"] = exp(min(mean, 700.0))  # a float holds no more
        scores[f"{name}/text"] = {"nats_per_token": mean, **row, "tokens": sum(tokens)}
    return Evaluation(scores, records)


def _record(
    question: Question, pair: TokenPair | None, options: Sequence[str], result: Sequence[tuple[float, int]]
) -> dict[str, Any]:
    logprobs = [logp for logp, _ in result]
    per_byte = [logp / len(option.encode()) for logp, option in zip(logprobs, options, strict=True)]
    prediction = int(np.argmax(logprobs))
    return {
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


def _task_scores(task: str, tasks: dict[str, list[dict[str, Any]]], seed: int) -> dict[str, Any]:
    """The scores of one task from the records of all tasks of its set."""
    own = tasks[task]
    row = accuracy([record["correct"] for record in own])
    row["acc_norm"] = float(np.mean([record["correct_norm"] for record in own]))
    if own[0]["forget_token"] is None:
        return row
    of_clean = {each["id"]: each for each in tasks[task.rsplit("/", 1)[0] + "/clean"]}
    clean = [of_clean[each["id"]] for each in own]
    control = tasks.get(f"{task}-control")
    logps = [[each["logprobs"][each["answer"]] for each in rows] for rows in (own, control or own, clean)]
    harm = excess_harm(logps[0], logps[1], [each["tokens"][each["answer"]] for each in own], logps[2], seed)
    row["harm"] = harm.forget.as_dict() if harm.forget else None
    return row | ({"excess_harm": harm.excess.as_dict()} if control else {})


def _require_finite(values: Iterable[float], name: str) -> None:
    if not all(map(isfinite, values)):
        raise UserError(
            f"{name}: log p is not finite: the model's weights hold NaN, or its dtype overflows. "
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

    As lm-evaluation-harness does it, prompt and prompt + continuation are encoded, and the continuation's
    tokens are those after the prompt's length. Equal prompts are run once. log p is logit - logsumexp in
    float32. A model whose cache cannot be copied (recurrent state, say) is scored on full sequences.

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
        for prompts in _prompt_batches(options, token_budget, _may_pad(model)):
            owners = [(row, each) for row, prompt in enumerate(prompts) for each in options[prompt]]
            scored = _cached_logps(model, prompts, owners, pad)
            if scored is None:
                sequences = [(prompts[row] + each, len(prompts[row])) for row, each in owners]
                scored = _full_logps(model, sequences, pad, token_budget)
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

    The first token of a document (the beginning-of-text token where the tokenizer sets one) is not predicted;
    a document of fewer than two tokens gives (0, 0). Padding is on the right and never counted.
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


def _may_pad(model: Any) -> bool:
    """Whether prompts of unlike lengths may share a batch: every layer attends to all that the mask lets it see.

    A sliding window counts padding as distance, so there only prompts of equal length go together.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None
    return plain and "position_ids" in inspect.signature(model.forward).parameters


def _prompt_batches(
    options: dict[Tokens, dict[Tokens, float]], budget: int, may_pad: bool
) -> Iterator[list[Tokens]]:
    """Prompts, longest first, within the budget for prompt tokens and for option tokens; of equal length unless
    they may be padded.
    """
    batch: list[Tokens] = []
    rows = width = 0
    for prompt in sorted(options, key=lambda each: (-len(each), each)):
        own, longest = len(options[prompt]), max(map(len, options[prompt]))
        full = (len(batch) + 1) * len(batch[0] if batch else prompt) > budget or (rows + own) * max(width, longest) > budget
        if batch and (full or (len(prompt) != len(batch[0]) and not may_pad)):
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

    Prompts of unlike lengths are padded on the left, masked and numbered by their own positions; options are
    padded on the right, where no token sees what comes after it.
    """
    import torch

    device = next(model.parameters()).device
    width = max(map(len, prompts))
    gaps = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([(pad,) * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    padded = bool(gaps.any())

    def placed(rows: Tensor, first: int, last: int) -> dict[str, Tensor]:
        """Mask over columns 0 to `last` and positions of columns `first` to `last`, for prompts `rows`."""
        if not padded:
            return {}
        columns = torch.arange(last, device=device)
        mask = (columns >= gaps[rows, None]).long()
        return {"attention_mask": mask, "position_ids": (columns[first:] - gaps[rows, None]).clamp(min=0)}

    every = torch.arange(len(prompts), device=device)
    output = model(input_ids=ids, use_cache=True, **placed(every, 0, width), **_keep(model, 1))
    row = torch.tensor([each for each, _ in owners], device=device)
    firsts = torch.tensor([continuation[0] for _, continuation in owners], device=device)
    last = output.logits[:, -1].float()
    total = last[row, firsts] - last.logsumexp(dim=-1)[row]
    longer = [index for index, (_, continuation) in enumerate(owners) if len(continuation) > 1]
    if longer:
        cache: Any = getattr(output, "past_key_values", None)
        if not _can_copy(cache):
            return None
        cache.batch_select_indices(row[longer])  # [prompts, …] -> [options, …]
        ids, real = _padded([owners[index][1] for index in longer], pad, device)
        where = placed(row[longer], width, width + ids.shape[1] - 1)
        logits = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, **where).logits
        total[longer] += _token_logps(logits, ids[:, 1:]).masked_fill(~real[:, 1:], 0).sum(dim=1)
    return total.tolist()


def _can_copy(cache: Any) -> bool:
    """Whether copying rows of this cache is known to copy all that a model remembers of a prompt."""
    from transformers import cache_utils

    kinds = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    return type(cache) is cache_utils.DynamicCache and all(type(layer) in kinds for layer in cache.layers)


def _full_logps(model: Any, sequences: Sequence[tuple[Tokens, int]], pad: int, budget: int) -> list[float]:
    """For each (tokens, start), the sum of log p of the tokens from `start` (at least 1) on."""
    device = next(model.parameters()).device
    result = [0.0] * len(sequences)
    order = [index for index, (ids, start) in enumerate(sequences) if len(ids) > start]
    order.sort(key=lambda index: -len(sequences[index][0]))
    while order:
        rows = max(1, budget // len(sequences[order[0]][0]))
        batch, order = order[:rows], order[rows:]
        ids, real = _padded([sequences[index][0] for index in batch], pad, device)
        first = min(sequences[index][1] for index in batch)
        keep = ids.shape[1] - first + 1  # the positions that predict tokens from `first` on, and the last
        logits = model(input_ids=ids, use_cache=False, **_keep(model, keep)).logits[:, -keep:-1]
        for line, index in enumerate(batch):
            real[line, : sequences[index][1]] = False
        sums = _token_logps(logits, ids[:, first:]).masked_fill(~real[:, first:], 0).sum(dim=1)
        for index, logp in zip(batch, sums.tolist(), strict=True):
            result[index] = logp
    return result


def _token_logps(logits: Any, targets: Any) -> Any:
    """log p [b, t] in float32 of tokens [b, t] under logits [b, t, vocabulary], row by row for memory."""
    import torch

    norm = torch.stack([row.float().logsumexp(dim=-1) for row in logits])
    return logits.gather(-1, targets[..., None])[..., 0].float() - norm


def _padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Any, Any]:
    """Token ids [b, t] padded on the right, and True where a token is real."""
    from robust_unlearning.corpora import collate

    batch = collate([list(row) for row in rows], pad).to(device)
    return batch.ids, batch.mask.bool()


def _keep(model: Any, positions: int) -> dict[str, int]:
    """The argument that limits logits to the last positions, for models that take it."""
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": positions} if takes else {}


def _pad_id(tokenizer: Any) -> int:
    return next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)


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
