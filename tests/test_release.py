"""The authors' release: its checkpoints are imported, and every stage is compared with what the release computed."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cli_tools import lines, run
from PIL import Image
from safetensors.torch import load_file, save_file

from cocosnet.checkpoint import load_model, save_model
from cocosnet.config import MatchingConfig
from cocosnet.convert import _singular_value, convert_release
from cocosnet.errors import CheckpointError
from cocosnet.model import layers, release, release_matching
from cocosnet.model.warp import pixel_grid


@pytest.fixture(scope="module")
def golden(shared) -> Path:
    folder = shared / "golden" / "official_v2"
    if not folder.is_dir():
        pytest.skip(f"needs the golden case of {folder}")
    return folder


@pytest.fixture(scope="module")
def model(golden):
    return convert_release(golden / f"{name}.safetensors" for name in ("Corr", "G", "D"))


@pytest.fixture(scope="module")
def io(golden):
    tensors = load_file(golden / "io.safetensors")
    return tensors | {"condition": tensors["condition_u8"] / 255, "exemplar": tensors["exemplar_u8"] / 255 * 2 - 1}


@torch.inference_mode()
def test_encoder_features_are_the_releases(model, io):
    for index, feature in enumerate(model.condition_encoder(io["condition"])):
        step = max(1, feature.shape[-1] // 64)
        expected = io[f"condition_feature_{index}"]
        error = (feature[..., ::step, ::step] - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, index


@torch.inference_mode()
def test_encoder_features_are_as_near_to_the_truth_as_the_stored_ones(model, io):
    """The root mean square error against float64; each processor rounds in its own way."""
    found = model.condition_encoder(io["condition"])
    truth = copy.deepcopy(model.condition_encoder).double()(io["condition"].double())
    for index, (feature, true) in enumerate(zip(found, truth)):
        step = max(1, feature.shape[-1] // 64)
        ours = (feature - true)[..., ::step, ::step].square().mean()
        stored = (io[f"condition_feature_{index}"] - true[..., ::step, ::step]).square().mean()
        assert ours.sqrt() < 1.5 * stored.sqrt(), index


@torch.inference_mode()
def test_discriminator_outputs_are_the_releases(model, io):
    for scale, maps in enumerate(model.discriminator(io["condition"], io["fake_image"])):
        for layer, found in enumerate(maps):
            step = max(1, found.shape[-1] // 48)
            torch.testing.assert_close(found[:, :8, ::step, ::step], io[f"disc_{scale}_{layer}"], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_the_generator_and_the_coarse_level_are_the_releases(model, io):
    image = model.translate([io[f"warp_{level}"] for level in range(4)], io["condition"])
    assert (image - io["fake_image"]).abs().mean() < 1e-5
    other = torch.roll(io["condition"], (23, -17), (2, 3))
    warp = model(io["condition"], io["exemplar"], other).warps[0]
    assert ((warp - io["warp_0"]).abs().amax(1) < 1e-3).float().mean() > 0.99


def rounds_alike(feature: torch.Tensor, stored: torch.Tensor) -> bool:
    """To the last bit: the convolutions, and the lengths of vectors, whose squares are added one at a time."""
    lengths = sum(feature.square().unbind(1)).double().sqrt().float()
    return torch.equal(feature, stored) and torch.equal(torch.linalg.vector_norm(feature, dim=1), lengths)


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2])
def test_all_levels_are_the_releases_where_the_processor_rounds_alike(model, io, golden, threads, set_threads):
    set_threads(threads)
    if not rounds_alike(model.condition_encoder(io["condition"])[0], io["condition_feature_0"]):
        pytest.skip("this processor or PyTorch rounds otherwise than the golden case's: docs/release.md")
    orders = json.loads((golden / "meta.json").read_text())["propagation_orders"]
    other = torch.roll(io["condition"], (23, -17), (2, 3))
    out = model(io["condition"], io["exemplar"], other, propagation_orders=orders)
    for level, warp in enumerate(out.warps):
        assert ((warp - io[f"warp_{level}"]).abs().amax(1) < 1e-3).float().mean() > 0.99, level
    assert (out.image - io["fake_image"]).abs().mean() < 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(1, 4, 128, 128), (1, 8, 40, 64), (2, 8, 40, 64), (1, 32, 40, 64), (3, 128, 5, 7)])
def test_a_convolution_of_one_pixel_is_the_same_with_any_number_of_threads(shape, set_threads):
    torch.manual_seed(4)
    layer, x = release_matching.Pointwise(shape[1], 32, 1), torch.randn(shape)
    found = []
    for threads in (1, 2):
        set_threads(threads)
        found.append(layer(x))
    assert torch.equal(*found)
    assert torch.equal(found[1], F.conv2d(x, layer.weight, layer.bias))


def test_a_singular_value_is_the_same_wherever_in_memory_its_vectors_begin():
    """PyTorch's own tensors begin at multiples of 64 bytes, those of a file that was read whole do not."""
    torch.manual_seed(8)
    weight, u, v = torch.randn(64, 32, 4, 4), torch.randn(64), torch.randn(512)
    aligned = torch.dot(u, torch.mv(weight.flatten(1), v))
    for shift in range(1, 16):
        moved = [torch.cat([torch.zeros(shift), x.flatten()])[shift:].view(x.shape) for x in (weight, u, v)]
        assert torch.equal(_singular_value(*moved), aligned)


