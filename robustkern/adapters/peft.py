"""Folders of LoRA adapters as PEFT writes them: their settings, which decide what their numbers mean."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import ArrayLike, NDArray

from robustkern.adapters import needs
from robustkern.adapters.lora import A, aggregate_lora, checked, combined, lora_gram
from robustkern.contract.rows import Vector
from robustkern.errors import brief, plain
from robustkern.files.pieces import check_bad_option
from robustkern.files.workers import Worker, distinct
from robustkern.rules import Aggregator
from robustkern.rules.base import as_aggregator

__all__ = ["aggregate_lora", "aggregate_lora_folders", "lora_gram"]

TENSORS = "adapter_model.safetensors"
MAX_CONFIG = 1 << 20  # bytes of an adapter's settings
#: Settings of PEFT 0.21 that adapters need not share: the result has its own.
OWN = ("r", "lora_alpha", "use_rslora", "init_lora_weights")
#: Those that change nothing of what an adapter adds to its model.
NOTES = (
    "base_model_name_or_path", "revision", "lora_dropout", "inference_mode", "auto_mapping", "peft_version",
    "task_type", "runtime_config", "megatron_core", "eva_config", "lora_ga_config",
)  # fmt: skip
#: Those that say where it is added, in the result as in most adapters; PEFT writes sets in any order.
PLACES = (
    "peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters",
    "fan_in_fan_out", "layer_replication", "alora_invocation_tokens", "ensure_weight_tying", "qalora_group_size",
)  # fmt: skip
SETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
#: What `bias` and `init_lora_weights` may be: others change the model when an adapter is loaded.
KEPT = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica", "lora_ga")}


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
    bad: str = "error",
) -> Vector:
    """Combine adapter folders of PEFT (``adapter_config.json``, ``adapter_model.safetensors``) into a new one.

    Parameters
    ----------
    paths : sequence of n folders
        Of adapters of one model; ranks and ``lora_alpha`` may differ.
    rule, f, delta, weights, seed
        As for `aggregate_lora`.
    out : path
        A folder that does not exist yet. Each of its settings is what more than half of the adapters say, but for
        `r`, `lora_alpha`, `use_rslora` and `init_lora_weights`; notes (the base model's place, dropout) of which no
        more than half say the same are left out.
    bad : {"error", "count"}
        What a folder is that cannot be read, whose settings ask for more than products, whose adapter is bad for
        `aggregate_lora`, or is the same file as another one's: an error, or one of the f that may be bad, with a
        warning that says why.

    Returns
    -------
    (n,) float64
        Weights of the adapters, 0 for bad ones.

    Raises
    ------
    TypeError, ValueError, NonFiniteError, FileExistsError, OSError
        As `aggregate_lora`; where `out` exists; and where settings cannot be read, differ, or ask for more than
        ``B @ A`` on the model as it is (ranks by module, DoRA, biases, an initialisation that changes the model), and
        are not counted.
    """
    with needs("cli"):
        from safetensors.numpy import save_file

    check_bad_option(bad, as_aggregator(rule))
    target = Path(out)
    if target.exists():
        raise FileExistsError(f"out: {plain(str(out), 200)} exists (pass a new folder)")
    read: list[Folder] = []
    unread: dict[int, str] = {}
    workers = distinct([Worker(Path(path).name, Path(path), (Path(path) / TENSORS,)) for path in paths])
    for i, (path, worker) in enumerate(zip(map(Path, paths), workers, strict=True)):
        try:
            if worker.wrong is not None:
                raise ValueError(worker.wrong)
            read.append(_read(path))
        except (OSError, ValueError) as error:
            if bad == "error":
                raise
            unread[i] = str(error)
            read.append(Folder({}, {}, 1.0))
    adapters = [folder.adapter for folder in read]
    rows = checked(adapters, bad, unread)
    merged, shares = combined(
        adapters, rows, rule, [folder.scaling for folder in read], f=f, delta=delta, weights=weights, seed=seed
    )
    rank = max(len(x) for key, x in merged.items() if A in key)
    settings = _agreed([folder.config for folder in read]) | {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    target.mkdir(parents=True)
    save_file(merged, target / TENSORS)
    (target / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return shares


class Folder(NamedTuple):
    """What an adapter's folder holds; nothing where it cannot be used."""

    config: dict[str, Any]
    adapter: dict[str, NDArray[Any]]
    scaling: float


def _read(path: Path) -> Folder:
    config = _config(path)
    adapter = _tensors(path / TENSORS)
    if any(x.shape[:1] != (config["r"],) for key, x in adapter.items() if A in key):
        raise ValueError(f"{plain(str(path), 200)}: its rank r={config['r']} is not that of its lora_A")
    return Folder(config, adapter, _scaling(path, config))


def _agreed(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what more than half of the adapters say of each setting, so that no few of them decide any."""
    settings = {}
    for key in sorted(set().union(*configs) - set(OWN)):
        values = [config.get(key) for config in configs]
        if key in SETS:
            values = [sorted(value, key=str) if isinstance(value, list) else value for value in values]
        text, count = Counter(json.dumps(value, sort_keys=True) for value in values).most_common(1)[0]
        if 2 * count > len(configs):
            settings[key] = json.loads(text)
        elif key not in NOTES:
            raise ValueError(f"no {plain(key, 100)} is what more than half of the adapters say in adapter_config.json")
    return settings


def _tensors(file: Path) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    name = plain(str(file), 200)
    if not file.is_file():
        raise ValueError(f"{name}: no such file (save_pretrained writes it; of .bin files load and save them again)")
    try:
        found: dict[str, NDArray[Any]] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{name} cannot be read: {plain(str(error), 200)}") from None
    except (AttributeError, KeyError, TypeError):  # of dtypes that it does not know, as NumPy does not
        raise ValueError(f"{name} cannot be read: it has a dtype that NumPy has not (save it in float32)") from None
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
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{name} is of peft_type {brief(config['peft_type'])}; expected LORA")
    for key, allowed in KEPT.items():
        value = config.get(key)
        if value is not None and not (isinstance(value, (str, bool)) and value in allowed):
            raise ValueError(
                f"{name} has {key}={brief(value)}, which changes the model beside the products (expected "
                f"{', '.join(map(str, allowed))}; path_initial_model_for_weight_conversion saves plain products)"
            )
    for key in config.keys() - {*OWN, *NOTES, *PLACES, *KEPT}:
        if config[key] is True or (not isinstance(config[key], (bool, int, float, type(None))) and config[key]):
            raise ValueError(
                f"{name} has {plain(key, 100)}, so that its products alone do not say what it does (leave it out)"
            )
    return config


def _scaling(path: Path, config: Mapping[str, Any]) -> float:
    alpha, r = config.get("lora_alpha", 8), config["r"]
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= 1e9:
        raise ValueError(f"{plain(str(path), 200)}: lora_alpha must be a number; got {brief(alpha)}")
    return float(alpha / (math.sqrt(r) if config.get("use_rslora") else r))
