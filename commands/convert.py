"""``mixkv convert``: a GGUF model as a folder of safetensors."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..models.errors import CheckError
from .options import AsJson
from .shell import Bars, print_table, reported, size


@reported
def convert(
    model: Annotated[str, typer.Argument(help="A GGUF model: registry name, .gguf file, hf: or pypi: name.")],
    folder: Annotated[Path, typer.Argument(help="The folder to make; must not exist.")],
    dtype: Annotated[
        str, typer.Option(help="Type of all tensors: f32, which changes no number, bf16 or f16, rounded to nearest.")
    ] = "f32",
    logits: Annotated[
        bool, typer.Option(help="Compare logits too, for which the model must fit into memory as float32.")
    ] = True,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Write a GGUF model as config.json, tokenizer.json and safetensors, and make sure that it is the same model.

    The folder is read back before it gets its name: every tensor, the config, token ids of a few texts, and the logits of
    a few tokens must be those of the file. Where one is not, nothing is left, and the exit code is 8.
    """
    from ..experiments.convert import convert as run

    with Bars(quiet) as bars:
        report = run(
            model, folder, dtype, logits=logits, writing=bars.bar("writing"), checking=bars.bar("comparing"),
            download=bars.bar("downloading"),
        )  # fmt: skip
    if as_json:
        print(json.dumps(report))
    else:
        shown = report | {"bytes": size(report["bytes"]), "files": ", ".join(report["files"])}
        shown["differences"] = "; ".join(report["differences"]) or "none"
        print_table(shown)
    if not report["same"]:
        raise CheckError(f"{folder}: not kept: {report['differences'][0]}")
