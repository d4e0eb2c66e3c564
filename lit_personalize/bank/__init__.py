"""Many adapters trained in one batched pass over one frozen base, each as if it were alone."""

from lit_personalize.bank.engine import Bank
from lit_personalize.bank.job import AdapterJob, FinishedAdapter
from lit_personalize.bank.pictures import Pictures

__all__ = ["AdapterJob", "Bank", "FinishedAdapter", "Pictures"]
