"""Writes docs/configuration.md from `EngineConfig` and `SamplingParams` themselves, so that it can't drift.

python -m tools.document_config            # writes; a test holds the file against what this would write
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from offload_engine.cli.options import SAMPLING_NAMES
from offload_engine.config import EngineConfig
from offload_engine.core import SamplingParams
from offload_engine.files import write_aside

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
SIZES = {"gpu_mem", "host_mem", "expert_mem"}

INTRODUCTION = """\
# Every key

<!-- Written by tools/document_config.py from the classes themselves: change the docstrings there, not this file. -->

An engine is set up by the fields of `EngineConfig`. They are one set of names everywhere: keywords of
`Engine.from_pretrained`, keys of a TOML preset (`--config FILE`), and options of the command line, where `_` is written
`-`. An option wins over the preset, the preset over the default. Unknown keys are refused.

Sizes are numbers of bytes, or text such as `8GB` (8·10⁹ bytes), `8GiB` (8·2³⁰) or `900MB`.
"""

BETWEEN = """
Fields of `SamplingParams`, which say how an answer is decoded. They are arguments of a call, not of an engine: keywords
of `SamplingParams`, options of `dmoe-run` and of `dmoe eval`, and fields of a request to the server.
"""


def docstrings(owner: type[BaseModel]) -> dict[str, str]:
    """What stands below each field of a class, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                found[name] = " ".join(words.split())
    return found


def wanted(name: str, info: FieldInfo) -> str:
    """What a field may be, in words."""
    if name in SIZES:
        words = ["auto"] if "auto" in str(info.annotation) else []
        words += ["none"] if NoneType in get_args(info.annotation) else []
        return " or ".join(["a size", *(f"`{word}`" for word in words)])
    if name == "device":
        return "`auto`, `cpu`, `cuda`, `cuda:N`"
    return _kind(info.annotation) + _bounds(info.metadata)


def _kind(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in inner)
    if origin is tuple:
        return "list of text"
    if origin is not None and hasattr(annotation, "__metadata__"):
        return _kind(inner[0]) + _bounds(annotation.__metadata__)
    if origin is Union or inner:
        return " or ".join(_kind(one) for one in inner if one is not NoneType)
    return {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}[annotation]


def _bounds(metadata: Any) -> str:
    words = []
    for one in (inner for item in metadata for inner in getattr(item, "metadata", [item])):
        if isinstance(one, annotated_types.Ge):
            words.append(f"at least {one.ge}")
        elif isinstance(one, annotated_types.Gt):
            words.append(f"above {one.gt}")
        elif isinstance(one, annotated_types.Le):
            words.append(f"at most {one.le}")
    return f", {' and '.join(words)}" if words else ""


def default(info: FieldInfo) -> str:
    """A field's default as it would be written; nothing where leaving it out means something of its own."""
    value = info.default
    if value is None or value == ():
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def table(owner: type[BaseModel], names: dict[str, str]) -> str:
    """One row per field, in the order of the class."""
    texts = docstrings(owner)
    lines = ["| key | option | wanted | default | |", "|---|---|---|---|---|"]
    for name, info in owner.model_fields.items():
        option = f"--{names.get(name, name).replace('_', '-')}"
        lines.append(f"| `{name}` | `{option}` | {wanted(name, info)} | {default(info)} | {texts.get(name, '')} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    return "\n".join(
        [INTRODUCTION, table(EngineConfig, {}), "## Sampling", BETWEEN, table(SamplingParams, dict(SAMPLING_NAMES))]
    )


@click.command(help="Write docs/configuration.md.")
def main() -> None:
    """Write the page."""
    write_aside(PAGE, page().encode())


if __name__ == "__main__":
    main()
