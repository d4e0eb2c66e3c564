"""The model card: what was learned and how, how to load it, what it draws, what verification found."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from lit_personalize import __version__
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.token_rows import pieces_of
from lit_personalize.errors import DataError
from lit_personalize.export.exporter import Exported
from lit_personalize.export.verify import VerifyReport
from lit_personalize.recipe_files import title_of
from lit_personalize.run_directory import RunDirectory

EVALUATION = "evaluation.json"
"""In the run's folder, where `litp evaluate -o` put it: its figures go on the card."""


@dataclass
class Widget:
    """One prompt of the card's gallery, with the newest picture that the run drew for it."""

    prompt: str
    picture: Path | None = None


def loading_snippet(base: Base, files: Sequence[Exported]) -> str:
    """Python lines that load exactly these files with diffusers, run from the run's folder."""
    kind = "StableDiffusionXLPipeline" if base.family == "sdxl" else "StableDiffusionPipeline"
    kinds = {item.kind for item in files}
    if "pipeline" in kinds and not kinds & {"diffusers", "embedding"}:
        return f'from diffusers import {kind}\n\npipe = {kind}.from_pretrained("exports/pipeline")'
    lines = [f"from diffusers import {kind}", "", f'pipe = {kind}.from_pretrained("BASE")  # {Path(base.source).name}']
    for item in files:
        if item.kind == "oft" and "diffusers" not in kinds:
            component = item.path.name
            lines.append("from peft import PeftModel")
            lines.append(f'pipe.{component} = PeftModel.from_pretrained(pipe.{component}, "exports/{item.name}")')
        if item.kind == "diffusers":
            lines.append(f'pipe.load_lora_weights("exports", weight_name="{item.path.name}")')
    embeddings = [f for f in files if f.kind == "embedding"]
    if base.family == "sdxl" and embeddings:
        lines.append("# Trained with the pooled state of the end token; published configs pool at the largest id.")
        lines.append("pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id")
    pairs = {f.token for f in embeddings if f.encoder is not None}
    for item in embeddings:
        if names := pieces_of(item.token):  # a list of names takes a tensor, one row for each
            lines += ["from safetensors.torch import load_file", f'rows = load_file("exports/{item.path.name}")']
            sides = (("clip_l", ""), ("clip_g", "_2")) if base.family == "sdxl" else ((item.token, ""),)
            for key, side in sides:
                into = f"text_encoder=pipe.text_encoder{side}, tokenizer=pipe.tokenizer{side}"
                lines.append(f'pipe.load_textual_inversion(rows["{key}"], token={json.dumps(names)}, {into})')
        elif base.family != "sdxl":
            lines.append(
                f'pipe.load_textual_inversion("exports", weight_name="{item.path.name}", token="{item.token}")'
            )
        elif item.encoder is not None:
            side = "" if item.encoder == 0 else f"_{item.encoder + 1}"
            lines += [
                f'pipe.load_textual_inversion("exports/textual_inversion", weight_name="{item.path.name}",',
                f"                            text_encoder=pipe.text_encoder{side}, tokenizer=pipe.tokenizer{side})",
            ]
        elif item.token not in pairs:
            lines += ["from safetensors.torch import load_file", f'rows = load_file("exports/{item.path.name}")']
            for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
                lines += [
                    f'pipe.load_textual_inversion({{"{item.token}": rows["{key}"]}}, token="{item.token}",',
                    f"                            text_encoder=pipe.text_encoder{suffix}, "
                    f"tokenizer=pipe.tokenizer{suffix})",
                ]
    return "\n".join(lines)


def widgets_of(run: RunDirectory, prompts: Sequence[str]) -> list[Widget]:
    """Prompts with the pictures of the newest column of the sample grid, one each."""
    drawn: dict[str, Path] = {}
    for record_file in sorted(run.samples.glob("step-*/samples.json")):
        record = json.loads(record_file.read_text(encoding="utf-8"))
        seeds = len(record["seeds"])
        for row, prompt in enumerate(record["prompts"]):
            drawn[prompt] = record_file.parent / record["pictures"][row * seeds]
    return [Widget(prompt, drawn.get(prompt)) for prompt in prompts]


def recipe_rows(config: Path) -> list[tuple[str, str]]:
    """What decides a result, from the run's resolved configuration; no paths."""
    loaded: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
    model, data = (loaded.get(part) or {} for part in ("model", "data"))
    options, pictures = (part.get("init_args") or {} for part in (model, data))
    rows = [("objective", _call({"class_path": model.get("class_path", "")}))]
    rows += [("adapter", _call(adapter)) for adapter in options.get("adapters") or []]
    rows.append(("optimizer", _call(options.get("optimizer") or {})))
    for name in ("prior_weight", "snr_gamma", "noise_offset", "caption_dropout", "dtype", "seed"):
        if options.get(name) is not None:
            rows.append((name, str(options[name])))
    rows.append(("steps", str((loaded.get("trainer") or {}).get("max_steps", ""))))
    for name in ("batch_size", "resolution", "augmentation"):
        if pictures.get(name) is not None:
            rows.append((name, str(pictures[name])))
    digest = hashlib.sha256(config.read_bytes()).hexdigest()[:16]
    return [*((name, value) for name, value in rows if value), ("configuration", f"`config.yaml` ({digest})")]


