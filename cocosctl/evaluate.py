"""`cocosctl eval`: outputs -> numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from cocosctl import options
from cocosctl.exits import ExitCode
from cocosctl.jobs import first_process_speaks, open_records, own_device
from cocosctl.output import Output
from cocosnet.data.records import Record, write_manifest
from cocosnet.errors import ConfigError
from cocosnet.metrics.registry import BUILT_IN

if TYPE_CHECKING:
    from cocosnet.metrics import Evaluation
    from cocosnet.metrics.fid import Frechet

STATISTICS = ".npz"
WEIGHTS = ".safetensors"
OPTIONS = {
    "target": "--targets", "exemplar": "--exemplars", "warp": "--warps",
    "labels": "--labels", "exemplar_labels": "--exemplar-labels",
}  # role -> the option that names its folder  # fmt: skip


def evaluate(
    metrics: Annotated[
        str,
        Option("--metrics", metavar="A,B,..", show_default=False, help=f"{', '.join(BUILT_IN)}; packages add more."),
    ],
    manifest: options.Manifest = None,
    outputs: Annotated[
        Path | None, Option("--outputs", metavar="DIR|LIST", help="Made pictures, not records; or .npz statistics.")
    ] = None,
    targets: Annotated[
        Path | None, Option("--targets", metavar="DIR|LIST", help="True pictures, paired by name; or .npz statistics.")
    ] = None,
    exemplars: Annotated[Path | None, Option("--exemplars", metavar="DIR|LIST", help="Exemplars.")] = None,
    warps: Annotated[Path | None, Option("--warps", metavar="DIR|LIST", help="Warped exemplars.")] = None,
    labels: Annotated[Path | None, Option("--labels", metavar="DIR|LIST", help="Label maps of the outputs.")] = None,
    exemplar_labels: Annotated[
        Path | None, Option("--exemplar-labels", metavar="DIR|LIST", help="Label maps of the exemplars.")
    ] = None,
    scores: Annotated[
        Path | None,
        Option(
            "--scores", metavar="FILE", dir_okay=False, help="Write the records with each pair's scores, as a manifest."
        ),
    ] = None,
    report: Annotated[
        Path | None, Option("--report", metavar="DIR", file_okay=False, help="Write DIR/index.html, a page to sort.")
    ] = None,
    save_stats: Annotated[
        Path | None,
        Option(
            "--save-stats",
            metavar="FILE",
            dir_okay=False,
            help="Write the outputs' statistics (fid, fd_vgg16) as .npz.",
        ),
    ] = None,
    device: options.Device = "auto",
    seed: options.Seed = None,
    limit: options.Limit = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure outputs: against targets, or against exemplars.

    Folders pair pictures by name, lists (text files of one path a line) by line; a picture is a list of one. Prints one
    object: with --json as JSON with protocols, counts, weights and versions, otherwise a line `name value` a metric.
    Under torchrun the pairs are shared among the processes.
    """
    sources = {
        "output": outputs, "target": targets, "exemplar": exemplars, "warp": warps,
        "labels": labels, "exemplar_labels": exemplar_labels,
    }  # fmt: skip
    sources = {role: path for role, path in sources.items() if path is not None}
    _check_form(manifest, outputs, scores, save_stats)
    sides = _sides(sources, manifest, save_stats)
    with first_process_speaks():
        records = _records(manifest, {role: path for role, path in sources.items() if role not in sides}, limit)
    out = Output(as_json, quiet, verbose)
    names = [name.strip() for name in metrics.split(",") if name.strip()]

    def check(evaluation: Evaluation) -> None:
        if manifest is None:
            _refuse_missing(evaluation, sources)
        if save_stats is not None:
            _saved(evaluation)

    evaluation, result = _measure(records, names, device, seed or 0, sides, check, out)
    if result is None:
        return
    try:
        if save_stats is not None:
            _save_statistics(save_stats, evaluation)
        _write_pairs(evaluation, result, scores, report, out)
    finally:  # numbers that may have taken hours are told whatever becomes of the files
        _tell(result, out)
    if result["failed"]:
        raise typer.Exit(ExitCode.FAILED_ITEMS)


def _check_form(manifest: str | None, outputs: Path | None, scores: Path | None, save_stats: Path | None) -> None:
    """Raises BadParameter (usage)."""
    from cocosnet.data.images import SUFFIXES

    if scores == Path("-"):
        raise typer.BadParameter("stdout has the result; give the scores a file", param_hint="--scores")
    if scores is not None and scores.suffix.lower() in (*SUFFIXES, STATISTICS, WEIGHTS):
        raise typer.BadParameter(f"{scores}: is written as a manifest; name it so, as .jsonl", param_hint="--scores")
    if manifest is None and outputs is None:
        raise typer.BadParameter("give --manifest, or --outputs and --targets", param_hint="--manifest")
    if save_stats is not None and save_stats.suffix != STATISTICS:  # by which --targets knows statistics
        raise typer.BadParameter(f"{save_stats}: give a name that ends in {STATISTICS}", param_hint="--save-stats")


