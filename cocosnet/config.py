"""The one typed config tree: every default lives here, beside its unit and its source.

A preset (`cocosnet/configs/*.yaml`) or a user's YAML file overrides fields; `--set section.key=value` overrides both.
Unknown keys and impossible combinations are refused before any work starts. "paper" below is the CoCosNet v2 paper,
"release" the authors' public code, from which numbers are taken that the paper leaves open.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cocosnet.errors import ConfigError

PRESET_FOLDER = Path(__file__).parent / "configs"
TASKS = ("edge", "mask", "pose")
KINDS = ("cocosnet-v2", "cocosnet", "spade")


@dataclass(frozen=True)
class DataConfig:
    """How pictures become tensors."""

    task: str = "edge"  # what a condition is: edge (1 channel), mask (one-hot labels) or pose
    size: int = 512  # px, shorter side of a prepared picture; training crops squares of this side
    classes: int = 0  # label classes of task mask; one further channel holds "unknown"
    edges: str = "auto"  # hed, hed-small, hed-face, hed-small-face, canny, image (ready-made), a package's, auto
    poses: str = "auto"  # pose extractor: mediapipe, rtmlib, controlnet, openpose (ready-made files), or auto
    pose_maps: str = "limbs"  # limbs: drawn skeleton and 17 distance maps (release); heatmaps: a Gaussian a joint
    crop: str = "none"  # none, square (the centre), face (around landmarks), align (and turned), pad (to a square)
    landmarks: str = ""  # 68 face points a picture, for crop face and align and the edges of faces: JSON, or a detector
    val_fraction: float = 0.05  # share of pictures held out, by a stable hash of their names

    @property
    def condition_channels(self) -> int:
        """Channels of a condition tensor."""
        pose = 18 if self.pose_maps == "heatmaps" else 20
        return {"edge": 1, "mask": self.classes + 1, "pose": pose}[self.task]


@dataclass(frozen=True)
class PrepareConfig:
    """Where `prepare` finds photographs, conditions, splits and pairs. All paths are below SOURCE, but `palette`, and
    a list file of `pairs`, which are looked for from the working folder.

    Patterns of labels: {parent} is the photograph's folder below its photos folder, {stem} its name without suffix,
    {number} that as a number ({number:05d}), {block} the number over 2000, {part} a part of CelebAMask-HQ.
    """

    photos: tuple[str, ...] = ("photos", ".")  # the first of these folders that is there holds the photographs
    suffix: str = ""  # only names that end so are photographs, where label maps lie beside them
    labels: tuple[str, ...] = ("labels/{parent}/{stem}.*",)  # patterns of a photograph's ready-made condition
    kind: str = "index"  # of label maps: index, colours, ade20k-full (its _seg.png), celeba-parts (a file a part)
    palette: str = ""  # for kind colours: JSON list of [r, g, b] by class; found in the files where empty
    only: tuple[str, ...] = ()  # list files; the first that is there names the photographs to take
    any_class: tuple[int, ...] = ()  # take only photographs whose label map has one of these ...
    no_class: tuple[int, ...] = ()  # ... and none of these
    train_lists: tuple[str, ...] = ()  # list files; photographs in neither list are left out where both are there
    val_lists: tuple[str, ...] = ()  # list files; without one, folders or data.val_fraction decide
    val_folders: tuple[str, ...] = ()  # photographs below a folder of this name are held out, the others are not
    pairs: str = "random"  # random, same-item, retrieval, or a list file of "picture,exemplar,.." lines
    pair_lists: tuple[str, ...] = ()  # list files that go before `pairs`, where they are there
    item: str = ""  # regular expression: photographs whose path gives the same match show the same item (else: folder)
    exemplars: int = 5  # how many exemplars a record lists at most
    features: str = "auto"  # network of retrieval: vgg19, vgg16-caffe, or auto
    batch: int = 0  # pictures that a network sees at once; 0: 8 on a GPU, 1 on a processor, where more is no quicker
    pose_canvas: int = 0  # px of the square that ready-made poses count in, after crop: pad; 0: those of the photograph
    pad_value: int = 232  # grey of crop: pad (release)


@dataclass(frozen=True)
class EncoderConfig:
    """The mapping functions M_A and M_B (Eq. 1-2), two U-Nets of the same shape."""

    levels: int = 4  # L, levels of the pyramid; the finest is full resolution, each coarser one half of it
    stem_width: int = 32  # channels of the first convolution, at full resolution (release)
    widths: tuple[int, ...] = (
        64,
        128,
        128,
        128,
    )  # channels from full resolution down; may go deeper than L for context
    spade_hidden: int = 128  # hidden channels of the SPADE layers in the up path (release)
    exemplar_condition: bool = False  # M_B also sees the exemplar's own condition, as in the release (paper: y_B only)

    @property
    def out_widths(self) -> tuple[int, ...]:
        """C_1..C_L, channels of the features, coarse to fine: each fits the skip connection of the next finer scale."""
        return (self.stem_width, *self.widths)[: self.levels][::-1]


@dataclass(frozen=True)
class MatchingConfig:
    """Hierarchical GRU-assisted PatchMatch, N_1..N_L (Section 3.2)."""

    channels: int = 32  # channels of the unit vectors that are compared (release)
    candidates: int = 16  # K of Eq. 8 (release)
    iterations: int = 5  # T, iterations a level (release)
    temperature: float = 0.01  # tau of the softmax over matching scores (release)
    propagation: bool = True  # Eq. 5; off for the second row of Table 5
    refinement: str = "gru"  # gru (Eq. 6), conv (third row of Table 5) or none (first row)
    hidden: int = 32  # channels of the ConvGRU's state (release)
    # what a level starts from: best (the four children of a quarter of the K coarse matches: nearer to the truth where
    # many places look alike) or wide (the K best of the children of K/2 and of K places scattered over the exemplar:
    # nearer to the most alike of all places)
    start: str = "best"
    # what the refinement is told of offsets and scores: relative (to each other, in px), or absolute (over the
    # map's size), which models have whose file does not say; both ours
    inputs: str = "absolute"
    # engine: reference (plain PyTorch), compiled (CPU, numba), triton (CUDA, K up to 32), exact (every level against
    # all positions, without PatchMatch: the oracle), or auto (the quickest at hand)
    backend: str = "auto"
    checkpoint: bool = False  # training computes the refinement twice instead of keeping its activations: less memory
    max_step: float = 3.0  # px of the level, bound of one update dH (ours: dH = max_step * tanh)
    levels: int = 0  # levels that are matched, counted from the coarsest (Table 4); 0: all of the pyramid
    compat: str = "none"  # the authors' release: release (its arithmetic), release-fixed (three mended defects), none
    share_levels: bool = True  # one refinement module for all levels, as the release does; off: one a level


@dataclass(frozen=True)
class TranslatorConfig:
    """The translation network G (Section 3.3)."""

    widths: tuple[int, ...] = (512, 512, 512, 256, 128, 64)  # channels a scale, from 1/32 to full resolution (release)
    blocks: tuple[int, ...] = (1, 2, 1, 1, 1, 1)  # SPADE residual blocks a scale (release)
    spade_hidden: int = 128  # hidden channels of the two convolutions of Eq. 9 (release)
    code_size: int = 16  # px, side of the learned constant code z
    use_condition: bool = False  # also modulate by x_A, as the release does; the paper's Eq. 9 has the warps only


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator D: patch discriminators on an image pyramid."""

    width: int = 64  # channels of the first layer (release)
    layers: int = 4  # strided and plain 4x4 convolutions before the score (release)
    scales: int = 2  # pyramid scales (release)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes of the networks."""

    kind: str = "cocosnet-v2"  # the paper's method, or a system that it compares with: cocosnet (v1) or spade
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    @property
    def matched_levels(self) -> int:
        """Levels of the pyramid that are matched, from the coarsest on: all, one (CoCosNet) or none (SPADE)."""
        return {"cocosnet-v2": self.matching.levels or self.encoder.levels, "cocosnet": 1, "spade": 0}[self.kind]


