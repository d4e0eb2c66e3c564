"""The model card: what was learned, how to load it, what it draws, what verification found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lit_personalize import __version__
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.export.exporter import Exported
from lit_personalize.export.verify import VerifyReport
from lit_personalize.run_directory import RunDirectory


def loading_snippet(base: Base, files: Sequence[Exported]) -> str:
    """Python lines that load exactly these files with diffusers, run from the run's folder."""
    kind = "StableDiffusionXLPipeline" if base.family == "sdxl" else "StableDiffusionPipeline"
    lines = [f"from diffusers import {kind}", "", f'pipe = {kind}.from_pretrained("BASE")  # {Path(base.source).name}']
    for item in files:
        if item.kind == "diffusers":
            lines.append(f'pipe.load_lora_weights("exports", weight_name="{item.path.name}")')
        elif item.kind == "embedding" and base.family != "sdxl":
            lines.append(f'pipe.load_textual_inversion("exports", weight_name="{item.path.name}")')
        elif item.kind == "embedding":
            lines += [
                "from safetensors.torch import load_file",
                f'rows = load_file("exports/{item.path.name}")',
                f'pipe.load_textual_inversion({{"{item.token}": rows["clip_l"]}}, token="{item.token}",',
                "                            text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)",
                f'pipe.load_textual_inversion({{"{item.token}": rows["clip_g"]}}, token="{item.token}",',
                "                            text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)",
            ]
    return "\n".join(lines)


def last_pictures(run: RunDirectory) -> list[Path]:
    """PNG files of the newest sample column, or the grid."""
    grid = run.samples / "grid.png"
    return [grid] if grid.exists() else []


def write_card(
    run: RunDirectory,
    base: Base,
    weights: AdapterWeights,
    files: Sequence[Exported],
    prompts: Sequence[str],
    report: VerifyReport | None,
    license_name: str = "",
) -> Path:
    """Write `README.md` of the run, with front matter that model hubs read."""
    tokens = sorted(weights.tokens)
    head = ["---", f"base_model: {Path(base.source).name}", "library_name: diffusers", "tags:"]
    head += ["- text-to-image", "- lora", "- diffusers", "- lit-personalize"]
    if tokens:
        head.append(f'instance_prompt: "{prompts[0] if prompts else tokens[0]}"')
    if license_name:
        head.append(f"license: {license_name}")
    pictures = last_pictures(run)
    if prompts:
        head.append("widget:")
        head += [f'- text: "{prompt}"' for prompt in prompts]
    body = [*head, "---", "", f"# {run.name}", ""]
    body += [f"Trained with lit-personalize {__version__} on `{Path(base.source).name}` (`{base.fingerprint}`)."]
    if tokens:
        body += ["", f"Trigger words: {', '.join(f'`{t}`' for t in tokens)}."]
    for picture in pictures:
        with Image.open(picture) as image:
            width = min(image.width, 900)
        relative = picture.relative_to(run.path).as_posix()
        body += ["", f'<img src="{relative}" width="{width}" alt="prompts by training step">']
    body += ["", "## Load it", "", "```python", loading_snippet(base, files), "```", "", "## Files", ""]
    body += ["| file | kind | layers | largest error after reloading |", "| --- | --- | --- | --- |"]
    checked = {f.file: f for f in report.files} if report else {}
    for item in files:
        found = checked.get(item.path.name)
        figures = f"{found.layers} | {found.largest_error:.1e}" if found else " | not checked"
        body.append(f"| `exports/{item.path.name}` | {item.kind} | {figures} |")
    if report and report.picture_difference is not None:
        most = f"{report.picture_difference:.4f}"
        body += ["", f"A stock pipeline and the trainer's sampler differ by at most {most} per pixel."]
    body += ["", "The configuration is `config.yaml`; `sheet.png` shows what the model saw.", ""]
    return run.write_text("README.md", "\n".join(body))
