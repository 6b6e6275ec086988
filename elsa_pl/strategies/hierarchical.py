"""The Lightning strategy of a federation in two levels: processes, clients in flight, aggregation.

One epoch is one global round. The last batch of each edge round ends with `aggregate` at every edge, and the last batch
of the epoch with `aggregate` at the cloud, before validation looks at the model.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from elsa_pl.errors import ConfigurationError, LaunchError
from elsa_pl.functional.aggregation import AGGREGATORS, ALONE, MERGE_PRODUCTS, exact, sample_clients
from elsa_pl.functional.costs import Workload
from elsa_pl.functional.profiles import NetworkProfile, ProfileSettings
from elsa_pl.functional.quantization import BlockFormat
from elsa_pl.hooks import asks, hooks
from elsa_pl.rpc import lifecycle, remote
from elsa_pl.rpc.edge import EdgeService
from elsa_pl.rpc.lifecycle import Address, Transport
from elsa_pl.rpc.messages import Member, Role, Update
from elsa_pl.rpc.world import World
from elsa_pl.strategies import progress
from elsa_pl.strategies import topology as places
from elsa_pl.strategies.agreement import agree_on_adapters, agree_on_links
from elsa_pl.strategies.checks import check_device, refuse_unsupported, warn_of_idle, warn_of_overridden
from elsa_pl.strategies.collectives import RpcStrategy
from elsa_pl.strategies.environment import RoleEnvironment, address_from_environment
from elsa_pl.strategies.fleet import PROBES_TOGETHER, ComputePlaces, Fleet, Tried, draw_network
from elsa_pl.strategies.launcher import LayoutLauncher, Processes
from elsa_pl.strategies.placement import Placement, decide
from elsa_pl.strategies.rounds import Rounds, Scope
from elsa_pl.strategies.topology import CLOUD, Layout, Topology

log = logging.getLogger(__name__)

_ADAPTER_BLOCK = 64

_RPC_THREADS_PER_PASS = 2
_SPARE_RPC_THREADS = 8


class HierarchicalStrategy(RpcStrategy):
    """Split and hierarchical federated training over RPC.

    Args:
        layout: which processes there are. ``single``: one for everything; ``tiers``: cloud and edges in one, clients
            in ``num_hosts`` more; ``full``: one each; ``site``: every process names its own role (start them with
            torchrun).
        num_edges: edge servers (not for ``site``, where processes announce themselves).
        num_hosts: processes that run clients, in ``tiers`` and ``full``.
        edge_rounds: averages at the edges per global round.
        local_steps: optimizer steps of each client per edge round.
        participation: fraction of the clients that take part in a global round.
        aggregator: name of the merging rule, at the edges and at the cloud, one of
            `elsa_pl.functional.aggregation.AGGREGATORS`. With ``exact`` the edges send the cloud all that their means
            need, which may be as much as they received. With ``stacked`` the cloud sends all of that back, to be merged
            into the frozen weights, and each global round begins with fresh adapters (FLoRA, Wang et al. 2024, arXiv
            2409.05976); what edges average for themselves in between is of the adapters' rank. ``none``, in layout
            ``single``: no federation. Each client trains alone, evaluation texts are dealt to the clients, and the mean
            of their adapters is exported.
        adapter_bits: of each number of an adapter on its way to a mean and back: 32; or 8 or 4, of the difference to
            what the receiver has, with a scale for every 64 numbers. Clients of unequal ranks, and ``stacked``, need
            32.
        reset_optimizer: forget optimizer states at the start of each global round; then a resumed run equals an
            uninterrupted one bit for bit.
        passes_in_flight: forward and backward passes that a host has under way at the same time, of different clients
            or of the micro-batches of one.
        micro_batches: parts that each batch is cut into; raise it where a host has fewer clients than passes in flight.
        edge_of: client to edge; the others are dealt to the edges in turn.
        role: this process' role, in ``site``.
        name: this process' name, in ``site``; a host's name is its client's.
        profile: devices and links, from which simulated time is counted and clients are placed; None counts none.
        client_device: where fronts and tails compute: ``cpu`` or ``cuda:0``.
        edge_device: where middles compute.
        threads_per_process: intra-operator threads of torch. 1 gives the same numbers in every layout.
        transport: RPC transport: ``uv`` sleeps when idle, ``shm`` is faster and busy-polls; ``auto`` chooses by cores.
        port: port of the loopback interface for the processes to meet on; 0 takes a free one. torchrun brings its own.
        startup_timeout_s: seconds to wait for the processes of the run.
        call_timeout_s: seconds until one call (a forward pass, say) counts as failed.
        round_timeout_s: seconds until an edge or the cloud goes on without those that did not answer.
    """

    def __init__(
        self,
        layout: Layout = "single",
        *,
        num_edges: int = 1,
        num_hosts: int = 1,
        edge_rounds: int = 1,
        local_steps: int = 5,
        participation: float = 1.0,
        aggregator: str = "mean",
        adapter_bits: Literal[32, 8, 4] = 32,
        reset_optimizer: bool = True,
        passes_in_flight: int = 4,
        micro_batches: int = 1,
        edge_of: dict[str, str] | None = None,
        role: Role | None = None,
        name: str | None = None,
        profile: ProfileSettings | None = None,
        client_device: str = "cpu",
        edge_device: str = "cpu",
        threads_per_process: int = 1,
        transport: Transport = "auto",
        port: int = 0,
        startup_timeout_s: float = 120.0,
        call_timeout_s: float = 120.0,
        round_timeout_s: float = 900.0,
    ) -> None:
        super().__init__()
        counts = {
            "num_edges": num_edges,
            "num_hosts": num_hosts,
            "edge_rounds": edge_rounds,
            "local_steps": local_steps,
            "passes_in_flight": passes_in_flight,
            "micro_batches": micro_batches,
            "threads_per_process": threads_per_process,
        }
        for setting, value in counts.items():
            if value < 1:
                raise ConfigurationError(f"{setting} must be at least 1; got {value}")
        if not 0 <= port <= 65535:
            raise ConfigurationError(f"port must be in [0, 65535]; got {port}: 0 takes any free one")
        if not 0 < participation <= 1:
            raise ConfigurationError(f"participation must be in (0, 1]; got {participation}")
        if aggregator not in (*AGGREGATORS, ALONE):
            raise ConfigurationError(f"aggregator must be one of {[*sorted(AGGREGATORS), ALONE]}; got {aggregator!r}")
        if aggregator == ALONE and layout != "single":
            raise ConfigurationError(
                f"aggregator={ALONE!r} is a comparison within one process; got layout={layout!r}: set layout to single"
            )
        if aggregator in MERGE_PRODUCTS and not reset_optimizer:
            raise ConfigurationError(
                f"aggregator={aggregator} gives each round other factors, which the optimizer states that"
                " reset_optimizer=false keeps do not fit: leave it out"
            )
        if layout == "site" and (role is None or (name is None and role != "cloud")):
            raise ConfigurationError(
                f"in the site layout every process names itself; got role={role!r}, name={name!r}: set role to cloud,"
                " edge or host, and a name unless it is the cloud"
            )
        if layout != "site" and (role is not None or name is not None):
            raise ConfigurationError(f"role and name belong to layout 'site'; got layout={layout!r}: leave them out")
        for setting, device in (("client_device", client_device), ("edge_device", edge_device)):
            check_device(setting, device)
        self.layout: Layout = layout
        self.num_edges, self.num_hosts = num_edges, num_hosts
        self.edge_rounds, self.local_steps, self.participation = edge_rounds, local_steps, participation
        self.aggregator, self.reset_optimizer = aggregator, reset_optimizer
        self.adapter_bits = adapter_bits
        self._adapter_format = None if adapter_bits == 32 else BlockFormat(bits=adapter_bits, block=_ADAPTER_BLOCK)
        self.passes_in_flight, self.micro_batches = passes_in_flight, micro_batches
        self._edge_of = edge_of or {}
        self._profile = profile
        self._role, self._name = role, CLOUD if role == "cloud" and name is None else name
        self.client_device, self.edge_device = torch.device(client_device), torch.device(edge_device)
        self._threads, self._transport, self._port = threads_per_process, transport, port
        self._startup_timeout_s = startup_timeout_s
        self.call_timeout_s, self.round_timeout_s = call_timeout_s, round_timeout_s

        self.log_dir = Path("runs")
        # of clients that train alone
        self.own_adapters: dict[str, dict[str, Tensor]] = {}
        self._rounds: Rounds | None = None
        self._launched: Address | None = None
        self._fleet: Fleet | None = None
        self._tried: Tried | None = None
        self._processes: Processes | None = None

    # ---- processes -------------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        self._launcher = LayoutLauncher(self.connect_processes)

    def connect_processes(self) -> None:
        """Start the layout's further processes unless somebody has, meet them, and start RPC. Once per process.

        Raises:
            LaunchError: wrong number of processes, a port in use, or somebody who does not come.
            ConfigurationError: two sites of one name, or not exactly one cloud.
        """
        if self._world is not None:
            return
        torch.set_num_threads(self._threads)
        address = address_from_environment() or self._launched or self.start_processes()
        name, role = self._own_place(address)
        world = World(name, role, call_timeout_s=self.call_timeout_s, round_timeout_s=self.round_timeout_s)
        if self._processes is not None:
            world.describe_end = self._processes.tail
        self._world = world
        world.join(
            address,
            startup_timeout_s=self._startup_timeout_s,
            transport=self._transport,
            num_rpc_threads=_RPC_THREADS_PER_PASS * self.passes_in_flight + _SPARE_RPC_THREADS,
            check=self._processes.check if self._processes is not None else lambda: None,
            accept=self._accept,
            device_maps=self._device_maps,
        )
        cast(RoleEnvironment, self.cluster_environment).place(world.rank, len(world.members))
        rank_zero_only.rank = world.rank  # type: ignore[attr-defined]  # Lightning sets it in the same way

    def start_processes(self) -> Address:
        """Start the layout's further processes; imports take them seconds, in which this one can check the settings."""
        names = [name for name, _ in self._layout_processes()]
        port = self._port or lifecycle.free_port()
        if len(names) > 1:
            self._processes = Processes(self.log_dir / "logs")
            self._processes.start(names[1:], port, self._threads)
        self._launched = Address("127.0.0.1", port, 0, len(names))
        return self._launched

    def _layout_processes(self) -> list[tuple[str, Role]]:
        if self.layout == "site":
            raise LaunchError(
                "the site layout is started with torchrun, once per process: torchrun --nnodes=N --nproc_per_node=1"
                " --node_rank=K --master_addr=HOST --master_port=PORT train.py fit --config ..."
            )
        return places.processes(self.layout, self.num_edges, self.num_hosts)

    def _own_place(self, address: Address) -> tuple[str, Role]:
        if self.layout == "site":
            assert self._name is not None
            assert self._role is not None
            return self._name, self._role
        expected = self._layout_processes()
        if len(expected) != address.world_size:
            raise LaunchError(
                f"layout {self.layout!r} with num_edges={self.num_edges} and num_hosts={self.num_hosts} needs"
                f" {len(expected)} processes ({', '.join(name for name, _ in expected)}); got {address.world_size}:"
                " change torchrun's process count or the layout"
            )
        return expected[address.rank]

    def _accept(self, members: list[Member]) -> None:
        """Refuse sites that do not fit together, before RPC starts and anything is written."""
        if self.layout == "site":
            places.sites(members, self._edge_of)

    def _compute_places(self) -> ComputePlaces:
        return ComputePlaces(self.client_device, self.edge_device, self.device_to_device, self.call_timeout_s)

    def _device_maps(self, members: list[Member]) -> dict[str, dict[int, int]]:
        """CUDA device maps from this process to its peers; empty unless both tiers are on GPUs."""
        if not self.device_to_device:
            return {}
        host, edge = self.client_device.index or 0, self.edge_device.index or 0
        if len(members) == 1:
            return {members[0].name: {index: index for index in {host, edge}}}
        index_of = {member.name: host if member.role == "host" else edge for member in members}
        mine = index_of[self.world.worker]
        return {member.name: {mine: index_of[member.name]} for member in members}

    @property
    def device_to_device(self) -> bool:
        """Whether hidden states go from GPU to GPU; otherwise they cross as CPU tensors."""
        return self.client_device.type == self.edge_device.type == "cuda"

    def shutdown(self, *, success: bool) -> None:
        """End RPC and the processes that this one started. Safe to call twice."""
        if self._rounds is not None:
            self._rounds.dismiss()
            self._rounds = self._fleet = None
            remote.withdraw(progress.SERVICE)
        if self._world is not None:
            self._world.leave(success=success)
        if self._processes is not None and self._world is None:
            self._processes.undo()
        elif self._processes is not None:
            self._processes.end(patience_s=10.0 if success else 3.0)

    # ---- what the data module asks (elsa_pl.datamodules.federated.Federation) ------------------------------------

    @property
    def own_client(self) -> str | None:
        """In the site layout, the client whose file this process reads as a whole."""
        return self._name if self._role == "host" else None

    @property
    def holds_data(self) -> bool:
        """Whether this process reads data at all; in the site layout only hosts do."""
        return self._role in (None, "host")

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether checkpoints may be read and written in this process; in the site layout only the cloud does."""
        return self._role in (None, "cloud")

    @property
    def local_clients(self) -> tuple[str, ...]:
        """Clients that this process hosts."""
        return tuple(self.rounds.clients)

    @property
    def steps_per_round(self) -> int:
        """Local steps per global round."""
        return self.edge_rounds * self.local_steps

    @property
    def batches_per_step(self) -> int:
        """Micro-batches per local step."""
        return int(self._module.accumulate_grad_batches)

    @property
    def eval_shard(self) -> tuple[int, int] | None:
        """Which share of the evaluation data this process computes, of how many."""
        if not self.local_clients:
            return None
        if self.layout == "site":
            return 0, 1
        evaluators = self.rounds.topology.evaluators
        return evaluators.index(self.world.worker), len(evaluators)

    def participants(self, round_number: int) -> frozenset[str]:
        """The clients that take part in a global round."""
        return sample_clients(self.rounds.topology.clients, self.participation, self._module.seed, round_number)

    def check(self, trainer: "pl.Trainer", module: Any, data: Any) -> None:
        """Try a simulation layout with its clients, before any process starts: who would be placed where.

        Args:
            trainer: its callbacks have a say.
            module: built already.
            data: loaded already.

        Raises:
            ConfigurationError: more edges or hosts than clients, or ``edge_of`` names what is not there.
            ValueError: the clients cannot be placed.
        """
        members = [Member(name, role, rank) for rank, (name, role) in enumerate(self._layout_processes())]
        topology = places.simulate(self.layout, members, data.client_names, self.num_edges, self._edge_of)
        if self._profile is None and "slow" in data.client_faults.values():
            log.warning("fault slow has no effect without simulated time: set profile.distribution, such as mixed")
        if self.aggregator == ALONE:
            warn_of_idle(trainer, adapter_bits=self.adapter_bits, faults=data.client_faults.values())
        network = None if self._profile is None else draw_network(self._profile, topology, data, module.seed)
        self._tried = Tried(network, module.workload(data.batch_size, data.max_length))
        placement = Placement(topology.assignment, {name: module.plan_of(name) for name in topology.clients})
        decide(trainer, placement, module.check_plan)

    def check_probes(self, trainer: "pl.Trainer", module: Any, data: Any) -> None:
        """Whether training has the probes that callbacks ask for; between sites, whether an edge has them.

        Args:
            trainer: its callbacks ask.
            module: built already.
            data: has the probes.

        Raises:
            FileNotFoundError: ``probe_file`` is missing.
            ValueError: there are no probes, or too few.
        """
        if self._role in (None, "edge") and (asks(trainer, "check_probes") or module.fits_links()):
            num_probes = sum(len(batch["input_ids"]) for batch in data.probe_batches(PROBES_TOGETHER))
            for check in hooks(trainer, "check_probes"):
                check(num_probes, module.num_labels or 2)  # see ProbeModel for those of a language model

    # ---- roles -----------------------------------------------------------------------------------------------

    @property
    def _module(self) -> Any:
        return self.lightning_module

    @property
    def rounds(self) -> Rounds:
        """This process' part in the rounds, once it is placed."""
        assert self._rounds is not None, "the clients are not placed yet"
        return self._rounds

    def setup(self, trainer: "pl.Trainer") -> None:
        """Place the clients, and build what this process runs: the sessions of its edges, and its clients."""
        super().setup(trainer)
        refuse_unsupported(trainer)
        if self._rounds is None:
            self._module.check_aggregator(self.aggregator, self.adapter_bits)
            if self.is_global_zero:
                warn_of_overridden(trainer, edge_of=self._edge_of, client_plans=self._module.client_plans)
            datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
            self._rounds = self._make_rounds(datamodule)
            self._fleet = Fleet(
                trainer,
                self._module,
                self.rounds,
                self.world,
                places=self._compute_places(),
                own_client=self.own_client,
            )
            mine = {
                "strategy.aggregator": self.aggregator,
                "strategy.adapter_bits": self.adapter_bits,
                "model.client_ranks": self._module.client_ranks,
            }
            agree_on_adapters(self.world, mine)
            agree_on_links(self.world, self._module)
            self._fleet.know(self._profile, datamodule, measure=self.layout == "site")
            self._fleet.place()
            self.barrier()  # nobody calls an edge that is not served yet
        else:
            self.fleet.provide_probes()
            self._module.forget_base_model()
        self.publish()

    def _make_rounds(self, datamodule: Any) -> Rounds:
        """The part of this process in the rounds, without clients yet."""
        world = self.world
        topology: Topology = (
            places.sites(world.members, self._edge_of)
            if self.layout == "site"
            else places.simulate(self.layout, world.members, datamodule.client_names, self.num_edges, self._edge_of)
        )
        edges = {
            edge: EdgeService(edge, {}, self.edge_device, device_to_device=self.device_to_device)
            for edge, worker in topology.edges.items()
            if worker == world.worker
        }
        local = [name for name, worker in topology.hosts.items() if worker == world.worker]
        sizes = {name: datamodule.client_sizes[name] for name in local}
        if self.is_global_zero:
            remote.serve(progress.SERVICE, progress.ProgressDesk(self._show_progress))
        reporter = progress.ProgressReporter(world, self.steps_per_round)
        return Rounds(
            world,
            topology,
            sizes,
            edges,
            aggregate=self.aggregate,
            inspect=lambda updates: self.fleet.inspect(updates),
            corrupt=lambda *submitted: self.fleet.corrupt(*submitted),
            passes_in_flight=self.passes_in_flight,
            reporter=reporter,
            own=self.own_adapters,
            format=self._adapter_format,
        )

    @property
    def fleet(self) -> Fleet:
        """The clients of the run, once they are placed."""
        assert self._fleet is not None, "the clients are not placed yet"
        return self._fleet

    # ---- what callbacks ask --------------------------------------------------------------------------------------

    @property
    def placement(self) -> Placement:
        """Edge and plan of each client."""
        return self.fleet.placement

    @property
    def network(self) -> NetworkProfile | None:
        """Devices and links of the run; None without a profile."""
        return self._tried.network if self._fleet is None and self._tried is not None else self.fleet.network

    @property
    def workload(self) -> Workload:
        """A step on a full batch of the longest texts, which is what plans have to provide for."""
        return self._tried.workload if self._fleet is None and self._tried is not None else self.fleet.workload

    @property
    def lost_clients(self) -> frozenset[str]:
        """Clients that take part no more: they, their host or their edge are gone."""
        if self._rounds is None:
            return frozenset()
        return frozenset(self.world.board.lost & set(self.rounds.topology.clients))

    def gather_clients(self, found: dict[str, tuple[Tensor, ...]]) -> dict[str, tuple[Tensor, ...]] | None:
        """Bring what the edges found out about their clients together at the cloud, in client order.

        Args:
            found: by client, in this process; every process calls, also with nothing.

        Returns:
            At the cloud all of it, elsewhere None.
        """
        self.rounds.count("behaviour/up", found)
        gathered = self.world.gather(found)
        if gathered is None:
            return None
        merged = {client: values for part in gathered.values() for client, values in part.items()}
        return {client: merged[client] for client in self.rounds.topology.clients if client in merged}

    def _show_progress(self, round_number: int, steps: int, clients: int, loss: float) -> None:
        """Hand on to the callbacks that have ``on_client_progress`` how far the clients are."""
        trainer, participants = self._module.trainer, self.participants(round_number)
        for hook in hooks(trainer, "on_client_progress"):
            hook(
                trainer,
                steps_done=steps,
                steps_total=len(participants) * self.steps_per_round,
                clients_done=clients,
                num_clients=len(participants),
                loss=loss,
            )

    def publish(self, mean: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """The cloud's adapters become everybody's: the module's, the clients' and the sessions'.

        Args:
            mean: at the cloud, what follows the adapters that everybody has; without it those of its module.

        Returns:
            What was sent.
        """
        before = self._module.global_adapters()
        sent = before if mean is None else self.rounds.encode(mean, before)
        sent = cast(Mapping[str, Tensor], self.broadcast(sent if self.is_global_zero else None))
        self._module.load_global_adapters(self.rounds.decode(sent, before))
        self._hand_on()
        return sent

    def _hand_on(self) -> None:
        """The module's adapters become those of the clients and sessions in this process; links are fitted to them."""
        fitted = self.fleet.fit_links()
        self._module.start_links(fitted)
        self.rounds.load({**fitted, **self._module.global_adapters()})
        if self._module.trainer.state.fn == TrainerFn.FITTING:
            self.rounds.count_fitted(fitted)

    def finish_edge_round(self, round_number: int, edge_round: int, *, last: bool) -> None:
        """Average at the edges, and after the ``last`` edge round at the cloud; all go on from the mean."""
        if self.aggregator == ALONE:
            self._module.load_global_adapters(self.rounds.keep_own())
            if last:
                self.fleet.place()
                self.publish()  # to nobody, but replicas that were made anew need what their clients have
            return
        mean = self.rounds.finish_edge_round((round_number, edge_round), self.participants(round_number), last=last)
        if not last:
            return
        if self._module.stacks:  # what is merged is sent, and everybody merges it; fresh adapters come from the seed
            sent = cast(Mapping[str, Tensor], self.broadcast(mean))
            self._module.absorb(sent, round_number)
            self.fleet.place()
            self._hand_on()
            self.rounds.count_published(sent, whole=True)
        else:
            self.fleet.place()
            self.rounds.count_published(self.publish(mean))

    def aggregate(self, scope: Scope, updates: list[Update], final: bool = True) -> Update | None:
        """The aggregation hook: callbacks may change weights or drop updates, then the aggregator merges the rest.

        A callback takes part by having ``on_before_aggregate(trainer, scope, updates) -> list[Update]``.

        Args:
            scope: ``edge`` or ``cloud``.
            updates: what arrived.
            final: whether the result becomes somebody's adapters, rather than part of another mean.

        Returns:
            The merged adapters with the sum of the weights, or None when no update is left.
        """
        for hook in hooks(self._module.trainer, "on_before_aggregate"):
            updates = hook(self._module.trainer, scope, updates)
        bad = [update.sender for update in updates if not _is_finite(update)]
        if bad:
            log.warning("%s left out %s: adapters that are not finite", scope, ", ".join(bad))
        updates = [update for update in updates if update.weight > 0 and update.sender not in bad]
        if not updates:
            return None
        sent, weights = [update.adapters for update in updates], [update.weight for update in updates]
        lossless = not final or (self.aggregator == "stacked" and scope == "cloud")
        if self.aggregator in MERGE_PRODUCTS:
            merged = exact(sent, weights, rank=None if lossless else self._module.lora.rank)
        else:
            merged = AGGREGATORS[self.aggregator](sent, weights)
        return Update(scope, sum(weights), merged)


def _is_finite(update: Update) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in update.adapters.values())
