"""Recipes that learn images from images: the task, its data and network, and all that is said about a run."""

import json
import math
from io import StringIO

import pytest
import torch
from rich.console import Console
from shipped_runs import needs

from fat_plugins import CheckpointError, ConfigError, ExportError
from fat_plugins.recipes import Reporter, RunReport, load_recipe, load_run, train
from fat_plugins.recipes.data_sr import GeneratedSRParams, bicubic, generated_sr, small_images
from fat_plugins.recipes.deploy import accuracy
from fat_plugins.recipes.nets_sr import EDSRTiny
from fat_plugins.recipes.tasks import ACCURACY, CLASSIFICATION, PSNR, SuperResolution
from fat_plugins.recipes.trainer import evaluate

SHIPPED = "sr/edsr_tiny_daq_w4a4"
SMALL = [
    "data.params.train=16", "data.params.validation=8", "data.params.test=9", "data.params.size=8", "data.batch_size=8",
    "model.params.width=4", "model.params.blocks=1", "pretrain.epochs=1", "training.epochs=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return generated_sr(GeneratedSRParams(train=16, validation=8, test=9, size=8))


def small(*settings):
    return load_recipe(SHIPPED, [*SMALL, *settings])


# -- the task --------------------------------------------------------------------------------------------------------
def test_psnr_of_known_errors():
    target = torch.rand(4, 3, 12, 12)
    task = SuperResolution()
    apart = torch.tensor([0.1, 0.01, 0.0, 0.5]).view(-1, 1, 1, 1)
    inside = target * 0.4 + 0.05
    score = float(task.score(inside + apart, inside))
    assert score == pytest.approx(20 + 40 + 100 + 20 * math.log10(2), abs=1e-3)
    assert float(task.loss(inside + apart, inside)) == pytest.approx(0.61 / 4, rel=1e-4)
    assert float(task.loss(inside + apart, inside, reduction="sum")) == pytest.approx(0.61, rel=1e-4)


def test_borders_are_left_out_and_pixels_clipped():
    target = torch.zeros(1, 1, 8, 8)
    out = target.clone()
    out[..., :2, :] = out[..., -1, :] = 0.25
    assert float(SuperResolution(2, -0.5, 0.5).score(out, target)) == 100.0
    assert float(SuperResolution(1, -0.5, 0.5).score(out, target)) < 30
    assert float(SuperResolution(0, -0.5, 0.5).score(torch.full_like(out, 9.0), target + 0.5)) == 100.0
    # of pixels between 0 and 255 the same picture has the same number
    large = SuperResolution(0, 0.0, 255.0).score((out + 0.5) * 255, (target + 0.5) * 255)
    assert float(large) == pytest.approx(float(SuperResolution(0, -0.5, 0.5).score(out, target)), abs=1e-3)


def test_words_of_the_metrics():
    assert (ACCURACY.text(0.98644), PSNR.text(31.204)) == ("98.64%", "31.20 dB")
    assert PSNR.mean([30.0, 31.0]) == "30.50 dB (30.00 dB to 31.00 dB)"
    assert (ACCURACY.title, PSNR.title) == ("Accuracy", "PSNR")


def test_a_deployed_model_is_scored_as_in_torch(data):
    torch.manual_seed(0)
    net = EDSRTiny(3, width=4, blocks=1).eval()
    _, wanted = evaluate(net, data.test_loader(4), None, data.task)
    with torch.no_grad():
        assert accuracy(lambda x: net(torch.tensor(x)).numpy(), data.test_loader(5), data.task) == pytest.approx(wanted)
    with pytest.raises(ExportError, match=r"^the deployed model gives \(4, 3\) for a batch of 4 images$"):
        accuracy(lambda x: x[:, :, 0, 0], data.test_loader(4), data.task)


# -- data and network ------------------------------------------------------------------------------------------------
def test_images_are_drawn_alike_each_time(data):
    again = generated_sr(GeneratedSRParams(train=16, validation=8, test=9, size=8))
    other = generated_sr(GeneratedSRParams(train=16, validation=8, test=9, size=8, data_seed=1))
    for part in ("train", "validation", "test"):
        low, high = getattr(data, part).tensors
        assert low.shape[1:] == (3, 8, 8) and high.shape[1:] == (3, 16, 16)
        assert float(high.min()) >= -0.5 and float(high.max()) <= 0.5 and float(high.std()) > 0.1
        assert torch.equal(high, getattr(again, part).tensors[1])
        assert not torch.equal(high, getattr(other, part).tensors[1])
        assert torch.equal(low, small_images(high, 2, "bicubic"))
    assert not torch.equal(data.validation.tensors[1][0], data.test.tensors[1][0])
    assert data.output_shape == (3, 16, 16) and data.sample_shape == (3, 8, 8)


@pytest.mark.parametrize("how", ["bicubic", "area"])
def test_interpolation_is_told_for_comparison(how):
    data = generated_sr(GeneratedSRParams(train=16, validation=8, test=9, size=12, scale=3, downsampling=how))
    low, high = data.test.tensors
    told = float(data.description.rpartition("bicubic interpolation: ")[2].removesuffix(" dB"))
    assert told == pytest.approx(float(data.task.score(bicubic(low, 3), high)) / 9, abs=0.006)
    assert data.task.shave == 3 and f"12x12 to 36x36 ({how})" in data.description
    flat = torch.full_like(high, float(high.mean()))
    assert told > float(data.task.score(flat, high)) / 9 + 3


def test_pairs_are_turned_together(data):
    loader = data.training_loader(4, seed=0)
    batches = list(loader.begin(0))
    for low, high in batches:
        assert torch.allclose(low, small_images(high, 2, "bicubic"), atol=1e-5)
    assert not torch.equal(batches[0][1], next(iter(loader.begin(1)))[1])
    again = list(loader.begin(0, 2))  # as a run that goes on reads them
    assert all(torch.equal(a, b) for a, b in zip(again[0], batches[2], strict=True))
    one = data.augmented(0)[(0, 3)]
    pair = data.augmented(0).__getitems__([(0, 5), (0, 3)])
    assert torch.equal(one[0], pair[0][1]) and torch.equal(one[1], pair[1][1])


def test_networks_and_data_that_do_not_fit(toy_host, tmp_path):
    def refused(message, *settings):
        recipe = small("export=null")
        for section, values in settings:
            setattr(recipe, section, type(getattr(recipe, section)).model_validate(values))
        with pytest.raises(ConfigError, match=message):
            train(recipe, tmp_path / "run")

    wrong_scale = {"name": "edsr_tiny", "params": {"scale": 3}}
    refused(r"^model: 'edsr_tiny' gives .*\(1, 3, 24, 24\).* expected \(1, 3, 16, 16\): the im", ("model", wrong_scale))
    classifier = {"name": "digits_cnn", "params": {"width": 4}}
    refused(r"^model: 'digits_cnn' gives .* expected \(1, 3, 16, 16\): the images to learn", ("model", classifier))
    refused(r"^model: 'edsr_tiny' gives .* expected \(1, 10\): the classes of the data", ("data", {"name": "digits"}))
    training = small("export=null").training.model_dump()
    smooth, taught = {**training, "label_smoothing": 0.1}, {**training, "distillation": {"alpha": 0.5}}
    refused(r"^training\.label_smoothing: 0\.1; allowed: 0, .* images in place of labels", ("training", smooth))
    refused(r"^training\.distillation: learns from logits", ("training", taught))
    assert not list(tmp_path.iterdir())


# -- a run -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def run(toy_host, tmp_path):
    """Report, what was printed, and the events of a run on the toy host."""

    class Kept:
        def __init__(self):
            self.events = []

        def event(self, kind, fields):
            self.events.append((kind, fields))

        def close(self):
            pass

    log, out = Kept(), StringIO()
    reporter = Reporter(console=Console(file=out, width=200), logs=[log])
    report = train(small("export=null", "seeds=[0, 1]"), tmp_path / "run", reporter=reporter)
    return report, out.getvalue(), log.events, tmp_path / "run"


def test_nothing_about_a_run_speaks_of_accuracy(run):
    report, printed, events, folder = run
    text = StringIO()
    for table in report.tables():
        Console(file=text, width=200).print(table)
    for words in (printed, report.to_markdown(), text.getvalue(), (folder / "results.md").read_text()):
        assert " dB" in words and "accura" not in words.lower() and " acc " not in words and "%" not in words
    assert "|  | PSNR, torch |" in report.to_markdown() and "train PSNR" in printed
    assert report.facts["PSNR"] == "mean over the test images, all channels, without 2 pixels at each border"
    assert {f["metric"] for kind, f in events if kind == "epoch"} == {"PSNR"}
    assert all(5 < r.accuracy < 60 and 5 < r.float_accuracy < 60 for r in report.results)


def test_files_of_a_run_name_the_task(run):
    report, _, _, folder = run
    stored = json.loads((folder / "report.json").read_text())
    assert stored["task"] == json.loads((folder / "metrics.json").read_text())["task"] == "super_resolution"
    assert RunReport.from_dict(stored).to_markdown() == report.to_markdown()
    assert RunReport.from_dict(stored).part(1, None, "seeds/1").metric == PSNR
    with pytest.raises(
        CheckpointError, match=r"^report\.json: unknown task 'super_resolutio'; allowed: .*did you mean"
    ):
        RunReport.from_dict({**stored, "task": "super_resolutio"})
    with pytest.raises(CheckpointError, match=r"^report\.json: not the results of a run: task"):
        RunReport.from_dict({**stored, "task": [1]})
    del stored["task"]  # as all files were before there were tasks
    assert RunReport.from_dict(stored).metric == ACCURACY == CLASSIFICATION.metric
    loaded = load_run(folder)
    _, psnr = evaluate(loaded.model, loaded.data.test_loader(), None, loaded.data.task)
    assert psnr == pytest.approx(report.main.accuracy, abs=1e-4)


def test_the_page_of_a_run(run):
    pytest.importorskip("jinja2", reason="the extra 'report'")
    pytest.importorskip("matplotlib", reason="the extra 'report'")
    from fat_plugins.report import write_report

    _, _, _, folder = run
    page, data = write_report(folder)
    text, numbers = page.read_text(), json.loads(data.read_text())
    assert numbers["metric"] == {
        "name": "PSNR",
        "unit": "dB",
        "difference": "dB",
        "factor": 1.0,
        "higher_is_better": True,
    }
    assert "<h2>PSNR</h2>" in text and "PSNR, dB" in text and "PSNR by seed" in text
    assert "ccuracy" not in text and " pp" not in text
    (tile, against, *_) = numbers["headline"]
    assert tile["title"] == "PSNR" and tile["value"].endswith(" dB") and " dB over 2 seeds" in tile["note"]
    assert against["value"].endswith(" dB") and against["value"][0] in "+\N{MINUS SIGN}\N{PLUS-MINUS SIGN}"
    # a run that is not complete tells by its metrics
    (folder / "report.json").unlink()
    write_report(folder)
    assert json.loads(data.read_text())["metric"]["name"] == "PSNR"
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "task": "classificatio"}))
    with pytest.raises(
        CheckpointError, match=r"metrics\.json: unknown task 'classificatio'; .* did you mean 'classific"
    ):
        write_report(folder)


