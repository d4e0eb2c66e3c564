"""The one attention processor: a diffusers `Attention` processor with slots.

* `given`: K and V of this layer, where they were computed for all layers at once; set and cleared around a pass. Or
  `key_values`, an argument of the call (diffusers' `cross_attention_kwargs`), has them by layer name. A layer that has
  neither uses its own `to_k` and `to_v`.
* `detach_first_token`: no gradient through token 0's K and V (Custom Diffusion).
* `tap`: receives the probabilities of this layer and may replace them (attention maps, prompt-to-prompt).
* `tap_limit`: the tap is not called where there are more query tokens: the maps of large self-attention layers would
  take memory that grows with the fourth power of the picture's side.
* `backend`: "reference" (softmax written out), "sdpa" (torch's fused attention) or "auto" (= sdpa).
* `joint`: q, k and v of self-attention are taken together (`bank_lora.layers.project`).
* `short_keys`: a backend of `short_key_attention` for cross-attention; None leaves it to `backend`, as do a tap, a mask
  and normalized queries and keys.
* `kept`: the text of this pass, where it is kept over several (`lit_kernels.frozen`): it may give the whole layer,
  absorbed. Compiled code, a tap and a mask leave it alone.

Nothing else sets a processor on a UNet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_kernels import backend as kernels
from lit_kernels.attention import reference
from lit_kernels.bank_lora.layers import project
from lit_kernels.short_key_attention.function import short_key_attention, unsupported

if TYPE_CHECKING:
    from lit_kernels.absorbed_attention.layers import KeptText

Backend = Literal["auto", "sdpa", "reference"]
KeyValues = Mapping[str, tuple[Tensor, Tensor]]
Tap = Callable[["AttentionProcessor", Tensor], Tensor | None]


@dataclass(eq=False)
class AttentionProcessor:
    """Attention of one layer; `name` is the layer's module path, `is_cross` whether it reads text."""

    name: str
    is_cross: bool
    backend: Backend = "auto"
    detach_first_token: bool = False
    tap: Tap | None = None
    tap_limit: int | None = None
    short_keys: kernels.Backend | None = None
    joint: bool = False
    given: tuple[Tensor, Tensor] | None = None
    kept: KeptText | None = None

    def key_value(self, attn: Any, states_BSE: Tensor, key_values: KeyValues | None = None) -> tuple[Tensor, Tensor]:
        """K and V `[B, S, C]` of this layer for `states_BSE`."""
        if self.is_cross and self.given is not None:
            return self.given
        if key_values is not None and self.name in key_values:
            return key_values[self.name]
        key, value = attn.to_k(states_BSE), attn.to_v(states_BSE)
        if self.is_cross and self.detach_first_token:
            key, value = reference.detach_first_token(key), reference.detach_first_token(value)
        return key, value

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        key_values: KeyValues | None = None,
    ) -> Tensor:
        """Apply the layer to `[B, T, C]` or `[B, C, h, w]`; K and V from `encoder_hidden_states` if given."""
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, text.shape[1], len(text))
            attention_mask = attention_mask.view(len(text), attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
            text = hidden_states if encoder_hidden_states is None else text
        if encoder_hidden_states is not None and attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        out = None
        if not torch.compiler.is_compiling() and self.kept is not None and attention_mask is None and self.tap is None:
            out = self.kept.attend(self.name, attn, hidden_states)
        if out is None:
            out = self._layer(attn, hidden_states, text, attention_mask, key_values)
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    def _layer(
        self, attn: Any, hidden_states: Tensor, text: Tensor, mask: Tensor | None, key_values: KeyValues | None
    ) -> Tensor:
        """Projections and attention of states `[B, T, C]`."""
        if self.joint and text is hidden_states:
            query, key, value = project((attn.to_q, attn.to_k, attn.to_v), hidden_states)
        else:
            query, (key, value) = attn.to_q(hidden_states), self.key_value(attn, text, key_values)
        if mask is None and self._has_short_keys(attn, query, key):
            out = short_key_attention(query, key, value, heads=attn.heads, backend=self.short_keys or "auto")
        else:
            query, key, value = (self._heads(attn, x) for x in (query, key, value))
            if attn.norm_q is not None:
                query = attn.norm_q(query)
            if attn.norm_k is not None:
                key = attn.norm_k(key)
            out = self._attend(query, key, value, mask)
            out = out.transpose(1, 2).flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]

    def _has_short_keys(self, attn: Any, query: Tensor, key: Tensor) -> bool:
        if self.short_keys is None or not self.is_cross or self.tap is not None or attn.norm_q or attn.norm_k:
            return False
        if self.short_keys != "triton":  # the others take every case
            return True
        return not unsupported(key.shape[1], query.shape[2] // attn.heads, query.dtype, query.device)

    @staticmethod
    def _heads(attn: Any, x_BSC: Tensor) -> Tensor:
        return x_BSC.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if self.tap is not None and (self.tap_limit is None or query.shape[-2] <= self.tap_limit):
            probabilities = reference.attention_probabilities(query, key, mask)
            changed = self.tap(self, probabilities)
            return (probabilities if changed is None else changed) @ value
        if self.backend == "reference":
            return reference.attention(query, key, value, mask)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def install(unet: nn.Module, backend: Backend = "auto") -> dict[str, AttentionProcessor]:
    """Put an `AttentionProcessor` on every attention layer of a diffusers UNet.

    Idempotent: a second call returns the installed processors, with their slots untouched.

    Returns:
        Processors by layer name (for example `down_blocks.0.attentions.0.transformer_blocks.0.attn2`).
    """
    from diffusers.models.attention_processor import Attention

    installed = {}
    for name, module in unet.named_modules():
        if not isinstance(module, Attention):
            continue
        if not isinstance(module.processor, AttentionProcessor):
            module.set_processor(AttentionProcessor(name, is_cross=module.is_cross_attention, backend=backend))
        installed[name] = module.processor
    if not installed:
        raise ValueError(f"{type(unet).__name__} has no diffusers Attention layer")
    return installed
