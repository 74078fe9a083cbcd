"""A course that works with nbgrader takes the labs as they are: its schema holds, and it hands out our student edition."""

import logging
import shutil

import nbformat
import pytest
from conftest import ROOT

SOURCES = sorted((ROOT / "tutorial" / "solutions").glob("*.ipynb"))


@pytest.fixture(scope="module", autouse=True)
def nbgrader():
    """What the tests stand on; without it each is skipped by name, which a strict run does not allow."""
    return pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install 'tunebook[dev]'")


def read(path):
    return nbformat.read(path, 4)


@pytest.mark.parametrize("folder", ["tutorial/solutions", "tutorial"])
@pytest.mark.parametrize("name", [p.name for p in SOURCES])
def test_the_metadata_follow_the_schema(folder, name):
    from nbgrader.nbgraderformat import SCHEMA_VERSION, MetadataValidator
    nb = read(ROOT / folder / name)
    MetadataValidator().validate_nb(nb)
    marked = [c.metadata.nbgrader for c in nb.cells if "nbgrader" in c.metadata]
    assert marked and {m.schema_version for m in marked} == {SCHEMA_VERSION} == {3}


@pytest.mark.parametrize("key, words", [("schema_version", "too new"), ("points", "does not have points"), ("grade_id", "Duplicate")])
def test_the_schema_can_be_broken(key, words):
    from nbgrader.nbgraderformat import MetadataValidator, SchemaTooNewError, ValidationError
    nb = read(SOURCES[0])
    task, check = [next(c.metadata.nbgrader for c in nb.cells if c.metadata.get("nbgrader", {}).get(k)) for k in ("solution", "grade")]
    check |= {"schema_version": 9} if key == "schema_version" else {"grade_id": task.grade_id} if key == "grade_id" else {}
    if key == "points": del check["points"]
    with pytest.raises((ValidationError, SchemaTooNewError), match=words): MetadataValidator().validate_nb(nb)


@pytest.fixture(scope="module")
def released(nbgrader, tmp_path_factory):
    """What `nbgrader generate_assignment` makes of all sources with our settings, without a kernel: {name: notebook}."""
    from nbgrader.apps import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config import PyFileConfigLoader
    folder = tmp_path_factory.mktemp("nbgrader")
    (folder / "source" / "labs").mkdir(parents=True)
    for path in SOURCES: shutil.copy(path, folder / "source" / "labs")
    first = read(SOURCES[0])
    first.cells.insert(1, nbformat.v4.new_markdown_cell("the trap is in row two", metadata={"tags": ["instructor"]}))
    nbformat.write(first, folder / "source" / "labs" / SOURCES[0].name)
    config = PyFileConfigLoader("nbgrader_config.py", str(ROOT / "tutorial" / "solutions")).load_config()
    config.CourseDirectory.root = str(folder)
    api = NbGraderAPI(CourseDirectory(config=config), config=config)
    api.log_level = logging.ERROR
    told = api.generate_assignment("labs")
    assert told["success"], told
    return {path.name: read(path) for path in (folder / "release" / "labs").glob("*.ipynb")}


@pytest.mark.parametrize("name", [p.name for p in SOURCES])
def test_what_nbgrader_hands_out_is_the_student_edition(released, name):
    ours, theirs = read(ROOT / "tutorial" / name), released[name]
    assert [(c.cell_type, c.source) for c in theirs.cells] == [(c.cell_type, c.source) for c in ours.cells]
    assert not any(c.get("outputs") for c in theirs.cells)
    marks = [[{k: v for k, v in c.metadata.get("nbgrader", {}).items() if k in ("grade_id", "points", "grade", "solution", "locked")}
              for c in nb.cells] for nb in (ours, theirs)]
    assert marks[0] == marks[1]
