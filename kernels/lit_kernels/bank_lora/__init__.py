"""A linear layer under a bank of LoRAs: every sample's rows meet their own adapter."""

from lit_kernels.bank_lora.function import bank_lora

__all__ = ["bank_lora"]
