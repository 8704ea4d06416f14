"""Tables of a run: means over seeds, sizes, equality, and what is said beside an accuracy."""

import io
import json

from rich.console import Console

from fat_plugins.recipes.deploy import Deployment, LayerRow
from fat_plugins.recipes.report import RunReport, VariantResult


def result(algorithm, seed, accuracy, verified=True, differences=0, deployed=True):
    rows = [
        LayerRow("input of conv", "activation", "uniform", 4, compared=30, differences=0, ties=2),
        LayerRow("conv", "weight", "uniform", 4, "i4", 10, "brgconv_I8", "int8", 20, differences, 0),
    ]
    if verified is None:
        for row in rows:
            row.compared = row.differences = row.ties = None
    deployment = Deployment("export/model.xml", accuracy - 0.01, 1000, 7900, rows, verified) if deployed else None
    return VariantResult(algorithm, seed, algorithm != "fat", accuracy, 0.9, deployment)


def report(*results):
    return RunReport("r", {"Data": "digits"}, {"fat": "FAT W4A4", "lsq": "LSQ W4A4"}, list(results))


def test_several_seeds_give_mean_and_extremes():
    _, rows = report(
        result("fat", 0, 0.9), result("lsq", 0, 0.5), result("fat", 1, 0.8), result("lsq", 1, 0.7)
    ).summary()
    assert [row[0] for row in rows] == ["float32", "FAT W4A4", "LSQ W4A4"]
    assert rows[0][1:4] == ["90.00% (90.00% to 90.00%)", "-", "7,900 B"]
    assert rows[1][1:] == [
        "85.00% (80.00% to 90.00%)", "84.00% (79.00% to 89.00%)", "1,000 B", "7.90", "0 (4) of 100",
    ]  # fmt: skip
    assert rows[2][1] == "60.00% (50.00% to 70.00%)"


def test_differences_of_any_seed_fail_the_run():
    assert report(result("fat", 0, 0.9)).verified
    bad = report(result("fat", 0, 0.9), result("fat", 1, 0.9, verified=False, differences=3))
    assert not bad.verified
    assert bad.summary()[1][1][-1] == "3 (4) of 100"
    assert bad.to_dict()["verified"] is False


def test_what_was_not_compared_or_exported_says_so():
    assert report(result("fat", 0, 0.9, verified=None)).summary()[1][1][-1] == "not compared"
    bare = report(result("fat", 0, 0.9, deployed=False))
    assert bare.summary()[1][1] == ["FAT W4A4", "90.00%", "-", "-", "-", "-"]
    assert len(bare.tables()) == 1


def test_markdown_has_both_tables_and_the_facts():
    text = report(result("fat", 0, 0.9)).to_markdown()
    lines = text.splitlines()
    assert "| FAT W4A4 | 90.00% | 89.00% | 1,000 B | 7.90 | 0 (2) of 50 |" in lines
    assert "| conv | weight | 4 | uniform | i4 | int8 | brgconv_I8 | 20 | 0 | 0 |" in lines
    assert "* Data: digits" in lines
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {7, 11}


def test_narrow_terminals_keep_kernels_and_differences():
    shown = {}
    for width in (80, 160):
        console = Console(width=width, record=True, file=io.StringIO())
        for table in report(result("fat", 0, 0.9)).tables(width):
            console.print(table)
        shown[width] = console.export_text()
        assert max(len(line) for line in shown[width].splitlines()) <= width
        assert "brgconv_I8" in shown[width]
    assert "uniform" in shown[160]
    assert "uniform" not in shown[80]


def test_json_is_json():
    data = json.loads(json.dumps(report(result("fat", 0, 0.9)).to_dict()))
    assert data["results"][0]["deployment"]["layers"][1]["kernel"] == "brgconv_I8"
