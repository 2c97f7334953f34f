"""The same thing has the same name, default and text in Python, in YAML and on the command line."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from monai_adv import attacks, cli_options
from monai_adv.cli import app
from monai_adv.cli_reference import Parameter, commands, parameters
from monai_adv.data import brats_datalist, check_folder, simulate_cohort
from monai_adv.data.convert import convert_volume
from monai_adv.defenses import certify, smoothed
from monai_adv.engines import RobustTrainer, SynthesisConfig, TrainConfig
from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.networks.factory import BASELINE
from monai_adv.studies.ablation import ablate
from monai_adv.studies.bundle_run import run_bundle
from monai_adv.studies.certify import certify_files
from monai_adv.studies.config import BudgetConfig, CompareConfig, DataConfig, StudyConfig, VictimEntry
from monai_adv.studies.demo import demo_study
from monai_adv.studies.export import attack_files
from monai_adv.studies.training import train_and_score
from monai_adv.studies.universal import study_universal
from monai_adv.threats import L2, LInf, create_threat
from monai_adv.threats.threat import Threat
from monai_adv.transforms.physics.synthesis import Synthesis
from monai_adv.victims import Victim, VictimConfig

COMMANDS = commands(app)


def cli_default(command: str, name: str) -> Any:
    """What holds where an option is left out; the option is named as the function's argument."""
    found = {p.name: p for p in parameters(COMMANDS[command])}[name]
    return found.default


def default(where: Any, name: str) -> Any:
    """The default of an argument of a function, or of a field of a dataclass or of a pydantic model."""
    if isinstance(where, str):
        return cli_default(where, name)
    if inspect.isclass(where) and issubclass(where, BaseModel):
        return where.model_fields[name].get_default(call_default_factory=True)
    if is_dataclass(where):
        field = {f.name: f for f in fields(where)}[name]
        return field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
    for part in [where, *getattr(where, "__mro__", ())[1:]]:
        found = inspect.signature(part).parameters.get(name)
        if found is not None:
            return found.default
    raise KeyError(f"{where} has no {name}")


