"""AdamW for a bank of adapters, each with its own rate, decay, step count, clipping and skip."""

from lit_kernels.bank_adamw.function import bank_adamw

__all__ = ["bank_adamw"]
