"""What a run tells of itself: presets, what it will need, status lines, validation, and from where it goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from train_tools import prepared_folder, tiny

from cocosctl.app import run
from cocosctl.train import _status, _too_large
from cocosnet.checkpoint import read_metadata
from cocosnet.config import PRESET_FOLDER, LossConfig, load_config, preset_names
from cocosnet.data.dataset import PairDataset
from cocosnet.data.records import DATASET_NAME, MANIFEST_NAME
from cocosnet.errors import CheckpointError, ConfigError, OutputError, memory_named
from cocosnet.train.estimate import estimate
from cocosnet.train.networks import build_networks
from cocosnet.train.runlog import TensorBoard
from cocosnet.train.trainer import Trainer
from cocosnet.train.validation import copied, validate

PAPER = {
    "deepfashion-512": ("pose", 512),
    "metfaces-512": ("edge", 512),
    "metfaces-1024": ("edge", 1024),
    "ade20k": ("mask", 256),
    "ade20k-outdoor": ("mask", 256),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared_folder(tmp_path_factory.mktemp("prepared"), count=9, held_out=4)


@pytest.fixture(scope="module")
def watched(data, tmp_path_factory):
    run, ticks = tmp_path_factory.mktemp("watched"), []
    config = tiny("train.val_images=4", "train.val_pairs=4", "train.level_warmup=1", "train.precision=bf16")
    Trainer(config, data, run, "cpu", ticks.append).train()
    return run, ticks


def test_a_run_does_not_go_into_the_folder_of_its_data(data):
    before = sorted(path.name for path in data.iterdir())
    with pytest.raises(ConfigError, match="holds the data; choose another folder"):
        Trainer(tiny(), data, data / "." / "images" / "..", "cpu")
    assert sorted(path.name for path in data.iterdir()) == before


def test_there_is_a_preset_for_each_setting_of_the_paper_with_its_resolution():
    assert set(PAPER) | {"portraits", "facades", "tiny-cpu", "demo"} <= set(preset_names())
    for name, (task, size) in PAPER.items():
        config = load_config(name)
        assert (config.data.task, config.data.size) == (task, size)
        assert size >> (config.model.encoder.levels - 1) == 64  # the coarsest level of Figure 7
        assert (config.train.lr_g, config.train.lr_d, config.train.beta1, config.train.beta2) == (1e-4, 4e-4, 0, 0.999)
        written = (PRESET_FOLDER / f"{name}.yaml").read_text().split("loss:")[1]
        weights = {field.name for field in dataclasses.fields(LossConfig)} - {"iteration_decay"}
        assert all(f"  {weight}:" in written for weight in weights)


@pytest.mark.parametrize("wrong", ["clip=-1", "accumulate=0", "val_metric=swdd", "real_exemplars=1.5", "levelwarmup=3"])
def test_a_setting_that_cannot_be_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match="train.*(must|did you mean|probability)"):
        tiny(f"train.{wrong}")


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            "train.images=.inf",
            "train.lr_g=.nan",
            "train.seed=-1",
            "train.seed=1e30",
            "train.beta1=1",
            "train.ema_images=-5",
        ),
        *("model.matching.iterations=0", "model.discriminator.layers=0", "model.translator.widths=[]"),
        *("model.encoder.widths=[8, 0, 8]", "data.size=30"),
        *("loss.corr=-1", "loss.iteration_decay=1.5", "distortion.flip=2", "distortion.tps=-0.1", "distortion.scale=1"),
        *("data.val_fraction=1.5", "data.classes=-1", "prepare.batch=-1", "model.matching.channels=1"),
        *("model.matching.compat=release", "model.discriminator.scales=0"),
    ],
)
def test_a_value_that_training_cannot_use_is_one_line(capsys, wrong):
    assert run(["config", "validate", "tiny-cpu", "--set", wrong]) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and wrong.partition("=")[0] in said


def test_the_nearest_sizes_that_can_be_are_told(tmp_path, data):
    with pytest.raises(ConfigError, match="data.size=30 must be a multiple of 4 .*levels=3; take 28 or 32"):
        Trainer(tiny("data.size=30"), data, tmp_path, "cpu")
    Trainer(tiny("data.size=28", "train.images=2"), data, tmp_path, "cpu").train()


def test_a_section_that_is_left_empty_has_its_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# größe\ntrain:\n", encoding="utf-8")
    assert load_config(path) == load_config()
    assert load_config(path, ["train.batch=3"]).train.batch == 3
    with pytest.raises(ConfigError, match="^train: expected a section, found 3"):
        load_config(None, ["train=3"])


def test_what_a_run_needs_is_told_beforehand_and_grows_with_the_picture_and_the_batch():
    small, large, many = (
        estimate(tiny(*settings), torch.device("cpu")) for settings in ((), ("data.size=64",), ("train.batch=8",))
    )
    assert small["images_at_once"] == 2 and many["images_at_once"] == 8
    assert small["memory_mib"] < large["memory_mib"] and small["memory_mib"] < many["memory_mib"]
    assert small["seconds_per_1000_images"] > 0


@pytest.mark.parametrize(("kind", "networks"), [("cocosnet-v2", 3), ("cocosnet", 2), ("spade", 2)])
def test_a_dry_run_tells_of_every_system(capsys, kind, networks):
    """The systems that the paper compares with have no mapping network."""
    command = ["train", "tiny-cpu", "--data", "x", "-o", "x", "--set", f"model.kind={kind}", "--dry-run", "--json"]
    assert run(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["config"]["model"]["kind"] == kind
    assert len(told["parameters"]) == networks and all(count > 0 for count in told["parameters"].values())
    assert told["estimate"]["memory_mib"] > 0


def test_activations_that_are_computed_again_are_not_kept():
    kept, again = (
        estimate(tiny("data.size=64", "train.batch=32", f"train.checkpointing={flag}"), torch.device("cpu"))[
            "memory_mib"
        ]
        for flag in ("false", "true")
    )
    assert again < 0.8 * kept


def test_validation_is_logged_and_the_best_model_kept(watched):
    run, ticks = watched
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    found = [line for line in lines if "val_swd" in line]
    assert [line["images"] for line in found] == [4, 8]
    for line in found:
        assert set(line) == {"images", "val_warp_psnr", "val_warp_gain", "val_swd", "val_copy", "val_heed"}
        assert all(isinstance(value, (int, float)) for value in line.values())
    least = min(found, key=lambda line: line["val_swd"])
    metadata = read_metadata(run / "best.safetensors")
    assert metadata["cocosctl.images"] == str(least["images"])
    assert float(metadata["cocosctl.val_swd"]) == pytest.approx(least["val_swd"], rel=1e-5)
    assert all(
        {"data_wait", "grad_norm", "disc_grad_norm", "memory_mib"} <= set(line) for line in lines if "total" in line
    )


def test_the_status_line_says_what_one_looks_for(watched):
    line = _status(watched[1][-1])
    for part in (
        "8/8 images",
        "/s",
        "total ",
        "grad_norm ",
        "lr 0.0001/0.0004",
        "memory ",
        "data wait ",
        "left 0:00:00",
    ):
        assert part in line, part
    assert "\n" not in line


def test_ticks_come_as_often_as_asked_for_and_after_the_last_step(data, tmp_path):
    ticks = []
    trainer = Trainer(tiny("train.log_images=8"), data, tmp_path, "cpu", ticks.append, tick_seconds=3600)
    trainer.train()
    assert [tick["images"] for tick in ticks] == [2, 8]
    line = json.loads((tmp_path / "stats.jsonl").read_text().splitlines()[-1])
    assert ticks[-1]["data_wait"] == pytest.approx(line["data_wait"], rel=1e-4) and line["data_wait"] > 0


def test_a_gpu_that_is_too_small_is_a_line_with_what_to_do():
    said = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which\n 1 is free."
    )
    with pytest.raises(ConfigError, match="^CUDA out of memory. Tried to allocate 2.00 GiB; raise train.accumulate,"):
        with memory_named(_too_large):
            raise torch.OutOfMemoryError(said)


def test_a_machine_that_is_too_small_is_such_a_line_too_and_another_error_stays_what_it_is():
    with pytest.raises(ConfigError, match="^can't allocate memory: you tried to allocate .*; raise train.accumulate,"):
        with memory_named(_too_large):
            torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="^out of memory; raise train.accumulate,"):
        with memory_named(_too_large):
            bytearray(2**62)
    with pytest.raises(ConfigError, match=r"^out of memory \(could not create a primitive\); raise train.accumulate,"):
        with memory_named(_too_large):
            raise RuntimeError("could not create a primitive\n")
    with pytest.raises(RuntimeError, match="shape"):
        with memory_named(_too_large):
            torch.zeros(3).view(2)


def test_the_averaged_model_matches_the_levels_that_have_entered(data, tmp_path):
    """Grids, validation and the best model are its; the other levels are not trained yet."""
    trainer = Trainer(tiny("train.level_warmup=100", "train.images=2"), data, tmp_path, "cpu")
    trainer.train()
    batch = trainer.batches[0]
    out = trainer.ema.settled()(batch.condition, batch.exemplar)
    assert torch.equal(out.matches[2].positions[..., ::4, ::4], 4 * out.matches[0].positions)


def test_the_best_of_fewer_levels_is_not_the_best_any_more(data, tmp_path):
    """It would be used with all levels. Here it is ahead by a little."""
    settings = "train.val_images=4", "train.val_pairs=4", "train.level_warmup=4", "train.precision=bf16"
    Trainer(tiny(*settings), data, tmp_path, "cpu").train()
    assert read_metadata(tmp_path / "best.safetensors")["cocosctl.images"] == "8"


def test_a_pair_without_exemplar_and_single_pictures_leave_nothing_unmeasured(tmp_path):
    folder = prepared_folder(tmp_path, count=6, held_out=4)
    manifest = folder / MANIFEST_NAME
    records = [json.loads(line) for line in manifest.read_text().splitlines()]
    del records[-1]["exemplar"], records[-1]["exemplar_condition"]
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    pairs, config = PairDataset(folder, tiny(), split="val"), tiny("train.batch=1")
    model = build_networks(config, torch.device("cpu"), torch.float32).model.eval()
    for at_once in (1, 4):
        values = validate(model, pairs, config, torch.device("cpu"), at_once)
        assert all(math.isfinite(value) for value in values.values()), values


def test_the_watch_on_copying_tells_a_copy_from_the_truth():
    generator = torch.Generator().manual_seed(0)
    target, exemplar = (torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
    assert copied(exemplar, target, exemplar) == pytest.approx([1, 1], abs=1e-5)
    assert copied(target, target, exemplar) == pytest.approx([0, 0], abs=1e-5)
    half = copied((target + exemplar) / 2, target, exemplar)
    assert ((half > 0.2) & (half < 0.9)).all()


def test_from_where_a_run_goes_on_can_be_said(data, tmp_path):
    Trainer(tiny(), data, tmp_path / "run", "cpu").train()
    with pytest.raises(ConfigError, match="holds a run already"):
        Trainer(tiny(), data, tmp_path / "run", "cpu", resume="never").train()
    earlier = tmp_path / "run" / "checkpoints" / "state-000000004.pt"
    with pytest.raises(ConfigError, match="state-000000008.pt: is newer"):
        Trainer(tiny(), data, tmp_path / "run", "cpu", resume=earlier).train()
    Trainer(tiny(), data, tmp_path / "other", "cpu", resume=earlier).train()
    ours, theirs = (
        torch.load(tmp_path / run / "checkpoints" / "state-000000008.pt", weights_only=True)["model"]
        for run in ("run", "other")
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    with pytest.raises(ConfigError, match=r"state-000000004.pt: this run has train.lr_g=0.0001, you ask for 0.01"):
        Trainer(tiny("train.lr_g=0.01"), data, tmp_path / "third", "cpu", resume=earlier).train()
    with pytest.raises(CheckpointError, match="nowhere.pt: damaged or missing"):
        Trainer(tiny(), data, tmp_path / "third", "cpu", resume="nowhere.pt").train()
    assert not (tmp_path / "third").exists()


def test_a_run_that_goes_on_in_another_folder_has_its_best_model_there(data, tmp_path):
    often = "train.val_images=4", "train.val_pairs=4"
    Trainer(tiny(*often, "train.images=4"), data, tmp_path / "run", "cpu").train()
    path = tmp_path / "run" / "checkpoints" / "state-000000004.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "best": -1.0}, path)  # better than whatever comes
    Trainer(tiny(*often), data, tmp_path / "other", "cpu", resume=path).train()
    assert read_metadata(tmp_path / "other" / "best.safetensors")["cocosctl.images"] == "8"
    Trainer(tiny(*often), data, tmp_path / "run", "cpu").train()
    assert read_metadata(tmp_path / "run" / "best.safetensors")["cocosctl.images"] == "4"


def test_a_state_of_before_it_held_the_config_is_judged_by_its_run_folder(data, tmp_path):
    Trainer(tiny("train.images=2"), data, tmp_path / "run", "cpu").train()
    path = tmp_path / "run" / "checkpoints" / "state-000000002.pt"
    old = {name: value for name, value in torch.load(path, weights_only=True).items() if name != "config"}
    torch.save(old, path)
    with pytest.raises(ConfigError, match=r"run/config.yaml: this run has train.lr_g=0.0001, you ask for 0.01"):
        Trainer(tiny("train.lr_g=0.01"), data, tmp_path / "other", "cpu", resume=path).train()
    Trainer(tiny("train.images=4", "train.init=gone.pt"), data, tmp_path / "other", "cpu", resume=path).train()


def test_a_run_may_move_to_another_engine_of_the_same_matches(data, tmp_path):
    for images, backend in ((2, "reference"), (4, "compiled")):
        settings = f"train.images={images}", f"model.matching.backend={backend}"
        Trainer(tiny(*settings), data, tmp_path, "cpu").train()
    with pytest.raises(ConfigError, match="model.matching.backend=compiled, you ask for exact"):
        Trainer(tiny("model.matching.backend=exact"), data, tmp_path, "cpu").train()


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    board.write(4, {"total": 1.5, "warp_psnr": float("nan")})
    board.picture(4, torch.zeros(3, 8, 8))  # seen at once, before the board is closed
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("total")] == [(4, 1.5)]
    assert read.Tags()["scalars"] == ["total"] and read.Tags()["images"] == ["samples"]
    board.close()


def test_tensorboard_hides_what_is_done_again_and_says_where_it_cannot_write(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for images in (4, 8):  # the second run goes on, and its first one was killed a step later than its state
        Trainer(tiny(f"train.images={images}", "train.tensorboard=true"), data, tmp_path, "cpu").train()
        lost = TensorBoard(tmp_path / "tensorboard", images)
        lost.write(images + 2, {"total": -1.0})
        lost.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("total")] == [2, 4, 6, 8, 10]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: cannot write"):
        TensorBoard(tmp_path / "file")


@pytest.mark.parametrize(("prepared", "told"), [(40, False), (64, True)])
def test_pictures_of_which_small_pieces_would_be_learned_are_told_of(data, tmp_path, capsys, prepared, told):
    """Pictures are 40 px here; what matters is what the folder says of itself."""
    folder = shutil.copytree(data, tmp_path / "data")
    summary = {"task": "edge", "size": prepared, "classes": 0, "condition_source": {"network": "image"}}
    (folder / DATASET_NAME).write_text(json.dumps(summary))
    changes = ["train.images=2", "data.size=32"]
    options = [word for change in changes for word in ("--set", change)]
    assert run(["train", "tiny-cpu", "--data", str(folder), "-o", str(tmp_path / "run"), *options]) == 0
    assert ("prepare with --size 32" in capsys.readouterr().err) == told


def test_a_dry_run_finds_out_that_the_folder_does_not_fit(data, tmp_path, capsys):
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / DATASET_NAME).write_text(json.dumps({"task": "mask", "size": 40, "classes": 7}))
    for changes, said in (([], "--set data.task=mask"), (["data.task=mask", "data.classes=3"], "--set data.classes=7")):
        options = [word for change in changes for word in ("--set", change)]
        command = ["train", "tiny-cpu", "--data", str(folder), "-o", str(tmp_path / "run"), *options]
        for more in ([], ["--dry-run"]):
            assert run([*command, *more]) == 3
            assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_nothing_out_is_told_of(tmp_path, capsys):
    folder = prepared_folder(tmp_path / "data", held_out=0)
    command = ["train", "tiny-cpu", "--data", str(folder), "-o", str(tmp_path / "run")]
    assert run([*command, "--set", "train.images=2", "--set", "data.size=32"]) == 0
    assert "no picture is held out" in capsys.readouterr().err
