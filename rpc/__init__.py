"""Processes and what they say to each other; every call to torch.distributed.rpc is made in here."""
