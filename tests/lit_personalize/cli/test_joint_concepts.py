"""Custom Diffusion of three concepts at once: every token learns, and one export holds them all."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.sampling.cells import exports_of
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder, write_shards

CONCEPTS = {"<new1>": "cat", "<new2>": "dog", "<new3>": "toy"}


def test_three_concepts_with_a_regularization_set_each(tiny_bases: dict[str, Path], workplace: Path) -> None:
    """The published scripts always drop the gradient of the last token; here every row moves in two steps."""
    base = tiny_bases["sd1"]
    concepts, sets, adapters = [], [], ["{class_path: KeyValueDelta}"]
    for number, (token, noun) in enumerate(CONCEPTS.items()):
        write_folder(sample_pictures(2, number, kind="object"), workplace / noun)
        for extra in [*(workplace / noun).glob("*.txt"), *(workplace / noun).glob("*.json")]:
            extra.unlink()
        write_shards(sample_pictures(3, 10 + number, kind="object"), workplace / f"reg-{noun}")
        concepts.append(f"{{path: {noun}, class_noun: {noun}, token: {token}}}")
        sets.append(f"{{shards: reg-{noun}/00000.tar}}")
        init = f"init_args: {{token: {token}, init: CLASS, lr: 0.01, weight_decay: 0.0}}"
        adapters.append(f"{{class_path: TokenEmbedding, {init}}}")
    fit = [
        "fit", "-c", "custom_diffusion/sd15", "--name", "run", "--model.init_args.base", str(base),
        "--model.init_args.dtype", "float32", "--model.init_args.adapters", f"[{', '.join(adapters)}]",
        "--data.init_args.concepts", f"[{', '.join(concepts)}]", "--data.init_args.batch_size", "3",
        "--data.init_args.regularization", f"[{', '.join(sets)}]", "--data.init_args.resolution", "32",
        "--trainer.max_steps", "2", "--sampling.prompts", "[a <new1> cat and a <new2> dog and a <new3> toy]",
        "--sampling.steps", "1", "--sampling.seeds", "[0]", "--export.formats", "[diffusers]",
    ]  # fmt: skip
    assert main(fit) == 0
    folder = exports_of(Path("runs/run"))
    built = load_base(base)
    matrix, tokenizer = built.text_encoders[0].get_input_embeddings().weight, built.tokenizers[0]  # type: ignore[operator]
    for token, noun in CONCEPTS.items():
        (row,) = load_file(folder / f"learned_embeds_{token.strip('<>')}.safetensors")[token]
        moved = (row - matrix[tokenizer.convert_tokens_to_ids(f"{noun}</w>")]).abs()
        assert 0.004 < float(moved.median()) < 0.021, f"{token} made two steps of AdamW at 0.01"
    report = json.loads((folder / "verify.json").read_text())
    assert [file["kind"] for file in report["files"]] == ["diffusers", "embedding", "embedding", "embedding"]
    assert report["picture_difference"] <= 1 / 255 + 1e-6, "drawn with all three tokens by the stock client"
    used = [json.loads(line) for line in Path("runs/run/manifest.jsonl").read_text().splitlines()]
    priors = {record["path"].partition("/")[0] for record in used if record["role"] == "regularization"}
    assert priors == {f"reg-{noun}" for noun in CONCEPTS.values()}
