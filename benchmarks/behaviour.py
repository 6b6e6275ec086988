"""Does behaviour show who belongs together, and who is not to be trusted?

    python -m benchmarks.behaviour groups --data_root DATA_ROOT [--kinds groups sources]
    python -m benchmarks.behaviour trust --data_root DATA_ROOT [--clients 20] [--rounds 3] [--ways trust trust+median]

``groups``: 20 clients in 4 planted groups; the adjusted Rand index of the clusters against them after the warm-up.
``trust``: clients with non-IID labels, a quarter of them faulty in several ways; the area under the ROC curve of trust
against the truth after round 3, next to that of scores by the divergence of predictions, and the accuracy after the
last round with trust, other aggregators, and without the faulty.

Every cell is whole runs of the command, in layout ``single``, as many at a time as there are cores. Finished runs with
the same settings are found again in ``--output`` and not repeated: use a fresh folder after a change of the code.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import median_abs_deviation
from sklearn.metrics import adjusted_rand_score, roc_auc_score

from benchmarks.runs import Settings, all_of, several, summary
from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.functional.clustering import cluster, cosine_distances

SEEDS = (0, 1, 2)
AGGREGATORS = ("mean", "median", "trimmed_mean", "krum")
# trust weighs a mean, or decides who counts in another aggregator; "without" leaves out the faulty clients' updates
WAYS = ("trust", "trust+median", "trust+trimmed_mean", *AGGREGATORS, "without")
NUM_CLIENTS, NUM_GROUPS, ALPHA, NUM_PROBES = 20, 4, 0.3, 128
WARMUP_ROUNDS, WARMUP_STEPS = 2, 10
TRUST_STEPS, TRUST_BATCH, JUDGED_AFTER = 20, 8, 3
FAULTS: dict[str, dict[str, Any]] = {"flipped_labels": {}, "sign_flip": {"fault_scale": 3}, "random": {}}
CLUSTERING: dict[str, Any] = {
    "class_path": "BehaviorClustering",
    "init_args": {"num_clusters": NUM_GROUPS, "every_n_rounds": 1, "pictures": False},
}
TRUST = {"class_path": "TrustScoring", "init_args": {"pictures": False}}
RECORDERS = "benchmarks.recorder"


def data_settings(data_set: str, data_root: Path, seed: int, num_clients: int, more: Settings) -> dict[str, Any]:
    """What the data module of a run is made with."""
    return {
        "train_file": str(data_root / data_set / "train.csv"),
        "test_file": str(data_root / data_set / "test.csv"),
        "num_clients": num_clients,
        "num_probes": NUM_PROBES,
        "max_length": 32,
        "alpha": ALPHA,
        "seed": seed,
        **more,
    }


def common(data: Settings, rounds: int, steps: int) -> dict[str, Any]:
    """The settings of all runs of one experiment."""
    return {
        "model.model": "bundled:all-MiniLM-L6-v2",
        "model.plan": {"front": 1, "middle": 4, "tail": 1},
        "model.optimizer": {"class_path": "AdamW", "init_args": {"lr": 5e-3}},
        "seed_everything": data["seed"],
        **{f"data.{name}": value for name, value in data.items() if name != "seed"},
        "trainer.max_epochs": rounds,
        "trainer.strategy.init_args.layout": "single",
        "trainer.strategy.init_args.num_edges": 2,
        "trainer.strategy.init_args.local_steps": steps,
        "trainer.strategy.init_args.passes_in_flight": 1,
    }


def state_of(folder: Path, callback: str) -> dict[str, Any]:
    """The state of a callback at the end of a run."""
    states = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    return dict(next(state for key, state in states.items() if key.startswith(callback)))


def groups(data_root: Path, output: Path, data_sets: Sequence[str], kinds: Sequence[str]) -> None:
    """Print adjusted Rand indices, one row for each kind of groups."""
    jobs, truths = [], {}
    for data_set, partition, faulty, seed in itertools.product(data_sets, kinds, (0, 2), SEEDS):
        name = f"{data_set}-{partition}-{faulty}-{seed}"
        more: dict[str, Any] = {"partition": partition, "num_groups": NUM_GROUPS}
        if faulty:
            more |= {"faulty_fraction": faulty / NUM_CLIENTS, "fault": "flipped_labels"}
        data = data_settings(data_set, data_root, seed, NUM_CLIENTS, more)
        settings = common(data, WARMUP_ROUNDS, WARMUP_STEPS)
        recorder = {"class_path": f"{RECORDERS}.UpdateRecorder"}
        jobs.append((name, {**settings, "trainer.callbacks": [CLUSTERING, recorder], "trainer.limit_val_batches": 0}))
        module = FederatedTextDataModule(**data)
        module.load()
        truths[name] = (module.client_groups or {}, module.client_faults)
    folders = all_of(jobs, output)
    print(f"\nadjusted Rand index after {WARMUP_ROUNDS} rounds of {WARMUP_STEPS} steps, seeds {SEEDS}")
    columns = ("given", "found", "cosine", "centred")
    titles = ("fingerprints", "number found", "cosine of updates", "centred cosine")
    print(f"{'groups differ in':<34}" + "".join(f"{title:>24}" for title in titles))
    for data_set, partition, faulty in itertools.product(data_sets, kinds, (0, 2)):
        row: dict[str, list[float]] = {column: [] for column in columns}
        for seed in SEEDS:
            name = f"{data_set}-{partition}-{faulty}-{seed}"
            truth, faults = truths[name]
            state = state_of(folders[name], "BehaviorClustering")
            honest = [place for place, client in enumerate(state["names"]) if client not in faults]
            expected = [truth[state["names"][place]] for place in honest]
            updates = torch.load(folders[name] / "updates.pt", weights_only=True)[WARMUP_ROUNDS]
            moved = torch.stack([updates[client] for client in state["names"]])
            for kind, matrix, count in (
                ("given", state["divergences"], NUM_GROUPS),
                ("found", state["divergences"], None),
                ("cosine", cosine_distances(moved), NUM_GROUPS),
                ("centred", cosine_distances(moved, centred=True), NUM_GROUPS),
            ):
                labels = cluster(matrix, count)
                row[kind].append(adjusted_rand_score(expected, labels[honest].tolist()))
        differ = "label mix" if partition == "groups" else "wording"
        title = f"{data_set}, {differ}" + (f", {faulty} faulty" if faulty else "")
        print(f"{title:<34}" + "".join(f"{several(row[column]):>24}" for column in columns))


def divergence_scores(rounds: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """What ELSA describes, for comparison: closeness of each client's predictions to the mean of the others'.

    The Jensen-Shannon divergence to the mean prediction of all others, weighted by the trust of the round before, as a
    robust z-score over the clients: trust 1 up to a z of 2, 0 from 4; averaged over rounds as `TrustScoring` does.
    """
    clients = list(rounds[0])
    trust = np.ones(len(clients))
    for number, said in enumerate(rounds):
        predictions = np.stack([said[client].double().numpy() for client in clients])
        weights = np.tile(trust.clip(0.05), (len(clients), 1))
        np.fill_diagonal(weights, 0)
        consensus = np.einsum("nk,kqc->nqc", weights / weights.sum(1, keepdims=True), predictions)
        agreement = 1 - (jensenshannon(predictions, consensus, axis=2) ** 2).mean(1) / np.log(2)
        deviation = median_abs_deviation(agreement, scale="normal") + 0.01
        now = (1 - ((np.median(agreement) - agreement) / deviation - 2).clip(0) / 2).clip(0, 1)
        trust = now if number == 0 else (trust + now) / 2
    return dict(zip(clients, trust.tolist(), strict=True))


def trust(
    data_root: Path,
    output: Path,
    data_sets: Sequence[str],
    num_clients: int,
    rounds: int,
    ways: Sequence[str],
    chosen: Sequence[str],
    lr_schedule: str,
) -> None:
    """Print the areas under the ROC curve, and final accuracies of the ways to merge."""
    faults = (None, *chosen) if "without" in ways else tuple(chosen)
    jobs, truths = {}, {}
    for data_set, fault, seed in itertools.product(data_sets, faults, SEEDS):
        more: dict[str, Any] = {"partition": "dirichlet", "batch_size": TRUST_BATCH}
        # the same clients are faulty whatever their fault, and without them it does not matter
        faulty = {"faulty_fraction": 0.25, "fault": fault or "flipped_labels", **FAULTS.get(fault or "", {})}
        data = data_settings(data_set, data_root, seed, num_clients, more | faulty)
        if (data_set, seed) not in truths:
            module = FederatedTextDataModule(**data)
            module.load()
            truths[data_set, seed] = module.client_faults
        for way in ways:
            if (way == "without") != (fault is None):
                continue
            name = f"trust-{data_set}-{fault}-{way}-{num_clients}-{rounds}-{seed}"
            # the last round is tested, not the best
            setting: dict[str, Any] = {"trainer.limit_val_batches": 0, "model.lr_schedule": lr_schedule}
            if way.startswith("trust"):
                setting["trainer.callbacks"] = [TRUST, {"class_path": f"{RECORDERS}.PredictionRecorder"}]
            elif way == "without":
                leaving_out = {"clients": sorted(truths[data_set, seed])}
                setting["trainer.callbacks"] = [{"class_path": f"{RECORDERS}.LeaveOut", "init_args": leaving_out}]
            aggregator = way.removeprefix("trust+")
            if aggregator in AGGREGATORS:
                setting["trainer.strategy.init_args.aggregator"] = aggregator
            jobs[data_set, fault, way, seed] = name, {**common(data, rounds, TRUST_STEPS), **setting}
    folders = all_of(list(jobs.values()), output)
    print(
        f"\nROC-AUC of trust after round {JUDGED_AFTER}, test accuracy after {rounds} rounds, {num_clients} clients,"
        f" seeds {SEEDS}"
    )
    print(f"{'':<28}{'ROC-AUC':>24}{'by divergence':>24}" + "".join(f"{way:>24}" for way in ways))
    for data_set, fault in itertools.product(data_sets, faults):
        cells = ["", ""]
        judged = next((way for way in ways if way.startswith("trust")), None)
        if fault is not None and judged is not None:
            areas: list[list[float]] = [[], []]
            for seed in SEEDS:
                name, _ = jobs[data_set, fault, judged, seed]
                history = state_of(folders[name], "TrustScoring")["history"]
                said = torch.load(folders[name] / "predictions.pt", weights_only=True)[:JUDGED_AFTER]
                ours = {client: scores[JUDGED_AFTER - 1] for client, scores in history.items()}
                for row, scores in zip(areas, (ours, divergence_scores(said)), strict=True):
                    truth = [client in truths[data_set, seed] for client in scores]
                    row.append(roc_auc_score(truth, [-score for score in scores.values()]))
            cells = [several(row) for row in areas]
        for way in ways:
            found = [jobs[data_set, fault, way, seed][0] for seed in SEEDS if (data_set, fault, way, seed) in jobs]
            accuracies = [summary(folders[name])["test_accuracy"] for name in found]
            cells.append(several([100 * accuracy for accuracy in accuracies], 1) if accuracies else "")
        print(f"{data_set + ', ' + (fault or 'no faults'):<28}" + "".join(f"{cell:>24}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("experiment", choices=["groups", "trust"])
    parser.add_argument("--data_root", type=Path, required=True, help="folder of trec/ and banking77/")
    parser.add_argument("--data_sets", nargs="+", default=["trec", "banking77"])
    parser.add_argument("--output", type=Path, default=Path("runs/behaviour"), help="where the runs go")
    kinds = ["groups", "sources"]
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds, help="of planted groups")
    parser.add_argument("--clients", type=int, default=NUM_CLIENTS, help="of the runs for trust")
    parser.add_argument("--rounds", type=int, default=3, help="of the runs for trust")
    parser.add_argument("--ways", nargs="+", default=["trust"], choices=WAYS, help="to merge updates")
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS), help="of the runs for trust")
    parser.add_argument("--lr_schedule", default="constant", help="of the runs for trust")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    output = args.output.resolve()
    if args.experiment == "groups":
        groups(args.data_root.resolve(), output, args.data_sets, args.kinds)
    else:
        trust(
            args.data_root.resolve(),
            output,
            args.data_sets,
            args.clients,
            args.rounds,
            args.ways,
            args.faults,
            args.lr_schedule,
        )


if __name__ == "__main__":
    main()
