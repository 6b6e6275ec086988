"""A step of the split model over RPC is the step of the uncut model: loss, gradients and parameters.

The clients, sessions and calls are the product's own, and RPC is real, though to the own process: across processes
the layouts' test compares whole runs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.plugins import MixedPrecision
from peft import PeftModel
from torch import Tensor, nn

from elsa_pl.errors import RemoteError, TrainingDiverged
from elsa_pl.lora import LoraSettings, add_lora, dropout_key
from elsa_pl.models import Task, load_model, uncut
from elsa_pl.partition import SplitPlan, cut, replicate
from elsa_pl.rpc import lifecycle, remote
from elsa_pl.rpc.edge import EdgeService
from elsa_pl.rpc.lifecycle import Address
from elsa_pl.tiers.client import Client, EdgeAddress
from elsa_pl.tiers.front import FrontModule
from elsa_pl.tiers.middle import MiddleModule
from elsa_pl.tiers.rest import RestModule
from elsa_pl.tiers.step import Clipping, Step, StepResult, StepSettings
from elsa_pl.tiers.tail import TailModule
from elsa_pl.tiers.tier import Tier
from tests.runs import ROOT, assert_close, assert_equal, moved

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: list[tuple[str, Task]] = [
    ("bert", "classification"),
    ("deberta-v2", "classification"),
    ("llama", "classification"),
    ("gpt2", "causal_lm"),
    ("llama", "causal_lm"),
]
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
}
CPU = torch.device("cpu")
UNCLIPPED = Clipping()
PLAN = SplitPlan(front=1, middle=2, tail=1)
SEED, ROUND = 5, 2

_served: list[str] = []

Precision = Callable[[], AbstractContextManager[Any]]


class Recorder(torch.optim.AdamW):
    """AdamW that keeps the gradients that it was given."""

    def __init__(self, parameters: list[nn.Parameter], gradients: dict[Tensor, Tensor]) -> None:
        super().__init__(parameters, lr=1e-2)
        self._gradients = gradients

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no loss to return
        for group in self.param_groups:
            self._gradients.update({p: p.grad.clone() for p in group["params"] if p.grad is not None})
        super().step()


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    """A world of one process, which calls itself."""
    lifecycle.meet(Address("127.0.0.1", lifecycle.free_port(), 0, 1), "here", "cloud", timeout_s=30)
    lifecycle.start("here", transport="uv", num_threads=8, timeout_s=60)
    yield
    for edge in _served:
        remote.withdraw(edge)
    lifecycle.stop(together=True)


class Pair:
    """The uncut model, and the same model cut, its middle served at an edge."""

    def __init__(
        self,
        family: str,
        task: Task,
        *,
        dropout: float = 0.0,
        plan: SplitPlan = PLAN,
        precision: Precision = nullcontext,
        config: Mapping[str, Any] | None = None,
        targets: list[str] | None = None,
    ) -> None:
        self.precision = precision
        config = config or {"model_type": family, **CONFIG, **FIELDS.get(family, {})}
        model = load_model(None, config, task, 3 if task == "classification" else None, seed=0)
        lora = LoraSettings(rank=2, dropout=dropout, target_modules=targets)
        self.whole: PeftModel = add_lora(model, lora, task, seed=0).train()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.whole.named_parameters():
            if "lora_B" in name:  # zero at the start, where the gradients of lora_A are zero too
                nn.init.normal_(parameter, std=0.1, generator=generator)
        front, *others = map(replicate, cut(self.whole, plan))
        self._seen: dict[Tensor, Tensor] = {}
        shared = (lambda parameters: Recorder(parameters, self._seen), self.precision, CPU)
        tail = TailModule(others[1], *shared) if len(others) == 2 else None
        self.sessions = [(RestModule if tail is None else MiddleModule)(part, *shared) for part in others[:1]]
        edge = f"edge-{len(_served)}"
        remote.serve(edge, EdgeService(edge, dict(zip(["client-0"], self.sessions, strict=False)), CPU))
        _served.append(edge)
        self.client = Client("client-0", FrontModule(front, *shared), tail, EdgeAddress("here", edge, 60.0), device=CPU)
        self.tiers: list[Tier] = [*self.client.tiers, *self.sessions]
        self._trained = {n: p for n, p in uncut(self.whole).named_parameters() if p.requires_grad}
        self._optimizer = Recorder(list(self._trained.values()), self._seen)

    def split_step(
        self, batches: Sequence[Mapping[str, Tensor]], step: int = 0, clipping: Clipping = UNCLIPPED
    ) -> float:
        return self.step(batches, step=step, clipping=clipping).loss

    def step(self, batches: Sequence[Mapping[str, Tensor]], *, backwards: bool = False, **settings: Any) -> StepResult:
        """One step whose passes run one after the other."""
        step = Step(self.client, batches, StepSettings(seed=SEED, round=ROUND, **settings))
        order = range(len(step))[:: -1 if backwards else 1]
        (result,) = [result for number in order if (result := step.run(number)) is not None]
        return result

    def uncut_step(
        self, batches: Sequence[Mapping[str, Tensor]], step: int = 0, clipping: Clipping = UNCLIPPED
    ) -> float:
        """The same step as anybody would write it for a model in one piece."""
        self._optimizer.zero_grad()
        losses = []
        for micro, batch in enumerate(batches):
            with dropout_key(SEED, ROUND, "client-0", step, micro), self.precision():
                loss = self.whole(**batch).loss
            (loss / len(batches)).backward()
            losses.append(float(loss))
        if clipping.norm is not None:
            nn.utils.clip_grad_norm_(self.whole.parameters(), clipping.norm)
        if clipping.value is not None:
            nn.utils.clip_grad_value_(self.whole.parameters(), clipping.value)
        self._optimizer.step()
        return sum(losses) / len(losses)

    def split_gradients(self) -> dict[str, Tensor]:
        """What the optimizers of the parts were given."""
        return {n: self._seen[p] for tier in self.tiers for n, p in tier.part.adapters().items()}

    def uncut_gradients(self) -> dict[str, Tensor]:
        return {n: self._seen[p] for n, p in self._trained.items()}

    def split_adapters(self) -> dict[str, Tensor]:
        return {n: value for tier in self.tiers for n, value in tier.adapters().items()}

    def uncut_adapters(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self._trained.items()}

    def load(self, adapters: Mapping[str, Tensor]) -> None:
        for tier in self.tiers:
            tier.load(adapters)

    def assert_same_steps(self, batches: Sequence[list[dict[str, Tensor]]], clipping: Clipping = UNCLIPPED) -> None:
        """Bit for bit over several steps, since only then does the optimizers' state matter."""
        before = self.uncut_adapters()
        for step, micro_batches in enumerate(batches):
            assert self.split_step(micro_batches, step, clipping) == self.uncut_step(micro_batches, step, clipping)
            assert_equal(self.split_gradients(), self.uncut_gradients())
            assert_equal(self.split_adapters(), self.uncut_adapters())
        assert moved(self.split_adapters(), before)


