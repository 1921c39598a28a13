"""The training run: a folder that says all about itself, and a loop that can be stopped and resumed at any step.

RUN/config.yaml  stats.jsonl  model.safetensors  samples/IMAGES.jpg
    checkpoints/state-IMAGES.pt  checkpoints/model-IMAGES.safetensors
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from cocosnet.checkpoint import resolve_device, save_model
from cocosnet.config import Config, config_to_dict, config_to_yaml, load_config
from cocosnet.data.dataset import PairDataset
from cocosnet.data.images import save_image, to_image
from cocosnet.errors import CheckpointError, CocosError, ConfigError, Stopped
from cocosnet.files import atomic_path, atomic_write
from cocosnet.train.batches import Batch, StepBatches, make_sample, stack, step_generator
from cocosnet.train.distributed import Ranks
from cocosnet.train.ema import Ema
from cocosnet.train.networks import build_networks, pick_precision
from cocosnet.train.runlog import Averages, RunLog, memory_mib
from cocosnet.train.samples import sample_grid
from cocosnet.train.state import has_state, newest_state, prune, save_state
from cocosnet.train.steps import discriminator_step, generator_step

MAY_CHANGE = ("train.images", "train.log_images", "train.sample_images", "train.save_images", "train.workers")
SKIP_LIMIT = 20  # steps in a row whose numbers are not finite, before the run gives up
SAMPLE_ROWS = 4
_SAMPLE_STREAM = 2  # of random numbers, see batches.step_generator


class Trainer:
    """Learns from a prepared folder into a run folder, and goes on where the run folder's newest state left off.

        Trainer(config, data_folder, run_folder, device="auto").train()

    on_tick is called after every step with a dict: images, of, seconds (of this process), images_per_second, and the
    last step's losses and measures as floats (those that have a value).

    Raises (here or in `train`):
        ConfigError: the run folder was made with another config. DataError: the data cannot be used.
        MissingWeights, MissingDependency: the perceptual network's weights, or the device, are not here.
        CheckpointError: there are states in the run folder but none can be read, or one does not fit.
        Stopped: SIGINT or SIGTERM; the state was saved. CocosError: the numbers have ceased to be finite.
    """

    def __init__(
        self,
        config: Config,
        data_folder: str | Path,
        run_folder: str | Path,
        device: str | torch.device = "auto",
        on_tick: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.config, self.device, self.run = config, resolve_device(device), Path(run_folder)
        self.ranks = Ranks.join(self.device, config.train.batch)
        self.on_tick = on_tick if on_tick and self.ranks.writes else lambda tick: None
        self.batches = StepBatches(PairDataset(data_folder, config, split="train"), config, self.ranks.share)
        self.held_out = PairDataset(data_folder, config, split="val")
        precision = pick_precision(config.train.precision, self.device)
        begun = has_state(self.run / "checkpoints")  # then what the run started from is not needed any more
        self.networks = build_networks(
            config, self.device, precision, init="" if begun else config.train.init, ranks=self.ranks
        )
        self.optimizer_g = self._adam(self.networks.generator_parameters(), config.train.lr_g)
        self.optimizer_d = self._adam(list(self.networks.discriminator.parameters()), config.train.lr_d)
        self.ema = Ema(self.networks.model, config.train.ema_images)
        self.log, self.averages = RunLog(self.run / "stats.jsonl"), Averages()
        self.images, self.skipped, self.stop_signal = 0, 0, 0

    def train(self) -> Path:
        """Run to `train.images`. Returns the path of the averaged model, `RUN/model.safetensors`."""
        self.load()
        self._logged = (self.images, time.monotonic())
        self._started = self._logged
        with self._signals():
            for batch in self._loader():
                self.train_step(batch)
                self._report()
                if self.ranks.any(bool(self.stop_signal)):
                    self.save()
                    self.ranks.leave()
                    raise Stopped(f"{self.run}: stopped at {self.images} images; run the same command again to go on")
        self.save()
        self.ranks.leave()
        return self.run / "model.safetensors"

    def train_step(self, batch: Batch) -> None:
        """One step of the generator and, once the adversarial loss has set in, one of the discriminator (Section 4)."""
        batch, adversarial_on = batch.to(self.device), self._adversarial_on()
        result = generator_step(self.networks, self.optimizer_g, batch, self.config.loss, adversarial_on=adversarial_on)
        applied, parts = result.applied, result.parts
        if adversarial_on and applied:
            judged = discriminator_step(self.networks, self.optimizer_d, batch, result.image)
            applied, parts = judged.applied, {**parts, **judged.parts}
        self.images += self.config.train.batch
        if result.applied:
            self.ema.update(self.networks.model, self.images, self.config.train.batch)
        self._count_skips(applied)
        if applied:
            self.averages.add(parts)
        self._last = parts

    def save(self) -> None:
        """Write the state and the averaged model (rank 0; the states of all ranks are the same)."""
        if not self.ranks.writes:
            return
        folder = self.run / "checkpoints"
        save_state(folder, self.images, self._state())
        path = folder / f"model-{self.images:09d}.safetensors"
        save_model(path, self.ema.settled(), {"cocosctl.images": str(self.images)})
        prune(folder, "model-*.safetensors")
        with atomic_path(self.run / "model.safetensors") as temporary:
            shutil.copyfile(path, temporary)

    def load(self) -> None:
        """Take up the newest state of the run folder; in a folder without one, start."""
        passed_over: list[str] = []
        state = newest_state(self.run / "checkpoints", passed_over.append)
        if state is not None:
            self._check_same_run()
            self._restore(state)
        if not self.ranks.writes:
            return
        self.log.rewind(self.images)
        for text in passed_over:
            self.log.note(self.images, text)
        if state is not None:
            self.log.note(self.images, "resumed")
        atomic_write(self.run / "config.yaml", config_to_yaml(self.config))

    def sample(self) -> None:
        """Write a grid of held-out pairs (of training pairs where none are held out) by the averaged model."""
        batch = self._sample_batch().to(self.device)
        with self.networks.autocast():
            grid = sample_grid(self.ema.settled(), batch)
        save_image(to_image(grid), self.run / "samples" / f"{self.images:09d}.jpg")

    def _adam(self, parameters: list[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
        betas = (self.config.train.beta1, self.config.train.beta2)
        return torch.optim.Adam(parameters, lr=rate, betas=betas, fused=True)

    def _adversarial_on(self) -> bool:
        return self.config.loss.adv > 0 and self.images >= self.config.train.adv_start

    def _loader(self) -> Iterator[Batch]:
        """Batches from the step at hand to the last one."""
        train = self.config.train
        steps = range(self.images // train.batch, -(-train.images // train.batch))
        return iter(
            DataLoader(
                self.batches,
                batch_size=None,
                sampler=steps,
                num_workers=train.workers,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=_ignore_interrupt,
            )
        )

    def _report(self) -> None:
        """What is due after a step: log line, samples, checkpoint, and the caller's tick."""
        train = self.config.train
        if self._due(train.log_images) and self.ranks.writes:
            self._write_stats()
        if self._due(train.sample_images) and self.ranks.writes:
            self.sample()
        if self._due(train.save_images):
            self.save()
        self.on_tick(self._tick())

    def _due(self, every: int) -> bool:
        return self.images // every > (self.images - self.config.train.batch) // every

    def _write_stats(self) -> None:
        train, (images, since) = self.config.train, self._logged
        now = time.monotonic()
        speed = (self.images - images) / max(now - since, 1e-9)
        self.log.write(
            self.images,
            {
                **self.averages.take(),
                "lr_g": train.lr_g,
                "lr_d": train.lr_d if self._adversarial_on() else 0.0,
                "images_per_second": speed,
                "seconds": now - self._started[1],
                "memory_mib": memory_mib(self.device),
            },
        )
        self._logged = (self.images, now)

    def _tick(self) -> dict[str, Any]:
        images, since = self._started
        seconds = time.monotonic() - since
        return {
            "images": self.images,
            "of": self.config.train.images,
            "seconds": seconds,
            "images_per_second": (self.images - images) / max(seconds, 1e-9),
            **{name: float(value) for name, value in self._last.items() if not torch.isnan(value)},
        }

    def _count_skips(self, applied: bool) -> None:
        """Give up, with the state saved, after too many steps in a row that could not be made."""
        self.skipped = 0 if applied else self.skipped + 1
        if not applied and self.ranks.writes:
            self.log.note(self.images, "step skipped: a loss or a gradient is not finite")
        if self.skipped >= SKIP_LIMIT:
            self.save()
            raise CocosError(
                f"{self.run}: {SKIP_LIMIT} steps in a row were not finite; start anew with lower "
                "train.lr_g and train.lr_d, or with train.precision=fp32"
            )

    def _sample_batch(self) -> Batch:
        """The same pairs every time; every other one with a pseudo exemplar."""
        pairs = self.held_out if len(self.held_out) else self.batches.pairs
        generator = step_generator(self.config.train.seed, _SAMPLE_STREAM, 0)
        return stack(
            [
                make_sample(pairs[index], self.config, pseudo=index % 2 == 0, generator=generator)
                for index in range(min(SAMPLE_ROWS, len(pairs)))
            ]
        )

    def _parts(self) -> dict[str, Any]:
        """All that has a state, by its name in the file."""
        networks = self.networks
        parts = {
            "model": networks.model,
            "mapping": networks.mapping,
            "discriminator": networks.discriminator,
            "ema": self.ema.network,
            "optimizer_g": self.optimizer_g,
            "optimizer_d": self.optimizer_d,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, **{name: part.state_dict() for name, part in self._parts().items()}}

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
            self.images, self.skipped = state["images"], state["skipped"]
        except (KeyError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{self.run}: its newest state does not fit these networks: {text}") from error

    def _check_same_run(self) -> None:
        path = self.run / "config.yaml"
        before, now = _flat(config_to_dict(load_config(path))), _flat(config_to_dict(self.config))
        for key in now:
            if before.get(key) != now[key] and key not in MAY_CHANGE:
                raise ConfigError(
                    f"{path}: this run has {key}={before.get(key)}, you ask for {now[key]}; "
                    "go on with the same config or choose another run folder"
                )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a stop after the step at hand; a second one acts as it always does.

        Under a launcher it does not: that may repeat what the processes were already told, and kills in the end.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: Any) -> None:
            self.stop_signal = number
            if self.ranks.size == 1:
                signal.signal(number, before[number])

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _ignore_interrupt(worker: int) -> None:
    """A terminal's Ctrl-C reaches the loading processes too; the trainer decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
