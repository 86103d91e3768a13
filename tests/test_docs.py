"""The code blocks of the documentation run, and print what stands below them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch

from clkit.callbacks import NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.models import TimmClassifier

ROOT = Path(__file__).parents[1]
OF_ENGINES = {"dask", "ray_data", "ray_train"}  # pages that tests/test_engines.py runs, where the engines are installed
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.M | re.S)
PACKAGES = (
    "clkit.methods",
    "clkit.callbacks",
    "clkit.strategies",
    "clkit.data",
    "clkit.metrics",
    "clkit.models",
    "clkit.testing",
)
MODULES = ("clkit", "clkit.errors", "clkit.stream.boundaries", "clkit.features.tap")


class Block(NamedTuple):
    line: int
    code: str
    printed: str | None  # what the page says that the block prints


def read_blocks(text: str) -> list[Block]:
    """The blocks to run, each with the output that directly follows it."""
    blocks: list[Block] = []
    for match in FENCE.finditer(text):
        info = match["info"].split()
        body = textwrap.dedent(match["body"])
        if info[:1] == ["python"] and "no-run" not in info:
            blocks.append(Block(text[: match.start()].count("\n") + 2, body, None))
        elif info == ["text", "output"]:
            assert blocks, "an output without code before it"
            blocks[-1] = blocks[-1]._replace(printed=body)
    return blocks


def pages() -> list[Path]:
    built = {ROOT / "docs" / folder for folder in ("_build", "tutorials")}
    found = [page for page in sorted(ROOT.glob("docs/**/*.md")) if not built & set(page.parents)]
    found = [page for page in [ROOT / "README.md", *found] if page.stem not in OF_ENGINES]
    return [page for page in found if read_blocks(page.read_text(encoding="utf-8"))]


def quiet_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own bars and tables are not what a page says that a block prints."""
    original = pl.Trainer.__init__

    @functools.wraps(original)  # a command line reads the signature
    def quiet(self: pl.Trainer, **options: Any) -> None:
        original(self, **{"enable_progress_bar": False, "enable_model_summary": False, **options})

    monkeypatch.setattr(pl.Trainer, "__init__", quiet)


def check_page(page: Path) -> dict[str, Any]:
    """Runs the blocks of a page in order, in one namespace, and returns that."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in read_blocks(page.read_text(encoding="utf-8")):
        # compiled at its line in the page, so that a traceback leads there
        program = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(program, namespace)
        if block.printed is not None:
            assert printed.getvalue().rstrip() == block.printed.rstrip(), f"{page.name}, line {block.line}"
    return namespace


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_a_page_run_and_print_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "docs" / "snippets")  # files that a page shows and then imports
    monkeypatch.delenv("CLKIT_DATA", raising=False)
    quiet_trainers(monkeypatch)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning")  # advice on loaders that no page is about
        check_page(page)


def test_a_wrong_output_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n\n```text output\n3\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 2"):
        check_page(page)


def test_no_run_blocks_are_left_out() -> None:
    text = "```python no-run\nimport nothing_of_the_kind\n```\n"
    assert read_blocks(text) == []


@pytest.mark.parametrize("name", PACKAGES + MODULES)
def test_every_public_name_stands_on_its_reference_page(name: str) -> None:
    page = (ROOT / "docs" / "api" / f"{name}.rst").read_text(encoding="utf-8")
    public = {public for public in importlib.import_module(name).__all__ if not public.startswith("__")}
    assert public <= set(re.findall(r"[\w.]+", page.replace(".", " ")))


def test_the_front_page_shows_a_file_that_is_run_when_the_site_is_built() -> None:
    front = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    shown = re.search(r"literalinclude\} (snippets/\w+\.py)", front)
    assert shown is not None
    assert (ROOT / "docs" / shown[1]).is_file()


def test_the_results_page_names_every_key_of_a_results_file(tmp_path: Path, make_trainer: Any) -> None:
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC(), StreamEvaluation(table=False, figures=False)])
    trainer.fit(TimmClassifier("identity"), datamodule=StreamDataModule("digits:flat", ClassIncremental(experiences=2)))
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    keys = {*results, *results["stream"], *results["stream"]["experiences"][0], *results["predictors"]["nmc"]}
    page = (ROOT / "docs" / "guide" / "results.md").read_text(encoding="utf-8")
    assert keys | set(results["seconds"]) <= set(re.findall(r"\w+", page))


def methods_by_state(page: str, state: int) -> dict[str, bool]:
    """The methods of a page's table, and whether each is done; ``state`` is the column that says so."""
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    heading = next(index for index, row in enumerate(rows) if row[0] == "method")
    found = {}
    for row in rows[heading + 2 :]:
        name = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", row[0]).replace("\u2011", "-")
        found[name] = "done" in row[state]
        assert found[name] or row[state] == "not yet"
    return found


def test_readme_front_page_and_changelog_say_the_same_of_what_is_done() -> None:
    readme = methods_by_state("README.md", 3)
    assert readme == methods_by_state("docs/index.md", 3)
    assert sum(readme.values()) >= 5
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and line.endswith("| done |"):
            for name in re.findall(r"`(\w+)`", line.split("|")[3]):
                assert f"`{name}`" in changelog, name
    for name, done in readme.items():
        if not done:
            assert f"`{name.replace('-', '')}`" not in changelog
