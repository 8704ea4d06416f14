"""Float64 references in numpy, written from the specifications of the algorithms.

They share no code with the package: full complex DFTs, explicit level searches, hand-derived gradients.
"""

from __future__ import annotations

import numpy as np


def ramp(shape, a, b, s=1.0, o=0.0):
    """The specification's random-free test tensor: ``s sin(a i + b) + o cos(1.3 i)``, i = flat index."""
    i = np.arange(int(np.prod(shape)), dtype=np.float64)
    return (s * np.sin(a * i + b) + o * np.cos(1.3 * i)).reshape(shape)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def power_of_two_grid(count):
    """``{0} U {2^-j : j = 0 .. count - 1}``, ascending."""
    return np.array([0.0] + [2.0**-j for j in reversed(range(count))])


def nearest(u, grid):
    """Level of ``grid`` nearest to ``u >= 0``, in the linear domain; the first (lower) one on a tie."""
    return grid[np.abs(u[..., None] - grid).argmin(-1)]


def fat_quantize(r, bits, levels, signed=True, lower_clip=True):
    """``q`` of fat.md sections 3 and 5 for ``r = value / alpha``."""
    if signed:
        n, count = 2 ** (bits - 1) - 1, 2 ** (bits - 1) - 1
        u = np.clip(r, -1, 1)
        sign, u = np.sign(u), np.abs(u)
    else:
        n, count = 2**bits - 1, 2**bits - 1
        u = np.clip(r, 0 if lower_clip else -np.inf, 1)
        sign = 1.0
    q = np.round(u * n) / n if levels == "uniform" else nearest(u, power_of_two_grid(count))
    return sign * q


def fat_standardize(w, uniquant=False):
    sd = w.std(ddof=1)
    return (w - w.mean()) / (1.0 if uniquant else sd), (1.0 if uniquant else sd)


def fat_transform(what, t):
    """Steps 2 to 8 with the full complex spectrum; returns ``Wt`` and what the backward needs."""
    rows = what.reshape(what.shape[0], -1)
    f = np.fft.fft(rows, axis=1)
    a = np.abs(f)
    m = sigmoid(t @ a)
    z = np.fft.ifft(m * f, axis=1)
    return z.real.reshape(what.shape), dict(f=f, a=a, m=m, imaginary=np.abs(z.imag).max())


def fat_weight(w, t, alpha, bits, levels="uniform", transform="dft", restore=False, grad=None):
    """Forward of one FAT weight and, for ``grad`` = dL/dWq, the closed form of section 4.

    :return: dict with ``wq``, ``codes_of_unit`` (q) and, with ``grad``, ``dw``, ``dt``, ``dalpha``.
    """
    what, sd = fat_standardize(w, uniquant=transform == "uniquant")
    if transform == "dft":
        wt, saved = fat_transform(what, t)
    else:
        wt, saved = what, None
    r = wt / alpha
    q = fat_quantize(r, bits, levels)
    factor = sd if restore else 1.0
    out = dict(wq=alpha * q * factor, q=q, wt=wt, what=what, sd=sd, saved=saved)
    if grad is not None:
        g = grad * factor
        out["dalpha"] = (g * np.where(np.abs(r) > 1, np.sign(r), q - r)).sum()
        rows = g.reshape(g.shape[0], -1)
        if saved is not None:
            f, a, m, n = saved["f"], saved["a"], saved["m"], rows.shape[1]
            ghat = np.fft.fft(rows, axis=1)
            ds = (f * np.conj(ghat)).real / n * m * (1 - m)
            da = t.T @ ds
            unit = np.where(a > 0, f / np.where(a > 0, a, 1), 0)
            rows = np.fft.ifft(m * ghat, axis=1).real + n * np.fft.ifft(da * unit, axis=1).real
            out["dt"] = ds @ a.T
        out["dw"] = rows.reshape(w.shape) / sd
    return out


