"""What this process does in a round: its clients' steps, its edges' means, and the cloud's.

    hosts                          edges                               cloud
    local steps of each client
    [1] submit front and tail ---> [2] add the sessions' middles,
                                       aggregate("edge")
    [3] fetch the mean <---------- ... next edge round, or last:
                                   [4] submit the mean ------------->  [5] aggregate("cloud")
    [6] publish: everybody takes over the global adapters  <---------

The same code runs in every layout: a process that has no clients, no edge or is not the cloud skips those steps.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from elsa_pl.errors import RemoteError, RunFailed
from elsa_pl.rpc import remote
from elsa_pl.rpc.edge import EdgeService
from elsa_pl.rpc.messages import RoundReport, Update
from elsa_pl.rpc.world import World
from elsa_pl.strategies.crew import Crew
from elsa_pl.strategies.topology import Topology
from elsa_pl.tiers.client import Client, Clipping, StepResult

log = logging.getLogger(__name__)

Scope = Literal["edge", "cloud"]
Aggregate = Callable[[Scope, list[Update]], dict[str, Tensor] | None]


def board_of(edge: str) -> str:
    """Service name of an edge's board."""
    return f"{edge}/board"


class Rounds:
    """The part of one process in the rounds.

    Args:
        world: the processes.
        topology: who runs where.
        clients: the clients of this process.
        client_sizes: training examples of each, their weight in the means.
        edges: the edges of this process.
        aggregate: the strategy's aggregation hook.
        clients_in_flight: clients that step at the same time.
    """

    def __init__(
        self,
        world: World,
        topology: Topology,
        clients: dict[str, Client],
        client_sizes: Mapping[str, int],
        edges: dict[str, EdgeService],
        aggregate: Aggregate,
        clients_in_flight: int,
    ) -> None:
        self.world, self.topology, self.clients, self.edges = world, topology, clients, edges
        self._sizes, self._aggregate = client_sizes, aggregate
        self._crew = Crew(min(clients_in_flight, len(clients)))
        self._given_up: set[str] = set()
        self._traffic: Counter[str] = Counter()
        self._seconds: dict[str, float] = {"steps": 0.0, "aggregation": 0.0}
        self._results: list[StepResult] = []
        for name, edge in edges.items():
            remote.serve(name, edge)
            world.serve_board(board_of(name), edge.board)
        world.know_boards([(worker, board_of(edge)) for edge, worker in topology.edges.items()])
        world.lost_with = topology.lost_with

    def dismiss(self) -> None:
        """Stop serving the edges and let the threads end."""
        for edge in self.edges:
            remote.withdraw(edge)
        self._crew.dismiss()

    def _sessions(self) -> list[Any]:
        return [session for edge in self.edges.values() for session in edge.sessions.values()]

    def load(self, adapters: Mapping[str, Tensor]) -> None:
        """Everything in this process takes over the global adapters."""
        for tier in [*self.clients.values(), *self._sessions()]:
            tier.load(adapters)

    def count_published(self, adapters: Mapping[str, Tensor]) -> None:
        """Count the global adapters as sent to each edge as a whole, and to each client as far as it has them.

        A process receives them once for all that it runs, so that counts do not depend on the layout.
        """
        self._traffic["adapters/down"] += num_bytes(adapters) * len(self.edges)
        for client in self.clients.values():
            self._traffic["adapters/down"] += num_bytes(client.adapters())

    def reset_optimizers(self) -> None:
        """Forget all optimizer states of this process."""
        for client in self.clients.values():
            client.reset_optimizers()
        for session in self._sessions():
            session.reset_optimizer()

    def run_steps(
        self,
        batches: Mapping[str, Sequence[Mapping[str, Tensor]]],
        place: tuple[int, int, int],
        lr_factor: float,
        clipping: Clipping,
    ) -> None:
        """One local step of each client in ``batches``, several at a time.

        A client whose edge is gone is given up with a warning; any other exception ends the run.
        """
        start = time.monotonic()
        active = [name for name in batches if name not in self._given_up]

        def step(name: str) -> StepResult:
            return self.clients[name].step(batches[name], place=place, lr_factor=lr_factor, clipping=clipping)

        for name, result in zip(active, self._crew.map(step, active), strict=True):
            if isinstance(result, RemoteError) and not result.kind:
                self._give_up(name, str(result))
            elif isinstance(result, Exception):
                raise result
            else:
                self._results.append(result)
        self._seconds["steps"] += time.monotonic() - start

    def evaluate(self, batch: Mapping[str, Tensor], index: int) -> Any:
        """The pipeline's output on a batch of evaluation data; this process' clients take turns.

        Raises:
            RunFailed: no client of this process has an edge any more.
        """
        while names := [name for name in self.clients if name not in self._given_up]:
            name = names[index % len(names)]
            try:
                return self.clients[name].evaluate(batch)
            except RemoteError as error:
                if error.kind:
                    raise
                self._give_up(name, str(error))
        raise RunFailed(f"{self.world.worker} cannot evaluate: none of its clients has an edge left")

    def _give_up(self, client: str, reason: str) -> None:
        self.world.board.check()
        log.warning("%s is left out from here on: %s", client, reason)
        self._given_up.add(client)
        self.world.lose((client,))

    def finish_edge_round(
        self, key: tuple[int, int], participants: frozenset[str], *, last: bool
    ) -> dict[str, Tensor] | None:
        """Average at this process' edges, and after the ``last`` edge round at the cloud.

        Args:
            key: global round and edge round.
            participants: the clients of this global round.
            last: the global round ends here; otherwise the clients go on from their edges' means.

        Returns:
            On the cloud, and if ``last``, the new global adapters; else None.

        Raises:
            RunFailed: no edge had an answer for the cloud.
        """
        start = time.monotonic()
        mine = [name for name in self.clients if name in participants and name not in self._given_up]
        self._submit(key, mine)
        for edge in self.edges.values():
            expected = [client for client in self.topology.clients_of(edge.name) if client in participants]
            self._aggregate_edge(edge, key, expected, last=last)
        mean = None
        if not last:
            self._fetch_means(key, mine)
        elif self.world.role == "cloud":
            mean = self._aggregate_cloud(key, participants)
        self._seconds["aggregation"] += time.monotonic() - start
        return mean

    def _submit(self, key: tuple[int, int], names: list[str]) -> None:
        for name in names:
            client = self.clients[name]
            update = Update(name, float(self._sizes[name]), client.adapters())
            self._traffic["adapters/up"] += num_bytes(update.adapters)
            edge = client.edge
            try:
                if not remote.call(
                    edge.worker, board_of(edge.service), "post", key, name, update, timeout_s=edge.timeout_s
                ):
                    log.warning("%s came too late for the mean of round %d", name, key[0])
            except RemoteError as error:
                self._give_up(name, str(error))

    def _aggregate_edge(self, edge: EdgeService, key: tuple[int, int], expected: list[str], *, last: bool) -> None:
        received = edge.board.collect(key, expected, self.world.round_timeout_s)
        _report_missing(f"{edge.name}, round {key[0]}", expected, received)
        updates = [
            Update(name, update.weight, {**update.adapters, **edge.sessions[name].adapters()})
            for name, update in received.items()
        ]
        mean = self._aggregate("edge", updates)
        if mean is not None and not last:
            for session in edge.sessions.values():
                session.load(mean)
        edge.publish_mean(key, mean)
        if last:  # also without a mean, so that the cloud does not wait for it
            update = None if mean is None else Update(edge.name, sum(update.weight for update in updates), mean)
            self._traffic["adapters/up"] += num_bytes(mean or {})
            timeout_s = self.world.call_timeout_s
            remote.call(self.world.cloud, "board", "post", ("edges", *key), edge.name, update, timeout_s=timeout_s)

    def _fetch_means(self, key: tuple[int, int], names: list[str]) -> None:
        """The edges' means become the clients' adapters; an edge without answers leaves them as they are."""
        calls = {}
        for name in [name for name in names if name not in self._given_up]:
            client = self.clients[name]
            try:
                calls[name] = remote.start_call(
                    client.edge.worker,
                    client.edge.service,
                    "mean",
                    key,
                    tuple(client.adapters()),
                    timeout_s=self.world.round_timeout_s + self.world.call_timeout_s,
                    answers_later=True,
                )
            except RemoteError as error:
                self._give_up(name, str(error))
        for name, pending in calls.items():
            try:
                mean = pending.wait(self.world.board.check)
            except RemoteError as error:
                self._give_up(name, str(error))
                continue
            if mean is not None:
                self.clients[name].load(mean)
                self._traffic["adapters/down"] += num_bytes(mean)

    def _aggregate_cloud(self, key: tuple[int, int], participants: frozenset[str]) -> dict[str, Tensor]:
        expected = [edge for edge in self.topology.edges if participants & set(self.topology.clients_of(edge))]
        timeout_s = self.world.round_timeout_s + self.world.call_timeout_s
        answers = self.world.board.collect(("edges", *key), expected, timeout_s)
        received = {edge: update for edge, update in answers.items() if update is not None}
        _report_missing(f"cloud, round {key[0]}", expected, received)
        mean = self._aggregate("cloud", list(received.values()))
        if mean is None:
            raise RunFailed(
                f"no edge answered in round {key[0]}: nothing to aggregate; the last checkpoint holds the state before"
            )
        return mean

    def take_report(self) -> RoundReport:
        """What this process did since the last report."""
        for client in self.clients.values():
            self._traffic.update(client.traffic.take())
        report = RoundReport(
            loss_sum=math.fsum(result.loss * result.num_examples for result in self._results),
            num_examples=sum(result.num_examples for result in self._results),
            num_steps=len(self._results),
            seconds=dict(self._seconds),
            num_bytes=dict(self._traffic),
            lost=tuple(sorted(self._given_up)),
        )
        self._results, self._traffic = [], Counter()
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return report


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Payload size in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _report_missing(where: str, expected: Sequence[str], received: Mapping[str, Any]) -> None:
    missing = [name for name in expected if name not in received]
    if missing:
        log.warning("%s: left out %s", where, ", ".join(missing))
