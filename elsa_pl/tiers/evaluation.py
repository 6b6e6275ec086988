"""The figures of the global model: through the pipeline of its tiers, and as one model with the adapters merged in.

Apart from `elsa_pl.tiers.split`, which trains, because the two share nothing but the model. Batches come from the data
module; a process that holds no evaluation data gets one empty batch, so that every process reaches the collectives.
"""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from peft import PeftModel
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from elsa_pl.functional.microbatches import IGNORE_INDEX, num_targets
from elsa_pl.models import Task
from elsa_pl.tiers.tier import PrecisionContext


class EvaluatedModel(L.LightningModule):
    """Validation, test and prediction of the global model."""

    task: Task
    num_labels: int | None
    build_trained: Callable[[], PeftModel]

    def __init__(self) -> None:
        super().__init__()
        self._metrics: dict[str, dict[str, Metric | MetricCollection]] = {}
        # in a list, because a module's attribute would be part of its state_dict
        self._merged: list[nn.Module] = []

    @property
    def _strategy(self) -> Any:
        return self.trainer.strategy

    def precision_on(self, device: torch.device) -> PrecisionContext:
        """The Trainer's precision, on a tier's device: the Trainer's own plugin knows the CPU only."""
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision):
            plugin = MixedPrecision("bf16-mixed", device.type)  # the only mixed precision that is not refused
        return plugin.forward_context

    def setup(self, stage: str) -> None:
        names = {"fit": ["val"], "validate": ["val"], "test": ["test"], "predict": []}[stage]
        if stage == "test" and self._strategy.layout != "site":
            names.append("test_merged")
        self._metrics |= {name: self._make_metrics() for name in names}

    def _make_metrics(self) -> dict[str, Metric | MetricCollection]:
        strategy = self._strategy
        # A site's F1 needs its counts by label, which stay at the site (see _summarise); sums of losses may leave.
        own: dict[str, Any] = {"distributed_available_fn": lambda: False}
        shared: dict[str, Any] = {
            "dist_sync_fn": strategy.gather,
            "distributed_available_fn": lambda: strategy.world_size > 1,
        }
        metrics: dict[str, Metric | MetricCollection] = {"loss": MeanMetric(**shared)}
        if self.task == "classification":
            assert self.num_labels is not None
            counts = own if strategy.layout == "site" else shared
            metrics["scores"] = MetricCollection(
                {
                    "accuracy": MulticlassAccuracy(self.num_labels, average="micro", **counts),
                    "f1": MulticlassF1Score(self.num_labels, average="macro", **counts),
                }
            )
        return metrics

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch, batch_idx)

    def on_test_start(self) -> None:
        """Merge the adapters into the uncut model, to be tested beside the pipeline on the same batches.

        Not in the layout ``site``, whose weak devices never hold the whole model: those figures are left out there.
        """
        strategy = self._strategy
        if strategy.layout != "site" and strategy.eval_shard is not None:
            with torch.inference_mode(False):
                merged = self.build_trained().merge_and_unload()
            self._merged = [merged.eval().to(strategy.client_device)]

    def on_test_end(self) -> None:
        self._merged = []

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch, batch_idx)
        for model in self._merged if batch else []:
            moved = {name: value.to(self._strategy.client_device) for name, value in batch.items()}
            with self.precision_on(self._strategy.client_device)():
                output = model(**moved)
            self._update("test_merged", output, batch["labels"])

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """What the global model says about each example of a batch; the result stays in this process.

        Returns:
            - ``rows``: (B,), the examples' places in their file;
            - for classification ``prediction``: (B,), the most probable class, and ``probability``: (B,), of it;
            - for causal language modelling ``num_tokens``: (B,), tokens that had to be predicted, and ``loss``: (B,),
              their mean;

            or nothing, in a process that predicts nothing.
        """
        if not batch:
            return {}
        inputs = {name: value for name, value in batch.items() if name not in ("rows", "labels")}
        logits = self._through_pipeline("predict", inputs, batch_idx).logits.float().cpu()
        if self.task == "classification":
            probability, prediction = logits.softmax(-1).max(-1)
            return {"rows": batch["rows"], "prediction": prediction, "probability": probability}
        targets = batch["labels"][:, 1:]
        losses = nn.functional.cross_entropy(logits[:, :-1].mT, targets, ignore_index=IGNORE_INDEX, reduction="none")
        num_tokens = (targets != IGNORE_INDEX).sum(1)
        return {"rows": batch["rows"], "num_tokens": num_tokens, "loss": losses.sum(1) / num_tokens}

    def _evaluate(self, stage: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        if not batch:  # this process holds no evaluation data
            return
        self._update(stage, self._through_pipeline(stage, batch, batch_idx), batch["labels"])

    def _through_pipeline(self, stage: str, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self._strategy.rounds.evaluate(batch, batch_idx, (stage, self.current_epoch))

    def _update(self, stage: str, output: Any, labels: Tensor) -> None:
        count = num_targets(labels) if self.task == "causal_lm" else len(labels)
        metrics = self._metrics[stage]
        metrics["loss"].update(output.loss.float().cpu(), weight=count)
        if "scores" in metrics:
            metrics["scores"].update(output.logits.float().cpu(), labels)

    def on_validation_epoch_end(self) -> None:
        self._summarise("val")

    def on_test_epoch_end(self) -> None:
        self._summarise("test")
        if "test_merged" in self._metrics:
            self._summarise("test_merged")

    def _summarise(self, stage: str) -> None:
        metrics = self._metrics[stage]
        loss: Any = metrics["loss"]
        local_weight = float(loss.weight)  # before compute(), which sums over all processes
        values: dict[str, Any] = {"loss": loss.compute()}
        if "scores" in metrics:
            values.update(metrics["scores"].compute())
            if self._strategy.layout == "site":
                names = [name for name in values if name != "loss"]
                mine = torch.stack([values[name] * local_weight for name in names] + [torch.tensor(local_weight)])
                summed = torch.stack(self._strategy.gather(mine.nan_to_num())).sum(0)
                values.update({name: summed[index] / summed[-1] for index, name in enumerate(names)})
        if self.task == "causal_lm":
            values["perplexity"] = values["loss"].exp()
        for metric in metrics.values():
            metric.reset()
        self.log_dict({f"{stage}_{name}": value for name, value in values.items()}, prog_bar=True)