def fat_activation(x, alpha, bits, levels="uniform", variant="cifar", signed=False, grad=None):
    """Forward and backward of section 5, with the project's lower clamp (and symmetric clip when signed)."""
    r = x / alpha
    q = fat_quantize(r, bits, levels, signed)
    out = dict(xq=alpha * q)
    if grad is not None:
        low = -1 if signed else 0
        inside = (r >= low) & (r <= 1)
        out["dx"] = grad * inside
        residual = q - r if variant == "cifar" else 0.0
        out["dalpha"] = (grad * np.where(inside, residual, np.clip(r, low, 1))).sum()
    return out


def lsq(v, s, low, high, g=1.0, grad=None, axis=None):
    """LSQ of baselines.md sections 3 and 4. ``s`` broadcasts to ``v``; gradients of ``s`` are summed to its shape."""
    r = v / s
    q = np.round(np.clip(r, low, high))
    out = dict(vq=q * s, codes=q.astype(np.int64))
    if grad is not None:
        inside = (r > low) & (r < high)
        out["dv"] = grad * inside
        term = np.where(inside, q - r, np.where(r <= low, low, high))
        ds = grad * term * g
        over = tuple(i for i in range(v.ndim) if np.ndim(s) == 0 or np.shape(s)[i] == 1)
        out["ds"] = ds.sum(axis=over, keepdims=np.ndim(s) > 0)
    return out


def lsq_step(v, high):
    """``s = 2 mean|v| / sqrt(Q_P)``."""
    return 2 * np.abs(v).mean() / np.sqrt(high)


def haar_matrix(n, levels):
    """Analysis matrices of the bands ``[low, high_1, ...]`` of ``n`` numbers (one_model_for_all.md section 3): an odd
    length is padded with a zero."""
    low, bands = np.eye(n), []
    for _ in range(levels):
        if len(low) % 2:
            low = np.vstack([low, np.zeros((1, n))])
        bands.append((low[0::2] - low[1::2]) / np.sqrt(2))
        low = (low[0::2] + low[1::2]) / np.sqrt(2)
    return [low, *bands]


def one_model_weight(w, bits, step, gains=None, groups=1, grad=None):
    """one_model_for_all.md sections 3 and 4, two bits and more, for filters along the first axis: ``gains`` has one
    number per band, or a row of them per filter. Gradients of weight, step and gains."""
    inputs = w.shape[1] // groups if w.ndim > 1 else 1
    blocks = w.reshape(len(w), groups, inputs, -1)
    mix = np.broadcast_to(np.eye(inputs), (len(w), inputs, inputs))
    if gains is not None:
        bands = haar_matrix(inputs, np.shape(gains)[-1] - 1)
        each = np.broadcast_to(gains, (len(w), len(bands)))
        mix = np.stack([sum(g * band.T @ band for g, band in zip(row, bands, strict=True)) for row in each])
    latent = np.einsum("cij,cgjs->cgis", mix, blocks).reshape(w.shape)
    high = 2 ** (bits - 1) - 1
    s = np.reshape(step, [-1] + [1] * (w.ndim - 1))
    r = lsq(latent, s, -high - 1, high, 1 / np.sqrt(w.size / np.size(step) * high), grad)
    dlatent = r["dv"].reshape(blocks.shape)
    dgains = None
    if gains is not None:
        inner = [np.einsum("kj,cgjs->cgks", b, blocks) * np.einsum("kj,cgjs->cgks", b, dlatent) for b in bands]
        dgains = np.stack([i.sum((1, 2, 3)) for i in inner], 1)
        dgains = dgains if np.ndim(gains) > 1 else dgains.sum(0)
    dw = np.einsum("cji,cgjs->cgis", mix, dlatent).reshape(w.shape)
    return r["vq"], dw, r["ds"].reshape(-1), dgains