@dataclass(frozen=True)
class LossConfig:
    """The weights of Eq. 19; the paper states none, so they are the release's unless a comment says otherwise."""

    align: float = 10.0  # lambda_1, Eq. 11
    corr: float = 100.0  # lambda_2, Eq. 12 (release: 500, divided by its batch of 2 a GPU and more; ours: 100)
    # likelihood of the known match of a pseudo exemplar (ours, docs/training.md); 0 leaves it out, as the paper does
    match: float = 0.0
    map: float = 1.0  # lambda_3, Eq. 13-14 (absent from the release; ours)
    sem: float = 1.0  # lambda_4 on Eq. 15, the absolute difference (ours; release: 0.001 of the square)
    contextual: float = 10.0  # lambda_4 u_m on Eq. 16's first term (before the layers' own weights)
    feature: float = 10.0  # lambda_4 eta_m on Eq. 16's second term (before the layers' own weights)
    adv: float = 10.0  # lambda_5, Eq. 18; Eq. 17 is D's own, with an optimiser of its own
    iteration_decay: float = 0.8  # weight 0.8^(T-1-t) of the warp after iteration t in Eq. 12 (ours)
    perceptual: str = "vgg19"  # network phi: vgg19 (torchvision), vgg16-caffe, or none (drops Eq. 15-16)