def make_batch(task: Task, seed: int = 0) -> dict[str, Tensor]:
    """Three texts of 24, 17 and 9 tokens."""
    ids = torch.randint(3, 99, (3, 24), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(24) < torch.tensor([[24], [17], [9]])).long()
    ids = ids * mask
    labels = torch.tensor([0, 2, 1]) if task == "classification" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(("family", "task"), FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_steps_are_those_of_the_uncut_model(family: str, task: Task, dropout: float) -> None:
    pair = Pair(family, task, dropout=dropout)
    pair.assert_same_steps([[make_batch(task, step)] for step in range(3)])


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("gpt2", "causal_lm")])
@pytest.mark.parametrize("count", [2, 3])
def test_accumulated_batches_make_one_step(family: str, task: Task, count: int) -> None:
    pair = Pair(family, task, dropout=0.2)
    pair.assert_same_steps([[make_batch(task, count * step + k) for k in range(count)] for step in range(2)])


@pytest.mark.parametrize("clipping", [UNCLIPPED, Clipping(norm=0.05)], ids=repr)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(("family", "task"), FAMILIES)
def test_micro_batches_make_the_step_of_the_whole_batch(
    family: str, task: Task, count: int, clipping: Clipping
) -> None:
    """Also where their texts are cut to other lengths, and where the loss is a mean over tokens."""
    pair = Pair(family, task)
    batches = [make_batch(task, seed) for seed in range(2)]
    result = pair.step(batches, step=0, clipping=clipping, micro_batches=count, causal_lm=task == "causal_lm")
    assert result.loss == pytest.approx(pair.uncut_step(batches, clipping=clipping), rel=1e-6)
    assert result.num_examples == 6
    whole = pair.uncut_gradients()
    scale = max(gradient.abs().max().item() for gradient in whole.values())
    assert_close(pair.split_gradients(), whole, atol=1e-5 * scale)