@pytest.mark.parametrize("channels", [4, 16, 20, 32])
@pytest.mark.parametrize("axis", [None, -1, -2])
@pytest.mark.parametrize("rounded", [False, True])
def test_compiled_scores_are_the_definition_to_the_last_bit(channels, axis, rounded):
    pytest.importorskip("numba")
    from cocosnet.model import release_compiled

    torch.manual_seed(channels)
    # As many pixels as fill vector registers: for the rest PyTorch itself adds in another order.
    x, y = torch.randn(2, channels, 16, 24), torch.randn(2, channels, 8, 32)
    offsets = 6 * torch.randn(2, 10, 16, 24)
    grid = pixel_grid(16, 24)
    found = release_compiled.score(offsets, axis, x, y, grid, rounded)
    defined = release_matching.reference_score(offsets, axis, x, y, grid, rounded)
    assert all(torch.equal(a, b) for a, b in zip(found, defined))
    order = torch.randint(0, defined[0].shape[-1], (2, 16 * 24, 5))
    plain = release_matching.reference_offsets(defined[0], order, grid, 32)
    assert torch.equal(release_compiled.to_offsets(defined[0], order, grid, 32), plain)


@pytest.mark.parametrize("offset", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_an_offset_that_points_nowhere_stays_inside_the_map(offset):
    pytest.importorskip("numba")
    from cocosnet.model import release_compiled

    x, offsets = torch.randn(1, 32, 8, 8), torch.zeros(1, 8, 8, 8)
    offsets[0, 0, 3, 3] = offsets[0, 4, 5, 5] = offset
    grid = pixel_grid(8, 8)
    found, defined = (f(offsets, -1, x, x, grid) for f in (release_compiled.score, release_matching.reference_score))
    assert all(torch.equal(a, b) for a, b in zip(found, defined))
    assert found[0].min() >= 0 and found[0].max() < 64


def test_a_frozen_models_scores_are_compiled_also_where_gradients_are_on(monkeypatch):
    """A model is frozen when it is loaded; who calls it should not have to know of `torch.inference_mode`."""
    pytest.importorskip("numba")
    monkeypatch.setattr(release_matching, "reference_score", None)
    x, y, offsets = torch.randn(1, 4, 6, 5), torch.randn(1, 4, 6, 5), torch.randn(1, 4, 6, 5)
    grid = pixel_grid(6, 5)
    assert torch.is_grad_enabled() and release_matching.score(offsets, -1, x, y, grid)[1].shape == (1, 30, 6)
    with pytest.raises(TypeError):  # numbers that a gradient has to reach are PyTorch's
        release_matching.score(offsets, -1, x, y.requires_grad_(), grid)


@torch.inference_mode()
def test_a_search_written_out_pixel_by_pixel_finds_the_same():
    """The release's rules on plain Python numbers: offsets as they are, 0 beyond the border, cut flat numbers."""
    torch.manual_seed(3)
    height, width, candidates = 5, 7, 2
    search = release_matching.ReleasePatchMatch(MatchingConfig(compat="release", channels=4, candidates=candidates))
    x, y = (torch.nn.functional.normalize(torch.randn(1, 4, height, width), dim=1) for _ in range(2))
    offsets = 2 * torch.randn(1, 2 * candidates, height, width)
    found, weights = search.keep_best(offsets, -1, x, y)
    for i in range(height):
        for j in range(width):
            numbers = []
            for column in (j - 1, j, j + 1):
                for k in range(candidates):
                    inside = 0 <= column < width
                    down, along = (offsets[0, c, i, column].item() if inside else 0 for c in (k, candidates + k))
                    row, place = min(max(i + down, 0), height - 1), min(max(j + along, 0), width - 1)
                    numbers.append(int(row * width + place))
            scores = torch.stack([(x[0, :, i, j] * y[0].flatten(1)[:, n]).sum() for n in numbers]) / 0.01
            best = torch.softmax(scores, 0).topk(candidates)
            torch.testing.assert_close(weights[0, :, i, j], best.values, atol=1e-5, rtol=0)
            kept = [(numbers[n] // width - i, numbers[n] % width - j) for n in best.indices]
            rows, columns = found[0, :candidates, i, j].tolist(), found[0, candidates:, i, j].tolist()
            assert sorted(kept) == sorted(zip(rows, columns))


@torch.inference_mode()
def test_bands_of_rows_give_what_the_whole_gives(monkeypatch):
    torch.manual_seed(5)
    refinement = release_matching.ReleaseRefinement(3, 8)
    block = release.ReleaseSpadeBlock(6, 4, 2, 8)
    inputs = torch.randn(1, 8, 40, 9), torch.rand(1, 3, 40, 9), torch.randn(1, 6, 40, 9)
    guide = torch.rand(1, 2, 40, 9)
    whole = *refinement(*inputs), block(inputs[2], guide)
    monkeypatch.setattr(layers, "BAND", 12)
    for part, expected in zip((*refinement(*inputs), block(inputs[2], guide)), whole):
        torch.testing.assert_close(part, expected, atol=1e-6, rtol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("compat", ["release", "release-fixed"])
def test_a_search_in_bands_is_the_whole_one_to_the_last_bit(compat, monkeypatch):
    torch.manual_seed(6)
    search = release_matching.ReleasePatchMatch(MatchingConfig(compat=compat, channels=4, candidates=16, hidden=8))
    x, y = (torch.nn.functional.normalize(torch.randn(1, 4, *size), dim=1) for size in ((40, 24), (24, 40)))
    picture = torch.rand(1, 3, 24, 40)
    coarse = release_matching.Matches(10 * torch.rand(1, 16, 2, 20, 12), torch.rand(1, 16, 20, 12))
    offsets = search.first_offsets(coarse)
    whole = [search.keep_best(offsets, axis, x, y) for axis in (-1, -2)]
    level = search(coarse, x, y, picture, [])
    monkeypatch.setattr(layers, "BAND", 12)
    for axis, expected in zip((-1, -2), whole):
        assert all(torch.equal(a, b) for a, b in zip(search.keep_best(offsets, axis, x, y), expected))
    found = search(coarse, x, y, picture, [])
    assert torch.equal(found.matches.positions, level.matches.positions)
    assert torch.equal(found.warps[0], level.warps[0])


@torch.inference_mode()
def test_a_block_enlarges_its_map_as_interpolation_does(monkeypatch):
    torch.manual_seed(7)
    block, x, guide = release.ReleaseSpadeBlock(6, 4, 2, 8), torch.randn(1, 6, 20, 9), torch.rand(1, 2, 40, 18)
    enlarged = block(torch.nn.functional.interpolate(x, scale_factor=2), guide)
    assert torch.equal(block(x, guide, scale=2), enlarged)
    monkeypatch.setattr(layers, "BAND", 12)
    torch.testing.assert_close(block(x, guide, scale=2), enlarged, atol=1e-6, rtol=1e-6)


def random_release(channels: int, nef: int, ngf: int, spade: int = 128) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts named as the release names them, of any widths, made from the shapes of a model of ours."""
    from cocosnet.config import config_from_dict
    from cocosnet.convert import _data
    from cocosnet.model.release import ReleaseCoCosNet

    torch.manual_seed(channels)
    config = {
        "data": _data(channels),
        "model": {
            "encoder": {"stem_width": nef, "widths": [2 * nef, 4 * nef, 4 * nef, 4 * nef], "spade_hidden": spade},
            "matching": {"compat": "release", "channels": nef},
            "translator": {"widths": [8 * ngf] * 3 + [4 * ngf, 2 * ngf, ngf], "spade_hidden": spade},
            "discriminator": {"width": 6},
        },
    }
    state = ReleaseCoCosNet(config_from_dict(config)).state_dict()
    files: dict[str, dict[str, torch.Tensor]] = {"Corr": {}, "G": {}, "D": {}}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part in ("translator", "discriminator"):
            files["G" if part == "translator" else "D"][rest] = value
        else:
            old = name.replace("condition_encoder", "adaptive_model_seg").replace("image_encoder", "adaptive_model_img")
            old = old.replace("hierarchy.theta.", "theta_").replace("hierarchy.phi.", "phi_")
            files["Corr"][old.replace("hierarchy.", "")] = value
    return files


def with_spectral_norm(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """One weight as old-style spectral norm saves it."""
    matrix = state[f"{name}.weight"].flatten(1)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    extra = {"weight_orig": 3 * state[f"{name}.weight"], "weight_u": u[:, 0], "weight_v": v[0]}
    return {k: v for k, v in state.items() if k != f"{name}.weight"} | {f"{name}.{k}": v for k, v in extra.items()}


@pytest.mark.parametrize("channels, nef, ngf", [(20, 4, 3), (1, 6, 2), (8, 2, 4)])
def test_any_widths_import_and_run_at_any_size(tmp_path, channels, nef, ngf):
    files = random_release(channels, nef, ngf, spade=8)
    files["Corr"] = with_spectral_norm(files["Corr"], "adaptive_model_seg.layer2.0.0")
    for name, state in files.items():
        torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / f"latest_net_{name}.pth")
    model = convert_release(tmp_path / f"latest_net_{name}.pth" for name in files)
    kernel = model.condition_encoder.layer2[0][0].weight.flatten(1)
    assert torch.linalg.matrix_norm(kernel, 2).item() == pytest.approx(1, abs=1e-4)
    save_model(tmp_path / "model.safetensors", model)
    given, model = model, load_model(tmp_path / "model.safetensors", "cpu")
    one = torch.rand(1, channels, 64, 96)
    assert all(torch.equal(a, b) for a, b in zip(model.condition_encoder(one), given.condition_encoder(one)))
    condition, exemplar = torch.rand(2, channels, 64, 96), torch.rand(2, 3, 45, 70) * 2 - 1
    with torch.inference_mode():
        first, again = (model(condition, exemplar, torch.rand(2, channels, 45, 70).zero_()) for _ in range(2))
    assert first.image.shape == (2, 3, 64, 96) and torch.equal(first.image, again.image)
    assert [warp.shape[-2:] for warp in first.warps] == [(8, 12), (16, 24), (32, 48), (64, 96)]
    assert first.image.isfinite().all()


@torch.inference_mode()
def test_the_order_of_propagation_can_be_given(tmp_path):
    files = random_release(1, 4, 2, spade=8)
    for name, state in files.items():
        save_file({k: v.clone() for k, v in state.items()}, tmp_path / f"{name}.safetensors")
    model = convert_release(tmp_path / f"{name}.safetensors" for name in ("Corr", "G"))
    inputs = torch.rand(1, 1, 64, 64), torch.rand(1, 3, 64, 64) * 2 - 1, torch.rand(1, 1, 64, 64)
    default = model(*inputs).warps[-1]
    assert torch.equal(default, model(*inputs, propagation_orders=["horizontal-first"] * 15).warps[-1])
    assert not torch.equal(default, model(*inputs, propagation_orders=["vertical-first"] * 15).warps[-1])
    model.hierarchy.patch_match.fixed = True
    mended = model(*inputs)
    assert mended.warps[-1].isfinite().all() and not torch.equal(mended.warps[-1], default)
    with pytest.raises(ValueError, match="expected 15"):
        model(*inputs, propagation_orders=["vertical-first"])
    with pytest.raises(ValueError, match="exemplar_condition"):
        model(*inputs[:2])
    with pytest.raises(ValueError, match="exemplar_condition: expected 1,1,64,64, got 1,1,64,48"):
        model(*inputs[:2], inputs[2][..., :48])


def write_release(folder: Path, files: dict[str, dict[str, torch.Tensor]]) -> list[Path]:
    """State dicts as FOLDER/NAME.pth; Corr's and G's paths."""
    for name, state in files.items():
        torch.save(state, folder / f"{name}.pth")
    return [folder / "Corr.pth", folder / "G.pth"]


def test_mismatches_are_all_listed(tmp_path):
    files = random_release(1, 2, 2, spade=8)
    files["Corr"] = with_spectral_norm(files["Corr"], "adaptive_model_seg.layer3.0.0")
    files["Corr"]["adaptive_model_seg.layer3.0.0.weight_u"] = torch.zeros(3)
    del files["Corr"]["theta_1.bias"]
    files["G"]["fc.bias"], files["G"]["extra"] = torch.zeros(3), torch.zeros(1)
    given = write_release(tmp_path, files)
    done = run("weights", "import", *given, "--as", "mine", COCOSCTL_WEIGHTS_DIR=str(tmp_path / "w"))
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and not (tmp_path / "w").exists()
    corr, g = done.stderr.split(f"; {given[1]}: ")
    assert f"4 faults; {given[0]}: adaptive_model_seg.layer3.0.0.weight_orig lacks its vectors" in corr
    assert corr.endswith("; missing theta_1.bias")
    assert sorted(g.strip().split("; ")) == ["fc.bias is (3,), expected (16,)", "unexpected extra"]
    with pytest.raises(CheckpointError, match="Corr and G are both needed"):
        convert_release([tmp_path / "D.pth"])


def test_mismatches_are_all_listed_where_sizes_are_missing_too(tmp_path):
    files = random_release(1, 2, 2, spade=8)
    for name in ("theta_0.weight", "phi_1.bias", "adaptive_model_seg.layer1.0.weight"):
        del files["Corr"][name]
    files["G"]["up_0.conv_1.weight"], files["G"]["extra"] = torch.tensor(1.0), torch.zeros(1)
    given = write_release(tmp_path, files)
    with pytest.raises(CheckpointError) as caught:
        convert_release(given)
    head, *faults = str(caught.value).split("; ")
    assert "5 faults" in head and "shapes not compared" in head
    assert sorted(faults) == sorted(
        [
            f"{given[0]}: missing adaptive_model_seg.layer1.0.weight",
            "missing phi_1.bias",
            "missing theta_0.weight",
            f"{given[1]}: up_0.conv_1.weight is ()",
            "unexpected extra",
        ]
    )


def test_of_a_prelu_that_was_saved_as_two_values_the_second_counts_and_this_is_said(tmp_path):
    files = random_release(1, 2, 2, spade=8)
    for block, values in {"relu": 0.7, "model.3": 0.3}.items():
        files["Corr"][f"adaptive_model_seg.layer2.1.{block}.weight"] = torch.tensor([values])
    given, where = write_release(tmp_path, files), {"COCOSCTL_WEIGHTS_DIR": str(tmp_path / "w")}
    done = run("weights", "import", *given, "--as", "mine", **where)
    said = "layer2.1.relu.weight and 0 others were saved twice and differ"
    assert done.returncode == 0 and said in done.stderr
    assert all(line.startswith("cocosctl: ") for line in done.stderr.splitlines())
    assert run("weights", "import", *given, "--as", "mine", "--overwrite", "--quiet", **where).stderr == ""
    model = load_model(Path(done.stdout.strip()), "cpu")
    assert model.condition_encoder.layer2[1].relu.weight.item() == pytest.approx(0.3)


def test_one_name_of_a_prelu_does_for_both(tmp_path):
    """As safetensors' own writer of models leaves one of two names of a tensor."""
    files = random_release(1, 2, 2, spade=8)
    whole = convert_release(write_release(tmp_path, files))
    for left_out in (".1.relu.weight", ".1.model.3.weight"):
        state = {name: value.clone() for name, value in files["Corr"].items() if not name.endswith(left_out)}
        assert len(state) == len(files["Corr"]) - 8
        save_file(state, tmp_path / "Corr.safetensors")
        found = convert_release([tmp_path / "Corr.safetensors", tmp_path / "G.pth"])
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in found.state_dict().items())


def test_files_of_cocosnet_v1_are_told(tmp_path):
    """Its matching by the names that it has and v2 has not, its encoders and generator being named alike."""
    files = random_release(1, 2, 2, spade=8)
    corr = {name: x for name, x in files["Corr"].items() if name.startswith("adaptive_model")}
    corr = with_spectral_norm(corr, "adaptive_model_seg.layer1.0")
    corr |= {"layer.0.conv1.weight": torch.zeros(256, 256, 3, 3), "layer.0.prelu.weight": torch.zeros(1)}
    corr |= {f"{name}.weight": torch.zeros(256, 256, 1, 1) for name in ("phi", "theta")}
    given = write_release(tmp_path, {"Corr": corr, "G": files["G"]})
    for order in (given, given[::-1]):
        with pytest.raises(CheckpointError, match="Corr.pth: looks like CoCosNet v1") as caught:
            convert_release(order)
        assert "\n" not in str(caught.value)


@torch.inference_mode()
def test_the_discriminator_has_as_many_scales_as_its_file(tmp_path):
    files = random_release(1, 2, 2, spade=8)
    files["D"] |= {
        name.replace("_1.", "_2."): x for name, x in files["D"].items() if name.startswith("discriminator_1.")
    }
    model = convert_release([*write_release(tmp_path, files), tmp_path / "D.pth"])
    assert len(model.discriminator(torch.zeros(1, 1, 128, 128), torch.zeros(1, 3, 128, 128))) == 3


class _Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


def test_a_pickle_of_anything_else_is_refused(tmp_path, recwarn):
    torch.save({"a": _Evil()}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(_Evil()))
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 half")
    torch.save({"a": 1}, tmp_path / "number.pth")
    (tmp_path / "short.pth").write_bytes(b"\x80\x02.")
    torch.save({"conv_img.weight": torch.zeros(0, 3)}, tmp_path / "empty.pth")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    for name, said in {
        "evil.pth": "holds more than plain tensors",
        "evil.pkl": "holds more than plain tensors",
        "half.pth": "not a readable checkpoint",
        "number.pth": "not a state dict",
        "short.pth": "not a readable checkpoint",
        "empty.pth": "tensors that are empty, or not of plain numbers: conv_img.weight",
        "none.pth": "no such file",
        "long" * 100 + ".pth": "no such file",
        "photo.png": "not a checkpoint; give a .pth",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}: {said}"):
            convert_release([tmp_path / name])
    assert not recwarn.list


def test_the_command_imports_and_the_name_is_known(tmp_path):
    for name, state in random_release(1, 2, 2, spade=8).items():
        torch.save(state, tmp_path / f"{name}.pth")
    where = {"COCOSCTL_WEIGHTS_DIR": str(tmp_path / "w")}
    files = [tmp_path / f"{name}.pth" for name in ("Corr", "G", "D")]
    done = run("weights", "import", *files, "--as", "mine", "--json", **where)
    assert done.returncode == 0, done.stderr
    assert Path(lines(done.stdout)[0]["path"]).is_file()
    from PIL import Image

    done = run("weights", "import", *files, "--as", "mended", "--mended", **where)
    assert done.returncode == 0, done.stderr
    assert load_model(Path(done.stdout.strip()), "cpu").config.model.matching.compat == "release-fixed"
    Image.effect_noise((64, 48), 80).save(tmp_path / "edges.png")
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "photo.png")
    done = run("translate", tmp_path / "edges.png", tmp_path / "photo.png", "-o", tmp_path / "translate.png",
               "-w", "mine", **where)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "translate.png").size == (64, 48)
    Image.open(tmp_path / "edges.png").crop((0, 0, 32, 8)).save(tmp_path / "small.png")
    done = run("translate", tmp_path / "small.png", tmp_path / "small.png", "-o", tmp_path / "small-out.png",
               "-w", "mine", **where)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "small-out.png").size == (32, 8)


@torch.inference_mode()
def test_random_weights_of_the_full_sizes_names_and_shapes_import_and_run(golden, tmp_path):
    for name, shapes in json.loads((golden / "full_size_keys.json").read_text()).items():
        values = {key: torch.randn(shape) / math.sqrt(max(1, math.prod(shape[1:]))) for key, shape in shapes.items()}
        torch.save(values, tmp_path / f"{Path(name).stem}.pth")
    model = convert_release(sorted(tmp_path.glob("*.pth")))
    assert model.config.model.encoder.widths == (64, 128, 128, 128) and model.config.data.task == "pose"
    assert model.config.model.translator.widths == (512, 512, 512, 256, 128, 64)
    out = model(torch.rand(1, 20, 64, 96), torch.rand(1, 3, 96, 64) * 2 - 1, torch.rand(1, 20, 96, 64))
    assert out.image.shape == (1, 3, 64, 96) and out.image.isfinite().all()
