"""What readers of an uplink get to see of held-out texts, and what they know besides: what `PrivacyAudit` attacks.

    elsa_pl:            front of a client  -> its stages -> (link) -> decoded, as the edge or any reader of the link can
    any other project:  submodule at `at`  -> stages there         -> decoded, likewise

Shapes: B batch, T tokens, G tokens after pooling, D hidden.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, islice, pairwise
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from elsa_pl.callbacks.links import LinkCallback
from elsa_pl.callbacks.probing import evaluating, probe, submodule
from elsa_pl.errors import ConfigurationError
from elsa_pl.functional.label_attacks import pool
from elsa_pl.functional.pooling import Pooling
from elsa_pl.functional.seeding import derive_seed
from elsa_pl.links import NOBODY, Codec, codecs_in, crossing, on_states
from elsa_pl.links.hiding import imitating_noise

Reader = Literal["edge", "link"]
Part = tuple[Tensor, Mapping[str, Tensor]]
"""States [B, G, D] of the texts of a batch, which has their ``input_ids`` and ``attention_mask`` [B, T]."""

_LARGEST = 1e4  # no state is so large


class Exposure:
    """What is seen and known, collected batch by batch.

    Args:
        own: the stages as the sender has them; None if there are none.
        nobody: the same without any secret.
        special: token ids that are no secret.
        pooling: of tokens, where states are sent.

    Attributes:
        public: states of public texts, as attackers encode and decode them, without noise.
        noised: the same with noise of the attackers' own, as the link adds; none where it adds none.
        plain: states of private texts before anything is done to them; attackers use those of texts they know.
        seen: what each reader makes of what was sent of private texts.
        states: what computes states of texts as anyone can who knows the front; None where texts are not tried out.
        pooled: of what the edge sees, by name, what might tell the labels: a row for each text. [B, D] each
        labels: of the private texts. [B] each
    """

    def __init__(
        self, own: Codec | None, nobody: Codec | None, special: Sequence[int], pooling: Pooling | None = None
    ) -> None:
        self._own, self._nobody, self.special, self.pooling = own, nobody, special, pooling
        self.public: list[Part] = []
        self.noised: list[Part] = []
        self.plain: list[Part] = []
        self.seen: dict[Reader, list[Part]] = {"edge": [], "link": []}
        self.states: Callable[[Mapping[str, Tensor]], Tensor] | None = None
        self.pooled: dict[str, list[Tensor]] = {}
        self.labels: list[Tensor] = []

    @property
    def subspace(self) -> Tensor | None:
        """In which SS-OP turns, [D, r]; None without it."""
        subspace = None if self._nobody is None else self._nobody.subspace
        return None if subspace is None else subspace.detach().cpu()

    def encoded(self, states: Tensor) -> Tensor:
        """States encoded and decoded by somebody who has no secret, on the CPU."""
        with torch.no_grad():
            return (states if self._nobody is None else self._nobody(states)).cpu()

    def know(self, states: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add states of public texts."""
        clean = self.encoded(states)
        with imitating_noise(torch.Generator().manual_seed(derive_seed("attackers' noise", len(self.public)))):
            noised = self.encoded(states)
        self.public.append((clean, batch))
        if not torch.equal(noised, clean):
            self.noised.append((noised, batch))

    def send(
        self,
        states: Tensor,
        sent: Tensor,
        batch: Mapping[str, Tensor],
        number: int = 0,
        mask: Tensor | None = None,
    ) -> None:
        """Add states of private texts, and what was sent of them.

        Args:
            states: before the stages. [B, G, D]
            sent: behind the encoders.
            batch: what they are of.
            number: of the pass.
            mask: what went with them. [B, G]
        """
        readers: tuple[tuple[Reader, Codec | None], ...] = (("edge", self._own), ("link", self._nobody))
        with torch.no_grad(), crossing(number, mask):
            for reader, codec in readers:
                read = sent if codec is None else codec.side("decoder")(sent)
                read = read.nan_to_num(0, 0, 0).clamp(-_LARGEST, _LARGEST)  # whoever has no key reads anything
                self.seen[reader].append((read.cpu(), batch))
        self.plain.append((states.cpu(), batch))


# ---- under elsa_pl's strategy ----------------------------------------------------------------------------------------


