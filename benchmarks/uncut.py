"""One process, one thread: the uncut model with LoRA, trained as anybody would. Prints tokens per second.

python -m benchmarks.uncut texts.csv
"""

import sys
import time
from pathlib import Path

import torch

from benchmarks.setting import STEPS, TOKENS_PER_STEP, WARMUP_STEPS, build_model, load_batches


def main() -> None:
    torch.set_num_threads(1)
    num_labels, batches = load_batches(Path(sys.argv[1]), WARMUP_STEPS + STEPS)
    model = build_model(num_labels)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    start = 0.0
    for step, batch in enumerate(batches):
        if step == WARMUP_STEPS:
            start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(STEPS * TOKENS_PER_STEP / (time.perf_counter() - start))


if __name__ == "__main__":
    main()
