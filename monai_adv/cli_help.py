"""The help of the command line: commands in the order a user meets them, examples, where to read on."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

START, DATA, VICTIMS = "Start here", "Subjects", "Victims"
ATTACKS, STUDIES, SCORES = "Attacks and certificates", "Studies", "Segmentations"


@dataclass(frozen=True)
class Page:
    """What the help of a command has beside its options.

    Args:
        panel: the group it is listed in.
        read: the page of the documentation that goes on.
        examples: commands that work, each on one line of at most 76 characters.
    """

    panel: str
    read: str
    examples: tuple[str, ...]


PAGES: dict[str, Page] = {
    "demo": Page(START, "README.md", ("monai-adv demo",)),
    "check": Page(DATA, "docs/files.md", ("monai-adv check BraTS2021", "monai-adv check BraTS2021 -o check.csv")),
    "simulate": Page(DATA, "docs/simulated_cohort.md", ("monai-adv simulate cohort --subjects 12 --spacing 2.0",)),
    "convert": Page(DATA, "docs/files.md", ("monai-adv convert DICOM/T1 -o case_t1.nii.gz",)),
    "datalist": Page(DATA, "docs/files.md", ("monai-adv datalist BraTS2021 -o datalist.json",)),
    "train": Page(
        VICTIMS,
        "docs/defenses.md",
        (
            "monai-adv train BraTS2021 -o unet.pt --minutes 22",
            "monai-adv train BraTS2021 -o seg.pt --network SegResNet",
            "monai-adv train BraTS2021 -o at.pt --init unet.pt --method pgd_at",
        ),
    ),
    "victim": Page(
        VICTIMS, "docs/howto/my_network.md", ("monai-adv victim weights.pth -o victim.pt --network SegResNet",)
    ),
    "train-synthesis": Page(
        VICTIMS,
        "docs/synthesis.md",
        ("monai-adv train-synthesis BraTS2021 --checkpoint unet.pt -o gen.pt",),
    ),
    "attacks": Page(ATTACKS, "docs/attacks.md", ("monai-adv attacks",)),
    "attack": Page(
        ATTACKS,
        "docs/attacks.md",
        (
            "monai-adv attack BraTS2021 --checkpoint unet.pt -o out",
            "monai-adv attack BraTS2021 --checkpoint unet.pt -o out --attack pgd --eps 0.2",
            "monai-adv compare out",
        ),
    ),
    "universal": Page(
        ATTACKS,
        "docs/attacks.md",
        (
            "monai-adv universal BraTS2021 --checkpoint unet.pt -o out",
            "monai-adv universal BraTS2021 --checkpoint unet.pt -o out --modality T1",
        ),
    ),
    "ablation": Page(
        ATTACKS,
        "docs/attacks.md",
        (
            "monai-adv ablation BraTS2021 --checkpoint unet.pt -o out",
            "monai-adv ablation BraTS2021 --checkpoint unet.pt -o out --target permute",
        ),
    ),
    "certify": Page(
        ATTACKS,
        "docs/defenses.md",
        ("monai-adv certify BraTS2021 --checkpoint noise.pt --sigma 0.25 -o out",),
    ),
    "run": Page(
        STUDIES,
        "docs/scaling.md, docs/bundles.md",
        (
            "monai-adv run study.yaml",
            "monai-adv run study.yaml --dry-run",
            "monai-adv run --bundle DIR --trust SHA256",
        ),
    ),
    "merge": Page(STUDIES, "docs/scaling.md", ("monai-adv merge runs/brats",)),
    "compare": Page(
        STUDIES,
        "docs/statistics.md",
        ("monai-adv compare runs/brats", "monai-adv compare clean/val_mean_dice_raw.csv pgd/val_mean_dice_raw.csv"),
    ),
    "report": Page(STUDIES, "docs/reports.md", ("monai-adv report runs/brats",)),
    "table": Page(STUDIES, "docs/attacks.md", ("monai-adv table runs/one runs/two -o runs",)),
    "bundle-overlay": Page(STUDIES, "docs/bundles.md", ("monai-adv bundle-overlay attack -o attack.json",)),
    "score": Page(
        SCORES,
        "docs/howto/score_predictions.md",
        (
            "monai-adv score predictions BraTS2021 -o scores",
            "monai-adv compare clean/scores.csv attacked/scores.csv",
        ),
    ),
}
"""Every command, in the order of the help."""

FIRST_STEPS = ("monai-adv demo", "monai-adv attack --help", "monai-adv --install-completion")


def arrange(app: typer.Typer) -> None:
    """Bring the commands of an app into the order and the groups of :data:`PAGES`, and give their help examples."""
    known = list(PAGES)
    names = {id(info): command_name(info) for info in app.registered_commands}
    app.registered_commands.sort(key=lambda info: known.index(names[id(info)]))
    for info in app.registered_commands:
        info.rich_help_panel = PAGES[names[id(info)]].panel
        info.cls = Command
        text = info.help or inspect.getdoc(info.callback) or ""  # lines as the terminal is wide, not as the source
        info.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def command_name(info: Any) -> str:
    """What a registered command is called."""
    return info.name or info.callback.__name__.replace("_", "-")


class Command(TyperCommand):
    """A command whose help ends with examples, and which takes an option that holds one value only once."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters; a flag shows no type."""
        return _plain_flags(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line.

        Raises:
            typer.BadParameter: an option that holds one value is there twice.
        """
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            param: Any
            for param in order:
                if param.param_type_name == "option" and not param.multiple and order.count(param) > 1:
                    raise typer.BadParameter("it is given more than once; only one value counts", ctx, param)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, then the examples."""
        super().format_help(ctx, formatter)
        page = PAGES[self.name or ""]
        _write_examples("Examples", page.examples, f"Read on: {page.read}")


class Group(TyperGroup):
    """All commands; the help ends with where to begin."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters; a flag shows no type."""
        return _plain_flags(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, then the first steps."""
        super().format_help(ctx, formatter)
        _write_examples("First steps", FIRST_STEPS, "Read on: README.md, docs/cli.md")


def _plain_flags(params: Sequence[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return list(params)


def _write_examples(title: str, lines: Sequence[str], read: str) -> None:
    """Lines as they are typed: no frame around them and no break inside them, for they are copied."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(f" {title}", style="bold"))
    for line in lines:
        console.print(Text(f"   {line}", style="cyan"), soft_wrap=True)
    console.print(Text(f"\n {read}", style="dim"), soft_wrap=True)