def minmax_weight(w, bits, axis=0, per_channel=True):
    n = 2 ** (bits - 1) - 1
    over = tuple(i for i in range(w.ndim) if i != axis) if per_channel else None
    s = np.maximum(np.abs(w).max(axis=over, keepdims=True) / n, 1e-12)
    return np.clip(np.round(w / s), -n, n) * s


# --------------------------------------------------------------------------------------------------------------------
# BiTAT
# --------------------------------------------------------------------------------------------------------------------
def bitat_weight(w, alpha, grad=None):
    """bitat.md section 4.1 for filters along the first axis: ``alpha`` has one number per filter, or one."""
    signs = np.where(w >= 0, 1.0, -1.0)
    a = np.broadcast_to(np.reshape(alpha, [-1] + [1] * (w.ndim - 1)), w.shape)
    out = dict(what=a * signs)
    if grad is not None:
        out["dtheta"] = np.where(np.abs(w) <= 1, grad, 0.0)
        per_filter = (grad * signs).reshape(len(w), -1).sum(1)
        out["dalpha"] = per_filter if np.size(alpha) > 1 else per_filter.sum(keepdims=True)
    return out


def bitat_activation(x, beta, grad=None):
    """bitat.md section 5; ``beta`` has one number per channel (axis 1), or one."""
    view = np.reshape(beta, [1, -1] + [1] * (x.ndim - 2)) if np.size(beta) > 1 else float(np.ravel(beta)[0])
    u = x + view
    out = dict(xhat=np.where(u >= 0, 1.0, -1.0))
    if grad is not None:
        out["dx"] = grad * np.where(np.abs(u) < 1, 2 - 2 * np.abs(u), 0.0)
        over = tuple(i for i in range(x.ndim) if i != 1) if np.size(beta) > 1 else None
        out["dbeta"] = np.reshape(out["dx"].sum(axis=over), -1)
    return out


def bitat_metric(x, eps=1e-4):
    """``M``, lambda_bar and mu of bitat.md sections 3.1 to 3.3 for rows ``x`` (N x d), without eigenvectors' signs."""
    mu = x.mean(0)
    sigma = (x - mu).T @ (x - mu) / len(x)
    values, vectors = np.linalg.eigh(sigma)
    level = np.trace(sigma) / len(sigma)
    return vectors @ np.diag(np.maximum(values / level, eps)) @ vectors.T, level, mu


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def categorical(x, alpha, sigma, low, high, truncated=True):
    """pi of dropbits.md section 3.1 (stable form) and its derivatives by x, alpha and sigma (section 4.1, closed
    forms), all of the shape of ``x`` with one more axis for the points; and the points."""
    k = np.arange(low, high + 1, dtype=np.float64)
    r = np.asarray(x, dtype=np.float64)[..., None]
    a, b = (alpha * (k - 0.5) - r) / sigma, (alpha * (k + 0.5) - r) / sigma
    below, above = np.exp(log_sigmoid(a)), np.exp(log_sigmoid(-b))
    logits = log_sigmoid(b) + log_sigmoid(-a)
    dl = {
        "x": (below - above) / sigma,
        "alpha": ((k + 0.5) * above - (k - 0.5) * below) / sigma,
        "sigma": (a * below - b * above) / sigma,
    }
    if truncated:
        pi = np.exp(logits - logits.max(-1, keepdims=True))
        pi /= pi.sum(-1, keepdims=True)
        return pi, {n: pi * (d - (pi * d).sum(-1, keepdims=True)) for n, d in dl.items()}, k
    e = np.exp(-alpha / sigma)
    pi = np.exp(logits) * (1 - e)
    c = {"x": 0.0, "alpha": e / (1 - e) / sigma, "sigma": -alpha / sigma**2 * e / (1 - e)}
    return pi, {n: pi * (d + c[n]) for n, d in dl.items()}, k


