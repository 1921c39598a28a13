"""Metrics that look through networks: against the literal protocol, torch-fidelity, POT and the lpips package."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_tools import broken_torchvision, clean_environment
from metric_tools import accept, picture_tensor, randomise, smooth_picture, write_random_trunk, write_random_vgg
from PIL import Image
from torchvision.models import alexnet
from torchvision.models.vgg import cfgs, make_layers

from cocosnet import weights
from cocosnet.data.records import Record
from cocosnet.errors import ConfigError, MissingWeights
from cocosnet.losses.perceptual import Vgg, load_perceptual
from cocosnet.metrics import Evaluation, evaluate, get_metric
from cocosnet.metrics.evaluation import BATCH_PIXELS
from cocosnet.metrics.features import sharing
from cocosnet.metrics.fid import GaussianFit, frechet_distance, squared_mmd


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    return write_random_vgg(tmp_path_factory.mktemp("vgg"))


@pytest.fixture
def vgg(vgg_file, monkeypatch):
    accept(monkeypatch, "vgg16-caffe", vgg_file)
    return load_perceptual("vgg16-caffe")


def maps(network, picture, *layers):
    return network(picture.float() / 127.5 - 1, layers)


def test_semantic_is_the_cosine_at_every_position(vgg):
    output, target = picture_tensor(1), picture_tensor(2)
    metric = get_metric("semantic")
    scores = metric.update(output, target)
    expected = []
    for name in ("relu3_2", "relu4_2", "relu5_2"):
        first, second = (maps(vgg, p, name)[name][0].double().flatten(1) for p in (output, target))
        expected.append(((first * second).sum(0) / (first.norm(dim=0) * second.norm(dim=0))).mean().item())
    result = metric.compute()
    assert list(result["layers"].values()) == pytest.approx(expected, rel=1e-5)
    assert result["value"] == pytest.approx(np.mean(expected), rel=1e-5) == pytest.approx(scores[0], rel=1e-5)
    assert expected[0] < 0.999 and "vgg16-caffe" in result["protocol"]


def test_style_compares_means_so_that_layout_does_not_matter(vgg):
    output, exemplar = picture_tensor(1), picture_tensor(2, (96, 80))
    for name, layer in (("style_color", "relu1_2"), ("style_texture", "relu2_2")):
        metric = get_metric(name)
        metric.update(output, exemplar)
        first, second = (maps(vgg, p, layer)[layer][0].double().mean(dim=(1, 2)) for p in (output, exemplar))
        expected = (first @ second / first.norm() / second.norm()).item()
        assert metric.compute()["value"] == pytest.approx(expected, rel=1e-6)


def literal_regions(network, layer, pictures, labels, background):
    """CoCosNet's own evaluation, word for word: maps enlarged to 256x256, one mean a label and picture."""
    features = [F.interpolate(maps(network, p, layer)[layer], size=(256, 256))[0].double() for p in pictures]
    total = weight = 0.0
    for label in np.unique(labels[0]):
        inside = [torch.from_numpy(label_map == label) for label_map in labels]
        if (label == 0 and not background) or not all(mask.any() for mask in inside):
            continue
        first, second = (f[:, mask].mean(dim=1) for f, mask in zip(features, inside))
        area = inside[0].sum().item()
        total += area * (first @ second / first.norm() / second.norm()).item()
        weight += area
    return total / weight


def test_regions_follow_the_literal_protocol(vgg):
    random = np.random.default_rng(0)
    pictures = [picture_tensor(index, (256, 256)) for index in (1, 2)]
    labels = [np.kron(random.integers(0, 5, (8, 8)), np.ones((32, 32), int)) for _ in range(2)]
    labels[0][3:50, 7:90], labels[1][100:140, 31:77] = 7, 9  # edges that no cell of a map has, labels of one side only
    tensors = [torch.from_numpy(label_map)[None, None].int() for label_map in labels]
    semantic = get_metric("semantic_region")
    semantic.update(*pictures, tensors[0])
    expected = [
        literal_regions(vgg, layer, pictures, [labels[0], labels[0]], True)
        for layer in ("relu3_2", "relu4_2", "relu5_2")
    ]
    assert list(semantic.compute()["layers"].values()) == pytest.approx(expected, rel=1e-5)
    style = get_metric("style_texture_region")
    style.update(*pictures, *tensors)
    expected = literal_regions(vgg, "relu2_2", pictures, labels, False)
    assert style.compute()["value"] == pytest.approx(expected, rel=1e-5)