def expose_client(trainer: "pl.Trainer", module: Any, name: str, public_file: str | None, num_texts: int) -> Exposure:
    """What a client's edge, and readers of its uplink, see of validation texts.

    Raises:
        ConfigurationError: there are no such texts.
        RemoteError: the edge is gone.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
    strategy: Any = trainer.strategy
    client, plan = strategy.rounds.clients[name], strategy.placement.plans[name]
    batches = data.eval_batches("validation")
    if not batches:
        raise ConfigurationError("PrivacyAudit needs validation texts: set data.validation_fraction or validation_file")
    chosen = _chosen(batches, num_texts)
    own, nobody = (module.known_codecs(plan, who).get("uplink") for who in (name, NOBODY))
    exposure = Exposure(own, nobody, data.special_ids, module.token_pooling.uplink)
    exposure.states = client.states
    for batch in public_batches(data, public_file):
        exposure.know(client.states(batch), batch)
    exposure.pooled = {"uplink": [], "middle": [], "gradients": []}
    for number, (whole, rows) in enumerate(zip(batches, chosen, strict=True)):
        if not len(rows):
            continue
        # copies, since what was made under inference mode has no gradients
        batch = {name: value[rows].clone() for name, value in whole.items()}
        exposed = client.expose(batch, (trainer.current_epoch, number))
        exposure.send(exposed.states, exposed.sent, batch, exposed.number, exposed.mask)
        exposure.pooled["uplink"].append(pool(exposure.seen["edge"][-1][0], exposed.mask))
        exposure.pooled["middle"].append(pool(exposed.outputs, exposed.mask_down))
        exposure.pooled["gradients"].append(pool(exposed.gradients, exposed.mask_down))
        exposure.labels.append(batch["labels"])
    return exposure


def public_batches(data: Any, public_file: str | None) -> list[Mapping[str, Tensor]]:
    """Batches of the texts that attackers know.

    Args:
        data: the data module.
        public_file: see `PrivacyAudit`; None: the probes.

    Raises:
        ConfigurationError: there are fewer than two, or the file is not what it must be.
        ValueError: there are no probes.
    """
    if public_file is None:
        found = data.probe_batches()
    else:
        try:
            found = data.text_batches(public_file, "PrivacyAudit.public")
        except (FileNotFoundError, ValueError) as error:
            told = str(error) if "public_file" in str(error) else f"PrivacyAudit.public_file: {error}"
            raise ConfigurationError(told) from error
    count = sum(len(batch["input_ids"]) for batch in found)
    if count < 2:
        where = "the probes" if public_file is None else f"PrivacyAudit.public_file {public_file}"
        raise ConfigurationError(
            f"PrivacyAudit: expected at least 2 texts in {where}, to learn from; got {count}: add texts"
        )
    return cast(list[Mapping[str, Tensor]], found)


# ---- in a project of its own -----------------------------------------------------------------------------------------


def check_place(module: "pl.LightningModule", at: str, public: Iterable[Any], private: Iterable[Any]) -> None:
    """Refuse, before any training, a place or batches that cannot be audited; it looks at the first of each.

    Raises:
        ConfigurationError: what is wrong, and what to do.
    """
    with _apart():
        for name, batches in (("public", public), ("private", private)):
            _pass_on(module, at, name, islice(batches, 1), lambda *_: None)


def expose_module(
    trainer: "pl.Trainer",
    module: "pl.LightningModule",
    at: str,
    public: Iterable[Any],
    private: Iterable[Any],
    num_texts: int,
    special: Sequence[int],
) -> Exposure:
    """What is seen of private batches where the link callbacks at a submodule send its output.

    All passes are evaluations and leave no trace: neither in the traffic, nor in modes or random numbers.

    Raises:
        ConfigurationError: a place or batches that cannot be audited.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it in a connector
    nobodies = {codec: codec.without_secrets().to(module.device) for codec in codecs_in(module)}
    own = None  # a codec of an earlier fit may be there still
    if any(isinstance(callback, LinkCallback) and callback.at == at for callback in callbacks):
        own = next(codec for codec in nobodies if codec.name == at)
    exposure = Exposure(own, None if own is None else nobodies[own], special)

    def send(states: Tensor, batch: Mapping[str, Tensor]) -> None:
        rows = next(taken)
        states, batch = states[rows], {name: value[rows] for name, value in batch.items()}
        exposure.send(states, states if own is None else own.side("encoder")(states), batch)

    with _apart():
        with _in_place_of(nobodies):  # attackers run the model without the secrets of stages before this place
            _pass_on(module, at, "public", public, exposure.know)
        held_out = list(private)
        for batch in held_out:
            _require_batch(batch, "private")
        chosen = _chosen(held_out, num_texts)
        held_out = [batch for batch, rows in zip(held_out, chosen, strict=True) if len(rows)]
        taken = iter([rows for rows in chosen if len(rows)])
        _pass_on(module, at, "private", held_out, send)
    num_found = sum(len(states) for states, _ in exposure.plain)
    if num_found < 2:
        raise ConfigurationError(
            f"PrivacyAudit: expected at least 2 private texts, of which attackers know one; got {num_found}: give more"
        )
    for name, parts in (("public", exposure.public), ("private", exposure.plain)):
        ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for _, batch in parts])
        if torch.isin(ids, torch.tensor(list(special), dtype=torch.long)).all():
            raise ConfigurationError(
                f"PrivacyAudit: expected tokens besides special_ids in {name}; got {len(ids)} tokens, all of them"
                " special: give other texts, or fewer special_ids"
            )
    return exposure


