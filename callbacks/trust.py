"""Scores clients by how far their models' predictions, and their updates, agree with those of the others."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from elsa_pl.callbacks import pictures
from elsa_pl.callbacks.probing import Probed, ProbingCallback, agree, gather, log_agreed
from elsa_pl.functional.trust import UNKNOWN, average, believe, coherence, consistency

log = logging.getLogger(__name__)

# Shapes: N clients, Q probes, C classes.


class TrustScoring(ProbingCallback):
    """Trust in [0, 1] for each client: do its predictions on the probes, and its update, agree with the others'?

    Under `elsa_pl`'s strategy a client's weight in its edge's mean, and through it in the cloud's, is multiplied by its
    trust. In another project the scores are there to be used.

    Args:
        min_trust: below it a client trains, but does not count.
        smoothing: weight of the rounds before in the exponential average, in [0, 1).
        warmup_rounds: rounds before the first score; until then all clients are trusted. 1 scores the first round too.
        every_n_rounds: rounds between scores.
        probes: see `elsa_pl.callbacks.probing.ProbingCallback`; only for other projects.
        pictures: draw trust over rounds into the run's folder.

    Attributes:
        trust: of each client that was scored, the same in every process.
        history: each client's trust after each scoring, all of the same length.

    Source:
        ELSA (Yang et al. 2026, arXiv 2601.13824) scores clients by prediction consistency;
        `elsa_pl.functional.trust` has the formulas and where they differ.

    Example:
        >>> trust = TrustScoring(min_trust=0.2)
    """

    def __init__(
        self,
        min_trust: float = 0.5,
        *,
        smoothing: float = 0.5,
        warmup_rounds: int = 1,
        every_n_rounds: int = 1,
        probes: Iterable[Any] | None = None,
        pictures: bool = True,
    ) -> None:
        super().__init__(probes, warmup_rounds, every_n_rounds)
        if not 0 <= min_trust <= 1:
            raise ValueError(f"min_trust must be in [0, 1]; got {min_trust}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1); got {smoothing}")
        self._min_trust, self._smoothing, self._pictures = min_trust, smoothing, pictures
        self._averages: dict[str, Tensor] = {}  # of consistency and coherence, where clients are gathered
        self.trust: dict[str, float] = {}
        self.history: dict[str, list[float]] = {}

    def on_clients_probed(self, trainer: "pl.Trainer", probed: Probed) -> None:
        gathered = gather(trainer, {client: (said, update) for client, (_, said, update) in probed.items()})
        if gathered is not None:
            self._score(gathered)
        self.trust, self.history = agree(trainer, (self.trust, self.history))
        log_agreed(trainer, {f"trust/{client}": score for client, score in self.trust.items()})

    def _score(self, sent: dict[str, tuple[Tensor, ...]]) -> None:
        finite = [client for client, tensors in sent.items() if all(tensor.isfinite().all() for tensor in tensors)]
        found = {client: torch.tensor([[0.0, 1.0], [0.0, 1.0]]) for client in sent if client not in finite}
        for client in found:
            log.warning("%s has no trust in this round: what it sent is not finite", client)
        if finite:
            predictions, updates = (torch.stack(parts) for parts in zip(*map(sent.__getitem__, finite), strict=True))
            views = [torch.stack(view, dim=1) for view in (consistency(predictions), coherence(updates))]
            found.update(zip(finite, torch.stack(views, dim=1), strict=True))
        for client, view in found.items():
            averages = average(self._averages.get(client), view[:, 0], view[:, 1], self._smoothing)
            consistent, coherent = believe(averages[:1], UNKNOWN), believe(averages[1:], 1.0)
            self._averages[client] = averages
            self.trust[client] = torch.minimum(consistent, coherent).item() if client in finite else 0.0
        num_before = max(map(len, self.history.values()), default=0)
        for client, score in self.trust.items():  # who was not judged now keeps the score, and was trusted before
            self.history.setdefault(client, [1.0] * num_before).append(score)

    def on_before_aggregate(self, trainer: "pl.Trainer", scope: str, updates: list[Any]) -> list[Any]:
        """Multiply the weights of clients by their trust; those of edges are sums of such weights already."""
        if scope != "edge":
            return updates
        trust = {update.sender: self.trust.get(update.sender, 1.0) for update in updates}
        counted = {sender: value if value >= self._min_trust else 0.0 for sender, value in trust.items()}
        return [replace(update, weight=update.weight * counted[update.sender]) for update in updates]

    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._pictures and trainer.is_global_zero and self.history:
            figure = pictures.draw_trust(
                self.history, first_round=self._warmup, every=self._every, min_trust=self._min_trust
            )
            pictures.save(figure, Path(trainer.default_root_dir) / "trust.png")

    def state_dict(self) -> dict[str, Any]:
        averages = {client: averages.tolist() for client, averages in self._averages.items()}
        return {"trust": self.trust, "history": self.history, "averages": averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trust = dict(state_dict["trust"])
        self._averages = {client: torch.tensor(averages) for client, averages in state_dict["averages"].items()}
        self.history = {client: list(scores) for client, scores in state_dict["history"].items()}
