"""The module that a user gives to the Trainer: the whole model, composed of its tiers.

It owns the *global adapters*, which are all that training changes and all that a checkpoint holds; with the aggregator
``stacked`` the weights of the adapted layers are among them. The tiers that use them live with the processes that run
them; the strategy places those, and this module says how they are made.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import get_scheduler

from elsa_pl.errors import ConfigurationError, UnsupportedModelError
from elsa_pl.functional.aggregation import ALONE, MERGE_PRODUCTS
from elsa_pl.functional.costs import Workload, shape_of
from elsa_pl.functional.factors import SUFFIX, factor_pairs, fresh_rows, frozen_weight, refactored, to_rank
from elsa_pl.functional.pooling import TokenPooling
from elsa_pl.functional.seeding import derive_seed
from elsa_pl.hooks import hooks
from elsa_pl.links import PREFIX
from elsa_pl.lora import LoraSettings, add_lora
from elsa_pl.models import Task, load_model, uncut
from elsa_pl.partition import Part, SplitPlan, check_cut, check_reads_ahead, cut, num_blocks, replicate
from elsa_pl.rpc.messages import RoundReport
from elsa_pl.tiers.front import FrontModule
from elsa_pl.tiers.linked import LinkedModel
from elsa_pl.tiers.middle import MiddleModule
from elsa_pl.tiers.parameters import ParameterTree
from elsa_pl.tiers.probes import ProbeModel, num_workers
from elsa_pl.tiers.rest import RestModule
from elsa_pl.tiers.step import Clipping, StepSettings
from elsa_pl.tiers.tail import TailModule
from elsa_pl.tiers.tier import Tier

log = logging.getLogger(__name__)

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


def adamw(parameters: list[nn.Parameter]) -> Optimizer:
    """The default optimizer: AdamW at 1e-3, a usual rate for LoRA on small encoders."""
    return torch.optim.AdamW(parameters, lr=1e-3)


class SplitModel(LinkedModel):
    """A language model cut into front, middle and tail per client, fine-tuned with LoRA.

    Args:
        model: ``bundled:all-MiniLM-L6-v2``, a folder, or a hub id; None with ``model_config``.
        model_config: configuration of a model with random weights, such as ``{"model_type": "llama", ...}``.
        task: what the head does.
        plan: how many blocks front, middle and tail hold, where no callback chooses that.
        client_plans: plans of single clients, by name; they aggregate with the others layer by layer.
        client_ranks: LoRA ranks of single clients, by name, at most ``lora.rank``: these train, send and receive the
            first directions of the global adapters only. They take the aggregator ``exact`` or ``stacked``.
        token_pooling: at each of the cuts ``first``: only the state of each text's first token goes on, so that nothing
            else crosses the link; a number n: and the means of n following tokens each; None: all tokens. For
            classification with encoders. On the uplink, a number and a front of half the blocks or more learn as well
            as all tokens; ``first`` alone, or a shallow front, may learn much less.
        lora: rank, alpha, dropout and target modules of the adapters.
        optimizer: builds each tier's optimizer.
        lr_schedule: factor on the learning rate over the whole run.
        warmup_fraction: part of the run in which the rate rises from 0.
        gradient_clip_val: bound on each step's gradients; None for no bound. (The Trainer's setting of this name works
            with automatic optimization only.)
        gradient_clip_algorithm: what is bounded: the norm over all three parts, or each element.
        accumulate_grad_batches: batches whose gradients make one step.
        seed: of initial adapters, dropout and client sampling.
    """

    def __init__(
        self,
        model: str | None = "bundled:all-MiniLM-L6-v2",
        model_config: dict[str, Any] | None = None,
        *,
        task: Task = "classification",
        plan: SplitPlan = SplitPlan(),  # noqa: B008  # frozen
        client_plans: dict[str, SplitPlan] | None = None,
        client_ranks: dict[str, int] | None = None,
        token_pooling: TokenPooling = TokenPooling(),  # noqa: B008  # frozen
        lora: LoraSettings = LoraSettings(),  # noqa: B008  # frozen
        optimizer: OptimizerFactory = adamw,
        lr_schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup_fraction: float = 0.0,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        accumulate_grad_batches: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (model is None) == (model_config is None):
            raise ConfigurationError("give either model (pretrained weights) or model_config (random weights)")
        if accumulate_grad_batches < 1:
            raise ConfigurationError(f"accumulate_grad_batches must be at least 1; got {accumulate_grad_batches}")
        if gradient_clip_val is not None and gradient_clip_val <= 0:
            raise ConfigurationError(f"gradient_clip_val must be above 0 or null; got {gradient_clip_val}")
        if not 0 <= warmup_fraction <= 1:
            raise ConfigurationError(f"warmup_fraction must be in [0, 1]; got {warmup_fraction}")
        if token_pooling and task != "classification":
            raise ConfigurationError(f"token_pooling is for classification; got task={task!r}: leave it out")
        for client, rank in (client_ranks or {}).items():
            if not 1 <= rank <= lora.rank:
                raise ConfigurationError(
                    f"client_ranks must be in [1, lora.rank]; got {client}: {rank} with lora.rank={lora.rank}: lower"
                    " it, or raise model.lora.rank"
                )
        self.automatic_optimization = False
        self.model_name, self.model_config, self.task = model, model_config, task
        self.plan, self.client_plans = plan, client_plans or {}
        self.client_ranks = client_ranks or {}
        self.token_pooling = token_pooling
        self.lora, self.make_optimizer = lora, optimizer
        self.lr_schedule, self.warmup_fraction = lr_schedule, warmup_fraction
        self.clipping = Clipping(
            norm=gradient_clip_val if gradient_clip_algorithm == "norm" else None,
            value=gradient_clip_val if gradient_clip_algorithm == "value" else None,
        )
        self.accumulate_grad_batches = accumulate_grad_batches
        self.seed = seed
        self.num_labels: int | None = None
        self.num_rounds = 0
        self.num_bytes: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        # of each client over the rounds: what `elsa_pl.rpc.messages.Work` counts
        self.work: dict[str, Counter[str]] = {}
        # in a list, because a module's attribute would be part of its state_dict, and a checkpoint without the base
        # model could not be loaded
        self._held: list[PeftModel] = []
        self._parts: dict[SplitPlan, tuple[Part, ...]] = {}
        self._resolved_plan: SplitPlan | None = None
        self._checked: set[SplitPlan] = set()
        self._turned: set[str] = set()  # names of weights that are [I, O]

    # ---- the model and its parts ---------------------------------------------------------------------------------

    def build(self, lora: LoraSettings | None = None) -> PeftModel:
        """The uncut model with the initial adapters: a function of the settings and the seed alone.

        Args:
            lora: of the adapters; None for those of the run.
        """
        base = load_model(
            self.model_name, self.model_config, self.task, self.num_labels, seed=derive_seed(self.seed, "model")
        )
        return add_lora(base, lora or self.lora, self.task, seed=derive_seed(self.seed, "adapters"))

    def build_trained(self) -> PeftModel:
        """The uncut model with the global adapters."""
        model = self.build()
        parameters = dict(model.get_base_model().named_parameters())
        with torch.no_grad():
            for name, value in self.global_adapters().items():
                if not name.startswith(PREFIX):  # what trains at the ends of links is no part of the model
                    parameters[name].copy_(value)
        return model

    def build_exported(self) -> PeftModel:
        """The uncut model as the run began with it, and adapters that hold all that was trained since.

        Where rounds end in the frozen weights, these are of the rank that the weights' changes have, but for rounding.
        """
        trained = self.build_trained()
        if not self.stacks:
            return trained
        began, ended = dict(_adapted_layers(self.build())), dict(_adapted_layers(trained))
        changes, rank = {}, 1
        for name, (weight, turned) in began.items():
            change = ended[name][0].detach().double() - weight.detach().double()
            change = change.mT if turned else change
            rows, columns = refactored(change, torch.eye(len(change)), min(change.shape))
            changes[name] = rows, columns
            # sums in the weights' precision are rounded, which changes them a little in all directions
            rounding = torch.finfo(weight.dtype).eps * weight.detach().double().norm()
            rank = max(rank, int((rows.norm(dim=1) * columns.norm(dim=0) > rounding).sum()))
        factors: dict[str, Tensor] = {}
        for name, pair in changes.items():
            factors |= to_rank(dict(zip((f"{name}.lora_A.weight", f"{name}.lora_B.weight"), pair, strict=True)), rank)
        model = self.build(replace(self.lora, rank=rank, alpha=rank))
        heads = dict(trained.get_base_model().named_parameters())
        with torch.no_grad():
            for name, parameter in model.get_base_model().named_parameters():
                if parameter.requires_grad:
                    factor = name.replace(".default.", ".")
                    parameter.copy_(factors[factor] if factor in factors else heads[name])
        return model

    def prepare(self, num_labels: int | None) -> None:
        """Build the model and check every cut before any process starts: what is wrong here is wrong everywhere.

        Raises:
            ValueError: an unknown model, or a cut that does not fit it (`UnsupportedModelError`: no cut fits).
        """
        self.num_labels = num_labels
        self._held = [self.build()]
        for plan in {plan.resolve(num_blocks(self._base)) for plan in [self.plan, *self.client_plans.values()]}:
            check_cut(self._base, plan)
            if self.token_pooling and plan.kind != "uncut":  # which has no place to pool at
                check_reads_ahead(self._base, plan)
            self._checked.add(plan)
        self._resolved_plan = self.plan.resolve(num_blocks(self._base))

    def check_plan(self, client: str, plan: SplitPlan) -> None:
        """Check a plan that was chosen for a client, unless that cut was checked before.

        Raises:
            UnsupportedModelError: the model cannot be cut so; with the client and the plan.
        """
        if plan in self._checked:
            return
        recalled = self.recall_base_model()
        try:
            check_cut(self._base, plan)
        except UnsupportedModelError as error:
            cut_at = f"{plan.front}|{plan.middle}|{plan.tail}"
            raise UnsupportedModelError(
                f"the plan {cut_at} that was chosen for {client} does not fit: {error}"
            ) from error
        finally:
            if recalled:  # whoever makes replicas next must know that the base is not that of those there are
                self.forget_base_model()
        self._checked.add(plan)

    def check_aggregator(self, aggregator: str, adapter_bits: int) -> None:
        """Check that adapters can be merged and sent so, before any process starts.

        Args:
            aggregator: one of `elsa_pl.functional.aggregation.AGGREGATORS`, or ``none``.
            adapter_bits: of each number of an adapter that is sent.

        Raises:
            ConfigurationError: it merges tensors, and clients have unequal ranks; or it merges products, and an adapted
                layer is not linear, or its weight is another layer's too; or what is sent has no differences.
        """
        unequal = {client: rank for client, rank in self.client_ranks.items() if rank != self.lora.rank}
        if unequal and aggregator not in MERGE_PRODUCTS:
            raise ConfigurationError(
                f"expected strategy.aggregator={' or '.join(MERGE_PRODUCTS)} where clients have unequal ranks, got"
                f" {aggregator!r} with client_ranks={unequal} and lora.rank={self.lora.rank}: set the aggregator, or"
                " leave client_ranks out"
            )
        if adapter_bits != 32 and (unequal or aggregator == "stacked"):
            raise ConfigurationError(
                f"expected strategy.adapter_bits=32 with aggregator={aggregator} and client_ranks={unequal}, got"
                f" {adapter_bits}: what is sent is not of the rank that its receiver has, so there are no differences;"
                " leave adapter_bits out"
            )
        if aggregator not in MERGE_PRODUCTS:
            return
        stacked = aggregator == "stacked"
        parameters = dict(uncut(self._base).named_parameters(remove_duplicate=False))
        holders = Counter(parameters.values())
        for name, value in parameters.items():
            factor = ".lora_" in name and (value.ndim != 2 or (stacked and ".lora_embedding_" in name))
            if factor or (stacked and name.endswith(SUFFIX) and holders[value] > 1):
                layers = "linear layers with weights of their own" if stacked else "linear layers or embeddings"
                raise ConfigurationError(
                    f"expected {layers} with strategy.aggregator={aggregator}, got {name} {tuple(value.shape)}: leave"
                    " the layer out of model.lora.target_modules, or use another aggregator"
                )

    @property
    def _base(self) -> PeftModel:
        assert self._held, "parts are made before the base model is forgotten"
        return self._held[0]

    def check_vocabulary(self, tokenizer_size: int) -> None:
        """Refuse a tokenizer whose ids the embeddings do not have.

        Raises:
            ConfigurationError: with both sizes.
        """
        config: Any = self._base.get_base_model().config
        size = int(config.get_text_config().vocab_size)
        if tokenizer_size > size:
            raise ConfigurationError(
                f"the tokenizer has {tokenizer_size} tokens and the model embeds {size}: set data.tokenizer to the"
                " model's own, or raise vocab_size in model_config"
            )

    def setup(self, stage: str) -> None:
        if self.num_labels is None and self.task == "classification":
            self.num_labels = self.trainer.datamodule.num_labels  # type: ignore[attr-defined]  # set by the Trainer
        super().setup(stage)

    def configure_model(self) -> None:
        if hasattr(self, "adapters"):
            return
        if not self._held:
            if self.trainer.is_global_zero:
                self.prepare(self.num_labels)
            else:
                self._held = [self.build()]
        self._resolved_plan = self.plan.resolve(num_blocks(self._base))
        self.check_links(self.trainer)
        adapters = _adapters_of(self._parts_for(self.resolved_plan))
        for codec in self.codecs(self.resolved_plan).values():
            adapters |= {name: value for name, value in codec.tensors().items() if value.requires_grad}
        if self.stacks:
            layers = dict(_adapted_layers(self._base))
            adapters |= {f"{name}{SUFFIX}": weight for name, (weight, _) in layers.items()}
            self._turned = {f"{name}{SUFFIX}" for name, (_, turned) in layers.items() if turned}
        self.adapters = ParameterTree(adapters)

    def check_links(self, trainer: Any) -> None:
        """Refuse stages of links that do not fit, before any process starts: see `fit_stages`."""
        self.fit_stages(trainer, self.plan.resolve(num_blocks(self._base)), _hidden_size(self._base))

    def _parts_for(self, plan: SplitPlan) -> tuple[Part, ...]:
        if plan not in self._parts:
            self._parts[plan] = cut(self._base, plan)
        return self._parts[plan]

    def workload(self, batch_size: int, num_tokens: int) -> Workload:
        """What a step of this model costs is counted from.

        Args:
            batch_size: texts of a step.
            num_tokens: of a text after padding.
        """
        shape = shape_of(self._base.get_base_model().config, causal_lm=self.task == "causal_lm")
        adapters = sum(isinstance(module, LoraLayer) for module in self._base.modules())
        return Workload(
            shape=shape,
            batch_size=batch_size,
            num_tokens=num_tokens,
            lora_rank=self.lora.rank,
            adapters_per_block=max(1, adapters // shape.num_layers),
            pooling=self.token_pooling,
        )

    @property
    def resolved_plan(self) -> SplitPlan:
        """The plan of clients without one of their own, with its middle filled in."""
        assert self._resolved_plan is not None, "the model is built before anything else is asked of it"
        return self._resolved_plan

    def plan_of(self, client: str) -> SplitPlan:
        """The plan of a client, with its middle filled in."""
        return self.client_plans.get(client, self.plan).resolve(num_blocks(self._base))

    @property
    def stacks(self) -> bool:
        """Whether rounds end in the frozen weights of the adapted layers, which then are among the global adapters."""
        return getattr(self.trainer.strategy, "aggregator", None) == "stacked"

    def merged_weights(self) -> dict[str, Tensor]:
        """The frozen weights that rounds end in, by global name; none if they do not."""
        return {name: value for name, value in self.global_adapters().items() if name.endswith(SUFFIX)}

    def absorb(self, mean: Mapping[str, Tensor], round_number: int) -> None:
        r"""Merge a mean into the frozen weights, and begin with fresh adapters.

        .. math:: W \leftarrow W + \frac{\alpha}{R} B A, \qquad A \sim U(-1/\sqrt{I}, 1/\sqrt{I}), \quad B = 0

        Args:
            mean: of any rank, by global layer name.
            round_number: the global round that ended, from which A is drawn.

        Source:
            FLoRA, Wang et al. 2024, arXiv 2409.05976, section 3.2, where each client does so.
        """
        taken = dict(mean)
        weights = self.merged_weights()
        for name_a, name_b in factor_pairs(mean):
            place = frozen_weight(name_a)
            change = mean[name_b].double() @ mean[name_a].double() * (self.lora.alpha / self.lora.rank)
            taken[place] = weights[place].double() + (change.mT if place in self._turned else change)
            seed = derive_seed(self.seed, "fresh adapters", round_number, name_a)
            taken[name_a] = fresh_rows(self.lora.rank, mean[name_a].shape[1], seed)
            taken[name_b] = mean[name_b].new_zeros(len(mean[name_b]), self.lora.rank)
        self.load_global_adapters(taken)

    def rank_of(self, client: str) -> int:
        """The LoRA rank of a client."""
        return self.client_ranks.get(client, self.lora.rank)

    def _replicate(self, part: Part, client: str) -> Part:
        rank = self.rank_of(client)
        return replicate(part, rank if rank < self.lora.rank else None)

    def make_ends(self, client: str, plan: SplitPlan, device: torch.device) -> tuple[FrontModule, TailModule | None]:
        """A client's front, and tail if it has one: adapters of its own, frozen weights shared in this process."""
        parts = self._parts_for(plan)
        shared = (self.make_optimizer, self.precision_on(device), device)
        codecs = self.codecs(plan, client)
        encode = codecs["uplink"].side("encoder") if "uplink" in codecs else None
        decode = codecs["downlink"].side("decoder") if "downlink" in codecs else None
        return (
            FrontModule(self._replicate(parts[0], client), *shared, encode=encode, pooling=self.token_pooling.uplink),
            TailModule(self._replicate(parts[2], client), *shared, decode=decode)
            if plan.kind == "three-part"
            else None,
        )

    def make_session(self, client: str, plan: SplitPlan, device: torch.device) -> Tier | None:
        """A client's session at its edge; None where it needs none."""
        if plan.kind == "uncut":
            return None
        part = self._replicate(self._parts_for(plan)[1], client)
        shared = (self.make_optimizer, self.precision_on(device), device)
        codecs = self.codecs(plan, client)
        decode = codecs["uplink"].side("decoder") if "uplink" in codecs else None
        if plan.kind == "two-part":
            return RestModule(part, *shared, decode=decode)
        return MiddleModule(
            part,
            *shared,
            decode=decode,
            encode=codecs["downlink"].side("encoder") if "downlink" in codecs else None,
            pooling=self.token_pooling.downlink,
        )

    def replicas_for_probes(self, device: torch.device) -> list[ProbeModel]:
        """Replicas of the uncut model to try the adapters of several clients on at the same time."""
        precision = self.precision_on(device)
        merged = self.merged_weights()
        return [
            ProbeModel(self._base, self.task, device, precision, self.token_pooling, merged)
            for _ in range(num_workers())
        ]

    def recall_base_model(self) -> bool:
        """Have the uncut model at hand again; returns whether it had to be made anew."""
        if self._held:
            return False
        self._held = [self.build()]
        return True

    def forget_base_model(self) -> None:
        """Drop the uncut model once all replicas are made: a process keeps its own parts only."""
        self._held = []
        self._parts = {}

    def load_global_adapters(self, adapters: Mapping[str, Tensor]) -> None:
        """Copy ``adapters`` into the module's own, after a mean or from the cloud."""
        with torch.no_grad():
            for name, value in self.adapters.items():
                value.copy_(adapters[name])

    # ---- training ------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """An optimizer that counts steps and carries the schedule; the tiers' own optimizers change the weights."""
        optimizer = self.make_optimizer(list(self.adapters.parameters()))
        total = (self.trainer.max_epochs or 1) * self._strategy.steps_per_round
        scheduler = get_scheduler(
            self.lr_schedule,
            optimizer,
            num_warmup_steps=round(self.warmup_fraction * total),
            num_training_steps=total,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        self._strategy.fleet.probe_base()

    def on_train_epoch_start(self) -> None:
        if self._strategy.reset_optimizer:
            self._strategy.rounds.reset_optimizers()
            self._strategy.barrier()  # nobody steps at an edge that has the states of the round before

    def training_step(self, batch: dict[str, list[dict[str, Tensor]]], batch_idx: int) -> None:
        """One local step of each client in ``batch``."""
        scheduler: Any = self.lr_schedulers()
        factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
        settings = StepSettings(
            seed=self.seed,
            round=self.current_epoch,
            step=batch_idx,
            lr_factor=factor,
            clipping=self.clipping,
            micro_batches=self._strategy.micro_batches,
            causal_lm=self.task == "causal_lm",
        )
        self._strategy.rounds.run_steps(batch, settings)
        optimizer: Any = self.optimizers()
        optimizer.step()  # no gradients: it counts the step, which ModelCheckpoint and loggers go by
        scheduler.step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        strategy = self._strategy
        if (batch_idx + 1) % strategy.local_steps:
            return
        last = batch_idx + 1 == strategy.steps_per_round
        strategy.finish_edge_round(self.current_epoch, batch_idx // strategy.local_steps, last=last)
        if last:
            self._log_round(list(strategy.world.exchange(strategy.rounds.take_report()).values()))

    def _log_round(self, reports: list[RoundReport]) -> None:
        """Log sums over all processes, so that every rank has the same metrics to monitor."""
        self._show_traffic(reports, "training")
        num_bytes: Counter[str] = Counter()
        seconds: Counter[str] = Counter()
        for report in reports:
            num_bytes.update(report.num_bytes)
            seconds |= Counter(report.seconds)  # processes work at the same time: the slowest counts
        self.num_rounds += 1
        self.num_bytes.update(num_bytes)
        self.seconds.update(seconds)
        examples = sum(report.num_examples for report in reports)
        values = {f"bytes/{name}": float(value) for name, value in num_bytes.items()}
        values |= {f"seconds/{name}": value for name, value in seconds.items()}
        values["clients_lost"] = float(sum(len(report.lost) for report in reports))
        work = {client: done for report in reports for client, done in report.work.items()}
        for client, done in work.items():
            self.work.setdefault(client, Counter()).update(asdict(done))
        edges_sent = {edge: sent for report in reports for edge, sent in report.edges_sent.items()}
        simulated_s = self._strategy.fleet.simulate(work, edges_sent)
        if simulated_s is not None:
            self.seconds["simulated"] += simulated_s
            values |= {"simulated/round_s": simulated_s, "simulated/time_s": self.seconds["simulated"]}
        if examples:
            values["train_loss"] = sum(report.loss_sum for report in reports) / examples
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=1)

    def identity(self, labels: Sequence[str]) -> dict[str, Any]:
        """What the adapters of this model belong to; `elsa_pl.identity` compares it with a checkpoint's.

        Args:
            labels: names of the classes in order; empty for causal language modelling.
        """
        targets = self.lora.target_modules
        return {
            "model.model": self.model_name,
            "model.model_config": self.model_config,
            "model.task": self.task,
            "model.plan": asdict(self.resolved_plan),
            "model.token_pooling": asdict(self.token_pooling),
            "model.lora.rank": self.lora.rank,
            "model.lora.alpha": float(self.lora.alpha),
            "model.lora.target_modules": None if targets is None else list(targets),
            "strategy.aggregator": "stacked" if self.stacks else None,
            "links that learn": self.learned_links() or None,
            "links undone at the tail": self.turned_links() or None,
            "data.labels": list(labels),
        }

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        # here, because a checkpoint comes next: what the next round's report had, a resumed run would not know of
        reports = list(self._strategy.world.exchange(self._strategy.rounds.take_report()).values())
        for report in reports:
            self.num_bytes.update(report.num_bytes)
        if not self.trainer.sanity_checking:
            self._show_traffic(reports, "validation")

    def _show_traffic(self, reports: list[RoundReport], phase: str) -> None:
        """Hand on to the callbacks that have ``on_traffic`` what crossed each client's links since the last time."""
        traffic = {client: counts for report in reports for client, counts in report.traffic.items()}
        for hook in hooks(self.trainer, "on_traffic"):
            hook(self.trainer, phase, traffic)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["elsa_identity"] = self.identity(self.trainer.datamodule.labels)  # type: ignore[attr-defined]
        checkpoint["elsa_totals"] = {
            "num_rounds": self.num_rounds,
            "num_bytes": dict(self.num_bytes),
            "seconds": dict(self.seconds),
            "work": {client: dict(done) for client, done in self.work.items()},
        }
        checkpoint["elsa_own_adapters"] = self._strategy.own_adapters
        checkpoint["elsa_secrets"] = self.secrets_learnt_on()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_secrets(checkpoint.get("elsa_secrets", []))
        if self._strategy.aggregator == ALONE:  # otherwise all go on from the mean of what clients had alone
            self._strategy.own_adapters.update(checkpoint["elsa_own_adapters"])
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        if not fitting and self.num_rounds:  # testing an earlier round does not undo the later ones
            return
        if fitting and not self._strategy.reset_optimizer:
            log.warning("optimizer states are not in a checkpoint: with reset_optimizer=false they start afresh here")
        totals = checkpoint["elsa_totals"]
        self.num_rounds = totals["num_rounds"]
        self.num_bytes, self.seconds = Counter(totals["num_bytes"]), Counter(totals["seconds"])
        self.work = {client: Counter(done) for client, done in totals["work"].items()}


def _hidden_size(model: PeftModel) -> int:
    config: Any = model.get_base_model().config
    return int(config.get_text_config().hidden_size)


def _adapted_layers(model: PeftModel) -> Iterator[tuple[str, tuple[Tensor, bool]]]:
    """Frozen weight of each adapted layer by its global name, and whether that is [I, O] rather than [O, I]."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            yield name, (layer.get_base_layer().weight, bool(getattr(layer, "fan_in_fan_out", False)))


def _adapters_of(parts: tuple[Part, ...]) -> dict[str, Tensor]:
    return {name: value for part in parts for name, value in part.adapters().items()}
