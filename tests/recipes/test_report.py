"""Tables of a run: means over seeds, sizes, equality, and what is said beside an accuracy."""

import io
import json

from rich.console import Console

from fat_plugins.recipes.deploy import Deployment, LayerRow
from fat_plugins.recipes.report import RunReport, VariantResult
from fat_plugins.recipes.targets import TARGETS


def result(algorithm, seed, accuracy, verified=True, differences=0, deployed=True):
    rows = [
        LayerRow("input of conv", "activation", "uniform", 4, compared=30, differences=0, ties=2),
        LayerRow("conv", "weight", "uniform", 4, "i4", 10, "brgconv_I8", "int8", 20, differences, 0),
    ]
    if verified is None:
        for row in rows:
            row.compared = row.differences = row.ties = None
    deployment = Deployment("export/model.xml", accuracy - 0.01, 1000, 7900, rows, verified)
    return VariantResult(algorithm, seed, algorithm != "fat", accuracy, 0.9, [deployment] if deployed else [])


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
    assert bare.summary() == (
        ["", "accuracy, torch"], [["float32", "90.00%"], ["FAT W4A4", "90.00%"]],
    )  # fmt: skip
    assert len(bare.tables()) == 1


def test_markdown_has_both_tables_and_the_facts():
    text = report(result("fat", 0, 0.9)).to_markdown()
    lines = text.splitlines()
    assert "|  | accuracy, torch | accuracy, OpenVINO | weights file | smaller by | codes differing (ties) |" in lines
    assert "Layers of FAT W4A4, seed 0:" in lines
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
    assert data["results"][0]["deployments"][0]["layers"][1]["kernel"] == "brgconv_I8"


# -- several targets -------------------------------------------------------------------------------------------------
def files(*names, algorithm="fat", accuracy=0.9):
    """A result with one file for each target; 30 codes of 4 bits and 10 of 8 bits."""
    done = []
    for i, name in enumerate(names):
        rows = [
            LayerRow("input of conv", "activation", "uniform", 4, compared=30, differences=0, ties=i),
            LayerRow("conv", "weight", "uniform", 4, "float32", 120, compared=30, differences=0, ties=0, elements=30),
            LayerRow("head", "weight", "uniform", 8, "float32", 40, compared=10, differences=i, ties=0, elements=10),
        ]
        path = f"export/{TARGETS[name].file}"
        done.append(Deployment(path, accuracy - i / 10, 1000, 7900, rows, True, None, [], name, 5000 + i))
    return VariantResult(algorithm, 0, algorithm != "fat", accuracy, 0.95, done)


def test_every_runtime_has_its_columns_and_codes_are_counted_at_their_width():
    run = report(files("qonnx", "onnx"))
    header, rows = run.summary()
    assert header == [
        "", "accuracy, torch", "accuracy, qonnx", "accuracy, ONNX Runtime", "weight codes", "smaller by",
        "codes differing (ties), qonnx", "codes differing (ties), ONNX Runtime",
    ]  # fmt: skip
    assert rows[0] == ["float32", "95.00%", "-", "-", "160 B", "1.00", "-", "-"]
    assert rows[1] == ["FAT W4A4", "90.00%", "90.00%", "80.00%", "25 B", "6.40", "0 (0) of 70", "1 (1) of 70"]
    # neither file is said to be smaller than it is
    assert run.sizes() == (
        "weight codes: quantized weights at their bit widths, without scales; files: "
        "export/model.onnx 5,000 B (weights stored as float32), "
        "export/model_qdq.onnx 5,001 B (weights stored as float32)"
    )


def test_the_packed_file_gives_the_size_where_there_is_one():
    run = report(files("qonnx", "openvino", "onnx"))
    header, rows = run.summary()
    assert header[5:7] == ["weights file, OpenVINO", "smaller by"]
    assert rows[0][5:7] == ["7,900 B", "1.00"]
    assert rows[1][5:7] == ["1,000 B", "7.90"]
    assert "weight codes" not in run.sizes()
    assert "export/model.onnx 5,000 B" in run.sizes()
    assert report(files("openvino")).sizes() == ""


def test_every_file_has_its_layers_and_no_column_that_its_runtime_cannot_fill():
    lines = report(files("qonnx", "onnx")).to_markdown().splitlines()
    assert "Layers of FAT W4A4, seed 0, qonnx:" in lines
    assert "Layers of FAT W4A4, seed 0, ONNX Runtime:" in lines
    assert lines.count("| layer | tensor | bits | form | stored | codes | differ | ties |") == 2
    assert "| head | weight | 8 | uniform | float32 | 10 | 1 | 0 |" in lines
    console = Console(width=80, record=True, file=io.StringIO())
    for table in report(files("qonnx")).tables(80)[1:]:
        console.print(table)
    assert "kernel" not in console.export_text()


def test_json_names_the_target_of_every_file():
    data = json.loads(json.dumps(report(files("qonnx", "onnx")).to_dict()))["results"][0]["deployments"]
    assert [(d["format"], d["path"], d["accuracy"]) for d in data] == [
        ("qonnx", "export/model.onnx", 0.9), ("onnx", "export/model_qdq.onnx", 0.8),
    ]  # fmt: skip
    assert data[0]["code_bytes"] == 25


def test_a_difference_in_one_runtime_fails_the_run():
    result = files("qonnx", "onnx")
    result.deployments[1].verified = False
    assert not report(result).verified
