"""The JSON config: what is accepted, and the one-line errors of what is not."""

import json
import os
import subprocess
import sys

import fat_nncf
import jsonschema
import pytest
import torch
from fat_nncf import versions
from legacy_models import BITS4, bits, build_net, compress, fat, make_config
from nncf import NNCFConfig
from nncf.torch import create_compressed_model, register_default_init_args
from nncf.torch.algo_selector import PT_COMPRESSION_ALGORITHMS

from fat_plugins import algorithms
from fat_plugins.errors import ConfigError, HostError


def validate(compression, **top):
    return NNCFConfig.from_dict({"input_info": {"sample_size": [1, 3, 8, 8]}, "compression": compression, **top})


def test_public_names_are_nncfs_own():
    assert fat_nncf.GENERATION == 2
    assert fat_nncf.NNCFConfig is NNCFConfig
    assert fat_nncf.create_compressed_model.__wrapped__ is create_compressed_model
    assert fat_nncf.register_default_init_args is register_default_init_args


def test_every_algorithm_is_registered_once():
    from fat_nncf.legacy import register

    register()
    for name in algorithms():
        assert PT_COMPRESSION_ALGORITHMS.get(name).__doc__ == algorithms()[name].title
        widths = (algorithms()[name].weight_bits, algorithms()[name].activation_bits)
        weights, activations = ({"bits": min(4, high)} for _, high in widths)
        section = {"algorithm": name, "weights": weights, "activations": activations}
        validate(section)
        validate([{"algorithm": "magnitude_sparsity"}, section])


def test_from_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"input_info": {"sample_size": [1, 3, 8, 8]}, "compression": fat()}))
    assert NNCFConfig.from_json(str(path))["compression"]["weights"] == {"bits": 4}


@pytest.mark.parametrize(
    "section, message",
    [
        ({"algorithm": "fatt"}, r"compression.algorithm: unknown algorithm 'fatt'.*did you mean 'fat'"),
        (fat(weigths={}), r"compression.weigths: unknown key.*did you mean 'weights'"),
        (fat(weights={"bit": 4}), r"compression.weights.bit: unknown key.*did you mean 'bits'"),
        (fat(weights={"bits": 0}), r"compression.weights.*0-bit.*allowed: 2 to 8"),
        (fat(weights={"bits": 1}), r"no 1-bit weights.*FAT has no 1-bit form"),
        (fat(weights={"bits": 9}), r"no 9-bit weights"),
        (fat(weights={"bits": "4"}), r"compression.weights.bits: .*'4'"),
        (fat(weights={"per_channel": True, "bits": 4}), r"per_channel must be false"),
        (fat(params={"levells": "uniform"}), r"compression.params.levells: unknown key.*did you mean 'levels'"),
        (fat(params={"levels": "log"}), r"compression.params.levels: .*'log'"),
        (fat(first_layer="flaot"), r"compression.first_layer"),
        (fat(scope_overrides={"weights": {"{re}.*": {"bits": 12}}}), r"scope_overrides.weights\['\{re\}.*12-bit"),
        (fat(initializer={"rnage": {}}), r"compression.initializer: unknown initializer 'rnage'.*did you mean 'range'"),
        (fat(initializer={"precision": {"type": "hawq"}}), r"compression.initializer.precision: bit widths are not"),
        (
            [fat(), {"algorithm": "lsq"}],
            r"compression\[0\] \('fat'\) and compression\[1\] \('lsq'\) both quantize every layer",
        ),
        ([{"algorithm": "quantization"}, fat()], r"'quantization' and 'fat' both quantize"),
        ([{"algorithm": "rb_sparsity"}, fat(weights={"bits": 1})], r"compression\[1\].weights"),
    ],
)
def test_bad_sections_give_one_line(section, message):
    with pytest.raises(ConfigError, match=message) as caught:
        validate(section)
    assert "\n" not in str(caught.value)


def test_errors_of_nncf_stay_its_own():
    with pytest.raises(jsonschema.ValidationError):
        validate({"algorithm": "magnitude_sparsty"})
    with pytest.raises(jsonschema.ValidationError):
        validate({"algorithm": "quantization", "weights": {"bitz": 4}})
    with pytest.raises(jsonschema.ValidationError):
        validate(fat(initializer={"range": {"num_init_samples": "many"}}))
    with pytest.raises(jsonschema.ValidationError):
        validate({"weights": {}})
    validate({"algorithm": "quantization", "weights": {"bits": 4}})
    validate([])


def test_section_that_was_never_validated():
    """A config built without from_dict is checked when the model is compressed."""
    config = make_config(fat())
    config["compression"]["weights"]["bits"] = 1
    with pytest.raises(ConfigError, match="no 1-bit weights"):
        create_compressed_model(build_net(), config, dump_graphs=False)


