"""An allow-list in front of everything that RPC unpickles.

RPC speaks pickle, and unpickling an arbitrary message runs arbitrary code. A process of ours accepts the few classes
that messages are made of and the two functions that look up a service, so a peer that was taken over can ask for
exposed methods only. torch's own builtin operators remain callable by a peer: the network must still be private.
"""

import pickle
from typing import Any

import torch.distributed.rpc.internal as rpc_internal

_PICKLER = rpc_internal._InternalRPCPickler

_ALLOWED = {
    "torch.distributed.rpc.internal": {"PythonUDF", "RemoteException", "_InternalRPCPickler"},
    # the round of messages with which RPC ends its own start
    "torch.distributed.rpc.api": {"_gather_to_leader", "_broadcast_to_followers"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset", "RuntimeError", "ValueError", "KeyError", "TypeError"},
    "elsa_pl.rpc.remote": {"_invoke", "_invoke_async"},
    "elsa_pl.rpc.messages": {"Member", "Update", "Work", "RoundReport", "ProgressReport", "Failure"},
}
_RECEIVERS = {"_tensor_receiver", "_py_rref_receiver"}


def _pickler_attribute(owner: object, name: str) -> Any:
    if owner is _PICKLER and name in _RECEIVERS:
        return getattr(owner, name)
    raise pickle.UnpicklingError(f"refused attribute {name!r} of {owner!r} in an RPC message")


class AllowListUnpickler(pickle.Unpickler):
    """Finds the classes and functions of our own messages, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how torch's pickler refers to its own tensor receiver
            return _pickler_attribute
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused {module}.{name} in an RPC message: it is not one of elsa_pl's messages")


def install() -> None:
    """Use the allow-list for all RPC of this process; call it before RPC starts."""
    rpc_internal._unpickler = AllowListUnpickler  # there is no public hook
