"""``monai-adv run`` and ``monai-adv merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monai_adv import cli_bundle
from monai_adv import cli_options as options
from monai_adv.errors import ConfigError

if TYPE_CHECKING:
    from monai_adv.studies import Shard, StudyConfig


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(run)
    app.command()(merge)


STUDY, BUNDLE = "Of a study", "Of a MONAI bundle (--bundle)"


def run(
    study: Annotated[Path | None, typer.Argument(metavar="STUDY", help="Study in YAML.", show_default=False)] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Go on in a folder with units, or refuse it.", rich_help_panel=STUDY),
    ] = True,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Compute units without a result again.", rich_help_panel=STUDY)
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Only part i of n; 1/1 is all of it.", rich_help_panel=STUDY,
            show_default="by torchrun's or SLURM's variables",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what there is to do and how long it takes.", rich_help_panel=STUDY),
    ] = False,
    probes: Annotated[
        bool, typer.Option("--probes/--no-probes", help=options.PROBES, rich_help_panel=STUDY)
    ] = True,
    report_: Annotated[
        bool, typer.Option("--report/--no-report", help=options.REPORT, rich_help_panel=STUDY)
    ] = True,
    bundle: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Bundle to attack instead of a study.", rich_help_panel=BUNDLE),
    ] = None,
    trust: Annotated[
        str | None,
        typer.Option(
            metavar="SHA256", help="Of its configuration, which is executed; told if left out.", rich_help_panel=BUNDLE
        ),
    ] = None,
    attack: Annotated[
        str | None,
        typer.Option(
            metavar="ATTACK", help="Attack, see `monai-adv attacks`.", autocompletion=options.complete_attack,
            show_default="pgd", rich_help_panel=BUNDLE,
        ),
    ] = None,
    eps: Annotated[
        list[float] | None,
        typer.Option(
            metavar="EPS", help="Budget: size of the largest change; may be repeated. Units by --option units=.",
            show_default="0.1, or the attack's own", callback=options.above_zero, rich_help_panel=BUNDLE,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Option of attack or threat; may be repeated.", show_default=False,
            rich_help_panel=BUNDLE,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Where records and tables go.", show_default="bundle_run",
            rich_help_panel=BUNDLE,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Only the first cases.", show_default="all", rich_help_panel=BUNDLE),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Entry of the bundle's configuration; may be repeated.", show_default=False,
            rich_help_panel=BUNDLE,
        ),
    ] = None,
    regions: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Output channels in order, TC,WT,ET, or YAML '{WT: [1, 2, 3]}' of classes.",
            rich_help_panel=BUNDLE,
        ),
    ] = None,
    head: Annotated[
        options.HeadKind | None,
        typer.Option(help="Where the bundle does not tell.", case_sensitive=False, rich_help_panel=BUNDLE),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", help="Where its network runs: cpu, cuda or cuda:1.", show_default="cpu",
            rich_help_panel=BUNDLE,
        ),
    ] = None,
) -> None:  # fmt: skip
    """Run a study, or attack a MONAI bundle.

    A study crosses victims, attacks, budgets and subjects; finished units are skipped, so the same command goes on. A
    bundle is attacked on its own validation data. Exit code 1: a subject or unit has no result; 3: an automatic check
    failed.
    """
    from monai_adv import cli

    given: dict[str, Any] = {"trust": trust, "attack": attack, "eps": eps, "option": option, "output": output,
                             "limit": limit, "override": override, "regions": regions, "head": head,
                             "device": device}  # fmt: skip
    cli_bundle.require_one(study, bundle, given)
    if bundle is not None:
        of_studies = {"--no-resume": not resume, "--retry-failed": retry_failed, "--shard": shard, "--dry-run": dry_run}
        if any(of_studies.values()):
            raise ConfigError(f"{', '.join(k for k, v in of_studies.items() if v)} go with a study, not with --bundle")
        cli_bundle.run(bundle, **given)
        return
    assert study is not None
    from monai_adv.studies import Shard, load_study, run_study

    part = Shard.from_environment() if shard is None else Shard.parse(shard)
    part = None if part is None or part.whole else part
    config = load_study(study)
    if dry_run:
        _dry_run(config, part)
        return
    if part is not None:
        cli.out.print(f"shard {part.index} of {part.count} (by {part.source})", highlight=False)
    for entry in config.victims:
        if entry.checkpoint is not None and not entry.resample:
            cli._note_spacing(entry.checkpoint, config.data.root, config.data.scheme)
    with cli._interruptible(), cli._bar("study") as update:
        result = run_study(
            config, on_progress=cli._follow(update), shard=part, retry_failed=retry_failed, resume=resume
        )  # fmt: skip
        if part is None and probes:  # shards would all write one checks.json
            probe(config, cli._follow(update))
    cli._finish(result)
    if part is not None:
        cli.out.print(f"when all {part.count} shards are done: monai-adv merge {result.folder}", highlight=False,
                      soft_wrap=True)  # fmt: skip
        cli._complain(result.problems, again=False)
        return
    conclude(result.folder, result.problems, report_)


def merge(
    run_folder: options.RunFolder,
    probes: Annotated[bool, typer.Option("--probes/--no-probes", help=options.PROBES)] = True,
    report_: Annotated[bool, typer.Option("--report/--no-report", help=options.REPORT)] = True,
) -> None:
    """Make tables and report of what the shards of a run left.

    Exit code 1 if units are missing.
    """
    from monai_adv import cli
    from monai_adv.studies import merge_study
    from monai_adv.studies.stored import stored_study

    merged = merge_study(run_folder)
    if probes:
        stored, _ = stored_study(run_folder)
        with cli._interruptible(), cli._bar("checks") as update:
            probe(stored.model_copy(update={"output": run_folder}), cli._follow(update))
    cli._print_problems(merged.problems)
    cli.out.print(f"{merged.units} units merged, {merged.missing} missing, {len(merged.problems)} problems")
    conclude(run_folder, merged.problems, report_)


def probe(study: StudyConfig, on_progress: Any) -> None:
    """The automatic checks that compute something, of a run with any result; they are kept in its folder."""
    from monai_adv.studies.probes import run_probes

    if _scored(study.output):
        run_probes(study, on_progress)


def conclude(folder: Path, problems: list[str], report: bool) -> None:
    """Report and exit: 3 if an automatic check failed, 1 if something has no result."""
    from monai_adv import cli
    from monai_adv.studies.checks import check_run, exit_code

    if report:
        cli._compare_and_report(folder)
    cli._record(folder)
    if not _scored(folder):
        raise typer.Exit(1)  # nothing that could be checked; why not is said
    checks = check_run(folder)
    for check in checks:
        if check.status in ("FAIL", "WARN"):
            colour = "red" if check.status == "FAIL" else "yellow"
            who = f" ({check.victim})" if check.victim else ""
            cli.err.print(f"[{colour}]{check.status}[/] {cli._escape(f'{check.name}{who}: {check.detail}')}",
                          highlight=False, soft_wrap=True)  # fmt: skip
    code = exit_code(checks, problems)
    if code:
        raise typer.Exit(code)


def _scored(folder: Path) -> bool:
    """Whether any unit has a result."""
    from monai_adv.studies import read_records

    return bool((read_records(folder)["status"] == "ok").any())


def _dry_run(study: StudyConfig, part: Shard | None) -> None:
    """Print what a study consists of and an estimate of what it takes."""
    import pandas as pd

    from monai_adv import cli
    from monai_adv.studies.dry_run import dry_run

    found = dry_run(study, 1 if part is None else part.count)
    rows = pd.DataFrame(found.rows)
    rows["seconds"] = [_duration(s) for s in rows["seconds"]]
    rows = rows.rename(columns={"seconds": "time, estimated", "windows": "windows of all subjects"})
    cli._print_frame(rows, f"{found.units} units, {found.subjects} subjects")
    if part is not None:
        shards = pd.DataFrame(found.shards)
        shards["seconds"] = [_duration(s) for s in shards["seconds"]]
        cli._print_frame(shards.rename(columns={"seconds": "time, estimated"}), f"{part.count} shards")
    for name, known in found.calibrations.items():
        took = f"{known.forward:.3g} s forward, {known.gradient:.3g} s forward and backward"
        cli.out.print(f"{cli._escape(name)}: a window takes {took}", highlight=False, soft_wrap=True)
    cli.out.print(
        f"estimate for {study.device}: {_duration(found.seconds)} one after the other, {found.bytes / 2**30:.1f} GiB "
        "at most; from one window batch of each victim, without loading, scoring and the automatic checks; finished "
        "units are not left out",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    cli._complain(found.problems)


def _duration(seconds: float) -> str:
    """Time as a reader says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
