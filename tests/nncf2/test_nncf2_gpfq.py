"""GPFQ on NNCF 2: post-training, so that the model that comes back is finished."""

import json
from copy import deepcopy

import fat_nncf
import gpfq_hosts
import pytest
import torch
from gpfq_hosts import section
from legacy_models import (
    INPUT_SHAPE,
    Branches,
    Zoo,
    batch,
    build_net,
    compress,
    evaluate,
    optimizer,
    random_loader,
    train_step,
)

from fat_plugins.network import coordinators

NO_NORMS = {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}}


def made(net, **changes):
    """Controller, model, the problems that were solved and the batches of the calibration."""
    data = random_loader(INPUT_SHAPE)
    with gpfq_hosts.recorded() as problems:
        ctrl, model = compress(
            section(**{**NO_NORMS, **changes, "params": {"samples": 2 * INPUT_SHAPE[0], **changes.get("params", {})}}),
            deepcopy(net), data=data,
        )  # fmt: skip
    return ctrl, model, problems, [x for x, _ in data]


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("net", [Zoo, Branches])
def test_every_layer_solves_its_problem(net, quantized):
    net = net().eval()
    _, model, problems, data = made(net, first_layer="same", params={"use_quantized_activations": quantized})
    gpfq_hosts.check(net, model.eval(), problems, data, quantized=quantized, repeated=("shared",))
    gpfq_hosts.check_parameters(model)


def test_batch_norms_adapt_to_the_finished_network():
    net = build_net().eval()
    norm = next(m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = norm.running_mean.clone()
    means = []
    for samples in (0, 16):
        adaptation = {"batchnorm_adaptation": {"num_bn_adaptation_samples": samples}}
        _, model, problems, data = made(net, initializer=adaptation)
        norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
        means.append(norm.running_mean.clone())
        exact = gpfq_hosts.float_rows(net, {name: q for name, (q, _) in problems.items()}, data)
        for name, rows in exact.items():  # the path saw the norms of the float network
            assert torch.allclose(problems[name][1].joined()[0].float(), rows, atol=1e-5)
    assert torch.equal(means[0], before) and not torch.equal(means[1], before)


def test_saved_rebuilt_and_trained_on():
    ctrl, model, problems, _ = made(build_net())
    state = json.loads(json.dumps(ctrl.get_compression_state()))
    with gpfq_hosts.recorded() as again:
        other, fresh = compress(section(**NO_NORMS), compression_state=state)
        fresh.load_state_dict(model.state_dict())
        other.scheduler.epoch_step()
    assert problems and not again  # nothing is quantized twice
    assert torch.equal(evaluate(fresh), evaluate(model))
    codes = {name: q.signed_codes().clone() for name, (q, _) in problems.items()}
    before, opt = evaluate(model), optimizer(model)
    ctrl.scheduler.epoch_step()
    for _ in range(2):
        train_step(model.train(), ctrl, opt)
    assert not torch.equal(evaluate(model), before)
    assert all(torch.equal(q.signed_codes(), codes[name]) for name, (q, _) in problems.items())
    ctrl.init_range()  # ranges anew; the codes stay
    assert all(torch.equal(q.signed_codes(), codes[name]) for name, (q, _) in problems.items())


@pytest.mark.filterwarnings("ignore:.*sum of 2 grids:UserWarning")
@pytest.mark.parametrize("params", [{}, {"alphabet": "authors"}, {"mode": "l0", "lambda_": 0.02}], ids=str)
def test_codes_are_deployed(params, tmp_path):
    pytest.importorskip("openvino")
    _, model, _, _ = made(Zoo(), params=params)
    torch.testing.assert_close(fat_nncf.freeze(model)(batch()), evaluate(model))
    fat_nncf.export_openvino(model, tmp_path / "m.xml", batch())
    report = fat_nncf.verify_openvino(model, tmp_path / "m.xml", batch())
    assert report.ok and not any(c.differences for c in [*report.weights, *report.activations])


@pytest.mark.filterwarnings("ignore:.*pass their input unchanged:UserWarning")
def test_without_data_it_says_so():
    ctrl, model = compress(section(), data=False)
    with pytest.warns(UserWarning, match="gpfq: no calibration data reached it"):
        ctrl.scheduler.epoch_step()
    (path,) = coordinators(model)
    assert not any(layer.weight.owns_weight for layer in path.layers)
