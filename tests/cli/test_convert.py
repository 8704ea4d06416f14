"""``fat-plugins convert``: every key of NNCF 2's schema has its line, and the new section is valid."""

import copy
import json

import pytest
from nncf2_configs import CONFIGS, NNCF2_ONLY
from typer.testing import CliRunner

from fat_plugins.cli import BAD_INPUT, OK, app
from fat_plugins.config import CompressionConfig, is_plugin_section, split_sections
from fat_plugins.convert import convert
from fat_plugins.errors import ConfigError

ALL = CONFIGS | NNCF2_ONLY


def quantization(**section):
    return {"compression": {"algorithm": "quantization", **section}}


def section(result):
    return next(s for s in split_sections(result.config["compression"]) if is_plugin_section(s))


def lines(result, status=None):
    return {line.key: line.text for line in result.lines if status in (None, line.status)}


def leaves(value, path):
    """Paths of the keys of a section as lines name them; what stands in a list or in a range is one key."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            named = (
                f"{path}[{key!r}]" if path.endswith(("overrides.weights", "overrides.activations")) else f"{path}.{key}"
            )
            yield from leaves(inner, named)
    else:
        yield path


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("algorithm", ["fat", "lsq", "dropbits"])
def test_result_is_valid_and_nothing_is_lost_in_silence(name, algorithm):
    old = copy.deepcopy(ALL[name])
    result = convert(old, algorithm)
    assert old == ALL[name]  # the argument stays
    assert section(result)["algorithm"] == algorithm
    CompressionConfig.parse(section(result))
    said = tuple(lines(result))
    many = isinstance(old["compression"], list)
    for i, part in enumerate(split_sections(old["compression"])):
        where = f"compression[{i}]" if many else "compression"
        own = part["algorithm"] == "quantization"
        for leaf in leaves(part, where) if own else [where]:
            assert any(key.startswith(leaf) or leaf.startswith(key) for key in said), leaf
    for key in old:
        assert key == "compression" or key in said
        assert key == "compression" or result.config[key] == old[key]


def test_widths_stay_what_they_were():
    result = convert(quantization(weights={"bits": 4.0}, activations={}), "lsq")
    assert section(result)["weights"]["bits"] == 4
    assert section(result)["activations"]["bits"] == 8  # NNCF's default, not ours
    assert "default of NNCF 2" in lines(result, "added")["compression.activations.bits"]
    assert section(result)["first_layer"] == section(result)["last_layer"] == "same"


def test_eight_bits_need_no_rule_for_the_edges():
    assert not {"first_layer", "last_layer"} & set(section(convert(quantization())))


def test_widths_can_be_given():
    result = convert(quantization(weights={"bits": 8}), "direct", weight_bits=2, activation_bits=3)
    assert (section(result)["weights"]["bits"], section(result)["activations"]["bits"]) == (2, 3)
    assert lines(result, "changed")["compression.weights.bits"] == "8 -> 2"


def test_per_channel_where_the_algorithm_has_it():
    old = quantization(weights={"per_channel": True})
    assert section(convert(old, "lsq"))["weights"]["per_channel"] is True
    result = convert(old, "fat")
    assert "per_channel" not in section(result)["weights"]
    assert "one scale per weight tensor" in lines(result, "dropped")["compression.weights.per_channel"]


def test_manual_precision_becomes_overrides():
    result = convert(CONFIGS["manual precision"], "fat")
    assert section(result)["scope_overrides"] == {
        "weights": {"Net/NNCFConv2d[conv1]/conv2d_0": {"bits": 8}},
        "activations": {"Net/NNCFConv2d[conv3]/conv2d_0": {"bits": 6}},
    }
    dropped = lines(result, "dropped")["compression.initializer.precision.bitwidth_per_scope"]
    assert "1 activations, 'Net/ReLU/relu_0|OUTPUT' first" in dropped


def test_searched_precision_is_dropped_with_the_widths_that_remain():
    old = quantization(weights={"bits": 4}, initializer={"precision": {"type": "hawq", "bits": [4, 8]}})
    text = lines(convert(old), "dropped")["compression.initializer.precision"]
    assert "'hawq'" in text and "weights get 4" in text and "activations 8" in text


def test_widths_that_the_algorithm_lacks_go_to_the_plain_quantizer():
    old = quantization(weights={"bits": 2}, activations={"bits": 2}, scope_overrides={"weights": {"a": {"bits": 8}}})
    result = convert(old, "direct")
    assert section(result)["scope_overrides"]["weights"]["a"] == {"bits": 8, "algorithm": "minmax"}
    assert "by 'minmax'" in lines(result, "changed")["compression.scope_overrides.weights['a']"]


def test_binarization():
    old = {"compression": [{"algorithm": "binarization", "mode": "xnor", "ignored_scopes": ["{re}.*fc.*"]}]}
    new = section(convert(old, "bitat"))
    assert (new["weights"], new["activations"]) == ({"bits": 1}, {"bits": 1})
    with pytest.raises(ConfigError, match=r"no 1-bit weights; give --weight-bits from 2 to 8"):
        convert(old, "fat")


@pytest.mark.parametrize("name", NNCF2_ONLY)
def test_for_nncf3_what_it_refuses_is_left_out(name):
    kept, left_out = convert(NNCF2_ONLY[name]), convert(NNCF2_ONLY[name], nncf=3)
    marked = {key for key, text in lines(kept, "carried").items() if text.startswith("for NNCF 2 only")}
    assert marked and marked <= set(lines(left_out, "dropped"))
    assert "threesigma" not in str(left_out.config)
    assert len(split_sections(left_out.config["compression"])) == 1


def test_devices():
    assert convert(quantization() | {"target_device": "VPU"}).config["target_device"] == "NPU"
    assert convert(quantization() | {"target_device": "CPU_SPR"}, nncf=3).config["target_device"] == "CPU"
    assert convert(quantization() | {"target_device": "TRIAL"}).config["target_device"] == "TRIAL"


def test_a_section_outside_of_compression_is_pointed_out():
    result = convert(quantization() | {"weights": {"bits": 4}})
    assert "outside of 'compression'" in lines(result, "carried")["weights"]
    assert result.config["weights"] == {"bits": 4}


@pytest.mark.parametrize(
    ("config", "kwargs", "message"),
    [
        ([], {}, "config: expected an object, got list"),
        ({"compresion": {}}, {}, "compression: missing"),
        ({"compression": 3}, {}, "expected an object with the key 'algorithm'"),
        ({"compression": []}, {}, "got 0"),
        ({"compression": {"algorithm": "quantisation"}}, {}, "did you mean 'quantization'"),
        ({"compression": {"algorithm": "fat"}}, {}, "algorithm of this package already"),
        ({"compression": {"algorithm": "rb_sparsity"}}, {}, "got 0"),
        ({"compression": [{"algorithm": "quantization"}] * 2}, {}, "got 2"),
        (quantization(), {"algorithm": "fast"}, "did you mean 'fat'"),
        (quantization(), {"algorithm": "direct"}, "no 8-bit weights; give --weight-bits from 1 to 4"),
        (quantization(), {"nncf": 4}, "unknown generation 4; allowed: 2, 3"),
        (quantization(ignored_scope=["a"]), {}, "did you mean 'ignored_scopes'"),
        (quantization(weights={"bit": 4}), {}, r"compression.weights.bit: unknown key 'bit'.*did you mean 'bits'"),
        (quantization(weights={"bits": 4.5}), {}, r"compression.weights.bits: expected a bit width"),
        (quantization(weights=[4]), {}, r"compression.weights: expected an object, got \[4\]"),
        (quantization(weights={"mode": "symetric"}), {}, "did you mean 'symmetric'"),
        (quantization(scope_overrides={"weight": {}}), {}, "did you mean 'weights'"),
        (quantization(initializer={"ranges": {}}), {}, "did you mean 'range'"),
        (quantization(initializer={"range": 8}), {}, "range: expected an object, got 8"),
        (quantization(overflow_fix="off"), {}, "overflow_fix"),
        (quantization(params={"base_rl": 1}), {}, "did you mean 'base_lr'"),
        (quantization() | {"target_device": "TPU"}, {}, "did you mean 'CPU'|unknown device 'TPU'"),
        (CONFIGS["sparsity"], {"algorithm": "dorefa"}, "the grid of 'dorefa' has no zero"),
    ],
)
def test_bad_input_is_one_line(config, kwargs, message):
    with pytest.raises(ConfigError, match=message) as error:
        convert(config, **kwargs)
    assert "\n" not in str(error.value)


# -- the command -----------------------------------------------------------------------------------------------------
def call(*args):
    return CliRunner().invoke(app, ["convert", *map(str, args)], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(
        '{\n  // a comment, as NNCF 2 allowed\n  "model": "a//b, ]", /* another\n one */\n'
        '  "compression": {"algorithm": "quantization", "weights": {"bits": 4,},},\n}\n'
    )
    return path


def test_config_on_standard_output_and_lines_on_standard_error(old):
    result = call(old)
    assert result.exit_code == OK
    config = json.loads(result.stdout)
    assert config["model"] == "a//b, ]"
    assert config["compression"]["algorithm"] == "fat"
    assert "carried  compression.weights.bits" in result.stderr
    assert "1 carried" not in result.stdout


def test_output_file_is_never_overwritten_unasked(old, tmp_path):
    new = tmp_path / "new.json"
    assert call(old, "-a", "lsq", "-o", new).exit_code == OK
    first = new.read_text()
    assert json.loads(first)["compression"]["algorithm"] == "lsq"
    refused = call(old, "-a", "pact", "-o", new)
    assert refused.exit_code == BAD_INPUT
    assert "exists; --overwrite replaces it" in refused.stderr
    assert new.read_text() == first
    assert call(old, "-a", "pact", "-o", new, "--overwrite").exit_code == OK
    assert json.loads(new.read_text())["compression"]["algorithm"] == "pact"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.json", "old.json"]


def test_json(old, tmp_path):
    result = call(old, "--json", "--output", tmp_path / "new.json")
    data = json.loads(result.stdout)
    assert data["config"] == json.loads((tmp_path / "new.json").read_text())
    assert {"status": "carried", "key": "compression.weights.bits", "text": "4"} in data["lines"]
    assert {line["status"] for line in data["lines"]} <= {"carried", "changed", "added", "dropped"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "line 1"),
        (b'{"compression": {"algorithm": "quantization"},\n}}', "line 2"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "expected an object"),
    ],
)
def test_bad_files_are_one_line(content, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    result = call(path, "-o", tmp_path / "new.json")
    assert result.exit_code == BAD_INPUT
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "new.json").exists()
    assert call(tmp_path / "none.json").exit_code == BAD_INPUT
