"""The training run: a folder that says all about itself, and a loop that can be stopped and resumed at any step.

RUN/config.yaml  stats.jsonl  model.safetensors  best.safetensors  samples/IMAGES.jpg  stopped (see `Trainer.train`)
    checkpoints/state-IMAGES.pt  checkpoints/model-IMAGES.safetensors  .lock (held by the run that is at work)
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
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
from cocosnet.config import Config, check_trainable, config_to_yaml
from cocosnet.data.dataset import PairDataset, as_prepared
from cocosnet.data.images import save_image, to_image
from cocosnet.errors import CheckpointError, CocosError, ConfigError, OutputError, Stopped
from cocosnet.files import atomic_path, atomic_write, cannot_write, only_one
from cocosnet.launcher import usable_cores
from cocosnet.metrics.registry import get_metric
from cocosnet.model.cocosnet import Output
from cocosnet.precision import pick_precision
from cocosnet.train.batches import Answers, Batch, StepBatches, make_sample, stack, step_generator
from cocosnet.train.distributed import Ranks
from cocosnet.train.ema import Ema
from cocosnet.train.networks import build_networks, speed_up
from cocosnet.train.runlog import Averages, RunLog, TensorBoard, fetch, memory_mib
from cocosnet.train.samples import sample_grid
from cocosnet.train.state import (
    check_same_run,
    has_state,
    load_state,
    newest_state,
    prune,
    random_state,
    save_state,
    set_random_state,
    settled_values,
)
from cocosnet.train.steps import Stepping, discriminator_step, generator_step
from cocosnet.train.validation import validate

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # each asks to save and stop
SKIP_LIMIT = 20  # steps in a row whose numbers are not finite, before the run gives up
HEARTBEAT = 2.0  # s between two looks of a loading process whether the trainer still lives
SAMPLE_ROWS = 4
_SAMPLE_STREAM = 2  # of random numbers, see batches.step_generator


class Trainer:
    """Learns from a prepared folder into a run folder, and goes on where the run folder's newest state left off.

        Trainer(config, data_folder, run_folder, device="auto").train()

    resume: "auto" goes on from the newest state of the run folder that can be read, and starts where there is none;
    "never" refuses a folder that has one; anything else is the file of a state to go on from.
    on_tick is called after a step, where tick_seconds have gone by since it last was, and after the last step, with a
    dict: images, of, seconds (of this process), images_per_second,
    seconds_left, lr_g, lr_d, memory_mib, data_wait (share of the time since the last log line that went by waiting for
    data), and the last step's losses and measures as floats (those that have a value).

    Raises (here or in `train`):
        ConfigError: the run folder was made with another config. DataError: the data cannot be used.
        MissingWeights, MissingDependency: the perceptual network's weights, or the device, are not here.
        CheckpointError: there are states in the run folder but none can be read, or one does not fit.
        Stopped: SIGINT, SIGTERM or SIGUSR1; the state was saved.
    Once the run has begun, DataError (a picture is damaged) and ConfigError (the numbers have ceased to be finite) come
    with the state saved, and on every rank; OutputError (the disk is full) on every rank, without. OutputError is also
    raised where another run, of this process or another, trains into the run folder.
    """

    def __init__(
        self,
        config: Config,
        data_folder: str | Path,
        run_folder: str | Path,
        device: str | torch.device = "auto",
        on_tick: Callable[[dict[str, Any]], None] | None = None,
        resume: str | Path = "auto",
        tick_seconds: float = 0.0,
    ):
        check_trainable(config)
        if os.path.realpath(run_folder) == os.path.realpath(data_folder):
            raise ConfigError(f"{run_folder}: holds the data; choose another folder for the run")
        self.config = config = as_prepared(data_folder, config)
        self.run, self.resume = Path(run_folder), str(resume)
        self.ranks = Ranks.join(resolve_device(device), config.train.batch)
        self.device = self.ranks.device
        self.stepping = Stepping(config.train.accumulate, config.train.clip)
        self.on_tick, self.tick_seconds, self._ticked = on_tick if self.ranks.writes else None, tick_seconds, -math.inf
        self.batches = StepBatches(PairDataset(data_folder, config, split="train"), config, self.ranks.share)
        self.held_out = PairDataset(data_folder, config, split="val")
        precision = pick_precision(config.train.precision, self.device)
        begun = has_state(self.run / "checkpoints") or self.resume not in ("auto", "never")
        self.networks = build_networks(
            config,
            self.device,
            precision,
            init="" if begun else config.train.init,  # what the run started from is not needed any more
            ranks=self.ranks,
        )
        self.optimizer_g = self._adam(self.networks.generator_parameters(), config.train.lr_g)
        self.optimizer_d = self._adam(list(self.networks.discriminator.parameters()), config.train.lr_d)
        self.ema = Ema(self.networks.model, config.train.ema_images)
        speed_up(self.networks, checkpointing=config.train.checkpointing, compiled=config.train.compile)
        self.log, self.averages = RunLog(self.run / "stats.jsonl"), Averages()
        self.board: TensorBoard | None = None
        self.images, self.skipped, self.stop_signal = 0, 0, 0
        self._unheard: CocosError | None = None
        self._held = contextlib.ExitStack()  # the run folder, which rank 0 holds from `load` to the end of `train`
        self.best = math.inf  # the least `train.val_metric` so far

    def train(self) -> Path:
        """Run to `train.images`. Returns the path of the averaged model, `RUN/model.safetensors`.

        A run that a signal stopped leaves the file RUN/stopped, for launchers that do not pass the exit code on.
        """
        self.ranks.write(self._rehearse)
        with self._held:
            self.load()
            self._learn()
            self.save()
        self.ranks.leave()
        return self.run / "model.safetensors"

    def _learn(self) -> None:
        """All steps that are left."""
        self._logged, self._waited = (self.images, time.monotonic()), 0.0
        self._started = self._logged
        with self._signals(), self._board_closed():
            for batch in self._timed(self._loader()):
                with self._saved_on_failure():
                    self.ranks.together(lambda batch=batch: _raise_failure(batch))
                    self.train_step(batch)
                    self._report()
                if self.ranks.any(bool(self.stop_signal or self._unheard)):
                    self._stop()

    def train_step(self, batch: Batch) -> None:
        """One step of the generator and, once the adversarial loss has set in, one of the discriminator (Section 4)."""
        batch, adversarial_on = batch.to(self.device), self._adversarial_on()
        self._warm_up()
        result = generator_step(
            self.networks,
            self.optimizer_g,
            batch,
            self.config.loss,
            adversarial_on=adversarial_on,
            stepping=self.stepping,
        )
        applied, parts = result.applied, result.parts
        if adversarial_on and applied:
            judged = discriminator_step(self.networks, self.optimizer_d, batch, result.image, self.stepping)
            applied, parts = judged.applied, {**parts, **judged.parts}
        self.images += self.config.train.batch
        if result.applied:
            self.ema.update(self.networks.model, self.images, self.config.train.batch)
        self._count_skips(applied)
        if applied:
            self.averages.add(parts)
        self._last = parts

    def save(self) -> None:
        """Write the state and the averaged model. All ranks must call it; rank 0 writes.

        The weights of all ranks are the same; their random states are gathered.
        """
        random = self.ranks.gather(random_state(self.device))
        self.ranks.write(lambda: self._write_state(random))

    def _write_state(self, random: list[dict[str, torch.Tensor]]) -> None:
        folder = self.run / "checkpoints"
        save_state(folder, self.images, {**self._state(), "random": random})
        path = folder / f"model-{self.images:09d}.safetensors"
        save_model(path, self.ema.settled(), {"cocosctl.images": str(self.images)})
        prune(path)
        with atomic_path(self.run / "model.safetensors") as temporary:
            shutil.copyfile(path, temporary)

    def load(self) -> None:
        """Take up a state as `resume` says, or start; all ranks must find the same one."""
        passed_over: list[str] = []
        chosen = self._chosen_state(passed_over.append)
        torch.manual_seed(self.config.train.seed + self.ranks.rank)
        if chosen is not None:
            check_same_run(*chosen, self.config)
            self._restore(*chosen)
        if self.ranks.largest(self.images) != -self.ranks.largest(-self.images):
            raise CheckpointError(
                f"{self.run}: the processes found different states; is this folder shared by all nodes?"
            )
        self.ranks.write(lambda: self._take_folder(passed_over, resumed=chosen is not None))

    def _take_folder(self, passed_over: list[str], resumed: bool) -> None:
        """Make the run folder say where the run stands, without what is going to be done again.

        From here on it is this run's alone: two would write each other's states and log.
        """
        self._held.close()  # where it was loaded before
        self._held.enter_context(only_one(self.run, "train"))
        folders = self.run, self.run / "checkpoints", self.run / "samples"
        for path in [self.run / "stopped", *(path for folder in folders for path in folder.glob(".tmp-*"))]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(path, error) from error
        self.log.rewind(self.images)
        for text in passed_over:
            self._warn(text)
        if resumed:
            self.log.note(self.images, "resumed")
            logger.info("%s: goes on at %d of %d images", self.run, self.images, self.config.train.images)
        atomic_write(self.run / "config.yaml", config_to_yaml(self.config))
        if self.config.train.tensorboard:
            self.board = TensorBoard(self.run / "tensorboard", self.images)

    def _rehearse(self) -> None:
        """Meet at once what would otherwise end the run at its first sample grid or validation."""
        if self._comes_to(self.config.train.sample_images):
            self._sample_batch()
        if self._validates():
            get_metric(self.config.train.val_metric, device=str(self.device), seed=self.config.train.seed)

    def _validates(self) -> bool:
        """Whether this run will come to a validation."""
        return len(self.held_out) > 0 and self._comes_to(self.config.train.val_images)

    def _comes_to(self, images: int) -> bool:
        """Whether this run is long enough for what is due every so many images; 0 is never."""
        train = self.config.train
        return 0 < images <= -(-train.images // train.batch) * train.batch

    def sample(self) -> None:
        """Write a grid of held-out pairs (of training pairs where none are held out) by the averaged model."""
        batch = self._sample_batch().to(self.device)
        with self.networks.autocast():
            grid = sample_grid(self.ema.settled(), batch)
        save_image(to_image(grid), self.run / "samples" / f"{self.images:09d}.jpg")
        if self.board:
            self.board.picture(self.images, grid)

    def validate(self) -> None:
        """Measure the averaged model on the held-out pairs; the best one so far is kept as RUN/best.safetensors."""
        model, train = self.ema.settled(), self.config.train

        def run(*inputs: torch.Tensor) -> Output:
            with self.networks.autocast():  # the networks alone: measures are float32
                return model(*inputs)

        values = validate(run, self.held_out, self.config, self.device, train.at_once(self.ranks.size))
        self._log(values)
        value = values[f"val_{train.val_metric}"]
        if value < self.best:
            self.best = value
            metadata = {"cocosctl.images": str(self.images), f"cocosctl.val_{train.val_metric}": f"{value:.6g}"}
            save_model(self.run / "best.safetensors", model, metadata)

    def _chosen_state(self, passed_over: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        folder = self.run / "checkpoints"
        if self.resume == "auto":
            return newest_state(folder, passed_over)
        if self.resume == "never":
            if has_state(folder):
                raise ConfigError(f"{self.run}: holds a run already; choose another folder, or resume it")
            return None
        state = load_state(Path(self.resume))
        newer = [path for path in folder.glob("state-*.pt") if path.stem > f"state-{state['images']:09d}"]
        if newer:
            raise ConfigError(f"{newer[0]}: is newer than {self.resume}; remove it, or go on in another folder")
        return Path(self.resume), state

    def _warm_up(self) -> None:
        """Match one level more after every `train.level_warmup` images, in the averaged model too.

        One that was the best with fewer levels was not measured as it will be used, so it is best no more.
        """
        warmup, before = self.config.train.level_warmup, self.images - self.config.train.batch
        if not warmup or not hasattr(self.networks.model, "hierarchy"):
            return
        levels = len(self.networks.model.hierarchy.projections)
        depth = min(1 + self.images // warmup, levels)
        for model in (self.networks.model, self.ema.network):
            model.hierarchy.depth = depth
        if self.images and depth > 1 + before // warmup:
            self.best = math.inf

    def _timed(self, batches: Iterator[Batch | CocosError]) -> Iterator[Batch | CocosError]:
        """The same batches; counts the seconds spent waiting for them."""
        while True:
            since = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - since
            if batch is None:
                return
            yield batch

    def _adam(self, parameters: list[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
        betas = (self.config.train.beta1, self.config.train.beta2)
        return torch.optim.Adam(parameters, lr=rate, betas=betas, fused=True)

    def _adversarial_on(self) -> bool:
        return self.config.loss.adv > 0 and self.images >= self.config.train.adv_start

    def _loader(self) -> Iterator[Batch | CocosError]:
        """Batches from the step at hand to the last one; in the place of one that cannot be made, why."""
        train = self.config.train
        steps = range(self.images // train.batch, -(-train.images // train.batch))
        return iter(
            DataLoader(
                Answers(self.batches),
                batch_size=None,
                sampler=steps,
                num_workers=min(train.workers, usable_cores()),  # PyTorch warns of more, which only wait for each other
                generator=torch.Generator(),  # or it would draw from the global one, differently after a resume
                pin_memory=self.device.type == "cuda",
                worker_init_fn=_ignore_signals,
            )
        )

    def _report(self) -> None:
        """What is due after a step: log line, samples, validation, checkpoint, and the caller's tick."""
        train = self.config.train
        if self._due(train.log_images):
            self.ranks.write(lambda: self._log(self._stats()))
        if self._due(train.sample_images):
            self.ranks.write(self.sample)
        if self._validates() and self._due(train.val_images):
            self.ranks.write(self.validate)
        if self._due(train.save_images):
            self.save()
        self._tell()

    def _tell(self) -> None:
        """Call on_tick where it is time. What it says has to be fetched from the device, so it is not made in vain."""
        now, over = time.monotonic(), self.images >= self.config.train.images
        if self.on_tick is not None and (over or now - self._ticked >= self.tick_seconds):
            self._ticked = now
            try:
                self.on_tick(self._tick())
            except CocosError as error:  # of this process alone: the others are told when all of them meet next
                self._unheard = error

    def _warn(self, text: str) -> None:
        """Into the run's log, and to whoever watches."""
        self.log.note(self.images, text)
        logger.warning("%s: at %d images: %s", self.run, self.images, text)

    def _log(self, values: dict[str, float]) -> None:
        self.log.write(self.images, values)
        if self.board:
            self.board.write(self.images, values)

    def _due(self, every: int) -> bool:
        return self.images // every > (self.images - self.config.train.batch) // every

    def _stats(self) -> dict[str, float]:
        """What has happened since the last log line."""
        (images, since), now = self._logged, time.monotonic()
        self._wait_share = self._waited / max(now - since, 1e-9)
        stats = {
            **self.averages.take(),
            **self._rates(),
            "images_per_second": (self.images - images) / max(now - since, 1e-9),
            "data_wait": self._wait_share,
            "seconds": now - self._started[1],
        }
        self._logged, self._waited = (self.images, now), 0.0
        return stats

    def _rates(self) -> dict[str, float]:
        train = self.config.train
        lr_d = train.lr_d if self._adversarial_on() else 0.0
        return {"lr_g": train.lr_g, "lr_d": lr_d, "memory_mib": memory_mib(self.device)}

    def _tick(self) -> dict[str, Any]:
        (images, since), now = self._started, time.monotonic()
        logged_now = self._logged[0] == self.images  # then the time since the log line before is meant
        speed = (self.images - images) / max(now - since, 1e-9)
        return {
            "images": self.images,
            "of": self.config.train.images,
            "seconds": now - since,
            "images_per_second": speed,
            "seconds_left": max(self.config.train.images - self.images, 0) / max(speed, 1e-9),
            "data_wait": self._wait_share if logged_now else self._waited / max(now - self._logged[1], 1e-9),
            **self._rates(),
            **{name: value for name, value in fetch(self._last).items() if not math.isnan(value)},
        }

    def _count_skips(self, applied: bool) -> None:
        """Give up after too many steps in a row that could not be made."""
        self.skipped = 0 if applied else self.skipped + 1
        if not applied:
            self.ranks.write(lambda: self._warn("step skipped: a loss or a gradient is not finite"))
        if self.skipped >= SKIP_LIMIT:
            raise ConfigError(
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
        return {
            "config": settled_values(self.config),
            "skipped": self.skipped,
            "best": self.best,
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        try:
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
            self.images, self.skipped = state["images"], state["skipped"]
            if (self.run / "best.safetensors").exists():  # not where a state of another folder goes on in this one
                self.best = state.get("best", math.inf)  # states of before there was a validation have none
            set_random_state(state.get("random", []), self.ranks.rank, self.ranks.size, self.device)
        except (KeyError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path}: does not fit these networks: {text}") from error

    def _stop(self) -> None:
        """End a run that a signal has asked to stop, or that nobody can be told of."""
        self.save()
        self.ranks.write(self._mark_stopped)
        self.ranks.leave()
        if self._unheard is not None:
            raise self._unheard
        raise Stopped(f"{self.run}: stopped at {self.images} images; run the same command again to go on")

    def _mark_stopped(self) -> None:
        """For whoever would start the run again by itself, which after an error is of no use."""
        if self._unheard is None:
            atomic_write(self.run / "stopped", f"at {self.images} images\n")

    @contextlib.contextmanager
    def _saved_on_failure(self) -> Iterator[None]:
        """Save the state before an error ends the run, which all ranks must meet; a disk that is full has no room."""
        try:
            yield
        except CocosError as error:
            if not isinstance(error, OutputError):
                self.save()
            self.ranks.leave()
            raise

    @contextlib.contextmanager
    def _board_closed(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self.board:
                self.board.close()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first of SIGNALS into a stop after the step at hand; a second one acts as it always does.

        Under a launcher it does not: that may repeat what the processes were already told, and kills in the end.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}

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


def _raise_failure(batch: Batch | CocosError) -> None:
    if isinstance(batch, CocosError):
        raise batch


def _ignore_signals(worker: int) -> None:
    """A terminal's Ctrl-C and a scheduler's signal reach the loading processes too; the trainer decides their end.

    Its own SIGTERM, by which PyTorch ends a process that is stuck, and its death do end them.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_trainer, args=(os.getppid(),), daemon=True).start()


def _end_with_trainer(parent: int) -> None:
    """End this process, whatever it is at, when the trainer says so or is gone.

    Where processes are forked it is the `parent`. Else that is a server of Python's, which may outlive the trainer.
    """
    trainer = multiprocessing.parent_process()
    while os.getppid() == parent and trainer.is_alive():
        heard = signal.sigtimedwait({signal.SIGTERM}, HEARTBEAT)
        if heard is not None and heard.si_pid == trainer.pid:
            break
    os.kill(os.getpid(), signal.SIGKILL)