def test_a_network_learns(data):
    """Better than interpolation would take minutes; better than at the start takes seconds."""
    recipe = small("export=null", "pretrain.epochs=4")
    from fat_plugins.recipes.trainer import fit

    torch.manual_seed(0)
    net = EDSRTiny(3, width=4, blocks=1)
    before = evaluate(net, data.test_loader(), None, data.task)
    records = fit(net, data, recipe.pretrain, batch_size=4, seed=0)
    after = evaluate(net, data.test_loader(), None, data.task)
    assert after[0] < before[0] and after[1] > before[1] and records[-1].train_accuracy > records[0].train_accuracy


# -- the shipped recipe on the hosts ---------------------------------------------------------------------------------
def exported(host, folder, monkeypatch, *settings):
    monkeypatch.chdir(folder)  # NNCF 2 writes its graphs to the current folder
    recipe = small(f"host={host}", "baselines=[]", "export.verify_samples=4", *settings)
    report = train(recipe, folder / "run")
    (result,) = report.results
    (done,) = result.deployments
    assert report.verified and done.accuracy == pytest.approx(result.accuracy, abs=0.3)
    quantized = [row for row in done.layers if row.kind == "weight"]
    assert [row.name.rpartition(".")[2] for row in quantized] == ["conv1", "conv2"]  # of the one block
    assert {(row.kind, row.form) for row in done.layers} == {
        ("weight", "codebook"), ("activation", "staircase"), ("activation", "uniform"),
    }  # fmt: skip
    return load_run(folder / "run").model


