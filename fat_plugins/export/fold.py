"""What stands around quantized layers: batch norms to fold into their scale, what blocks integer kernels, and where
these are not safe."""

from __future__ import annotations

from typing import Any

import numpy as np

from fat_plugins.export import _ov


def constant_of(value: Any) -> np.ndarray | None:
    """Value of a constant input in float64, ``None`` for anything else."""
    node = value.get_node()
    if node.get_type_name() == "Convert":  # constants of some versions are kept in half precision
        node = node.input_value(0).get_node()
    return np.asarray(node.data, dtype=np.float64) if node.get_type_name() == "Constant" else None


def static_shape(output: Any) -> tuple[int, ...] | None:
    """Shape of an output, ``None`` when a dimension is open."""
    shape = output.get_partial_shape()
    return tuple(shape.to_shape()) if shape.is_static else None


def _channel_view(node: Any, weight_shape: tuple[int, ...], per_channel: np.ndarray) -> np.ndarray:
    """Factors per output channel in a shape that broadcasts to the layer's weight."""
    kind, view = node.get_type_name(), [1] * len(weight_shape)
    if kind in ("GroupConvolution", "GroupConvolutionBackpropData"):
        out_axis = 1 if kind == "GroupConvolution" else 2
        view[0], view[out_axis] = weight_shape[0], weight_shape[out_axis]
    elif kind == "MatMul":
        transposed = bool(node.get_attributes()["transpose_b"])
        view[-2 if transposed else -1] = per_channel.size
    else:
        view[0 if kind == "Convolution" else 1] = per_channel.size
    return per_channel.reshape(view)


def _per_channel(value: np.ndarray | None, rank: int, axis: int, channels: int) -> np.ndarray | None:
    """``value`` as a vector of ``channels``, or ``None`` when it varies along another axis."""
    if value is None or value.ndim > rank:
        return None
    full = value.reshape([1] * (rank - value.ndim) + list(value.shape))
    if full.size != full.shape[axis] or full.size not in (1, channels):
        return None
    return np.broadcast_to(full.reshape(-1), (channels,)).copy()


def fold_affine(layer: Any, weight_shape: tuple[int, ...]) -> np.ndarray | None:
    """Fold the multiplications behind ``layer`` and give the factors on its weight's scale; additions become one."""
    rank = layer.output(0).get_partial_shape().rank
    if rank.is_dynamic or (layer.get_type_name() == "MatMul" and len(weight_shape) != 2):
        return None
    rank = rank.get_length()
    axis = rank - 1 if layer.get_type_name() == "MatMul" else 1
    size = layer.output(0).get_partial_shape()[axis]
    if size.is_dynamic:
        return None
    channels = size.get_length()
    gain, shift, end, last = np.ones(channels), np.zeros(channels), layer.output(0), None
    folded = False
    while len(end.get_target_inputs()) == 1:
        target = next(iter(end.get_target_inputs()))
        node, kind = target.get_node(), target.get_node().get_type_name()
        if kind == "BatchNormInference" and target.get_index() == 0 and axis == 1:
            gamma, beta, mean, var = (constant_of(node.input_value(i)) for i in (1, 2, 3, 4))
            if any(v is None for v in (gamma, beta, mean, var)):
                break
            factor = gamma / np.sqrt(var + node.get_attributes()["epsilon"])
            gain, shift, folded = gain * factor, (shift - mean) * factor + beta, True
        elif kind in ("Multiply", "Add", "Subtract") and (kind != "Subtract" or target.get_index() == 0):
            other = _per_channel(constant_of(node.input_value(1 - target.get_index())), rank, axis, channels)
            if other is None or _static_differs(node.output(0), end):
                break
            if kind == "Multiply":
                gain, shift, folded = gain * other, shift * other, True
            else:
                shift = shift + (other if kind == "Add" else -other)
        else:
            break
        end, last = node.output(0), node
    if not folded:
        return None
    op, view = _ov.opset(), [1] * rank
    view[axis] = channels
    added = op.add(layer, op.constant(shift.reshape(view).astype(np.float32)))
    added.set_friendly_name(last.get_friendly_name())
    for target in list(end.get_target_inputs()):
        target.replace_source_output(added.output(0))
    return _channel_view(layer, weight_shape, gain)


def _static_differs(a: Any, b: Any) -> bool:
    return a.get_partial_shape().rank != b.get_partial_shape().rank


