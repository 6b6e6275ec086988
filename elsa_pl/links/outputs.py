"""States where a module puts them out, to look at or to replace."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils import ModelOutput


def on_states(place: nn.Module, function: Callable[[Tensor], Tensor | None], *, first: bool = False) -> RemovableHandle:
    """Call a function with the states that a module puts out; what it returns takes their place, unless it is None.

    In the states' own dtype, since what follows in a model of low precision takes no other.

    Args:
        place: puts out states, or a tuple or a ``ModelOutput`` of transformers that begins with them.
        function: called in each forward pass.
        first: before all that is called there so far, which would replace the states.

    Returns:
        To be removed again.

    Example:
        >>> import torch
        >>> module = nn.Identity()
        >>> handle = on_states(module, lambda states: -states)
        >>> module(torch.ones(2))
        tensor([-1., -1.])
    """

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        whole = isinstance(output, tuple | ModelOutput)
        states = output[0] if whole else output
        replaced = function(states)
        if replaced is None:
            return None
        replaced = replaced.to(states.dtype)
        if isinstance(output, ModelOutput):
            return type(output)(**{**output, next(iter(output)): replaced})
        return (replaced, *output[1:]) if whole else replaced

    return place.register_forward_hook(hook, prepend=first)