def _sides(sources: dict[str, Path], manifest: str | None, save_stats: Path | None) -> dict[str, Path | None]:
    """Sides that are no pictures: files of statistics, and missing targets (None) where the outputs' are saved."""
    sides: dict[str, Path | None] = {
        role: path for role, path in sources.items() if role in ("output", "target") and path.suffix == STATISTICS
    }
    if save_stats is not None and manifest is None and "target" not in sources:
        sides["target"] = None
    return sides


def _records(manifest: str | None, sources: dict[str, Path], limit: int | None) -> Iterable[Record]:
    """Records of a manifest, or of folders or lists, whichever is named; none where all is known by statistics."""
    if manifest is not None:
        if sources:
            raise typer.BadParameter("give --manifest or folders, not both", param_hint="--manifest")
        return open_records(manifest, limit)
    from cocosnet.metrics import records_from

    return records_from(sources)[:limit] if sources else []


def _measure(
    records: Iterable[Record],
    names: list[str],
    device: str,
    seed: int,
    sides: dict[str, Path | None],
    check: Callable[[Evaluation], None],
    out: Output,
) -> tuple[Evaluation, dict[str, Any] | None]:
    """Run the metrics once `check` has passed them; the result is None in all processes but the first."""
    from cocosnet.metrics import Evaluation
    from cocosnet.metrics.shards import Shards

    shards = Shards.join()

    def load() -> Evaluation:
        evaluation = Evaluation(names, own_device(device), seed=seed, sides=sides, shards=shards)
        check(evaluation)
        return evaluation

    try:
        with first_process_speaks():
            evaluation = shards.agree(load)
        with out.progress("pairs", len(records) if isinstance(records, list) else None) as advance:
            result = evaluation.run(_counted(records, advance))
    except BaseException:
        shards.abandon()
        raise
    shards.leave()
    return evaluation, result


def _refuse_missing(evaluation: Evaluation, sources: dict[str, Path]) -> None:
    """Where pictures come from folders or lists, what a metric needs and nobody names is missing for all of them."""
    for name, metric in evaluation.metrics.items():
        for role in metric.needs:
            if role not in sources:
                option = OPTIONS.get(role, "--manifest")
                raise typer.BadParameter(f"{name} needs it: the {role} of every output", param_hint=option)


def _counted(records: Iterable[Record], advance: Any) -> Iterator[Record]:
    for record in records:
        yield record
        advance()


def _saved(evaluation: Evaluation) -> Frechet:
    """The one metric whose statistics --save-stats writes."""
    able = [metric for metric in evaluation.metrics.values() if metric.from_statistics]
    if len(able) != 1:
        raise ConfigError("--save-stats writes the statistics of one metric; name fid or fd_vgg16 in --metrics")
    return able[0]


def _save_statistics(path: Path, evaluation: Evaluation) -> None:
    from cocosnet.metrics.fid import save_statistics

    save_statistics(path, _saved(evaluation).sides["output"])


def _write_pairs(
    evaluation: Evaluation, result: dict[str, Any], scores: Path | None, report: Path | None, out: Output
) -> None:
    """The scores of each pair as records, and the page."""
    if scores is not None:
        write_manifest(scores, evaluation.rows)
        out.note(f"scores: {scores}")
    if report is not None:
        from cocosnet.viz.scores import write_scores_page

        page = report / "index.html"
        with out.progress("rows", len(evaluation.rows)) as advance:
            write_scores_page(page, evaluation.rows, result, advance)
        out.note(f"report: {page}")


def _tell(result: dict[str, Any], out: Output) -> None:
    """The values to stdout, what a reader should know to stderr."""
    values = {name: entry["value"] for name, entry in result["metrics"].items()}
    out.result(result if out.as_json else values)
    if out.as_json:
        _table(result, out)
    for name, entry in result["metrics"].items():
        if entry.get("note"):
            out.note(f"{name}: {entry['note']}")
    for message in result["warnings"]:
        out.note(f"warning: {message}")
    for message in result["errors"]:
        out.error(message)
    out.note(f"{result['count']} pair{'s' * (result['count'] != 1)} measured, {result['failed']} failed")


def _table(result: dict[str, Any], out: Output) -> None:
    """Names, values and seconds for a reader, where stdout has the JSON."""
    width = max(map(len, result["metrics"]))
    for name, entry in result["metrics"].items():
        value = "none" if entry["value"] is None else f"{entry['value']:.6g}"
        out.note(f"{name:<{width}}  {value:>12}  {entry['seconds']:9.1f} s")
