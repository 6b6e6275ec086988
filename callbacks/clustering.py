"""Groups clients by how their models behave on public probes."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from elsa_pl.callbacks import pictures
from elsa_pl.callbacks.probing import Probed, ProbingCallback, agree, companion, gather, log_agreed
from elsa_pl.callbacks.trust import TrustScoring
from elsa_pl.functional.clustering import cluster
from elsa_pl.functional.divergence import symmetric_kl
from elsa_pl.functional.fingerprints import MAX_CONTRASTS, behaviour_change, fingerprint, principal_directions

log = logging.getLogger(__name__)

_FLOOR = 1e-6  # features are in units of the base model's spread: far below what a step changes

# Shapes: N clients, Q probes, D hidden, M projected width.


class BehaviorClustering(ProbingCallback):
    """Clusters clients by the symmetric KL divergence of their fingerprints on the probes.

    A fingerprint is a Gaussian over the probes of what training changed in a client's model: the representations, in
    the directions in which those of the untrained model vary most, and the log-probabilities. Only its mean and
    covariance travel.

    Args:
        num_clusters: how many; None chooses by silhouette.
        max_clusters: at most so many, if chosen.
        width: M, directions that representations are projected on; needs more probes than that, and one for each
            class but the first (32 at most).
        warmup_rounds: rounds before the first clustering.
        every_n_rounds: rounds between clusterings.
        probes: see `elsa_pl.callbacks.probing.ProbingCallback`; only for other projects.
        pictures: draw the divergence matrix and a map of the clients into the run's folder.

    Attributes:
        clusters: cluster of each client that took part in the last comparison, from 0; empty before the first one. The
            same in every process.
        names: the clients of `divergences`, in order.
        divergences: (N, N), in the process that decides; None elsewhere and before the first clustering.
        round: the round after which they were computed, counted from 1; 0 before.

    Source:
        ELSA (Yang et al. 2026, arXiv 2601.13824). There clients compute their fingerprints, from representations
        alone; here edges compute them from what clients submit (`elsa_pl.tiers.probes` says why), and
        `elsa_pl.functional.fingerprints` says what is in them.

    Example:
        >>> clustering = BehaviorClustering(num_clusters=4, warmup_rounds=2)
    """

    def __init__(
        self,
        num_clusters: int | None = None,
        *,
        max_clusters: int = 8,
        width: int = 16,
        warmup_rounds: int = 1,
        every_n_rounds: int = 5,
        probes: Iterable[Any] | None = None,
        pictures: bool = True,
    ) -> None:
        super().__init__(probes, warmup_rounds, every_n_rounds)
        if num_clusters is not None and num_clusters < 1:
            raise ValueError(f"num_clusters must be at least 1, or null to choose it; got {num_clusters}")
        if max_clusters < 1 or width < 1:
            raise ValueError(f"max_clusters and width must be at least 1; got {max_clusters} and {width}")
        self._num_clusters, self._max_clusters, self._width = num_clusters, max_clusters, width
        self._pictures = pictures
        self._base: tuple[Tensor, Tensor, Tensor] | None = None  # states, predictions and directions
        self.clusters: dict[str, int] = {}
        self.names: list[str] = []
        self.divergences: Tensor | None = None
        self.round = 0

    def check_probes(self, num_probes: int, num_classes: int) -> None:
        least = self._width + min(num_classes - 1, MAX_CONTRASTS) + 1
        if num_probes < least:
            raise ValueError(
                f"BehaviorClustering needs at least {least} probes for width={self._width} and {num_classes} classes;"
                f" got {num_probes}: raise data.num_probes, give a longer probe_file, or lower width"
            )

    def on_base_probed(self, trainer: "pl.Trainer", states: Tensor, predictions: Tensor) -> None:
        self._base = states, predictions, principal_directions(states, self._width)

    def on_clients_probed(self, trainer: "pl.Trainer", probed: Probed) -> None:
        assert self._base is not None, "the base model is probed before any client"
        found = {}
        for client, (states, predictions, _) in probed.items():
            if states.isfinite().all() and predictions.isfinite().all():
                mean, covariance = fingerprint(behaviour_change(states, predictions, *self._base), floor=_FLOOR)
                found[client] = (mean.float(), covariance.float())
            else:
                log.warning("%s is left out of the clusters: what its model says is not finite", client)
        gathered = gather(trainer, found)
        if gathered:
            self.names = list(gathered)
            self.divergences = self._compare(gathered)
            labels = cluster(self.divergences, self._num_clusters, max_clusters=self._max_clusters)
            self.clusters = dict(zip(self.names, labels.tolist(), strict=True))
            self.round = trainer.current_epoch + 1
        self.clusters, self.round = agree(trainer, (self.clusters, self.round))
        log_agreed(trainer, {"clusters": float(len(set(self.clusters.values())))})

    def _compare(self, gathered: dict[str, tuple[Tensor, ...]]) -> Tensor:
        means, covariances = (torch.stack(parts) for parts in zip(*gathered.values(), strict=True))
        return symmetric_kl(means.double(), covariances.double())

    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._pictures and trainer.is_global_zero and self.divergences is not None:
            folder = Path(trainer.default_root_dir)
            labels = [self.clusters[name] for name in self.names]
            pictures.save(
                pictures.draw_divergences(self.divergences.numpy(), self.names, labels), folder / "divergences.png"
            )
            placement = getattr(trainer.strategy, "placement", None)
            edges = None if placement is None else [placement.assignment[name] for name in self.names]
            scoring = companion(trainer, TrustScoring)
            trust = {} if scoring is None else scoring.trust
            pictures.save(
                pictures.draw_map(
                    self.divergences.numpy(),
                    self.names,
                    clusters=labels,
                    edges=edges,
                    trust=[trust.get(name, 1.0) for name in self.names] if trust else None,
                ),
                folder / "clients.png",
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "clusters": self.clusters,
            "names": self.names,
            "divergences": self.divergences,
            "round": self.round,
            "base": self._said_first,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clusters, self.names = dict(state_dict["clusters"]), list(state_dict["names"])
        self.divergences, self.round = state_dict["divergences"], state_dict["round"]
        self._said_first = state_dict.get("base")
