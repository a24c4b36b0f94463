"""Log-probabilities of continuations and of texts under a Hugging Face causal language model.

Continuations of one prompt share it: a prompt is run once, and its key-value cache is copied for each of them.
The result equals scoring every full sequence by itself.

Shapes: b sequences of a batch, t tokens of a sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from robust_unlearning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Tokens = tuple[int, ...]


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


def _prompt_batches(options: dict[Tokens, dict[Tokens, float]], budget: int, may_pad: bool) -> Iterator[list[Tokens]]:
    """Prompts, longest first, within the budget for prompt tokens and for option tokens; of equal length unless
    they may be padded.
    """
    batch: list[Tokens] = []
    rows = width = 0
    for prompt in sorted(options, key=lambda each: (-len(each), each)):
        own, longest = len(options[prompt]), max(map(len, options[prompt]))
        full = (len(batch) + 1) * len(batch[0] if batch else prompt) > budget or (rows + own) * max(
            width, longest
        ) > budget
        if batch and (full or (len(prompt) != len(batch[0]) and not may_pad)):
            yield batch
            batch, rows, width = [], 0, 0
        batch.append(prompt)
        rows, width = rows + own, max(width, longest)
    if batch:
        yield batch


def _cached_logps(model: Any, prompts: list[Tokens], owners: list[tuple[int, Tokens]], pad: int) -> list[float] | None:
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
    last_one = _keep(model, width - 1, width, device)
    output = model(input_ids=ids, use_cache=True, **placed(every, 0, width), **last_one)
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
        kept = _keep(model, first - 1, ids.shape[1] - 1, device)  # what predicts tokens from `first` on
        logits = model(input_ids=ids, use_cache=False, **kept).logits
        logits = logits if kept else logits[:, first - 1 : -1]
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


def _keep(model: Any, first: int, last: int, device: Any) -> dict[str, Tensor]:
    """The argument that limits logits to columns `first` to `last` - 1, for models that take it.

    As indices, not as a count: with a count the models take a slice, whose rows are not contiguous, and the LM
    head then reads its whole weight once a row (see docs/log.md).
    """
    import torch

    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": torch.arange(first, last, device=device)} if takes else {}


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
