"""The warp panel, conditions made visible, and contact sheets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cli_tools import run
from PIL import Image

from cocosnet.data.images import to_tensor
from cocosnet.model.matches import Matches
from cocosnet.model.warp import pixel_grid
from cocosnet.viz.flow import flow_colors
from cocosnet.viz.panels import condition_image, warp_panel
from cocosnet.viz.sheet import contact_sheet

torch.set_num_threads(1)


def random_tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def panel_inputs(size: tuple[int, int], exemplar_size: tuple[int, int], channels: int = 1):
    """Two levels of a shift by a quarter of the width."""
    warps, matches = [], []
    for factor in (4, 1):
        height, width = -(-size[0] // factor), -(-size[1] // factor)
        field = pixel_grid(height, width) + torch.tensor([0, width / 4]).view(2, 1, 1)
        matches.append(Matches(field.expand(1, 3, -1, -1, -1), random_tensor(factor, 1, 3, height, width)))
        warps.append(random_tensor(factor, 3, height, width) * 2 - 1)
    return (
        random_tensor(0, channels, *size),
        random_tensor(1, 3, *exemplar_size) * 2 - 1,
        random_tensor(2, 3, *size) * 2 - 1,
        warps,
        matches,
    )


@pytest.mark.parametrize("sizes", [((64, 64), (64, 64)), ((61, 97), (120, 50)), ((16, 300), (40, 40))])
def test_panel_of_any_proportions(sizes):
    panel = warp_panel(*panel_inputs(*sizes), height=96)
    assert panel.mode == "RGB"
    assert panel.height == 3 * (96 + 2 * 18) + 2 * 16 + 2 * 8
    assert np.asarray(panel).std() > 10


def test_panel_shows_its_parts_unchanged():
    """At the height of the pictures nothing is rescaled: condition, exemplar, output and finest warp are in it."""
    condition, exemplar, image, warps, matches = panel_inputs((64, 64), (64, 64))
    pixels = np.asarray(warp_panel(condition, exemplar, image, warps, matches, height=64))
    for tensor in (condition.expand(3, -1, -1) * 2 - 1, exemplar, image, warps[-1]):
        tile = ((tensor.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        rows, columns = np.nonzero((pixels[:-63, :-63] == tile[0, 0]).all(axis=-1))
        assert any(np.array_equal(pixels[y : y + 64, x : x + 64], tile) for y, x in zip(rows, columns, strict=True))


def test_panel_is_deterministic_and_survives_empty_slots():
    condition, exemplar, image, warps, matches = panel_inputs((32, 32), (32, 32))
    matches[0].scores[:] = -torch.inf
    first, second = (warp_panel(condition, exemplar, image, warps, matches, height=48) for _ in range(2))
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_panel_of_a_photograph_that_matches_itself(shared):
    """Identity offsets are white, whatever the picture."""
    photo = Image.open(sorted((shared / "data/portraits512").glob("*.jpg"))[0]).convert("RGB").resize((64, 64))
    tensor = to_tensor(photo)
    matches = Matches(pixel_grid(64, 64)[None, None], torch.ones(1, 1, 64, 64))
    panel = np.asarray(warp_panel(tensor[:1] / 2 + 0.5, tensor, tensor, [tensor], [matches], height=64))
    below = panel[-8 - 64 : -8]  # the second row's tiles: warp, flow, score, matches
    assert np.array_equal(below[:, 8:72], np.asarray(photo))
    white = (below == 255).all(axis=(0, 2))
    assert max(len(run) for run in "".join("w" if w else " " for w in white).split()) >= 64


def test_a_panel_that_cannot_be_written_is_refused_before_it_is_drawn(tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 40)).save(photo)
    done = run("warp-visualize", photo, photo, "-o", tmp_path / "panel", "-w", "demo", "--dry-run")
    assert done.returncode == 3 and "use one of .png" in done.stderr


def test_condition_of_one_channel_is_grey():
    edges = torch.tensor([[[0.0, 1.0, 0.5]]])
    assert np.asarray(condition_image(edges))[0].tolist() == [[0] * 3, [255] * 3, [128] * 3]


@pytest.mark.parametrize("classes", [2, 13, 20, 60])
def test_one_hot_labels_get_fixed_distinct_colours(classes):
    labels = torch.arange(classes)[None]
    one_hot = torch.nn.functional.one_hot(labels, classes).permute(2, 0, 1).float()
    colours = np.asarray(condition_image(one_hot))[0]
    assert len({tuple(colour) for colour in colours.tolist()}) == classes
    assert colours[-1].tolist() == [0, 0, 0]
    swapped = np.asarray(condition_image(one_hot.flip(2)))[0]
    assert np.array_equal(swapped[::-1], colours)


def test_pose_shows_its_first_three_channels():
    pose = random_tensor(3, 20, 8, 6)
    expected = (pose[:3] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(condition_image(pose)).astype(int) - expected).max() <= 1


def test_all_joints_of_heat_maps_are_seen():
    heat = torch.zeros(18, 1, 18)
    heat[torch.arange(18), 0, torch.arange(18)] = 0.9
    colours = np.asarray(condition_image(heat))[0]
    assert len({tuple(colour) for colour in colours.tolist()}) == 18 and (colours.max(axis=1) > 150).all()


def test_the_legend_shows_each_offset_s_colour_where_it_leads_to():
    condition, exemplar, image, warps, matches = panel_inputs((64, 64), (64, 64))
    right = matches[1].positions[:, 0] - pixel_grid(64, 64)
    full_right = flow_colors(right, 16.0)[0, :, 0, 0].numpy()
    top = np.asarray(warp_panel(condition, exemplar, image, warps, matches, height=64))[: 8 + 36 + 96]
    rows, columns = np.nonzero((np.abs(top.astype(int) - full_right) < 12).all(axis=-1))
    hue = top[..., 0].astype(int) - top[..., 2]
    left, below = np.nonzero((top[..., 2] > 200) & (hue < -150)), np.nonzero((top[..., 1] > 200) & (hue > 150))
    assert columns.mean() > left[1].mean() + 30 and below[0].mean() > rows.mean() + 20


def test_sheet_places_pictures_on_a_grid():
    red, blue = Image.new("RGB", (10, 20), "red"), np.full((40, 40, 3), (0, 0, 255), np.uint8)
    green = torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1).expand(3, 5, 5)
    sheet = np.asarray(
        contact_sheet(
            [[red, blue], [None, green]],
            height=40,
            titles=("a", "b"),
            captions=[["first", "a caption far longer than its column"]],
        )
    )
    assert sheet.shape == (8 + 18 + 2 * (40 + 18 + 8), 8 + 20 + 8 + 40 + 8, 3)
    assert (sheet[26:66, 8:28] == (255, 0, 0)).all() and (sheet[26:66, 36:76] == (0, 0, 255)).all()
    assert (sheet[92:132, 36:76] == (0, 255, 0)).all() and (sheet[92:132, 8:28] == 255).all()
    assert (sheet[66:84, 8:28] != 255).any() and (sheet[:, 76:] == 255).all()


def test_sheet_of_rows_of_several_lengths_and_none():
    red = Image.new("RGB", (10, 10), "red")
    assert contact_sheet([[red], [red, red, red]], height=10).size == (8 + 3 * 18, 8 + 2 * 18)
    assert contact_sheet([]).size == (8, 8)
