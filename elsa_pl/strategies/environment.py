"""Ranks and addresses of a run's processes, from torchrun's variables or our launcher's (the same names)."""

import os

from lightning.fabric.plugins import ClusterEnvironment

from elsa_pl.rpc.lifecycle import Address


def address_from_environment() -> Address | None:
    """The address that torchrun or our launcher gave this process; None when neither started it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return Address(
        host=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(os.environ.get("MASTER_PORT", "29500")),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


class RoleEnvironment(ClusterEnvironment):
    """Tells Lightning about the processes without its rule that devices x nodes is their number.

    That rule (``TorchElasticEnvironment.validate_settings``) would refuse sites of unequal size. The cloud is
    Lightning's rank 0, whichever RPC rank it has, because Lightning writes logs and checkpoints on rank 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rank, self._world_size = 0, 1

    def place(self, rank: int, world_size: int) -> None:
        """Set Lightning's rank of this process and the number of processes."""
        self._rank, self._world_size = rank, world_size

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        return int(os.environ.get("MASTER_PORT", "0"))

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        """Lightning's devices x nodes; the layout knows better."""

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """Lightning's own count; the layout knows better."""

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0