def cpq(x, alpha, sigma, low, high, grad, estimator="imax", truncated=True, mask=None, rule="expected"):
    """Quantizer of dropbits.md sections 3.3 to 4.2, all points at once.

    :return: dict with ``out``, ``codes``, ``dx``, ``dalpha``, ``dsigma`` and, with ``mask``, ``dmask``.
    """
    pi, dpi, k = categorical(x, alpha, sigma, low, high, truncated)
    if mask is None:
        codes = np.clip(np.round(x / alpha), low, high)
    else:
        codes = k[np.where(mask > 0, mask * pi, -1).argmax(-1)]
    hard, out = (k == codes[..., None]).astype(float), {"codes": codes, "out": alpha * codes}
    g = grad[..., None]
    if mask is not None:
        m = mask
        if rule == "expected":
            mass = np.maximum((m * pi).sum(-1, keepdims=True), 1e-6)
            kept = (m * pi).sum(-1, keepdims=True) >= 1e-6
            p = m * pi / mass
            ge = (alpha * k * p).sum(-1, keepdims=True)
            out["dmask"] = (g * pi * (alpha * k - kept * ge) / mass).reshape(-1, k.size).sum(0)
            dpi = {n: m * d / mass - kept * p * (m * d).sum(-1, keepdims=True) / mass for n, d in dpi.items()}
        else:
            chosen = 1.0 if estimator == "full" else hard
            out["dmask"] = (g * alpha * k * pi * chosen).reshape(-1, k.size).sum(0)
            dpi = {n: m * d for n, d in dpi.items()}
    if estimator == "ste":
        r = x / alpha
        inside = (r >= low) & (r <= high)
        out.update(dx=grad * inside, dalpha=(grad * (codes - np.clip(r, low, high) * inside)).sum(), dsigma=0.0)
        return out
    y = hard if estimator == "imax" else 1.0
    by = {n: (alpha * k * y * d).sum(-1) for n, d in dpi.items()}
    out.update(
        dx=grad * by["x"], dalpha=(grad * (codes + by["alpha"])).sum(), dsigma=(grad * by["sigma"]).sum()
    )  # fmt: skip
    return out


def direct_weight(z, basis, grad, normalized=False):
    """direct.md sections 3.2 and 4, weight by weight.

    :param z: K x C x n.
    :param basis: K x C or K x 1, or one row ``a`` for the tied ``a, 2a, 4a, ...``.
    :param grad: C x n, dL/dw_q.
    :return: w_q (C x n), dz, dbasis.
    """
    bits, channels, count = z.shape
    tied = len(basis) < bits
    v = np.stack([basis[0] * 2**k for k in range(bits)]) if tied else basis
    out, dz, dv = np.zeros((channels, count)), np.zeros_like(z), np.zeros_like(v)
    for o in range(channels):
        column = min(o, v.shape[1] - 1)
        gap = 2 * v[:, column].sum() / (2**bits - 1)
        for i in range(count):
            for k in range(bits):
                b = 1.0 if z[k, o, i] >= 0 else -1.0
                out[o, i] += v[k, column] * b
                dv[k, column] += grad[o, i] * b
                factor = 2 / gap if normalized else v[k, column]
                dz[k, o, i] = grad[o, i] * factor if abs(z[k, o, i]) <= 1 else 0.0
    return out, dz, (np.array([sum(2**k * dv[k] for k in range(bits))]) if tied else dv)


def direct_levels(basis, bits, signed, tied):
    """Ascending levels of section 5.1; those of a free basis carried by integers of 16 bits (sign included)."""
    v = np.array([basis[0] * 2**k for k in range(bits)]) if tied else basis
    levels = []
    for code in range(2**bits):
        digits = [(code >> k) & 1 for k in range(bits)]
        levels.append(sum(v[k] * (2 * d - 1 if signed else d) for k, d in enumerate(digits)))
    levels = np.sort(np.array(levels))
    if tied:
        return levels
    step = v.sum() / (2 ** (15 if signed else 16) - 1)
    return np.round(levels / step) * step


