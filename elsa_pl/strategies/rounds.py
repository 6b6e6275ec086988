"""What this process does in a round: its clients' steps, its edges' means, and the cloud's.

    hosts                          edges                               cloud
    local steps of each client
    [1] submit front and tail ---> [2] add the sessions' middles;
                                       inspect the updates (last only)
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
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from elsa_pl.errors import RemoteError, RunFailed
from elsa_pl.functional.aggregation import weighted_mean
from elsa_pl.functional.deltas import decode_deltas, encode_deltas
from elsa_pl.functional.factors import frozen_weight
from elsa_pl.functional.microbatches import num_targets
from elsa_pl.functional.quantization import BlockFormat
from elsa_pl.rpc import remote
from elsa_pl.rpc.edge import EdgeService
from elsa_pl.rpc.messages import RoundReport, Update, Work
from elsa_pl.rpc.world import World
from elsa_pl.strategies.crew import Crew
from elsa_pl.strategies.progress import ProgressReporter
from elsa_pl.strategies.topology import Topology
from elsa_pl.tiers.client import Batch, Client
from elsa_pl.tiers.step import Step, StepResult, StepSettings

log = logging.getLogger(__name__)

_EVALUATED_TOGETHER = 16  # texts; small enough that a batch keeps several passes in flight

Scope = Literal["edge", "cloud"]
Aggregate = Callable[[Scope, list[Update], bool], Update | None]
Inspect = Callable[[list[Update]], None]
Corrupt = Callable[[str, Update, Mapping[str, Tensor], tuple[int, int]], Update | None]


def board_of(edge: str) -> str:
    """Service name of an edge's board."""
    return f"{edge}/board"


@dataclass(frozen=True)
class Evaluation:
    """The pipeline's output on a batch: mean ``loss``, None without labels, and ``logits`` in the order of its rows."""

    loss: Tensor | None
    logits: Tensor


