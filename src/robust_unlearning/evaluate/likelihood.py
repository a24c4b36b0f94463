"""Log-probabilities of continuations and of texts under a Hugging Face causal language model.

What sequences begin with in common is run once, and logits are made only where a token is predicted: see
`prefix_tree`. The result equals scoring every full sequence by itself. A model that cannot be run on a tree
(recurrent state, a window shorter than the sequences) is scored on full sequences.

Shapes: b rows of a batch, t tokens of a row, s tokens of a stem, r rows of logits, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.prefix_tree import Tokens, Tree, batches

if TYPE_CHECKING:
    from torch import Tensor

Run = Iterator[tuple["Tensor", dict[Tokens, list[int]]]]
"""For some sequences at a time: logits [r, V], and sequence -> its rows, from its start on."""
ROWS = 64
"""Rows of logits that are made float32 at a time."""


def continuation_logps(
    model: Any,
    pairs: Sequence[tuple[Tokens, Tokens]],
    token_budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, bool]]:
    """For each (context, continuation) log p(continuation | context) in nats, and whether it is the greedy one.

    log p is the sum over the continuation's tokens of logit - logsumexp, in float32. Greedy means that each of
    them has the highest logit. As nothing follows a continuation's last token, that token is never run: the four
    letters of a question cost no more than the question.

    Args:
        pairs: token ids, at least one in a context; a continuation without tokens gives (0, True).
        token_budget: tokens run at a time (one sequence at least); left out, `default_budget`.
        progress: called with (sequences done, sequences in all); each distinct sequence is run once.
    """
    results = [(0.0, True)] * len(pairs)
    of_sequence: dict[Tokens, list[int]] = {}
    starts: dict[Tokens, int] = {}
    for index, (context, continuation) in enumerate(pairs):
        if continuation:
            sequence = context + continuation[:-1]
            of_sequence.setdefault(sequence, []).append(index)
            starts[sequence] = min(starts.get(sequence, len(sequence)), len(context) - 1)
    done = 0
    with _scoring(model):
        for logits, rows in _logits(model, starts, token_budget or default_budget(next(model.parameters()).device)):
            indices = [index for sequence in rows for index in of_sequence[sequence]]
            ends = [pairs[index][1] for index in indices]
            ours = [rows[pairs[index][0] + end[:-1]][-len(end) :] for index, end in zip(indices, ends, strict=True)]
            for index, result in zip(indices, _scored(logits, ours, ends), strict=True):
                results[index] = result
            done += len(rows)
            if progress:
                progress(done, len(of_sequence))
    return results


def default_budget(device: Any) -> int:
    """Tokens run at a time: 512 on a CPU, where more take no less time each (docs/log.md), 4096 elsewhere."""
    return 512 if device.type == "cpu" else 4096


def option_logprobs(
    model: Any,
    tokenizer: Any,
    items: Sequence[tuple[str, Sequence[str]]],
    token_budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[tuple[float, int]]]:
    """log p(continuation | prompt) of every continuation of every item; see `continuation_logps`.

    As lm-evaluation-harness does it, prompt and prompt + continuation are encoded, and the continuation's
    tokens are those after the prompt's length.

    Args:
        items: (prompt, continuations with their leading space).

    Returns:
        For each item, (sum of log p in nats, tokens) per continuation.

    Raises:
        UserError: an empty prompt, or a continuation that adds no token to its prompt.
    """
    encoded = _encode(tokenizer, items)
    scored = continuation_logps(model, [pair for pairs in encoded for pair in pairs], token_budget, progress)
    logps = iter(scored)
    return [[(next(logps)[0], len(each)) for _, each in pairs] for pairs in encoded]


def text_nats(
    model: Any, tokenizer: Any, texts: Sequence[str], max_tokens: int, token_budget: int | None = None
) -> list[tuple[float, int]]:
    """(sum of -log p in nats, tokens predicted) per document, cut to `max_tokens` tokens.

    The first token of a document (the beginning-of-text token where the tokenizer sets one) is not predicted;
    a document of fewer than two tokens gives (0, 0).
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"] if texts else []
    scored = continuation_logps(model, [(tuple(each[:1]), tuple(each[1:])) for each in encoded], token_budget)
    return [(-logp, max(0, len(each) - 1)) for (logp, _), each in zip(scored, encoded, strict=True)]


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


def _logits(model: Any, starts: Mapping[Tokens, int], budget: int) -> Run:
    """The logits that predict what follows each sequence's token number `starts` and all after it."""
    if starts and _takes_trees(model, max(map(len, starts))):
        return _tree_logits(model, batches(starts, budget), starts)
    return _full_logits(model, starts, budget)


def _takes_trees(model: Any, longest: int) -> bool:
    """Whether the model computes on a tree of sequences what it computes on each by itself.

    No layer may have another memory than attention over at least `longest` tokens; and three short sequences, run in
    two trees behind a stem, must get the logits that they get alone, but for rounding.
    """
    import torch

    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"])
    narrow = "sliding_attention" in kinds and window is not None and longest > window
    if narrow or not kinds <= {"full_attention", "sliding_attention"}:
        return False
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    trees = [Tree(stem=(5,)), Tree(stem=(5,))]
    trees[0].add((5, 6, 7, 8), shared=1)
    trees[0].add((5, 6, 9, 7, 8), shared=2)
    trees[1].add((5, 9, 8), shared=1)
    starts = {sequence: len(sequence) - 1 for tree in trees for sequence in tree.paths}
    try:
        with torch.inference_mode():
            ((logits, rows),) = _tree_logits(model, [trees], starts)
    except (RuntimeError, TypeError, ValueError):
        return False
    for alone, (sequence,) in _full_logits(model, starts, budget=1):
        largest = (logits[rows[sequence]] - alone).float().abs().max()
        if not largest < torch.finfo(model.dtype).eps ** 0.5 * alone.float().std():
            return False
    return True


