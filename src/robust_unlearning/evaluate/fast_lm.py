"""Models of lm-evaluation-harness over a model that is loaded already: its own `hf`, and one that is faster.

Both have lm-eval's tokenisation, truncation and beginning-of-text tokens, since both are its `HFLM`; the fast one
only computes the log-probabilities in another way (`likelihood.continuation_logps`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from robust_unlearning.errors import UserError
from robust_unlearning.evaluate.likelihood import continuation_logps

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""(context and continuation as text, None for a window of a long text), context ids, continuation ids."""


class PlainLM(HFLM):
    """lm-eval's `hf` on a loaded model.

    Attributes:
        continuation_tokens: (context, continuation) -> tokens of the continuation, of all requests so far.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        token_budget: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.token_budget = token_budget
        self.progress = progress
        self.continuation_tokens: dict[tuple[str, str], int] = {}

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log p, greedy) of each request; without the bar of lm-eval's tokenisation."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self.continuation_tokens |= {texts: len(end) for texts, _, end in requests if texts}
        return self._score(requests, override_bs)

    def _score(self, requests: Sequence[Request], override_bs: int | None) -> list[tuple[float, bool]]:
        """(log p, greedy) of each request, by lm-eval's own code."""
        return super()._loglikelihood_tokens(requests, disable_tqdm=not sys.stderr.isatty(), override_bs=override_bs)


class FastLM(PlainLM):
    """The same scores with shared beginnings run once, no padding, and logits only where a token is predicted."""

    def _score(self, requests: Sequence[Request], override_bs: int | None) -> list[tuple[float, bool]]:
        pairs = []
        for texts, context, end in requests:
            if not 0 < len(end) <= self.max_length:
                shown = repr(texts[1][:60]) if texts else "a window"
                raise UserError(
                    f"the continuation {shown} has {len(end)} tokens; the model takes 1 to {self.max_length}."
                )
            whole = tuple(context + end)[-(self.max_length + 1) :]  # too long: cut on the left
            pairs.append((whole[: -len(end)], whole[-len(end) :]))
        results = continuation_logps(self.model, pairs, self.token_budget, self.progress)
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results


SCORERS = {"fast": FastLM, "hf": PlainLM}
