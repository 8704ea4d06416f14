"""Verification: an honest IR passes, a tampered one is caught and the first wrong layer is named."""

import io
import json
import warnings

import pytest
import torch
from frozen_nets import Net, Single, activation_grid, build, powers, staircase
from rich.console import Console
from torch import nn

from fat_plugins import ExportError
from fat_plugins.forms import UniformGrid
from fat_plugins.frozen import FrozenActivation

openvino = pytest.importorskip("openvino")

from fat_plugins.export import _ov, verify as verify_module  # noqa: E402, I001
from fat_plugins.export.openvino import export  # noqa: E402
from fat_plugins.export.verify import verify  # noqa: E402


def write(model, path, x, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(this OpenVINO writes no|in float).*")
        return export(model, path, x, **options)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A 4-bit net and its IR; tests must not change them."""
    model, path = build(Net, 4), tmp_path_factory.mktemp("ir") / "net.xml"
    write(model, path, torch.randn(2, 3, 16, 16))
    return model, path


def tampered(path, target, change):
    """A copy of an IR in which ``change(model, nodes by name)`` was applied."""
    model = openvino.Core().read_model(str(path))
    change({n.get_friendly_name(): n for n in model.get_ops()})
    openvino.save_model(model, str(target), compress_to_fp16=False)
    return target


def multiply_constant(node, index, factor):
    """Replace a constant input by ``factor`` times itself."""
    value = node.input_value(index).get_node().data * factor
    node.input(index).replace_source_output(_ov.opset().constant(value.astype("float32")).output(0))


def test_an_honest_export_is_equal(exported):
    model, path = exported
    report = verify(model, path, torch.randn(6, 3, 16, 16))
    assert report.ok, report.detail
    assert report.first_difference is None
    assert report.samples == 6
    assert [w.name for w in report.weights] == [
        "stem", "block.full", "block.depthwise", "block.point", "block.grouped", "head"
    ]  # fmt: skip
    assert sum(w.elements for w in report.weights) == sum(
        m.codes.numel() for m in model.modules() if hasattr(m, "codes")
    )
    assert [a.name for a in report.activations][:2] == ["stem.input", "block.full.input"]
    assert report.activations[0].elements == 6 * 3 * 16 * 16
    # the input of block.point is the sum of two layers
    assert report.activations[3].layers == ["block.depthwise", "block.full"]
    assert report.outputs[0].layers == ["head"]
    assert max(a.max_error for a in report.activations) < 1e-2
    assert json.loads(report.to_json())["ok"] is True


def test_table(exported):
    model, path = exported
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(verify(model, path, torch.randn(1, 3, 16, 16)).to_table())
    text = console.export_text()
    assert "1 samples: equal" in text
    rows = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert rows[:3] == ["stem.input", "stem", "block.full.input"]  # execution order
    assert rows[-1] == "output0"


def test_slices_give_the_same_counts(exported, monkeypatch):
    model, path = exported
    x = torch.randn(5, 3, 16, 16)
    whole = verify(model, path, x)
    monkeypatch.setattr(verify_module, "_BUDGET", 50000)  # two samples or so at once
    parts = verify(model, path, x)
    assert parts.ok
    assert [a.elements for a in parts.activations] == [a.elements for a in whole.activations]


def test_one_flipped_weight_nibble(exported, tmp_path):
    model, path = exported
    codes = model.depthwise.quantize_weight.codes
    target = tmp_path / "bad.xml"
    data = bytearray(path.with_suffix(".bin").read_bytes())
    from fat_plugins.export.packing import pack

    packed = pack(codes.numpy(), "i4").tobytes()
    at = data.find(packed)
    assert at >= 0
    data[at + 5] ^= 0x01
    target.write_bytes(path.read_bytes())
    target.with_suffix(".bin").write_bytes(data)
    report = verify(model, target, torch.randn(4, 3, 16, 16))
    assert not report.ok
    assert report.first_difference == "block.depthwise"
    assert report.detail == f"1 of {codes.numel()} weight codes differ"
    assert [w.differences for w in report.weights] == [0, 0, 1, 0, 0, 0]
    assert "first difference: block.depthwise" in report.to_table().title


@pytest.mark.parametrize(("layer", "seen_at"), [("block.point", "block.grouped.input"), ("head", "output0")])
def test_a_wrong_weight_scale_is_traced_to_its_layer(exported, tmp_path, layer, seen_at):
    model, path = exported
    target = tampered(path, tmp_path / "bad.xml", lambda n: multiply_constant(n[f"weight:{layer}"], 1, 1.01))
    report = verify(model, target, torch.randn(4, 3, 16, 16))
    assert report.first_difference == layer
    assert seen_at in report.detail
    # fed with torch's tensors, no other layer differs
    assert all(a.input_differences == 0 for a in report.activations if a.name != seen_at)


def test_a_wrong_activation_scale_names_the_quantizer(exported, tmp_path):
    model, path = exported

    def change(nodes):
        for i in (1, 2, 3, 4):
            multiply_constant(nodes["quantize:block.point.input"], i, 1.002)

    report = verify(model, tampered(path, tmp_path / "bad.xml", change), torch.randn(4, 3, 16, 16))
    assert report.first_difference == "block.point.input"
    assert "leave the quantizer" in report.detail


def test_a_missing_clamp_is_caught(exported, tmp_path):
    model, path = exported

    def change(nodes):
        clamp = nodes["quantize:block.full.input|clamp"]
        for reader in list(clamp.output(0).get_target_inputs()):
            reader.replace_source_output(clamp.input_value(0))

    report = verify(model, tampered(path, tmp_path / "bad.xml", change), torch.randn(4, 3, 16, 16) * 3)
    assert report.first_difference == "block.full.input"


def test_a_wrong_bias_is_caught(exported, tmp_path):
    model, path = exported

    def change(nodes):
        add = next(iter(nodes["block.grouped"].output(0).get_target_inputs())).get_node()
        multiply_constant(add, 1, -1)

    report = verify(model, tampered(path, tmp_path / "bad.xml", change), torch.randn(2, 3, 16, 16))
    assert report.first_difference == "block.grouped"


class Identity(nn.Module):
    """A quantizer, an operation, a quantizer."""

    def __init__(self, form):
        super().__init__()
        self.first, self.second = FrozenActivation(form, "first"), FrozenActivation(form, "second")

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def test_ties_are_counted_apart_and_do_not_spread(tmp_path):
    """Inputs within an ulp of a threshold, where FakeQuantize and torch may disagree."""
    scale = 0.1
    model = build(Identity, UniformGrid(4, True, True, torch.tensor([scale]), 1))
    exact = (torch.arange(-7, 7) + 0.5) * scale
    x = torch.cat([torch.nextafter(exact, torch.tensor(t)) for t in (-9.0, 9.0)] + [exact]).reshape(1, -1)
    write(model, tmp_path / "m.xml", x)
    report = verify(model, tmp_path / "m.xml", x)
    assert report.ok, report.detail
    assert report.activations[0].ties > 0
    assert report.activations[0].differences == 0
    # the second quantizer was fed with torch's codes: nothing cascades into it
    assert report.activations[1].ties + report.activations[1].input_ties == 0
    assert report.activations[1].end_to_end > 0
    # without a guard the same ties are differences
    assert verify(model, tmp_path / "m.xml", x, tie_guard=0.0).first_difference == "first"


def test_staircases_and_8_bit_inputs(tmp_path):
    model = build(Single, "layer", 8, 8, activation=staircase(3, powers(7, False), shift=0.1), relu=False)
    x = torch.rand(3, 8, 8, 8) * 3
    write(model, tmp_path / "m.xml", x)
    assert verify(model, tmp_path / "m.xml", x).ok

    def change(nodes):
        multiply_constant(nodes["quantize:layer.input|above3"], 1, 1.05)

    report = verify(model, tampered(tmp_path / "m.xml", tmp_path / "bad.xml", change), x)
    assert report.first_difference == "layer.input"


def test_another_model_is_refused(exported):
    _, path = exported
    with pytest.raises(ExportError, match=r"layer\.input: this activation is not in the IR"):
        verify(build(Single, "layer", 3, 3), path, torch.rand(1, 3, 8, 8))
    with pytest.raises(ExportError, match=r"block\.full\.input: 3 bits in torch, 4 in the IR"):
        verify(build(Net, 3), path, torch.rand(1, 3, 16, 16))
    retrained = build(Net, 4, seed=1)
    report = verify(retrained, path, torch.rand(1, 3, 16, 16))
    assert report.first_difference == "stem"


def test_bad_inputs(exported, tmp_path):
    model, path = exported
    with pytest.raises(ExportError, match="no such file"):
        verify(model, tmp_path / "none.xml", torch.rand(1, 3, 16, 16))
    with pytest.raises(ExportError, match="refuses the inputs"):
        verify(model, path, torch.rand(1, 5, 16, 16))
    fixed = build(Single, "layer", 3, 4, activation=activation_grid(4))
    write(fixed, tmp_path / "fixed.xml", torch.rand(2, 3, 8, 8), dynamic_batch=False)
    with pytest.raises(ExportError, match="fixed batch of 2; 3 samples"):
        verify(fixed, tmp_path / "fixed.xml", torch.rand(3, 3, 8, 8))
    assert verify(fixed, tmp_path / "fixed.xml", torch.rand(4, 3, 8, 8)).ok
