"""The clients of a run as a fleet: their devices and links, their places, and what their models say about the probes.

`elsa_pl.strategies.hierarchical` runs the processes and the rounds; what differs between clients is known here.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from elsa_pl.datamodules.faults import FaultKind, corrupt
from elsa_pl.errors import LaunchError, RunFailed
from elsa_pl.functional.costs import Workload
from elsa_pl.functional.profiles import NetworkProfile, ProfileSettings, draw_profile
from elsa_pl.functional.seeding import derive_seed
from elsa_pl.functional.updates import hashed_update
from elsa_pl.hooks import asks, hooks
from elsa_pl.rpc.messages import Update, Work
from elsa_pl.rpc.world import World
from elsa_pl.strategies.measurement import measure_links, with_links
from elsa_pl.strategies.placement import Placement, Plain, decide
from elsa_pl.strategies.rounds import Rounds
from elsa_pl.strategies.simulation import simulate_round
from elsa_pl.strategies.topology import Topology
from elsa_pl.tiers.client import Client, EdgeAddress
from elsa_pl.tiers.probes import ProbeDesk

log = logging.getLogger(__name__)

Found = TypeVar("Found")

PROBES_TOGETHER = 16  # in order of length, so that little is spent on padding


@dataclass(frozen=True)
class ComputePlaces:
    """Where tiers compute, and how long a call between them may take."""

    client_device: torch.device
    edge_device: torch.device
    device_to_device: bool
    call_timeout_s: float


@dataclass(frozen=True)
class Tried:
    """What placing the clients depends on, before there is a fleet: to find out early that it cannot be done."""

    network: NetworkProfile | None
    workload: Workload


class Fleet:
    """The clients of a run, as one process sees them.

    Args:
        trainer: its callbacks decide about the clients.
        module: makes their parts of the model.
        rounds: this process' part in the rounds, without clients yet.
        world: the processes.
        places: where tiers compute.
        own_client: the client of this process, between sites.

    Attributes:
        network: devices and links; None without a profile.
        workload: a step on a full batch of the longest texts.
    """

    def __init__(
        self,
        trainer: "pl.Trainer",
        module: Any,
        rounds: Rounds,
        world: World,
        *,
        places: ComputePlaces,
        own_client: str | None,
    ) -> None:
        self._trainer, self._module, self._rounds, self._world = trainer, module, rounds, world
        self._places, self._own_client = places, own_client
        self.network: NetworkProfile | None = None
        data = module.trainer.datamodule
        self.workload: Workload = module.workload(data.batch_size, data.max_length)
        self._placement: Placement | None = None
        self._placed_before: Placement | None = None  # in the round that has just ended
        self._probes: ProbeDesk | None = None
        self._edges_gone: set[str] = set()

    # ---- devices and links ---------------------------------------------------------------------------------------

    def know(self, settings: ProfileSettings | None, data: Any, *, measure: bool) -> None:
        """Draw the profile; between sites the links are measured instead. Every process calls.

        Raises:
            LaunchError: a site is gone before its links are known.
        """
        if settings is None:
            return
        topology = self._rounds.topology
        if measure:
            self._world.exchange(None)  # everybody serves before anybody measures
            mine = measure_links(topology.edges, self._places.call_timeout_s) if self._own_client is not None else {}
            found = self._world.exchange({edge: link.plain() for edge, link in mine.items()})
            if gone := [client for client in topology.clients if client not in found]:
                raise LaunchError(
                    f"{', '.join(gone)} ended before the links to the edges were measured: look at the messages there,"
                    " and start again, without them if need be"
                )
            settings = with_links(settings, {client: found[client] for client in topology.clients})
            self.network = draw_profile(settings, topology.clients, list(topology.edges), self._module.seed)
        else:
            self.network = draw_network(settings, topology, data, self._module.seed)

    def simulate(self, work: Mapping[str, Work]) -> float | None:
        """Simulated seconds of the round that has just ended; None without a profile.

        Args:
            work: what each client did in it.
        """
        if self.network is None or self._placed_before is None:
            return None
        return simulate_round(work, self._placed_before, self.network, self.workload, self._rounds.published_bytes)

    # ---- who is placed where -------------------------------------------------------------------------------------

    @property
    def placement(self) -> Placement:
        """Edge and plan of each client."""
        assert self._placement is not None, "the clients are not placed yet"
        return self._placement

    def place(self) -> None:
        """Have the cloud decide which edge each client gets and how it is cut, and settle that everywhere.

        Between rounds: the adapters that are published next go into every replica, old or new.
        """
        trainer, topology = self._trainer, self._rounds.topology
        strategy: Any = trainer.strategy
        placement = self._placement
        if placement is None:
            plans = {client: self._module.plan_of(client) for client in topology.clients}
            placement = Placement(topology.assignment, plans)
        if asks(trainer, "on_assign_clients", "on_plan_clients"):
            # an edge that is gone would get clients again, which would be lost with it: then all stay where they are
            gone = self._world.board.lost & set(topology.edges)
            decided = None
            if self._world.role == "cloud":
                if gone - self._edges_gone:
                    log.warning(
                        "edges and cuts of the clients stay as they are from here on, because %s is lost; its clients"
                        " are left out: go on from the last checkpoint without it to place them anew",
                        ", ".join(sorted(gone)),
                    )
                self._edges_gone = gone
                decided = (placement if gone else decide(trainer, placement, self._module.check_plan)).plain()
            placement = Placement.of(cast(Plain, strategy.broadcast(decided)))
        self._placed_before = self._placement
        if self._placement is not None and self._world.role == "cloud" and not strategy.reset_optimizer:
            _warn_of_lost_states(self._placement, placement)
        if placement != self._placement:
            self._settle(placement)
            self._placement = placement

    def _settle(self, placement: Placement) -> None:
        """Build the clients and sessions of this process that are new or cut in another way; others stay."""
        module, rounds = self._module, self._rounds
        topology = replace(rounds.topology, assignment=placement.assignment)
        before = self._placement
        recut = {client for client, plan in placement.plans.items() if before is None or before.plans[client] != plan}
        sessions: dict[str, dict[str, Any]] = {
            edge: {
                client: service.sessions[client]
                for client in topology.clients_of(edge)
                if client in service.sessions and client not in recut
            }
            for edge, service in rounds.edges.items()
        }
        new_sessions = [
            (edge, client) for edge in sessions for client in topology.clients_of(edge) if client not in sessions[edge]
        ]
        new_clients = [name for name in rounds.local_names if name in recut]
        if (new_sessions or new_clients) and module.recall_base_model():
            # read again, it shares no tensors with the replicas there are: one copy of the frozen weights is enough
            new_sessions = [(edge, client) for edge in sessions for client in topology.clients_of(edge)]
            new_clients = rounds.local_names
        for edge, client in new_sessions:
            session = module.make_session(client, placement.plans[client], self._places.edge_device)
            if session is None:  # the client computes all by itself
                continue
            if client in sessions[edge]:
                session.take_over(sessions[edge][client])
            sessions[edge][client] = session
        for name in new_clients:
            front, tail = module.make_ends(name, placement.plans[name], self._places.client_device)
            if name in rounds.clients:
                there = rounds.clients[name]
                if name not in recut:
                    front.take_over(there.front)
                    if tail is not None:
                        tail.take_over(there.tail)
                there.front, there.tail = front, tail
            else:
                edge = topology.assignment[name]
                address = EdgeAddress(topology.edges[edge], edge, self._places.call_timeout_s)
                rounds.clients[name] = Client(
                    name,
                    front,
                    tail,
                    address,
                    device=self._places.client_device,
                    pooling=module.token_pooling,
                    device_to_device=self._places.device_to_device,
                )
        for edge, service in rounds.edges.items():
            service.sessions = sessions[edge]
        rounds.move(topology)
        self.provide_probes()
        module.forget_base_model()

    # ---- what the clients' models say ----------------------------------------------------------------------------

    def provide_probes(self) -> None:
        """Have what edges judge clients with, which training asks for where callbacks do, and fit links with."""
        if self._probes is not None or not self._rounds.edges:
            return
        training = self._trainer.state.fn == TrainerFn.FITTING
        if (training and asks(self._trainer, "on_clients_probed")) or self._module.fits_links():
            self._module.recall_base_model()  # forgotten, if the run began with an evaluation
            self._probes = ProbeDesk(
                self._module.replicas_for_probes(self._places.edge_device),
                self._module.trainer.datamodule.probe_batches(PROBES_TOGETHER),
                self._module.resolved_plan,
            )

    def fit_links(self) -> dict[str, Tensor]:
        """What links need to know of the probes' states under the global adapters, by name; every process calls.

        Raises:
            RunFailed: no edge is left that could tell.
        """
        module = self._module
        if not module.fits_links():
            return {}
        fitted = None
        if self._probes is not None:
            plans = sorted(set(self.placement.plans.values()), key=astuple)
            fitted = self._probes.fit_links(module.global_adapters(), plans, module.codecs)
        return self._first_of_edges(self._world.exchange(fitted), "fit the links to the probes")

    def _first_of_edges(self, found: Mapping[str, Found | None], purpose: str) -> Found:
        """The first edge's answer is everybody's: what both ends use must not differ by rounding."""
        for worker in self._rounds.topology.edges.values():
            answer = found.get(worker)
            if answer is not None:
                return answer
        raise RunFailed(f"no edge is left to {purpose}: look at the edges' messages")

    def probe_base(self) -> None:
        """Before the first round: show the callbacks what the model says about the probes without any training.

        Raises:
            RunFailed: no edge is left that could ask it.
        """
        trainer = self._trainer
        asking = list(hooks(trainer, "on_base_probed"))
        if not asking:
            return
        found = self._world.exchange(None if self._probes is None else self._probes.base())
        base = self._first_of_edges(found, "evaluate the model on the probes")
        for hook in asking:
            hook(trainer, *base)

    def inspect(self, updates: list[Update]) -> None:
        """Show the callbacks what the clients' models say about the probes.

        A callback takes part by having ``on_clients_probed(trainer, probed)``, which is called in every process, and
        ``probes_due(trainer)``; ``probed`` has states and predictions (see `elsa_pl.tiers.probes`) and the hashed
        update since the adapters that it was given, of the clients of this process' edges.

        Args:
            updates: what the edges of this process received in this global round.
        """
        trainer = self._trainer
        due = [hook for hook in hooks(trainer, "on_clients_probed") if cast(Any, hook).__self__.probes_due(trainer)]
        if not due:
            return
        probed: dict[str, tuple[Tensor, ...]] = {}
        if self._probes is not None:
            found = self._probes.evaluate({update.sender: update.adapters for update in updates}, self.placement.plans)
            for update in updates:
                edge = self._rounds.edges[self.placement.assignment[update.sender]]
                given = edge.given(trainer.current_epoch) or self._module.global_adapters()
                # the client's own doing is front and tail; the head's updates differ most between honest clients
                middle = edge.adapters_of(update.sender)
                names = [name for name in given if ".lora_" in name and name not in middle]
                before, after = ({name: side[name] for name in names} for side in (given, update.adapters))
                probed[update.sender] = (*found[update.sender], hashed_update(before, after))
        # hosts and cloud wait here for the edges, as long as so many calls one after the other may take
        at_worker = Counter(self._rounds.topology.edges[edge] for edge in self.placement.assignment.values())
        self._world.exchange(None, extra_s=max(at_worker.values()) * self._places.call_timeout_s)
        for hook in due:
            hook(trainer, probed)

    def corrupt(
        self, client: str, update: Update, received: Mapping[str, Tensor], key: tuple[int, int]
    ) -> Update | None:
        """What a client submits: a faulty one something else than its update (experiments), or nothing.

        Args:
            client: its name.
            update: what it would submit.
            received: the adapters that its steps began with.
            key: global round and edge round.
        """
        module = self._module
        faults: dict[str, FaultKind] = module.trainer.datamodule.client_faults
        if client not in faults:
            return update
        generator = torch.Generator().manual_seed(derive_seed(module.seed, "fault", client, *key))
        sent = corrupt(faults[client], update.adapters, received, module.trainer.datamodule.fault_scale, generator)
        return None if sent is None else replace(update, adapters=sent)


def _warn_of_lost_states(before: Placement, after: Placement) -> None:
    moved = [
        client
        for client, edge in after.assignment.items()
        if (edge, after.plans[client]) != (before.assignment[client], before.plans[client])
    ]
    if moved:
        log.warning(
            "%s: with another edge or cut, optimizer states start afresh, although reset_optimizer=false",
            ", ".join(moved),
        )


def draw_network(settings: ProfileSettings, topology: Topology, data: Any, seed: int) -> NetworkProfile:
    """The profile of a simulation, in which faulty clients may be slow."""
    network = draw_profile(settings, topology.clients, list(topology.edges), seed)
    slow = {client for client, kind in data.client_faults.items() if kind == "slow"}
    devices = {
        client: replace(device, flops_per_s=device.flops_per_s / data.fault_scale) if client in slow else device
        for client, device in network.devices.items()
    }
    return replace(network, devices=devices)
