"""The paper's tables, run whole: train every row's model, translate what was held out, measure.

A cell is one row on one dataset. Its model lies in OUTPUT/DATASET/ROW and serves every table that names it, so that
Tables 1 to 3 share their models; a run that was stopped goes on, and a finished one is not trained again. The rows are
data: `assets/tables.yaml`.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cocosnet.config import Config, load_config
from cocosnet.data.dataset import check_prepared
from cocosnet.data.records import MANIFEST_NAME, Record, read_manifest, write_manifest
from cocosnet.errors import CocosError, ConfigError, DataError
from cocosnet.files import atomic_write, safe_name
from cocosnet.weights import packed_file

if TYPE_CHECKING:
    from cocosnet.inference import Translator

TABLES = "tables.yaml"
SCHEMA = "cocosctl.table/1"


@dataclass(frozen=True)
class Cell:
    """One row of a table on one dataset."""

    dataset: str
    row: str
    title: str
    preset: str  # the dataset's, which the row's changes start from
    overrides: tuple[str, ...]  # section.key=value
    metrics: tuple[str, ...]
    paper: dict[str, float]  # printed values, by metric
    data: Path  # prepared folder
    run: Path  # the model's run folder

    @cached_property
    def config(self) -> Config:
        """The row's config. Raises ConfigError."""
        return load_config(self.preset, self.overrides)

    @property
    def command(self) -> str:
        """The training as a command of its own, e.g. for several GPUs; `reproduce` goes on from its result."""
        words = ["cocosctl", "train", self.preset, "--data", self.data, "-o", self.run]
        return shlex.join(map(str, [*words, *(word for change in self.overrides for word in ("--set", change))]))


def table_names() -> list[str]:
    """Names of the tables."""
    return list(_tables()["tables"])


def table_cells(
    table: str,
    data: Path,
    output: Path,
    *,
    datasets: Sequence[str] = (),
    metrics: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> list[Cell]:
    """The cells of a table, datasets in their order, rows within each.

    Args:
        table: table1 .. table5.
        data: holds one prepared folder a dataset, by its name.
        output: of the runs and the table.
        datasets: leave the others out. metrics: instead of the table's. overrides: changes to every row's config.

    Raises:
        ConfigError: no such table or dataset, or a config that cannot be.
        DataError: a dataset is not there.
    """
    known = _tables()
    if table not in known["tables"]:
        raise ConfigError(f"no table is called {table!r}; the tables are {', '.join(known['tables'])}")
    entry = known["tables"][table]
    for name in datasets:
        if name not in entry["datasets"]:
            raise ConfigError(f"{table} has no dataset {name!r}; it has {', '.join(entry['datasets'])}")
    cells = []
    for name in datasets or entry["datasets"]:
        if not (data / name / MANIFEST_NAME).is_file():
            raise DataError(f"{data / name}: not a prepared folder; make it as the card of {name} says (datasets/)")
        for row, values in entry["rows"].items():
            paper = dict(zip(entry["metrics"], entry["paper"][name][row], strict=True))
            changes, preset = (*values["set"], *overrides), known["datasets"][name]
            cell = Cell(name, row, values["title"], preset, changes, (), paper, data / name, output / name / row)
            cells.append(dataclasses.replace(cell, metrics=tuple(metrics or _metrics(entry, cell.config))))
    return cells


def reproduce(
    table: str,
    cells: Sequence[Cell],
    output: Path,
    device: str = "auto",
    on_cell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run the cells and write OUTPUT/TABLE.json and OUTPUT/TABLE.md, also after each cell, so that nothing is lost.

    Returns:
        {"schema": "cocosctl.table/1", "table", "title", "rows": [{"dataset", "row", "title", "paper": the printed
        values of the metrics that were run, "result": what `Evaluation.run` returned}]}

    Raises:
        MissingWeights, MissingDependency: a metric cannot run here. DataError: a folder does not fit its row's config,
            or holds nothing out. Both are found out before anything is trained.
        DataError: nothing could be translated; and as `Trainer`.
    """
    from cocosnet.checkpoint import resolve_device
    from cocosnet.metrics import get_metric

    place = str(resolve_device(device))
    for name in dict.fromkeys(name for cell in cells for name in cell.metrics):
        get_metric(name, device=place)
    for cell in cells:
        check_prepared(cell.data, cell.config)
        _held_out(cell)
    found = {"schema": SCHEMA, "table": table, "title": _tables()["tables"][table]["title"], "rows": []}
    for cell in cells:
        on_cell(f"{table}: {cell.title} on {cell.dataset}")
        paper = {name: value for name, value in cell.paper.items() if name in cell.metrics}
        entry = {"dataset": cell.dataset, "row": cell.row, "title": cell.title, "paper": paper}
        found["rows"].append({**entry, "result": _run(cell, place)})
        atomic_write(output / f"{table}.json", json.dumps(found, indent=1) + "\n")
        atomic_write(output / f"{table}.md", as_markdown(found))
    return found


def as_markdown(table: dict[str, Any]) -> str:
    """The table for a reader: a line a cell, the paper's value in brackets after ours."""
    names = list(dict.fromkeys(name for row in table["rows"] for name in row["result"]["metrics"]))
    lines = [f"# {table['table']}: {table['title']}", "", "In brackets: the paper's value.", ""]
    lines += [f"| dataset | row | {' | '.join(names)} | pairs |", "|---" * (len(names) + 3) + "|"]
    for row in table["rows"]:
        values = " | ".join(_value(row, name) for name in names)
        lines.append(f"| {row['dataset']} | {row['title']} | {values} | {row['result']['count']} |")
    return "\n".join(lines) + "\n"


def _value(row: dict[str, Any], name: str) -> str:
    value = row["result"]["metrics"].get(name, {}).get("value")
    printed = f" ({row['paper'][name]:g})" if name in row["paper"] else ""
    return ("-" if value is None else f"{value:.4g}") + printed


def _tables() -> dict[str, Any]:
    return yaml.safe_load(packed_file(TABLES).read_text())


def _metrics(entry: dict[str, Any], config: Config) -> list[str]:
    """The table's metrics; by region as well where conditions are label maps."""
    return entry["metrics"] + (entry.get("region_metrics", []) if config.data.task == "mask" else [])


def _run(cell: Cell, device: str) -> dict[str, Any]:
    """Train (or go on, or find it done), translate, measure."""
    from cocosnet.inference import Translator
    from cocosnet.metrics import Evaluation
    from cocosnet.train.trainer import Trainer

    model = Trainer(cell.config, cell.data, cell.run, device).train()
    translator = Translator(model, device=device, keep_parts=True)
    records = [_translated(translator, record, cell.run / "val") for record in _held_out(cell)]
    evaluation = Evaluation(cell.metrics, device)
    result = evaluation.run(records)
    write_manifest(cell.run / "scores.jsonl", evaluation.rows)
    if not result["count"]:
        raise DataError(f"{cell.run}: no pair could be measured: {result['errors'][0]}")
    return result


def _held_out(cell: Cell) -> list[Record]:
    """The records of a cell's folder that are not learned from. Raises DataError where there are none."""
    records = [record for record in read_manifest(cell.data) if record.extra.get("split") == "val"]
    if not records:
        raise DataError(f"{cell.data}: holds nothing out; prepare it again with data.val_fraction above 0")
    return records


def _translated(translator: Translator, record: Record, folder: Path) -> Record:
    try:
        return translator.translate(record, folder / f"{safe_name(record.id)}.png")
    except CocosError as error:
        return record.failure(str(error))
