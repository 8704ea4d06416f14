"""The ``compression`` section: merging, edges, scopes, errors in words, the JSON Schema."""
# ruff: noqa: E501 (messages are quoted whole)

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fat_plugins import CompressionConfig, ConfigError, TensorSpec, algorithms, get_algorithm
from fat_plugins.config import is_plugin_section, json_schema, split_sections

parse = CompressionConfig.parse
quick = settings(derandomize=True, max_examples=60, deadline=None)

NAMES = ", ".join(sorted(algorithms()))


def resolve(config, role="weight", name="conv1", edge=None, **spec):
    """Resolution with scopes matched by equality."""
    return config.resolve(TensorSpec(role, 8, name=name, **spec), lambda scope: scope == name, edge)


# -- resolution ------------------------------------------------------------------------------------------------------
def test_defaults_are_four_bits_inside_and_eight_at_the_edges():
    config = parse({"algorithm": "fat"})
    for role in ("weight", "activation"):
        algorithm, spec, params = resolve(config, role)
        assert (algorithm, spec.bits, params) == ("fat", 4, {})
        for edge in ("first", "last", "plain"):
            algorithm, spec, params = resolve(config, role, edge=edge)
            assert (algorithm, spec.bits, spec.per_channel, params) == ("minmax", 8, None, {})


@pytest.mark.parametrize(
    "policy,expected", [("float", None), ("same", ("fat", 3)), (6, ("minmax", 6)), (8, ("minmax", 8))]
)
@pytest.mark.parametrize("edge", ["first", "last"])
def test_edge_policies(edge, policy, expected):
    config = parse({"algorithm": "fat", "weights": {"bits": 3}, f"{edge}_layer": policy, "params": {"alpha": 2.0}})
    found = resolve(config, edge=edge)
    assert (found and (found[0], found[1].bits)) == expected
    if policy == "same":
        assert found[2] == {"alpha": 2.0}
    other = "last" if edge == "first" else "first"
    assert resolve(config, edge=other)[1].bits == 8
    # activations that feed no weighted layer have nothing to do with the edges
    assert resolve(config, "activation", edge="plain")[1].bits == 8


def test_an_override_wins_over_the_edge_policy():
    config = parse({"algorithm": "fat", "scope_overrides": {"weights": {"conv1": {"bits": 2}}}})
    assert resolve(config, edge="first")[:2][1].bits == 2
    assert resolve(config, edge="first")[0] == "fat"
    assert resolve(config, name="conv2", edge="first")[0] == "minmax"


def test_overrides_are_merged_in_order_as_in_nncf():
    config = parse(
        {
            "algorithm": "lsq",
            "weights": {"bits": 4},
            "scope_overrides": {
                "weights": {"a": {"bits": 3, "per_channel": True}, "b": {"bits": 2}, "c": {"algorithm": "minmax"}}
            },
        }
    )

    def at(*scopes):
        return config.resolve(TensorSpec("weight", 8), lambda s: s in scopes)

    assert (at("a")[1].bits, at("a")[1].per_channel) == (3, True)
    assert (at("a", "b")[1].bits, at("a", "b")[1].per_channel) == (2, True)
    assert (at("b", "c")[0], at("b", "c")[1].bits) == ("minmax", 2)
    assert (at()[1].bits, at()[1].per_channel) == (4, None)


