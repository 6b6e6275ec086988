r"""Start a run: split, hierarchical, federated LoRA fine-tuning.

One machine; the processes that the layout asks for are started here:

    python train.py fit --config configs/quickstart.yaml
    python train.py fit --config configs/text_classification.yaml \
        --data.train_file A.csv --data.test_file B.csv

One machine; the processes are started by torchrun:

    torchrun --nproc_per_node=2 train.py fit --config configs/text_classification.yaml \
        --trainer.strategy.init_args.layout tiers

Several sites; each site starts its own process and names its own role:

    torchrun --nnodes=3 --node_rank=1 --nproc_per_node=1 --master_addr cloud.internal --master_port 29500 \
        train.py fit --config site.yaml \
        --trainer.strategy.init_args.role host --trainer.strategy.init_args.name hospital-a

An earlier run, tested and used:

    python train.py test --run runs/quickstart/<time>
    python train.py predict --run runs/quickstart/<time> --data.predict_file C.csv

All settings, with their types and defaults: `python train.py fit --help`. Nothing that travels between
processes may be defined in this file: it is called `__main__` here and something else over there.
"""

import os
import signal
import sys

# Until `main` takes over nothing has begun, and Ctrl-C ends the process at once. Python's own KeyboardInterrupt would
# rise inside an import, and some of what is imported swallows it or takes it for a missing module.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Read when torch is loaded. Below errors, its C++ side repeats for the rest of a run that a peer is gone.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from elsa_pl.cli import main

if __name__ == "__main__":
    sys.exit(main())
