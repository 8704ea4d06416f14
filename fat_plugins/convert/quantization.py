"""One ``quantization`` section of NNCF 2, rewritten key by key."""

from __future__ import annotations

import re
from typing import Any

from fat_plugins.config import PLAIN_ALGORITHM, PLAIN_BITS
from fat_plugins.convert.report import Log
from fat_plugins.errors import ConfigError, shown, unknown
from fat_plugins.quantizer import TensorSpec
from fat_plugins.registry import Algorithm

#: the sections that are rewritten, with the width that they have by default
QUANTIZING = {"quantization": 8, "experimental_quantization": 8, "binarization": 1}
_REFUSED = "NNCF 2.14 to 2.19 refuse it"
_AS_IS = ("ignored_scopes", "target_scopes", "validate_scopes", "quantize_inputs", "quantize_outputs",
          "compression_lr_multiplier")  # fmt: skip
_ONNX = "fat_nncf.export_onnx and 'fat-plugins export --format onnx' write such files"
_SCHEDULE = "NNCF's staged schedule does not exist here; schedules belong to the algorithm (see its page)"
_LOOP = "learning rate, weight decay and batches belong to the training loop"
#: keys of `quantization` that have no counterpart, with the reason; the second half is from versions before the last
_DROPPED = {
    "export_to_onnx_standard_ops": _ONNX,
    "quantize_patterns": _REFUSED,
    "quantizable_subgraph_patterns": _REFUSED,
    "disable_function_quantization_hooks": _REFUSED,
}
_STAGED = {
    "activations_quant_start_epoch": _SCHEDULE,
    "weights_quant_start_epoch": _SCHEDULE,
    "batch_multiplier": _LOOP,
    "lr_poly_drop_start_epoch": _LOOP,
    "lr_poly_drop_duration_epochs": _LOOP,
    "disable_wd_start_epoch": _LOOP,
    "base_lr": _LOOP,
    "base_wd": _LOOP,
}
_OLD_INITIALIZER = ("num_init_steps", "num_bn_adaptation_steps", "num_bn_forget_steps", "num_bn_forget_samples")
_GROUP_KEYS = ("mode", "bits", "signed", "per_channel", "logarithm_scale", "ignored_scopes", "target_scopes",
               "validate_scopes", "unified_scale_ops")  # fmt: skip
_OVERRIDE_KEYS = ("mode", "bits", "signed", "per_channel", "initializer")
_POINT = re.compile(r"^(?:TargetType\.\w+ )?(?P<scope>.*?)(?:\|(?P<kind>WEIGHT|OUTPUT|INPUT\d*))?$")


