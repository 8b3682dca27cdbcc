"""The table of torch's versions, from a made-up run, and the page as it is kept."""

import importlib

import torch

torch_versions = importlib.import_module("torch_versions")

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.passes.test_views" name="test_one[a]"/>
<testcase classname="tests.passes.test_views" name="test_two"><failure message="no"/></testcase>
<testcase classname="tests.codegen.test_gpu" name="test_gpu"><skipped message="no CUDA device"/></testcase>
<testcase classname="tests.codegen.test_gpu" name="test_more"><skipped message="no CUDA device"/></testcase>
</testsuite></testsuites>"""


def test_a_run_is_read_and_kept_once(tmp_path):
    (tmp_path / "results.xml").write_text(JUNIT)
    run = torch_versions.read_run(tmp_path / "results.xml", torch_versions.DEFAULT_SUITE)
    assert (run.torch, run.passed, run.skipped) == (torch.__version__, 1, {"no CUDA device": 2})
    assert run.failed == ("tests.passes.test_views.test_two",)
    kept, page = tmp_path / "kept.json", tmp_path / "page.md"
    older = torch_versions.Run("2.9.0", "3.11.7", "tests/passes", "2026-01-31", 3, (), {})
    for each in (run, older, run):
        torch_versions.keep(each, kept, page)
    assert torch_versions.read_kept(kept) == [older, run]
    rows = [line.split("|")[1:-1] for line in page.read_text().splitlines() if line.startswith("| ")]
    assert [cell.strip() for cell in rows[1]] == [
        torch.__version__, run.python, "the default suite", run.date, "1", "1", "2"
    ]  # fmt: skip
    assert rows[2][0].strip() == "2.9.0"
    assert "- failed: `tests.passes.test_views.test_two`\n- 2 skipped: no CUDA device\n" in page.read_text()


def test_tests_that_ran_again_and_passed_are_named(tmp_path):
    (tmp_path / "results.xml").write_text(JUNIT)
    run = torch_versions.read_run(tmp_path / "results.xml", torch_versions.DEFAULT_SUITE)
    (tmp_path / "same.xml").write_text(JUNIT)
    assert torch_versions.run_again(run, tmp_path / "same.xml") == run
    (tmp_path / "again.xml").write_text(JUNIT.replace('<failure message="no"/>', ""))
    again = torch_versions.run_again(run, tmp_path / "again.xml")
    assert (again.passed, again.failed, again.again) == (2, (), run.failed)
    kept = tmp_path / "kept.json"
    torch_versions.keep(again, kept, tmp_path / "page.md")
    assert torch_versions.read_kept(kept) == [again]
    assert "- passed when it ran once more: `tests.passes.test_views.test_two`" in (tmp_path / "page.md").read_text()


def test_the_page_is_that_of_the_kept_runs():
    assert torch_versions.PAGE.read_text() == torch_versions.page(torch_versions.read_kept())