# concept -> (value, [(where, what it is called there), ...]); a text is a command
SAME: dict[str, tuple[Any, list[tuple[Any, str]]]] = {
    "units": ("std", [(LInf, "units"), (L2, "units"), (BudgetConfig, "units"), ("universal", "units"),
                      ("ablation", "units"), (study_universal, "units"), (ablate, "units")]),
    "norm": ("linf", [(create_threat, "norm"), (BudgetConfig, "norm"), ("universal", "norm"),
                      (study_universal, "norm")]),
    "norm of an attack": (None, [(attacks.create, "norm"), ("attack", "norm")]),
    "eps of an attack": (None, [(attacks.create, "eps"), ("attack", "eps")]),
    "eps": (0.1, [("universal", "eps"), (study_universal, "eps")]),
    "bounds": ("data", [(LInf, "bounds"), (BudgetConfig, "bounds")]),
    "support": ("foreground", [(LInf, "support"), (BudgetConfig, "support")]),
    "channels": (None, [(LInf, "channels"), (BudgetConfig, "channels")]),
    "proportions": (None, [(LInf, "proportions"), (BudgetConfig, "proportions")]),
    "quantize": (None, [(LInf, "quantize"), (BudgetConfig, "quantize")]),
    "scheme": (None, [(brats_datalist, "scheme"), (check_folder, "scheme"), (DataConfig, "scheme"),
                      (train_and_score, "scheme"), (attack_files, "scheme"), (certify_files, "scheme"),
                      (ablate, "scheme"), (study_universal, "scheme"), ("datalist", "scheme"), ("check", "scheme"),
                      ("train", "scheme"), ("train-synthesis", "scheme"), ("attack", "scheme"), ("certify", "scheme"),
                      ("ablation", "scheme"), ("universal", "scheme"), ("score", "scheme")]),
    "subjects": (None, [(DataConfig, "subjects"), (attack_files, "subjects"), (certify_files, "subjects"),
                        (ablate, "subjects"), ("attack", "subject"), ("certify", "subject"), ("ablation", "subject")]),
    "seed": (0, [(StudyConfig, "seed"), (TrainConfig, "seed"), (SynthesisConfig, "seed"), (attacks.Attack, "seed"),
                 (simulate_cohort, "seed"), (smoothed, "seed"), (certify_files, "seed"), (study_universal, "seed"),
                 (attacks.fit_universal, "seed"), ("train", "seed"), ("train-synthesis", "seed"), ("simulate", "seed"),
                 ("certify", "seed"), ("universal", "seed")]),
    "loss of an attack": ("dice_ce", [(attacks.Attack, "loss"), (attacks.fit_universal, "loss"),
                                      ("universal", "loss")]),
    "steps of a universal perturbation": (40, [(attacks.fit_universal, "steps"), ("universal", "steps")]),
    "batch of a universal perturbation": (2, [(attacks.fit_universal, "batch"), ("universal", "batch")]),
    "step size of a universal perturbation": (None, [(attacks.fit_universal, "step_size"), ("universal", "step_size")]),
    "mode of a universal perturbation": ("untargeted", [(attacks.fit_universal, "mode"), (study_universal, "mode"),
                                                        ("universal", "mode")]),
    "test_every": (0, [(study_universal, "test_every"), ("universal", "test_every")]),
    "hold_out": (5, [(train_and_score, "hold_out"), (study_universal, "hold_out"), ("train", "hold_out"),
                     ("train-synthesis", "hold_out"), ("universal", "hold_out")]),
    "minutes": (None, [(TrainConfig, "minutes"), (SynthesisConfig, "minutes"), ("train", "minutes"),
                       ("train-synthesis", "minutes")]),
    "steps of a training": (4000, [(TrainConfig, "steps"), ("train", "steps")]),
    "batch of a training": (2, [(TrainConfig, "batch"), ("train", "batch")]),
    "learning rate of a training": (2e-3, [(TrainConfig, "learning_rate"), ("train", "learning_rate")]),
    "half": (False, [(TrainConfig, "half"), ("train", "half")]),
    "method": (None, [(TrainConfig, "method"), (RobustTrainer, "method"), ("train", "method")]),
    "init": (None, [(TrainConfig, "init"), ("train", "init")]),
    "head": ("softmax", [(TrainConfig, "head"), (VictimConfig, "head"), (Victim, "head"), (RobustTrainer, "head"),
                         ("train", "head")]),
    "steps of a synthesis": (1000, [(SynthesisConfig, "steps"), ("train-synthesis", "steps")]),
    "patch of a synthesis": (None, [(SynthesisConfig, "patch"), ("train-synthesis", "patch")]),
    "batch of a synthesis": (None, [(SynthesisConfig, "batch"), ("train-synthesis", "batch")]),
    "learning rate of a synthesis": (5e-4, [(SynthesisConfig, "learning_rate"),
                                            (SynthesisConfig, "critic_learning_rate"),
                                            ("train-synthesis", "learning_rate")]),
    "overlap as deployed": (0.5, [(VictimConfig, "overlap"), ("victim", "overlap")]),
    "mode as deployed": ("gaussian", [(VictimConfig, "mode"), ("victim", "mode")]),
    "sw_batch_size as deployed": (2, [(VictimConfig, "sw_batch_size"), ("victim", "sw_batch_size")]),
    "what a study leaves to the checkpoint": (None, [(VictimEntry, "overlap"), (VictimEntry, "mode"),
                                                     (VictimEntry, "roi_size"), (VictimEntry, "sw_batch_size")]),
    "resample": (False, [(VictimEntry, "resample"), (certify_files, "resample"), (attack_files, "resample"),
                         ("attack", "resample"), ("certify", "resample")]),
    "samples of a certificate": (100, [(certify, "samples"), ("certify", "samples")]),
    "draws0": (100, [(certify, "draws0"), ("certify", "draws0")]),
    "tau": (0.75, [(certify, "tau"), ("certify", "tau")]),
    "alpha of a certificate": (1e-3, [(certify, "alpha"), ("certify", "alpha")]),
    "correction": ("holm", [(certify, "correction"), ("certify", "correction")]),
    "batch of a certificate": (2, [(certify, "batch"), ("certify", "batch")]),
    "sigma": (inspect.Parameter.empty, [(certify, "sigma"), (smoothed, "sigma"), ("certify", "sigma")]),
    "subjects of a cohort": (12, [(simulate_cohort, "subjects"), (demo_study, "subjects"), ("simulate", "subjects"),
                                  ("demo", "subjects")]),
    "spacing of a cohort": (2.0, [(simulate_cohort, "spacing"), ("simulate", "spacing")]),
    "seed of the demonstration": (7, [(demo_study, "seed"), ("demo", "seed")]),
    "retrain": (False, [(demo_study, "retrain"), ("demo", "retrain")]),
    "series": (None, [(convert_volume, "series"), ("convert", "series")]),
    "store": ("source", [(attack_files, "store"), ("attack", "store")]),
    "target of an ablation": ("next", [(ablate, "target"), ("ablation", "target")]),
    "mode of an ablation": ("calibrated", [(ablate, "mode"), ("ablation", "mode"), (attacks.ASMA, "mode")]),
    "steps of an ablation": (None, [(ablate, "steps"), ("ablation", "steps"), (attacks.ASMA, "steps")]),
    "figures of an ablation": (None, [(ablate, "figures"), ("ablation", "figures")]),
}  # fmt: skip