def unsafe_in_integers(layer: Any) -> bool:
    """Whether the plugin's integer kernel for ``layer`` must not run: a transposed convolution with a stride whose
    input has a sign.

    OpenVINO 2026.4 (``brgconv_avx512_i8``) gives other numbers from run to run there, and once corrupted the heap.
    """
    if not layer.get_type_name().endswith("ConvolutionBackpropData") or set(layer.get_attributes()["strides"]) == {1}:
        return False
    stack, seen = [layer.input_value(0).get_node()], set()
    while stack:
        node = stack.pop()
        if node.get_friendly_name() in seen:
            continue
        seen.add(node.get_friendly_name())
        if node.get_type_name() == "FakeQuantize":
            low = constant_of(node.input_value(3))
            if low is None or bool((low < 0).any()):
                return True
        else:
            stack += [value.get_node() for value in node.input_values()]
    return False


def average_in_float(model: Any) -> None:
    """Keep the plugin from rounding an average of integers to an integer before the next quantizer sees it.

    Between two quantizers OpenVINO lets average pools return 8-bit integers in the steps of their input, however coarse
    these are (3 bits: 8 values). It does not where another operation stands behind: a Minimum that limits nothing.
    """
    op = _ov.opset()
    for node in model.get_ordered_ops():
        if node.get_type_name() != "AvgPool":
            continue
        readers = list(node.output(0).get_target_inputs())
        same = op.minimum(node.output(0), op.constant(np.finfo(np.float32).max, dtype=np.float32))
        same.set_friendly_name(f"{node.get_friendly_name()}/exact")
        for reader in readers:
            reader.replace_source_output(same.output(0))


def _from_convolution(value: Any) -> bool:
    """Whether a convolution gives it, perhaps through constants and an activation function that the plugin fuses."""
    node = value.get_node()
    while node.get_type_name() in ("Add", "Multiply", "Relu", "Clamp"):
        inner = [v.get_node() for v in node.input_values() if v.get_node().get_type_name() != "Constant"]
        if len(inner) != 1:
            return False
        node = inner[0]
    return "Convolution" in node.get_type_name()


def sums_at_one_position(model: Any) -> None:
    """Write sums of images of one pixel, such as behind a global pool, as ``ReduceSum``.

    OpenVINO (2026.4) makes an integer convolution, what is added to it and the constants per channel behind the sum (a
    batch norm, a bias) one layer, and is wrong in it for one sample of one position when the batch is not fixed.
    """
    op = _ov.opset()
    model.validate_nodes_and_infer_types()
    for node in model.get_ordered_ops():
        shape = node.get_output_partial_shape(0) if node.get_type_name() == "Add" else None
        if shape is None or shape.rank.is_dynamic or len(shape) < 3 or any(d != 1 for d in list(shape)[2:]):
            continue
        terms = node.input_values()
        if not any(map(_from_convolution, terms)) or any(v.get_partial_shape() != shape for v in terms):
            continue
        if any(v.get_node().get_type_name() == "Constant" for v in terms):
            continue
        axis = np.array([len(shape)], np.int64)
        total = op.reduce_sum(op.concat([op.unsqueeze(v, axis) for v in terms], len(shape)), axis)
        total.set_friendly_name(node.get_friendly_name())
        take_place(node.output(0), total.output(0))


def take_place(old: Any, new: Any) -> None:
    """All readers of ``old`` read ``new``, which has its tensor names (they are the model's outputs' names)."""
    if old.get_tensor().get_names():
        new.get_tensor().set_names(old.get_tensor().get_names())
    for target in list(old.get_target_inputs()):
        target.replace_source_output(new)


def plain_max_pools(model: Any) -> None:
    """Give max pools with torch's ceil mode the plain one where both have the same shape.

    The plugin takes the first apart into operations that integer tensors do not pass, and the convolution behind would
    run in float.
    """
    op = _ov.opset()
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MaxPool" or node.output(1).get_target_inputs():
            continue
        how = node.get_attributes()
        if how.get("rounding_type") != "ceil_torch":
            continue
        pool = op.max_pool(
            node.input_value(0), how["strides"], how["dilations"], how["pads_begin"], how["pads_end"], how["kernel"],
            "ceil", "explicit", "i64", how["axis"],
        )  # fmt: skip
        shape = pool.output(0).get_partial_shape()
        spatial = list(shape)[2:]
        if any(d.is_dynamic for d in spatial) or shape != node.output(0).get_partial_shape():
            continue
        pool.set_friendly_name(node.get_friendly_name())
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(pool.output(0))