@dataclass(frozen=True)
class DistortionConfig:
    """The geometric augmentation T that makes a pseudo exemplar of x_B (Section 3.4); the numbers are ours."""

    rotate: float = 15.0  # degrees, uniform in +-
    scale: float = 0.15  # relative, uniform in +-
    translate: float = 0.1  # of the side, uniform in +-
    tps_grid: int = 4  # control points a side of the thin-plate spline
    tps: float = 0.06  # of the side, standard deviation of a control point's shift
    flip: float = 0.0  # probability of a mirrored exemplar


@dataclass(frozen=True)
class TrainConfig:
    """How the networks learn (Section 4)."""

    images: int = 1_000_000  # length of the run, counted in images
    init: str = ""  # checkpoint to start the model from (a file or a shipped name), e.g. one trained at a smaller size
    batch: int = 16  # images a step, over all processes
    lr_g: float = 1e-4  # Adam, generator, encoders, matcher and mapping (paper)
    lr_d: float = 4e-4  # Adam, discriminator (paper: TTUR)
    beta1: float = 0.0  # paper
    beta2: float = 0.999  # paper (release: 0.9)
    ema_images: int = 10_000  # half-life of the averaged weights, in images (ours)
    real_exemplars: float = 0.3  # probability of another picture as exemplar instead of a pseudo exemplar (ours)
    draw_exemplars: bool = True  # that picture is any of the set, drawn anew; off: the one that the manifest names
    adv_start: int = 0  # images before the adversarial loss sets in
    level_warmup: int = (
        0  # images that each finer level is left out for longer than the one before; 0: all from the start
    )
    accumulate: int = 1  # parts that a process's share of a batch is worked off in, one after the other, to save memory
    clip: float = 0.0  # largest norm of a gradient, of G's side and of D's each; 0 is no bound (paper, release: none)
    checkpointing: bool = (
        False  # compute activations of encoders and translator again in the backward pass: less memory
    )
    compile: bool = False  # torch.compile for encoders, translator and discriminator
    precision: str = "auto"  # convolutions: fp32, bf16, or auto (bf16 where the device is quick at it)
    workers: int = 2  # processes that load data, at most one a core that this process may use; 0: none of their own
    seed: int = 1234
    tensorboard: bool = False  # also log to RUN/tensorboard (needs the extra cocosctl[tensorboard])
    log_images: int = 500  # images between two lines of stats.jsonl
    sample_images: int = 10_000  # images between two sample grids
    save_images: int = 10_000  # images between two checkpoints
    val_images: int = 10_000  # images between two validations on the held-out pairs; 0: none
    val_pairs: int = 64  # held-out pairs that a validation looks at
    val_metric: str = "swd"  # what decides which model is kept as best: swd, or fid (needs its weights; many pairs)

    def at_once(self, processes: int) -> int:
        """Pictures that each of so many processes has in the networks at once."""
        return math.ceil(math.ceil(self.batch / processes) / self.accumulate)


@dataclass(frozen=True)
class Config:
    """The whole tree."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distortion: DistortionConfig = field(default_factory=DistortionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def load_config(source: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Build the tree from a preset's name or a YAML file (None: the defaults), then apply `section.key=value`s.

    Raises:
        ConfigError: no such preset or file, malformed YAML, an unknown key, a value of the wrong type, or values that
            contradict each other.
    """
    tree = _read_yaml(source) if source is not None else {}
    return config_from_dict(merge_overrides(tree, overrides))


