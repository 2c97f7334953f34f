"""The command line ``monai-adv``: demo, simulate, datalist, check, train, attack, run, compare, report and more."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from monai_adv import (
    __version__,
    cli_ablation,
    cli_attacks,
    cli_bundle,
    cli_certify,
    cli_convert,
    cli_help,
    cli_run,
    cli_score,
    cli_synthesis,
    cli_train,
    cli_universal,
    cli_victim,
)
from monai_adv import cli_options as options
from monai_adv.errors import ConfigError, MonaiAdvError

if TYPE_CHECKING:
    from monai_adv.studies import Progress, StudyResult

app = typer.Typer(
    help="Adversarial attacks and defenses for volumetric medical image segmentation.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    cls=cli_help.Group,
    context_settings={"help_option_names": ["--help", "-h"]},
)
# a table that is piped or logged is not folded into 80 columns
out = Console(width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True)
RAW = "Of *_raw.csv"
CHECK_COLUMNS = (
    "subject",
    "status",
    "scheme",
    "shape",
    "spacing",
    "orientation",
    "dtype",
    "label_values",
    "WT_ml",
    "TC_ml",
    "ET_ml",
)


def main() -> None:
    """Run the command line; expected errors are printed without a traceback and exit with 1."""
    try:
        app()
    except MonaiAdvError as error:
        err.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except (OSError, MemoryError) as error:  # of the machine, not of the program: a name too long, a folder forbidden
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        what = f"{where}{getattr(error, 'strerror', None) or error or 'out of memory'}{_remedy(error)}"
        err.print(f"[bold red]error:[/] {_escape(what)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _remedy(error: BaseException) -> str:
    """What to do about an error of the machine."""
    if isinstance(error, NotADirectoryError):
        return "; a part of this path is a file: give another folder"
    if isinstance(error, IsADirectoryError):
        return "; it is a folder: give the name of a file"
    if isinstance(error, PermissionError):
        return "; you are not allowed to: give another place, or ask for access"
    return "; use fewer or smaller volumes at a time" if isinstance(error, MemoryError) else ""


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit()


@app.command()
def simulate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the cohort goes.")],
    subjects: Annotated[int, typer.Option(min=1, metavar="N", help="Number of subjects.")] = 12,
    spacing: Annotated[float, typer.Option(min=1.0, max=4.0, metavar="MM", help="Voxel size.")] = 2.0,
    seed: options.Seed = 0,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Processes.")] = 1,
) -> None:
    """Write a simulated tumour cohort as BraTS-named NIfTI.

    T1, T1c, T2, FLAIR and label of each subject. A subject depends on the seed and its number only.
    """
    from monai_adv.data import simulate_cohort

    items = simulate_cohort(folder, subjects=subjects, spacing=spacing, seed=seed, workers=workers, progress=True)
    out.print(f"{len(items)} subjects in {folder}")


@app.command()
def datalist(
    root: options.Images,
    scheme: options.SchemeName = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="JSON file to write.", show_default="printed"),
    ] = None,
) -> None:
    """Print the MONAI datalist of a folder as JSON."""
    from monai_adv.data import brats_datalist

    text = json.dumps(brats_datalist(root, scheme), indent=2)
    if output is None:
        print(text)
        return
    from monai_adv.data.files import write_atomic

    write_atomic(output, text.encode())
    out.print(f"written to {output}")


@app.command()
def check(
    root: options.Images,
    scheme: options.SchemeName = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="CSV to write, every fact of every subject."),
    ] = None,
) -> None:
    """Check every file of a folder before anything runs on it.

    Exit code 1 if a subject cannot be used.
    """
    from monai_adv.data import check_folder
    from monai_adv.data.files import write_atomic
    from monai_adv.studies.records import csv_bytes

    report = check_folder(root, scheme)
    if output is not None:
        write_atomic(output, csv_bytes(report.to_frame()))
    shown = [c for c in CHECK_COLUMNS if c in report.to_frame().columns]
    _print_frame(report.to_frame()[shown], f"{root}")
    for finding in report.findings:
        colour = {"error": "red", "warning": "yellow"}.get(finding.severity, "cyan")
        out.print(f"[{colour}]{finding.severity}[/] {_escape(str(finding))}", highlight=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)
    out.print("no errors")


@app.command()
def compare(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run folder, CSV of records, or tables of a kind: *_raw.csv or scores.csv."),
    ],
    metric: Annotated[
        str | None, typer.Option(metavar="METRIC", help="Column to compare.", show_default="as declared, or dice")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="SETTING", help="What the others are compared with.", show_default="as declared, or clean"
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0.0001, max=0.5, metavar="ALPHA", help="Family-wise error of the tests.",
            show_default="as declared, or 0.05",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where the tables go.", show_default="tables in RUN"),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Name of each file, in order; may be repeated.", show_default="of the files",
            rich_help_panel=RAW,
        ),
    ] = None,
    regions: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Names of the classes: TC,WT,ET.", rich_help_panel=RAW)
    ] = None,
    join: Annotated[
        options.Join | None,
        typer.Option(
            help="What tells a case: its whole path, or its file's name.", show_default="path", rich_help_panel=RAW
        ),
    ] = None,
) -> None:  # fmt: skip
    """Compare the settings of a run by exact paired tests.

    Wilcoxon signed-rank tests over subjects with Holm's correction, effect sizes and intervals; as the study declared
    them before it was run, where options leave that open. Writes CSV, Markdown and LaTeX. Files of MONAI's
    MetricsSaver, the clean evaluator's first, are joined on the filename.
    """
    from monai_adv.studies.analysis import analyse_raw, analyse_run, write_analysis
    from monai_adv.studies.config import CompareConfig
    from monai_adv.studies.scoring import is_scores

    first = results[0]
    folder = output or (first if first.is_dir() else first.parent)
    raw = {"names": name, "regions": regions.split(",") if regions else None, "join": join}
    raw = {key: value for key, value in raw.items() if value}
    if len(results) > 1 or first.name.endswith("_raw.csv") or is_scores(first):
        config = CompareConfig() if alpha is None else CompareConfig(alpha=alpha)
        analysis = analyse_raw(results, config, baseline, metric=metric, **raw)
    elif raw:
        raise ConfigError("--name, --regions and --join are for the *_raw.csv of MONAI's MetricsSaver")
    else:
        flags = {"metric": metric, "baseline": baseline, "alpha": alpha}
        analysis = analyse_run(first, **{key: value for key, value in flags.items() if value is not None})
    _print_analysis(analysis)
    for path in write_analysis(folder, analysis):
        out.print(f"written: {path}", highlight=False, soft_wrap=True)


@app.command()
def report(run_folder: options.RunFolder) -> None:
    """Write tables, figures and report.html of a run again."""
    _compare_and_report(run_folder)
    _record(run_folder)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where cohort, results and report go.")] = Path(
        "monai_adv_demo"
    ),
    subjects: Annotated[int, typer.Option(min=1, metavar="N", help="Held-out subjects to attack.")] = 12,
    seed: options.Seed = 7,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train the victim again instead of loading the packaged one.")
    ] = False,
) -> None:
    """Simulate a cohort, attack it, compare, write a report.

    From nothing to p-values: needs no data and no GPU. The victim is a small U-Net that ships with the package.
    """
    from monai_adv.studies import run_study
    from monai_adv.studies.demo import demo_study

    with _interruptible(), _bar("demo") as update:
        study = demo_study(folder, subjects=subjects, seed=seed, retrain=retrain, on_progress=update)
        result = run_study(study, on_progress=_follow(update))
        cli_run.probe(study, _follow(update))
    _finish(result)
    cli_run.conclude(result.folder, result.problems, report=True)


cli_attacks.register(app)
cli_bundle.register(app)
cli_ablation.register(app)
cli_certify.register(app)
cli_convert.register(app)
cli_run.register(app)
cli_score.register(app)
cli_synthesis.register(app)
cli_train.register(app)
cli_universal.register(app)
cli_victim.register(app)
cli_help.arrange(app)


def _follow(update: Any) -> Any:
    def follow(progress: Progress) -> None:
        update(progress.done / max(1, progress.total), progress.what)

    return follow


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM drop the unit in progress; finished ones are on disk, and the exit code says what it was."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        err.print("interrupted; finished units are kept, the same command goes on")
        raise typer.Exit(143 if error.args == (signal.SIGTERM,) else 130) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _note_spacing(checkpoint: Path, root: Path, scheme: str | None) -> None:
    """Warn of a network that sees voxels of a size it was not trained at."""
    from monai_adv.studies.victims import spacing_note

    note = spacing_note(checkpoint, root, scheme)
    if note is not None:
        err.print(f"[yellow]{_escape(note)}[/]", highlight=False, soft_wrap=True)


def _complain(problems: list[str], again: bool = True) -> None:
    """Name the subjects that could not be used, and exit with 1 if there are any."""
    if again:
        _print_problems(problems)
    if problems:
        raise typer.Exit(1)


def _print_problems(problems: list[str]) -> None:
    """Lines ``subject: what is wrong``; what is wrong with many is said once."""
    who: dict[str, list[str]] = {}
    for problem in problems:
        subject, _, what = problem.partition(": ")
        who.setdefault(what, []).append(subject)
    for what, (first, *others) in who.items():
        more = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        again = f" (the same of {len(others)} more: {more})" if others else ""
        err.print(
            f"[red]{_escape((f'{first}: {what}' if what else first) + again)}[/]", highlight=False, soft_wrap=True
        )


def _finish(result: StudyResult) -> None:
    _print_problems(result.problems)
    out.print(f"{result.computed} units computed, {result.reused} reused, {len(result.problems)} problems")


def _compare_and_report(folder: Path) -> None:
    from monai_adv.visualize.study_report import write_study_report

    analysis, path = write_study_report(folder)
    _print_analysis(analysis)
    out.print(f"tables: {folder / 'tables'}", highlight=False, soft_wrap=True)
    out.print(f"report: {os.path.abspath(path)}", highlight=False, soft_wrap=True)


def _record(folder: Path) -> None:
    """Tell the study's trackers of a run; one that fails is a warning."""
    from monai_adv.studies.stored import stored_study
    from monai_adv.studies.tracking import track

    for line in track(stored_study(folder)[0], folder):
        err.print(f"[yellow]{_escape(line)}[/]", highlight=False, soft_wrap=True)


