"""States where a module puts them out, to look at or to replace."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def on_states(place: nn.Module, function: Callable[[Tensor], Tensor | None], *, first: bool = False) -> RemovableHandle:
    """Call a function with the states that a module puts out; what it returns takes their place, unless it is None.

    Args:
        place: puts out states, or a tuple that begins with them.
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
        whole = isinstance(output, tuple)
        replaced = function(output[0] if whole else output)
        if replaced is None:
            return None
        return (replaced, *output[1:]) if whole else replaced

    return place.register_forward_hook(hook, prepend=first)
