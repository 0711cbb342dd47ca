"""Compare robustkern.adapters.peft with an installed PEFT: ``python peft_oracle.py [cases]``.

Random adapters, saved by PEFT: the merged folder, as PEFT loads it, must change the model by the rule of what each
adapter changes, as PEFT loads those. Then settings of PEFT one by one: right, or refused in one line.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import robustkern as rk
from robustkern.adapters.peft import aggregate_lora_folders
from robustkern.cli.commands import app

Array = NDArray[Any]
State = dict[str, Array]
OWN = ["mean", "krum", "multi_krum(m=2)", "geometric_median", "ctma(geometric_median)"]  # computed here as well
OTHERS = [
    "medoid", "mda", "faba", "cge", "monna", "rfa", "nnm | mean", "nnm | krum", "nnm | ctma(geometric_median)",
    "arc | geometric_median", "clipping(limit=3.0) | mean", "bucketing(size=2, seed=3) | geometric_median",
]  # fmt: skip


class Part(nn.Module):
    """What holds a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.up = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.up(x))


class Plain(nn.Module):
    """A layer that is a parameter."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.wall = nn.Parameter(torch.randn(*shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.wall if self.wall.ndim == 2 else self.wall[1]).T


class Base(nn.Module):
    """A little of all that PEFT puts LoRA on."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 24)
        self.body = nn.ModuleDict({"layers": nn.ModuleList(Part(nn.Linear(24, 24, bias=k != 1)) for k in range(3))})
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.mixed = Conv1D(18, 24)
        self.conv = nn.Conv2d(3, 5, 2)
        self.tall, self.experts = Plain(30, 18), Plain(3, 10, 18)
        self.head = nn.Linear(30, 7)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> Any:
        x = self.embed(tokens)
        for layer in self.body.layers:
            x = x + layer(x)
        x = self.mixed(x + self.attention(x, x, x)[0])
        y = self.conv(x.reshape(len(x), 3, 6, -1)).mean()
        return self.head(self.tall(torch.tanh(x))) + y + self.experts(x).mean()


def trained(model: Any, g: np.random.Generator, scale: float, bad: bool, own: bool) -> None:
    """Give an adapter values near those of all others, whatever its rank, or near its own."""
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" not in name:
                continue
            shared = np.random.default_rng(list(name.replace(".mine", ".default").encode()))
            shape = x.shape if x.ndim > 1 else (*x.shape, 1)
            whole = shared.standard_normal((80, 80, *shape[2:]))[tuple(slice(k) for k in shape)]
            noise = 0.1 * g.standard_normal(x.shape)
            factor = scale if "_B" in name else 0.3
            x.copy_(x + noise if own else torch.from_numpy((whole.reshape(x.shape) + noise) * factor))
            if bad and "_B" in name:
                x.view(-1)[0] = [np.nan, np.inf][int(g.integers(2))]


def saved(path: Path, g: np.random.Generator, options: dict[str, Any], scale: float = 1.0, bad: bool = False,
          name: str = "default", dtype: torch.dtype = torch.float32, safe: bool = True) -> Path:  # fmt: skip
    """Save a random adapter as PEFT does, and return its folder."""
    given = {k: v for k, v in options.items() if k != "base_model_name_or_path"}  # PEFT takes that from the model
    model = get_peft_model(Base(torch.float32), LoraConfig(**given), adapter_name=name)
    trained(model, g, scale, bad, bool({"init_lora_weights", "kasa_config", "use_dora"} & options.keys()))
    model.to(dtype).save_pretrained(path, safe_serialization=safe)
    if not safe:
        torch.save({k: v for k, v in model.state_dict().items() if "lora_" in k}, path / "adapter_model.bin")
    path = path if name == "default" else path / name
    if given != options:
        said(path, {"base_model_name_or_path": options["base_model_name_or_path"]})
    return path