def test_passes_that_end_in_another_order_give_the_same_bits() -> None:
    settings: dict[str, Any] = {"micro_batches": 3, "clipping": Clipping(norm=0.05)}
    outcomes = []
    for backwards in (False, True):
        pair = Pair("bert", "classification", dropout=0.3)
        steps = range(3)
        losses = [
            pair.step([make_batch("classification", s)], step=s, backwards=backwards, **settings).loss for s in steps
        ]
        outcomes.append((losses, pair.split_adapters()))
    assert outcomes[0][0] == outcomes[1][0]
    assert_equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("clipping", [Clipping(norm=0.05), Clipping(norm=1e6), Clipping(value=1e-3)], ids=repr)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
def test_clipping_is_that_of_torch_on_the_uncut_model(family: str, task: Task, clipping: Clipping, count: int) -> None:
    pair = Pair(family, task)
    batches = [[make_batch(task, count * step + k) for k in range(count)] for step in range(2)]
    pair.assert_same_steps(batches, clipping)


def test_clipping_bounds_the_norm_over_all_three_parts() -> None:
    """Bounding each part by itself would pass for a small bound on the largest element, so look at the norm."""
    pair = Pair("bert", "classification")
    pair.split_step([make_batch("classification")], clipping=Clipping(norm=0.05))
    total = torch.cat([gradient.flatten() for gradient in pair.split_gradients().values()]).norm()
    torch.testing.assert_close(total, torch.tensor(0.05), rtol=1e-4, atol=0)


@pytest.mark.parametrize("plan", [SplitPlan(front=2, middle=1, tail=1), SplitPlan(front=1, middle=1, tail=2)], ids=repr)
def test_other_cuts(plan: SplitPlan) -> None:
    Pair("bert", "classification", plan=plan).assert_same_steps([[make_batch("classification")]])


@pytest.mark.parametrize(("family", "task"), [*FAMILIES, ("gpt2", "classification")])
@pytest.mark.parametrize("plan", [SplitPlan(front=4, middle=0, tail=0), SplitPlan(front=1, tail=0)], ids=repr)
def test_without_a_tail_or_a_middle(family: str, task: Task, plan: SplitPlan) -> None:
    """The whole model on the client, and the head with the labels at the edge."""
    pair = Pair(family, task, plan=plan, dropout=0.3)
    assert len(pair.tiers) == (1 if plan.kind == "uncut" else 2)
    pair.assert_same_steps([[make_batch(task, step)] for step in range(2)])
    pair.assert_same_steps([[make_batch(task, step + 2), make_batch(task, step + 4)] for step in range(2)])
    pair.assert_same_steps([[make_batch(task, step + 6)] for step in range(2)], Clipping(norm=0.05))
    batch = make_batch(task, 9)
    batch.pop("labels")
    with torch.no_grad():
        expected = pair.whole.eval()(**batch).logits
    assert torch.equal(pair.client.evaluate(batch, ("val", 0)).logits, expected)


def test_steps_of_the_causal_config_are_those_of_the_uncut_model() -> None:
    """Its adapters are on every linear layer, the head among them."""
    settings = yaml.safe_load((ROOT / "configs" / "causal_lm.yaml").read_text())["model"]
    targets = settings["lora"]["target_modules"]
    pair = Pair(
        "llama", "causal_lm", plan=SplitPlan(**settings["plan"]), config=settings["model_config"], targets=targets
    )
    pair.assert_same_steps([[make_batch("causal_lm", step)] for step in range(2)])
    assert all(any(target in name for name in pair.split_adapters()) for target in targets)


def test_dropout_draws_differ_by_step_and_micro_batch() -> None:
    """Otherwise the comparisons above hold for a mask that never changes."""
    pair, batch = Pair("bert", "classification", dropout=0.3), make_batch("classification")
    start = pair.split_adapters()
    losses = []
    for step in (0, 0, 1):
        pair.load(start)
        losses.append(pair.split_step([batch], step))
    pair.load(start)
    losses.append(pair.split_step([batch, batch], 0))  # the mean over micro-batches 0 and 1
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert losses[0] != losses[3]


