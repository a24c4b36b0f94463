"""Several processes, one run: each runs its own rows of every batch, sums are taken over all, the first one writes.

The processes are those of an environment that `unlearn run --processes`, `accelerate launch` or `torchrun` made.
A batch is the same as with one process; only its rows are divided. So every loss is computed as this process's
part of the mean over the whole batch, and the sum of the parts over the processes is the loss.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from robust_unlearning.errors import UserError
from robust_unlearning.parallel.launch import check_batch, world_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Value = TypeVar("Value")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them. Whatever talks to the others must be called by all.

    Attributes:
        device: where this process computes.
        rank: its number, from 0.
        count: how many there are.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def rows(self, size: int) -> slice:
        """This process's rows of a batch of `size` sequences: runs as long as each other, or one row longer.

        Raises:
            UserError: there are fewer sequences than processes.
        """
        check_batch(size, self.count)
        each, more = divmod(size, self.count)
        begin = self.rank * each + min(self.rank, more)
        return slice(begin, begin + each + (self.rank < more))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes of a tensor that has the same shape in all."""
        if self.count == 1:
            return values
        from accelerate.utils import reduce

        return reduce(values.to(self.device), "sum").to(values.device)

    def gather(self, values: Sequence[Item]) -> list[Item]:
        """What each process has, in the order of the processes."""
        if self.count == 1:
            return list(values)
        from accelerate.utils import gather_object

        return gather_object(list(values))

    def on_rank_zero(self, function: Callable[[], Value]) -> Value:
        """What `function` returns in the first process, the only one to call it.

        Raises:
            UserError: in all processes, where it raises one in the first.
        """
        if self.count == 1:
            return function()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.is_rank_zero:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = str(error)
        value, wrong = broadcast_object_list(outcome)
        if wrong is not None:
            raise UserError(wrong)
        return value

    def map_split(self, items: Sequence[Item], function: Callable[[Sequence[Item]], Sequence[Value]]) -> list[Value]:
        """`function(items)`, one value an item, each process having worked on every `count`-th item."""
        if self.count == 1:
            return list(function(items))
        found = self.gather([list(function(items[self.rank :: self.count]))])
        return [found[index % self.count][index // self.count] for index in range(len(items))]

    def shard(self, layers: Iterable[nn.Module]) -> None:
        """Keep a 1/`count` of each layer's weights on each process; a layer's forward gathers them for its time.

        Frozen weights only. All processes must then run these layers equally often.

        Raises:
            UserError: there is one process.
        """
        if self.count == 1:
            raise UserError("--shard spreads the layers over processes, and there is one; add --processes N.")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def join(device: torch.device) -> Processes:
    """The processes of this run, each on its own device where devices are cards; one process without a launcher.

    Args:
        device: what the run computes on; `cuda` becomes this process's card.

    Raises:
        UserError: the device cannot be divided among processes, or there are fewer cards than processes.
    """
    import torch

    count = torch.distributed.get_world_size() if torch.distributed.is_initialized() else world_size()
    if count == 1:
        return Processes(device)
    if device.type not in ("cuda", "cpu") or device.index is not None:
        raise UserError(f"device {str(device)!r} cannot be used by {count} processes; set device=cuda or device=cpu.")
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or count)
    if device.type == "cuda" and here > torch.cuda.device_count():
        raise UserError(
            f"{here} processes need a card each, and there are {torch.cuda.device_count()} on this machine."
        )
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return Processes(state.device if device.type == "cuda" else device, state.process_index, state.num_processes)
