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
from robust_unlearning.questions import LETTERS, Question, read_questions
from robust_unlearning.recipe import Strict, TextSource, explain
from robust_unlearning.scores import Estimate, accuracy, excess_harm, nats_per_token

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
        None, description="use this many questions, drawn by seed and id; a smaller draw is part of a larger one"
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


def cloze_prompt(question: Question) -> tuple[str, tuple[str, ...]]:
    """The prompt without the choices, and the choices as the texts that may follow it after a space."""
    return f"Question: {question.question}\nAnswer:", question.choices


def letters_prompt(question: Question) -> tuple[str, tuple[str, ...]]:
    """MMLU's zero-shot prompt (the paper's Figure 6), and the letters that may follow it after a space.

    Raises:
        UserError: more choices than letters.
    """
    if len(question.choices) > len(LETTERS):
        raise UserError(f"question {question.id!r} has more than 26 choices; ask it in the cloze style.")
    about = f" about {question.subject.replace('_', ' ')}" if question.subject else ""
    letters = tuple(LETTERS[: len(question.choices)])
    options = "".join(
        f"{letter}. {choice}\n" for letter, choice in zip(letters, question.choices, strict=True)
    )
    head = f"The following are multiple choice questions (with answers){about}."
    return f"{head}\n\n{question.question.strip()}\n{options}Answer:", letters


STYLES = {"cloze": cloze_prompt, "letters": letters_prompt}


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
    firsts = torch.tensor([[continuation[0]] for _, continuation in owners], device=device)
    total = _token_logps(output.logits[:, -1:][row], firsts)[:, 0]
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
        total[longer] += (_token_logps(logits, targets) * real).sum(dim=1)
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
    order = sorted((i for i, (ids, start) in enumerate(sequences) if len(ids) > start), key=_by(sequences))
    while order:
        rows = max(1, budget // len(sequences[order[0]][0]))
        batch, order = order[:rows], order[rows:]
        ids, real = _padded([sequences[index][0] for index in batch], pad, device)
        starts = [sequences[index][1] for index in batch]
        first = min(starts)
        keep = ids.shape[1] - first + 1  # the positions that predict tokens `first` … last, and the last itself
        logits = model(input_ids=ids, use_cache=False, **_keep(model, keep)).logits[:, -keep:-1]
        for line, start in enumerate(starts):
            real[line, :start] = 0
        sums = (_token_logps(logits, ids[:, first:]) * real[:, first:]).sum(dim=1).tolist()
        for index, logp in zip(batch, sums, strict=True):
            result[index] = logp
    return result


def _by(sequences: Sequence[tuple[Tokens, int]]) -> Callable[[int], int]:
    return lambda index: -len(sequences[index][0])


def _token_logps(logits: Any, targets: Any) -> Any:
    """log p [b, t] in float32 of tokens [b, t] under logits [b, t, vocabulary], one row at a time for memory."""
    import torch

    norm = torch.stack([row.float().logsumexp(dim=-1) for row in logits])
    return logits.gather(-1, targets[..., None])[..., 0].float() - norm


def _padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Any, Any]:
    """Token ids [b, t] padded on the right, and 1.0 where a token is real."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(width, device=device) < lengths[:, None]).float()


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
