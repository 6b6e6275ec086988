"""Counts what crosses links: messages and payload bytes, by link and direction."""

import threading
from collections import Counter

from torch import Tensor

Counts = dict[str, tuple[int, int]]
"""Messages and payload bytes, by ``link/direction``; direction is forward for states and backward for gradients."""

OVERHEAD_BYTES = {
    "uplink/forward": 650,
    "downlink/forward": 435,
    "uplink/backward": 1075,
    "downlink/backward": 1425,
}
"""What RPC adds to a message: its envelope, and for gradients the calls that come with them, such as autograd's
bookkeeping and the optimizer's step at the edge.

Measured as the growth of the kernel's TCP counters, torch 2.13, TensorPipe over ``uv``; a test holds it against them.
"""


class Traffic:
    """Payload of messages; gradients arrive on autograd's threads, hence the lock."""

    def __init__(self) -> None:
        self._messages: Counter[str] = Counter()
        self._num_bytes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, link: str, direction: str, *tensors: Tensor) -> None:
        """Count a message of these tensors."""
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        with self._lock:
            self._messages[f"{link}/{direction}"] += 1
            self._num_bytes[f"{link}/{direction}"] += total

    def crossed(self, link: str, states: Tensor, *others: Tensor) -> None:
        """Count states that were sent, what went with them, and their gradient when it comes."""
        self.add(link, "forward", states, *others)
        if states.requires_grad:
            states.register_hook(lambda gradient: self._came_back(link, gradient))

    def _came_back(self, link: str, gradient: Tensor | None) -> None:
        if gradient is not None:  # autograd knows gradients that are all 0 and not there
            self.add(link, "backward", gradient)

    @property
    def payload_bytes(self) -> int:
        """Counted since the last `take`."""
        with self._lock:
            return sum(self._num_bytes.values())

    def take(self) -> Counts:
        """Return the counts so far and start again."""
        with self._lock:
            taken = {place: (messages, self._num_bytes[place]) for place, messages in self._messages.items()}
            self._messages, self._num_bytes = Counter(), Counter()
        return taken


def wire_bytes(place: str, messages: int, payload_bytes: int) -> int:
    """What a link really carries for so many messages.

    Example:
        >>> wire_bytes("downlink/forward", 2, 1000)
        1870
    """
    return payload_bytes + messages * OVERHEAD_BYTES[place]