def _tree_logits(model: Any, of: Iterable[Sequence[Tree]], starts: Mapping[Tokens, int]) -> Run:
    """Batch by batch; a stem's key-value cache is kept while batches of that stem follow."""
    import torch
    from transformers import DynamicCache

    from robust_unlearning.data.corpora import collate

    device = next(model.parameters()).device
    stem: Tokens = ()
    cache: Any = None
    for batch in of:
        if batch[0].stem != stem:
            stem, cache = batch[0].stem, DynamicCache() if batch[0].stem else None
            if stem:
                ids = torch.tensor([stem], device=device)
                model(input_ids=ids, past_key_values=cache, use_cache=True, **_limit(model, [0], device))
        behind = copy.deepcopy(cache)
        if behind is not None:
            behind.batch_repeat_interleave(len(batch))
        places = {
            sequence: (line, path[starts[sequence] - len(stem) :])
            for line, tree in enumerate(batch)
            for sequence, path in tree.paths.items()
        }
        columns = sorted({place for _, path in places.values() for place in path})
        limited = _limit(model, columns, device)
        logits = model(
            input_ids=collate([tree.ids for tree in batch], 0).ids.to(device),
            position_ids=collate([tree.positions for tree in batch], 0).ids.to(device),
            attention_mask=_tree_mask(batch, model.dtype, device),
            past_key_values=behind,
            use_cache=behind is not None,
            **limited,
        ).logits
        column = {place: index for index, place in enumerate(columns)} if limited else range(logits.shape[1])
        cells_of = {sequence: [(line, column[place]) for place in path] for sequence, (line, path) in places.items()}
        wanted = sorted({cell for cells in cells_of.values() for cell in cells})
        row = {cell: index for index, cell in enumerate(wanted)}
        lines, across = zip(*wanted, strict=True)
        rows = {sequence: [row[cell] for cell in cells] for sequence, cells in cells_of.items()}
        yield logits[list(lines), list(across)], rows


def _tree_mask(batch: Sequence[Tree], dtype: Any, device: Any) -> Tensor:
    """What is added to attention scores [b, 1, t, s + t]: 0 towards the stem and what stands on a token's way from
    the root, the lowest number elsewhere. Padding stands behind a tree's tokens, which see none of it.
    """
    import torch

    stem, width = len(batch[0].stem), max(len(each.ids) for each in batch)
    sees = torch.zeros(len(batch), width, stem + width, dtype=torch.bool)
    sees[:, :, :stem] = True
    for line, tree in enumerate(batch):
        inside = sees[line, :, stem:]
        for first, last, parent in tree.branches:
            if parent is not None:
                inside[first:last] = inside[parent]
            inside[first:last, first:last] = torch.ones(last - first, last - first, dtype=torch.bool).tril()
        inside[len(tree.ids) :, 0] = True  # a row of scores without any is not a number in some models
    hidden = sees.logical_not().to(device)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, torch.finfo(dtype).min)[:, None]


def _full_logits(model: Any, starts: Mapping[Tokens, int], budget: int) -> Run:
    """Batches of full sequences, longest first, padded on the right, where no token sees what comes after it."""
    import torch

    from robust_unlearning.data.corpora import collate

    device = next(model.parameters()).device
    order = sorted(starts, key=len, reverse=True)
    while order:
        count = max(1, budget // len(order[0]))
        batch, order = order[:count], order[count:]
        ids = collate([list(sequence) for sequence in batch], 0).to(device).ids
        first, width = min(starts[sequence] for sequence in batch), ids.shape[1]
        limited = _limit(model, range(first, width), device)
        logits = model(input_ids=ids, use_cache=False, **limited).logits
        logits = logits if limited else logits[:, first:]
        rows: dict[Tokens, list[int]] = {}
        parts: list[Tensor] = []
        before = 0
        for line, sequence in enumerate(batch):
            parts.append(logits[line, starts[sequence] - first : len(sequence) - first])
            rows[sequence] = list(range(before, before := before + len(sequence) - starts[sequence]))
        yield torch.cat(parts), rows


def _scored(logits: Tensor, rows: Sequence[list[int]], ends: Sequence[Tokens]) -> list[tuple[float, bool]]:
    """(log p, greedy) of continuations, each given by its rows of `logits` [r, V] and the tokens that they predict."""
    import torch

    norm = torch.cat([part.float().logsumexp(dim=-1) for part in logits.split(ROWS)])
    best = torch.cat([part.argmax(dim=-1) for part in logits.split(ROWS)])
    row = torch.tensor([*chain.from_iterable(rows)], device=logits.device)
    token = torch.tensor([*chain.from_iterable(ends)], device=logits.device)
    logps = iter((logits[row, token].float() - norm[row]).tolist())
    greedy = iter((best[row] == token).tolist())
    return [(sum(islice(logps, len(end))), all([*islice(greedy, len(end))])) for end in ends]


def _limit(model: Any, columns: Sequence[int], device: Any) -> dict[str, Tensor]:
    """The argument that limits logits to some columns, for models that take it.

    As indices, not as a count: with a count the models take a slice, whose rows are not contiguous, and the LM
    head then reads its whole weight once a row (see docs/log.md).
    """
    import torch

    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": torch.tensor(list(columns), device=device)} if takes else {}


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