@pytest.mark.parametrize(
    "section, place",
    [
        (fat(weights={"bits": 4, "ignored_scopes": ["Net/nowhere"]}), "compression.weights.ignored_scopes"),
        (fat(activations={"bits": 4, "target_scopes": "nowhere"}), "compression.activations.target_scopes"),
        (fat(scope_overrides={"weights": {"{re}nowhere": {"bits": 3}}}), "compression.scope_overrides.weights"),
        (fat(ignored_scopes=["Net/NNCFConv2d[conv3]/conv2d_0"]), "compression.ignored_scopes"),
        (fat(target_scopes=["{re}(("]), "is not a regular expression"),
    ],
)
def test_scopes_that_match_nothing(section, place):
    with pytest.raises(ConfigError) as caught:
        compress(section)
    assert place in str(caught.value) and "\n" not in str(caught.value)
    if "conv3" in str(section):
        assert "did you mean 'Net/NNCFConv2d[conv" in str(caught.value)


def test_scopes_need_not_match_when_asked():
    compress(fat(weights={"bits": 4, "ignored_scopes": ["Net/nowhere"]}, validate_scopes=False))


def test_top_level_scopes_are_checked_by_nncf():
    import nncf

    with pytest.raises(nncf.ValidationError, match="nowhere"):
        compress(fat(), ignored_scopes=["nowhere"])


@pytest.mark.parametrize("found, expected", [("2.14.1", 2), ("2.16.0", 2), ("3.0.0", 3), ("3.4.0", 3)])
def test_generation_by_version(monkeypatch, found, expected):
    monkeypatch.setattr(versions, "version", lambda name: found)
    assert versions.generation() == expected


@pytest.mark.parametrize("found", ["2.13.0", "4.0.0"])
def test_unsupported_versions(monkeypatch, found):
    monkeypatch.setattr(versions, "version", lambda name: found)
    with pytest.raises(HostError, match=rf"nncf {found} is not supported.*pip install 'fat-plugins\[nncf\]'"):
        versions.generation()


def test_nncf_is_missing(monkeypatch):
    def missing(name):
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    with pytest.raises(HostError, match=r"needs NNCF: pip install 'fat-plugins\[nncf\]'"):
        versions.generation()


def test_tracing_variable_of_217_to_219(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: "2.19.0")
    monkeypatch.setattr(versions, "_operators_are_wrapped", lambda: False)
    monkeypatch.delenv(versions.LEGACY_VARIABLE, raising=False)
    monkeypatch.delitem(sys.modules, "nncf.torch")
    assert versions.generation() == 2 and os.environ[versions.LEGACY_VARIABLE] == "1"
    monkeypatch.setenv(versions.LEGACY_VARIABLE, "0")
    with pytest.raises(HostError, match="NNCF_TORCH_LEGACY_TRACING=0 turns off the tracing"):
        versions.generation()
    monkeypatch.setitem(sys.modules, "nncf.torch", fat_nncf)
    monkeypatch.setenv(versions.LEGACY_VARIABLE, "1")
    with pytest.raises(HostError, match="imported before NNCF_TORCH_LEGACY_TRACING=1 was set"):
        versions.generation()
    monkeypatch.delenv(versions.LEGACY_VARIABLE)
    with pytest.raises(HostError, match="import fat_nncf first"):
        versions.generation()


@pytest.mark.skipif(versions.nncf_version() < (2, 17), reason="older versions always trace by patching")
def test_nncf_torch_imported_first():
    environment = {k: v for k, v in os.environ.items() if k != versions.LEGACY_VARIABLE}
    code = "import nncf.torch\ntry:\n    import fat_nncf\nexcept ValueError as error:\n    print('caught', error)"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "caught nncf.torch was imported before fat_nncf" in run.stdout, run.stderr


def test_bits_of_the_whole_section_default_to_four():
    _, model = compress({"algorithm": "fat"})
    assert bits(model, "weight")["pw"] == BITS4["weights"]["bits"]


def test_a_model_that_cannot_be_traced():
    class Stubborn(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, x):
            raise ValueError("not today\nnor tomorrow")

    config = NNCFConfig.from_dict({"input_info": {"sample_size": [1, 3, 8, 8]}, "compression": {"algorithm": "fat"}})
    with pytest.raises(HostError, match=r"^NNCF cannot trace Stubborn: ValueError: not today$"):
        fat_nncf.create_compressed_model(Stubborn(), config)
    with pytest.raises(TypeError):  # what has nothing to do with the model is passed on
        fat_nncf.create_compressed_model(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), config, nonsense=1)
