"""External weights: found where they should be, refused where they are wrong, a useful word where they are missing."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys

import pytest

from cocosnet import weights
from cocosnet.errors import CheckpointError, MissingWeights

CONTENT = b"some weights"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Two empty search folders; nothing may be fetched unless a test allows it."""
    monkeypatch.setenv("COCOSCTL_WEIGHTS_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("COCOSCTL_OFFLINE", "1")
    return tmp_path / "own", tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """An entry whose URL is a file on this machine, with the hash of CONTENT."""
    source = tmp_path / "server" / "w.pth"
    source.parent.mkdir()
    source.write_bytes(CONTENT)
    made = dataclasses.replace(
        weights.REGISTRY["vgg19"],
        name="w",
        filename="w.pth",
        url=source.as_uri(),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(weights.REGISTRY, "w", made)
    return made


def put(folder, name, content=CONTENT):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize("name", ["vgg19", "vgg16-caffe", "hed", "fid-inception"])
def test_missing_weights_say_what_to_put_where(name, folders):
    entry = weights.REGISTRY[name]
    assert not weights.has_weights(name)
    with pytest.raises(MissingWeights) as caught:
        weights.find_weights(name)
    message = str(caught.value)
    assert name != "hed" or "or take hed-small" in message
    for part in (name, entry.url or entry.source, entry.sha256, str(folders[0] / entry.filename)):
        assert part in message
    assert "\n" not in message


def test_the_own_folder_comes_before_torchs(entry, folders):
    second = put(folders[1], "w.pth")
    assert weights.find_weights("w") == second
    first = put(folders[0], "w.pth")
    assert weights.has_weights("w") and weights.find_weights("w") == first


def test_another_content_is_refused_with_both_hashes(entry, folders):
    put(folders[0], "w.pth", b"something else")
    with pytest.raises(CheckpointError) as caught:
        weights.find_weights("w")
    assert entry.sha256 in str(caught.value) and hashlib.sha256(b"something else").hexdigest() in str(caught.value)


def test_a_file_that_changes_is_hashed_again(entry, folders):
    path = put(folders[0], "w.pth")
    assert weights.find_weights("w") == path
    path.write_bytes(b"damaged later")
    with pytest.raises(CheckpointError):
        weights.find_weights("w")


def test_a_download_is_told_of_and_kept_once_its_hash_is_right(entry, folders, monkeypatch, caplog):
    with pytest.raises(MissingWeights):
        weights.find_weights("w")  # offline: not even tried
    monkeypatch.delenv("COCOSCTL_OFFLINE")
    assert weights.find_weights("w").read_bytes() == CONTENT
    assert list(folders[0].iterdir()) == [folders[0] / "w.pth"]
    assert [f"fetching {folders[0] / 'w.pth'}" in message and entry.url in message for message in caplog.messages] == [
        True
    ]


def test_where_the_own_folder_cannot_be_written_files_go_to_the_next(entry, folders, monkeypatch):
    folders[0].write_text("a file stands for a read-only folder, which the superuser could write")
    with pytest.raises(MissingWeights) as caught:
        weights.find_weights("hed")
    assert f"put it at {folders[1]}/hed" in str(caught.value)
    assert weights.imported_folder() == folders[1] / "cocosctl"
    monkeypatch.delenv("COCOSCTL_OFFLINE")
    assert weights.find_weights("w") == folders[1] / "w.pth"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become an unknown user")
def test_an_unknown_user_without_a_home_has_search_folders_all_the_same():
    program = "import os; from cocosnet import weights; os.setuid(54321); print(len(weights.search_folders()))"
    homeless = {name: value for name, value in os.environ.items() if name not in ("HOME", "COCOSCTL_WEIGHTS_DIR")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=homeless)
    assert done.stdout == "1\n", done.stderr


def test_a_wrong_or_failed_download_leaves_nothing(entry, folders, monkeypatch):
    monkeypatch.delenv("COCOSCTL_OFFLINE")
    monkeypatch.setitem(weights.REGISTRY, "w", dataclasses.replace(entry, sha256="0" * 64))
    with pytest.raises(CheckpointError, match="0000"):
        weights.find_weights("w")
    monkeypatch.setitem(weights.REGISTRY, "w", dataclasses.replace(entry, url=entry.url + ".not-there"))
    with pytest.raises(MissingWeights, match="the download failed"):
        weights.find_weights("w")
    assert list(folders[0].iterdir()) == []


def test_the_public_port_of_hed_does_as_well(folders):
    path = put(folders[1], "network-bsds500.pytorch")
    assert weights.find_weights("hed") == path


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(MissingWeights, match="vgg16-caffe"):
        weights.find_weights("vgg-sixteen")


@pytest.mark.parametrize("name", ["vgg16-caffe", "hed"])
def test_the_real_files_have_the_hashes_and_sizes_on_record(name, shared, monkeypatch):
    monkeypatch.setenv("COCOSCTL_WEIGHTS_DIR", str(shared / "weights"))
    assert weights.find_weights(name).stat().st_size == weights.REGISTRY[name].size
