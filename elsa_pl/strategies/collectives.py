"""What Lightning asks of a strategy, answered over RPC: a process group could not outlive a member."""

import io
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from elsa_pl.errors import ElsaError, RunFailed
from elsa_pl.rpc.world import World
from elsa_pl.strategies.environment import RoleEnvironment


class RpcStrategy(ParallelStrategy):
    """Collectives and checkpoints of processes that meet over RPC; a subclass starts them and sets the world."""

    def __init__(self) -> None:
        super().__init__(cluster_environment=RoleEnvironment())
        self._world: World | None = None

    @property
    def world(self) -> World:
        """The processes of the run, once they have met."""
        assert self._world is not None, "the processes have not met yet"
        return self._world

    @property
    def running(self) -> bool:
        """Whether RPC runs in this process."""
        return self._world is not None and bool(self._world.members)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")  # the global adapters; tiers have devices of their own

    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    def model_to_device(self) -> None:
        """The tiers place themselves."""

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        return batch  # each client moves its own

    def barrier(self, name: str | None = None) -> None:
        if self.running:  # Lightning also calls it after an error, when there may be nobody to meet
            self.world.exchange(None)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        assert src == 0, "only the cloud broadcasts"
        return self.world.exchange(obj if self.is_global_zero else None)[self.world.cloud]

    def gather(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        """The tensors of all processes, in rank order (the form that torchmetrics asks for)."""
        return list(self.world.exchange(tensor.detach().cpu()).values())

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return torch.stack(self.gather(tensor))

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        stacked = torch.stack(self.gather(tensor))
        name = str(reduce_op).lower()
        for known, function in (("sum", torch.sum), ("max", torch.amax), ("min", torch.amin)):
            if known in name:
                return function(stacked, dim=0).to(tensor.dtype)
        return stacked.double().mean(0).to(tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype())

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        decisions: list[bool] = list(self.world.exchange(bool(decision)).values())
        return min(decisions) if all else max(decisions)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read on the cloud, where checkpoints are written, and share: other sites do not have the file."""
        content: Tensor | None = None
        if self.is_global_zero:
            content = torch.frombuffer(bytearray(Path(checkpoint_path).read_bytes()), dtype=torch.uint8)
        content = self.broadcast(content)
        return cast(dict[str, Any], torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True))

    def on_exception(self, exception: BaseException) -> None:
        """Tell the others why this process ends, so that they end too, with the same reason."""
        if not self.running or isinstance(exception, RunFailed):
            return
        if not self.is_global_zero and not isinstance(exception, Exception):
            return  # told to leave: the run may go on without this process
        text = str(exception) if isinstance(exception, ElsaError) else f"{type(exception).__name__}: {exception}"
        self.world.fail(text if self.is_global_zero else f"{self.world.worker}: {text}")

    def teardown(self) -> None:
        """Lightning calls it after every Trainer function; the processes stay for the next one."""
