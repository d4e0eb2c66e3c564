"""What an absorbed layer computes and moves, beside the ordinary one: counted, then weighed with a model of a GPU.

Nothing here was timed: `worthwhile` is modelled. Elements are of bf16. K and V are needed by both ways and not counted.
"""

from __future__ import annotations

FLOPS_PER_BYTE = 184
"""An H200 multiplies 790 TFLOP/s of bf16 while it moves 4.3 TB/s."""
FP32_FACTOR = 12
"""How much longer products in fp32 take, in which `absorb` computes."""

MARGIN = 0.9
"""A gain below a tenth is not believed: the model knows neither launches nor how well a kernel does."""

Launch = tuple[int, int]
"""FLOP and bytes of one launch."""


def ordinary(width: int, tokens: int, keys: int, prompts: int = 1) -> list[Launch]:
    """Query projection, attention in one launch, output projection."""
    rows = prompts * tokens
    projection = (2 * rows * width**2, 2 * (2 * rows * width + width**2))
    return [projection, (4 * rows * keys * width, 4 * (rows + prompts * keys) * width), projection]


def absorbed(width: int, tokens: int, keys: int, heads: int, prompts: int = 1) -> list[Launch]:
    """Probabilities, whose kernel rounds the number of keys up to 80 or 128, and the product with U."""
    rows, columns = prompts * tokens, heads * keys
    computed = heads * (keys if keys > 128 else 80 if keys <= 80 else 128)
    moved = 2 * (rows * width + prompts * columns * width + rows * columns)
    return [(2 * rows * computed * width, moved), (2 * rows * columns * width, moved)]


def absorbing(width: int, keys: int, heads: int, prompts: int = 1) -> list[Launch]:
    """G and U, once: both in fp32 with their casts, ten bytes an element."""
    elements = width**2 + prompts * (keys + heads * keys) * width
    one = (2 * FP32_FACTOR * prompts * keys * width**2, 10 * elements)
    return [one, one]


def modelled(launches: list[Launch]) -> float:
    """Time, as the bytes that an H200 could have moved meanwhile; a launch is bound by its FLOP or by its bytes."""
    return sum(max(flop / FLOPS_PER_BYTE, moved) for flop, moved in launches)


def worthwhile(width: int, tokens: int, keys: int, heads: int, prompts: int = 1, passes: int = 1) -> bool:
    """Whether absorbing a layer is modelled to take less than nine tenths of the time of leaving it.

    Args:
        width: C, of x and of all heads together.
        tokens: Image tokens that share a prompt in one pass: those of all its samples.
        keys: S, text tokens.
        heads: N.
        prompts: P.
        passes: How many passes use what is absorbed once: the steps of a sampler, for example.
    """
    ours = modelled(absorbing(width, keys, heads, prompts)) + passes * modelled(
        absorbed(width, tokens, keys, heads, prompts)
    )
    return ours < MARGIN * passes * modelled(ordinary(width, tokens, keys, prompts))
