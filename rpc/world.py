"""The processes of a run, as one of them sees them: coming together, collectives, and who is gone.

Collectives go through a board at the cloud and never through a process group, which could not outlive a member.
"""

import logging
import os
from collections.abc import Callable
from typing import Any, cast

from elsa_pl.errors import ConfigurationError, RemoteError, RunFailed
from elsa_pl.rpc import lifecycle, remote
from elsa_pl.rpc.board import Board
from elsa_pl.rpc.lifecycle import Address, Transport
from elsa_pl.rpc.messages import Member, Role
from elsa_pl.rpc.monitor import Monitor, Pulse, end_soon

log = logging.getLogger(__name__)

_INTERFACE = "TP_SOCKET_IFNAME"  # read by TensorPipe; without it, it listens where the machine's name points


class World:
    """One process' view of a run.

    Args:
        name: RPC name of this process.
        role: what it is for.
        call_timeout_s: seconds until one call counts as failed.
        round_timeout_s: seconds until a collective goes on without those that did not come.
    """

    def __init__(self, name: str, role: Role, *, call_timeout_s: float, round_timeout_s: float) -> None:
        self.worker, self.role = name, role
        self.call_timeout_s, self.round_timeout_s = call_timeout_s, round_timeout_s
        self.members: list[Member] = []
        self.board = Board("board")
        # what else is lost with a worker; before the places are known, losing anybody ends the run
        self.lost_with: Callable[[str], tuple[str, ...]] | None = None
        self.describe_end: Callable[[str], str] = lambda worker: ""
        self._boards: dict[str, Board] = {"board": self.board}
        self._remote_boards: list[tuple[str, str]] = []
        self._monitor: Monitor | None = None
        self._collectives = 0
        self._serving = False
        self._set_interface = False

    def join(
        self,
        address: Address,
        *,
        startup_timeout_s: float,
        transport: Transport,
        num_rpc_threads: int,
        check: Callable[[], None] = lambda: None,
        accept: Callable[[list[Member]], None] = lambda members: None,
        device_maps: Callable[[list[Member]], dict[str, dict[int, int]]] = lambda members: {},
    ) -> None:
        """Meet the other processes and start RPC.

        Args:
            address: where to meet.
            startup_timeout_s: seconds to wait for the others.
            transport: see `elsa_pl.rpc.lifecycle.choose_transport`.
            num_rpc_threads: requests of one peer served at the same time.
            check: called while waiting; may raise.
            accept: called with the members before RPC starts; may raise.
            device_maps: CUDA device maps from this process, by peer, once the members are known.

        Raises:
            LaunchError: a port in use, or somebody does not come.
            ConfigurationError: a name is taken, or nobody is the cloud.
        """
        if address.host in ("127.0.0.1", "localhost") and _INTERFACE not in os.environ:
            os.environ[_INTERFACE] = "lo"
            self._set_interface = True
        members = lifecycle.meet(address, self.worker, self.role, startup_timeout_s, check)
        if [member.role for member in members].count("cloud") != 1:
            raise ConfigurationError(
                "exactly one process must have the role 'cloud'; got "
                + ", ".join(f"{member.name}: {member.role}" for member in members)
            )
        accept(members)
        # before RPC starts: a peer that is ready first asks at once
        remote.serve("board", self.board)
        remote.serve("pulse", Pulse())
        self._serving = True
        lifecycle.start(
            self.worker,
            transport=lifecycle.choose_transport(transport, len(members)),
            num_threads=num_rpc_threads * len(members),
            timeout_s=self.call_timeout_s,
            device_maps=device_maps(members),
        )
        self.members = members
        if len(members) > 1:
            self._monitor = (
                Monitor(self.others, self._on_lost, self._on_tick, timeout_s=self.call_timeout_s)
                if self.role == "cloud"
                else Monitor([self.cloud], self._on_cloud_lost, timeout_s=self.call_timeout_s)
            )
            self._monitor.start()

    @property
    def cloud(self) -> str:
        """RPC name of the cloud's process."""
        return next(member.name for member in self.members if member.role == "cloud")

    @property
    def others(self) -> list[str]:
        """RPC names of all other processes."""
        return [member.name for member in self.members if member.name != self.worker]

    @property
    def rank(self) -> int:
        """Number of this process with the cloud as 0, whichever rank that has in RPC."""
        order = sorted(self.members, key=lambda member: (member.role != "cloud", member.rank))
        return [member.name for member in order].index(self.worker)

    def serve_board(self, name: str, board: Board) -> None:
        """Offer a further board of this process; it is told of losses and failures as well."""
        self._boards[name] = board
        remote.serve(name, board)

    def know_boards(self, places: list[tuple[str, str]]) -> None:
        """Note the boards of other processes, as worker and name."""
        self._remote_boards = [place for place in places if place[0] != self.worker]

    def exchange(self, value: Any, extra_s: float = 0.0) -> dict[str, Any]:
        """Every process gives a value and gets those of all, by worker name; the lost are left out.

        Args:
            value: of this process.
            extra_s: seconds that one of them may need beforehand, in addition to a round's; the same in all.

        Raises:
            RunFailed: another process declared the run failed, or the cloud is gone.
        """
        if len(self.members) <= 1:
            return {self.worker: value}
        self._collectives += 1
        # longer than an edge waits for its clients, or a silent client would cost its edge the place in the run
        patience_s = self.round_timeout_s + self.call_timeout_s + extra_s
        everyone = tuple(member.name for member in self.members)
        try:
            pending = remote.start_call(
                self.cloud,
                "board",
                "exchange",
                ("collective", self._collectives),
                self.worker,
                value,
                everyone,
                patience_s,
                timeout_s=patience_s + self.call_timeout_s,
                answers_later=True,
            )
            return cast(dict[str, Any], pending.wait(self.board.check))
        except RemoteError as error:
            self.board.check()
            raise RunFailed(str(error).split(f"{RunFailed.__name__}: ")[-1]) from error

    def gather(self, value: Any) -> dict[str, Any] | None:
        """Every process gives a value; the cloud gets those of all by worker name, and the others get None.

        Unlike `exchange`, what one process gives reaches the cloud alone, and only the cloud waits for the others.

        Raises:
            RunFailed: another process declared the run failed, or the cloud is gone.
        """
        if len(self.members) <= 1:
            return {self.worker: value}
        self._collectives += 1
        key = ("gathered", self._collectives)
        if self.role == "cloud":
            self.board.post(key, self.worker, value)
            everyone = [member.name for member in self.members]
            return self.board.collect(key, everyone, self.round_timeout_s + self.call_timeout_s)
        try:
            remote.call(self.cloud, "board", "post", key, self.worker, value, timeout_s=self.call_timeout_s)
        except RemoteError as error:
            self.board.check()
            raise RunFailed(str(error)) from error
        return None

    def lose(self, names: tuple[str, ...]) -> None:
        """Tell everybody not to wait for ``names``."""
        self._tell("lose", names)

    def fail(self, reason: str) -> None:
        """Declare the run failed everywhere."""
        self._tell("fail", reason)

    def _tell(self, method: str, argument: Any) -> None:
        for board in self._boards.values():
            getattr(board, method)(argument)
        for worker, board_name in [*((other, "board") for other in self.others), *self._remote_boards]:
            if worker in self.board.lost:
                continue
            try:
                remote.call(worker, board_name, method, argument, timeout_s=2.0)
            except RemoteError as error:
                log.debug("could not tell %s: %s", worker, error)

    def _on_lost(self, worker: str) -> None:
        if self.lost_with is None:
            self.fail(f"{worker} ended during the start {self.describe_end(worker)}")
            return
        gone = self.lost_with(worker)
        log.warning("%s is gone; the run goes on without %s", worker, ", ".join(gone))
        self.lose(gone)

    def _on_tick(self) -> None:
        late = self.board.expire()
        if late:
            log.warning("no answer from %s in time: the run goes on without", ", ".join(late))
            self.lose(late)

    def _on_cloud_lost(self, worker: str) -> None:
        reason = f"{worker} is gone"
        for board in self._boards.values():
            board.fail(reason)
        end_soon(reason)

    def leave(self, *, success: bool) -> None:
        """End RPC here, after success together with the others. Safe to call twice."""
        together = success
        if self.members and success:
            try:
                self.exchange(None)  # nobody leaves while somebody still watches or works
            except RunFailed as error:
                log.warning("the others did not come to the end: %s", error)
                together = False
        if self._monitor is not None:
            self._monitor.stop()
            self._monitor = None
        if self.members:
            lifecycle.stop(together=together and not self.board.lost)
            self.members = []
        if self._serving:
            for service in (*self._boards, "pulse"):
                remote.withdraw(service)
            self._serving = False
        if self._set_interface:
            os.environ.pop(_INTERFACE, None)
            self._set_interface = False
