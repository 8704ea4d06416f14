"""Bit widths that layers learn, from training to the file, on whichever NNCF is installed."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

pytest.importorskip("openvino")
pytest.importorskip("nncf")

import crossgen
import fat_nncf
from fat_nncf.export import export_openvino, verify_openvino
from test_nncf_export import Residual

from fat_plugins import named_quantizers, reestimate_batch_norms
from fat_plugins.export.openvino import kernels

WANTED = {"conv1": 3, "conv2": 2, "hidden": 4}
#: logits of the gates of levels 2, 3 and 4 that stand for these widths
GATES = {3: [3.0, 3.0, -3.0], 2: [3.0, -3.0, 3.0], 4: [3.0, 3.0, 3.0]}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory, monkeypatch):
    """NNCF 2 writes drawings of its graphs into the current folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


def compress(algorithm: str, params: dict, state: dict | None = None):
    torch.manual_seed(0)
    section = {"algorithm": algorithm, "weights": {"bits": 4}, "activations": {"bits": 4}, "params": params}
    config = {"input_info": {"sample_size": list(crossgen.INPUT_SHAPE)}, "compression": section}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NNCF's own deprecation notes
        config = fat_nncf.register_default_init_args(fat_nncf.NNCFConfig.from_dict(config), crossgen.loader())
        return fat_nncf.create_compressed_model(Residual(), config, compression_state=state)


def gated(model) -> dict:
    """Weight quantizers whose width is learned, by layer; whatever names a host gives to them."""
    found = {q.spec.name: q for _, q in named_quantizers(model) if getattr(q, "phi", None) is not None}
    return {layer: next(q for name, q in found.items() if layer in name) for layer in WANTED}


def train(controller, model, epochs: int) -> list[float]:
    optimizer = torch.optim.SGD(fat_nncf.param_groups(model, 0.01), lr=0.01)
    losses = []
    for _ in range(epochs):
        controller.scheduler.epoch_step()
        for _ in range(2):
            controller.scheduler.step()
            model.train()
            out = model(crossgen.batch())
            loss = torch.nn.functional.cross_entropy(out, torch.arange(len(out)) % 5) + controller.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def reported_bits(controller, model) -> list[int]:
    """Sorted weight widths of the inner layers, as the host's statistics give them."""
    if fat_nncf.GENERATION == 3:
        tensors = controller.statistics().tensors
        return sorted(t.bits for t in tensors if t.role == "weight" and t.algorithm == "dropbits")
    collected = controller.statistics().quantization
    counts = collected.num_wq_per_bitwidth  # the plain edge layers have 8
    return sorted(bits for bits, count in counts.items() for _ in range(count) if bits != 8)


def written(report) -> dict[str, int]:
    return {r.name.split(".")[-1]: r.bits for r in report.layers if r.kind == "weight"}


def test_learned_widths_reach_statistics_and_file(tmp_path):
    controller, model = compress("dropbits", {"mask": "hierarchical", "learn_epochs": 1, "bit_penalty": 0.1})
    assert float(controller.loss().detach()) > 0.5  # three layers with three gates of 0.9
    train(controller, model, 1)
    assert reported_bits(controller, model) == [4, 4, 4]
    for layer, quantizer in gated(model).items():
        with torch.no_grad():
            quantizer.phi.copy_(torch.tensor(GATES[WANTED[layer]]))
    train(controller, model, 1)  # its first announcement decides, then the widths are fine-tuned
    assert {layer: q.bits for layer, q in gated(model).items()} == WANTED
    assert float(controller.loss()) == 0
    assert reported_bits(controller, model) == [2, 3, 4]

    # a checkpoint holds the decision
    state = json.loads(json.dumps(controller.get_compression_state()))
    again_controller, again = compress("dropbits", {"mask": "hierarchical", "learn_epochs": 1}, state)
    again_controller.load_state(state)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(crossgen.batch()), model.eval()(crossgen.batch()))
    assert {layer: q.bits for layer, q in gated(again).items()} == WANTED

    assert reestimate_batch_norms(model, crossgen.loader()) == 3
    report = export_openvino(model, tmp_path / "m.xml", crossgen.batch())
    assert written(report) == {"stem": 8, **WANTED, "fc": 8}
    assert {k.speed for k in kernels(tmp_path / "m.xml")} == {"int8"}
    result = verify_openvino(model, tmp_path / "m.xml", torch.randn(8, 3, 12, 12))
    assert result.ok, result.detail


@pytest.mark.parametrize("params", [{}, {"straight_through": True}])
def test_the_base_method(params, tmp_path):
    controller, model = compress("rq", params)
    train(controller, model, 1)
    assert reestimate_batch_norms(model, crossgen.loader()) == 3
    report = export_openvino(model, tmp_path / "m.xml", crossgen.batch())
    assert set(written(report).values()) == {4, 8}
    result = verify_openvino(model, tmp_path / "m.xml", torch.randn(8, 3, 12, 12))
    assert result.ok, result.detail


def test_noise_is_the_same_after_a_restart():
    """Masks and noise follow from the scheduler's counters; nothing else has to be restored."""
    for algorithm, params in (("dropbits", {"keep_probability": 0.5}), ("rq", {})):
        controller, model = compress(algorithm, params)
        train(controller, model, 1)
        state = json.loads(json.dumps(controller.get_compression_state()))
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        other_controller, other = compress(algorithm, params, state)
        other_controller.load_state(state)
        other.load_state_dict(weights)
        torch.manual_seed(123)
        first = train(other_controller, other, 1)
        torch.manual_seed(321)
        assert train(controller, model, 1) == first
