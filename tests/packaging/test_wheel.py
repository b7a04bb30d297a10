"""What is installed: every tracked module, under the one name `stepwise`."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"stepwise": "stepwise", "constraints": "stepwise/constraints", "rewards": "stepwise/rewards"}
FOLDERS |= {"recipes": "stepwise/recipes"}


def tracked() -> set[str]:
    """Names that the wheel must hold: modules, recipes, parts of the report, the marker of types, as imported."""
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "HEAD", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    names = set()
    for name in listed.splitlines():
        top, _, rest = name.partition("/")
        if Path(name).suffix in {".py", ".yaml", ".j2", ".css", ".js"} or rest == "py.typed":
            names.add(f"{FOLDERS[top]}/{rest}")
    return names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_every_tracked_module_and_nothing_else(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == tracked()


def test_no_name_but_stepwise_reaches_site_packages(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"stepwise"}


def test_the_wheel_works_where_the_source_is_not(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import stepwise, stepwise.constraints.cost, stepwise.rewards.reward\n"
        f"assert stepwise.__file__.startswith({str(target)!r})\n"
        "from stepwise.recipe import load\n"
        "print(load('quickstart').name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "quickstart", done.stderr


@pytest.mark.parametrize("name", ["constraints", "rewards", "recipes"])
def test_a_folder_refuses_to_be_imported_under_its_bare_name(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert f"import this package as 'stepwise.{name}'" in done.stderr


def test_importing_stepwise_loads_no_torch() -> None:
    code = "import sys, stepwise; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