class Quantization:
    """Rewrites one section."""

    def __init__(self, kind: type[Algorithm], bits: tuple[int | None, int | None], where: str, log: Log) -> None:
        self.kind, self.where, self.log = kind, where, log
        self.bits = dict(zip(("weights", "activations"), bits, strict=True))

    def convert(self, old: dict[str, Any]) -> dict[str, Any]:
        name = old["algorithm"]
        new: dict[str, Any] = {"algorithm": self.kind.name}
        self.log("changed", f"{self.where}.algorithm", f"{name!r} -> '{self.kind.name}'")
        for group in ("weights", "activations"):
            new[group] = self._group(group, self._object(old, group), QUANTIZING[name])
        overrides = self._overrides(self._object(old, "scope_overrides"))
        for key, value in old.items():
            path = f"{self.where}.{key}"
            if key in _AS_IS:
                new[key] = value
                self.log("carried", path)
            elif key == "initializer":
                if initializer := self._initializer(self._object(old, key), new, overrides):
                    new[key] = initializer
            elif key == "preset":
                self._preset(value, new)
            elif key == "overflow_fix":
                new[key] = value
                self.log("carried", path, repr(value))
            elif key == "params":
                for param in self._object(old, key):
                    self._known(param, _STAGED, f"{path}.{param}")
                    self.log("dropped", f"{path}.{param}", _STAGED[param])
            elif key in _DROPPED:
                self.log("dropped", path, _DROPPED[key])
            elif key == "mode" and name == "binarization":
                self.log("dropped", path, f"{value!r}: the algorithm decides how signs are trained")
            elif key not in ("algorithm", "weights", "activations", "scope_overrides"):
                known = (*_AS_IS, *_DROPPED, "initializer", "preset", "overflow_fix", "params", "weights",
                         "activations", "scope_overrides")  # fmt: skip
                raise ConfigError(f"{self.where}: {unknown('key', key, known)}")
        if any(overrides.values()):
            new["scope_overrides"] = {group: found for group, found in overrides.items() if found}
        self._edges(new)
        if "overflow_fix" not in old:
            self.log("changed", f"{self.where}.overflow_fix", "not set: NNCF 2 then halves the range of 8-bit weights "
                     "for processors without VNNI, this package does not")  # fmt: skip
        return new

    # -- weights, activations ----------------------------------------------------------------------------------------
    def _group(self, group: str, old: dict[str, Any], default: int) -> dict[str, Any]:
        path = f"{self.where}.{group}"
        new: dict[str, Any] = {"bits": self._width(old.get("bits", default), f"{path}.bits")}
        wanted = self.bits[group]
        if wanted is not None and wanted != new["bits"]:
            self.log("changed", f"{path}.bits", f"{new['bits']} -> {wanted}")
            new["bits"] = wanted
        elif "bits" in old:
            self.log("carried", f"{path}.bits", str(new["bits"]))
        else:
            self.log("added", f"{path}.bits", f"{new['bits']}, the default of NNCF 2")
        option = "--weight-bits" if group == "weights" else "--activation-bits"
        if not self._holds(group, new["bits"]):
            low, high = self._limits(group)
            raise ConfigError(f"{path}.bits: algorithm '{self.kind.name}' has no {new['bits']}-bit {group}; give "
                              f"{option} from {low} to {high}")  # fmt: skip
        for key, value in old.items():
            self._known(key, _GROUP_KEYS, f"{path}.{key}")
            if key in ("ignored_scopes", "target_scopes"):
                new[key] = value
                self.log("carried", f"{path}.{key}")
            elif key == "unified_scale_ops":
                if self.log.keeps(f"{path}.{key}", "NNCF 3 unifies scales by its own rules"):
                    new[key] = value
            elif key == "validate_scopes":
                self.log("dropped", f"{path}.{key}", f"NNCF reads it in {self.where} only")
            elif key == "logarithm_scale":
                self.log("dropped", f"{path}.{key}", "how scales are parametrised belongs to the algorithm")
            elif key != "bits":
                self._setting(group, key, value, new, path)
        return new

    def _setting(self, group: str, key: str, value: Any, new: dict[str, Any], path: str) -> None:
        """``mode``, ``signed`` and ``per_channel``, of a group or of one scope."""
        path, one = f"{path}.{key}", group[:-1]
        if key == "mode":
            if value not in ("symmetric", "asymmetric"):
                raise ConfigError(f"{path}: {unknown('mode', value, ('symmetric', 'asymmetric'))}")
            if value == "symmetric":
                new[key] = value
                self.log("carried", path, "'symmetric'")
            else:
                self.log("dropped", path, "'asymmetric': grids have no zero point here")
        elif key == "signed":
            if group == "weights":
                self.log("dropped", path, "weights are always signed")
            elif value:
                new[key] = value
                self.log("carried", path)
            else:
                self.log("dropped", path, "calibration decides, as in NNCF 2, where negative values overrule it")
        elif value and not (self.kind.per_channel_weights if one == "weight" else self.kind.per_channel_activations):
            self.log("dropped", path, f"'{self.kind.name}' has one scale per {one} tensor")
        else:
            new[key] = value
            self.log("carried", path)

    def _overrides(self, old: dict[str, Any]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {"weights": {}, "activations": {}}
        for group, scopes in old.items():
            path = f"{self.where}.scope_overrides.{group}"
            self._known(group, found, path)
            for scope, settings in self._object(old, group, f"{self.where}.scope_overrides").items():
                here, new = f"{path}[{scope!r}]", {}
                for key, value in self._object(scopes, scope, path).items():
                    self._known(key, _OVERRIDE_KEYS, f"{here}.{key}")
                    if key == "bits":
                        new |= self._override_bits(group, self._width(value, f"{here}.bits"), here)
                    elif key == "initializer":
                        self.log("dropped", f"{here}.{key}", "ranges of single scopes; initializer.range has them all")
                    else:
                        self._setting(group, key, value, new, here)
                if new:
                    found[group][scope] = new
                elif not settings:
                    self.log("dropped", here, "it is empty")
        return found

    def _override_bits(self, group: str, bits: int, path: str) -> dict[str, Any]:
        if self._holds(group, bits):
            self.log("carried", f"{path}.bits", str(bits))
            return {"bits": bits}
        self.log("changed", path, f"{bits} bits by '{PLAIN_ALGORITHM}', since '{self.kind.name}' has no such width")
        return {"bits": bits, "algorithm": PLAIN_ALGORITHM}

    # -- initializer -------------------------------------------------------------------------------------------------
    def _initializer(
        self, old: dict[str, Any], new: dict[str, Any], overrides: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        path, found = f"{self.where}.initializer", {}
        for key, value in old.items():
            here = f"{path}.{key}"
            if key == "batchnorm_adaptation":
                settings = self._object(old, key, path)
                for old_name in set(settings) & set(_OLD_INITIALIZER):
                    self.log("dropped", f"{here}.{old_name}", _REFUSED)
                found[key] = {k: self._whole(v) for k, v in settings.items() if k not in _OLD_INITIALIZER}
                self.log("carried", here)
            elif key == "range":
                self._range(value, found, here)
            elif key == "precision":
                self._precision(self._object(old, key, path), new, overrides, here)
            elif key in _OLD_INITIALIZER:
                self.log("dropped", here, _REFUSED)
            else:
                raise ConfigError(
                    f"{path}: {unknown('initializer', key, ('range', 'batchnorm_adaptation', 'precision'))}"
                )
        return found

    def _range(self, value: Any, found: dict[str, Any], path: str) -> None:
        entries = []
        for i, entry in enumerate(value if isinstance(value, list) else [value]):
            here = f"{path}[{i}]" if isinstance(value, list) else path
            if not isinstance(entry, dict):
                raise ConfigError(f"{here}: expected an object, got {shown(entry)}")
            entry = {k: self._whole(v) for k, v in entry.items()}
            if "num_init_steps" in entry:
                self.log("dropped", f"{here}.num_init_steps", _REFUSED)
                del entry["num_init_steps"]
            refusal = None
            if entry.get("type") == "threesigma":
                refusal = "NNCF 3 has no range of type 'threesigma'"
            elif entry.get("target_scopes") or entry.get("ignored_scopes"):
                refusal = "NNCF 3 has one range estimator for all activations"
            if refusal is None:
                self.log("carried", here, "for activations; weights are initialised by the algorithm's own rule")
            if refusal is None or self.log.keeps(here, refusal):
                entries.append(entry)
        if entries:
            found["range"] = entries if isinstance(value, list) else entries[0]

    def _precision(
        self, old: dict[str, Any], new: dict[str, Any], overrides: dict[str, dict[str, Any]], path: str
    ) -> None:
        """``manual`` widths become overrides where their names tell what they belong to."""
        search = old.get("type")
        if search != "manual":
            bits = {group: new[group]["bits"] for group in ("weights", "activations")}
            self.log("dropped", path, f"{search!r}: widths are not searched here; weights get {bits['weights']} and "
                     f"activations {bits['activations']} bits, scope_overrides sets others")  # fmt: skip
            return
        for key in old:
            if key not in ("type", "bits", "bitwidth_per_scope"):
                self.log("dropped", f"{path}.{key}", "it steers a search for widths")
        moved, same, lost = 0, 0, []
        entries = old.get("bitwidth_per_scope", [])
        if not isinstance(entries, list):
            raise ConfigError(f"{path}.bitwidth_per_scope: expected a list, got {shown(entries)}")
        for entry in entries:
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
                raise ConfigError(f"{path}.bitwidth_per_scope: expected [bits, scope], got {shown(entry)}")
            bits, point = self._width(entry[0], f"{path}.bitwidth_per_scope"), _POINT.match(entry[1])
            group = "activations" if (point["kind"] or "").startswith("INPUT") else "weights"
            if point["kind"] == "OUTPUT" or (point["kind"] is None and "OPERATION_WITH_WEIGHTS" not in entry[1]):
                lost.append(entry[1])
            elif bits == new[group]["bits"] and point["scope"] not in overrides[group]:
                same += 1
            else:
                widths = {"bits": bits} if self._holds(group, bits) else {"bits": bits, "algorithm": PLAIN_ALGORITHM}
                overrides[group].setdefault(point["scope"], {}).update(widths)
                moved += 1
        self.log("changed", path, f"manual: {moved} widths became scope_overrides, {same} are those of the section")
        if lost:
            self.log("dropped", f"{path}.bitwidth_per_scope", f"{len(lost)} activations, {lost[0]!r} first: name in "
                     "scope_overrides.activations the operations that read them")  # fmt: skip

    # -- the rest ----------------------------------------------------------------------------------------------------
    def _preset(self, value: Any, new: dict[str, Any]) -> None:
        if value == "mixed":
            self.log(
                "dropped", f"{self.where}.preset", "'mixed' means asymmetric activations; there is no zero point here"
            )
        else:
            new["preset"] = value
            self.log("carried", f"{self.where}.preset", repr(value))

    def _edges(self, new: dict[str, Any]) -> None:
        """NNCF 2 gives first and last layers, and other activations, the same width as the rest."""
        bits = {group: new[group]["bits"] for group in ("weights", "activations")}
        if set(bits.values()) != {PLAIN_BITS}:
            new["first_layer"] = new["last_layer"] = "same"
            self.log("added", f"{self.where}.first_layer, last_layer", "'same', as in NNCF 2; without these keys they "
                     f"get {PLAIN_BITS} bits")  # fmt: skip
        if bits["activations"] != PLAIN_BITS:
            self.log("changed", f"{self.where}.activations", "those that feed no convolution or linear layer get "
                     f"{PLAIN_BITS} bits; scope_overrides sets others")  # fmt: skip

    def _limits(self, group: str) -> tuple[int, int]:
        return self.kind.weight_bits if group == "weights" else self.kind.activation_bits

    def _holds(self, group: str, bits: int) -> bool:
        try:
            self.kind.check(TensorSpec(group[:-1], bits))
        except ConfigError:
            return False
        return True

    @staticmethod
    def _whole(value: Any) -> Any:
        """``8.0``, a number to NNCF's schema, as the integer that it is."""
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def _width(self, value: Any, path: str) -> int:
        value = self._whole(value)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{path}: expected a bit width (an integer), got {shown(value)}")
        return value

    def _object(self, owner: dict[str, Any], key: str, where: str | None = None) -> dict[str, Any]:
        value = owner.get(key, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{where or self.where}.{key}: expected an object, got {shown(value)}")
        return value

    @staticmethod
    def _known(key: str, allowed: Any, path: str) -> None:
        if key not in allowed:
            raise ConfigError(f"{path}: {unknown('key', key, allowed)}")