def merge_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The tree with every `section.key=value` applied, in place. Raises ConfigError for a malformed one."""
    if isinstance(overrides, (str, Mapping)):  # its letters or keys would be taken for overrides
        raise ConfigError(f"overrides must be a list of section.key=value texts, is {overrides!r}")
    for override in overrides:
        _apply_override(tree, override)
    return tree


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """Build and check the tree from nested mappings, e.g. those stored in a checkpoint. Raises ConfigError."""
    config = _build(Config, tree, "")
    _check(config)
    return config


def check_trainable(config: Config) -> None:
    """Refuse a size of pictures that training cannot use: each level of the pyramid must be half of the finer one.

    Raises:
        ConfigError: it names the nearest sizes that can be.
    """
    size, step = config.data.size, 2 ** (config.model.encoder.levels - 1)
    if config.model.matched_levels and size % step:
        below = size // step * step
        near = f"{below} or {below + step}" if below else f"{step}"
        raise ConfigError(
            f"data.size={size} must be a multiple of {step} to train with "
            f"model.encoder.levels={config.model.encoder.levels}; take {near}"
        )


def config_to_dict(config: Config) -> dict[str, Any]:
    """The tree as nested dicts of plain values, as written into runs and checkpoints."""
    return dataclasses.asdict(config)


def config_values(config: Config) -> dict[str, Any]:
    """The tree as `section.key` -> value, in one dict."""
    return _flat(config_to_dict(config), "")


def config_to_yaml(config: Config) -> str:
    """The tree as YAML text that `load_config` reads back."""
    return yaml.safe_dump(_plain(config_to_dict(config)), sort_keys=False)


def _flat(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return flat


def _read_yaml(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = PRESET_FOLDER / f"{source}.yaml"
        if not path.is_file():
            raise ConfigError(
                f"no preset is called {str(source)!r}{_nearest(str(source), preset_names())}; "
                f"the presets are {', '.join(preset_names())}"
            )
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Unique)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot read this config: {' '.join(str(error).split())}") from error
    if not isinstance(tree or {}, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, found {type(tree).__name__}")
    return tree or {}


class _Unique(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error, where the loader's own would drop the first one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the loader's. Raises yaml.YAMLError where a key comes again."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign:
        raise ConfigError(f"--set {override!r}: write section.key=value")
    *sections, name = key.strip().split(".")
    for section in sections:
        if tree.get(section) is None:  # absent, or left empty in the file
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override!r}: {section} is a value, not a section")
    tree[name] = _read_value(text, override)


@dataclass(frozen=True)
class _Typed:
    """A value of `--set` that YAML takes for a number or a date: a field of text has it as it was typed, as 007."""

    text: str
    value: Any

    def __repr__(self) -> str:
        return repr(self.value)


def _read_value(text: str, override: str) -> Any:
    """A value of `--set`, by YAML. Raises ConfigError."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: cannot read the value") from error
    as_it_is = value is None or isinstance(value, (bool, str, list, dict))
    return value if as_it_is else _Typed(text.strip(), value)


