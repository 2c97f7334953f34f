"""The commands ``monai-adv attack``, ``attacks`` and ``table``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from monai_adv import cli_options as options
from monai_adv.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (attack, attacks, table):
        app.command()(command)


def parse_options(texts: list[str] | None, name: str = "--option") -> dict[str, Any]:
    """Options given as ``key=value`` with YAML values, by the command line's option ``name``.

    Raises:
        ConfigError: names the one without a value.
    """
    from monai_adv.studies.plain_yaml import parse_yaml

    found: dict[str, Any] = {}
    for text in texts or []:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"{name} {text!r} must be key=value, e.g. {name} steps=10")
        if key in found:
            raise ConfigError(f"{name} {key}= is given more than once; only one value counts")
        found[key] = parse_yaml(value, f"{name} {text!r}")
    return found


def attack(
    root: options.Images,
    checkpoint: options.Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the adversarial files go.")],
    subject: options.Subjects = None,
    name: options.AttackName = "ifgsm",
    eps: Annotated[
        float | None,
        typer.Option(
            metavar="EPS", help=options.EPS, show_default="0.1, or the attack's own", callback=options.above_zero
        ),
    ] = None,
    units: Annotated[
        options.Units | None, typer.Option(help=options.UNITS, case_sensitive=False, show_default="std, or its own")
    ] = None,
    norm: Annotated[
        options.Norm | None, typer.Option(help=options.NORM, case_sensitive=False, show_default="linf, or its own")
    ] = None,
    option: options.Options = None,
    store: Annotated[
        options.Store, typer.Option(help="Numbers in the files: as each source stores them, or this type.")
    ] = "source",
    resample: options.Resample = False,
    scheme: options.SchemeName = None,
) -> None:
    """Attack whole volumes and write adversarial NIfTI.

    Files are stored as their sources are, and scored again from disk. Attacks that move the anatomy also write the
    moved label, the displacement field and a figure of it.
    """
    from monai_adv import cli
    from monai_adv.studies.export import attack_files

    given: dict[str, Any] = {"eps": eps, "units": units, "norm": norm}
    spec = {"name": name, **{k: v for k, v in given.items() if v is not None}, **parse_options(option)}
    if not resample:
        cli._note_spacing(checkpoint, root, scheme)
    problems = []
    for done in attack_files(root, checkpoint, output, spec, subject, scheme, store=store, resample=resample):
        if done.error:
            problems.append(done.error)
        else:
            dice = ", ".join(f"{r} {a:.3f} -> {b:.3f} ({c:.3f} from disk)" for r, (a, b, c) in done.dice.items())
            cli.out.print(f"{done.subject}: Dice {dice}", highlight=False)
            if done.displacement is not None:
                from monai_adv.visualize.synthesis import write_exported_figure

                write_exported_figure(done)
    if (output / "records.csv").is_file():
        cli.out.print(f"records: {output / 'records.csv'}", highlight=False, soft_wrap=True)
    cli._complain(problems)


def attacks(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The table of the documentation, with options and budgets.")
    ] = False,
) -> None:
    """List the attacks by name, with their references."""
    from monai_adv import cli
    from monai_adv.attacks import available

    if markdown:
        from monai_adv.studies.attack_table import catalogue

        typer.echo(catalogue(), nl=False)
        return
    for name, text in available().items():
        cli.out.print(f"[bold]{name}[/]  {cli._escape(text)}", highlight=False)


def table(
    run_folders: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Run folders of one victim and its subjects.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the tables go.")] = Path("."),
) -> None:
    """One table of all attacks of one or several runs.

    Dice, size of the change, passes and seconds of each, and which is strongest.
    """
    from monai_adv import cli
    from monai_adv.studies.attack_table import markdown, write_attack_table

    found, paths = write_attack_table(run_folders, output)
    cli.out.print(markdown(found), markup=False, highlight=False, soft_wrap=True)
    for path in paths:
        cli.out.print(f"written: {path}", highlight=False, soft_wrap=True)