def test_evaluation_is_that_of_the_uncut_model() -> None:
    pair, batch = Pair("bert", "classification", dropout=0.3), make_batch("classification")
    output = pair.client.evaluate(batch, ("val", 0))
    with torch.no_grad():
        expected = pair.whole.eval()(**batch)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    assert not output.logits.requires_grad


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
def test_bf16_reaches_every_part(family: str, task: Task) -> None:
    """Autocast is thread-local: a part that did not enter it would compute in fp32 without a word."""
    precision = MixedPrecision("bf16-mixed", "cpu").forward_context
    pair, plain = Pair(family, task, precision=precision), Pair(family, task)
    seen: dict[str, torch.dtype] = {}
    for tier in pair.tiers:
        layer = next(m for n, m in tier.part.named_modules() if isinstance(m, nn.Linear) and "lora" not in n)
        layer.register_forward_hook(lambda _, __, out, tier=tier: seen.update({type(tier).__name__: out.dtype}))
    batch = make_batch(task)
    loss, expected = pair.split_step([batch]), pair.uncut_step([batch])
    assert seen == dict.fromkeys(("FrontModule", "MiddleModule", "TailModule"), torch.bfloat16)
    assert loss == pytest.approx(expected, rel=1e-3)
    assert loss != plain.uncut_step([batch]), "fp32 would give this"
    split, whole = pair.split_gradients(), pair.uncut_gradients()
    scale = max(gradient.abs().max().item() for gradient in whole.values())
    assert_close(split, whole, atol=0.02 * scale)
    assert all(gradient.dtype == torch.float32 for gradient in split.values())


def test_the_schedules_factor_scales_the_learning_rate_of_every_part() -> None:
    half, full = Pair("bert", "classification"), Pair("bert", "classification")
    batch = [make_batch("classification")]
    moves = []
    for pair, factor in ((half, 0.5), (full, 1.0)):
        before = pair.split_adapters()
        pair.step(batch, step=0, lr_factor=factor)
        moves.append({name: value - before[name] for name, value in pair.split_adapters().items()})
    assert_close({name: 2 * value for name, value in moves[0].items()}, moves[1], atol=1e-6)
    assert all(value.abs().max() > 1e-3 for value in moves[1].values())


def test_a_replica_goes_on_with_the_optimizer_of_another() -> None:
    model: Any = load_model(None, {"model_type": "bert", **CONFIG}, "classification", 3, seed=0)
    _, middle, _ = cut(add_lora(model, LoraSettings(), "classification", seed=0), PLAN)
    first, second, fresh = (MiddleModule(replicate(middle), torch.optim.AdamW) for _ in range(3))

    def step(tier: Tier, size: float) -> None:
        tier.collect_gradients(0, {p: torch.full_like(p, size) for p in tier.part.adapters().values()})
        tier.step_optimizer(0.5)

    step(first, 1.0)
    second.take_over(first)
    for tier in (second, fresh):
        tier.load(first.adapters())
    for tier in (first, second, fresh):
        step(tier, 0.1)
    assert_equal(second.adapters(), first.adapters())
    assert moved(fresh.adapters(), first.adapters())


def test_a_diverged_loss_steps_nothing() -> None:
    pair, batch = Pair("bert", "classification"), make_batch("classification")
    tail = pair.client.tiers[1]
    tail.load({name: torch.full_like(value, float("nan")) for name, value in tail.adapters().items()})
    before = pair.sessions[0].adapters()
    with pytest.raises(TrainingDiverged, match=r"client-0 is nan in round 2, step 7"):
        pair.step([batch], step=7)
    assert_equal(pair.sessions[0].adapters(), before)


def test_an_error_at_the_edge_reaches_the_client() -> None:
    pair, batch = Pair("bert", "classification"), make_batch("classification")
    pair.client.name = "nobody"
    with pytest.raises(RemoteError, match=r"here: forward failed after .* KeyError: 'nobody'"):
        pair.split_step([batch])


def test_sessions_of_one_edge_share_nothing_that_is_trained() -> None:
    pair = Pair("bert", "classification")
    other = replicate(pair.sessions[0].part)
    before = {name: value.clone() for name, value in other.adapters().items()}
    pair.split_step([make_batch("classification")])
    assert_equal(other.adapters(), before)