def test_a_pair_without_a_common_region_is_counted_apart(vgg):
    metric = get_metric("style_color_region")
    picture, ground = picture_tensor(1), torch.zeros(1, 1, 64, 64, dtype=torch.int32)
    assert metric.update(picture, picture, ground, ground) == [None]
    assert metric.compute()["value"] is None
    assert metric.update(picture, picture, ground + 3, ground + 3)[0] == pytest.approx(1)
    assert metric.compute()["value"] == pytest.approx(1) and metric.compute()["without_region"] == 1


def test_an_edge_map_where_labels_belong_is_told_of(vgg):
    picture, grey = picture_tensor(1, (256, 256)), torch.arange(256, dtype=torch.int32).expand(1, 1, 256, 256)
    few, many, whole = (get_metric("style_color_region") for _ in range(3))
    few.update(picture, picture, grey // 2, grey // 2)
    many.update(picture, picture, grey, grey)
    whole.absorb(many.state())
    whole.count = 1
    assert "note" not in few.compute()
    assert "255 labels" in many.compute()["note"] and whole.compute() == many.compute()


def test_labels_come_from_the_condition_or_the_record_and_must_fit(vgg, tmp_path):
    smooth_picture(1).save(tmp_path / "o.png")
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) // 128).save(tmp_path / "labels.png")
    Image.new("L", (32, 32)).save(tmp_path / "small.png")
    picture, labels = str(tmp_path / "o.png"), str(tmp_path / "labels.png")
    good = [
        Record(id="a", output=picture, target=picture, condition=labels),
        Record(id="b", output=picture, target=picture, condition=picture, extra={"labels": labels}),
    ]
    bad = [
        Record(id="c", output=picture, target=picture, condition=str(tmp_path / "small.png")),
        Record(id="d", output=picture, target=picture, condition=picture),
        Record(id="e", output=picture, target=picture),
    ]
    result = evaluate(good + bad, ["semantic_region"])
    assert (result["count"], result["failed"]) == (2, 3)
    assert result["metrics"]["semantic_region"]["value"] == pytest.approx(1)
    assert "label map 32x32" in result["errors"][0] and "class index" in result["errors"][1]


def test_equal_sets_read_one_or_zero_and_order_does_not_matter(vgg, tmp_path):
    names = ["semantic", "style_color", "style_texture", "fd_vgg16"]
    records = []
    for index in range(6):
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir(exist_ok=True)
            smooth_picture(index + 10 * (folder == "b")).save(tmp_path / folder / f"{index}.png")
        a, b = (str(tmp_path / folder / f"{index}.png") for folder in "ab")
        records.append(Record(id=str(index), output=a, target=b, exemplar=b))
    same = [Record(id=r.id, output=r.output, target=r.output, exemplar=r.output) for r in records]
    equal = evaluate(same, names)["metrics"]
    assert [equal[name]["value"] for name in names] == pytest.approx([1, 1, 1, 0], abs=1e-6)
    straight, turned = evaluate(records, names), evaluate(records[::-1], names)
    for name in names:
        value = straight["metrics"][name]["value"]
        assert (
            turned["metrics"][name]["value"] == pytest.approx(value, rel=1e-9)
            and abs(value - equal[name]["value"]) > 1e-4
        )
    assert "biased" in straight["metrics"]["fd_vgg16"]["note"]
    assert straight["weights"]["vgg16-caffe"] == weights.fingerprint("vgg16-caffe")


