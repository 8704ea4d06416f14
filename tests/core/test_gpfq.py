"""GPFQ: the acceptance tests of its specification, the procedure over a network, and its edge cases."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

from fat_plugins import CheckpointError, ConfigError, QuantizationError, TensorSpec, get_algorithm
from fat_plugins.algorithms._gpfq import Alphabet, Pairs, follow
from fat_plugins.algorithms.gpfq import GPFQParams, GPFQPath, from_rows, make_alphabet, to_rows
from fat_plugins.forms import Codebook, SumOfGrids, UniformGrid
from fat_plugins.network import in_force
from fat_plugins.quantizer import ROLES, LayerQuantizers, Progress, conv_geometry


def make(shape=(6, 8), bits=4, params=None, axis=0, name="layer", **spec):
    spec = TensorSpec("weight", bits, name=name, shape=tuple(shape), channel_axis=axis, **spec)
    return get_algorithm("gpfq").make(spec, params or {})


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, inputs: int, seed=0) -> Tensor:
    """Inputs that share most of what they say, as those of a layer behind a ReLU do."""
    mixed = randn(rows, 4, seed=seed) @ randn(4, inputs, seed=seed + 1)
    return (mixed + 0.3 * randn(rows, inputs, seed=seed + 2)).relu()


def walk(w: Tensor, x: Tensor, xq: Tensor, d: float, alphabet: Alphabet, direct: bool, **options) -> Tensor:
    """Codes of neurons ``o x d`` on rows ``m x d``."""
    pairs = Pairs(w.double().unsqueeze(0), direct)
    pairs.add(x.unsqueeze(0), xq.unsqueeze(0))
    step = torch.tensor(d, dtype=torch.float64)
    codes = follow(pairs, lambda z, _: alphabet.codes(z, step), lambda c: alphabet.values(c, step), **options)
    return codes[0]


# --------------------------------------------------------------------------------------------------------------------
# section 11
# --------------------------------------------------------------------------------------------------------------------
def test_half_points_go_up():
    alphabet, d = Alphabet(8), torch.tensor(0.25)
    z = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]) * d
    assert alphabet.codes(z, d).tolist() == [-2, -1, 0, 1, 2, 3]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("alphabet", [Alphabet(3), Alphabet(4, gap=0.1), Alphabet(7, soft=0.05)])
def test_covariance_equals_direct(alphabet, ordered):
    # more coordinates than one block
    w, x = 0.3 * randn(5, 150), correlated(300, 150).double()
    xq = x + 0.05 * randn(300, 150, seed=9)
    order = xq.square().sum(0).argsort(descending=True).unsqueeze(0) if ordered else None
    codes = [walk(w, x, xq, 0.1, alphabet, direct, order=order) for direct in (False, True)]
    assert torch.equal(*codes)
    assert ordered != torch.equal(codes[0], walk(w, x, xq, 0.1, alphabet, False))


def reference(w: Tensor, x: Tensor, xq: Tensor, d: float, k: int) -> tuple[Tensor, Tensor]:
    """Section 3, word for word: codes of one neuron and the final u."""
    u, codes = x.new_zeros(len(x)), []
    for t in range(len(w)):
        norm = xq[:, t] @ xq[:, t]
        z = xq[:, t] @ (u + w[t] * x[:, t]) / norm if norm > 0 else norm
        q = math.copysign(min(abs(math.floor(float(z) / d + 0.5)), k), math.floor(float(z) / d + 0.5))
        u = u + w[t] * x[:, t] - q * d * xq[:, t]
        codes.append(q)
    return torch.tensor(codes, dtype=x.dtype), u


@pytest.mark.parametrize("direct", [False, True])
def test_path_and_what_is_left_of_it(direct):
    w, x = 0.3 * randn(3, 20).double(), correlated(50, 20).double()
    xq = x + 0.05 * randn(50, 20, seed=9)
    xq[:, 4] = 0
    codes = walk(w, x, xq, 0.1, Alphabet(4), direct)
    assert not codes[:, 4].any()
    for row, own in zip(codes, w, strict=True):
        wanted, u = reference(own, x, xq, 0.1, 4)
        assert torch.equal(row, wanted)
        assert torch.allclose(u, x @ own - xq @ (0.1 * row), atol=1e-12)


def test_each_step_is_the_best_of_the_alphabet():
    w, x = 0.3 * randn(1, 8).double(), correlated(40, 8).double()
    codes = walk(w, x, x, 0.1, Alphabet(3), True)[0]
    for t in range(8):
        before = x[:, : t + 1] @ w[0, : t + 1] - x[:, :t] @ (0.1 * codes[:t])
        errors = [float((before - 0.1 * p * x[:, t]).norm()) for p in range(-3, 4)]
        assert errors[int(codes[t]) + 3] == min(errors)


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_the_authors_alphabet(bits):
    k = 2 ** (bits - 1)
    quantizer = make((4, 2 ** (bits + 2)), bits, {"alphabet": "authors", "radius": 1.0})
    weight = torch.linspace(-1, 1, 2 ** (bits + 2)).expand(4, -1) * torch.tensor([[0.5], [1.0], [2.0], [2.5]])
    quantizer.calibrate(weight)
    assert float(quantizer.step) == pytest.approx(1.5 / k)  # the mean of the largest of each neuron
    codes, form = quantizer.freeze(weight)
    assert isinstance(form, Codebook) and form.bits == quantizer.bits == bits + 1
    assert form.levels.tolist() == list(range(-k, k + 1))
    values = form.decode(codes)
    assert values.unique().numel() == 2 * k + 1
    assert float(values.abs().max()) == pytest.approx(1.5)  # saturation at K d
    assert torch.equal(values, quantizer.eval()(weight))


def test_the_alphabet_of_true_bits():
    weight = randn(6, 400)
    for bits in (2, 4, 8):
        quantizer = make((6, 400), bits, {"radius": 0.8})
        quantizer.calibrate(weight)
        codes, form = quantizer.freeze(weight)
        assert isinstance(form, UniformGrid) and form.narrow and form.bits == quantizer.bits == bits
        assert codes.abs().max() == form.high == 2 ** (bits - 1) - 1
        assert float(form.scale) * form.high == pytest.approx(0.8 * float(weight.abs().amax(1).mean()), rel=1e-6)


def test_stochastic_rounding_has_the_right_mean():
    alphabet, generator = Alphabet(8), torch.Generator().manual_seed(0)
    draw = lambda z: torch.rand(z.shape, generator=generator, dtype=z.dtype)  # noqa: E731
    d = torch.tensor(0.5, dtype=torch.float64)
    z = torch.full((200_000,), 0.25 * 0.5, dtype=torch.float64)
    codes = alphabet.codes(z, d, draw)
    assert codes.unique().tolist() == [0, 1]
    assert float((codes * d).mean()) == pytest.approx(0.25 * 0.5, rel=0.02)
    assert alphabet.codes(torch.tensor([99.0, -99.0]), torch.tensor(0.5), draw).tolist() == [8, -8]


def output_error(w: Tensor, value: Tensor, x: Tensor, xq: Tensor) -> float:
    return float((x @ w.mT - xq @ value.mT).square().sum() / (x @ w.mT).square().sum())


def test_better_than_nearest_on_correlated_inputs():
    w, x = randn(16, 64).double(), correlated(400, 64).double()
    alphabet, d = Alphabet(7), torch.tensor(float(w.abs().amax(1).mean()) / 7, dtype=torch.float64)
    path = walk(w, x, x, float(d), alphabet, False) * d
    nearest = alphabet.codes(w, d) * d
    assert output_error(w, path, x, x) < 0.5 * output_error(w, nearest, x, x)


# --------------------------------------------------------------------------------------------------------------------
# sparse modes
# --------------------------------------------------------------------------------------------------------------------
def test_l0_has_a_gap():
    params = {"mode": "l0", "lambda_": 0.5, "alphabet": "authors", "radius": 1.0}
    quantizer = make((1, 2001), 3, params)
    weight = torch.linspace(-4, 4, 2001).reshape(1, -1)
    quantizer.calibrate(weight)
    d = (4 - 0.5) / 4  # C R / 2^(b-1) - l / K
    assert float(quantizer.step) == pytest.approx(d)
    codes, form = quantizer.freeze(weight)
    values = form.decode(codes)
    above = [0.5 + k * d for k in range(5)]
    assert values.unique().tolist() == pytest.approx([-v for v in reversed(above)] + [0.0] + above)
    assert torch.equal(values[0] == 0, weight[0].abs() <= 0.5)
    assert isinstance(form, SumOfGrids) and torch.equal(form.encode(values), codes)
    assert torch.equal(values, quantizer.eval()(weight))


def test_l0_of_true_bits_fits_them():
    quantizer = make((4, 600), 3, {"mode": "l0", "lambda_": 0.3})
    quantizer.calibrate(randn(4, 600))
    assert quantizer.eval()(randn(4, 600)).unique().numel() == 2**3 - 1


def test_l1_is_a_soft_threshold():
    plain, soft = Alphabet(7), Alphabet(7, soft=0.3)
    z, d = randn(1000), torch.tensor(0.1)
    shrunk = z.sign() * (z.abs() - 0.3).clamp_min(0)
    assert torch.equal(soft.codes(z, d), plain.codes(shrunk, d))


def test_a_gap_that_leaves_no_room_is_refused():
    with pytest.raises(QuantizationError, match="layer: lambda_ 5 of mode l0 is not below the outermost level"):
        make((4, 6), 4, {"mode": "l0", "lambda_": 5.0}).calibrate(randn(4, 6))


@pytest.mark.parametrize(
    ("bits", "params", "says"),
    [
        (8, {"alphabet": "authors"}, "takes 9 bits at 8 bits; allowed: 2 to 7"),
        (2, {"mode": "l0"}, "2 bits cannot hold; allowed: 3 to 8 bits"),
        (1, {}, "one bit has no level beside zero"),
        (4, {"mode": "l0", "radius": None}, "radius: null belongs to modes plain and stochastic"),
        (4, {"lambda": 0.1}, "did you mean 'lambda_'"),
    ],
)
def test_what_does_not_fit_is_refused(bits, params, says):
    with pytest.raises(ConfigError) as caught:
        make(bits=bits, params=params)
    assert says in str(caught.value) and "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# layers as matrices
# --------------------------------------------------------------------------------------------------------------------
CONVS = [
    dict(kernel=(3, 3), padding=1, groups=1),
    dict(kernel=(3, 3), stride=2, padding=1, groups=2),
    dict(kernel=(2, 3), dilation=2, groups=4),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("options", CONVS)
def test_rows_times_neurons_are_the_layer(options, transposed):
    options = dict(options)
    kernel, groups = options.pop("kernel"), options["groups"]
    shape = (8, 4 // groups, *kernel) if transposed else (4, 8 // groups, *kernel)
    spec = TensorSpec(
        "weight", 4, name="layer", shape=shape, channel_axis=int(transposed), **conv_geometry(kernel, **options)
    )
    weight, x = randn(*shape), randn(2, 8, 9, 9, seed=1)
    assert torch.equal(from_rows(to_rows(weight, spec), spec), weight)
    quantizer = get_algorithm("gpfq").make(spec, {"patches": None, "accumulate": "direct"})
    quantizer.calibrate(weight)
    quantizer.collect(weight)
    for enabled in (False, True):
        quantizer.enabled = enabled
        quantizer.observe_input(x)
    rows, _ = quantizer.collected().joined()
    layer = conv_transpose2d if transposed else conv2d
    wanted = layer(x, weight, **options).transpose(0, 1).flatten(1)  # outputs x positions
    found = (rows @ to_rows(weight, spec).double().mT).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(found.float(), wanted, atol=1e-4)


def seen(quantizer, weight: Tensor, x: Tensor, xq: Tensor) -> Pairs:
    quantizer.collect(weight)
    quantizer.enabled = False
    quantizer.observe_input(x)
    quantizer.enabled = True
    quantizer.observe_input(xq)
    return quantizer.collected()


def test_patches_are_the_authors_and_the_same_in_both_networks():
    geometry = conv_geometry((3, 3), 1, 1)
    params = {"stride": "kernel", "patches": 0.25, "accumulate": "direct"}
    quantizer = make((4, 2, 3, 3), 4, params, **geometry)
    x = torch.arange(2 * 2 * 9 * 9, dtype=torch.float32).reshape(2, 2, 9, 9)
    quantizer.calibrate(randn(4, 2, 3, 3))
    rows, read = seen(quantizer, randn(4, 2, 3, 3), x, x).joined()
    blocks = nn.functional.unfold(x, 3, padding=1, stride=3)  # 9 of them for each image
    assert rows.shape == (1, 2 * int(0.25 * 9 + 1), 18)
    assert torch.equal(rows, read)
    every = {tuple(b.tolist()) for image in blocks for b in image.T}
    assert all(tuple(row.tolist()) in every for row in rows[0])
    again = make((4, 2, 3, 3), 4, params, **geometry)
    again.calibrate(randn(4, 2, 3, 3))
    assert torch.equal(seen(again, randn(4, 2, 3, 3), x, x).joined()[0], rows)
    other = make((4, 2, 3, 3), 4, {**params, "seed": 1}, **geometry)
    other.calibrate(randn(4, 2, 3, 3))
    assert not torch.equal(seen(other, randn(4, 2, 3, 3), x, x).joined()[0], rows)


def test_groups_have_their_own_inputs_and_a_common_radius():
    geometry = conv_geometry((3, 3), 1, 1, groups=2)
    weight, x = randn(4, 3, 3, 3), correlated(2 * 36, 6).reshape(2, 6, 6, 6)
    quantizer = make((4, 3, 3, 3), 4, {"patches": None}, **geometry)
    quantizer.calibrate(weight)
    quantizer.follow(seen(quantizer, weight, x, x))
    d = float(1.16 * weight.flatten(1).abs().amax(1).mean() / 7)
    assert float(quantizer.step) == pytest.approx(d)
    for g in range(2):
        own, inputs = weight[2 * g : 2 * g + 2], x[:, 3 * g : 3 * g + 3]
        rows = nn.functional.unfold(inputs, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
        wanted = walk(own.flatten(1), rows, rows, float(quantizer.step), Alphabet(7), True)
        assert torch.equal(quantizer.codes[2 * g : 2 * g + 2].double(), wanted)
    assert 0 < quantizer.errors[0] < quantizer.errors[1]


def test_one_step_per_channel():
    weight = randn(6, 8) * torch.tensor([0.1, 1, 2, 3, 4, 5]).unsqueeze(1)
    quantizer = make((6, 8), 4, per_channel=True)
    quantizer.calibrate(weight)
    assert torch.allclose(quantizer.step, 1.16 * weight.abs().amax(1) / 7)
    x = correlated(100, 8)
    quantizer.follow(seen(quantizer, weight, x, x))
    for row, own, d in zip(quantizer.codes, weight, quantizer.step, strict=True):
        assert torch.equal(row.double(), walk(own.unsqueeze(0), x.double(), x.double(), float(d), Alphabet(7), True)[0])


def test_pruned_weights_stay_zero():
    weight, x = randn(6, 8), correlated(100, 8)
    weight[:, ::3] = 0
    quantizer = make((6, 8), 4, keep_zeros=True)
    quantizer.calibrate(weight)
    quantizer.follow(seen(quantizer, weight, x, x + 0.3 * randn(100, 8, seed=5)))
    assert not quantizer.codes[:, ::3].any() and quantizer.codes.any()


def test_the_radius_of_the_least_error():
    weight = randn(6, 4000)
    errors = {}
    for radius in (None, 0.5, 1.0, 1.16):
        quantizer = make((6, 4000), 2, {"radius": radius})
        quantizer.calibrate(weight)
        errors[radius] = float((quantizer.eval()(weight) - weight).square().sum())
    assert errors[None] == min(errors.values())


def test_a_weight_of_zeros_stays_zero():
    for params in ({}, {"mode": "l0"}, {"radius": None}):
        quantizer = make((6, 8), 4, params)
        quantizer.calibrate(torch.zeros(6, 8))
        quantizer.follow(seen(quantizer, torch.zeros(6, 8), randn(10, 8), randn(10, 8)))
        assert not quantizer.eval()(torch.zeros(6, 8)).any()


def test_inputs_that_are_not_finite_are_refused():
    quantizer, x = make(), randn(10, 8)
    quantizer.calibrate(randn(6, 8))
    x[0, 0] = float("nan")
    for bad in (x, x.nan_to_num(posinf=None, nan=float("inf"))):
        with pytest.raises(QuantizationError, match="layer: its input holds NaN or infinite values"):
            quantizer.follow(seen(quantizer, randn(6, 8), bad, bad))


def test_inputs_of_another_layer_are_refused():
    quantizer = make()
    quantizer.calibrate(randn(6, 8))
    with pytest.raises(QuantizationError, match="expected 8 channels"):
        seen(quantizer, randn(6, 8), randn(10, 7), randn(10, 7))
    quantizer.enabled = True
    quantizer.collect(randn(6, 8))
    with pytest.raises(QuantizationError, match="no input of the float network"):
        quantizer.observe_input(randn(10, 8))


# --------------------------------------------------------------------------------------------------------------------
# a whole network, with a host of a few lines
# --------------------------------------------------------------------------------------------------------------------
class Layer(nn.Module):
    """A layer between its quantizers."""

    def __init__(self, layer: nn.Module, name: str, params: dict, activation: bool = True, algorithm="gpfq") -> None:
        super().__init__()
        self.layer, self.name = layer, name
        weight = layer.weight
        geometry = {}
        if isinstance(layer, nn.Conv2d):
            geometry = conv_geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        spec = TensorSpec("weight", 4, name=name, shape=tuple(weight.shape), **geometry)
        self.weight_quantizer = get_algorithm(algorithm).make(spec, params if algorithm == "gpfq" else {})
        self.weight_quantizer.calibrate(weight)
        self.input_quantizer = None
        if activation:
            self.input_quantizer = get_algorithm("gpfq").make(TensorSpec("activation", 3, name=name), params)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        if self.weight_quantizer.wants_input:
            self.weight_quantizer.observe_input(x)
        weight = self.weight_quantizer(self.layer.weight)
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, self.layer.bias)
        return nn.functional.linear(x, weight, self.layer.bias)

    def seen(self) -> LayerQuantizers:
        parameters = dict(self.layer.named_parameters())
        return LayerQuantizers(self.name, self.weight_quantizer, self.input_quantizer, parameters)


class Net(nn.Module):
    def __init__(self, params=None, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        params = {"samples": 64, "patches": None, **(params or {})}
        self.first = Layer(nn.Conv2d(2, 6, 3, padding=1), "first", params, **options)
        self.left = Layer(nn.Conv2d(6, 6, 3, padding=1, groups=2), "left", params, **options)
        self.right = Layer(nn.Conv2d(6, 6, 1), "right", params, **options)
        self.last = Layer(nn.Linear(6, 4), "last", params, **options)
        self.layers = [self.first, self.left, self.right, self.last]
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last((self.left(x) + self.right(x)).relu().mean((2, 3)))

    def calibrate(self, x: Tensor) -> None:
        for layer in self.layers:
            layer.weight_quantizer.enabled = False
        hooks = [
            layer.register_forward_pre_hook(lambda m, args: m.input_quantizer.calibrate(args[0]))
            for layer in self.layers
            if layer.input_quantizer is not None
        ]
        self(x)
        for hook in hooks:
            hook.remove()
        for layer in self.layers:
            layer.weight_quantizer.enabled = True

    def path(self, batches: list[Tensor]) -> GPFQPath:
        def run(samples: int, turns=(ROLES,)) -> None:
            assert samples == 64
            with torch.no_grad():
                for x in batches:
                    for roles in turns:
                        with in_force(self, roles):
                            self(x)

        coordinator = get_algorithm("gpfq").make_coordinator([layer.seen() for layer in self.layers])
        coordinator.set_calibration(run)
        return coordinator


DATA = [correlated(32 * 16, 2, seed=s).reshape(32, 4, 4, 2).permute(0, 3, 1, 2) for s in (1, 2)]


def float_inputs(net: Net, batches: list[Tensor]) -> dict[str, Tensor]:
    return inputs(net, batches, ())


def inputs(net: Net, batches: list[Tensor], roles) -> dict[str, Tensor]:
    """What the layers read behind their activation quantizers: rows x inputs."""
    found: dict[str, list[Tensor]] = {}
    for layer in net.layers:
        quantizer = layer.weight_quantizer
        quantizer.collect(layer.layer.weight)
        quantizer._pairs.direct, quantizer._pairs.rows = True, []
    try:
        with torch.no_grad(), in_force(net, roles):
            for x in batches:
                net(x)
        for layer in net.layers:
            found[layer.name] = torch.cat([rows for rows, _ in layer.weight_quantizer._waiting], 1)
    finally:
        for layer in net.layers:
            layer.weight_quantizer.collected()
    return found


@pytest.mark.parametrize("quantized", [True, False])
def test_layer_by_layer_in_order(quantized):
    """Every layer solves its problem between the float network and what stands before it."""
    net = Net({"use_quantized_activations": quantized, "accumulate": "direct"})
    net.calibrate(DATA[0])
    weights = {layer.name: layer.layer.weight.detach().clone() for layer in net.layers}
    wanted = {}
    hook_order = []
    for layer in net.layers:
        original = layer.weight_quantizer.follow

        def follow_and_keep(pairs, layer=layer, original=original):
            hook_order.append(layer.name)
            wanted[layer.name] = pairs.joined()
            return original(pairs)

        layer.weight_quantizer.follow = follow_and_keep
    before = copy.deepcopy(net)
    net.path(DATA).begin()
    assert hook_order == ["first", "left", "right", "last"]
    # the float side: what the untouched network reads
    exact = float_inputs(before, DATA)
    for name, (x, _) in wanted.items():
        assert torch.allclose(x.float(), exact[name], atol=1e-5), name
    # the quantized side of the last layer: everything before it is quantized
    last = wanted["last"][1]
    h = []
    with torch.no_grad(), in_force(net, ROLES if quantized else ("weight",)):
        for x in DATA:
            y = net.first(x).relu()
            z = (net.left(y) + net.right(y)).relu().mean((2, 3))
            h.append(net.last.input_quantizer(z))
    assert torch.allclose(last[0].float(), torch.cat(h), atol=1e-6)
    assert not torch.allclose(wanted["last"][0], last, atol=1e-3)
    for layer in net.layers:  # and hosts may put the codes into their parameters
        assert layer.weight_quantizer.owns_weight and torch.equal(layer.layer.weight, weights[layer.name])
        layer.weight_quantizer.fold_into(layer.layer.weight)
        assert torch.equal(layer.layer.weight, layer.weight_quantizer(layer.layer.weight))
        assert not torch.equal(layer.layer.weight, weights[layer.name])
        assert not layer.layer.weight.requires_grad
        assert layer.weight_quantizer.enabled and layer.input_quantizer.enabled


def test_the_network_is_nearer_to_the_float_one_than_by_rounding():
    net = Net(activation=False)
    reference, rounded = Net(activation=False), Net(activation=False)
    for layer in reference.layers:
        layer.weight_quantizer.enabled = False
    net.path(DATA).begin()
    x = torch.cat(DATA)
    with torch.no_grad():
        wanted = reference(x)
        by_path, nearest = (float((n(x) - wanted).square().mean()) for n in (net, rounded))
    assert by_path < 0.5 * nearest
    for layer in net.layers:
        assert layer.weight_quantizer.errors[0] < layer.weight_quantizer.errors[1]
    numbers = net.first.weight_quantizer.monitor(net.first.layer.weight)
    assert numbers["output error"] < numbers["output error, nearest"]


def test_codes_are_final_and_the_rest_may_train():
    net = Net()
    net.calibrate(DATA[0])
    path = net.path(DATA)
    path.begin()
    codes = [layer.weight_quantizer.codes.clone() for layer in net.layers]
    for layer in net.layers:
        layer.weight_quantizer.fold_into(layer.layer.weight)
    path.set_calibration(None)  # would warn, if anything were left to do
    path.on_progress(Progress(epoch=1))
    net.train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    bias = net.last.layer.bias.detach().clone()
    for _ in range(2):
        net(DATA[0]).square().mean().backward()
        optimizer.step()
    assert not torch.equal(net.last.layer.bias, bias)
    for layer, before in zip(net.layers, codes, strict=True):
        layer.weight_quantizer.calibrate(randn(*layer.weight_quantizer.spec.shape))
        assert torch.equal(layer.weight_quantizer.codes, before)


def test_begin_waits_for_data():
    net = Net()
    net.calibrate(DATA[0])
    path = net.path(DATA)
    run, before = path._calibration, net.first.layer.weight.detach().clone()
    path.set_calibration(None)
    with pytest.warns(UserWarning, match="no calibration data reached it"):
        path.begin()
    path.on_progress(Progress())  # says so once
    assert path.monitor() == {"layers ahead": 4.0} and path.figures() == []
    assert torch.equal(net.first.layer.weight, before)
    path.set_calibration(run)
    path.on_progress(Progress())
    assert path.monitor() == {"layers ahead": 0.0}
    assert [len(f.series) for f in path.figures()] == [2]


def test_an_error_on_the_way_leaves_everything_as_it_was():
    net = Net({"bias_correction": "all"})
    net.calibrate(DATA[0])
    path = net.path(DATA)
    state = {k: v.clone() for k, v in net.state_dict().items() if "layer." in k}
    original = net.last.weight_quantizer.follow
    net.last.weight_quantizer.follow = lambda pairs: original(pairs) / 0 * (1 / 0)
    with pytest.raises(ZeroDivisionError):
        path.begin()
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items())
    assert path.monitor() == {"layers ahead": 4.0}
    net.last.weight_quantizer.follow = original
    path.begin()
    assert path.monitor() == {"layers ahead": 0.0}


@pytest.mark.parametrize("rule", ["none", "last", "all"])
def test_bias_correction(rule):
    net = Net({"bias_correction": rule}, activation=False)
    before = {layer.name: layer.layer.bias.detach().clone() for layer in net.layers}
    lost = {}
    for layer in net.layers:
        original = layer.weight_quantizer.follow

        def kept(pairs, name=layer.name, original=original):
            lost[name] = original(pairs)
            return lost[name]

        layer.weight_quantizer.follow = kept
    net.path(DATA).begin()
    changed = [layer.name for layer in net.layers if not torch.equal(layer.layer.bias, before[layer.name])]
    assert changed == {"none": [], "last": ["last"], "all": ["first", "left", "right", "last"]}[rule]
    if rule == "last":
        assert torch.allclose(net.last.layer.bias - before["last"], lost["last"].float(), atol=1e-6)
        # the mean output is now that of the float network
        x = torch.cat(DATA)
        reference = Net(activation=False)
        with torch.no_grad(), in_force(reference, ()):
            wanted = reference(x).mean(0)
        assert torch.allclose(net(x).mean(0), wanted, atol=1e-5)


def test_bias_correction_says_when_there_is_none():
    net = Net({"bias_correction": "last"}, activation=False)
    net.last.layer.bias = None
    with pytest.warns(UserWarning, match="last: bias_correction 'last': the layer has no bias"):
        net.path(DATA).begin()


def test_a_layer_that_nobody_runs_is_rounded():
    net = Net(activation=False)
    spare = Layer(nn.Linear(3, 3), "spare", {"samples": 64}, activation=False)
    wanted = spare.weight_quantizer.eval()(spare.layer.weight).detach()
    net.layers.append(spare)
    with pytest.warns(UserWarning, match="spare: its input was not seen"):
        net.path(DATA).begin()
    assert spare.weight_quantizer.owns_weight and torch.equal(spare.weight_quantizer(torch.zeros(3, 3)), wanted)


def test_layers_of_other_algorithms_are_left_alone():
    net = Net(activation=False)
    net.right = Layer(nn.Conv2d(6, 6, 1), "right", {}, activation=False, algorithm="minmax").eval()
    net.layers[2] = net.right
    before = net.right.layer.weight.detach().clone()
    net.path(DATA).begin()
    assert torch.equal(net.right.layer.weight, before)
    assert net.last.weight_quantizer.owns_weight


def test_a_disabled_layer_is_left_float():
    net = Net(activation=False)
    net.left.weight_quantizer.enabled = False
    before = net.left.layer.weight.detach().clone()
    net.path(DATA).begin()
    assert not net.left.weight_quantizer.owns_weight
    assert torch.equal(net.left.layer.weight, before)


def test_a_layer_that_is_used_twice():
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.right(self.right(self.first(x).relu()).relu())
            return self.last((self.left(x) + x).relu().mean((2, 3)))

    net = Twice(activation=False)
    net.path(DATA).begin()
    assert net.right.weight_quantizer.owns_weight
    assert net.right.weight_quantizer.errors[0] < net.right.weight_quantizer.errors[1]


@pytest.mark.parametrize("params", [{}, {"mode": "stochastic"}, {"act_order": True}, {"accumulate": "direct"}])
def test_the_same_again(params):
    nets = [Net(params, activation=False) for _ in range(2)]
    for net in nets:
        net.path(DATA).begin()
    assert all(torch.equal(a, b) for a, b in zip(*(n.state_dict().values() for n in nets), strict=True))
    plain = Net(activation=False)
    plain.path(DATA).begin()
    differs = not torch.equal(plain.left.weight_quantizer.codes, nets[0].left.weight_quantizer.codes)
    assert differs == (params not in ({}, {"accumulate": "direct"}))


# --------------------------------------------------------------------------------------------------------------------
# state
# --------------------------------------------------------------------------------------------------------------------
def test_the_state_is_complete():
    net = Net()
    net.calibrate(DATA[0])
    net.path(DATA).begin()
    fresh = Net()
    fresh.load_state_dict(net.state_dict())
    assert all(layer.weight_quantizer.owns_weight for layer in fresh.layers)
    assert torch.equal(fresh(DATA[1]), net(DATA[1]))
    twin = copy.deepcopy(net)
    assert torch.equal(twin(DATA[1]), net(DATA[1]))
    state = {k: v for k, v in net.state_dict().items() if k.startswith("first")}
    state["first.weight_quantizer.status"] = torch.tensor([9, 1, 1])
    with pytest.raises(CheckpointError, match="layout 9 is newer"):
        fresh.load_state_dict(state, strict=False)


def test_calibration_begins_anew_when_it_is_forgotten():
    quantizer, x = make(), correlated(50, 8)
    quantizer.calibrate(randn(6, 8))
    quantizer.calibrate(2 * randn(6, 8))  # another mask, say: nothing is final
    step = float(quantizer.step)
    quantizer.follow(seen(quantizer, 2 * randn(6, 8), x, x))
    quantizer.reset_calibration()
    assert not quantizer.owns_weight
    quantizer.calibrate(randn(6, 8))
    assert step == pytest.approx(2 * float(quantizer.step))


def test_alphabets_by_bits():
    found = {
        (mode, alphabet): make_alphabet(4, GPFQParams(mode=mode, alphabet=alphabet)).highest
        for mode in ("plain", "l0")
        for alphabet in ("bits", "authors")
    }
    assert found == {("plain", "bits"): 7, ("plain", "authors"): 8, ("l0", "bits"): 7, ("l0", "authors"): 9}