def _pass_on(
    module: "pl.LightningModule", at: str, name: str, batches: Iterable[Any], take: Callable[[Tensor, Any], None]
) -> None:
    """Hand on what the submodule puts out for each batch, before any stage changes it, and the batch's tokens."""
    outputs: list[Any] = []

    def note(output: Any) -> None:  # copied, as what follows may change it in place
        outputs.append(output.detach().clone() if isinstance(output, Tensor) else output)

    handle, empty = on_states(submodule(module, at, "PrivacyAudit"), note, first=True), True
    try:
        with evaluating(module):
            for batch in batches:
                _require_batch(batch, name)
                outputs.clear()
                probe(module, batch)
                tokens = {key: batch[key].cpu() for key in ("input_ids", "attention_mask")}
                _require_states(outputs, tokens["input_ids"], at)
                take(outputs[0], tokens)
                empty = False
    finally:
        handle.remove()
    if empty:
        raise ConfigurationError(
            f"PrivacyAudit: expected batches in {name}; got none: give a list of batches or a DataLoader, and no"
            " generator, which is empty from the second round on"
        )


def _require_batch(batch: Any, name: str) -> None:
    missing = ["input_ids", "attention_mask"]
    if isinstance(batch, Mapping):
        missing = [key for key in missing if not isinstance(batch.get(key), Tensor)]
    if missing:
        got = f"a {type(batch).__name__}" + (f" of {list(batch)}" if isinstance(batch, Mapping) else "")
        raise ConfigurationError(
            f"PrivacyAudit: expected {name} batches with tensors input_ids and attention_mask; got {got}, without"
            f" {' and '.join(missing)}: give batches as a tokenizer makes them"
        )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if ids.ndim != 2 or ids.shape != mask.shape or ids.is_floating_point():
        raise ConfigurationError(
            f"PrivacyAudit: expected input_ids of whole numbers and an attention_mask in {name}, both [B, T];"
            f" got {ids.dtype} {list(ids.shape)} and {mask.dtype} {list(mask.shape)}: give batches as a tokenizer makes"
            " them"
        )


def _require_states(outputs: Sequence[Any], ids: Tensor, at: str) -> None:
    if len(outputs) != 1:
        raise ConfigurationError(
            f"PrivacyAudit: expected that probe_step runs {at} once for a batch; it did so {len(outputs)} times: name a"
            " submodule that each batch goes through once"
        )
    (states,) = outputs
    if not isinstance(states, Tensor) or not states.is_floating_point() or states.shape[:-1] != ids.shape:
        got = f"{states.dtype} {list(states.shape)}" if isinstance(states, Tensor) else f"a {type(states).__name__}"
        raise ConfigurationError(
            f"PrivacyAudit: expected hidden states [B, T, D] from {at}, here {[*ids.shape, 'D']}; got {got}: name a"
            " submodule that puts out a state for each token, or a tuple that begins with them, such as a block"
        )


@contextmanager
def _apart() -> Iterator[None]:
    """The random numbers of training go on as without it."""
    with torch.inference_mode(False), torch.random.fork_rng(devices=()):
        yield


@contextmanager
def _in_place_of(others: Mapping[Codec, Codec]) -> Iterator[None]:
    """Each codec is answered for by another one."""
    with ExitStack() as hooks:
        for codec, other in others.items():
            handle = codec.register_forward_hook(lambda _, args, __, other=other: other(*args))
            hooks.callback(handle.remove)
        yield


def _chosen(batches: Sequence[Mapping[str, Tensor]], num_texts: int) -> list[Tensor]:
    """Which rows of each batch are taken, for so many texts; evenly, since batches may come in order of length."""
    ends = list(accumulate((len(batch["input_ids"]) for batch in batches), initial=0))
    count = min(num_texts, ends[-1])
    numbers = torch.arange(count) * ends[-1] // max(1, count)
    return [numbers[(numbers >= first) & (numbers < last)] - first for first, last in pairwise(ends)]
