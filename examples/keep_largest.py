"""A link stage of your own: of each state, send the numbers that are farthest from 0, and where they stood.

    PYTHONPATH=examples python train.py fit --config configs/debug.yaml --trainer.callbacks+=keep_largest.KeepLargest

A stage says how both ends of a link are made; the callback puts it on the links of a run.
"""

import torch
from torch import Tensor, nn

from elsa_pl.callbacks.links import LinkCallback
from elsa_pl.links import LINKS, Ends, Link, Stage

# Shapes: D width of the states that arrive, K numbers kept, * any number of leading dimensions.


class KeepLargestStage(Stage):
    """Top-k sparsification. Of 2 K numbers sent, half are values and half say where those stood.

    Args:
        kept: K.
    """

    last = True  # a stage that computes with numbers would spoil the places

    def __init__(self, kept: int) -> None:
        if kept < 1:
            raise ValueError(f"kept must be at least 1; got {kept}")
        self._kept = kept

    def ends(self, width: int, link: Link, client: str | None) -> Ends:
        if 2 * self._kept > width:
            raise ValueError(f"kept must be at most {width // 2}, half of the width; got {self._kept}: lower it")
        return Ends(_Encoder(self._kept), _Decoder(width), 2 * self._kept)

    def describe(self) -> str:
        return f"the {self._kept} largest numbers"


class _Encoder(nn.Module):
    def __init__(self, kept: int) -> None:
        super().__init__()
        self._kept = kept

    def forward(self, states: Tensor) -> Tensor:
        """[*, D] -> [*, 2 K]."""
        places = states.abs().topk(self._kept).indices
        return torch.cat([states.gather(-1, places), places.to(states.dtype)], dim=-1)


class _Decoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, sent: Tensor) -> Tensor:
        """[*, 2 K] -> [*, D]; gradients come back for the values, and are 0 for the places."""
        values, places = sent.chunk(2, dim=-1)
        states = values.new_zeros(*sent.shape[:-1], self._width)
        return states.scatter(-1, places.long(), values)


class KeepLargest(LinkCallback):
    """Sends the numbers of each state that are farthest from 0; gradients of these alone come back.

    Args:
        kept: how many of each state.
    """

    def __init__(self, kept: int = 8) -> None:
        super().__init__(KeepLargestStage(kept), LINKS, at=None, probes=None)
