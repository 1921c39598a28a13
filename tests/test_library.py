"""docs/library.md, run as a reader would run it."""

import re
import shutil
from pathlib import Path

from PIL import Image

from cocosnet.weights import ASSET_FOLDER

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capfd):
    """All of its code, in order, with nothing printed; each file that it names is there afterwards."""
    pictures = sorted((ASSET_FOLDER / "demo").glob("*.jpg"))
    shutil.copy(pictures[0], tmp_path / "photo.jpg")
    shutil.copy(pictures[1], tmp_path / "painting.jpg")
    shutil.copytree(ASSET_FOLDER / "demo", tmp_path / "photos", ignore=shutil.ignore_patterns("*.jsonl", "*.md"))
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert capfd.readouterr() == ("", "")
    assert Image.open("out.png").size == names["photo"].size and Image.open("levels.png").width > 500
    height, width = names["out"].warps[-1].shape[-2:]
    assert 0 <= names["y"] < height and 0 <= names["x"] < width and -1 <= names["cosine"] <= 1
    assert names["done"].status == "ok" and Path(names["done"].output).is_file() and Path("first-levels.png").is_file()
    assert names["scores"] == [names["value"]] and 0 < names["value"] < 1
    assert all(entry["value"] is not None for entry in names["result"]["metrics"].values())
    assert [tick["images"] for tick in names["ticks"]] == [2, 4, 6]
    assert names["trained"].config.data.size == 32
