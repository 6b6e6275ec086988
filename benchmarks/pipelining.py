"""torch's own pipeline on the same model, cut, batches and micro-batches. Rank 0 prints tokens per second.

    torchrun --nproc_per_node=2 -m benchmarks.pipelining texts.csv

A V-shaped schedule gives rank 0 the first and the last stage, as a client has front and tail; the middle is two stages
on rank 1, since these schedules want two for each rank. The stages pass hidden states only: no text is padded, so there
is no attention mask to send.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV

from benchmarks.setting import MICRO_BATCHES, PLAN, STEPS, TOKENS_PER_STEP, WARMUP_STEPS, build_model, load_batches


class Stage(nn.Module):
    """Some blocks of a BERT classifier, with the embeddings or the head if they are at its ends."""

    def __init__(self, model: Any, start: int, stop: int) -> None:
        super().__init__()
        bert = model.get_base_model().bert
        blocks = list(bert.encoder.layer)
        self.embeddings = bert.embeddings if start == 0 else None
        self.blocks = nn.ModuleList(blocks[start:stop])
        last = stop == len(blocks)
        self.pooler = bert.pooler if last else None
        self.classifier = model.get_base_model().classifier if last else None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.embeddings is not None:
            hidden = self.embeddings(input_ids=hidden)
        for block in self.blocks:
            output = block(hidden)
            hidden = output[0] if isinstance(output, tuple) else output
        if self.classifier is not None:
            assert self.pooler is not None
            hidden = self.classifier(self.pooler(hidden))
        return hidden


def main() -> None:
    torch.set_num_threads(1)
    num_labels, batches = load_batches(Path(sys.argv[1]), WARMUP_STEPS + STEPS)
    model = build_model(num_labels)
    first, second = PLAN["front"], PLAN["front"] + PLAN["middle"]
    half = first + PLAN["middle"] // 2
    cuts = [(0, first), (first, half), (half, second), (second, second + PLAN["tail"])]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = [0, 3] if rank == 0 else [1, 2]
    parts = [Stage(model, *cuts[index]) for index in mine]
    stages: list[Any] = [
        PipelineStage(part, index, 4, torch.device("cpu")) for part, index in zip(parts, mine, strict=True)
    ]
    schedule = ScheduleDualPipeV(stages, MICRO_BATCHES, loss_fn=nn.functional.cross_entropy)
    trained = [p for part in parts for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    start = 0.0
    for step, batch in enumerate(batches):
        if step == WARMUP_STEPS:
            dist.barrier()
            start = time.perf_counter()
        if rank == 0:
            schedule.step(batch["input_ids"], target=batch["labels"], losses=[])
        else:
            schedule.step()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    if rank == 0:
        print(STEPS * TOKENS_PER_STEP / (time.perf_counter() - start))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
