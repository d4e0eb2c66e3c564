"""Orthogonal fine-tuning (Qiu et al., 2023, arXiv 2306.07280): W = W0·Rᵀ with R = blockdiag(R_1 ... R_r).

R_i = (I - S_i)(I + S_i)⁻¹ is the Cayley transform of a skew S_i, so it is orthogonal, and the angles between the rows
of W0 stay. The trained factor of a layer is the upper triangles of its S_i, `[r, b(b-1)/2]` with b = in / r, as PEFT
stores them. PEFT's own layers rotate (and cast) the activations of every token; here the weight is rotated once a step.

COFT keeps every block in a ball around the identity: ‖S_i‖_F <= eps·b²/√r, as the authors' code does. PEFT divides the
same `eps` by √r alone, which with its default freezes R at the identity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lit_personalize.adapters.effective_weights import EffectiveWeights
from lit_personalize.adapters.lora import TARGETS
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.adapters.shadow import linear_layers
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError

NAMED = ("attention", "key_value", "query_value")
"""The named targets that hold linear layers only."""


def block_size(upper: Tensor) -> int:
    """b of the upper triangles `[..., b(b-1)/2]`."""
    return (1 + math.isqrt(1 + 8 * upper.shape[-1])) // 2


def skew(upper: Tensor) -> Tensor:
    """Skew matrices `[..., b, b]` of their upper triangles `[..., b(b-1)/2]`, row by row."""
    b = block_size(upper)
    rows, columns = torch.triu_indices(b, b, 1, device=upper.device)
    filled = upper.new_zeros(*upper.shape[:-1], b, b)
    filled[..., rows, columns] = upper
    return filled - filled.mT


def cayley_change(upper: Tensor) -> Tensor:
    """R - I `[..., b, b]` of the Cayley transform: -2S(I + S)⁻¹, which keeps its digits where S is small."""
    s = skew(upper)
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    return torch.linalg.solve(eye + s, -2 * s, left=False)


def rotated_change(weight: Tensor, change: Tensor) -> Tensor:
    """ΔW = W0·(R - I)ᵀ `[out, in]` of a weight `[out, in]` and the blocks of R - I `[r, b, b]`."""
    r, b, _ = change.shape
    return torch.einsum("oic,iac->oia", weight.reshape(-1, r, b), change).reshape(weight.shape)


def ball_radius(eps: float, size: int, blocks: int) -> float:
    """COFT's bound on ‖S_i‖_F for blocks of `size` b: eps·b²/√r."""
    return eps * size**2 / math.sqrt(blocks)


def project(upper: Tensor, radius: float) -> Tensor:
    """The nearest blocks `[r, b(b-1)/2]` whose skew matrices have a Frobenius norm of at most `radius`.

    Applied twice it changes nothing: a norm that exceeds the radius by rounding alone is let be.
    """
    norm = math.sqrt(2) * upper.norm(dim=-1, keepdim=True)
    return torch.where(norm <= radius * (1 + 1e-6), upper, upper * (radius / norm))


class OFT(EffectiveWeights):
    """Rotations of the inputs of the UNet's linear layers.

    Args:
        blocks: r, the blocks of R; must divide the input width of every target.
        eps: COFT's control strength (the paper takes 6e-5); None sets no bound, which is OFT.
        targets: "attention", "key_value" (cross-attention K and V), "query_value", or name endings of linear layers.
    """

    def __init__(
        self,
        blocks: int = 4,
        eps: float | None = None,
        targets: str | list[str] = "attention",
        name: str = "oft",
        lr: float | None = None,
        weight_decay: float | None = None,
    ):
        super().__init__(name, lr, weight_decay)
        if blocks < 1:
            raise UsageError(f"OFT blocks must be at least 1, not {blocks}")
        if eps is not None and not eps > 0:
            raise UsageError(f"OFT eps must be positive, or null for no bound, not {eps}")
        if isinstance(targets, str) and targets not in NAMED:
            raise UsageError(f"unknown OFT targets {targets!r}; use one of {', '.join(NAMED)} or a list of names")
        self.blocks = blocks
        self.eps = eps
        self.targets = TARGETS[targets] if isinstance(targets, str) else list(targets)

    def choose(self, base: Base) -> dict[str, tuple[nn.Module, str]]:
        chosen = {f"unet.{path}": layer for path, layer in linear_layers(base.unet).items() if self._is_target(path)}
        if not chosen:
            raise UsageError(f"OFT targets {self.targets} match no linear layer of the UNet")
        for name, layer in chosen.items():
            if layer.in_features % self.blocks or layer.in_features < 2 * self.blocks:
                raise UsageError(f"{name} has {layer.in_features} inputs; OFT blocks: {self.blocks} do not divide them")
        return {name: (layer, "weight") for name, layer in chosen.items()}

    def start(self, name: str) -> Tensor:
        b = self.frozen(name).shape[1] // self.blocks
        return torch.zeros(self.blocks, b * (b - 1) // 2)

    def _is_target(self, path: str) -> bool:
        return any(path == target or path.endswith(f".{target}") for target in self.targets)

    def _within_ball(self, upper: Tensor) -> Tensor:
        if self.eps is None:
            return upper
        return project(upper, ball_radius(self.eps, block_size(upper), self.blocks))

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        by_shape: dict[torch.Size, list[str]] = {}
        for layer in self._shadows:
            factor = self.factor(layer)
            if self.eps is not None:
                with torch.no_grad():  # the optimizer walks out of the ball; the walk itself is not differentiated
                    factor.copy_(self._within_ball(factor))
            by_shape.setdefault(factor.shape, []).append(layer)
        for layers in by_shape.values():  # one solve for all layers of a width
            rotations = cayley_change(torch.stack([self.factor(layer) for layer in layers]))
            for layer, rotation in zip(layers, rotations.unbind(), strict=True):
                yield layer, rotated_change(self.frozen(layer).float(), rotation)

    def delta(self, layer: str) -> Tensor:
        return rotated_change(self.frozen(layer).float(), cayley_change(self.factor(layer)))

    def export_weights(self) -> AdapterWeights:
        """ΔW of every layer, from a solve in fp64, and the blocks themselves."""
        rotations, dense = {}, {}
        for layer in self._shadows:
            rotations[layer] = self._within_ball(self.factor(layer).detach()).float().cpu().clone()
            dense[layer] = turn(self.frozen(layer).detach().cpu(), rotations[layer])
        return AdapterWeights(dense=dense, rotations=rotations)


def turn(weight: Tensor, upper: Tensor) -> Tensor:
    """ΔW `[out, in]` in fp32, computed in fp64, of a weight and its blocks `[r, b(b-1)/2]`."""
    return rotated_change(weight.double(), cayley_change(upper.double())).float()
