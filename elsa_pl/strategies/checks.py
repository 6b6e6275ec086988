"""Settings that a run of rounds cannot honour are refused before it starts, with the reason."""

import logging
from collections.abc import Collection, Iterable

import lightning.pytorch as pl
import torch

from elsa_pl.datamodules.faults import SUBMITTED_FAULTS, FaultKind
from elsa_pl.errors import ConfigurationError
from elsa_pl.hooks import hooks

log = logging.getLogger(__name__)


def check_device(setting: str, name: str) -> None:
    """Check that a device exists.

    Raises:
        ConfigurationError: it does not.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"{setting} must be a torch device such as cpu or cuda:0; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"{setting} must be on cpu or cuda; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"{setting}={name!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices; use cpu"
        )


def refuse_unsupported(trainer: "pl.Trainer") -> None:
    """Refuse Trainer settings that the rounds cannot honour.

    Raises:
        ConfigurationError: naming each, with the reason and what to use instead.
    """
    refused = []
    if str(trainer.precision) not in ("32-true", "bf16-mixed"):
        refused.append(
            f"precision={trainer.precision}: use 32-true or bf16-mixed; fp16 would need one gradient scaler across"
            " processes, and true low precision would lose the averages' small differences"
        )
    if trainer.max_steps != -1:
        refused.append("max_steps: a run ends with a round, so set max_epochs (global rounds)")
    if trainer.limit_train_batches not in (None, 1.0):
        refused.append("limit_train_batches: the strategy's local_steps and edge_rounds set the batches of a round")
    if trainer.val_check_interval not in (None, 1.0):
        refused.append("val_check_interval: inside a round there is no global model; use check_val_every_n_epoch")
    if trainer.gradient_clip_val is not None:
        refused.append("gradient_clip_val: the bound spans three processes; use model.gradient_clip_val")
    if trainer.accumulate_grad_batches != 1:
        refused.append("accumulate_grad_batches: batches accumulate per client; use model.accumulate_grad_batches")
    if refused:
        raise ConfigurationError("these settings of the trainer do not fit rounds: " + "; ".join(refused))


def warn_of_overridden(trainer: "pl.Trainer", *, edge_of: Collection[str], client_plans: Collection[str]) -> None:
    """Warn of places and plans that were set for single clients, but that a callback chooses.

    Args:
        trainer: its callbacks.
        edge_of: the clients whose edge was set.
        client_plans: the clients whose plan was set.
    """
    for setting, clients, name in (
        ("strategy.edge_of", edge_of, "on_assign_clients"),
        ("model.client_plans", client_plans, "on_plan_clients"),
    ):
        choosing = [type(hook.__self__).__name__ for hook in hooks(trainer, name)]
        if clients and choosing:
            log.warning(
                "%s is ignored for %s, because %s chooses: take the setting or the callback out",
                setting,
                ", ".join(sorted(clients)),
                choosing[-1],
            )


def warn_of_idle(trainer: "pl.Trainer", *, adapter_bits: int, faults: Iterable[FaultKind]) -> None:
    """Warn of what does nothing where clients train alone, because nobody sends or receives adapters.

    Args:
        trainer: its callbacks.
        adapter_bits: of each number of an adapter that is sent.
        faults: kinds of fault that clients have.
    """
    idle = [] if adapter_bits == 32 else [f"adapter_bits={adapter_bits}"]
    idle += [f"fault {kind}" for kind in sorted(set(faults) & set(SUBMITTED_FAULTS))]
    judging = [hook.__self__ for name in ("on_clients_probed", "on_before_aggregate") for hook in hooks(trainer, name)]
    idle += dict.fromkeys(type(callback).__name__ for callback in judging)
    if idle:
        log.warning("no effect with aggregator=none, where adapters are not sent: %s; leave it out", ", ".join(idle))