def test_pictures_of_another_size_than_the_regions_pass_the_network_once_for_each(vgg, monkeypatch):
    """At their own size and at 256x256: two passes a picture, however many metrics look at it and in what order."""
    names = ["style_color_region", "semantic", "style_texture_region", "semantic_region", "style_color", "fd_vgg16"]
    metrics, passes = [get_metric(name) for name in names], []
    counted = Vgg.maps
    monkeypatch.setattr(Vgg, "maps", lambda self, image: passes.append(image.shape[-1]) or counted(self, image))
    roles = {role: picture_tensor(seed, (96, 80)) for seed, role in enumerate(("output", "target", "exemplar"))}
    roles |= {role: torch.ones(1, 1, 80, 96, dtype=torch.int32) for role in ("labels", "exemplar_labels")}
    with sharing():
        for metric in metrics:
            metric.update(*(roles[role] for role in metric.needs))
    assert sorted(passes) == [96] * 3 + [256] * 3


@pytest.mark.parametrize("name", ["semantic", "fd_vgg16"])
def test_a_tensor_that_is_filled_anew_for_every_pair_is_looked_at_every_time(vgg, name):
    """As a loop over a loader with a buffer of its own does."""
    buffer, fresh, reused = picture_tensor(0), get_metric(name), get_metric(name)
    for seed in range(1, 4):
        target = picture_tensor(9 + seed)
        buffer.copy_(picture_tensor(seed))
        reused.update(buffer, target)
        fresh.update(picture_tensor(seed), target)
    assert reused.compute()["value"] == fresh.compute()["value"]


def test_a_batch_of_small_pictures_takes_no_more_memory_than_one_of_large_ones(vgg, monkeypatch, tmp_path):
    """By region everything is enlarged to 256x256: a thousand thumbnails at once would take 17 GB."""
    smooth_picture(1, (16, 16)).save(tmp_path / "o.png")
    Image.new("L", (16, 16)).save(tmp_path / "labels.png")
    picture, labels, passes, counted = str(tmp_path / "o.png"), str(tmp_path / "labels.png"), [], Vgg.maps
    monkeypatch.setattr(Vgg, "maps", lambda self, image: passes.append(image[:, 0].numel()) or counted(self, image))
    record = Record(id="a", output=picture, exemplar=picture, condition=labels, exemplar_condition=labels)
    assert evaluate([record] * 9, ["style_color_region"])["count"] == 9
    assert sum(passes) == 2 * 9 * 256**2 and max(passes) <= BATCH_PIXELS


def test_semantic_looks_through_vgg19_as_torchvision_has_it(monkeypatch, tmp_path):
    """Random weights under torchvision's file name; the cosines are computed from torchvision's own layers."""
    path = write_random_trunk(tmp_path, "vgg19")
    accept(monkeypatch, "vgg19", path)
    network = make_layers(cfgs["E"]).eval()
    network.load_state_dict({key.removeprefix("features."): value for key, value in torch.load(path).items()})
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected, maps = [], [(picture_tensor(index) / 255 - mean) / deviation for index in (1, 2)]
    with torch.inference_mode():
        for index, layer in enumerate(network):
            maps = [layer(map_) for map_ in maps]
            if index in (13, 22, 31):  # relu3_2, relu4_2, relu5_2
                expected.append(F.cosine_similarity(*maps, dim=1).mean().item())
    for index in (1, 2):
        smooth_picture(index).save(tmp_path / f"{index}.png")
    record = Record(id="a", output=str(tmp_path / "1.png"), target=str(tmp_path / "2.png"))
    result = evaluate([record], ["semantic:vgg19"])
    entry = result["metrics"]["semantic:vgg19"]
    assert list(entry["layers"].values()) == pytest.approx(expected, rel=1e-4) and max(expected) < 0.999
    assert "vgg19" in entry["protocol"] and result["weights"]["vgg19"]["file"] == path.name


def test_the_network_is_chosen_by_name(vgg):
    with pytest.raises(MissingWeights, match="vgg19"):
        get_metric("semantic:vgg19")
    with pytest.raises(ConfigError, match="no network is called 'vgg'"):
        get_metric("style_color:vgg")
    with pytest.raises(ConfigError, match="no choice of networks"):
        get_metric("psnr:vgg19")