def said(path: Path, settings: dict[str, Any]) -> None:
    """Change settings in a saved folder."""
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def effective(path: Path, base: Any, merge: bool = True) -> Any:
    """Return what PEFT makes of a model with an adapter: all of its weights, or the model itself."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), path)
    if not merge:
        return model.eval()
    return {k: v.detach().double().numpy() for k, v in model.merge_and_unload().state_dict().items()}


def own_weights(rule: str, rows: Array, f: int) -> Array:
    """Return weights of a rule, by its definition."""
    finite = np.isfinite(rows).all(axis=1)
    x, f = rows[finite], f - int((~finite).sum())
    n, found = len(x), np.zeros(len(rows))
    squares = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    if rule == "mean":
        shares = np.ones(n)
    elif "krum" in rule:
        scores = np.sort(squares, axis=1)[:, 1 : n - f - 1].sum(axis=1)
        shares = (np.argsort(np.argsort(scores)) < (1 if rule == "krum" else 2)).astype(float)
    else:
        y = np.median(x, axis=0)
        for _ in range(3000):
            shares = 1 / np.maximum(np.linalg.norm(x - y, axis=1), 1e-300)
            y = shares @ x / shares.sum()
        if rule.startswith("ctma"):
            away = np.linalg.norm(x - y, axis=1)
            shares = (np.argsort(np.argsort(away)) < n - f).astype(float)
    found[finite] = shares / shares.sum()
    return found


def difference(paths: Sequence[Path], out: Path, shares: Array, base: Any, digits: float = 1e-6) -> str:
    """Return where PEFT's model with the merged adapter is not the weighted sum of theirs, or nothing."""
    start = {k: v.detach().double().numpy() for k, v in base.state_dict().items()}
    kept = [(effective(p, base), s) for p, s in zip(paths, shares, strict=True) if s]
    got, want = effective(out, base), dict(start)
    for key, x in start.items():
        parts = [s * (state[key] - x) for state, s in kept]
        want[key] = x + sum(parts)
        bound = digits * max(float(np.abs(x).max()), sum(float(np.abs(p).max()) for p in parts))
        if not np.abs(got[key] - want[key]).max() <= bound:
            return f"{key} is off by {np.abs(got[key] - want[key]).max():.2g} of {np.abs(want[key] - x).max():.2g}"
    tokens = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(1))
    model = copy.deepcopy(base).eval()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in want.items()})
    with torch.no_grad():
        y, z = model(tokens), effective(out, base, merge=False)(tokens)
    if not torch.allclose(y, z, rtol=0, atol=100 * digits * float(y.abs().max())):
        return f"outputs are off by {(y - z).abs().max():.2g} of {y.abs().max():.2g}"
    single = effective(out, copy.deepcopy(base).float())
    for key, x in want.items():
        if not np.allclose(single[key], x, rtol=0, atol=20 * digits * np.abs(x).max()):
            return f"{key} differs in float32"
    return ""


def merged(paths: Sequence[Path], rule: str, f: int, out: Path, command: bool = False) -> Array:
    if not command:
        return aggregate_lora_folders(paths, rule, f=f, out=out)
    arguments = ["lora", *map(str, paths), "--rule", rule, "--f", str(f), "--out", str(out), "--json"]
    result = CliRunner().invoke(app, arguments)
    if result.exit_code:
        raise ValueError(result.stderr)
    return np.array(list(json.loads(result.stdout)["weights"].values()))