# what an option stands for where it is left out: the text of the help against the place that decides
TOLD: list[tuple[str, str, Any]] = [
    ("ablation", "eps", default(ablate, "eps")[0]),
    ("run", "attack", default(run_bundle, "attack")),
    ("compare", "metric", default(CompareConfig, "metric")),
    ("compare", "baseline", default(CompareConfig, "baseline")),
    ("compare", "alpha", default(CompareConfig, "alpha")),
    ("train-synthesis", "max_mm", default(Synthesis, "max_mm")),
    ("train-synthesis", "max_bias", default(Synthesis, "max_bias")),
    ("train-synthesis", "max_residual", default(Synthesis, "max_residual")),
    ("train", "channels", ",".join(map(str, BASELINE["channels"]))),
    ("train", "res_units", BASELINE["num_res_units"]),
    ("attack", "eps", attacks.create("pgd").threat.eps),
    ("attack", "units", attacks.create("pgd").threat.units),
    ("attack", "norm", attacks.create("pgd").threat.norm),
]


@pytest.mark.parametrize("concept", SAME)
def test_a_default_is_the_same_everywhere(concept: str) -> None:
    value, places = SAME[concept]
    assert len(places) > 1
    found = {f"{getattr(where, '__name__', where)}: {name}": default(where, name) for where, name in places}
    assert set(map(repr, found.values())) == {repr(value)}, found


@pytest.mark.parametrize(("command", "name", "value"), TOLD)
def test_the_help_tells_what_holds_where_an_option_is_left_out(command: str, name: str, value: Any) -> None:
    parameter = {p.name: p for p in parameters(COMMANDS[command])}[name]
    assert parameter.default is None
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    assert shown in str(parameter.info.show_default).replace(", or ", " ").split(" ")


# options whose text says what they are in their own command
OWN_TEXT = {"--output", "--steps", "--batch", "--patch", "--mode", "--option", "--target", "--learning-rate", "--head",
            "--eps", "--hold-out", "--subjects", "--alpha", "--regions", "--network", "--spacing"}  # fmt: skip


def by_option() -> dict[str, list[tuple[str, Parameter]]]:
    """Every option with the commands that have it."""
    found: dict[str, list[tuple[str, Parameter]]] = defaultdict(list)
    for command, function in COMMANDS.items():
        for parameter in parameters(function):
            if not parameter.is_argument:
                found[parameter.spelt[0]].append((command, parameter))
    return found


@pytest.mark.parametrize("option", sorted(by_option()))
def test_an_option_is_the_same_in_every_command(option: str) -> None:
    having = by_option()[option]
    texts = {parameter.info.help for _, parameter in having}
    assert len(texts) == 1 or option in OWN_TEXT, {command: p.info.help for command, p in having}
    assert len({p.spelt for _, p in having}) == 1, {command: p.spelt for command, p in having}
    if option == "--mode":  # of windows, of the mask attack, of a universal perturbation: what Python calls them too
        assert len({p.kind for _, p in having}) == len(having)
        return
    assert len({p.kind for _, p in having}) == 1, {command: p.kind for command, p in having}
    if option != "--output":  # a folder, a file or a checkpoint
        assert len({p.value for _, p in having}) == 1, {command: p.value for command, p in having}
    else:
        assert all(p.spelt == ("--output", "-o") for _, p in having)
        assert {p.value for _, p in having} <= {"FOLDER", "FILE", "CHECKPOINT"}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_spelt_like_the_arguments_of_python(name: str) -> None:
    for parameter in parameters(COMMANDS[name]):
        assert parameter.is_argument or parameter.spelt[0] == parameter.spelt[0].lower()
        assert parameter.is_argument or "_" not in parameter.spelt[0]
        if isinstance(parameter.info, typer.models.OptionInfo) and parameter.spelt[0] != "--attack":
            assert parameter.spelt[0] == "--" + parameter.name.rstrip("_").replace("_", "-")


@pytest.mark.parametrize(
    ("model", "field", "choices"),
    [(BudgetConfig, "units", cli_options.Units), (BudgetConfig, "norm", cli_options.Norm)],
)
def test_yaml_takes_the_values_of_the_command_line(model: type[BaseModel], field: str, choices: Any) -> None:
    assert get_args(model.model_fields[field].annotation) == get_args(choices)


@pytest.mark.parametrize(
    ("function", "arguments"), [(create_threat, ("linf", "l2")), (attacks.create, tuple(attacks.ATTACKS))]
)
def test_what_the_names_stand_for_exists(function: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    for name in arguments:
        made = function(name, eps=0.1) if function is create_threat else attacks.attack_class(name)
        assert isinstance(made, Threat) or issubclass(made, attacks.Attack)


def test_the_window_defaults_of_the_inferer_are_those_of_monai() -> None:
    """The one exception: it takes MONAI's arguments, so it has MONAI's defaults; a victim's are written in its file."""
    from monai.inferers import SlidingWindowInferer

    for name in ("sw_batch_size", "overlap", "mode"):
        assert default(GradientSlidingWindowInferer, name) == default(SlidingWindowInferer, name)