def test_params_are_inherited_only_by_the_same_algorithm():
    config = parse(
        {
            "algorithm": "fat",
            "params": {"alpha": 2.0, "levels": "power_of_two"},
            "weights": {"params": {"alpha": 2.5}},
            "activations": {"algorithm": "lsq"},
            "scope_overrides": {
                "weights": {
                    "own": {"params": {"transform": "none"}},
                    "other": {"algorithm": "minmax", "params": {"momentum": 0.5}},
                    "lsq": {"algorithm": "lsq"},
                },
                "activations": {"back": {"algorithm": "fat", "params": {"alpha": 1.0}}},
            },
        }
    )
    assert resolve(config)[2] == {"alpha": 2.5, "levels": "power_of_two"}
    assert resolve(config, name="own")[2] == {"alpha": 2.5, "levels": "power_of_two", "transform": "none"}
    assert resolve(config, name="other")[::2] == ("minmax", {"momentum": 0.5})
    assert resolve(config, name="lsq")[::2] == ("lsq", {})
    assert resolve(config, "activation")[::2] == ("lsq", {})
    assert resolve(config, "activation", "back")[::2] == ("fat", {"alpha": 1.0, "levels": "power_of_two"})


def test_what_the_host_knows_is_kept():
    config = parse({"algorithm": "lsq", "activations": {"signed": True}})
    known = dict(shape=(4, 3, 1, 1), channel_axis=1, followed_by_norm=True, keep_zeros=True)
    spec = resolve(config, **known)[1]
    assert all(getattr(spec, k) == v for k, v in known.items()) and spec.name == "conv1"
    assert resolve(config, "activation")[1].signed is True
    assert resolve(parse({"algorithm": "lsq"}), "activation", signed=False)[1].signed is False


widths = st.none() | st.integers(2, 8)
flags = st.none() | st.booleans()


@quick
@given(
    st.sampled_from(sorted(n for n, a in algorithms().items() if a.weight_bits == (2, 8))),
    widths,
    st.dictionaries(st.sampled_from("abc"), st.fixed_dictionaries({"bits": widths, "per_channel": flags})),
    st.sets(st.sampled_from("abc")),
    st.sampled_from(["float", "same", 4, 8]),
    st.sampled_from([None, "first", "last", "plain"]),
)
def test_resolution_is_the_last_word_said(algorithm, bits, overrides, matching, policy, edge):
    """Against a model of the rules: the last matching override that says something, else the section, else 4 bits;
    an edge that no override matches follows its policy."""
    section = {
        "algorithm": algorithm,
        "weights": {} if bits is None else {"bits": bits},
        "first_layer": policy,
        "scope_overrides": {
            "weights": {k: {n: v for n, v in o.items() if v is not None} for k, o in overrides.items()}
        },
    }
    refuses = not get_algorithm(algorithm).per_channel_weights
    if refuses and any(o["per_channel"] for o in overrides.values()):
        with pytest.raises(ConfigError, match="per_channel must be false"):
            parse(section)
        return
    found = parse(section).resolve(TensorSpec("weight", 8, shape=(4, 4)), lambda s: s in matching, edge)
    said = [o for k, o in overrides.items() if k in matching]
    if not said and edge is not None:
        policy = {"first": policy, "last": 8, "plain": 8}[edge]
        if policy == "float":
            assert found is None
            return
        if policy != "same":
            assert (found[0], found[1].bits) == ("minmax", policy)
            return
    expected = [bits if bits is not None else 4] + [o["bits"] for o in said if o["bits"] is not None]
    per_channel = [None] + [o["per_channel"] for o in said if o["per_channel"] is not None]
    assert (found[0], found[1].bits, found[1].per_channel) == (algorithm, expected[-1], per_channel[-1])
    get_algorithm(found[0]).make(found[1], found[2])  # what was accepted can be built


