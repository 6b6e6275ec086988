"""Federated text data: reading it, dividing it among clients, and handing it to Lightning in rounds."""

from elsa_pl.datamodules.federated import FederatedTextDataModule, Federation

__all__ = ["FederatedTextDataModule", "Federation"]
