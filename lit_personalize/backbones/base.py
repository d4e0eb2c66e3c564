"""A frozen text-to-image model: what objectives and samplers may ask of it, for every family.

Legend: `B` samples, `S` text tokens, `E` text width, `P` pooled width; latents `[B, C, h, w]`.
Text encoders, VAE and UNet are stock diffusers and transformers modules; families differ only in
`encode_text` and in the micro-conditioning of the UNet.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_kernels.attention import AttentionProcessor, install
from lit_personalize.backbones.fingerprint import weights_identity
from lit_personalize.backbones.noise import NoiseSchedule
from lit_personalize.backbones.token_rows import AddedRows, pieces_of, row_names
from lit_personalize.errors import UsageError

if TYPE_CHECKING:
    from lit_personalize.adapters.protocol import Adapter

log = logging.getLogger(__name__)


@dataclass
class Conditioning:
    """What the UNet is told: text states `[B, S, E]`, and for SDXL pooled `[B, P]` and time ids `[B, 6]`."""

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def cat(self, other: Conditioning) -> Conditioning:
        """Join along the batch."""
        pairs = ((self.pooled, other.pooled), (self.time_ids, other.time_ids))
        joined = [torch.cat([a, b]) if a is not None and b is not None else None for a, b in pairs]
        return Conditioning(torch.cat([self.states, other.states]), *joined)

    def of(self, rows: Tensor) -> Conditioning:
        """What samples are told, by their int64 numbers `[N]`."""
        parts = (None if part is None else part[rows] for part in (self.pooled, self.time_ids))
        return Conditioning(self.states[rows], *parts)

    def zeroed(self, rows: Tensor) -> Conditioning:
        """Zeros in place of the text states and pooled states of the samples that are set in `rows`, bool `[B]`."""
        pooled = None if self.pooled is None else self.pooled.masked_fill(rows[:, None], 0)
        return Conditioning(self.states.masked_fill(rows[:, None, None], 0), pooled, self.time_ids)


class Base(nn.Module):
    """Base class of the families. Build with `lit_personalize.backbones.loading.load_base`."""

    family = ""

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text_encoders: Sequence[Any],
        tokenizers: Sequence[Any],
        scheduler: Any,
        fingerprint: str,
        source: str = "",
        config: str | Path | None = None,
        force_zeros_for_empty_prompt: bool = False,
    ):
        super().__init__()
        self.unet = unet
        self.vae = vae
        self.text_encoders = nn.ModuleList(text_encoders)
        self.tokenizers = list(tokenizers)
        self.scheduler = scheduler
        self.schedule = NoiseSchedule.of_scheduler(scheduler)
        self.fingerprint = fingerprint
        self.source = source
        self.config = config
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        """Whether an empty negative prompt and a dropped caption stand for zeros, not for the empty prompt's states."""
        self.requires_grad_(False)
        self.eval()
        self.processors: dict[str, AttentionProcessor] = install(unet)
        self.added_rows: list[AddedRows] = []
        self.vectors_of_token: dict[str, int] = {}
        self._cut: set[str] = set()
        for encoder, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True):
            _pool_at_end_token(encoder, tokenizer)
            self.added_rows.append(AddedRows(encoder, vocabulary=len(tokenizer)))

    def use_zero_terminal_snr(self) -> None:
        """Rescale β so that the last step is noise alone, ᾱ = 0 (Lin et al., 2023, arXiv 2305.08891, alg. 1).

        It holds for training and for every sampler made of this base; those begin at the last step then (sec. 3.3).

        Raises:
            UsageError: The base predicts ε, which at ᾱ = 0 is its own input.
        """
        if self.zero_terminal_snr:
            return
        if self.schedule.prediction_type == "epsilon":
            raise UsageError(
                f"zero_terminal_snr: base {self.source} predicts the noise, and where a picture is noise alone that "
                "teaches nothing; it is for bases of v-prediction (use noise_offset here)"
            )
        changed = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        self.scheduler = type(self.scheduler).from_config(self.scheduler.config, **changed)
        self.schedule = NoiseSchedule.of_scheduler(self.scheduler)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last step of the schedule is noise alone."""
        return float(self.schedule.alphas_cumprod[-1]) == 0

    def train(self, mode: bool = True) -> Base:
        """Stay in evaluation mode: a frozen base has no dropout and no batch statistics to update."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def latent_channels(self) -> int:
        return int(self.unet.config.in_channels)

    @property
    def resolution(self) -> int:
        """Native side of the pictures in pixels."""
        return int(self.unet.config.sample_size) * self.downscale

    @property
    def downscale(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    # ---- text -------------------------------------------------------------------------------------

    def expand(self, caption: str) -> str:
        """Write out tokens of several vectors: `<t>` becomes `<t> <t>_1 <t>_2`, as diffusers does; <s0><s1> stays."""
        for token, count in self.vectors_of_token.items():
            if count > 1 and token in caption and f"{token}_1" not in caption and not pieces_of(token):
                caption = caption.replace(token, " ".join(row_names(token, count)))
        return caption

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Ids `[B, S]` per tokenizer, padded and truncated to the encoder's length; a cut caption is warned of once."""
        expanded = [self.expand(caption) for caption in captions]
        found = tuple(
            tokenizer(
                expanded, padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        )  # fmt: skip
        for row in (found[0][:, -2] != self.tokenizers[0].pad_token_id).nonzero().flatten().tolist():
            self._warn_of_cut(expanded[row])
        return found

    def _warn_of_cut(self, caption: str) -> None:
        tokenizer = self.tokenizers[0]
        ids = tokenizer(caption, truncation=False, verbose=False).input_ids
        over = len(ids) - tokenizer.model_max_length
        if over > 0 and caption not in self._cut:
            self._cut.add(caption)
            lost = tokenizer.decode(ids[-1 - over : -1]).strip()
            log.warning("a caption is %d tokens too long and loses its end %r: %s", over, lost, caption)

    def encode_text(self, input_ids: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Text states `[B, S, E]` and pooled states `[B, P]` (None where the family has none)."""
        raise NotImplementedError

    def shown(self, input_ids: Sequence[Tensor]) -> list[Tensor]:
        """Ids, one `[B, S]` per tokenizer, without those of rows that are not unlocked yet."""
        triples = zip(self.added_rows, self.tokenizers, input_ids, strict=True)
        return [added.shown(ids, tokenizer.pad_token_id) for added, tokenizer, ids in triples]

    def condition(self, captions: Sequence[str], time_ids: Tensor | None = None) -> Conditioning:
        """Tokenize and encode captions."""
        states, pooled = self.encode_text([ids.to(self.device) for ids in self.tokenize(captions)])
        if self.needs_time_ids and time_ids is None:
            time_ids = self.default_time_ids(len(captions))
        return Conditioning(states, pooled, time_ids)

    needs_time_ids = False

    def default_time_ids(self, batch: int) -> Tensor:
        """SDXL's `[orig_h, orig_w, top, left, target_h, target_w]` for uncropped native pictures, `[B, 6]`."""
        side = float(self.resolution)
        return torch.tensor([side, side, 0.0, 0.0, side, side], device=self.device).expand(batch, 6)

    # ---- pictures ---------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """VAE posterior of pixels `[B, 3, H, W]` in [-1, 1]: mean and standard deviation, fp32, unscaled.

        A VAE in fp64 gives fp64.

        Raises:
            FloatingPointError: The VAE overflowed, as SDXL's does in fp16; load it in fp32 or bf16.
        """
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        mean, std = _at_least_fp32(posterior.mean), _at_least_fp32(posterior.std)
        if not bool(torch.isfinite(mean).all()):
            raise FloatingPointError(
                f"the VAE of {self.source} gave non-finite latents in {self.vae.dtype}; "
                "load it in float32 (vae_dtype: float32) or use the fp16-fixed VAE"
            )
        return mean, std

    @functools.cached_property
    def vae_identity(self) -> str:
        """Changes with the VAE's weights and precision; the same for every base that has this VAE."""
        return weights_identity(self.vae)

    @functools.cached_property
    def text_identity(self) -> str:
        """Changes with the weights and precision of the text encoders."""
        return "+".join(weights_identity(encoder) for encoder in self.text_encoders)

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Unscaled VAE latents to the UNet's range."""
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents to pixels `[B, 3, H, W]`, fp32 in [-1, 1]."""
        z = (z / self.vae.config.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(z).sample.float().clamp(-1, 1)

    # ---- prediction -------------------------------------------------------------------------------

    def predict(
        self, z_t: Tensor, t: Tensor, conditioning: Conditioning, adapters: Sequence[Adapter] | None = None
    ) -> Tensor:
        """The UNet's prediction for `z_t` `[B, C, h, w]` at `t` `[B]`, in `z_t`'s shape, fp32 (fp64 of a base in fp64).

        Args:
            adapters: Those to apply in this call; all others are off. None asks the untouched base.
                Added tokens count too: without its adapter a token has its initial value.
        """
        with self.only(adapters or ()):
            return self.predict_active(z_t, t, conditioning)

    def predict_active(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Like `predict`, with whatever adapters are active now; for loops inside `only`."""
        dtype = self.dtype
        extra = self._added_conditioning(conditioning)
        out = self.unet(z_t.to(dtype), t, conditioning.states.to(dtype), added_cond_kwargs=extra, return_dict=False)
        return _at_least_fp32(out[0])

    def _added_conditioning(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        return None

    # ---- adapters ---------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[Adapter]:
        """Adapters attached to this base, in order."""
        return getattr(self, "_adapters", [])

    def register(self, adapter: Adapter) -> None:
        """Note an attached adapter; called by `Adapter.attach`."""
        if any(a.name == adapter.name for a in self.adapters):
            raise UsageError(f"two adapters are named {adapter.name!r}; give one of them another `name`")
        # A plain list: adapters are modules of the objective, not of the frozen base.
        object.__setattr__(self, "_adapters", [*self.adapters, adapter])

    @contextmanager
    def only(self, adapters: Sequence[Adapter]) -> Iterator[None]:
        """Activate exactly these adapters inside the context; restore the previous state after it."""
        before = {id(a): a.active for a in self.adapters}
        wanted = {id(a) for a in adapters}
        if unknown := [a.name for a in adapters if id(a) not in before]:
            raise ValueError(f"adapters {unknown} are not attached to this base")
        for adapter in self.adapters:
            adapter.set_active(id(adapter) in wanted)
        try:
            yield
        finally:
            for adapter in self.adapters:
                adapter.set_active(before[id(adapter)])

    def components(self) -> dict[str, nn.Module]:
        """Modules by the names that diffusers pipelines use: unet, text_encoder, text_encoder_2, vae."""
        named: dict[str, nn.Module] = {"unet": self.unet, "vae": self.vae}
        for i, encoder in enumerate(self.text_encoders):
            named["text_encoder" if i == 0 else f"text_encoder_{i + 1}"] = encoder
        return named


class StableDiffusion(Base):
    """SD1.x and SD2.x: one text encoder; states after its final layer norm."""

    family = "sd"

    def encode_text(self, input_ids: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Ids, one `[B, S]`, to states `[B, S, E]`; E is 768 for SD1 and 1024 for SD2. There is no pooled state."""
        return self.text_encoders[0](self.shown(input_ids)[0]).last_hidden_state, None


class StableDiffusionXL(Base):
    """SDXL: penultimate states of two encoders side by side, pooled projection of the second."""

    family = "sdxl"
    needs_time_ids = True

    def encode_text(self, input_ids: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Ids, two `[B, S]`, to states `[B, S, 768 + 1280]` and the pooled state `[B, 1280]` of the second encoder."""
        states, pooled = [], None
        for encoder, ids in zip(self.text_encoders, self.shown(input_ids), strict=True):
            out = encoder(ids, output_hidden_states=True)
            states.append(out.hidden_states[-2])
            pooled = out[0]  # the last encoder's `text_embeds`
        return torch.cat(states, dim=-1), pooled

    def _added_conditioning(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        if conditioning.pooled is None or conditioning.time_ids is None:
            raise ValueError("SDXL needs pooled text states and time ids")
        return {"text_embeds": conditioning.pooled.to(self.dtype), "time_ids": conditioning.time_ids.to(self.device)}


def _at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _pool_at_end_token(encoder: Any, tokenizer: Any) -> None:
    """Pool at the tokenizer's end token.

    Published configs carry `eos_token_id = 2`, which makes transformers pool at the largest id: with
    an added token that is the placeholder instead of the end of the sentence.
    """
    inner = getattr(encoder, "text_model", encoder)
    inner.eos_token_id = tokenizer.eos_token_id
    encoder.config.eos_token_id = tokenizer.eos_token_id
