"""The stock client: an untouched diffusers pipeline of a base, as any user would load it."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import parts_of


def stock_pipeline(base: Base) -> Any:
    """Load the base's directory afresh into a stock pipeline with the scheduler of comparisons, fp32 on the CPU."""
    parts = parts_of(base.source, base.config)
    encoders, tokenizers = parts.pop("text_encoders"), parts.pop("tokenizers")
    force_zeros = parts.pop("force_zeros_for_empty_prompt")
    del parts["scheduler"]  # the base's own may be rescaled
    scheduler = comparison_scheduler(base.scheduler)
    common = {**parts, "scheduler": scheduler, "text_encoder": encoders[0], "tokenizer": tokenizers[0]}
    if len(encoders) == 2:
        pipe = StableDiffusionXLPipeline(
            **common, text_encoder_2=encoders[1], tokenizer_2=tokenizers[1], add_watermarker=False,
            force_zeros_for_empty_prompt=force_zeros,
        )  # fmt: skip
        # Pool at the end token, as training did (see Base); stock configs pool at the largest id.
        pipe.text_encoder_2.text_model.eos_token_id = tokenizers[1].eos_token_id
    else:
        pipe = StableDiffusionPipeline(
            **common, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def comparison_scheduler(scheduler: Any) -> DDIMScheduler:
    """DDIM with another scheduler's noise schedule, as our sampler runs it."""
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def side_of(pipe: Any, index: int) -> tuple[Any, Any]:
    """Tokenizer and text encoder of a pipeline by number."""
    suffix = "" if index == 0 else f"_{index + 1}"
    return pipe.components[f"tokenizer{suffix}"], pipe.components[f"text_encoder{suffix}"]
