"""Everything that crosses RPC besides plain numbers, strings and tensors.

Frozen dataclasses of tensors and plain values only: the receiving end unpickles nothing else (see
`elsa_pl.rpc.unpickling`), and a type that is listed here is a decision that its contents may leave a process.
Labels, token ids, logits and texts have no place in any of them.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Role = Literal["cloud", "edge", "host"]


@dataclass(frozen=True)
class Member:
    """One process of a run.

    Attributes:
        name: RPC name; a host's name is also its client's name in the ``site`` layout.
        role: what the process is for.
        rank: its number in the RPC world.
    """

    name: str
    role: Role
    rank: int


@dataclass(frozen=True)
class Update:
    """Adapters offered to a mean, with their weight in it.

    Attributes:
        sender: client name (for an edge's mean) or edge name (for the cloud's).
        weight: weight in the mean; the number of training examples behind the adapters.
        adapters: tensors by global layer name.
    """

    sender: str
    weight: float
    adapters: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Payload size of the adapters in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.adapters.values())


@dataclass(frozen=True)
class Work:
    """What one client did in a global round, for the clock of simulated time.

    Attributes:
        num_steps: optimizer steps.
        num_sequences: texts in them.
        num_tokens: their tokens, padding included.
        up_bytes: payload bytes that left the client.
        down_bytes: payload bytes that it received.
    """

    num_steps: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    up_bytes: int = 0
    down_bytes: int = 0


@dataclass(frozen=True)
class RoundReport:
    """What a process tells the others about its clients after a global round: sums, never single examples.

    Attributes:
        loss_sum: training loss times examples, summed over the clients' steps.
        num_examples: examples seen in those steps.
        num_steps: client steps.
        seconds: wall time in the local steps and in aggregation, in seconds, by phase.
        num_bytes: payload bytes sent, by ``link/direction``.
        lost: clients that this process gave up on.
        work: what each client of this process did.
        traffic: messages and payload bytes of each client of this process, by ``link/direction``.
        edges_sent: payload bytes of the mean that each edge of this process sent to the cloud.
    """

    loss_sum: float = 0.0
    num_examples: int = 0
    num_steps: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    work: dict[str, Work] = field(default_factory=dict)
    traffic: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    edges_sent: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ProgressReport:
    """How far the clients of a process are in a round.

    Attributes:
        round: the global round.
        steps: client steps done.
        clients_done: clients that have done all their steps.
        loss_sum: training loss, summed over the steps.
    """

    round: int
    steps: int
    clients_done: int
    loss_sum: float


@dataclass(frozen=True)
class Failure:
    """An exception on the far side, as text: exception classes do not travel.

    Attributes:
        kind: class name of the exception.
        message: its text.
        trace: formatted traceback, for the log.
    """

    kind: str
    message: str
    trace: str
