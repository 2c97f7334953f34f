"""The commands ``monai-adv attack``, ``attacks`` and ``table``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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

    options = {}
    for text in texts or []:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"{name} {text!r} must be key=value")
        options[key] = parse_yaml(value, f"{name} {text!r}")
    return options


def attack(
    root: Annotated[Path, typer.Argument(help="Folder of images in a BraTS or MSD layout.")],
    checkpoint: Annotated[Path, typer.Option(help="Victim's checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adversarial files.")],
    subject: Annotated[list[str] | None, typer.Option(help="Subject; may be repeated; all if left out.")] = None,
    name: Annotated[str, typer.Option("--attack", help="Attack, see `monai-adv attacks`.")] = "ifgsm",
    eps: Annotated[float | None, typer.Option(help="Budget; .1, or the attack's own default.")] = None,
    units: Annotated[str | None, typer.Option(help="std, range or absolute; std where the attack has none.")] = None,
    norm: Annotated[str | None, typer.Option(help="linf or l2; linf where the attack searches it.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Option of the attack as key=value (YAML value).")] = None,
    store: Annotated[str, typer.Option(help="source (as each file is stored), int16 or float32.")] = "source",
    resample: Annotated[bool, typer.Option(help="Run the network at the spacing it was trained at.")] = False,
    scheme: Annotated[str | None, typer.Option(help="Label scheme, where the names do not settle it.")] = None,
) -> None:
    """Attack whole volumes, write adversarial NIfTI as their sources are stored, and score the files again from disk.

    Attacks that move the anatomy also write the moved label, the displacement field and a figure of it.

    Example: monai-adv attack BraTS2021 --checkpoint unet.pt -o adversarial --attack ifgsm --eps 0.1 --option steps=10
    """
    from monai_adv import cli
    from monai_adv.studies.export import attack_files

    given: dict[str, Any] = {"eps": eps, "units": units, "norm": norm}
    spec = {"name": name, **{k: v for k, v in given.items() if v is not None}, **parse_options(option)}
    problems = []
    for done in attack_files(root, checkpoint, output, spec, subject, scheme, store=store, resample=resample):
        if done.error:
            problems.append(done.error)
            cli.err.print(f"[red]{cli._escape(done.error)}[/]", highlight=False, soft_wrap=True)
        else:
            dice = ", ".join(f"{r} {a:.3f} -> {b:.3f} ({c:.3f} from disk)" for r, (a, b, c) in done.dice.items())
            cli.out.print(f"{done.subject}: Dice {dice}", highlight=False)
            if done.displacement is not None:
                from monai_adv.visualize.synthesis import write_exported_figure

                write_exported_figure(done)
    if (output / "records.csv").is_file():
        cli.out.print(f"records: {output / 'records.csv'}", highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)


def attacks(
    markdown: Annotated[bool, typer.Option(help="The table of the documentation, with options and budgets.")] = False,
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
    run_folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders of one victim and data.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the tables.")] = Path("."),
) -> None:
    """One table of all attacks of one or several runs: Dice, size of the change, passes, seconds, who is strongest.

    Example: monai-adv table runs/sign runs/auto -o runs
    """
    from monai_adv import cli
    from monai_adv.studies.attack_table import markdown, write_attack_table

    found, paths = write_attack_table(run_folders, output)
    cli.out.print(markdown(found), markup=False, highlight=False, soft_wrap=True)
    for path in paths:
        cli.out.print(f"written: {path}", highlight=False, soft_wrap=True)
