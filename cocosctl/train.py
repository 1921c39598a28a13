"""`cocosctl train`: a prepared dataset -> a run folder with a model in it."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from cocosctl import options
from cocosctl.output import Output
from cocosnet.config import Config, config_to_dict, config_to_yaml, load_config

SECONDS_BETWEEN_LINES = 10.0


def train(
    config: Annotated[str, Argument(metavar="CONFIG", show_default=False, help="A preset's name or a YAML file.")],
    data: Annotated[Path, Option("--data", metavar="DIR", show_default=False, help="A folder made by `prepare`.")],
    output: Annotated[Path, Option("--output", "-o", metavar="RUN", show_default=False, help="The run's folder.")],
    overrides: options.Set = None,
    device: options.Device = "auto",
    seed: options.Seed = None,
    workers: options.Workers = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a model on a prepared dataset.

    RUN gets the resolved config, checkpoints, stats.jsonl, sample grids and, at its end, model.safetensors. The same
    command goes on from the last checkpoint; Ctrl-C and SIGTERM save one first and exit with 75.
    """
    out = Output(as_json, quiet, verbose)
    named = {"seed": seed, "workers": workers}
    flags = [f"train.{key}={value}" for key, value in named.items() if value is not None]
    resolved = load_config(config, (overrides or []) + flags)
    if dry_run:
        _describe(resolved, out)
        return
    from cocosnet.checkpoint import resolve_device
    from cocosnet.train.trainer import Trainer

    trainer = Trainer(resolved, data, output, resolve_device(device), on_tick=_Ticker(out))
    model = trainer.train()
    if trainer.ranks.writes:
        out.row({"model": str(model)}, str(model))


class _Ticker:
    """Tells of the steps: each as JSON on stdout where asked for, otherwise now and then a line on stderr."""

    def __init__(self, out: Output) -> None:
        self.out, self.told = out, -math.inf

    def __call__(self, tick: dict[str, Any]) -> None:
        if self.out.as_json:
            self.out.row(tick, "")
        elif time.monotonic() - self.told > SECONDS_BETWEEN_LINES or tick["images"] >= tick["of"]:
            self.told = time.monotonic()
            self.out.note(
                "  ".join(
                    f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in tick.items()
                )
            )


def _describe(config: Config, out: Output) -> None:
    """The resolved config to stdout, and how large the networks are: in the same object with --json, else on stderr."""
    counts = _parameter_counts(config)
    out.row({"config": config_to_dict(config), "parameters": counts}, config_to_yaml(config).rstrip())
    if not out.as_json:
        out.note(", ".join(f"{name} {count:,} parameters" for name, count in counts.items()))


def _parameter_counts(config: Config) -> dict[str, int]:
    """Parameters of each network, counted without allocating them."""
    import torch

    from cocosnet.train.networks import build_networks

    learned = dataclasses.replace(config, loss=dataclasses.replace(config.loss, perceptual="none"))
    with torch.device("meta") as nowhere:
        networks = build_networks(learned, nowhere, torch.float32)
    named = {"model": networks.model, "mapping": networks.mapping, "discriminator": networks.discriminator}
    return {name: sum(parameter.numel() for parameter in network.parameters()) for name, network in named.items()}