class Rounds:
    """The part of one process in the rounds.

    Attributes:
        published_bytes: of what the cloud sent to each edge in the round that has just ended.

    Args:
        world: the processes.
        topology: who runs where.
        client_sizes: training examples of each client of this process, their weight in the means.
        edges: the edges of this process.
        aggregate: the strategy's aggregation hook; called with the place, the updates, and whether its mean is final or
            will be merged with others.
        inspect: called in every process with the updates that its edges received in a global round, before any mean.
        corrupt: what a faulty client submits instead of its update; called with its name, the update, the adapters
            that it had received, and global and edge round. None where it submits nothing.
        passes_in_flight: passes that this process' clients run at the same time.
        reporter: tells the cloud how far the clients are.
        own: adapters of clients that train alone; see `keep_own`.
        format: of the differences that adapters are sent as; None: as they are.
    """

    def __init__(
        self,
        world: World,
        topology: Topology,
        client_sizes: Mapping[str, int],
        edges: dict[str, EdgeService],
        *,
        aggregate: Aggregate,
        inspect: Inspect,
        corrupt: Corrupt,
        passes_in_flight: int,
        reporter: ProgressReporter,
        own: dict[str, dict[str, Tensor]],
        format: BlockFormat | None,
    ) -> None:
        self.world, self.topology, self.edges = world, topology, edges
        self.local_names = list(client_sizes)
        # filled by the strategy, which places the clients
        self.clients: dict[str, Client] = {}
        self._sizes, self._aggregate, self._inspect, self._corrupt = client_sizes, aggregate, inspect, corrupt
        self._received: dict[str, dict[str, Tensor]] = {}
        self._reporter, self._own, self._format = reporter, own, format
        self._published: Mapping[str, Tensor] = {}
        self.published_bytes = 0
        # layers that a client did not have before the last publication
        self._new_layers: dict[str, set[str]] = {}
        self._crew = Crew(passes_in_flight if client_sizes else 0)
        self._given_up: set[str] = set()
        self._traffic: Counter[str] = Counter()
        self._seconds: dict[str, float] = {"steps": 0.0, "aggregation": 0.0}
        self._results: list[tuple[str, StepResult]] = []
        self._work: dict[str, Counter[str]] = {}
        self._edges_sent: dict[str, int] = {}
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

    def move(self, topology: Topology) -> None:
        """Take over another assignment of the clients to the edges; their sessions are there already."""
        self.topology = topology
        self.world.lost_with = topology.lost_with
        for name, client in self.clients.items():
            edge = topology.assignment[name]
            if edge != client.edge.service:
                client.front.forget_sent()  # a new session knows nothing
            client.edge = replace(client.edge, worker=topology.edges[edge], service=edge)

    def load(self, adapters: Mapping[str, Tensor]) -> None:
        """Everything in this process takes over the global adapters, but for clients that train alone."""
        for name, client in self.clients.items():
            client.load({**adapters, **self._own.get(name, {})})  # what links are fitted to is everybody's
        for edge in self.edges.values():
            for name, session in edge.sessions.items():
                session.load({**adapters, **self._own.get(name, {})})
        self._published = {name: value.clone() for name, value in adapters.items()}
        received = {name: client.adapters() for name, client in self.clients.items()}
        self._new_layers = {name: got.keys() - self._received.get(name, got).keys() for name, got in received.items()}
        self._received = received

    def encode(self, adapters: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The form in which adapters are sent to who has those that are ``known``."""
        return dict(adapters) if self._format is None else encode_deltas(adapters, known, self._format)

    def decode(self, sent: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo `encode`."""
        return dict(sent) if self._format is None else decode_deltas(sent, known, self._format)

    def count_published(self, sent: Mapping[str, Tensor], *, whole: bool = False) -> None:
        """Count what the cloud sent to each edge, and of it to each client what it has layers for.

        A process receives them once for all that it runs, so that counts do not depend on the layout. To be called
        after `load`.

        Args:
            sent: in the form in which they were sent; a layer that is new to a client goes to it as it is, with its
                frozen weight if rounds end in that.
            whole: to clients too, rather than at their own rank.
        """
        self.published_bytes = num_bytes(sent)
        self._traffic["adapters/down"] += self.published_bytes * len(self.edges)
        as_sent = whole or self._format is not None
        for name, received in self._received.items():
            new = self._new_layers[name]
            own = {key: sent[key] if as_sent and key not in new else value for key, value in received.items()}
            weights = {frozen_weight(key) for key in new}  # of which it has not what earlier rounds ended in
            own |= {key: self._published[key] for key in weights & self._published.keys()}
            self._count_adapters("down", name, own)

    def count_fitted(self, fitted: Mapping[str, Tensor]) -> None:
        """Count who receives what the first edge fitted links to: the other edges, and each client for its own ends.

        If there are others, they get all of it, by way of the cloud.
        """
        first, *others = self.topology.edges
        self._traffic["calibration/up"] += num_bytes(fitted) if others and first in self.edges else 0
        self._traffic["calibration/down"] += num_bytes(fitted) * sum(edge in self.edges for edge in others)
        for name, client in self.clients.items():
            own = {tensor: fitted[tensor] for tensor in client.link_tensors() if tensor in fitted}
            self._traffic["calibration/down"] += num_bytes(own)
            self._work.setdefault(name, Counter())["down_bytes"] += num_bytes(own)

    def count(self, place: str, found: Mapping[str, Sequence[Tensor]]) -> None:
        """Count tensors as sent."""
        self._traffic[place] += sum(
            tensor.numel() * tensor.element_size() for sent in found.values() for tensor in sent
        )

    def _count_adapters(self, way: Literal["up", "down"], client: str, adapters: Mapping[str, Tensor]) -> None:
        self._traffic[f"adapters/{way}"] += num_bytes(adapters)
        self._work.setdefault(client, Counter())[f"{way}_bytes"] += num_bytes(adapters)

    def reset_optimizers(self) -> None:
        """Forget all optimizer states of this process."""
        for client in self.clients.values():
            client.reset_optimizers()
        for session in self._sessions():
            session.reset_optimizer()

    def run_steps(self, batches: Mapping[str, Sequence[Batch]], settings: StepSettings) -> None:
        """One local step of each client in ``batches``, several passes at a time.

        A client whose edge is gone is given up with a warning; any other exception ends the run.
        """
        start = time.monotonic()
        clients = [name for name in batches if name not in self._given_up]
        steps = {name: Step(self.clients[name], batches[name], settings) for name in clients}
        passes = [(name, number) for name, step in steps.items() for number in range(len(step))]

        def run(place: tuple[str, int]) -> StepResult | None:
            name, number = place
            return steps[name].run(number)

        def watch(place: tuple[str, int], outcome: StepResult | Exception | None) -> None:
            if isinstance(outcome, StepResult):
                self._reporter.step_done(settings.round, place[0], outcome.loss)

        for (name, _), outcome in zip(passes, self._crew.map(run, passes, watch), strict=True):
            if isinstance(outcome, RemoteError) and not outcome.kind:
                if name not in self._given_up:
                    self._give_up(name, str(outcome))
            elif isinstance(outcome, Exception):
                raise outcome
            elif outcome is not None:
                self._results.append((name, outcome))
        self._seconds["steps"] += time.monotonic() - start

    def evaluate(self, batch: Batch, index: int, place: tuple[int | str, ...]) -> Evaluation:
        """What the pipeline says of a batch of evaluation data; this process' clients share its rows.

        Args:
            batch: as for training; ``labels`` may be missing.
            index: number of the batch; decides which clients take part.
            place: of the evaluation in the run.

        Raises:
            RunFailed: no client of this process has an edge any more.
        """
        rows = torch.split(torch.arange(len(batch["input_ids"])), _EVALUATED_TOGETHER)
        shares = [{name: value[some] for name, value in batch.items()} for some in rows]
        while names := [name for name in self.clients if name not in self._given_up]:
            jobs = [(names[(index + offset) % len(names)], share) for offset, share in enumerate(shares)]
            outputs = self._crew.map(
                lambda job: self.clients[job[1][0]].evaluate(job[1][1], (*place, index, job[0])), list(enumerate(jobs))
            )
            if not any(isinstance(output, Exception) for output in outputs):
                return _join(shares, outputs)
            for (name, _), output in zip(jobs, outputs, strict=True):
                if isinstance(output, RemoteError) and not output.kind:
                    if name not in self._given_up:
                        self._give_up(name, str(output))
                elif isinstance(output, Exception):
                    raise output
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
        deadline = start + self.world.round_timeout_s  # of all edges here together: others wait for this process
        received = {edge.name: self._collect(edge, key, participants, deadline) for edge in self.edges.values()}
        if last:
            self._inspect([update for updates in received.values() for update in updates])
        for edge in self.edges.values():
            self._aggregate_edge(edge, key, received[edge.name], last=last)
        mean = None
        if not last:
            self._fetch_means(key, mine)
        elif self.world.role == "cloud":
            mean = self._aggregate_cloud(key, participants)
        self._seconds["aggregation"] += time.monotonic() - start
        return mean

    def keep_own(self) -> dict[str, Tensor]:
        """Keep each client's adapters as its own, since nobody sends any; returns their mean, which nobody gets."""
        for name, client in self.clients.items():
            edge = self.edges[client.edge.service]
            self._own[name] = {**client.adapters(), **edge.adapters_of(name)}
        return weighted_mean([self._own[name] for name in self.clients], [self._sizes[name] for name in self.clients])

    def _submit(self, key: tuple[int, int], names: list[str]) -> None:
        for name in names:
            client = self.clients[name]
            honest = Update(name, float(self._sizes[name]), client.adapters())
            update = self._corrupt(name, honest, self._received[name], key)
            if update is None:
                continue
            update = replace(update, adapters=self.encode(update.adapters, self._received[name]))
            self._count_adapters("up", name, update.adapters)
            edge = client.edge
            try:
                if not remote.call(
                    edge.worker, board_of(edge.service), "post", key, name, update, timeout_s=edge.timeout_s
                ):
                    log.warning("%s came too late for the mean of round %d", name, key[0])
            except RemoteError as error:
                self._give_up(name, str(error))

    def _collect(
        self, edge: EdgeService, key: tuple[int, int], participants: frozenset[str], deadline: float
    ) -> list[Update]:
        """The updates of an edge's clients, completed by the middles that the edge has of them."""
        expected = [client for client in self.topology.clients_of(edge.name) if client in participants]
        received = edge.board.collect(key, expected, max(0.0, deadline - time.monotonic()))
        _report_missing(f"{edge.name}, round {key[0]}", expected, received)
        given = self._given(edge, key)
        return [
            Update(name, update.weight, {**self.decode(update.adapters, given), **edge.adapters_of(name)})
            for name, update in received.items()
        ]

    def _aggregate_edge(self, edge: EdgeService, key: tuple[int, int], updates: list[Update], *, last: bool) -> None:
        merged = self._aggregate("edge", updates, not last)
        if last:  # also without a mean, so that the cloud does not wait for it
            if merged is not None:
                merged = Update(edge.name, merged.weight, self.encode(merged.adapters, self._published))
            self._edges_sent[edge.name] = 0 if merged is None else merged.num_bytes
            self._traffic["adapters/up"] += self._edges_sent[edge.name]
            timeout_s = self.world.call_timeout_s
            remote.call(self.world.cloud, "board", "post", ("edges", *key), edge.name, merged, timeout_s=timeout_s)
        if merged is None or last:
            edge.publish_mean(key, None, None)
            return
        given = self._given(edge, key)
        sent = self.encode(merged.adapters, given)
        mean = self.decode(sent, given)
        for session in edge.sessions.values():
            session.load(mean)
        edge.publish_mean(key, mean, sent)

    def _given(self, edge: EdgeService, key: tuple[int, int]) -> Mapping[str, Tensor]:
        """What an edge's clients went on from last."""
        return edge.given(key[0]) or self._published

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
                    client.rank,
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
                self._count_adapters("down", name, mean)
                self._received[name] = self.decode(mean, self._received[name])
                self.clients[name].load(self._received[name])

    def _aggregate_cloud(self, key: tuple[int, int], participants: frozenset[str]) -> dict[str, Tensor]:
        expected = [edge for edge in self.topology.edges if participants & set(self.topology.clients_of(edge))]
        timeout_s = self.world.round_timeout_s + self.world.call_timeout_s
        answers = self.world.board.collect(("edges", *key), expected, timeout_s)
        received = {edge: update for edge, update in answers.items() if update is not None}
        _report_missing(f"cloud, round {key[0]}", expected, received)
        updates = [
            replace(update, adapters=self.decode(update.adapters, self._published)) for update in received.values()
        ]
        merged = self._aggregate("cloud", updates, True)
        if merged is None:
            raise RunFailed(
                f"no edge answered in round {key[0]}: nothing to aggregate; the last checkpoint holds the state before"
            )
        return merged.adapters

    def take_report(self) -> RoundReport:
        """What this process did since the last report."""
        traffic = {name: client.traffic.take() for name, client in self.clients.items()}
        for name, counts in traffic.items():
            for place, (_, count) in counts.items():
                self._traffic[place] += count
                leaves = place in ("uplink/forward", "downlink/backward")
                self._work.setdefault(name, Counter())["up_bytes" if leaves else "down_bytes"] += count
        for name, result in self._results:
            work = self._work.setdefault(name, Counter())
            work["num_steps"] += 1
            work["num_sequences"] += result.num_examples
            work["num_tokens"] += result.num_tokens
        report = RoundReport(
            loss_sum=math.fsum(result.loss * result.num_examples for _, result in self._results),
            num_examples=sum(result.num_examples for _, result in self._results),
            num_steps=len(self._results),
            seconds=dict(self._seconds),
            num_bytes=dict(self._traffic),
            lost=tuple(sorted(self._given_up)),
            work={name: Work(**work) for name, work in self._work.items()},
            traffic=traffic,
            edges_sent=self._edges_sent,
        )
        self._results, self._traffic, self._work, self._edges_sent = [], Counter(), {}, {}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return report


def _join(shares: Sequence[Batch], outputs: Sequence[Any]) -> Evaluation:
    """Put the outputs on the shares of a batch together."""
    logits = torch.cat([output.logits.float().cpu() for output in outputs])
    if "labels" not in shares[0]:
        return Evaluation(None, logits)
    by_token = shares[0]["labels"].ndim == 2
    counts = torch.tensor([num_targets(share["labels"]) if by_token else len(share["labels"]) for share in shares])
    losses = torch.stack([output.loss.float().cpu() for output in outputs])
    # a share without anything to predict has no loss: nan
    return Evaluation((losses.nan_to_num() * counts).sum() / counts.sum(), logits)


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Payload size in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _report_missing(where: str, expected: Sequence[str], received: Mapping[str, Any]) -> None:
    missing = [name for name in expected if name not in received]
    if missing:
        log.warning("%s: left out %s", where, ", ".join(missing))