def _build(kind: type, values: Any, where: str) -> Any:
    """Make a `kind` (a dataclass) of a mapping, field by field."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where.removesuffix('.') or 'config'}: expected a section, found {values!r}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise ConfigError(f"unknown config key {where + str(key)!r}{_nearest(str(key), hints)}")
    return kind(**{key: _coerce(hints[key], value, where + key) for key, value in values.items()})


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """Turn a YAML value into the field's type; YAML reads 1e-4 as text, so numbers are parsed by the type."""
    if isinstance(value, _Typed):
        value = value.text if kind is str else value.value
    if dataclasses.is_dataclass(kind):
        return _build(kind, {} if value is None else value, where + ".")
    if isinstance(kind, types.GenericAlias):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, such as [{value}], found {value!r}")
        return tuple(_coerce(typing.get_args(kind)[0], item, where) for item in value)
    try:
        return _SCALARS[kind](value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{where}: expected {kind.__name__}, found {value!r}") from None


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _int(value: Any) -> int:
    if isinstance(value, bool) or int(float(value)) != float(value):
        raise ValueError
    return int(float(value))


def _float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _str(value: Any) -> str:
    if isinstance(value, (bool, dict, list)):  # a bool is what YAML makes of a plain yes or no
        raise ValueError
    return "" if value is None else str(value)


_SCALARS = {bool: _bool, int: _int, float: _float, str: _str}


def _check(config: Config) -> None:
    """Refuse what cannot work, naming the keys at fault."""
    encoder, matching, translator = config.model.encoder, config.model.matching, config.model.translator
    _one_of("data.task", config.data.task, TASKS)
    _one_of("model.kind", config.model.kind, KINDS)
    _one_of("data.crop", config.data.crop, ("none", "square", "face", "align", "pad"))
    _one_of("data.pose_maps", config.data.pose_maps, ("limbs", "heatmaps"))
    _one_of("prepare.kind", config.prepare.kind, ("index", "colours", "ade20k-full", "celeba-parts"))
    _require(0 <= config.prepare.pad_value <= 255, "prepare.pad_value must be in 0..255")
    _one_of("model.matching.refinement", matching.refinement, ("gru", "conv", "none"))
    _one_of("model.matching.start", matching.start, ("best", "wide"))
    _one_of("model.matching.inputs", matching.inputs, ("absolute", "relative"))
    _one_of("model.matching.compat", matching.compat, ("none", "release", "release-fixed"))
    _one_of("model.matching.backend", matching.backend, ("auto", "reference", "compiled", "triton", "exact"))
    _one_of("loss.perceptual", config.loss.perceptual, ("vgg19", "vgg16-caffe", "none"))
    _one_of("train.precision", config.train.precision, ("auto", "fp32", "bf16"))
    _one_of("train.val_metric", config.train.val_metric, ("swd", "fid"))
    _require(
        len(encoder.widths) >= encoder.levels,
        f"model.encoder.widths must have at least levels={encoder.levels} entries, has {len(encoder.widths)}",
    )
    _require(
        0 <= matching.levels <= encoder.levels,
        f"model.matching.levels must be 0 (all) to model.encoder.levels={encoder.levels}, is {matching.levels}",
    )
    _require(
        len(translator.blocks) == len(translator.widths),
        "model.translator.blocks and model.translator.widths must be of the same length",
    )
    ours = matching.compat == "none"
    _require(
        ours or _is_releases(config.model),
        f"model.matching.compat={matching.compat} needs the release's shape: "
        "model.kind=cocosnet-v2, model.encoder.levels=4, as many widths, and the default model.translator.blocks",
    )
    _require(not ours or matching.channels > 1, "model.matching.channels must be above 1: their mean is taken off")
    _require(not ours or config.model.discriminator.scales > 0, "model.discriminator.scales must be positive")
    _require(
        config.data.task != "mask" or config.data.classes > 0,
        "data.classes must be set for task mask; dataset.json of a prepared folder says how many",
    )
    _require(config.distortion.tps_grid >= 2, "distortion.tps_grid must be at least 2")
    _require(config.distortion.scale < 1, f"distortion.scale must be below 1, is {config.distortion.scale}")
    _require(config.train.seed < 2**63, f"train.seed must be below 2^63, is {config.train.seed}")
    for name in ("beta1", "beta2"):
        value = getattr(config.train, name)
        _require(0 <= value < 1, f"train.{name} must be at least 0 and below 1, is {value}")
    _check_signs(config_values(config))


def _is_releases(model: ModelConfig) -> bool:
    """Whether a model has the release's layers, of whatever widths."""
    return (
        model.kind == "cocosnet-v2"
        and model.encoder.levels == len(model.encoder.widths) == 4
        and model.translator.blocks == TranslatorConfig.blocks
    )


_POSITIVE = (
    *("data.size", "prepare.exemplars"),
    *(f"model.encoder.{name}" for name in ("levels", "stem_width", "spade_hidden", "widths")),
    *(f"model.translator.{name}" for name in ("widths", "blocks", "spade_hidden", "code_size")),
    *("model.discriminator.width", "model.discriminator.layers"),
    *(
        f"model.matching.{name}"
        for name in ("channels", "hidden", "iterations", "candidates", "temperature", "max_step")
    ),
    *(f"train.{name}" for name in ("batch", "accumulate", "images", "lr_g", "lr_d")),
    *(f"train.{name}" for name in ("val_pairs", "log_images", "save_images", "sample_images")),
)
_NOT_NEGATIVE = (
    *("data.classes", "prepare.batch", "prepare.pose_canvas", "model.discriminator.scales"),
    *(f"loss.{name}" for name in ("align", "corr", "match", "map", "sem", "contextual", "feature", "adv")),
    *(f"distortion.{name}" for name in ("rotate", "scale", "translate", "tps")),
    *(f"train.{name}" for name in ("level_warmup", "clip", "val_images", "adv_start", "workers", "ema_images", "seed")),
)
_SHARES = ("data.val_fraction", "loss.iteration_decay", "distortion.flip", "train.real_exemplars")


def _check_signs(values: Mapping[str, Any]) -> None:
    """Refuse a number of the wrong sign or size; a list for any of its numbers, and where it has none."""
    for name in _POSITIVE:
        several = values[name] if isinstance(values[name], tuple) else (values[name],)
        _require(bool(several) and min(several) > 0, f"{name} must be positive, is {values[name]}")
    for name in _NOT_NEGATIVE:
        _require(values[name] >= 0, f"{name} must not be negative, is {values[name]}")
    for name in _SHARES:
        _require(0 <= values[name] <= 1, f"{name} must be from 0 to 1, is {values[name]}")


def _one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    _require(value in allowed, f"{name} is {value!r}{_nearest(value, allowed)}; it is one of {', '.join(allowed)}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _plain(value: Any) -> Any:
    """Tuples as lists, so that the YAML has no Python tags."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
