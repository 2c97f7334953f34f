from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from monai_adv.data.files import write_atomic
from monai_adv.errors import MonaiAdvError
from monai_adv.studies.units import UnitStore, digest, safe_name

UNIT = {"subject": "s1", "victim": "v", "attack": "fgsm", "eps": 0.1}


def test_a_unit_comes_back_under_its_key_only(tmp_path: Path) -> None:
    store = UnitStore(tmp_path)
    store.write(UNIT, "key", {"status": "ok", "rows": [{"dice": np.float64(0.5), "hd95": float("nan")}]})
    content = store.read(UNIT, "key")
    assert content is not None
    assert content["rows"][0]["dice"] == 0.5
    assert store.read(UNIT, "other") is None
    assert store.read({**UNIT, "eps": 0.2}, "key") is None


def test_a_unit_truncated_anywhere_is_not_trusted(tmp_path: Path) -> None:
    store = UnitStore(tmp_path)
    store.write(UNIT, "key", {"status": "ok", "rows": []})
    path = store.path(UNIT)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert store.read(UNIT, "key") is None, length


def test_a_changed_number_is_not_trusted(tmp_path: Path) -> None:
    store = UnitStore(tmp_path)
    store.write(UNIT, "key", {"status": "ok", "rows": [{"dice": 0.5}]})
    path = store.path(UNIT)
    path.write_text(path.read_text().replace("0.5", "0.9"))
    assert store.read(UNIT, "key") is None


def test_a_unit_of_an_earlier_version_is_still_read(tmp_path: Path) -> None:
    store = UnitStore(tmp_path)
    body = {"schema": 1, "key": "key", "identity": UNIT, "status": "ok", "rows": [{"dice": 0.5}]}
    store.path(UNIT).parent.mkdir()
    for change, known in (("0.5", True), ("0.6", False)):
        text = json.dumps({**body, "checksum": digest(body)}, indent=1)  # of the content, not of the bytes
        store.path(UNIT).write_text(text.replace("0.5", change))
        assert (store.read(UNIT, "key") is not None) == known


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "..", "", "x" * 500, "=cmd|' /C calc'!A0"])
def test_names_never_leave_the_folder(tmp_path: Path, name: str) -> None:
    store = UnitStore(tmp_path / "units")
    store.write({**UNIT, "subject": name, "attack": name}, "key", {"status": "ok", "rows": []})
    path = store.path({**UNIT, "subject": name, "attack": name}).resolve()
    assert path.is_relative_to((tmp_path / "units").resolve())
    assert safe_name(name) not in ("", ".", "..")


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1.5, None]}) == digest(json.loads('{"b": [1.5, null], "a": 1}'))
    assert digest({"a": 1}) != digest({"a": 2})


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MonaiAdvError, match=r"cannot write .*file\.json: No space left.*free some space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