def direct_activation(x, levels, signed, grad):
    """Forward and backward of section 5.1 by counting thresholds."""
    thresholds = (levels[1:] + levels[:-1]) / 2
    out = levels[(x[..., None] > thresholds).sum(-1)]
    inside = x <= levels[-1]
    return out, grad * (inside & (x >= levels[0]) if signed else inside)


def dorefa_weight(w, bits, restore=False, grad=None):
    """DoReFa of baselines.md sections 3 and 4: ``2 q(tanh w / (2 max) + 1/2) - 1``, gradient through tanh and max."""
    if bits == 1:
        return dict(wq=np.where(w < 0, -1.0, 1.0) * np.abs(w).mean(), dw=grad)
    n, t = 2**bits - 1, np.tanh(w)
    m = np.abs(t).max()
    q = 2 * np.round(n * (t / (2 * m) + 0.5)) / n - 1
    out = dict(wq=q * (m if restore else 1.0))
    if grad is not None:
        slope, top = 1 - t**2, np.abs(t) == m
        dm = np.where(top, np.sign(t) * slope, 0) / top.sum()
        if restore:  # m q(t/m), straight through q
            out["dw"] = grad * slope + (grad * (q - t / m)).sum() * dm
        else:
            out["dw"] = grad * slope / m - (grad * t).sum() / m**2 * dm
    return out


def pact(x, alpha, bits, signed=False, grad=None):
    """PACT of baselines.md section 5; signed: the symmetric clip of this project."""
    n = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    low = -alpha if signed else 0.0
    y = np.clip(x, low, alpha)
    out = dict(xq=np.round(y * n / alpha) * alpha / n)
    if grad is not None:
        out["dx"] = grad * ((x > low) & (x < alpha))
        out["dalpha"] = (grad * ((x >= alpha) * 1.0 - (signed & (x <= low)) * 1.0)).sum()
    return out


def lsq_plus_activation(x, s, beta, bits, rounded=True, g=1.0, grad=None):
    """LSQ+ of baselines.md sections 3 to 5; ``rounded``: the offset is a whole number of steps."""
    n = 2**bits - 1
    offset = np.round(beta / s) if rounded else beta / s
    r = x / s - offset
    c = np.clip(r, 0, n)
    out = dict(xq=(np.round(c) + offset) * s)
    if grad is not None:
        inside = (r > 0) & (r < n)
        out["dx"] = grad * inside
        out["ds"] = (grad * np.where(inside, np.round(c) - r, c)).sum() * g
        out["dbeta"] = (grad * ~inside).sum() * g
    return out


def soft_steps(x, alpha, beta, b, levels, temperature, mode="true", cap=np.inf, grad=None, hard=False, strict=False):
    """quantization_networks.md sections 3 and 4: one n-dimensional array of all sigmoids, the printed formulas.

    ``hard``: the forward counts steps; the gradients stay those of the soft function.
    """
    levels = np.asarray(levels, float)
    s, t = np.diff(levels), min(temperature, cap)
    distance = beta * x[..., None] - b
    soft = sigmoid(np.clip(t * distance, -10, 10))
    steps = ((distance > 0) if strict else (distance >= 0)).astype(float) if hard else soft
    out = dict(y=alpha * (steps @ s + levels[0]))
    if grad is not None:
        g = soft if mode == "true" else sigmoid(np.clip(distance, -10, 10))
        d = t * ((g * (1 - g)) @ s)
        out["dx"] = grad * alpha * beta * d
        out["dalpha"] = (grad * (soft @ s + levels[0])).sum()
        out["dbeta"] = (grad * alpha * x * d).sum()
    return out