def random_cases(count: int) -> int:
    """Return how many random cases go wrong."""
    wrong, base = 0, Base()
    for case in range(count):
        g = np.random.default_rng(case)
        n = int(g.integers(5, 9))
        f = int(g.integers(0, (n - 3) // 2 + 1))
        rule = OWN[case % len(OWN)] if case % 2 else OTHERS[case // 2 % len(OTHERS)]
        targets: Any = [["layers.0.up", "layers.1.up"], ["mixed"], ["layers.2.up", "attention"], "all-linear",
                        r".*layers\.[02]\.up|head"][int(g.integers(5))]  # fmt: skip
        rslora = [bool(g.integers(2)) for _ in range(n)]
        dtype = [torch.float32, torch.float32, torch.float64][case % 3]
        with TemporaryDirectory() as folder:
            paths = []
            for k in range(n):
                options = {"r": int(g.integers(1, 8)), "lora_alpha": float(g.choice([0.5, 1, 4, 8, 16, 33])),
                           "use_rslora": rslora[k], "target_modules": targets, "fan_in_fan_out": targets == ["mixed"],
                           "exclude_modules": ["out_proj"] if targets == "all-linear" else None,
                           "lora_dropout": 0.1 * (case % 2)}  # fmt: skip
                hostile = k < f
                scale = 0.3 / options["lora_alpha"] * options["r"]
                scale *= float(g.choice([-1e6, 1e6, -3.0])) if hostile else 1.0
                bad = hostile and rule != "mean" and bool(g.integers(2))
                paths.append(saved(Path(folder, str(k)), g, options, scale, bad, ["default", "mine"][k % 2], dtype))
            order = g.permutation(n)
            paths = [paths[k] for k in order]
            found = f"case {case}: {rule}, n = {n}, f = {f}, {targets}"
            try:
                states = [effective(path, base) for path in paths]
                start = base.state_dict()
                with np.errstate(all="ignore"):
                    moved = [{k: s[k] - start[k].numpy() for k in sorted(s)} for s in states]
                    for change in moved:  # PEFT 0.21 merges the LoRA of an attention's out_proj twice
                        change["attention.out_proj.weight"] *= 0.5
                    rows = np.stack([np.concatenate([x.ravel() for x in change.values()]) for change in moved])
                shares = merged(paths, rule, f, Path(folder, "out"), command=case % 4 == 3)
                if rule in OWN:
                    expected = own_weights(rule, rows, f)
                else:
                    result, info = rk.aggregate(rows, rule, f=f, return_info=True)
                    expected = info.weights
                    used = np.where((shares != 0)[:, None], rows, 0.0)
                    if not np.allclose(shares @ used, result, rtol=1e-4, atol=1e-6 * np.abs(used).max()):
                        raise ValueError(f"the weighted sum is {np.abs(shares @ used - result).max():.2g} off")
                if expected is not None and not np.allclose(shares, expected, rtol=1e-5, atol=1e-7):
                    raise ValueError(f"weights {shares} are not {expected}")
                if problem := difference(paths, Path(folder, "out"), shares, base):
                    raise ValueError(problem)
            except Exception as error:
                wrong += 1
                print(f"{found}: {type(error).__name__}: {str(error)[:400]}")
    print(f"{count} random cases, {wrong} wrong")
    return wrong


def settings() -> list[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Return what is tried: a name, settings of each client, and how they are saved."""
    a = {"r": 4, "target_modules": ["layers.0.up", "layers.1.up"]}
    linear: list[tuple[str, dict[str, Any]]] = [
        ("plain", {}), ("DoRA", {"use_dora": True}), ("lora_bias", {"lora_bias": True, "target_modules": ["head"]}),
        ("bias=all", {"bias": "all"}), ("bias=lora_only", {"bias": "lora_only"}),
        ("modules_to_save", {"modules_to_save": ["head"]}), ("rank_pattern", {"rank_pattern": {"layers.1.up": 2}}),
        ("alpha_pattern", {"alpha_pattern": {"layers.1.up": 2}}), ("rslora", {"use_rslora": True}),
        ("embedding", {"target_modules": ["embed", "head"]}), ("conv2d", {"target_modules": ["conv"]}),
        ("attention", {"target_modules": ["attention"]}),
        ("Conv1D", {"target_modules": ["mixed"], "fan_in_fan_out": True}),
        ("Conv1D, fan_in_fan_out unset", {"target_modules": ["mixed"]}),
        ("Linear, fan_in_fan_out", {"fan_in_fan_out": True}),
        ("layers_to_transform", {"target_modules": ["up"], "layers_to_transform": [1]}),
        ("layers by pattern", {"target_modules": r".*layers\.\d\.up", "exclude_modules": ["layers.2.up"]}),
        ("exclude_modules", {"target_modules": "all-linear", "exclude_modules": ["head", "mixed", "out_proj"]}),
        ("trainable tokens", {"trainable_token_indices": {"embed": [1, 2]}}),
        ("target_parameters", {"target_modules": [], "target_parameters": ["tall.wall"]}),
        ("target_parameters of experts", {"target_modules": [], "target_parameters": ["experts.wall"]}),
        ("r=1", {"r": 1}), ("r above the layer's", {"r": 8, "target_modules": ["head"]}),
        ("revision", {"revision": "main"}), ("alpha 0", {"lora_alpha": 0}), ("alpha below 0", {"lora_alpha": -3}),
        ("ensure_weight_tying", {"ensure_weight_tying": True}), ("inference_mode", {"inference_mode": True}),
    ]  # fmt: skip
    found: list[tuple[str, list[dict[str, Any]], dict[str, Any]]]
    found = [(name, [a | more] * 3, {}) for name, more in linear]
    for init in (
        False,
        True,
        "gaussian",
        "orthogonal",
        "eva",
        "mica",
        "lora_ga",
        "olora",
        "pissa",
        "pissa_niter_4",
        "loftq",
    ):
        more = {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}} if init == "loftq" else {}
        found.append((f"init_lora_weights={init!r}", [a | {"init_lora_weights": init} | more] * 3, {}))
    for which in ("a", "b"):
        blocks = {"use_bdlora": {"nblocks": 2, f"target_modules_bd_{which}": ["up"]}}
        found.append((f"bd-lora of {which}", [a | blocks] * 3, {}))
        found.append((f"bd-lora of {which}, other ranks", [a | blocks | {"r": r} for r in (4, 4, 2)], {}))
    for name, more in (
        ("kasa", {"kasa_config": {}}), ("monteclora", {"monteclora_config": {}}), ("velora", {"velora_config": {}}),
        ("qalora", {"use_qalora": True, "qalora_group_size": 2}),
    ):  # fmt: skip
        found.append((name, [a | more] * 3, {}))
    for name, third in (
        ("other modules", {"target_modules": ["layers.0.up"]}), ("other dropout", {"lora_dropout": 0.2}),
        ("same modules by a pattern", {"target_modules": r".*layers\.[01]\.up"}),
        ("olora", {"init_lora_weights": "olora"}),
        ("other base model", {"base_model_name_or_path": "evil"}), ("fan_in_fan_out", {"fan_in_fan_out": True}),
        ("modules_to_save", {"modules_to_save": ["head"]}), ("DoRA", {"use_dora": True}),
    ):  # fmt: skip
        found.append((f"one of three: {name}", [a, a, a | third], {}))
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        found.append((f"saved as {dtype}", [a] * 3, {"dtype": dtype}))
    found += [("named adapters", [a] * 3, {"name": "mine"}), (".bin files", [a] * 3, {"safe": False})]
    others = [a | {"base_model_name_or_path": f"/home/user{k}/model"} for k in range(4)]  # no two say the same
    for forged in (
        {"target_modules": ["layers.0.up"]}, {"exclude_modules": ["layers.1.up"]}, {"peft_type": "LOHA"},
        {"init_lora_weights": "olora"}, {"lora_dropout": "x"},
    ):  # fmt: skip
        found.append((f"one says {forged}", others, {"forged": forged}))
    return found


def outcome(work: Callable[[], str]) -> str:
    try:
        return work() or "right"
    except (ValueError, TypeError, OSError) as error:
        kind = "refused" if len(str(error).splitlines()) == 1 else "WRONG, lines of error"
        return f"{kind}: {type(error).__name__}: {error}"
    except Exception as error:
        return f"WRONG, {type(error).__name__}: {str(error)[:300]}"


def special_cases() -> int:
    """Print what comes of each setting; return how many are wrong."""
    wrong, tried = 0, settings()
    for name, configs, how in tried:
        g = np.random.default_rng(7)
        single = any(x in name for x in ("init", "kasa", "olora"))  # where PEFT decomposes weights it wants float32
        base = Base(torch.float32 if single else torch.float64)
        digits = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(how.get("dtype"), 1e-5 if single else 1e-6)
        with TemporaryDirectory() as folder:
            try:
                forged = how.pop("forged", None)
                paths = [saved(Path(folder, str(k)), g, options, **how) for k, options in enumerate(configs)]
                for path in paths:
                    effective(path, base)
            except Exception as error:
                print(f"{name:48} not made by PEFT: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
                continue
            if forged:
                paths.insert(0, Path(shutil.copytree(paths[0], Path(folder, "forged"))))
                said(paths[0], forged)
            out = Path(folder, "out")
            found = outcome(lambda: "" if len(merged(paths, "mean", 0, out)) else "nothing")  # noqa: B023
            if found == "right":
                try:
                    shares = np.full(len(paths), 1 / len(paths))
                    if forged:  # the first holds what the second does
                        paths, shares = paths[1:], np.array([shares[0] + shares[1], *shares[2:]])
                    problem = difference(paths, out, shares, base, digits)
                    found = f"WRONG, {problem}" if problem else "right"
                except Exception as error:
                    text = " ".join(str(error).split())[:260]
                    found = f"WRONG, PEFT cannot load or use it: {type(error).__name__}: {text}"
        wrong += found.startswith("WRONG")
        print(f"{name:48} {found.replace(folder, '')[:330]}")
    print(f"{len(tried)} settings, {wrong} wrong")
    return wrong


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.exit(random_cases(int(sys.argv[1]) if len(sys.argv) > 1 else 60) + special_cases() > 0)
