import shutil
from pathlib import Path

from sparse_pathways.report.results import read_results
from sparse_pathways.report.tables import update_readme

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_in_the_readme_is_that_of_the_stored_results(tmp_path):
    """`sparse-pathways report benchmarks/results/demo --readme README.md` would change nothing."""
    copy = tmp_path / "README.md"
    shutil.copyfile(ROOT / "README.md", copy)
    update_readme(copy, read_results(ROOT / "benchmarks" / "results" / "demo" / "results.json"))
    assert copy.read_text() == (ROOT / "README.md").read_text()