def squantize(w, bits, sigma=0.0, grid="paper", mask=None, grad=None):
    """squantizer.md sections 3, 4 and 8 (options A and B); ``mask``: of another sparsity algorithm."""
    a, n = np.abs(w), 2 ** (bits - 1) - 1
    if mask is not None:
        t = a[mask].min()
    elif sigma is None:
        t, mask = 0.0, np.ones(w.shape, bool)
    else:
        t = min(max(a.mean() + sigma * (a.std(ddof=1) if a.size > 1 else 0.0), 0.0), a.max())
        mask = a >= t
    mn, mx = (0.0 if sigma is None else t), a.max()
    if n == 1 and sigma is not None:
        kept = a[mask]
        mn = kept.mean()
        mx = mn + 2 * (kept.std(ddof=1) if kept.size > 1 else 0.0)
    out = dict(t=t, mask=mask, mn=mn, mx=mx)
    if grid == "aligned" and sigma is not None:
        first = 127 - n if mx - mn < 1e-6 * mx else np.clip(np.round(mn * n / (mx - mn)), 1, 127 - n)
        d = mx / (first + n)
        q = np.clip(np.round(a / d), first, first + n) * d
    else:
        span = mx - mn
        q = mn + (np.round(n * np.clip((a - mn) / span, 0, 1)) / n * span if span > 1e-6 * mx else 0.0)
    out["wq"] = np.sign(w) * mask * q
    if grad is not None:
        out["dw"] = grad * mask
    return out


def apot_levels(bits, signed):
    """Magnitudes of baselines.md section 3 as fractions of the largest, by sums over the sets that it names."""
    sets = {
        1: ([0, 1],),
        2: ([0, 1 / 2, 1 / 4, 1 / 8],),
        3: ([0, 1 / 2, 1 / 4, 1 / 16], [0, 1 / 8]),
        4: ([0, 2**-1, 2**-3, 2**-5], [0, 2**-2, 2**-4, 2**-6]),
        5: ([0, 2**-1, 2**-3, 2**-6], [0, 2**-2, 2**-4, 2**-7], [0, 2**-5]),
    }[bits - 1 if signed else bits]
    sums = np.zeros(1)
    for terms in sets:
        sums = (sums[:, None] + np.array(terms, dtype=np.float64)).reshape(-1)
    grid = np.unique(sums) / sums.max()
    return np.unique(np.concatenate([-grid, grid])) if signed else grid


def apot_project(x, alpha, levels, grad, clip_x=True):
    """``alpha P(clip(x / alpha))`` with section 4's gradients of ``x`` and ``alpha``."""
    u = x / alpha
    clipped = np.clip(u, levels[0], levels[-1])
    q = levels[np.abs(clipped[..., None] - levels).argmin(-1)]
    inside = u == clipped
    dalpha = float((grad * np.where(inside, q - u, clipped)).sum())
    return q * alpha, (grad * inside if clip_x else grad), dalpha


def apot_weight(w, alpha, bits, restore, grad):
    """baselines.md sections 3, 4 and 10: the gradient passes through mean and deviation."""
    n, mean, std = w.size, w.mean(), w.std(ddof=1)
    wn = (w - mean) / std
    levels = apot_levels(bits, True)
    if restore:  # w - mean on a grid whose clip is alpha std
        out, dx, dclip = apot_project(w - mean, alpha * std, levels, grad, bits > 2)
        return out, dx - dx.mean() + dclip * alpha * wn / (n - 1), dclip * std
    out, dx, dalpha = apot_project(wn, alpha, levels, grad, bits > 2)
    return out, (dx - dx.mean() - wn * (dx * wn).sum() / (n - 1)) / std, dalpha


def lq_nets_weight(rows, basis):
    """Nearest of the levels ``v^T e`` row by row, ``e`` in {-1, +1}^K; a tie goes to the lower level."""
    bits = len(basis)
    signs = np.array([[1 if c >> k & 1 else -1 for k in range(bits)] for c in range(2**bits)])
    out = np.empty_like(rows)
    for i, row in enumerate(rows):
        levels = np.sort(signs @ basis[:, i if basis.shape[1] > 1 else 0])
        out[i] = levels[np.abs(row[:, None] - levels).argmin(1)]
    return out


