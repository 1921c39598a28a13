"""`cocosctl train`: a prepared dataset -> a run folder with a model in it."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from cocosctl import options
from cocosctl.jobs import own_device
from cocosctl.output import Output
from cocosnet.config import Config, check_trainable, config_to_dict, config_to_yaml, load_config
from cocosnet.errors import ConfigError, memory_named

SECONDS_BETWEEN_LINES = 10.0
_TOLD_APART = (  # what the status line has in words of its own
    *("images", "of", "seconds", "images_per_second", "seconds_left"),
    *("lr_g", "lr_d", "memory_mib", "data_wait"),
)


def train(
    config: Annotated[str, Argument(metavar="CONFIG", show_default=False, help="A preset's name or a YAML file.")],
    data: Annotated[Path, Option("--data", metavar="DIR", show_default=False, help="A folder made by `prepare`.")],
    output: Annotated[Path, Option("--output", "-o", metavar="RUN", show_default=False, help="The run's folder.")],
    overrides: options.Set = None,
    resume: Annotated[
        str, Option("--resume", metavar="auto|never|FILE", help="Go on from the newest valid state, none, or this one.")
    ] = "auto",
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
    command goes on from the last checkpoint; Ctrl-C, SIGTERM and SIGUSR1 save one first and exit with 75.
    --dry-run tells the resolved config, the networks' sizes, and how much memory and time one process will need.
    """
    out = Output(as_json, quiet, verbose)
    named = {"seed": seed, "workers": workers}
    flags = [f"train.{key}={value}" for key, value in named.items() if value is not None]
    resolved = load_config(config, (overrides or []) + flags)
    check_trainable(resolved)
    with memory_named(_too_large):
        if dry_run:
            if data.exists():
                _check(data, resolved, out)
            _describe(resolved, device, out)
        else:
            _train(resolved, data, output, device, resume, out)


def _train(config: Config, data: Path, output: Path, device: str, resume: str, out: Output) -> None:
    """The run. Tells of its steps: of each as JSON on stdout where asked for, else now and then in a line on stderr."""
    from cocosnet.train.trainer import Trainer

    tell = (lambda tick: out.row(tick, "")) if out.as_json else lambda tick: out.note(_status(tick))
    trainer = Trainer(
        config,
        data,
        output,
        own_device(device),
        on_tick=tell if out.as_json or not out.quiet else None,
        tick_seconds=0.0 if out.as_json else SECONDS_BETWEEN_LINES,
        resume=resume,
    )
    if trainer.ranks.writes:
        _remark(data, config, out)
        if not trainer.held_out:
            out.note(
                f"{data}: no picture is held out, so nothing is validated; --set data.val_fraction=0.1 at `prepare`"
            )
    model = trainer.train()
    if trainer.ranks.writes:
        out.row({"model": str(model)}, str(model))


def _remark(data: Path, config: Config, out: Output) -> None:
    """Say what a folder of training pictures lacks, where the run goes on all the same."""
    from cocosnet.data.dataset import remarks

    for remark in remarks(data, config):
        out.note(remark)


def _too_large(error: Exception) -> ConfigError:
    """What a GPU or a machine that is too small said, and what there is to do about it."""
    said = " ".join(str(error).split()).rpartition("DefaultCPUAllocator: ")[2] or "out of memory"
    reason = ". ".join(said.split(". ")[:2]).rstrip(".")
    reason = reason if "memory" in reason else f"out of memory ({reason})"
    return ConfigError(
        f"{reason}; raise train.accumulate, set train.checkpointing=true and model.matching.checkpoint=true, or "
        "lower data.size"
    )


def _status(tick: dict[str, Any]) -> str:
    """One line of a tick: progress and speed, losses and measures, rates, memory, the wait for data, the time left."""
    line = [f"{tick['images']:,}/{tick['of']:,} images", f"{tick['images_per_second']:.3g}/s"]
    line += [f"{name} {value:.4g}" for name, value in tick.items() if name not in _TOLD_APART]
    left = timedelta(seconds=round(tick["seconds_left"]))
    return "  ".join(
        [
            *line,
            f"lr {tick['lr_g']:.3g}/{tick['lr_d']:.3g}",
            f"memory {tick['memory_mib'] / 1024:.2f} GiB",
            f"data wait {tick['data_wait']:.0%}",
            f"left {left}",
        ]
    )


def _check(data: Path, config: Config, out: Output) -> None:
    """Say what is amiss with the folder. Raises DataError where the run would end at once, since it does not fit."""
    from cocosnet.data.dataset import check_prepared

    check_prepared(data, config)
    _remark(data, config, out)


def _describe(config: Config, device: str, out: Output) -> None:
    """The resolved config to stdout, and sizes, memory and time: in the same object with --json, else on stderr."""
    import torch

    from cocosnet.train.estimate import estimate

    counts, needs = _parameter_counts(config), estimate(config, torch.device(own_device(device)))
    values = {"config": config_to_dict(config), "parameters": counts, "estimate": needs}
    out.row(values, config_to_yaml(config).rstrip())
    if not out.as_json:
        out.note(", ".join(f"{name} {count:,} parameters" for name, count in counts.items()))
        taken = timedelta(seconds=round(needs["seconds_per_1000_images"]))
        out.note(
            f"about {needs['memory_mib'] / 1024:.2f} GiB, and {taken} for 1,000 images, in this process; from one "
            f"picture of {needs['probe_size']} px on {needs['device']}"
        )


def _parameter_counts(config: Config) -> dict[str, int]:
    """Parameters of each network that the config has, counted without allocating them."""
    import torch

    from cocosnet.train.networks import build_networks

    learned = dataclasses.replace(config, loss=dataclasses.replace(config.loss, perceptual="none"))
    with torch.device("meta") as nowhere:
        networks = build_networks(learned, nowhere, torch.float32)
    named = {"model": networks.model, "mapping": networks.mapping, "discriminator": networks.discriminator}
    found = {name: network for name, network in named.items() if network is not None}
    return {name: sum(parameter.numel() for parameter in network.parameters()) for name, network in found.items()}
