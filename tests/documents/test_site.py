"""The documents as a site: strict, with everything they link to, and nothing from elsewhere; a README of a page."""

import importlib.util
import re
from pathlib import Path

import pytest
from doc_blocks import ROOT, documents

spec = importlib.util.spec_from_file_location("site_of_documents", ROOT / "docs" / "site.py")
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert site.main(["--into", str(folder)]) == 0, "the generator is strict"
    return folder / "site"


def test_every_document_is_a_page_and_in_the_contents(built):
    names = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {path.stem for path in documents()} == names | {"README"}, "mkdocs.yml names every document"
    assert {path.stem for path in built.glob("*.html")} == names | {"404"}


def test_every_link_leads_to_a_file(built):
    """A folder would be listed, where the site is opened from a disk."""
    pages = set(built.glob("*.html")) - {built / "404.html"}
    for page in pages:
        html = page.read_text(encoding="utf-8")
        targets = [target for target in re.findall(r'(?:href|src)="([^"#]+)', html) if not re.match(r"\w+:|//", target)]
        assert not [target for target in targets if not (page.parent / target).is_file()], page.name
        assert len({page.parent / target for target in targets} & pages) == len(pages), "the contents"


def test_nothing_is_fetched_from_other_machines(built):
    for page in built.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', html), page.name


def test_a_link_to_nothing_is_an_error(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](../nowhere.py)\n")
    with pytest.raises(FileNotFoundError):
        site.stage(tmp_path / "docs", tmp_path / "staged")


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    targets = [target.partition("#")[0] for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)]
    assert len(targets) > 15 and not [target for target in targets if not (ROOT / target).exists()]
    assert re.search(r"^pip install .* && torchrun tempflow/train.py$", text, re.MULTILINE)
    assert re.search(r"^pip install .* && pytest\b.*$", text, re.MULTILINE)
