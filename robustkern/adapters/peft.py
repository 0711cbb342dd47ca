"""LoRA adapters by their products: exact distances of B A in r-space, and a concatenated adapter of what has weight.

The median of all A and of all B is not the median of the products. But inner products of products need no product:
``<B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T))``, for any ranks. So every rule that is built on distances and
averages gives weights, and the weighted sum of the products is exactly an adapter: the A of the rows with weight one
below the other, and their B, by weight, side by side.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import is_torch_array
from numpy.typing import ArrayLike, NDArray

from robustkern.contract.rows import Vector
from robustkern.errors import brief, plain
from robustkern.inputs.arrays import array_view
from robustkern.products import weights_of
from robustkern.rules import Aggregator

__all__ = ["aggregate_lora", "aggregate_lora_folders", "lora_gram"]

Adapter = Mapping[str, Any]
_A, _B = ".lora_A.", ".lora_B."
_OWN = ("r", "lora_alpha", "use_rslora")  # settings that adapters need not share
MAX_CONFIG = 1 << 20  # bytes of an adapter's settings


def _factors(adapter: Adapter, row: int) -> dict[str, tuple[str, str]]:
    """Return the keys of A and B of each module."""
    found = {}
    for key in adapter:
        if _A in key:
            other = key.replace(_A, _B)
            if other not in adapter:
                raise ValueError(f"adapter {row} has {plain(key, 100)} and no {plain(other, 100)}")
            found[key.replace(_A, ".")] = key, other
        elif _B not in key or key.replace(_B, _A) not in adapter:
            raise ValueError(
                f"adapter {row} has {plain(key, 100)}, which is no pair of lora_A and lora_B (leave it out)"
            )
    if not found:
        raise ValueError(f"adapter {row} holds no lora_A and lora_B")
    return found


def _checked(adapters: Sequence[Adapter]) -> list[dict[str, tuple[NDArray[Any], NDArray[Any]]]]:
    """Return A and B of each module of each adapter, in float64; raise where one has other modules or shapes."""
    if isinstance(adapters, (str, bytes, Mapping)) or not isinstance(adapters, Sequence) or not adapters:
        raise TypeError(f"adapters: expected a list of mappings with lora_A and lora_B; got {type(adapters).__name__}")
    rows = []
    for i, adapter in enumerate(adapters):
        pairs = {}
        for name, keys in _factors(adapter, i).items():
            a, b = (np.asarray(array_view(adapter[key], f"adapter {i}, {key}")) for key in keys)
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"adapter {i}, {plain(name, 100)}: A of shape {a.shape} and B of {b.shape} have no product"
                )
            if a.dtype.kind in "iubc" or b.dtype.kind in "iubc":
                raise TypeError(
                    f"adapter {i}, {plain(name, 100)}: A has dtype {a.dtype} and B {b.dtype}; expected floats"
                )
            if a.shape[0] > min(a.shape[1], b.shape[0]):  # whose sender would decide what a call costs
                raise ValueError(
                    f"adapter {i}, {plain(name, 100)}: rank {a.shape[0]} is above what its product can have"
                )
            pairs[name] = a.astype(np.float64), b.astype(np.float64)
        rows.append(pairs)
    shapes = [tuple((name, b.shape[0], a.shape[1]) for name, (a, b) in sorted(row.items())) for row in rows]
    usual = Counter(shapes).most_common(1)[0][0]
    for i, found in enumerate(shapes):
        if found != usual:
            name = sorted(set(found) ^ set(usual))[0][0]
            raise ValueError(f"adapter {i} has other modules or shapes than most, first in {plain(name, 100)}")
    return rows


def lora_gram(adapters: Sequence[Adapter], *, scalings: ArrayLike | None = None) -> NDArray[np.float64]:
    """Return (n, n) inner products of the adapters' products, over all modules.

    Parameters
    ----------
    adapters : sequence of n mappings
        Of names ending in ``.lora_A.weight`` (r, in) and ``.lora_B.weight`` (out, r), NumPy or torch; ranks may differ.
    scalings : (n,) array_like, optional
        What each product is multiplied by, such as ``lora_alpha / r``; by default 1.

    Returns
    -------
    (n, n) float64
        O(n^2 r^2 (in + out)) operations a module; no product is ever formed.
    """
    rows = _checked(adapters)
    scale = _scales(rows, scalings)
    gram = np.zeros((len(rows), len(rows)))
    with np.errstate(all="ignore"):
        for name in rows[0]:
            for i, row in enumerate(rows):
                for j in range(i + 1):
                    (a, b), (c, d) = row[name], rows[j][name]
                    gram[i, j] += ((b.T @ d) * (a @ c.T)).sum() * scale[i] * scale[j]
    return np.asarray(np.tril(gram) + np.tril(gram, -1).T)


def _scales(rows: Sequence[Any], scalings: ArrayLike | None) -> Vector:
    scale = np.ones(len(rows)) if scalings is None else np.asarray(scalings, dtype=np.float64)
    if scale.shape != (len(rows),) or not np.isfinite(scale).all():
        raise ValueError(f"scalings: expected {len(rows)} finite numbers; got {brief(scalings)}")
    return scale


def aggregate_lora(
    adapters: Sequence[Adapter],
    rule: Aggregator | str,
    /,
    *,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    scalings: ArrayLike | None = None,
    seed: int | None = None,
) -> tuple[dict[str, Any], Vector]:
    """Combine n LoRA adapters, of any ranks, into one.

    Parameters
    ----------
    adapters, scalings
        As for `lora_gram`.
    rule : rule object or str
        Built on distances and averages, see `robustkern.weights_of`.
    f, delta, weights, seed
        As for `robustkern.aggregate`.

    Returns
    -------
    adapter : dict
        Like adapter 0 in names, dtypes and library, of scaling 1; its rank is the sum of the ranks of the adapters that
        have weight.
    weights : (n,) float64
        Of the adapters in it; 0 for those that hold NaN or Inf.

    Raises
    ------
    TypeError, ValueError, NonFiniteError
        As `robustkern.weights_of`; and where adapters differ in modules or shapes, or hold anything else.

    Examples
    --------
    >>> import numpy as np
    >>> from robustkern.adapters.peft import aggregate_lora
    >>> def adapter(x):
    ...     return {"q.lora_A.weight": np.array([[1.0, x]]), "q.lora_B.weight": np.array([[1.0], [0.0]])}
    >>> merged, weights = aggregate_lora([adapter(x) for x in (1, 2, 2, 90)], "multi_krum(m=2)", f=1)
    >>> merged["q.lora_B.weight"] @ merged["q.lora_A.weight"]
    array([[1., 2.],
           [0., 0.]])
    """
    rows = _checked(adapters)
    scale = _scales(rows, scalings)
    shares = weights_of(rule, lora_gram(adapters, scalings=scalings), f=f, delta=delta, weights=weights, seed=seed)
    kept = np.flatnonzero(shares)
    merged: dict[str, Any] = {}
    for name, (key_a, key_b) in _factors(adapters[0], 0).items():
        below = np.concatenate([rows[i][name][0] for i in kept])
        beside = np.concatenate([rows[i][name][1] * (shares[i] * scale[i]) for i in kept], axis=1)
        merged[key_a] = _like(below, adapters[0][key_a])
        merged[key_b] = _like(beside, adapters[0][key_b])
    return merged, shares


def _like(x: NDArray[Any], other: Any) -> Any:
    if is_torch_array(other):
        import torch

        return torch.from_numpy(x).to(dtype=other.dtype, device=other.device)
    return x.astype(np.asarray(array_view(other, "adapter 0")).dtype)


def aggregate_lora_folders(
    paths: Sequence[str | Path],
    rule: Aggregator | str,
    /,
    *,
    out: str | Path,
    f: int | None = None,
    delta: float | None = None,
    weights: ArrayLike | None = None,
    seed: int | None = None,
) -> Vector:
    """Combine adapter folders of PEFT (``adapter_config.json``, ``adapter_model.safetensors``) into a new one.

    Parameters
    ----------
    paths : sequence of n folders
        Of adapters of one model; ranks and ``lora_alpha`` may differ.
    rule, f, delta, weights, seed
        As for `aggregate_lora`.
    out : path
        A folder that does not exist yet. Its settings are those that most adapters share, but for `r`, `lora_alpha`
        and `use_rslora`: never those of one.

    Returns
    -------
    (n,) float64
        Weights of the adapters.

    Raises
    ------
    TypeError, ValueError, NonFiniteError, FileExistsError, OSError
        As `aggregate_lora`; and where `out` exists, or settings cannot be read or ask for ranks by module.
    """
    from safetensors.numpy import save_file

    target = Path(out)
    if target.exists():
        raise FileExistsError(f"out: {plain(str(out), 200)} exists (pass a new folder)")
    configs = [_config(Path(path)) for path in paths]
    adapters = [_tensors(Path(path) / "adapter_model.safetensors") for path in paths]
    for path, config, adapter in zip(paths, configs, adapters, strict=True):
        if any(x.shape[:1] != (config["r"],) for key, x in adapter.items() if _A in key):
            raise ValueError(f"{plain(str(path), 200)}: its rank r={config['r']} is not that of its lora_A")
    scalings = [_scaling(config) for config in configs]
    options = {"f": f, "delta": delta, "weights": weights, "seed": seed}
    merged, shares = aggregate_lora(adapters, rule, scalings=scalings, **options)  # type: ignore[arg-type]
    kept = np.flatnonzero(shares)
    rank = sum(int(configs[i]["r"]) for i in kept)
    shared = [{key: value for key, value in config.items() if key not in _OWN} for config in configs]
    texts = [json.dumps(config, sort_keys=True) for config in shared]
    settings = shared[texts.index(Counter(texts).most_common(1)[0][0])]
    settings |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
    target.mkdir(parents=True)
    save_file(merged, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return shares


def _tensors(file: Path) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found: dict[str, NDArray[Any]] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{plain(str(file), 200)} cannot be read: {plain(str(error), 200)}") from None
    return found


def _config(path: Path) -> dict[str, Any]:
    file = path / "adapter_config.json"
    name = plain(str(file), 200)
    if not file.is_file():
        raise ValueError(f"{name}: no such file (name folders of LoRA adapters, as PEFT writes them)")
    if file.stat().st_size > MAX_CONFIG:
        raise ValueError(f"{name} has more than {MAX_CONFIG} bytes")
    try:
        config = json.loads(file.read_text())
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is no JSON") from None
    if not isinstance(config, dict) or type(config.get("r")) is not int or not 0 < config["r"] < 1 << 20:
        raise ValueError(f"{name} has no rank r")
    for key in ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save"):
        if config.get(key):
            raise ValueError(f"{name} has {key}, which cannot be concatenated")
    return config


def _scaling(config: Mapping[str, Any]) -> float:
    alpha, r = config.get("lora_alpha", 8), config["r"]
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= 1e9:
        raise ValueError(f"lora_alpha must be a number; got {brief(alpha)}")
    return float(alpha / (math.sqrt(r) if config.get("use_rslora") else r))
