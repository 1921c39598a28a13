"""The perceptual networks: their loading code on files of the right kind, values against other implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from cocosnet.errors import CheckpointError, MissingWeights
from cocosnet.losses.perceptual import VGG16_CAFFE, VGG19, Vgg, VggShape, load_perceptual, load_vgg
from cocosnet.weights import REGISTRY

SMALL = VggShape(counts=(2, 2), widths=(4, 6), scale=(1.0,) * 3, shift=(0.0,) * 3)


def picture(side=32, seed=0):
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_vgg19_of_torchvision(tmp_path):
    """torchvision's own network, with random weights in its own file, gives what ours gives from that file."""
    models = pytest.importorskip("torchvision.models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = models.vgg19(weights=None).features.eval()
    path = tmp_path / "vgg19.pth"
    torch.save(
        {f"features.{name}": value for name, value in theirs.state_dict().items()}
        | {"classifier.0.bias": torch.zeros(3)},
        path,
    )
    ours = Vgg(VGG19)
    load_vgg(ours, path)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = ((picture() + 1) / 2 - mean) / std
    layers = {3: "relu1_2", 8: "relu2_2", 13: "relu3_2", 17: "relu3_4", 22: "relu4_2", 31: "relu5_2"}
    found = ours(picture(), layers.values())
    with torch.no_grad():
        for index, layer in enumerate(theirs):
            x = layer(x)
            if index in layers:
                torch.testing.assert_close(found[layers[index]], x, rtol=1e-4, atol=1e-5 * float(x.abs().max()))


def test_vgg16_caffe_against_the_bare_tensors(shared, monkeypatch):
    """The plain network of the file, in Caffe's convention; ours counts each layer in its typical activation."""
    monkeypatch.setenv("COCOSCTL_WEIGHTS_DIR", str(shared / "weights"))
    network, image = load_perceptual("vgg16-caffe"), picture()
    tensors = load_file(shared / "weights" / REGISTRY["vgg16-caffe"].filename)
    x = (image.flip(1) + 1) * 127.5 - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    found = network(image, ["relu1_1", "relu1_2", "relu2_2", "relu3_3", "relu4_2", "relu5_3"])
    for block, count in enumerate((2, 2, 3, 3, 3), start=1):
        x = F.max_pool2d(x, 2) if block > 1 else x
        for i in range(1, count + 1):
            x = F.relu(
                F.conv2d(
                    x, tensors[f"conv{block}_{i}.weight"].float(), tensors[f"conv{block}_{i}.bias"].float(), padding=1
                )
            )
            if (name := f"relu{block}_{i}") in found:
                torch.testing.assert_close(
                    found[name] * VGG16_CAFFE.units[name], x, rtol=1e-3, atol=1e-4 * float(x.abs().max())
                )


def test_vgg16_activations_on_a_photograph_are_near_one(shared, monkeypatch):
    """So that the same lambdas serve this network and torchvision's."""
    monkeypatch.setenv("COCOSCTL_WEIGHTS_DIR", str(shared / "weights"))
    pixels = np.array(Image.open(shared / "demo_images" / "astronaut.png").convert("RGB").resize((128, 128)))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    network = load_perceptual("vgg16-caffe")
    exact = network(image, VGG16_CAFFE.units)
    assert all(0.3 < value.mean() < 3 for value in exact.values())
    rough = network.to(torch.bfloat16)(image, ["relu1_2", "relu4_2"])
    for name, value in rough.items():
        assert (value.float() - exact[name]).abs().mean() < 0.02 * exact[name].mean()


def test_the_network_is_frozen_but_lets_the_gradient_through():
    network, image = Vgg(SMALL).train(), picture(8).requires_grad_()
    network(image, ["relu2_1"])["relu2_1"].sum().backward()
    assert not network.training and image.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())


def test_only_what_is_asked_for_is_computed():
    network = Vgg(SMALL)
    with torch.no_grad():
        network.convs["conv2_2"].weight.fill_(float("nan"))
    found = network(picture(8), ["relu1_2", "relu2_1"])
    assert list(found) == ["relu1_2", "relu2_1"] and all(value.isfinite().all() for value in found.values())
    with pytest.raises(KeyError, match="relu3_1"):
        network(picture(8), ["relu3_1"])


def test_a_file_of_another_network_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"conv1_1.weight": torch.zeros(4, 3, 3, 3)}, path)
    with pytest.raises(CheckpointError, match="not the weights of this VGG"):
        load_vgg(Vgg(SMALL), path)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_vgg(Vgg(SMALL), path)


def test_an_unknown_network_lists_the_known_ones():
    with pytest.raises(MissingWeights, match="vgg16-caffe"):
        load_perceptual("resnet")
