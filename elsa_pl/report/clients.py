"""``clients.csv``: what a run knows of each of its clients in the end.

Callbacks, data and strategy each know a part, and only while the run is there: a report that is made later takes all of
it from this file.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd

from elsa_pl.callbacks import BehaviorClustering, TrustScoring
from elsa_pl.callbacks.probing import companion


def write_clients(path: Path, trainer: "pl.Trainer") -> None:
    """Write a row for each client: edge, plan, examples, cluster, trust and traffic, as far as this process knows them.

    Between sites nobody else knows how many examples a client has.

    Args:
        path: of the table.
        trainer: after training, in the cloud's process.
    """
    strategy: Any = trainer.strategy
    module: Any = trainer.lightning_module
    data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
    placement = strategy.placement
    scoring, clustering = companion(trainer, TrustScoring), companion(trainer, BehaviorClustering)
    clusters = {} if clustering is None else clustering.clusters
    known = strategy.layout != "site"
    rows = []
    for client, edge in placement.assignment.items():
        plan, work = placement.plans[client], module.work.get(client, {})
        rows.append(
            {
                "client": client,
                "edge": edge,
                "plan": f"{plan.front}|{plan.middle}|{plan.tail}",
                "examples": data.client_sizes[client] if known else None,
                "fault": data.client_faults.get(client) if known else None,
                "cluster": clusters.get(client),
                "trust": None if scoring is None else scoring.trust.get(client),
                "steps": work.get("num_steps", 0),
                "up_bytes": work.get("up_bytes", 0),
                "down_bytes": work.get("down_bytes", 0),
            }
        )
    pd.DataFrame(rows).to_csv(path, index=False)
