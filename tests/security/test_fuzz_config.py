"""Any study file: a valid study, or one error that says what is wrong; a dry run ends so too, and writes nothing."""

from __future__ import annotations

import contextlib
import copy
import io
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import make_case
from cli_caller import call
from fuzzing import fuzz
from hypothesis import example, given
from hypothesis import strategies as st
from victims_on_disk import tiny_checkpoint

from monai_adv.errors import ConfigError
from monai_adv.studies import load_study
from monai_adv.studies.plain_yaml import MAX_VALUES, parse_yaml

GIB = 1 << 30
STUDY: dict[str, Any] = {
    "title": "t",
    "data": {"root": "data", "scheme": None, "subjects": None, "every": None, "orientation": "RAS", "crop": 4},
    "victims": [
        {"name": "v", "checkpoint": "tiny.pt", "overlap": 0.25, "mode": "gaussian", "roi_size": [8, 8, 8],
         "sw_batch_size": 1, "resample": False, "purify": None, "smooth": None, "defense": None},
        {"name": "w", "checkpoint": "tiny.pt", "purify": {"kind": "median", "radius": 1}},
        {"name": "u", "checkpoint": "tiny.pt", "smooth": {"sigma": 0.25, "samples": 2}},
    ],
    "attacks": [
        {"name": "noise", "label": "n", "only": ["v"]},
        {"name": "pgd", "steps": 2, "restarts": 1, "step_size": 0.1, "loss": "dice_ce", "target": {"hide": "ET"}},
        {"name": "ifgsm", "label": "aimed", "target": {"subject": "BraTS2021_00000"}},
        {"name": "ifgsm", "label": "file", "target": {"file": "data/x.nii", "scheme": "brats2021"}},
    ],
    "budgets": {"eps": [0.1, 0.5], "units": "std", "norm": "linf", "channels": [0, 1], "support": "foreground",
                "bounds": "data", "proportions": None, "quantize": {"dtype": "int16", "slope": 1.0, "inter": 0}},
    "seed": 0,
    "output": "run",
    "compare": {"metric": "dice", "alpha": 0.05},
    "figures": {"montages": 1, "eps": 0.5},
    "checks": {"probes": True, "subjects": 1},
    "device": "cpu",
    "on_oom": ["sw_batch_size", "cpu"],
    "trackers": {"tensorboard": None, "mlflow": {"tracking_uri": "ml", "experiment": "e"}},
}  # fmt: skip
# either small or beyond every machine: nothing between them that a machine would try
NUMBERS = [-1, 0, 1, 2, 3, 0.5, -0.25, 1e-30, 1e308, float("nan"), float("inf"), 10**12, -(10**12), 10**30, 2**63]
TEXTS = ["", "x", "cpu", "cuda", "cuda:99", "junk:0", "int16", "O", "linf", "data", "pgd", "fgsm", "universal",
         "transfer", "ensemble", "../../x", "/", "/etc/passwd", "~", "a" * 300, "a" * 5000, "=1+1", "é\u202e", "[red]",
         "{{ 7*7 }}", "%s", "None", "\n", "BraTS2021_00000", "v",
         "https://u:p@h", "sqlite:///", "background"]  # fmt: skip
KEYS = ["name", "eps", "stepz", "attak", "norm", "steps", "target", "attack", "attacks", "surrogate", "perturbation",
        "loss", "bundle", "trust", "kind", "momentum", "seed", "support", "quantize", "file", ""]  # fmt: skip


def junk() -> st.SearchStrategy[Any]:
    """Plain data of every kind."""
    leaf = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text(max_size=5)
    keys = st.sampled_from(KEYS) | st.integers(0, 3) | st.text(max_size=4)
    return st.recursive(leaf, lambda i: st.lists(i, max_size=4) | st.dictionaries(keys, i, max_size=4), max_leaves=8)


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a study."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield (*at, key)
        yield from places(value, (*at, key))


PLACES = sorted(places(STUDY), key=str)
Change = tuple[tuple[Any, ...], str, Any, str]


def changes(most: int) -> st.SearchStrategy[list[Change]]:
    """Where, what is done there, a value, a key."""
    what = st.sampled_from(["set", "set", "set", "drop", "rename", "add", "wrap"])
    return st.lists(st.tuples(st.sampled_from(PLACES), what, junk(), st.sampled_from(KEYS)), min_size=1, max_size=most)


