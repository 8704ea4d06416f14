"""Recipes whose networks several algorithms share."""

import json
import re
from importlib.metadata import PackageNotFoundError, version

import pytest

from fat_plugins.errors import ConfigError
from fat_plugins.network import named_quantizers
from fat_plugins.recipes import load_run, train

ENDS = "['{re}stem', '{re}head']"
SECTIONS = f"""\
compression:
  - {{algorithm: fat, weights: {{bits: 2}}, activations: {{bits: 3}}, ignored_scopes: {ENDS}}}
  - algorithm: lsq
    weights: {{bits: 8}}
    activations: {{bits: 8}}
    target_scopes: {ENDS}
    first_layer: same
    last_layer: same
"""


@pytest.fixture
def text(recipe_text):
    """FAT in the middle, LSQ at both ends."""
    return recipe_text.replace("compression: {algorithm: lsq, weights: {bits: 4}}\n", SECTIONS)


def installed(name):
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def found(model, role="weight"):
    """Algorithm and bits of every quantizer, by its layer."""
    return {(q.algorithm, q.spec.bits) for _, q in named_quantizers(model) if q.role == role}


def test_names_stages_and_baselines(load, text):
    stages = "epochs: 1\n  stages: [{weights: {bits: 4}}, {weights: {bits: 2}, activations: {bits: 2}}]"
    recipe = load(text.replace("epochs: 1", stages).replace("export: null", "export: null\nbaselines: [lsq]"))
    assert recipe.algorithm == "fat+lsq"
    first, last = (recipe.config_for(None, stage)["compression"] for stage in recipe.training.stages)
    assert [(s["algorithm"], s["weights"]["bits"], s["activations"]["bits"]) for s in first] == [
        ("fat", 4, 3), ("lsq", 8, 8),
    ]  # fmt: skip
    assert [(s["weights"]["bits"], s["activations"]["bits"]) for s in last] == [(2, 2), (8, 8)]
    baseline = recipe.config_for(recipe.baselines[0], recipe.training.stages[0])["compression"]
    assert [(s["algorithm"], s["weights"]["bits"]) for s in baseline] == [("lsq", 4), ("lsq", 8)]
    assert baseline[0]["ignored_scopes"] == first[0]["ignored_scopes"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("bits: 2", "bits: 9", r"compression\[0\].weights.*9"),
        ("    first_layer", "    frst_layer: 1\n    first_layer", r"n\[1\].*frst_.*did you mean 'first_layer'"),
        (f", ignored_scopes: {ENDS}", "", r"\[0\] \('fat'\) and compression\[1\] \('lsq'\) both quantize every layer"),
        ("epochs: 1", "epochs: 1\n  stages: [{weights: {bits: 9}}]", r"n\[0\] \(training.stages.0\).weights.*9"),
        ("export: null", "export: null\nbaselines: [fat]", r"baselines: \['fat'\] repeat .* own algorithm 'fat'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(load, text, old, new, expected):
    assert old in text
    with pytest.raises(ConfigError, match=expected) as caught:
        load(text.replace(old, new))
    assert "\n" not in str(caught.value)


def test_run_and_report_have_one_name_for_both(toy_host, load, text, tmp_path):
    text = text.replace("'{re}stem', '{re}head'", "stem.0, head")  # the toy host knows whole names only
    recipe = load(text.replace("export: null", "export: null\nbaselines: [squantizer]"))
    report = train(recipe, tmp_path / "run")
    assert report.labels == {"fat+lsq": "FAT W2A3 + LSQ W8A8", "squantizer": "SQUANTIZER W2A3 + LSQ W8A8"}
    assert [row[0] for row in report.summary()[1]] == ["float32", *report.labels.values()]
    assert re.findall(r"(?:^|; )(\w+): [A-D]: ", report.facts["Fidelity"]) == ["fat", "lsq", "squantizer"]
    assert report.facts["Layers"] == (
        "W2A3: weights and inputs of all convolutions and linear layers but stem.0, head; bits of the first layer: 8, "
        "last layer: 8. W8A8: weights and inputs of the layers stem.0, head"
    )
    assert report.facts["Fine-tuning from these float weights, the same for all"].startswith("W2A3 + W8A8: 1 epochs")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["quantized"]["algorithm"] == "fat+lsq"
    kinds = {name: type(q).__name__ for name, q in named_quantizers(load_run(tmp_path / "run").model)}
    edges = {name for name, kind in kinds.items() if kind == "LSQWeight"}
    assert {name.split(".")[0] for name in edges} == {"stem", "head"}
    assert set(kinds.values()) == {"FATWeight", "LSQWeight"}
    other = load_run(tmp_path / "run" / "baselines" / "squantizer").model
    assert {type(q).__name__ for _, q in named_quantizers(other)} == {"SQuantizerWeight", "LSQWeight"}


@pytest.mark.filterwarnings("ignore")  # of the hosts and torch about each other
@pytest.mark.parametrize(
    ("host", "target"), [(h, t) for h, t in (("nncf", "openvino"), ("brevitas", "qonnx")) if installed(h)]
)
def test_hosts_train_export_and_rebuild_it(load, text, tmp_path, monkeypatch, host, target):
    monkeypatch.chdir(tmp_path)  # NNCF 2 writes its graphs to the current folder
    more = f"export: {{format: {target}, verify_samples: 4}}\nhost: {host}\nbaselines: [pact]"
    recipe = load(text.replace("epochs: 2", "epochs: 0").replace("export: null", more))
    report = train(recipe, tmp_path / "run")
    assert report.verified and [r.algorithm for r in report.results] == ["fat+lsq", "pact"]
    for result in report.results:
        rows = {row.name: row.bits for row in result.deployments[0].layers if row.kind == "weight"}
        assert len(rows) == 7
        assert {name for name, bits in rows.items() if bits == 8} == {"stem.0", "head"}
        assert set(rows.values()) == {2, 8}
    assert found(load_run(tmp_path / "run").model) == {("fat", 2), ("lsq", 8)}
    assert found(load_run(tmp_path / "run" / "baselines" / "pact").model) == {("pact", 2), ("lsq", 8)}


@pytest.mark.skipif(not installed("jinja2") or not installed("matplotlib"), reason="optional packages of reports")
def test_page_says_how_faithful_both_are(toy_host, load, text, tmp_path):
    from fat_plugins.report import write_report

    train(load(text.replace("'{re}stem', '{re}head'", "stem.0, head")), tmp_path / "run")
    write_report(tmp_path / "run")
    data = json.loads((tmp_path / "run" / "report_data.json").read_text())
    assert (data["title"], data["algorithm"]) == ("FAT W2A3 + LSQ W8A8", "fat+lsq")
    assert re.findall(r"(?:^|; )(\w+): [A-D]: ", data["fidelity"]) == ["fat", "lsq"]
    assert data["missing"] == ["nothing was exported: no files, kernels and comparisons of codes"]
