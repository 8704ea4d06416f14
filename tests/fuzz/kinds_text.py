"""Bad text: compression sections, JSON configs, configs of NNCF 2, recipes, settings of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import yaml
from harness import Case
from mutate import (
    BOMB,
    CANARY,
    HOSTILE,
    YAML_SNIPPETS,
    Damage,
    as_json,
    as_yaml,
    at,
    damage,
    damage_text,
    misspelt,
    paths,
)
from programs import begin_training, command

from fat_plugins import mixed
from fat_plugins.config import CompressionConfig, read_config, split_sections
from fat_plugins.errors import ConfigError
from fat_plugins.recipes import load_recipe
from fat_plugins.registry import algorithms

#: every key of a section
SECTION: dict[str, Any] = {
    "algorithm": "lsq",
    "weights": {
        "bits": 4, "per_channel": True, "mode": "symmetric", "ignored_scopes": ["{re}head.*"], "target_scopes": None,
    },
    "activations": {"bits": 4, "signed": True, "unified_scale_ops": [["a", "b"]], "params": {}},
    "first_layer": 8,
    "last_layer": "float",
    "ignored_scopes": ["conv1"],
    "scope_overrides": {
        "weights": {
            "conv2": {"bits": 3, "algorithm": "fat", "per_channel": False, "params": {"restore_scale": "auto"}}
        },
        "activations": {"{re}conv.*": {"bits": 8}},
    },
    "initializer": {"range": {"num_init_samples": 16}, "batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
    "compression_lr_multiplier": 1.5,
    "validate_scopes": False,
    "preset": "performance",
    "quantize_inputs": True,
    "quantize_outputs": False,
    "overflow_fix": "disable",
}  # fmt: skip


def _free_in_section(path: tuple) -> bool:
    """Objects whose keys are scopes, or belong to the host."""
    inside = path[path.index("compression") + 1 :] if "compression" in path else path
    inside = tuple(p for p in inside if not isinstance(p, int))
    return "initializer" in inside[:1] or (inside[:1] == ("scope_overrides",) and len(inside) == 2)


def section(rng: Random) -> dict[str, Any]:
    """A valid section: one with every key, or one of an algorithm with all its options."""
    if rng.random() < 0.5:
        return json.loads(json.dumps(SECTION))
    name = rng.choice(sorted(algorithms()))
    kind = algorithms()[name]
    options = kind.parse_params({}).model_dump(mode="json")
    bits = [max(low, min(4, high)) for low, high in (kind.weight_bits, kind.activation_bits)]
    groups = {"weights": {"bits": bits[0]}, "activations": {"bits": bits[1]}}
    if kind.activation_quantizer is None:
        groups["activations"] = {"bits": 8, "algorithm": "minmax"}
    return {"algorithm": name, "params": options, **groups}


class Sections:
    """Sections handed over from Python."""

    name, share, needs = "compression sections", 4500, ()

    def __init__(self, folder: Path) -> None: ...

    def case(self, rng: Random) -> Case:
        good = section(rng)
        try:
            CompressionConfig.parse(good)
        except ValueError:
            good = json.loads(json.dumps(SECTION))
        bad = damage(rng, good, _free_in_section)
        if rng.random() < 0.2:
            other = section(rng)
            return Case(f"{bad.what}, in a list", lambda: _parse_list([bad.tree, other]))
        return Case(bad.what, lambda: _parse(bad.tree), bad.bad, bad.names, bad.hint)


def _parse(tree: Any) -> None:
    CompressionConfig.parse(tree)


def _parse_list(tree: list) -> None:
    mixed.parse_sections([(f"compression[{i}]", s) for i, s in enumerate(split_sections(tree))])


NNCF2: dict[str, Any] = {
    "input_info": {"sample_size": [1, 3, 32, 32]},
    "target_device": "CPU",
    "compression": [
        {"algorithm": "magnitude_sparsity", "params": {"schedule": "multistep"}},
        {
            "algorithm": "quantization",
            "preset": "mixed",
            "weights": {"mode": "symmetric", "bits": 8, "per_channel": True, "logarithm_scale": True},
            "activations": {"mode": "asymmetric", "bits": 8, "signed": False, "ignored_scopes": ["x"]},
            "scope_overrides": {
                "weights": {"conv": {"bits": 8, "mode": "symmetric"}},
                "activations": {"y": {"bits": 4}},
            },
            "initializer": {
                "range": {"num_init_samples": 10, "type": "mean_min_max"},
                "batchnorm_adaptation": {"num_bn_adaptation_samples": 3},
                "precision": {"type": "manual", "bitwidth_per_scope": [[4, "conv/x|WEIGHT"], [8, "z|OUTPUT"]]},
            },
            "ignored_scopes": ["a", "b"],
            "quantize_inputs": True,
            "overflow_fix": "enable",
            "export_to_onnx_standard_ops": False,
            "params": {"base_lr": 0.1, "activations_quant_start_epoch": 2},
        },
    ],
}


def _write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _damaged_json(rng: Random, good: Any, free: Any) -> tuple[bytes, Damage]:
    if rng.random() < 0.6:
        bad = damage(rng, good, free)
        return as_json(bad.tree).encode("utf-8", "surrogatepass"), bad
    data, what = damage_text(rng, as_json(good), "//")
    return data, Damage(None, what)


class Nncf2Configs:
    """``fat-plugins convert``."""

    name, share, needs = "configs of NNCF 2 (convert)", 2500, ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def case(self, rng: Random) -> Case:
        data, bad = _damaged_json(rng, NNCF2, lambda path: True)
        path = _write(self.folder, "old.json", data)
        out = ("-o", str(self.folder / "new.json")) if rng.random() < 0.5 else ()
        name = rng.choice(sorted(algorithms())) if rng.random() < 0.9 else rng.choice(HOSTILE[:20])
        (self.folder / "new.json").unlink(missing_ok=True)
        options = ("--activation-bits", "8", *out, "--algorithm=" + name.replace("\0", ""))
        return Case(bad.what, lambda: command("convert", path, *options), folder=self.folder)


class JsonConfigs:
    """Files with a whole config, as scripts and recipes read them."""

    name, share, needs = "JSON configs", 2500, ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        recipe = {**RECIPE, "compression": "config.json", "baselines": []}
        recipe["training"] = {k: v for k, v in RECIPE["training"].items() if k != "stages"}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def case(self, rng: Random) -> Case:
        good = {"input_info": {"sample_size": [1, 1, 8, 8]}, "compression": section(rng)}
        data, bad = _damaged_json(rng, good, lambda path: path[:1] != ("compression",) or _free_in_section(path))
        path = _write(self.folder, "config.json", data)
        names = (*bad.names, "config.json") if bad.names else ()
        if rng.random() < 0.3:
            return Case(f"script: {bad.what}", lambda: _script(path), bad.bad, names, bad.hint, self.folder)
        return Case(
            f"recipe: {bad.what}", lambda: _load(self.folder / "recipe.yaml"), bad.bad, names, bad.hint, self.folder
        )


def _script(path: Path) -> None:
    config = read_config(path)
    if not isinstance(config, dict):
        raise ConfigError("config.json: expected an object")  # as adapters do
    mixed.parse_sections([("compression", s) for s in split_sections(config.get("compression"))])


def _load(path: Path) -> None:
    load_recipe(path)


RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seeds": [0, 1],
    "threads": 1,
    "host": "nncf",
    "model": {"name": "digits_cnn", "params": {"width": 4}, "new_head": False},
    "data": {
        "name": "digits", "batch_size": 64,
        "params": {"test_fraction": 0.3, "validation_fraction": 0.1, "split_seed": 0, "shift": 1},
    },
    "compression": {"algorithm": "lsq", "weights": {"bits": 4}, "activations": {"bits": 4}, "first_layer": 8},
    "pretrain": {
        "epochs": 2,
        "optimizer": {"name": "adam", "lr": 0.1, "weight_decay": 1e-4, "options": {"betas": [0.9, 0.99], "eps": 1e-8}},
        "schedule": {"name": "multistep", "milestones": [1], "gamma": 0.1, "warmup_epochs": 0.5},
        "label_smoothing": 0.1,
        "clip_norm": 1.0,
        "accumulate": 2,
        "amp": None,
        "norm_batches": 2,
    },
    "training": {
        "epochs": 1,
        "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9, "nesterov": True},
        "schedule": {"name": "cosine", "hold_epochs": 0.5, "final": 0.01},
        "ema": {"decay": 0.99},
        "reestimate_norms": "auto",
        "stages": [{"weights": {"bits": 5}, "epochs": 1, "lr": 0.01, "carry": "weights"}, {"activations": {"bits": 4}}],
        "distillation": {"alpha": 0.5, "temperature": 2.0},
    },
    "export": {"format": ["openvino", "onnx"], "checkpoint": "best", "verify": True, "verify_samples": 8},
    "baselines": ["fat", {"algorithm": "pact", "params": {}}],
}  # fmt: skip
_OTHERS: list[dict[str, Any]] = [
    {"name": "shapes", "params": {"train": 100, "validation": 50, "test": 100, "size": 12, "noise": 0.1, "shift": 0}},
    {"name": "cifar10", "params": {"root": "nowhere", "format": "binary"}},
    {"name": "imagefolder", "params": {"root": "nowhere", "size": 32, "augment": "crop", "std": [1.0, 1.0, 1.0]}},
    {"name": "callable", "params": {"factory": f"{CANARY}:data", "options": {"x": 1}}},
]


def _free_in_recipe(path: tuple) -> bool:
    if path[:1] == ("compression",):
        return _free_in_section(path[1:])
    return path == ("data", "params", "options")


class Recipes:
    """``fat-plugins train`` up to the moment at which it would make the directory of the run."""

    name, share, needs = "recipes", 2000, ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "fuzz_canary.py").write_text("raise SystemExit('imported')")

    def case(self, rng: Random) -> Case:
        good = json.loads(json.dumps(RECIPE))
        self.other = rng.random() < 0.3
        if self.other:
            good["data"] = json.loads(json.dumps(rng.choice(_OTHERS)))
        kind = rng.random()
        if kind < 0.55:
            bad = damage(rng, good, _free_in_recipe)
            text = _dumped(rng, bad.tree)
        elif kind < 0.75:
            text, bad = self._snippet(rng, good)
        elif kind < 0.9:
            data, what = damage_text(rng, as_yaml(good, rng), "# ")
            return self._of(data, Damage(None, what))
        else:
            text, bad = self._files(rng, good)
        return self._of(text.encode("utf-8", "surrogatepass"), bad)

    def _of(self, data: bytes, bad: Damage) -> Case:
        path = _write(self.folder, "bad.yaml", data)
        names = (*bad.names, "bad.yaml", *(("data.params", "data '") if self.other else ())) if bad.names else ()
        run = self.folder / "run"
        return Case(bad.what, lambda: begin_training(path, "-o", run), bad.bad, names, bad.hint, self.folder)

    def _snippet(self, rng: Random, good: Any) -> tuple[str, Damage]:
        """Something that only YAML has, in the place of a value."""
        path = rng.choice(list(paths(good)))
        at(good, path[:-1])[path[-1]] = "SNIPPET"
        text = yaml.safe_dump(good, sort_keys=False)
        if rng.random() < 0.05:
            return text.replace("SNIPPET", "x") + "\n" + BOMB, Damage(None, "a bomb of aliases", (), True)
        snippet = rng.choice(YAML_SNIPPETS)
        return text.replace("SNIPPET", snippet, 1), Damage(None, f"{path} = {snippet[:40]!r}")

    def _files(self, rng: Random, good: Any) -> tuple[str, Damage]:
        """A recipe that names other files."""
        self._neighbours()
        names = (
            "bad.yaml", "cycle.yaml", "../outside.yaml", "/etc/passwd", "/etc/hosts.yaml", "folder", "folder.yaml",
            "missing.yaml", "digits_fat_w4a", "cifar10/../digits_fat_w4a4", "link.yaml", "loop.yaml", "pipe.yaml",
            "zero.yaml", "a\0b.yaml", "x" * 300 + ".yaml", "picture.yaml", "~/x.yaml", "\n.yaml", "chain0.yaml", "",
        )  # fmt: skip
        name = rng.choice(names)
        if rng.random() < 0.5:
            good["extends"] = rng.choice((name, [name], ["digits_fat_w4a4", name], {"a": name}, [[name]], 3, [None]))
            what = f"extends {str(good['extends'])[:60]!r}"
        elif rng.random() < 0.5:
            good["compression"] = name.replace(".yaml", ".json")
            what = f"compression {good['compression'][:60]!r}"
        else:
            weights = name.replace(".yaml", rng.choice((".safetensors", ".pt")))
            good["model"]["weights"] = weights
            return json.dumps(good), Damage(None, f"weights {weights[:60]!r}")
        return json.dumps(good), Damage(None, what, (), name not in ("", "chain0.yaml"))

    def _neighbours(self) -> None:
        if (self.folder / "cycle.yaml").exists():
            return
        import os

        self.folder.parent.joinpath("outside.yaml").write_text("model: {name: digits_cnn}")
        self.folder.parent.joinpath("outside.json").write_text(json.dumps({"compression": SECTION}))
        for suffix in ("yaml", "json"):
            (self.folder / f"folder.{suffix}").mkdir()
            (self.folder / f"link.{suffix}").symlink_to(self.folder.parent / f"outside.{suffix}")
            (self.folder / f"loop.{suffix}").symlink_to(f"loop.{suffix}")
            (self.folder / f"zero.{suffix}").symlink_to("/dev/zero")
            os.mkfifo(self.folder / f"pipe.{suffix}")
            (self.folder / f"picture.{suffix}").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
        (self.folder / "cycle.yaml").write_text("extends: bad.yaml\n")
        (self.folder / "folder").mkdir()
        for i in range(30):
            (self.folder / f"chain{i}.yaml").write_text(f"extends: chain{i + 1}.yaml\n")


def _dumped(rng: Random, tree: Any) -> str:
    try:
        return as_yaml(tree, rng)
    except (ValueError, yaml.YAMLError, RecursionError):  # a number that Python does not print, a lone surrogate
        return as_json(tree)


class Settings:
    """``fat-plugins train --set``."""

    name, share, needs = "settings of the command line", 400, ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    def case(self, rng: Random) -> Case:
        path = [str(p) for p in rng.choice(list(paths(RECIPE)))]
        value = rng.choice((*YAML_SNIPPETS, *HOSTILE, "3", "-1", "x", "[1, 2]", "{a: 1}"))[:60_000].replace("\0", "")
        hint, recipe = None, self.folder / "recipe.yaml"
        if rng.random() < 0.3 and len(path[-1]) > 3 and "options" not in path and not any(p.isdigit() for p in path):
            hint, path[-1], value = path[-1], misspelt(rng, path[-1]), "3"
        if hint == path[-1]:
            hint = None
        text = f"{'.'.join(path)}={value}"
        if hint is None and rng.random() < 0.1:
            text = rng.choice((value, f"={value}", f"a..b={value}", ".=.", ""))
        run = lambda: begin_training(recipe, "-o", self.folder / "run", "--set", text)  # noqa: E731
        return Case(text[:80], run, hint is not None, folder=self.folder, hint=hint)


KINDS = (Sections, JsonConfigs, Nncf2Configs, Recipes, Settings)
