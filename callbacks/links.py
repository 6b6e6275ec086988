"""Callbacks that change what crosses a link, here and in other projects.

Under `elsa_pl.strategies.HierarchicalStrategy` they are stages of the links between clients and edges: what crosses is
encoded, in both directions, and the edges calibrate on the data module's probes before every round. In any other
Lightning project they stand at a named submodule, whose output becomes what a receiver would have decoded.

Several of them stack in the order in which they are given.
"""

import functools
import hashlib
import secrets
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from elsa_pl.callbacks.probing import evaluating, is_federated, probe, submodule
from elsa_pl.errors import ConfigurationError
from elsa_pl.functional.perturbation import Complement
from elsa_pl.functional.quantization import BlockFormat
from elsa_pl.links import LINKS, Codec, Link, Stage, on_states
from elsa_pl.links.hiding import EncryptionStage, NoiseStage
from elsa_pl.links.perturbation import PerturbationStage, Undo
from elsa_pl.links.stages import ProjectionStage, QuantizationStage, SketchDecoding, SketchStage


class LinkCallback(Callback):
    """A callback that is a stage of links.

    Args:
        stage: what it does.
        links: on which, under `elsa_pl`'s strategy.
        at: name of the submodule, in any other project; None under `elsa_pl`'s strategy.
        probes: batches of public inputs to calibrate on, for ``probe_step(batch)`` of the LightningModule, in any other
            project. Under `elsa_pl`'s strategy the data module has them.

    Raises:
        ConfigurationError: an unknown link, or none.
    """

    def __init__(self, stage: Stage, links: Sequence[Link], at: str | None, probes: Iterable[Any] | None) -> None:
        if not links or set(links) - set(LINKS):
            raise ConfigurationError(f"links must be some of {', '.join(LINKS)}; got {list(links)}")
        self.stage, self._links, self.at, self._probes = stage, tuple(links), at, probes
        self._hooks: list[Any] = []

    def link_stage(self, link: Link) -> Stage | None:
        """The stage that this callback is on a link."""
        return self.stage if link in self._links else None

    def check_links(self, links: Collection[str]) -> None:
        """Refuse, before anything starts, cuts in which there is nothing to do.

        Args:
            links: those that all clients have; none where one of them computes the whole model.

        Raises:
            ConfigurationError: some client has none of the links that this is for.
        """
        if links and not set(self._links) & set(links):
            raise ConfigurationError(
                f"{type(self).__name__} is for the {' and '.join(self._links)}, which a plan without a tail does not"
                " have: leave it out, or cut the model in three"
            )

    # ---- in a project of its own ---------------------------------------------------------------------------------

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        name = type(self).__name__
        if is_federated(trainer):
            if self.at is not None:
                raise ConfigurationError(f"{name}: at={self.at!r} has no use here, beside links: leave it out")
            return
        if self.at is None:
            raise ConfigurationError(f"{name} needs at, the name of a submodule, without elsa_pl's strategy")
        everybody = _link_callbacks(trainer)
        if everybody[-1] is self and not any(other._hooks for other in everybody):  # all have their secrets by now
            _attach(pl_module, everybody, f"rank-{trainer.global_rank}")

    @property
    def returns_at(self) -> str | None:
        """Name of the submodule where what the stage does is undone, in any other project; None: behind itself."""
        return None

    def _attach(
        self,
        module: "pl.LightningModule",
        place: str,
        stack: "list[LinkCallback]",
        turned: Codec | None,
        client: str,
    ) -> Codec:
        """Put one codec of a whole stack into the module, where optimizers and checkpoints find it."""
        found = submodule(module, place, type(self).__name__)
        link: Link = "uplink" if turned is None else "downlink"
        registered = "link_" + place.replace(".", "_")
        if not hasattr(module, registered):
            if turned is None or len(stack) > 1:
                states = self._probed(module, place, found, stack)
            else:  # of the uplink's subspace, whatever the states here
                assert turned.subspace is not None
                states = torch.eye(len(turned.subspace), device=module.device)
            made = Codec(place, link, [other.stage for other in stack], states.shape[-1], client)
            made.fit(states, turned)
            module.add_module(registered, made.to(states.device))
        codec = cast(Codec, module.get_submodule(registered))
        asked = [other.stage.describe() for other in stack]
        if (codec.link, codec.describe()) != (link, asked):
            raise ConfigurationError(
                f"{place} has a codec already, {'; '.join(codec.describe())}, from an earlier fit; got"
                f" {'; '.join(asked)}: take a new module, or the same callbacks"
            )
        self._hooks.append(on_states(found, codec))
        return codec

    def _probed(self, module: "pl.LightningModule", name: str, place: nn.Module, stack: "list[LinkCallback]") -> Tensor:
        """What the submodule says about the probes: a row for each token that is no padding."""
        probes = next((other._probes for other in stack if other._probes is not None), None)
        if probes is None or not hasattr(module, "probe_step"):
            missing = "probes" if probes is None else "a method probe_step(batch) of the LightningModule"
            raise ConfigurationError(
                f"{type(self).__name__} at {name} needs {missing}, to know what states are like there: give it"
                " batches of public inputs, and the LightningModule a probe_step that runs the model on one"
            )
        found: list[Tensor] = []

        def note(states: Any) -> None:
            if not isinstance(states, Tensor) or not states.ndim:
                got = f"a tensor {list(states.shape)}" if isinstance(states, Tensor) else f"a {type(states).__name__}"
                raise ConfigurationError(
                    f"{type(self).__name__} expected states [*, D] from {name}; got {got}: name a submodule that"
                    " puts out a tensor, or a tuple or ModelOutput that begins with one"
                )
            mask = batch.get("attention_mask") if isinstance(batch, dict) else None
            if mask is not None and mask.shape == states.shape[:-1]:
                states = states[mask.bool()]
            found.append(states.flatten(0, -2).detach().float())

        handle = on_states(place, note)
        try:
            with evaluating(module):
                for batch in probes:
                    probe(module, batch)
        finally:
            handle.remove()
        if not found:
            raise ConfigurationError(f"{type(self).__name__}: the probes never reach {name}: is it used at all?")
        return torch.cat(found)

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._detach()  # there is no teardown then

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._detach()

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class SketchCompression(LinkCallback):
    """Sends a count sketch of each state, ``ratio`` times fewer numbers; gradients likewise.

    Args:
        ratio: numbers of a state over numbers sent.
        decoder: ``calibrated`` reads it with what public texts say about the states; ``median`` is the paper's decoder,
            ``mean`` the unbiased one of least variance. The last two lose more than the state's own length.
        num_rows: hash rows.
        ridge: of the calibrated decoder, in units of the sketch's mean variance.
        seed: of the hashes; no secret.
        links, at, probes: see `LinkCallback`.

    Raises:
        ConfigurationError: an unknown link.
        ValueError: an unknown decoder.

    Source:
        ELSA, arXiv 2601.13824 (median); `elsa_pl.functional.sketch` has the formulas.
    """

    def __init__(
        self,
        ratio: float = 4.0,
        decoder: SketchDecoding = "calibrated",
        *,
        num_rows: int = 3,
        ridge: float = 1e-4,
        seed: int = 0,
        links: Sequence[Link] = LINKS,
        at: str | None = None,
        probes: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(SketchStage(ratio, decoder, num_rows, ridge, seed), links, at, probes)


class LinkQuantization(LinkCallback):
    """Sends each number in 8 or 4 bits, with a scale for each block; gradients likewise. Always the last stage.

    Args:
        bits: 8 or 4.
        block: numbers that share a scale; a divisor of the width that arrives, or more than it.
        links, at, probes: see `LinkCallback`.

    Raises:
        ConfigurationError: an unknown link.
        ValueError: other bits or blocks.

    Source:
        `elsa_pl.functional.quantization` has the formulas.
    """

    def __init__(
        self,
        bits: Literal[8, 4] = 8,
        *,
        block: int = 32,
        links: Sequence[Link] = LINKS,
        at: str | None = None,
        probes: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(QuantizationStage(BlockFormat(bits=bits, block=block)), links, at, probes)


class LinkProjection(LinkCallback):
    """Sends coordinates along the principal directions of public texts' states; they may train with the adapters.

    Args:
        ratio: numbers of a state over numbers sent.
        learn: encoder and decoder train, and are averaged like adapters; all clients must be cut alike then. Otherwise
            they are computed anew before every round.
        links, at, probes: see `LinkCallback`.

    Raises:
        ConfigurationError: an unknown link.
        ValueError: a ratio below 1.

    Source:
        `elsa_pl.functional.projection` has the formulas.
    """

    def __init__(
        self,
        ratio: float = 8.0,
        *,
        learn: bool = True,
        links: Sequence[Link] = LINKS,
        at: str | None = None,
        probes: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(ProjectionStage(ratio, learn), links, at, probes)


class SecretCallback(LinkCallback):
    """A stage that depends on a secret.

    Args:
        stage, at, probes: see `LinkCallback`.
        secret_file: holds it; None: it follows from a seed, which is right for a simulation, and no secret.
        edges_know: the edge must have it as well.
    """

    def __init__(
        self,
        stage: Stage,
        at: str | None,
        probes: Iterable[Any] | None,
        secret_file: str | None,
        *,
        edges_know: bool,
    ) -> None:
        super().__init__(stage, LINKS, at, probes)
        self._secret_file, self._edges_know, self._known = secret_file, edges_know, cast(str | None, None)

    def _secret(self, trainer: "pl.Trainer", module: "pl.LightningModule", seed: int) -> str | None:
        """This process' secret; None for one that needs none.

        Raises:
            ConfigurationError: it should be in a file, and is not.
        """
        strategy: Any = trainer.strategy
        name = type(self).__name__
        if is_federated(trainer) and strategy.layout == "site":
            role = strategy.world.role
            if role != "host" and not (self._edges_know and role == "edge"):
                return None
        if self._secret_file is not None:
            path = Path(self._secret_file)
            if not path.is_file() or not path.read_text().strip():
                raise ConfigurationError(
                    f"expected a secret in secret_file; got none in {path}: see the help of {name}"
                )
            self._known = path.read_text().strip()
        elif not is_federated(trainer):
            self._known = f"simulation {seed}"
        elif strategy.layout != "site":
            self._known = f"simulation {cast(Any, module).seed}"
        else:
            raise ConfigurationError(f"between sites {name} needs secret_file: see its help")
        return self._known

    def secret_check(self) -> str | None:
        """What tells whether two processes that must share a secret do, and not which; None where they need not."""
        if not self._edges_know or self._known is None:
            return None
        return _slow_hash(self._known, "check")

    def secret_learnt_on(self) -> str | None:
        """What tells whether a model goes on with the secret that it has learnt on; None where that does not matter."""
        return None


class SSOP(SecretCallback):
    """Turns what leaves a client by a rotation that only its secret gives (SS-OP).

    Args:
        rank: of the semantic subspace of public texts' states, inside of which is turned. A small one stops a reader
            only who does not look at the rest: see ``PrivacyAudit``.
        undo: ``tail``: the edge is curious and computes on turned states, which costs accuracy; they are turned alike
            for the whole run, in the subspace of the model before any training. ``edge``: the edge is trusted and the
            link is not; it costs none.
        complement: what becomes of the part outside of the subspace: ``keep``, ``sketch`` or ``drop``.
        ratio: with ``complement="sketch"``, numbers of that part over numbers sent.
        rekey: another rotation for every pass, but in any other project all passes are alike; None: where the edge
            undoes it.
        secret_file: a text that only those have who may turn back; between sites there must be one, made for example by
            ``python -c "import secrets; print(secrets.token_hex(16))"``. With ``undo="tail"`` each client has a file of
            its own, and goes on with it when the run is resumed: outside of the layout ``site`` that is checked. With
            ``undo="edge"`` all have the same: it keeps outsiders out, and not clients from each other.
            Without it, secrets follow from the seed of the run, or in any other project from ``seed``: right for a
            simulation, and no secret.
        seed: of the sketch's hashes; no secret.
        at, probes: see `LinkCallback`.
        decode_at: in any other project, and with ``undo="tail"``, the submodule whose output is turned back; after what
            other callbacks do there, whatever their order.

    Raises:
        ConfigurationError: from the start of a run, a place or a secret that is missing.
        ValueError: a rank below 1, or an unknown ``undo`` or ``complement``.

    Source:
        ELSA, arXiv 2601.13824 (``undo="tail"``, ``complement="keep"``); `elsa_pl.functional.perturbation` has the
        formulas.
    """

    def __init__(
        self,
        rank: int = 64,
        undo: Undo = "tail",
        complement: Complement = "keep",
        *,
        ratio: float = 4.0,
        rekey: bool | None = None,
        secret_file: str | None = None,
        seed: int = 0,
        at: str | None = None,
        decode_at: str | None = None,
        probes: Iterable[Any] | None = None,
    ) -> None:
        stage = PerturbationStage(rank, undo, complement, ratio, undo == "edge" if rekey is None else rekey, seed)
        super().__init__(stage, at, probes, secret_file, edges_know=undo == "edge")
        self._perturbation, self._undo, self._seed = stage, undo, seed
        self._decode_at = decode_at

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        back = self._undo == "tail" and not is_federated(trainer)
        if back != (self._decode_at is not None):
            raise ConfigurationError(
                f"SSOP with undo={self._undo!r} {'needs' if back else 'has no use for'} decode_at here: it is the"
                " submodule that turns back what the edge does not, in a project without elsa_pl's strategy"
            )
        self._perturbation.secret = self._secret(trainer, pl_module, self._seed)
        super().setup(trainer, pl_module, stage)

    def secret_learnt_on(self) -> str | None:
        return None if self._known is None or self._undo == "edge" else _slow_hash(self._known, "learnt on")

    @property
    def returns_at(self) -> str | None:
        return self._decode_at


class LinkEncryption(SecretCallback):
    """Encrypts what crosses the links and checks that nobody changed it; gradients likewise. Always the last stage.

    Against whoever reads the link, and exact: 28 bytes and the shape for each message. Not against the edge, which
    decrypts. It covers hidden states and their gradients. Everything else stays readable: the attention masks that go
    with states, and so how long each text is; the slots of `LinkReuse`; sizes and times of messages; adapters and
    calibration. Where the edge has the head, labels, loss and logits would be readable as well, so all plans must have
    a tail.

    Authenticated are, beside the content: client, link and direction (states or gradients); the number of the pass,
    which follows from the run's seed, round, client and step; the shape; and the masks and slots that go up with
    states. So a message opens neither in the other direction nor in another pass. One of the same pass of an earlier
    run with the same secret and seed does: take another secret for each run where that matters.

    Args:
        secret_file: a text that the clients and edges have and nobody else, made for example by ``python -c "import
            secrets; print(secrets.token_hex(16))"``; between sites there must be one. All have the same: it keeps
            outsiders out, and not clients from each other. Without it, keys follow from the seed of the run: right for
            a simulation, and no secret.

    Raises:
        ConfigurationError: from the start of a run, no `elsa_pl` strategy, a plan without a tail, or a secret that is
            missing.

    Source:
        RFC 8439; `elsa_pl.functional.encryption`.
    """

    def __init__(self, *, secret_file: str | None = None) -> None:
        stage = EncryptionStage()
        super().__init__(stage, None, None, secret_file, edges_know=True)
        self._encryption = stage

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if not is_federated(trainer):
            raise ConfigurationError("LinkEncryption is for the links of elsa_pl: it needs HierarchicalStrategy")
        self._encryption.secret = self._secret(trainer, pl_module, 0)
        super().setup(trainer, pl_module, stage)

    def check_links(self, links: Collection[str]) -> None:
        super().check_links(links)
        if links and "downlink" not in links:
            raise ConfigurationError(
                "LinkEncryption covers states and their gradients; got a plan without a tail, with which labels, losses"
                " and logits would cross readable beside them: give all plans a tail, or leave it out"
            )


class LinkNoise(LinkCallback):
    """Adds Gaussian noise to states, but not to gradients: the usual defence, to compare others with.

    Args:
        scale: standard deviations of the noise, in units of those of public texts' states, coordinate by coordinate.
            In any other project all passes have the same noise.
        links, at, probes: see `LinkCallback`.

    Raises:
        ConfigurationError: an unknown link.
        ValueError: a scale that is not above 0.
    """

    def __init__(
        self,
        scale: float = 1.0,
        *,
        links: Sequence[Link] = ("uplink",),
        at: str | None = None,
        probes: Iterable[Any] | None = None,
    ) -> None:
        stage = NoiseStage(scale)
        super().__init__(stage, links, at, probes)
        self._noise = stage

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if is_federated(trainer) and cast(Any, trainer.strategy).layout == "site":
            self._noise.seed = secrets.randbits(126)  # an edge knows the seed of the run
        else:
            self._noise.seed = getattr(pl_module, "seed", 0)
        super().setup(trainer, pl_module, stage)


@functools.cache
def _slow_hash(secret: str, purpose: str) -> str:
    """Another one for each purpose; slow, so that a bad secret is not found by trying."""
    return hashlib.scrypt(secret.encode(), salt=f"elsa_pl secret {purpose}".encode(), n=2**14, r=8, p=1).hex()


def _attach(module: "pl.LightningModule", callbacks: list[LinkCallback], client: str) -> None:
    """Give each place one codec, of all that stands there; last where something is turned back.

    Raises:
        ConfigurationError: stages that do not fit, or a place where two of them would have to be the first.
    """
    firsts = Counter(
        place for other in callbacks if other.stage.first for place in (other.at, other.returns_at) if place is not None
    )
    for place, count in firsts.items():
        if count > 1:
            raise ConfigurationError(
                f"expected one SSOP at {place}, which turns states or turns them back; got {count}: name another"
                " submodule as at or decode_at"
            )
    returning = {other.returns_at: other for other in callbacks if other.returns_at is not None}
    places = dict.fromkeys(other.at for other in callbacks if other.at is not None)
    codecs: dict[str | None, Codec] = {}
    for place in [*(place for place in places if place not in returning), *returning]:
        back = returning.get(place)
        stack = [other for other in [back] if other is not None] + [other for other in callbacks if other.at == place]
        turned = None if back is None else codecs[back.at]
        codecs[place] = stack[0]._attach(module, place, stack, turned, client)


def _link_callbacks(trainer: "pl.Trainer") -> list[LinkCallback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it in a connector
    return [callback for callback in callbacks if isinstance(callback, LinkCallback)]
