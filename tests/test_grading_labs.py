"""Every lab can be graded: its solved notebook gets all points, the one that is handed out none, and every cell runs in the sandbox."""

import json
import shutil

import pytest
from conftest import ROOT

from tunebook.kit.cli import main

LABS = sorted((ROOT / "tutorial" / "solutions").glob("*.ipynb"))


@pytest.mark.parametrize("source", LABS, ids=[p.stem for p in LABS])
def test_solved_gets_all_and_handed_out_gets_nothing(source, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "submissions"
    folder.mkdir()
    for name, path in (("solved", source), ("handed out", ROOT / "tutorial" / source.name)): shutil.copy(path, folder / f"{name}.ipynb")
    assert main(["grade", str(folder), "--lab", source.stem.split("_")[0], "--out", str(tmp_path / "g.csv"), "--workers", "1"]) == 0
    told = {r["student"]: r for r in json.loads((tmp_path / "g.json").read_text())}
    assert told["solved"]["total"] == told["solved"]["of"] >= 10 and told["handed out"]["total"] == 0
    assert {r["note"] for r in told.values()} == {""}
    assert not [s for s in told["solved"]["stops"] if "no exercise" not in s[1]], "only the checkers are not there"