def test_real_weights_see_that_a_portrait_is_nearer_to_itself(shared, monkeypatch):
    folder = shared / "weights"
    if not (folder / weights.REGISTRY["vgg16-caffe"].filename).is_file():
        pytest.skip("needs the Caffe VGG-16")
    monkeypatch.setenv("COCOSCTL_WEIGHTS_DIR", str(folder))
    metric = get_metric("semantic")
    first = picture_tensor(1, (96, 96))
    noisy = (first.float() + 6 * torch.randn(first.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    near, far = metric.update(first, noisy.byte())[0], metric.update(first, picture_tensor(2, (96, 96)))[0]
    assert 0.5 < near < 1 and far < near - 0.1


def test_frechet_and_kernel_distance_equal_torch_fidelity():
    fidelity_fid = pytest.importorskip("torch_fidelity.metric_fid")
    from torch_fidelity.metric_kid import kid_features_to_metric

    random = np.random.default_rng(0)
    first = torch.from_numpy(random.normal(size=(300, 24)) + 0.5)
    second = torch.from_numpy(random.normal(size=(300, 24)) @ random.normal(size=(24, 24)) * 0.3)
    fits = [GaussianFit(24), GaussianFit(24)]
    for gaussian, rows in zip(fits, (first, second)):
        gaussian.add(rows)
    statistics = [fidelity_fid.fid_features_to_statistics(rows) for rows in (first, second)]
    with contextlib.redirect_stderr(io.StringIO()):
        expected = fidelity_fid.fid_statistics_to_metric(*statistics, verbose=False)
        kernel = kid_features_to_metric(
            first, second, kid_subsets=1, kid_subset_size=300, kid_degree=3, kid_gamma=None, kid_coef0=1,
            rng_seed=0, kid_kernel="poly", verbose=False,
        )  # fmt: skip
    assert frechet_distance(*fits) == pytest.approx(expected["frechet_inception_distance"], rel=1e-9)
    assert squared_mmd(first, second) == pytest.approx(kernel["kernel_inception_distance_mean"], rel=1e-9)


def test_sliced_distances_equal_pot_on_the_same_projections():
    ot = pytest.importorskip("ot")
    from cocosnet.metrics.swd import DIRECTIONS, REPEATS, sliced_distance

    random = np.random.default_rng(0)
    first, second = (torch.from_numpy(random.normal(size=(400, 147)) * s).float() for s in (1, 1.2))
    generator, expected = torch.Generator().manual_seed(3), []
    for _ in range(REPEATS):
        directions = torch.randn(147, DIRECTIONS, generator=generator, dtype=torch.float64).numpy()
        directions /= np.linalg.norm(directions, axis=0)
        distances = ot.wasserstein_1d(first.double().numpy() @ directions, second.double().numpy() @ directions, p=1)
        expected.append(distances.mean())
    assert sliced_distance([first], [second], 400, torch.Generator().manual_seed(3)) == pytest.approx(
        np.mean(expected), rel=1e-6
    )


@pytest.fixture(scope="module")
def alexnet_home(tmp_path_factory):
    """A TORCH_HOME with a random trunk under torchvision's file name, where the package finds it as well."""
    home = tmp_path_factory.mktemp("torch-home")
    path = home / "hub/checkpoints" / weights.REGISTRY["alexnet"].filename
    path.parent.mkdir(parents=True)
    network = alexnet()
    randomise(network.features)
    network.classifier = torch.nn.Sequential(torch.nn.Identity())
    full = alexnet().state_dict() | network.state_dict()
    torch.save(full, path)
    return home, path


def test_lpips_and_diversity_equal_the_package(alexnet_home, monkeypatch, tmp_path):
    import lpips

    home, path = alexnet_home
    accept(monkeypatch, "alexnet", path)
    monkeypatch.setenv("TORCH_HOME", str(home))
    reference = lpips.LPIPS(net="alex", verbose=False).eval()
    pictures = [picture_tensor(index) for index in range(4)]

    def distance(first, second):
        with torch.no_grad():
            return reference(*(pictures[i].float() / 127.5 - 1 for i in (first, second))).item()

    metric = get_metric("lpips")
    scores = metric.update(torch.cat(pictures[:2]), torch.cat(pictures[2:]))
    expected = [distance(0, 2), distance(1, 3)]
    assert scores == pytest.approx(expected, rel=1e-5) and min(expected) > 1e-4
    assert metric.compute()["value"] == pytest.approx(np.mean(expected), rel=1e-5)
    records = []
    for index, condition in enumerate(("x", "x", "x", "y")):
        smooth_picture(index).save(tmp_path / f"{index}.png")
        records.append(Record(id=str(index), condition=condition, output=str(tmp_path / f"{index}.png")))
    found = evaluate(records, ["diversity"])["metrics"]["diversity"]
    assert found["value"] == pytest.approx(np.mean([distance(0, 1), distance(0, 2), distance(1, 2)]), rel=1e-5)
    assert found["conditions"] == 1
    assert evaluate(records[3:], ["diversity"])["metrics"]["diversity"]["value"] is None


def test_packages_that_do_not_load_are_named(tmp_path):
    broken_torchvision(tmp_path)
    code = """
from cocosnet.errors import MissingDependency
from cocosnet.metrics import features, fid
for build in (fid._build_inception, lambda: features.load_lpips("alex", None)):
    try:
        build()
    except MissingDependency as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment(PYTHONPATH=str(tmp_path))
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["fid", "lpips"], done.stderr
    assert done.stdout.count("nms does not exist") == 2


def test_lpips_of_vgg_is_the_published_formula(monkeypatch, tmp_path):
    """The trunk is torchvision's with random weights, the package gives its own calibrated layers and scaling."""
    import lpips

    path = write_random_trunk(tmp_path, "vgg16")
    accept(monkeypatch, "vgg16", path)
    trunk = make_layers(cfgs["D"]).eval()
    trunk.load_state_dict({key.removeprefix("features."): value for key, value in torch.load(path).items()})
    package = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ((-0.03, -0.088, -0.188), (0.458, 0.448, 0.45)))
    maps = [(picture_tensor(index).float() / 127.5 - 1 - shift) / scale for index in (1, 2)]
    expected, weights_left = 0.0, list(package.lins)
    with torch.inference_mode():
        for index, layer in enumerate(trunk):
            maps = [layer(map_) for map_ in maps]
            if index in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                first, second = (map_ / (map_.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for map_ in maps)
                expected += weights_left.pop(0)((first - second).square()).mean().item()
    metric = get_metric("lpips:vgg")
    assert metric.update(picture_tensor(1), picture_tensor(2)) == [pytest.approx(expected, rel=1e-4)]
    assert "trunk vgg" in metric.compute()["protocol"] and metric.weights == ("vgg16",) and expected > 1e-3


def test_outputs_of_one_condition_that_differ_in_size_are_left_out_of_diversity(alexnet_home, monkeypatch, tmp_path):
    accept(monkeypatch, "alexnet", alexnet_home[1])
    records = []
    for index, size in enumerate(((64, 64), (64, 64), (48, 64))):
        smooth_picture(index, size).save(tmp_path / f"{index}.png")
        records.append(Record(id=str(index), condition="c", output=str(tmp_path / f"{index}.png")))
    both, all_three = (evaluate(some, ["diversity"])["metrics"]["diversity"] for some in (records[:2], records))
    assert all_three["value"] == both["value"] and "2 pairs of outputs differ in size" in all_three["note"]


def test_scores_of_each_pair_are_kept(vgg, tmp_path):
    for index in range(3):
        smooth_picture(index, (64, 48 + 16 * (index == 1))).save(tmp_path / f"{index}.png")
    files = [str(tmp_path / f"{index}.png") for index in range(3)]
    records = [Record(id=str(i), output=f, target=f, extra={"kept": i}) for i, f in enumerate(files)]
    records.insert(1, Record(id="gone", output=str(tmp_path / "gone.png"), target=files[0]))
    evaluation = Evaluation(["psnr", "l1", "semantic", "fd_vgg16"])
    result = evaluation.run(iter(records))
    assert [row.id for row in evaluation.rows] == ["0", "gone", "1", "2"] and result["failed"] == 1
    assert evaluation.rows[1].failed and evaluation.rows[0].extra["kept"] == 0
    assert evaluation.rows[0].extra["scores"] == {"psnr": None, "l1": 0, "semantic": pytest.approx(1)}
    assert result["metrics"]["semantic"]["seconds"] > 0