def changed(done: list[Change]) -> dict[str, Any]:
    study = copy.deepcopy(STUDY)
    for place, what, value, key in done:
        parent: Any = study
        with contextlib.suppress(KeyError, IndexError, TypeError):  # another change took it away
            for step in place[:-1]:
                parent = parent[step]
            last, value = place[-1], copy.deepcopy(value)
            if what == "set":
                parent[last] = value
            elif what == "drop":
                del parent[last]
            elif what == "rename" and isinstance(parent, dict):
                parent[key] = parent.pop(last)
            elif what == "add" and isinstance(parent[last], dict):
                parent[last][key] = value
            elif what == "wrap":
                parent[last] = [parent[last]]
    return study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the study names."""
    folder = tmp_path_factory.mktemp("config")
    make_case(folder / "data", "BraTS2021_00000", shape=(12, 12, 12))
    tiny_checkpoint(folder / "tiny.pt", steps=1)
    return folder


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def loaded(folder: Path, text: str | bytes) -> bool:
    """Whether a study file is valid; asserts that anything else is a `ConfigError` that names the file."""
    path = folder / "study.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    refused = None
    try:
        study = load_study(path)
    except ConfigError as error:
        refused = str(error)
    if refused is not None:
        assert "study" in refused
        refused.encode()
        return False
    assert study.fingerprint()
    study.model_dump_json()
    return True


@fuzz(80)
@given(done=changes(3))
@example(done=[])
@example(done=[(("attacks",), "set", 5, "")])
@example(done=[(("attacks", 3, "target", "file"), "set", 5, "")])
@example(done=[(("attacks", 2, "target", "subject"), "set", [], "")])
@example(done=[(("output",), "set", "a\0b", "")])
@example(done=[(("budgets", "eps"), "set", [10**400], "")])
def test_any_change_of_a_study(folder: Path, done: list[Change]) -> None:
    valid = loaded(folder, yaml.safe_dump(changed(done), allow_unicode=True))
    assert valid or done


@fuzz(50)
@given(st.text(max_size=60) | st.binary(max_size=60))
@example("")
@example("a: 2024-13-45")
@example("a: " + "1" * 5000)
@example("a: !!int ''")
@example("a: !!bool x")
@example("a: 0b_")
@example("[" * 5000)
@example("a: &a [*a]")
@example("{? [1]: 2}")
@example("title: '\\ud800'")
@example(b"\xff\xfe")
def test_any_text(folder: Path, text: str | bytes) -> None:
    assert not loaded(folder, text)


@fuzz(50)
@given(
    st.integers(0, 2000),
    st.sampled_from([*" \n\t:-[{#'\"\0", "*a", "&a ", "!!set "]),
)
def test_any_character_in_a_study(folder: Path, at: int, more: str) -> None:
    text = yaml.safe_dump(STUDY)
    loaded(folder, text[:at] + more + text[at:])


@contextlib.contextmanager
def bounded(more: int) -> Iterator[None]:
    """No more memory than now and some: a bug costs an error, not the machine."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def dry(folder: Path, study: dict[str, Any]) -> tuple[int, str]:
    """Exit code and message of a dry run; asserts that nothing was written and no traceback shown."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, allow_unicode=True), encoding="utf-8")
    before, said = tree(folder), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), bounded(2 * GIB):
        patch.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            code = call(patch, "run", str(path), "--dry-run")
    assert tree(folder) == before
    assert "Traceback" not in said.getvalue()
    return code, said.getvalue()


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is limited by what /proc tells")
@fuzz(20)
@given(done=changes(1))
@example(done=[(("device",), "set", "junk:0", "")])
@example(done=[(("victims", 0, "sw_batch_size"), "set", 10**12, "")])
@example(done=[(("victims", 0, "roi_size"), "set", [10**12] * 3, "")])
@example(done=[(("data", "root"), "set", "a" * 5000, "")])
@example(done=[(("victims", 0, "checkpoint"), "set", "a" * 5000, "")])
@example(done=[(("output",), "set", "a" * 5000, "")])
@example(done=[(("victims", 2, "smooth", "samples"), "set", "many", "")])
def test_any_dry_run(folder: Path, done: list[Change]) -> None:
    study = changed([*done, (("attacks", 3), "drop", None, "")])  # the file of its target is not there
    code, said = dry(folder, study)
    assert code in (0, 1, 2)
    assert code == 0 or "error" in said.lower() or "BraTS2021_00000" in said


def test_a_few_lines_that_stand_for_billions_are_refused(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)]
    bomb = "\n".join(lines)
    with pytest.raises(ConfigError, match=f"stand for more than {MAX_VALUES} values"):
        parse_yaml(bomb, "bomb")
    (folder / "bomb.yaml").write_text(bomb + "\n" + yaml.safe_dump(STUDY))
    with pytest.raises(ConfigError, match=r"bomb\.yaml is not valid YAML"):
        load_study(folder / "bomb.yaml")


def test_merge_keys_are_bounded_too() -> None:
    lines = ["a0: &a0 {k: v}"] + [f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 9)}]}}" for k in range(1, 12)]
    with pytest.raises(ConfigError, match="stand for more"):
        parse_yaml("\n".join(lines), "bomb")


def test_aliases_that_help_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}", "x")["c"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' is there 2 times"),
        ("a: &a [*a]", "holds itself"),
        ("a: 2024-01-01", "type 'timestamp'; put it in quotes"),
        ("a: !!binary aGk=", "type 'binary'"),
        ("a: !!python/object/apply:os.system ['true']", "type 'python/object/apply:os.system'"),
        ("[" * 60 + "]" * 60, "more than 50 lists and mappings in each other"),
        ("[" * 100_000, "too many brackets"),
        ("x" * (1 << 21), "2097152 characters"),
        ("a: 'b\\ud800'".replace("'", '"'), "no name or page can hold"),
    ],
)
def test_what_is_no_plain_data(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_yaml(text, "it")


@pytest.mark.parametrize(("first", "second"), [("a b", "a/b"), ("Net", "net")])
def test_names_that_would_share_files_are_refused(folder: Path, first: str, second: str) -> None:
    study = changed([(("victims", 1, "name"), "set", first, ""), (("victims", 2, "name"), "set", second, "")])
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(ConfigError, match="would share files"):
        load_study(folder / "study.yaml")
