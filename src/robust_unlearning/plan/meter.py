"""FLOPs and live bytes of torch code, by the part it belongs to, on real tensors or on tensors without data."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

_aten = torch.ops.aten
CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}
"""The CPU's attention kernel, which torch's own counter leaves out; its formulas are those of the GPU's."""

Part = tuple[str, str]
"""Which batch (`forget`, `retain`, `refusals`, or none) and which part of the step."""


@dataclass
class Flops:
    """Floating-point operations, a multiplication and an addition being two.

    Attributes:
        linear: of matrix products with weights, in proportion to the tokens.
        attention: of tokens with tokens, in proportion to the square of the sequences' length.
    """

    linear: int = 0
    attention: int = 0


class Meter(TorchDispatchMode):
    """Counts what runs inside it; `part` says to which part it belongs.

    FLOPs are those of matrix products and attention, by the formulas of torch's own counter. A storage counts as
    live from the operation that makes it until it is freed; what existed before is not counted, nor what a kernel
    takes for itself while it runs.

    Attributes:
        flops: part -> its operations.
        live: part -> bytes that it made and that are not freed.
        peak: `live` when the sum was greatest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part: Part = ("", "")
        self.flops: dict[Part, Flops] = defaultdict(Flops)
        self.live: Counter[Part] = Counter()
        self.peak: Mapping[Part, int] = {}
        self._total = self._greatest = 0
        self._known = WeakIdKeyDictionary()
        self._formulas: dict[Any, Any] = {**flop_registry, **CPU_ATTENTION}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note it."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asked at every turn of tensors without data; makes nothing
            return func(*args, **kwargs)
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, Tensor):
                self._known[each.untyped_storage()] = True
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in self._formulas:
            kind = "attention" if "attention" in str(packet) else "linear"
            done = self.flops[self.part]
            setattr(done, kind, getattr(done, kind) + self._formulas[packet](*args, **kwargs, out_val=out))
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and each.untyped_storage() not in self._known:
                self._born(each.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known[storage] = True
        weakref.finalize(storage, self._freed, self.part, size)
        self.live[self.part] += size
        self._total += size
        if self._total > self._greatest:
            self._greatest, self.peak = self._total, dict(self.live)

    def _freed(self, part: Part, size: int) -> None:
        self.live[part] -= size
        self._total -= size