def _call(described: dict[str, Any]) -> str:
    """`LoRA(rank=4, targets=attention)` of a class path and its options; switched-off ones are left out."""
    name = str(described.get("class_path", "")).rpartition(".")[2]
    off = (None, False, "")
    given = [f"{k}={v}" for k, v in (described.get("init_args") or {}).items() if v not in off and k != "name"]
    return f"`{name}({', '.join(given)})`" if given else f"`{name}`" if name else ""


def figure_rows(run: RunDirectory) -> list[tuple[str, str, str, str]]:
    """Last loss and, where the run was evaluated, every metric beside real pictures and the untouched base.

    Raises:
        DataError: The evaluation is not one that `litp evaluate -o` wrote.
    """
    rows: list[tuple[str, str, str, str]] = []
    if run.metrics.is_file():
        with run.metrics.open(encoding="utf-8", newline="") as stream:
            losses = [row["loss"] for row in csv.DictReader(stream) if row.get("loss")]
        if losses:
            last = [float(loss) for loss in losses[-20:]]
            rows.append((f"loss, mean of the last {len(last)} records", f"{sum(last) / len(last):.4f}", "", ""))
    evaluation = run.path / EVALUATION
    if evaluation.is_file():
        try:
            figures = json.loads(evaluation.read_text(encoding="utf-8"))["figures"]
            for name, found in figures.items():
                numbers = (found["value"], found["oracle"], found["floor"])
                value, oracle, floor = ("" if x is None else f"{x:.4f}" for x in numbers)
                rows.append((name, value, oracle, floor))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{evaluation} is not a report of `litp evaluate -o`: {error!r}; remove it") from error
    return rows


def _front_matter(
    base: Base,
    weights: AdapterWeights,
    prompts: Sequence[str],
    widgets: Sequence[Widget],
    run: RunDirectory,
    terms: str,
    loras: bool,
) -> str:
    """YAML that model hubs read."""
    tokens = sorted(weights.tokens)
    tags = ["text-to-image", "diffusers", "stable-diffusion-xl" if base.family == "sdxl" else "stable-diffusion"]
    tags += ["lora", "template:sd-lora"] if loras else []
    tags += ["textual_inversion"] if tokens else []
    head: dict[str, Any] = {"base_model": Path(base.source).name, "library_name": "diffusers"}
    if terms:
        head["license"] = terms
    head |= {"pipeline_tag": "text-to-image", "tags": [*tags, "lit-personalize"]}
    if tokens:
        head["instance_prompt"] = next((p for p in prompts if any(t in p for t in tokens)), tokens[0])
    if widgets:
        head["widget"] = [
            {"text": w.prompt}
            | ({"output": {"url": w.picture.relative_to(run.path).as_posix()}} if w.picture is not None else {})
            for w in widgets
        ]
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]


def write_card(
    run: RunDirectory,
    base: Base,
    weights: AdapterWeights,
    files: Sequence[Exported],
    prompts: Sequence[str],
    report: VerifyReport | None,
    license_name: str = "",
) -> Path:
    """Write `README.md` of the run, with front matter that model hubs read.

    Args:
        prompts: Of the gallery; those with a trigger word first make the instance prompt.
        license_name: The user's choice; without one the card names none.
    """
    tokens = sorted(weights.tokens)
    loras = any(item.kind in ("diffusers", "kohya", "peft") for item in files)
    front = _front_matter(base, weights, prompts, widgets_of(run, prompts), run, license_name, loras)
    body = ["---", front + "---", "", f"# {run.name}", ""]
    by = f"{title_of(run.recipe)}, trained" if run.recipe else "Trained"
    body += [f"{by} with lit-personalize {__version__} on `{Path(base.source).name}` (`{base.fingerprint}`)."]
    if tokens:
        body += ["", f"Trigger words: {', '.join(f'`{t}`' for t in tokens)}."]
    grid = run.samples / "grid.png"
    if grid.exists():
        with Image.open(grid) as image:
            width = min(image.width, 900)
        body += ["", f'<img src="samples/grid.png" width="{width}" alt="prompts by training step">']
    body += ["", "## Load it", "", "```python", loading_snippet(base, files), "```", "", "## Files", ""]
    checked = {f.file: f for f in report.files} if report else {}
    rows = []
    for item in files:
        found = checked.get(item.name)
        figures = [str(found.layers), f"{found.largest_error:.1e}"] if found else ["", "not checked"]
        rows.append([f"`exports/{item.name}`", item.kind, *figures])
    body += _table(["file", "kind", "layers", "largest error after reloading"], rows)
    body += [f"\n`exports/{item.name}` leaves out {item.left_out}." for item in files if item.left_out]
    body += [f"\nLoRA files hold {kept}." for kept in dict.fromkeys(item.kept for item in files) if kept]
    if report and report.picture_difference is not None:
        most = f"{report.picture_difference:.4f}"
        body += ["", f"A stock pipeline and the trainer's sampler differ by at most {most} per pixel."]
    if run.config.is_file():
        method = [("method", title_of(run.recipe))] if run.recipe else []
        body += ["", "## Recipe", "", *_table(["what", "value"], [*method, *recipe_rows(run.config)])]
    if figures_ := figure_rows(run):
        body += ["", "## Figures", "", *_table(["figure", "adapter", "real pictures", "untouched base"], figures_)]
    body += ["", "The configuration is `config.yaml`; `sheet.png` shows what the model saw.", ""]
    return run.write_text("README.md", "\n".join(body))