def _print_analysis(analysis: Any) -> None:
    for victim, comparison in analysis.comparisons.items():
        out.print(f"\n[bold]{_escape(victim)}[/]: every setting against {comparison.baseline}")
        out.print(comparison.to_rich())
    if analysis.victims is not None:
        out.print(f"\nvictims against {_escape(analysis.victims.baseline)}")
        out.print(analysis.victims.to_rich())
    for note in analysis.notes:
        err.print(f"[yellow]{_escape(note)}[/]", highlight=False, soft_wrap=True)
    if not analysis.defenses.empty:
        mean = analysis.defenses[analysis.defenses["region"] == "mean"].drop(columns="region")
        _print_frame(mean, "mean Dice over regions, defense x attack")
    if not analysis.claims.empty:
        _print_frame(analysis.claims, "published claims (Liu et al. 2019), one-sided, Holm within each claim")
    if not analysis.ordering.empty:
        from monai_adv.studies.analysis import shown_ordering

        _print_frame(shown_ordering(analysis.ordering), "expected order, one-sided, Holm over the rows")


def _print_frame(frame: Any, title: str) -> None:
    table = Table(title=_escape(title))
    for column in frame.columns:
        table.add_column(_escape(str(column)), overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(_escape(_cell(value)) for value in row))
    out.print(table)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if value != value else f"{value:.4g}"  # NaN: there is no such number


@contextmanager
def _bar(title: str) -> Iterator[Any]:
    """A progress bar on a terminal, nothing elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[what]}"))
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=1.0, what="")
        yield lambda done, what="": progress.update(task, completed=done, what=_escape(what))


def _escape(text: str) -> str:
    """Text as it is: no markup, and no control sequences, which a file name may hold, for the terminal."""
    from rich.markup import escape

    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return escape("".join(shown))


def _command() -> str:
    return " ".join(["monai-adv", *sys.argv[1:]])
