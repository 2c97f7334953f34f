"""``monai-adv run --bundle`` and the command ``monai-adv bundle-overlay``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from monai_adv import cli_options as options
from monai_adv.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("bundle-overlay")(bundle_overlay)


def require_one(study: Path | None, bundle: Path | None, given: Mapping[str, Any]) -> None:
    """A study or a bundle, and the options of a bundle only with one.

    Args:
        study: the study file, or None.
        bundle: the bundle, or None.
        given: the options of ``--bundle`` by name, None or empty where they were left out.

    Raises:
        ConfigError: says what to give.
    """
    if (study is None) == (bundle is None):
        raise ConfigError("give either a study (monai-adv run study.yaml) or a bundle (monai-adv run --bundle FOLDER)")
    extra = [f"--{name}" for name, value in given.items() if value not in (None, [], ())]
    if study is not None and extra:
        raise ConfigError(f"{', '.join(extra)} go with --bundle; a study says them in its YAML")


def run(
    bundle: Path,
    *,
    trust: str | None,
    attack: str | None,
    eps: list[float] | None,
    option: list[str] | None,
    output: Path | None,
    limit: int | None,
    override: list[str] | None,
    regions: str | None,
    head: str | None,
    device: str | None,
) -> None:
    """Evaluate a bundle on its own validation data, clean and attacked; says what it found."""
    from monai_adv import cli
    from monai_adv.cli_attacks import parse_options
    from monai_adv.studies.bundle_run import run_bundle
    from monai_adv.studies.shards import usable_device

    folder = output or Path("bundle_run")
    with cli._interruptible(), cli._bar("bundle") as update:
        result = run_bundle(
            bundle, folder, trust=trust, attack=attack or "pgd", eps=eps or None, options=parse_options(option),
            limit=limit, overrides=parse_options(override), regions=_regions(regions), head=head,
            device=usable_device(device or "cpu"), on_progress=cli._follow(update), on_found=_say,
        )  # fmt: skip
    cli._finish(result)
    _means(folder)
    cli.out.print(f"records: {folder / 'records.csv'}; next: monai-adv compare {folder}", highlight=False,
                  soft_wrap=True)  # fmt: skip
    cli._complain(result.problems, again=False)


def bundle_overlay(
    name: Annotated[
        options.Overlay, typer.Argument(metavar="OVERLAY", help="What it does: attack, defend or robust_train.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Copy it there.", show_default="says where it is"),
    ] = None,
) -> None:
    """Write the file that attacks or defends a MONAI bundle.

    Given last to `python -m monai.bundle run --config_file`, it leaves the bundle as it is.
    """
    from monai_adv import cli
    from monai_adv.bundle import overlay_path
    from monai_adv.data.files import write_atomic

    path = overlay_path(name)
    if output is None:
        cli.out.print(str(path), highlight=False, soft_wrap=True)
        return
    write_atomic(output, path.read_bytes())
    cli.out.print(f"written to {output}", highlight=False, soft_wrap=True)


def _regions(text: str | None) -> Any:
    """``TC,WT,ET``, or YAML ``{WT: [1, 2, 3]}``."""
    if text is None:
        return None
    if not text.lstrip().startswith("{"):
        return [name.strip() for name in text.split(",")]
    from monai_adv.studies.plain_yaml import parse_yaml

    return parse_yaml(text, f"--regions {text!r}")


def _say(found: Any) -> None:
    from monai_adv import cli

    cli.out.print("found in the bundle's own configuration:", highlight=False)
    for line in found.summary().splitlines():
        cli.out.print(f"  {cli._escape(line)}", highlight=False, soft_wrap=True)


def _means(folder: Path) -> None:
    from monai_adv import cli
    from monai_adv.studies.records import read_records

    table = read_records(folder)
    scored = table[table["status"] == "ok"]
    if not scored.empty:
        means = scored.groupby(["setting", "region"], sort=False)["dice"].agg(["count", "mean", "median"])
        cli._print_frame(means.reset_index(), "Dice over cases: vulnerability under this threat model")