# -- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "section,text",
    [
        ({"algorithm": "fatt"}, f"compression.algorithm: unknown algorithm 'fatt'; allowed: {NAMES}; did you mean 'fat'?"),
        ({"algorithm": 3}, "compression.algorithm: expected a string, got 3"),
        ({}, "compression.algorithm: this key is required"),
        ({"first_layer": "flot"}, "compression.first_layer: expected a bit width, 'float' or 'same', got 'flot'; did you mean 'float'?"),
        ({"last_layer": 4.0}, "compression.last_layer: expected a bit width, 'float' or 'same', got 4.0"),
        ({"first_layer": 1}, "compression.first_layer: algorithm 'minmax' has no 1-bit weights; allowed: 2 to 8 (a symmetric grid of one bit has no level beside zero)"),
        ({"last_layer": 16}, "compression.last_layer: algorithm 'minmax' has no 16-bit weights; allowed: 2 to 8"),
        ({"weights": {"bits": "4"}}, "compression.weights.bits: expected a bit width (an integer), got '4'"),
        ({"weights": {"bits": True}}, "compression.weights.bits: expected a bit width (an integer), got True"),
        ({"weights": {"bits": 4.0}}, "compression.weights.bits: expected a bit width (an integer), got 4.0"),
        ({"weights": {"bits": 0}}, "compression.weights: algorithm 'fat' has no 0-bit weights; allowed: 2 to 8 (FAT has no 1-bit form: its grid would have no level beside zero)"),
        ({"activations": {"bits": 9}}, "compression.activations: algorithm 'fat' has no 9-bit activations; allowed: 2 to 8"),
        ({"weights": {"bts": 4}}, "compression.weights.bts: unknown key; allowed: algorithm, bits, ignored_scopes, mode, params, per_channel, signed, target_scopes, unified_scale_ops; did you mean 'bits'?"),
        ({"weights": 4}, "compression.weights: expected an object, got 4"),
        ({"weights": {"per_channel": True}}, "compression.weights: algorithm 'fat' has one scale per weight tensor; per_channel must be false"),
        ({"weights": {"mode": "asymmetric"}}, "compression.weights.mode: expected 'symmetric', got 'asymmetric'; did you mean 'symmetric'?"),
        ({"weights": {"signed": True}}, "compression.weights.signed: weights are always signed; only activations have this key"),
        ({"weights": {"unified_scale_ops": [["a"]]}}, "compression.weights.unified_scale_ops: only activations share scales"),
        ({"activations": {"unified_scale_ops": [["a", 3]]}}, "compression.activations.unified_scale_ops.0.1: expected a string, got 3"),
        ({"params": {"levels": "power_of_two"}, "activations": {"bits": 6}}, "compression.activations: FAT's power-of-two levels need more than 32-bit integers at 6 bits; allowed: 2 to 5, or levels 'uniform'"),
        ({"params": {"alfa": 1.0}}, "compression.params.alfa: unknown key; allowed: activation_alpha, alpha, levels, restore_scale, transform, variant; did you mean 'alpha'?"),
        ({"weights": {"params": {"levels": "log"}}}, "compression.weights.params.levels: expected 'uniform' or 'power_of_two', got 'log'"),
        ({"params": []}, "compression.params: expected an object, got []"),
        ({"ignored_scopes": 5}, "compression.ignored_scopes: expected a list of strings or a string, got 5"),
        ({"scope_overrides": {"wights": {}}}, "compression.scope_overrides.wights: unknown key; allowed: activations, weights; did you mean 'weights'?"),
        ({"scope_overrides": {"weights": {"a": {"bits": "3"}}}}, "compression.scope_overrides.weights.a.bits: expected a bit width (an integer), got '3'"),
        ({"scope_overrides": {"weights": {"a": {"bits": 1}}}}, "compression.scope_overrides.weights['a']: algorithm 'fat' has no 1-bit weights"),
        ({"scope_overrides": {"weights": {"a": {"algorithm": "lsqq"}}}}, f"compression.scope_overrides.weights['a'].algorithm: unknown algorithm 'lsqq'; allowed: {NAMES}; did you mean 'lsq'?"),
        ({"compression_lr_multiplier": "2"}, "compression.compression_lr_multiplier: expected a number, got '2'"),
        ({"compression_lr_multiplier": -1}, "compression.compression_lr_multiplier: must be greater than or equal to 0, got -1"),
        ({"compression_lr_multiplier": float("inf")}, "compression.compression_lr_multiplier: must be a finite number, got inf"),
        ({"initializer": {"rnage": {}}}, "compression.initializer: unknown initializer 'rnage'; allowed: batchnorm_adaptation, precision, range; did you mean 'range'?"),
        ({"quantize_inputs": 1}, "compression.quantize_inputs: expected true or false, got 1"),
        ({"preset": "fast"}, "compression.preset: expected 'performance' or 'mixed', got 'fast'"),
    ],
)  # fmt: skip
def test_errors_are_one_line_with_path_value_and_nearest_name(section, text):
    with pytest.raises(ConfigError) as error:
        parse(section if section == {} else {"algorithm": "fat", **section})
    assert str(error.value).startswith(text) and "\n" not in str(error.value)
    if not text.endswith("weights"):
        assert str(error.value) == text


