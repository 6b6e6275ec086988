"""Parameters under dotted names."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn


class ParameterTree(nn.Module):
    """Parameters under dotted names, as nested modules: a module may not register a name with a dot in it.

    Args:
        tensors: initial values by name; they are copied.

    Example:
        >>> import torch
        >>> tree = ParameterTree({"a.b": torch.zeros(1), "a.c": torch.ones(1)})
        >>> list(tree.state_dict())
        ['a.b', 'a.c']
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for step in path:
                if step not in module._modules:
                    module.add_module(step, nn.Module())
                module = module.get_submodule(step)
            module.register_parameter(leaf, nn.Parameter(value.detach().clone()))

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Dotted names and parameters."""
        return self.named_parameters()
