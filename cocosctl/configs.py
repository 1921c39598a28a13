"""`cocosctl config`: list, show, check and compare configs."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument

from cocosctl import options
from cocosctl.output import Output
from cocosnet.config import check_trainable, config_to_dict, config_to_yaml, config_values, load_config, preset_names

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="List, show, check and compare configs.")
Source = Annotated[str, Argument(metavar="CONFIG", show_default=False, help="A preset's name or a YAML file.")]


@app.command("list")
def list_configs(as_json: options.Json = False) -> None:
    """List the shipped presets."""
    out = Output(as_json)
    for name in preset_names():
        out.row({"name": name}, name)


@app.command()
def show(config: Source, overrides: options.Set = None, as_json: options.Json = False) -> None:
    """Print a config with every default filled in."""
    out = Output(as_json)
    resolved = load_config(config, overrides or [])
    out.row(config_to_dict(resolved), config_to_yaml(resolved).rstrip())


@app.command()
def validate(config: Source, overrides: options.Set = None, as_json: options.Json = False) -> None:
    """Check a config; exit code 3 and one line where it is wrong."""
    check_trainable(load_config(config, overrides or []))
    Output(as_json).row({"config": config, "valid": True}, f"{config}: valid")


@app.command()
def diff(
    first: Annotated[str, Argument(metavar="A", show_default=False, help="A preset's name or a YAML file.")],
    second: Annotated[str, Argument(metavar="B", show_default=False, help="A preset's name or a YAML file.")],
    as_json: options.Json = False,
) -> None:
    """Print the values in which two configs differ."""
    out = Output(as_json)
    before, after = config_values(load_config(first)), config_values(load_config(second))
    for key in before:
        if before[key] != after[key]:
            out.row({"key": key, "a": before[key], "b": after[key]}, f"{key}: {before[key]} -> {after[key]}")
