"""The HTML report and its JSON, of a run on the toy host whose exporters only pretend."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
import torch
from fake_exporter import FakeExporter
from toy_host import ToyHost
from typer.testing import CliRunner

from fat_plugins.cli import BAD_INPUT, OK, app
from fat_plugins.errors import CheckpointError, ConfigError
from fat_plugins.recipes import load_recipe, load_run, train
from fat_plugins.recipes import targets as targets_module
from fat_plugins.recipes.report import RunReport
from fat_plugins.recipes.targets import ONNX, QONNX
from fat_plugins.report import data as data_module
from fat_plugins.report import write_report

pytest.importorskip("jinja2", reason="an optional package of reports")
pytest.importorskip("matplotlib", reason="an optional package of reports")

RECIPE = """\
name: tiny
seeds: [3, 4]
model: {name: digits_cnn, params: {width: 4}}
data: {name: digits, batch_size: 256}
compression: {algorithm: fat, weights: {bits: 4}}
pretrain: {epochs: 1, optimizer: {name: sgd, lr: 0.1}}
training: {epochs: 2, optimizer: {name: sgd, lr: 0.02}}
export: {format: qonnx, verify_samples: 5}
baselines: [squantizer]
"""
LAYERS = ("stem.0", "conv1.0", "depthwise.0", "pointwise.0", "conv2.0", "conv3.0", "head")


@pytest.fixture(scope="module")
def installed():
    """The toy host and the fake exporters, for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("run", "loaded"):
            patch.setattr(f"fat_plugins.recipes.{module}.get_host", lambda name: ToyHost())
        for target in (QONNX, ONNX):
            patch.setitem(sys.modules, target.module, FakeExporter(".onnx"))
        patch.setattr(targets_module, "find_spec", lambda name: object())
        patch.setattr(targets_module, "_version", lambda name: "9")
        yield


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """A run with two seeds, a baseline and a report."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "recipe.yaml").write_text(RECIPE)
    train(load_recipe(folder / "recipe.yaml"), folder / "run")
    write_report(folder / "run")
    return folder / "run"


@pytest.fixture
def no_plots(monkeypatch):
    """For tests that look at words and numbers only."""
    for name in ("tensor_plot", "drawing", "over_time", "training_curves", "accuracy_dots"):
        monkeypatch.setattr(f"fat_plugins.report.plots.{name}", lambda *args, **kwargs: "")


@pytest.fixture
def copied(run, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def page(directory):
    return (directory / "report.html").read_text()


def numbers(directory):
    return json.loads((directory / "report_data.json").read_text())


class Reader(HTMLParser):
    """Tags with their attributes, the text, and whether every element was closed."""

    VOID = {"meta", "br"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


# -- the page --------------------------------------------------------------------------------------------------------
def test_page_is_well_formed_and_shows_every_layer(run):
    read = Reader(page(run))
    assert read.open == []
    text = " ".join(" ".join(read.text).split())
    for name in LAYERS:
        # the table, the plot's card, the comparison of codes of two files
        assert text.count(name) >= 4
    for part in ("FAT W4A4", "SQUANTIZER W4A4", "float32", "Accuracy", "Training", "Layers", "About this run"):
        assert part in text
    assert "over 2 seeds" in text and text.count(" to ") >= 6
    labels = [value for name, value in read.attributes if name == "aria-label"]
    assert labels[:2] == ["accuracy by seed", "training curves"]
    assert labels[2 : 2 + len(LAYERS)] == [f"weight {name}" for name in LAYERS]
    assert sum(label.startswith("Gate in the frequency domain: ") for label in labels) == len(LAYERS)
    assert any(label.startswith("scale / that of epoch 1") for label in labels)
    assert "Codes of torch against qonnx" in text and "Codes of torch against ONNX Runtime" in text


def test_page_needs_nothing_from_outside(run):
    text = page(run)
    assert not re.findall(r"https?:|//[a-z0-9]+\.", text)
    read = Reader(text)
    assert not {"script", "link", "iframe", "img", "object"} & set(read.tags)
    for name, value in read.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", text)


def test_labels_of_plots_are_not_rounded():
    from fat_plugins.report import plots
    from fat_plugins.report.data import OverTime

    row = OverTime(name="a", kind="weight", values={"noise": [0.3331, 0.3333, 0.3336]})
    ticks = re.findall(r">(0\.333\d*)<", plots.over_time("noise", [row], "noise"))
    assert len(set(ticks)) == len(ticks) >= 2


def test_same_run_same_page(run, copied):
    write_report(copied)
    assert page(copied) == page(run)
    assert numbers(copied) == numbers(run)


# -- the data --------------------------------------------------------------------------------------------------------
#: keys of the JSON: new ones may be added here, old ones are what programs read
KEYS = {
    "ReportData": "format name title algorithm fidelity metric headline accuracy curves totals tensors over_time "
    "figures network checks facts missing",
    "Metric": "name unit difference factor higher_is_better",
    "Tile": "title value note good",
    "Accuracy": "name kind seeds torch deployed weights_bytes float_bytes",
    "Curve": "name kind seed stage before epochs",
    "Epoch": "lr train_loss train_accuracy validation_loss validation_accuracy",
    "Tensor": "name kind algorithm bits form shape scale channels zeros code_range codes_used codes bytes storage "
    "stored_bytes kernel speed macs bops input input_bits sqnr_db relative_mse float_sqnr_db float_relative_mse "
    "float_gain clipped histogram code_histogram",
    "Histogram": "unit edges counts levels thresholds",
    "Codes": "codes counts",
    "Totals": "macs float_macs bops float_bops",
    "OverTime": "name kind values",
    "Drawing": "layer title kind x_label y_label x series rows limits",
    "Check": "runtime file file_bytes weights_bytes verified rows notes",
    "CheckRow": "name kind compared differences ties",
}


def test_keys_of_the_data_stay():
    assert data_module.FORMAT == 1
    for name, keys in KEYS.items():
        assert set(getattr(data_module, name).model_fields) == set(keys.split()), name


def test_data_are_the_numbers_of_the_run(run):
    data = numbers(run)
    report = json.loads((run / "report.json").read_text())
    own = [r["accuracy"] for r in report["results"] if not r["baseline"]]
    by_kind = {a["kind"]: a for a in data["accuracy"]}
    assert by_kind["own"]["torch"] == own and by_kind["own"]["seeds"] == [3, 4]
    assert set(by_kind["own"]["deployed"]) == {"qonnx", "ONNX Runtime"}
    assert by_kind["baseline"]["name"] == "SQUANTIZER W4A4"
    assert by_kind["float"]["torch"] == [r["float_accuracy"] for r in report["results"] if not r["baseline"]]
    assert [(c["name"], c["seed"], len(c["epochs"])) for c in data["curves"]] == [
        ("float32", 3, 1), ("FAT W4A4", 3, 2), ("SQUANTIZER W4A4", 3, 2),
        ("float32", 4, 1), ("FAT W4A4", 4, 2), ("SQUANTIZER W4A4", 4, 2),
    ]  # fmt: skip
    assert data["missing"] == []
    assert [c["runtime"] for c in data["checks"]] == ["qonnx", "ONNX Runtime"]
    assert all(row["compared"] for row in data["checks"][0]["rows"])
    titles = [tile["title"] for tile in data["headline"]]
    assert titles == [
        "Accuracy", "Against float32", "Against SQUANTIZER W4A4", "Smaller weights", "Fewer bit operations", "Codes",
        "Codes",
    ]  # fmt: skip


def test_tensors_are_those_of_the_model(run):
    data = numbers(run)
    loaded = load_run(run)
    assert [t["name"] for t in data["tensors"]] == list(LAYERS)
    by_name = {t["name"]: t for t in data["tensors"]}
    for name in LAYERS:
        layer = loaded.model.get_submodule(name)
        quantizer = layer.parametrizations.weight[0]
        codes, _ = quantizer.freeze(layer.parametrizations.weight.original)
        row = by_name[name]
        assert row["algorithm"] == quantizer.algorithm
        assert row["bits"] == quantizer.bits
        assert sum(row["code_histogram"]["counts"]) == codes.numel()
        found = dict(zip(row["code_histogram"]["codes"], row["code_histogram"]["counts"], strict=True))
        assert found == {int(c): int((codes == c).sum()) for c in codes.unique()}
        assert sum(row["histogram"]["counts"]) >= codes.numel()
        assert row["sqnr_db"] > 10 and row["float_sqnr_db"] > 5
        assert row["input"] is None and row["input_bits"] == 32
        assert row["bops"] == row["macs"] * row["bits"] * 32
    # 8 x 8 images, width 4: the first 3x3 convolution, a strided one, a depthwise one, the head
    assert by_name["stem.0"]["macs"] == 64 * 4 * 9
    assert by_name["conv1.0"]["macs"] == 16 * 8 * 4 * 9
    assert by_name["depthwise.0"]["macs"] == 16 * 8 * 9
    assert by_name["head"]["macs"] == 8 * 10
    assert data["totals"]["macs"] == sum(t["macs"] for t in data["tensors"])
    assert data["totals"]["float_bops"] == data["totals"]["macs"] * 1024


def test_levels_and_thresholds_are_those_of_the_grid(run):
    rows = {t["name"]: t for t in numbers(run)["tensors"]}
    step = rows["conv2.0"]["scale"][0]
    grid = rows["conv2.0"]["histogram"]
    assert torch.allclose(torch.tensor(grid["levels"]).diff(), torch.tensor(step), rtol=1e-4)
    assert len(grid["thresholds"]) == len(grid["levels"]) - 1
    middle = (torch.tensor(grid["levels"][1:]) + torch.tensor(grid["levels"][:-1])) / 2
    assert torch.allclose(torch.tensor(grid["thresholds"]), middle, rtol=1e-3, atol=1e-4)


def test_quantizers_are_followed_over_time(run):
    rows = {v["name"]: v for v in numbers(run)["over_time"]}
    assert set(rows) == set(LAYERS)
    assert len(rows["conv1.0"]["values"]["clip"]) == 2
    last = load_run(run, "last").model.conv1[0].parametrizations.weight[0]
    assert rows["conv1.0"]["values"]["clip"][-1] == pytest.approx(float(last.alpha.detach()), rel=1e-5)
    assert [f["title"] for f in numbers(run)["figures"]] == ["Gate in the frequency domain"] * 7


def test_a_baseline_has_a_report_too(run, no_plots):
    write_report(run / "baselines" / "squantizer")
    data = numbers(run / "baselines" / "squantizer")
    assert (data["name"], data["title"], data["algorithm"]) == ("tiny", "SQUANTIZER W4A4", "squantizer")
    assert [t["name"] for t in data["tensors"]] == list(LAYERS)
    assert data["network"]["zeros of the quantized weights"] > 0.2
    assert data["tensors"][1]["float_sqnr_db"] is not None  # the float weights stand two directories above
    # what was deployed and compared stands in the report of the whole run
    whole = json.loads((run / "report.json").read_text())
    result = next(r for r in whole["results"] if r["baseline"] and r["seed"] == 3)
    assert [(a["kind"], a["seeds"], a["torch"]) for a in data["accuracy"]] == [
        ("float", [3], [result["float_accuracy"]]), ("own", [3], [result["accuracy"]]),
    ]  # fmt: skip
    assert [(c["file"], c["verified"]) for c in data["checks"]] == [
        ("export/model.onnx", True), ("export/model_qdq.onnx", True),
    ]  # fmt: skip
    assert [t["storage"] for t in data["tensors"]] == [r["storage"] for r in result["deployments"][0]["layers"]]
    assert data["facts"]["Seeds"] == "1 (3)" and "export/model.onnx " in data["facts"]["Sizes"]
    assert "baselines/" not in data["facts"]["Sizes"]
    assert data["missing"] == []


def test_a_further_seed_has_a_report_too(run, no_plots):
    seed, deeper = run / "seeds" / "4", run / "seeds" / "4" / "baselines" / "squantizer"
    for part in (seed, deeper):
        write_report(part)
    assert [(a["name"], a["seeds"]) for a in numbers(seed)["accuracy"]] == [
        ("float32", [4]), ("FAT W4A4", [4]), ("SQUANTIZER W4A4", [4]),
    ]  # fmt: skip
    assert [(a["name"], a["kind"], a["seeds"]) for a in numbers(deeper)["accuracy"]] == [
        ("float32", "float", [4]), ("SQUANTIZER W4A4", "own", [4]),
    ]  # fmt: skip
    assert [c["file"] for c in numbers(deeper)["checks"]] == ["export/model.onnx", "export/model_qdq.onnx"]


def test_a_part_of_a_run_that_is_not_complete_says_so(copied, no_plots):
    (copied / "report.json").unlink()
    write_report(copied / "baselines" / "squantizer")
    data = numbers(copied / "baselines" / "squantizer")
    assert data["title"] == "SQUANTIZER" and data["checks"] == []
    assert data["missing"][0] == "no report.json: the run is not complete"


# -- what is not there, what is hostile ------------------------------------------------------------------------------
def test_missing_pieces_are_said_and_left_out(copied, no_plots):
    (copied / "report.json").unlink()
    shutil.rmtree(copied / "seeds")
    (copied / "checkpoint" / "float.safetensors").unlink()
    write_report(copied)
    data = numbers(copied)
    assert len(data["missing"]) == 3
    assert any("no float checkpoint" in text for text in data["missing"])
    assert [len(a["torch"]) for a in data["accuracy"]] == [1, 1]
    assert all(t["float_sqnr_db"] is None and t["sqnr_db"] for t in data["tensors"])
    assert "One seed: no spread is known." in page(copied)
    for which in ("last", "best"):
        (copied / "checkpoint" / f"{which}.safetensors").unlink()
    write_report(copied)
    assert numbers(copied)["tensors"] == []
    assert "the trained model cannot be rebuilt: no checkpoint" in page(copied)
    Reader(page(copied))


def test_hostile_names_are_escaped(copied):
    evil = "<script>alert(1)</script>$x^2$&'\"["
    report = json.loads((copied / "report.json").read_text())
    report["name"] = report["facts"]["Data"] = report["labels"]["fat"] = evil
    report["facts"][evil] = evil
    for result in report["results"]:
        for deployment in result["deployments"]:
            deployment["path"], deployment["notes"] = evil, [evil]
            deployment["layers"][0]["name"] = evil
    (copied / "report.json").write_text(json.dumps(report))
    metrics = json.loads((copied / "metrics.json").read_text())
    for epoch in metrics["quantized"]["stages"][0]["epochs"]:
        epoch["values"]["quantizers"][evil] = {"kind": "weight", "values": {evil: epoch["epoch"]}}
    (copied / "metrics.json").write_text(json.dumps(metrics))
    write_report(copied)
    read = Reader(page(copied))
    assert "script" not in read.tags
    assert "<script" not in page(copied)
    assert any("<script>alert(1)</script>" in text for text in read.text)  # as text, and not as a formula
    assert read.open == []


def test_layers_with_hostile_names(run, installed, tmp_path):
    from fat_plugins.report import plots
    from fat_plugins.report.data import Drawing, Tensor

    evil = "<img src=x onerror=alert(1)>$\\frac"
    tensor = Tensor(name=evil, kind="weight", bits=4, form="uniform", scale=(1, 1), codes=16)
    drawing = Drawing(layer=evil, title=evil, kind="bars", x=[evil], series={evil: [1.0], "b": [2.0]}, x_label=evil)
    for svg in (plots.tensor_plot(tensor), plots.drawing(drawing, 0)):
        read = Reader(svg)
        assert "img" not in read.tags
        assert ("aria-label", f"weight {evil}") in read.attributes or any(evil in text for text in read.text)


def test_unreadable_results_are_one_line(copied):
    (copied / "report.json").write_text('{"name": "x"}')
    with pytest.raises(CheckpointError, match=r"report.json: not the results of a run: facts: this key is required"):
        write_report(copied)
    (copied / "report.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"report\.json: line 1: not JSON"):
        write_report(copied)
    (copied / "report.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        write_report(copied)


def test_results_read_back_are_the_same(run):
    data = json.loads((run / "report.json").read_text())
    assert json.loads(json.dumps(RunReport.from_dict(data).to_dict())) == data


def test_a_failure_leaves_the_earlier_report(copied, monkeypatch):
    before = page(copied), numbers(copied)
    monkeypatch.setattr("fat_plugins.report.page.render", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(copied)
    assert (page(copied), numbers(copied)) == before
    assert not list(copied.glob(".*"))


# -- commands --------------------------------------------------------------------------------------------------------
def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_command_writes_where_it_is_told(run, tmp_path):
    result = call("report", run, "--output", tmp_path / "a.html", "--json", tmp_path / "b.json")
    assert result.exit_code == OK, result.output
    assert result.stdout.split() == [str(tmp_path / "a.html"), str(tmp_path / "b.json")]
    assert (tmp_path / "a.html").read_text() == page(run)
    assert json.loads((tmp_path / "b.json").read_text()) == numbers(run)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["nowhere"], "error: no run directory nowhere"),
        (["{tmp}"], "does not hold a run: neither report.json nor metrics.json is there"),
        (["{run}", "--checkpoint", "first"], "unknown checkpoint 'first'"),
        (["{run}", "-o", "{tmp}/x", "--json", "{tmp}/x"], "cannot be both the page and its data"),
        (["{run}", "-o", "{run}/recipe.yaml/x.html"], "error: cannot write"),
    ],
)
def test_bad_input_is_one_line(args, expected, run, tmp_path):
    result = call("report", *(a.format(tmp=tmp_path, run=run) for a in args))
    assert result.exit_code == BAD_INPUT
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_missing_packages_name_the_extra(run, monkeypatch):
    monkeypatch.setattr("fat_plugins.report.find_spec", lambda name: None if name == "matplotlib" else object())
    result = call("report", run)
    assert (result.exit_code, result.stderr) == (
        BAD_INPUT, "error: report: matplotlib is not installed: pip install 'fat-plugins[report]'\n",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"fat-plugins\[report\]"):
        write_report(run)


def test_summary_command(run):
    shown = call("summary", run)
    assert shown.exit_code == OK
    for name in LAYERS:
        assert name in shown.stdout
    data = json.loads(call("summary", run, "--json").stdout)
    assert [row["name"] for row in data["layers"]] == list(LAYERS)
    assert data["weight_bytes"] == sum(t["bytes"] for t in numbers(run)["tensors"])


def test_training_ends_with_its_report(run, installed, tmp_path, monkeypatch, no_plots):
    (tmp_path / "r.yaml").write_text(RECIPE.replace("[3, 4]", "[3]").replace("epochs: 2", "epochs: 0"))
    assert call("train", tmp_path / "r.yaml", "-o", tmp_path / "a").exit_code == OK
    assert "FAT W4A4" in page(tmp_path / "a")
    # a plot that fails costs the page, not the training
    monkeypatch.setattr("fat_plugins.report.page.render", lambda data: 1 / 0)
    result = call("train", tmp_path / "r.yaml", "-o", tmp_path / "b")
    assert result.exit_code == OK
    assert "no report.html: division by zero" in result.stderr
    monkeypatch.setattr("fat_plugins.cli_train.available", lambda: False)
    result = call("train", tmp_path / "r.yaml", "-o", tmp_path / "c")
    assert (result.exit_code, (tmp_path / "c" / "report.html").exists()) == (OK, False)
    assert "report.html" not in result.stderr
