"""Split and hierarchical federated fine-tuning on Lightning and torch.distributed.rpc.

A client holds the front and the tail of a language model, its edge the middle; the cloud only averages LoRA
adapters. The parts, in the order in which they may import each other:

- `elsa_pl.functional`: the mathematics;
- `elsa_pl.callbacks` and `elsa_pl.rpc`: Lightning callbacks; processes and what they say to each other;
- `elsa_pl.datamodules`: text divided among clients;
- `elsa_pl.tiers` and `elsa_pl.strategies`: what each place does, and how a run is held together;
- `elsa_pl.report`: the page that a run leaves;
- `elsa_pl.cli`: `python train.py`;
- `elsa_pl.experiments`: suites of such runs, and their pages.

Importing this package imports none of them, so that one piece can be used without paying for the rest.
"""

__version__ = "0.1.0"