def test_several_mistakes_are_counted_and_long_values_shortened():
    with pytest.raises(ConfigError, match=r"^compression.first_layr: unknown key; .* \(and 1 more\)$"):
        parse({"algorithm": "fat", "first_layr": 1, "perset": "fast"})
    with pytest.raises(ConfigError) as error:  # one union, several branches that failed
        parse({"algorithm": "fat", "first_layer": "flot", "ignored_scopes": 5})
    assert str(error.value).endswith("(and 1 more)")
    with pytest.raises(ConfigError) as error:
        parse({"algorithm": "fat", "weights": [1] * 1000})
    assert len(str(error.value)) < 150


@pytest.mark.parametrize("section", ["fat", None, 3, ["fat"]])
def test_a_section_must_be_an_object(section):
    with pytest.raises(ConfigError, match="compression: expected an object with the key 'algorithm', got "):
        parse(section)


def test_errors_found_only_when_overrides_meet():
    """Each override is fine alone; together they are not."""
    config = parse(
        {
            "algorithm": "fat",
            "scope_overrides": {"weights": {"a": {"bits": 6}, "b": {"params": {"levels": "power_of_two"}}}},
        }
    )
    with pytest.raises(ConfigError, match=r"conv1: FAT's power-of-two levels .* at 6 bits"):
        config.resolve(TensorSpec("weight", 8, name="conv1"), lambda s: True)


# -- sections and schema ---------------------------------------------------------------------------------------------
def test_sections_of_an_nncf_config():
    sparsity, fat = {"algorithm": "magnitude_sparsity"}, {"algorithm": "fat"}
    assert split_sections(fat) == [fat] and split_sections([sparsity, fat]) == [sparsity, fat]
    assert [is_plugin_section(s) for s in (sparsity, fat)] == [False, True]
    for bad in ([{}], ["fat"], {"algorithm": 3}, None):
        with pytest.raises(ConfigError, match=r"compression(\[0\])?: expected an object with the key 'algorithm'"):
            split_sections(bad)


@pytest.mark.parametrize("name", sorted(algorithms()))
def test_the_json_schema_stands_alone_and_describes_every_key(name):
    schema = json_schema(get_algorithm(name))
    text = json.dumps(schema)
    assert "$ref" not in text and "$defs" not in text
    assert schema["properties"]["algorithm"]["const"] == name
    assert set(schema["properties"]["params"]["properties"]) == set(get_algorithm(name).Params.model_fields)
    assert all("description" in p for p in schema["properties"]["params"]["properties"].values())
    assert schema["additionalProperties"] is False
    edge = schema["properties"]["first_layer"]["anyOf"]
    assert {"type": "integer"} in edge and {"enum": ["float", "same"], "type": "string"} in edge


def test_the_json_schema_accepts_and_refuses_as_the_models_do():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema(get_algorithm("fat"))
    good = {"algorithm": "fat", "weights": {"bits": 3}, "first_layer": "float", "params": {"alpha": 2.0}}
    jsonschema.validate(good, schema)
    parse(good)
    for bad in ({"wights": {}}, {"weights": {"bits": "3"}}, {"params": {"alpha": 0}}, {"first_layer": "flot"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**good, **bad}, schema)
        with pytest.raises(ConfigError):
            parse({**good, **bad})
