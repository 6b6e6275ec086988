"""The cost model against measured training steps of MiniLM under five cuts.

    python -m benchmarks.cuts [--repeats 9] [--batch_size 16] [--num_tokens 64]

Front, middle and tail are those that a run makes, without RPC in between, in one process with one intra-operator
thread. One number is fitted: the machine's FLOP rate, from steps of the *uncut* model; every cut's seconds then follow
from `elsa_pl.functional.costs`. All models take turns, since timings on a shared machine drift, and a figure is the
median of the repeats. Memory is what autograd keeps of front and tail, and their weights with optimizer state.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.setting import build_model
from elsa_pl.functional.costs import StepCosts, Workload, shape_of, step_costs
from elsa_pl.models import uncut
from elsa_pl.partition import SplitPlan, cut, replicate
from elsa_pl.tiers.front import FrontModule
from elsa_pl.tiers.middle import MiddleModule
from elsa_pl.tiers.split import adamw
from elsa_pl.tiers.tail import TailModule
from elsa_pl.tiers.tier import Tier

PLANS = ((1, 4, 1), (1, 1, 4), (2, 2, 2), (1, 3, 2), (4, 1, 1))
NUM_CLASSES = 6

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """Predicted and measured figures of one cut: seconds of a step, bytes of the client."""

    plan: tuple[int, int, int]
    client_s: tuple[float, float]
    edge_s: tuple[float, float]
    client_bytes: tuple[float, float]

    @property
    def step_s(self) -> tuple[float, float]:
        """Client and edge together."""
        return self.client_s[0] + self.edge_s[0], self.client_s[1] + self.edge_s[1]


class CutModel:
    """Front, middle and tail of a model, without the network in between."""

    def __init__(self, model: torch.nn.Module, plan: Sequence[int]) -> None:
        front, middle, tail = (replicate(part) for part in cut(model, SplitPlan(*plan)))
        self.front, self.middle, self.tail = (
            FrontModule(front, adamw),
            MiddleModule(middle, adamw),
            TailModule(tail, adamw),
        )

    def step(self, batch: Batch) -> tuple[float, float]:
        """One training step: seconds of the client and of the edge."""
        key = (0,)
        marks = [time.perf_counter()]

        def mark() -> None:
            marks.append(time.perf_counter())

        with self.front.computing(key):
            sent = self.front(batch)
        mark()
        at_edge = sent.detach().requires_grad_()
        with self.middle.computing(key):
            answer = self.middle(at_edge, batch["attention_mask"])
        mark()
        received = answer.detach().requires_grad_()
        with self.tail.computing(key):
            loss = self.tail(received, batch).loss
        loss.backward()
        mark()
        answer.backward(received.grad)
        _optimize(self.middle)
        mark()
        sent.backward(at_edge.grad)
        _optimize(self.front)
        _optimize(self.tail)
        mark()
        spans = [after - before for before, after in itertools.pairwise(marks)]
        return spans[0] + spans[2] + spans[4], spans[1] + spans[3]

    def client_bytes(self, batch: Batch) -> float:
        """Weights of the client with optimizer state, what autograd keeps, and the tensors on the links."""
        ends = (self.front.part, self.tail.part)
        weights = {weight.untyped_storage().data_ptr(): weight for part in ends for weight in part.parameters()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with self.front.computing((0,)):
                sent = self.front(batch)
            received = torch.zeros_like(sent).requires_grad_()
            with self.tail.computing((0,)):
                output = self.tail(received, batch)
        activations = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
        frozen_and_trained = sum(w.nbytes * (4 if w.requires_grad else 1) for w in weights.values())
        del output
        return float(activations + frozen_and_trained + 4 * sent.nbytes)


def _optimize(tier: Tier) -> None:
    adapters = list(tier.part.adapters().values())
    tier.collect_gradients(0, {adapter: adapter.grad for adapter in adapters if adapter.grad is not None})
    for adapter in adapters:
        adapter.grad = None
    tier.step_optimizer(1.0)


def _uncut_step(model: torch.nn.Module) -> Callable[[Batch], float]:
    optimizer = adamw([weight for weight in model.parameters() if weight.requires_grad])

    def step(batch: Batch) -> float:
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def measure(repeats: int, batch_size: int, num_tokens: int) -> tuple[float, list[Comparison]]:
    """The fitted rate in FLOP/s, and each cut."""
    torch.set_num_threads(1)
    model = build_model(NUM_CLASSES)
    config: Any = uncut(model).config
    workload = Workload(shape=shape_of(config), batch_size=batch_size, num_tokens=num_tokens)
    draws = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 30000, (batch_size, num_tokens), generator=draws),
        "attention_mask": torch.ones(batch_size, num_tokens, dtype=torch.long),
        "labels": torch.randint(NUM_CLASSES, (batch_size,), generator=draws),
    }
    cuts = {plan: CutModel(model, plan) for plan in PLANS}
    whole = _uncut_step(model)
    whole_s: list[float] = []
    seconds: dict[tuple[int, int, int], list[tuple[float, float]]] = {plan: [] for plan in PLANS}
    for repeat in range(repeats + 1):
        took = whole(batch)
        steps = {plan: parts.step(batch) for plan, parts in cuts.items()}
        if repeat:  # the first one warms up
            whole_s.append(took)
            for plan, pair in steps.items():
                seconds[plan].append(pair)
    costs: dict[tuple[int, int, int], StepCosts] = {plan: step_costs(workload, plan) for plan in PLANS}
    rate = (costs[PLANS[0]].client_flops + costs[PLANS[0]].middle_flops) / statistics.median(whole_s)
    return rate, [
        Comparison(
            plan,
            (costs[plan].client_flops / rate, statistics.median(pair[0] for pair in seconds[plan])),
            (costs[plan].middle_flops / rate, statistics.median(pair[1] for pair in seconds[plan])),
            (costs[plan].client_bytes, cuts[plan].client_bytes(batch)),
        )
        for plan in PLANS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_tokens", type=int, default=64)
    args = parser.parse_args()
    rate, comparisons = measure(args.repeats, args.batch_size, args.num_tokens)
    print(f"MiniLM, batches of {args.batch_size} x {args.num_tokens} tokens, medians of {args.repeats} steps")
    print(f"fitted on the uncut model: {rate / 1e9:.1f} GFLOP/s; each entry: predicted, measured, error")
    print(f"{'cut':<10}{'client ms':>22}{'edge ms':>22}{'step ms':>22}{'client MB':>22}")
    for one in comparisons:
        milliseconds = [
            (1e3 * predicted, 1e3 * measured) for predicted, measured in (one.client_s, one.edge_s, one.step_s)
        ]
        columns = [*milliseconds, (one.client_bytes[0] / 1e6, one.client_bytes[1] / 1e6)]
        row = "".join(f"{f'{p:.1f} {m:.1f} {p / m - 1:+.1%}':>22}" for p, m in columns)
        print(f"{'|'.join(map(str, one.plan)):<10}{row}")
    errors = [[abs(p / m - 1) for p, m in (one.step_s, one.client_s, one.edge_s)] for one in comparisons]
    print(f"largest error of a step: {max(error[0] for error in errors):.1%}")
    print(f"largest error of the client's or the edge's part: {max(max(error) for error in errors):.1%}")


if __name__ == "__main__":
    main()
