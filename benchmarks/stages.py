"""What the stages of links cost, against a training step and against a copy of the same data.

    python -m benchmarks.stages [--repeats 20]

One thread, a batch of 32 x 32 tokens of width 384. A step is one of MiniLM with LoRA, uncut. Encoding and decoding are
timed on one link, forwards, and again with the gradients on their way back; all take turns, and figures are medians.
Beside them, as the least that separate operators can take: torch's fused ones for rows of 8 and 4 bits, which store a
scale and an offset of 4 and 2 bytes each for every row, here of 32 numbers.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.setting import build_model
from elsa_pl.functional.quantization import BlockFormat
from elsa_pl.links import Codec, Stage, crossing
from elsa_pl.links.hiding import EncryptionStage, NoiseStage
from elsa_pl.links.perturbation import PerturbationStage
from elsa_pl.links.stages import ProjectionStage, QuantizationStage, SketchStage

TEXTS, TOKENS, WIDTH, NUM_PROBES = 32, 32, 384, 2000


def _stages() -> dict[str, Stage]:
    stages: dict[str, Stage] = {
        "sketch 1/4, calibrated": SketchStage(4, "calibrated", 3, 1e-4, 0),
        "sketch 1/4, median": SketchStage(4, "median", 3, 1e-4, 0),
        "projection 1/8": ProjectionStage(8, learn=True),
        "int8": QuantizationStage(BlockFormat(bits=8)),
        "int4": QuantizationStage(BlockFormat(bits=4)),
        "SS-OP 64, edge": PerturbationStage(64, "edge", "keep", 4, rekey=True, seed=0),
        "SS-OP 384, edge": PerturbationStage(384, "edge", "keep", 4, rekey=True, seed=0),
        "encryption": EncryptionStage(),
        "noise": NoiseStage(1.0),
    }
    for stage in stages.values():
        if isinstance(stage, PerturbationStage | EncryptionStage):
            stage.secret = "benchmark"
        if isinstance(stage, NoiseStage):
            stage.seed = 0
    return stages


def _milliseconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _fused(kind: str, rows: torch.Tensor) -> torch.Tensor:
    pack, unpack = (getattr(torch.ops.quantized, f"embedding_bag_{kind}_{what}") for what in ("prepack", "unpack"))
    unpacked: torch.Tensor = unpack(pack(rows))
    return unpacked


def measure(repeats: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of each thing, and of a stage with its gradients as well (of others the same again)."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(TEXTS, TOKENS, WIDTH, generator=generator)
    probes = torch.randn(NUM_PROBES, WIDTH, generator=generator)
    model = build_model(6)
    ids = torch.randint(1000, 20000, (TEXTS, TOKENS), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 6}
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    copied = torch.empty_like(states)
    forward: dict[str, Callable[[], Any]] = {"training step": step, "copy": lambda: copied.copy_(states)}
    both = dict(forward)
    for name, stage in _stages().items():
        codec = Codec("uplink.1-4-1", "uplink", [stage], WIDTH, "client-0")
        codec.fit(probes)
        sent = states.clone().requires_grad_()

        def there(codec: Codec = codec) -> None:
            with torch.no_grad():
                codec(states)

        def there_and_back(codec: Codec = codec, sent: torch.Tensor = sent) -> None:
            codec(sent).backward(states)
            sent.grad = None

        forward[name], both[name] = there, there_and_back
    for kind in ("byte", "4bit"):
        forward[f"torch's own, {kind}"] = both[f"torch's own, {kind}"] = partial(_fused, kind, states.view(-1, 32))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in forward}
    for repeat in range(repeats + 1):
        for name in forward:
            with crossing(repeat):
                found[name].append((_milliseconds(forward[name]), _milliseconds(both[name])))
    return {
        name: (statistics.median(first for first, _ in times[1:]), statistics.median(last for _, last in times[1:]))
        for name, times in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    found = measure(parser.parse_args().repeats)
    step, copy = found["training step"][0], found["copy"][0]
    print(f"{'':<26}{'ms':>8}{'of a step':>12}{'of a copy':>12}{'with gradients':>17}{'of a step':>12}")
    for name, (forward, both) in found.items():
        shares = f"{forward:>8.2f}{forward / step:>12.1%}{forward / copy:>11.1f}x{both:>17.2f}{both / step:>12.1%}"
        print(f"{name:<26}{shares}")


if __name__ == "__main__":
    main()