def shortcut_is_float(model):
    """The sum of a block takes its input as it is, whatever the convolutions see."""
    seen = []
    body = model.get_submodule("after")
    body.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(torch.rand(1, 3, 8, 8) - 0.5)
    return seen[0].unique().numel() > 200  # 4 x 8 x 8 values, of 16 levels none


@needs("nncf")
@pytest.mark.filterwarnings("ignore")  # of NNCF and torch about each other
@pytest.mark.parametrize("per_channel", [False, True])
def test_shipped_recipe_on_nncf(per_channel, tmp_path, monkeypatch):
    model = exported("nncf", tmp_path, monkeypatch, f"compression.activations.per_channel={str(per_channel).lower()}")
    assert shortcut_is_float(model)


@needs("brevitas")
@pytest.mark.filterwarnings("ignore")  # of Brevitas and torch about each other
def test_shipped_recipe_on_brevitas(tmp_path, monkeypatch):
    assert shortcut_is_float(exported("brevitas", tmp_path, monkeypatch))


@needs("nncf")
@pytest.mark.filterwarnings("ignore")
def test_run_time_ranges_train_and_are_not_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dynamic = ("compression.params={dynamic: true, sigma_bits: 4}", "baselines=[]")
    with pytest.raises(ConfigError, match=r"daq's dynamic activations .* or leave 'export' null$"):
        small(*dynamic)
    report = train(small("export=null", *dynamic), tmp_path / "run")
    assert report.main.accuracy > 5
    loaded = load_run(tmp_path / "run")
    with pytest.raises(ExportError, match=r"daq's dynamic activations have a range per image"):
        loaded.host.freeze(loaded.model)
    from fat_plugins import summary

    assert "staircase" in str(summary(loaded.model))
