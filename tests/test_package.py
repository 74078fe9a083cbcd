"""What an engineer gets: wheel and sdist, an install with torch and numpy only, and cheap imports."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TUNEBOOK"))}


@pytest.fixture(scope="module")
def built(tmp_path_factory, root) -> dict[str, Path]:
    """sdist and wheel, the wheel made from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    run = subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(root)], capture_output=True, text=True, cwd=out)
    assert run.returncode == 0, run.stdout + run.stderr
    return {"sdist": next(out.glob("*.tar.gz")), "wheel": next(out.glob("*.whl"))}


@pytest.fixture(scope="module")
def empty(tmp_path_factory, built, root) -> Path:
    """The Python of an environment with the wheel and its core requirements."""
    folder = tmp_path_factory.mktemp("empty") / "env"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(root / "constraints.txt"), str(built["wheel"])]
    run = subprocess.run([str(python), *install], capture_output=True, text=True, env=CLEAN, cwd=folder)
    assert run.returncode == 0, run.stdout + run.stderr
    return python


def python(executable, code, cwd="/", **kwargs):
    return subprocess.run([str(executable), "-c", code], capture_output=True, text=True, cwd=cwd, env=CLEAN, **kwargs)


def modules(root):
    paths = sorted((root / "tunebook").rglob("*.py"))
    return [p.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__") for p in paths]


def test_the_sdist_can_build_itself(built):
    names = tarfile.open(built["sdist"]).getnames()
    assert any(n.endswith("/settings.ini") for n in names) and any(n.endswith("/constraints.txt") for n in names)


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = zipfile.ZipFile(built["wheel"]).namelist()
    assert "tunebook/kit/checks.py" in names
    assert {n.split("/")[0].split("-")[0] for n in names} == {"tunebook"}


def test_every_module_imports_with_the_core_requirements(empty, root):
    installed = python(empty, "import importlib.metadata as m; print(*sorted(d.name.lower() for d in m.distributions()))").stdout.split()
    assert "torch" in installed and not {"papermill", "transformers", "matplotlib", "nbdev", "jupyterlab"} & set(installed)
    run = python(empty, f"import importlib\nfor m in {modules(root)!r}: importlib.import_module(m)\nprint('all')")
    assert run.stdout.strip() == "all", run.stderr


def test_the_shipped_data_comes_with_the_wheel_by_its_generator_or_says_what_is_missing(empty):
    run = python(empty, "from tunebook.kit.data import load\nload('reviews')")
    assert run.returncode and "tunebook[labs]" in run.stderr.strip().splitlines()[-1]


def test_the_modules_work_without_the_labs(empty):
    code = ("import torch\nfrom tunebook.attention.scores import attention\nfrom tunebook.kit.checks import close\n"
            "q = torch.randn(2, 3, 4)\ntheirs = torch.nn.functional.scaled_dot_product_attention(q, q, q)\n"
            "close(attention(q, q, q)[0], theirs, terms=32)\nprint('ok')")
    run = python(empty, code)
    assert run.stdout.strip() == "ok", run.stderr


def test_the_command_says_what_to_install(empty, root):
    command = empty.parent / "tunebook"
    run = subprocess.run([str(command), "run"], capture_output=True, text=True, env=CLEAN, cwd=root)
    assert run.returncode == 2
    assert run.stderr.strip().count("\n") == 0 and "pip install 'tunebook[labs]'" in run.stderr


def added_modules(code):
    """Top-level modules that `code` loads on top of a bare interpreter."""
    show = "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    run = python(sys.executable, f"import sys\nbefore = set(sys.modules)\n{code}\n{show}")
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def import_microseconds(module):
    """(self time of tunebook's own modules, cumulative time of torch) from one interpreter's -X importtime."""
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", f"import {module}"], capture_output=True, text=True, cwd="/", env=CLEAN)
    rows = [(int(a), int(b), name.strip()) for a, b, name in re.findall(r"import time:\s+(\d+) \|\s+(\d+) \| +(\S+)", run.stderr)]
    own = sum(a for a, _, name in rows if name.split(".")[0] == "tunebook")
    return own, next((b for _, b, name in rows if name == "torch"), 0)


def test_importing_the_package_costs_nothing():
    """The budget is 50 ms; one small file without imports takes 1 to 2 ms, so there is room on a slow machine."""
    assert added_modules("import tunebook") == {"tunebook"}
    assert min(import_microseconds("tunebook")[0] for _ in range(5)) < 50_000


def test_importing_heads_costs_little_more_than_torch():
    """Within 5 % of `import torch`: nothing but tunebook is loaded on top, and its own share is small in the same process."""
    assert added_modules("import torch, tunebook.attention.heads") - added_modules("import torch") == {"tunebook"}
    shares = [own / torch for own, torch in (import_microseconds("tunebook.attention.heads") for _ in range(3))]
    assert min(shares) < 0.05, shares


def test_the_help_does_not_load_torch():
    assert not {"torch", "transformers", "papermill", "matplotlib"} & added_modules(
        "import contextlib, io\nfrom tunebook.kit.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main(['--help'])")
