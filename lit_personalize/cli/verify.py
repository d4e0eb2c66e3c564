"""`litp verify`: reload adapter files through the stock client and compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lit_personalize.cli.console import add_base, add_json, base_of, configure_logging, emit


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="litp verify", description="Reload adapter files through stock diffusers and compare."
    )
    parser.add_argument("files", type=Path, nargs="+", help="adapter files, PEFT folders, or a run directory; "
                        "or corpora, whose rows are compared with their checksums")  # fmt: skip
    add_base(parser)
    parser.add_argument("--prompt", default="a photo")
    add_json(parser)
    options = parser.parse_args(arguments)
    if (options.files[0] / "corpus.json").is_file():
        return verify_corpora(options.files, options.json)
    configure_logging()
    from lit_personalize.errors import DataError
    from lit_personalize.export.verify import adapters_in, exported_of, verify

    paths: list[Path] = []
    for path in options.files:
        folder = path / "exports" if (path / "exports").is_dir() else path
        loadable = any((folder / name).exists() for name in ("adapter_config.json", "model_index.json"))
        found = [folder] if loadable or not folder.is_dir() else adapters_in(folder)
        if not found:
            raise DataError(f"{folder} holds no adapter file; name a .safetensors file or a run")
        paths += found
    base = base_of(options)
    report = verify(exported_of(paths), base, prompt=options.prompt)
    if options.json:
        print(report.to_json(), end="")
        return 0
    for item in report.files:
        if item.kind == "pipeline":
            print(f"{item.file}: pipeline, loads in the stock client; only an export compares its weights")
            continue
        print(f"{item.file}: {item.kind}, {item.layers} layers, largest relative error {item.largest_error:.1e}")
        if item.ranks:
            print(f"  ranks {item.ranks}, scales {item.scales}, {item.coverage} attention layers of the UNet")
    if report.picture_difference is not None:
        print(f"stock pipeline and our sampler differ by at most {report.picture_difference:.4f} per pixel")
    return 0


def verify_corpora(folders: list[Path], as_json: bool) -> int:
    """Read every byte of every corpus.

    Raises:
        VerificationError: A shard or row is damaged.
    """
    from lit_personalize.corpus.store import Corpus
    from lit_personalize.errors import VerificationError

    corpora = [Corpus.open(folder) for folder in folders]
    if damage := [line for corpus in corpora for line in corpus.verify()]:
        raise VerificationError("; ".join(damage) + ": restore the files, or pack the adapters again")
    rows: dict[str, Any] = {str(corpus.folder): len(corpus) for corpus in corpora}
    told = {folder: f"{n} rows, all as they were written" for folder, n in rows.items()}
    emit({"rows": rows} if as_json else told, as_json)
    return 0