def daq_mid_rise(u, step, half):
    """daq.md section 2: ``M(u; D, L)``."""
    return np.clip(step * (np.round(u / step + 0.5) - 0.5), -(half - 0.5) * step, (half - 0.5) * step)


def daq_weight(w, bits, optimal):
    """daq.md section 3: one unbiased deviation, the step of the table one bit below unless ``optimal``."""
    table = [2.0, 1.596, 0.996, 0.586, 0.335, 0.188, 0.104, 0.057, 0.031]
    step = table[bits if optimal else bits - 1] * w.std(ddof=1)
    return daq_mid_rise(w, step, 2 ** (bits - 1)) if step > 0 else np.zeros_like(w)


def slb_weight(logits, scale, temperature, grad, hard):
    """slb.md sections 3 and 4, rows C x n of logits C x n x m; ``scale`` is the value of the outermost level."""
    m = logits.shape[-1]
    v = -1 + 2 * np.arange(m) / (m - 1)
    e = np.exp(temperature * (logits - logits.max(-1, keepdims=True)))
    p = e / e.sum(-1, keepdims=True)
    soft = (p * v).sum(-1)
    out = v[logits.argmax(-1)] if hard else soft
    da = temperature * p * (v - soft[..., None]) * (grad * scale[:, None])[..., None]
    return out * scale[:, None], da


# --------------------------------------------------------------------------------------------------------------------
# GPFQ
# --------------------------------------------------------------------------------------------------------------------
def gpfq_weight(w, step, bits, alphabet, mode, threshold):
    """gpfq.md section 3: the quantizer Q of each mode on the weight itself (nothing is random there)."""
    k = 2 ** (bits - 1) - (0 if alphabet == "authors" else 2 if mode == "l0" else 1)
    magnitude = np.abs(w)
    if mode == "l0":
        above = np.minimum(np.floor((magnitude - threshold) / step + 0.5), k)
        return np.where(magnitude > threshold, np.sign(w) * (threshold + step * above), 0.0)
    if mode == "l1":
        w = np.sign(w) * np.maximum(magnitude - threshold, 0)
    codes = np.floor(w / step + 0.5)
    return np.sign(codes) * np.minimum(np.abs(codes), k) * step


def sdq_weight(w, alpha, bits, powers=False, tau=None, ratio=None, keep_zeros=False, grad=None):
    """sdq.md sections 3 and 4, with the gradient's factor of section 4; powers of two by their logarithm."""
    n = 2 ** (bits - 1) - 1
    s = max(w[w != 0].std() if keep_zeros else w.std(), 1e-8)
    c = alpha * s
    u = np.clip(w / c, -1, 1)
    if powers:
        with np.errstate(divide="ignore"):
            j = np.clip(np.round(-np.log2(np.abs(u))), 0, n - 1)
        q, threshold = np.sign(w) * 2.0**-j, c * 2.0 ** (1 - n) / np.sqrt(2)
    else:
        q, threshold = np.round(n * u) / n, 0.0
    if not keep_zeros and tau is not None:
        threshold = tau * s
    if not keep_zeros and ratio is not None:
        threshold = np.sort(np.abs(w), axis=None)[int(ratio * w.size)]
    q = np.where(np.abs(w) < threshold, 0.0, q)
    dalpha = s * (grad * (q - w / c * (np.abs(w) < c))).sum() / np.sqrt(w.size * n)
    return {"wq": c * q, "dw": grad * (np.abs(w) <= c), "dalpha": dalpha}


def sdq_activation(x, alpha, sigma, bits, signed, grad):
    """sdq.md section 5, with the gradient's factor of section 4."""
    n = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    c, low = alpha * sigma, -1.0 if signed else 0.0
    q = np.round(n * np.clip(x / c, low, 1)) / n
    inside = (x >= low * c) & (x <= c)
    dalpha = sigma * (grad * (q - x / c * inside)).sum() / np.sqrt(x.size / x.shape[0] * n)
    return {"xq": c * q, "dx": grad * inside, "dalpha": dalpha}
