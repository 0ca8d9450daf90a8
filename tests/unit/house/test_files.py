from __future__ import annotations

import re
import tempfile
from pathlib import Path

import qat
from tests.unit.house.repository import LINKED, ROOT, python_files, read_text, repository_files

MAX_LINES = 450
MAX_BYTES = 5_000_000


def _machine_paths() -> list[str]:
    """Absolute paths that mean something on this machine only: the checkout, the folder beside it, the home folder."""
    parent = ROOT.parent
    too_general = {Path("/"), Path(tempfile.gettempdir()), Path("/home"), Path("/Users")}
    folders = [ROOT, Path.home(), *([parent] if parent not in too_general else [])]
    return [f"{folder}/" for folder in folders if folder != Path("/")]


# A home folder or a checkout of anybody's, and the address of a package index.
HOMES = re.compile(r"(?<![\w.<])/(?:home|Users|root)/[A-Za-z0-9._-]+")
INDEX = re.compile(
    r"(?:index[-_]url|registry)[ =:\"']+https?://|https?://[^\s\"'<>)]*/simple\b|https?://[^\s\"'<>)]*pypi[^\s\"'<>)]*",
    re.I,
)


def test_no_file_names_this_machine_or_a_package_index() -> None:
    local = _machine_paths()
    found = []
    for path in repository_files():
        text = read_text(path)
        if text is None or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if any(folder in line for folder in local) or HOMES.search(line) or INDEX.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


def test_the_patterns_find_what_they_are_for() -> None:
    assert all(HOMES.search(f"see '/{folder}/x'") for folder in ("home/ann", "root", "Users/ann"))
    assert not HOMES.search("the /home page") and not HOMES.search("https://example.org/home/x")
    host = "https:" + "//host.example"  # in two parts: this file is searched by others too
    assert INDEX.search(f"--index-url {host}/x") and INDEX.search(f"{host}/whl/simple")
    assert not INDEX.search("--index-url $(QAT_TORCH_INDEX)") and not INDEX.search("a simple https://example.org page")


def test_files_stay_readable() -> None:
    long = {str(path.relative_to(ROOT)): lines for path in python_files() if (lines := _lines(path)) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"


def _lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def test_only_the_tiny_base_model_is_big() -> None:
    tiny_base = ROOT / "data" / "tiny_base"
    big = [path for path in repository_files() if path.stat().st_size > MAX_BYTES and tiny_base not in path.parents]
    assert not big


def test_no_unfinished_marks() -> None:
    marks = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]) + r")\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in python_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marks.search(line)
    ]
    assert not found


def test_every_package_folder_has_an_init() -> None:
    """`namespaces = false`: a folder without __init__.py would be missing from the wheel without a word."""
    for path in python_files():
        parts = path.relative_to(ROOT).parts
        if parts[0] in {"qat", *LINKED}:
            assert (path.parent / "__init__.py").is_file(), f"{path.parent.relative_to(ROOT)} has no __init__.py"


def test_version_is_said_once_more_in_pyproject_and_equal() -> None:
    match = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert match is not None and match[1] == qat.__version__


def test_licence_is_the_whole_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text and len(text) > 11_000
