"""Every example of the documentation runs, every link leads somewhere, and every page can be reached."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.pages import ROOT, blocks, check_command, commands, run_python_blocks

DOCS = ROOT / "docs"
# Made when the site is built.
_BUILT = (DOCS / "_build", DOCS / "reference" / "generated", DOCS / "tutorials")
PAGES = sorted(p for p in DOCS.rglob("*.md") if not any(p.is_relative_to(folder) for folder in _BUILT))
# Pages whose Python is run, and its results looked at, by tests of their own.
TESTED = {
    "ablations.md": "ablation/test_page.py",
    "align.md": "alignment/test_page.py",
    "circuit_tracer.md": "sample_graph/test_page.py",
    "compare.md": "comparison/test_page.py",
    "controls.md": "test_controls.py",
    "feature_page.md": "viewer/test_feature_page.py",
    "features.md": "features/test_page.py",
    "interactions.md": "algorithm/test_attributions.py",
    "interventions.md": "interventions/test_page.py",
    "many_runs.md": "comparison/test_universal.py",
    "output.md": "algorithm/test_output_gradients.py",
    "positions.md": "model/test_skip_positions.py",
    "trace.md": "training/test_trace.py",
}
# Languages of blocks that are not run: results, files, formulas, and what needs a program that is not here.
_SHOWN = {"", "json", "yaml", "bibtex", "text", "{toctree}", "{include}", "{eval-rst}"}


def _name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.fixture(scope="session")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with what pages take for granted: two runs and a basis file."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_python_blocks(ROOT / "README.md")
    shutil.copytree(folder / "lightning_logs" / "version_0", folder / "lightning_logs" / "version_1")
    shutil.copytree(folder / "lightning_logs", folder / "runs")
    return folder


@pytest.fixture
def work(example_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(example_folder, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_the_examples_of_the_readme_leave_what_it_says(example_folder: Path) -> None:
    assert len(blocks(ROOT / "README.md", "python")) == 2
    assert (example_folder / "graph.safetensors").exists()
    assert (example_folder / "graph.png").exists()
    assert list((example_folder / "lightning_logs" / "version_0" / "lib" / "snapshots").iterdir())


def test_there_are_pages() -> None:
    assert {"index.md", "reference/index.md", "how_to/extend.md", "concepts/method.md"} <= set(map(_name, PAGES))


@pytest.mark.parametrize("page", [p for p in PAGES if _name(p) not in TESTED and blocks(p, "python")], ids=_name)
def test_python_runs(page: Path, work: Path) -> None:
    run_python_blocks(page)


@pytest.mark.parametrize("page", TESTED)
def test_pages_with_tests_of_their_own(page: str) -> None:
    if not (DOCS / page).exists():
        pytest.skip(f"{page} has not been written yet")
    source = (ROOT / "tests" / TESTED[page]).read_text("utf-8")
    assert Path(page).name in source
    assert "exec(" in source or "run_python_blocks(" in source


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=_name)
def test_commands_run(page: Path, work: Path) -> None:
    for command in commands(page):
        check_command(*command)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_blocks_are_of_languages_that_are_run(page: Path) -> None:
    fences = re.findall(r"^(?:```|:::)([^\s`]*).*?^(?:```|:::)$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert set(fences) <= {"python", "bash", "{glossary}"} | _SHOWN


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml") + blocks(p, "json")], ids=_name)
def test_files_that_are_shown_can_be_read(page: Path) -> None:
    assert all(isinstance(yaml.safe_load(block), dict) for block in blocks(page, "yaml"))
    assert all(isinstance(json.loads(line), dict) for block in blocks(page, "json") for line in block.splitlines())


def _anchors(page: Path) -> set[str]:
    """What headings can be linked to by, as on a code host."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES],
                         ids=lambda page: page.relative_to(ROOT).as_posix())  # fmt: skip
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path = (page.parent / target).resolve() if target else page
        if path.is_relative_to(DOCS / "tutorials"):  # the pages of these scripts
            path = ROOT / "tutorials" / ("GALLERY_HEADER.rst" if path.name == "index.rst" else f"{path.stem}.py")
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in _anchors(path) or path.name in ("contributing.md", "changelog.md"), f"{target}#{anchor}"


def test_every_page_is_in_the_contents() -> None:
    entries = set(re.findall(r"^([\w/]+)$", "\n".join(blocks(DOCS / "index.md", "{toctree}")), re.MULTILINE))
    assert entries == {_name(page).removesuffix(".md") for page in PAGES if page.name != "index.md"} | {
        "reference/index", "tutorials/index",
    }  # fmt: skip


def test_every_picture_is_shown() -> None:
    text = "".join(page.read_text("utf-8") for page in [ROOT / "README.md", *PAGES])
    for picture in (DOCS / "images").iterdir():
        assert f"images/{picture.name}" in text, picture.name
