"""How far the clients are, told to the cloud while a round is under way: only its terminal has somebody before it.

A host sends a few numbers twice a second, and when a client has done its round. Nothing waits for them and nothing
depends on them, so a message that is lost is no error.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable

from elsa_pl.errors import RemoteError
from elsa_pl.rpc import remote
from elsa_pl.rpc.messages import ProgressReport
from elsa_pl.rpc.remote import exposed
from elsa_pl.rpc.world import World

log = logging.getLogger(__name__)

SERVICE = "progress"
_INTERVAL_S = 0.5


class ProgressReporter:
    """Counts the steps of this process' clients and tells the cloud.

    Args:
        world: the processes.
        steps_per_round: steps of each client in a round.
    """

    def __init__(self, world: World, steps_per_round: int) -> None:
        self._world, self._steps_per_round = world, steps_per_round
        self._round = -1
        self._steps: Counter[str] = Counter()
        self._loss_sum = 0.0
        self._next = 0.0

    def step_done(self, round_number: int, client: str, loss: float) -> None:
        """Count a step of a client."""
        if round_number != self._round:
            self._round, self._loss_sum = round_number, 0.0
            self._steps.clear()
        self._steps[client] += 1
        self._loss_sum += loss
        now = time.monotonic()
        if now < self._next and self._steps[client] < self._steps_per_round:
            return
        self._next = now + _INTERVAL_S
        clients_done = sum(count == self._steps_per_round for count in self._steps.values())
        report = ProgressReport(round_number, self._steps.total(), clients_done, self._loss_sum)
        try:
            remote.start_call(
                self._world.cloud, SERVICE, "report", self._world.worker, report, timeout_s=self._world.call_timeout_s
            )
        except RemoteError as error:
            log.debug("no progress reported: %s", error)


class ProgressDesk:
    """Adds up at the cloud what the hosts report.

    Args:
        show: called with round, client steps done, clients done and their mean loss.
    """

    def __init__(self, show: Callable[[int, int, int, float], None]) -> None:
        self._show = show
        self._latest: dict[str, ProgressReport] = {}

    @exposed
    def report(self, worker: str, report: ProgressReport) -> None:
        """Take a host's report."""
        self._latest[worker] = report
        current = [latest for latest in list(self._latest.values()) if latest.round == report.round]
        steps = sum(latest.steps for latest in current)
        loss = sum(latest.loss_sum for latest in current) / steps
        self._show(report.round, steps, sum(latest.clients_done for latest in current), loss)
