"""LoRA adapters by their products, and NVFlare's aggregator, here on a stand-in for its two classes where it is missing."""

from __future__ import annotations

import importlib
import json
import sys
import types
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import robustkern as rk
from robustkern.adapters import peft

torch = pytest.importorskip("torch")
Array = NDArray[Any]


# ---- LoRA --------------------------------------------------------------------------------------------------------------


#: What the larger product below can have.
MOST_RANK = 9


def lora(seed: int, r: int, scale: float = 1.0) -> dict[str, Array]:
    g = np.random.default_rng(seed)
    base = np.random.default_rng(99)
    shared = {
        "q": (base.standard_normal((4, 12)), base.standard_normal((9, 4))),
        "v": (base.standard_normal((4, 12)), base.standard_normal((8, 4))),
    }
    found = {}
    for name, (a, b) in shared.items():
        found[f"m.{name}.lora_A.weight"] = (np.resize(a, (r, 12)) + 0.1 * g.standard_normal((r, 12))).astype(np.float32)
        found[f"m.{name}.lora_B.weight"] = (
            scale * (np.resize(b, (b.shape[0], r)) + 0.1 * g.standard_normal((b.shape[0], r)))
        ).astype(np.float32)
    return found


def product(adapter: Any, scaling: float = 1.0) -> Array:
    parts = []
    for name in ("q", "v"):
        a, b = (np.asarray(adapter[f"m.{name}.lora_{x}.weight"], dtype=np.float64) for x in "AB")
        parts.append((b @ a).reshape(-1) * scaling)
    return np.concatenate(parts)


def test_inner_products_are_those_of_the_products() -> None:
    adapters = [lora(k, r) for k, r in enumerate((4, 8, 2, 4))]
    scalings = [1.0, 0.5, 2.0, 1.0]
    rows = np.stack([product(adapter, s) for adapter, s in zip(adapters, scalings, strict=True)])
    np.testing.assert_allclose(peft.lora_gram(adapters, scalings=scalings), rows @ rows.T, rtol=1e-12)


@pytest.mark.parametrize("rule", ["ctma(geometric_median)", "multi_krum", "geometric_median", "nnm | mean", "mean"])
def test_the_merged_adapter_is_the_rule_of_the_products(rule: str) -> None:
    adapters = [lora(k, r) for k, r in enumerate((4, 8, 4, 8, 4, 8, 4))]
    adapters[2] = lora(2, 4, scale=-50.0)
    rows = np.stack([product(adapter) for adapter in adapters])
    want, info = rk.aggregate(rows, rule, f=1, return_info=True)
    merged, weights = peft.aggregate_lora(adapters, rule, f=1)
    np.testing.assert_allclose(weights, info.weights, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(product(merged), want, rtol=1e-4, atol=1e-5)
    assert {x.dtype for x in merged.values()} == {np.dtype(np.float32)}
    rank = sum(adapters[i]["m.q.lora_A.weight"].shape[0] for i in np.flatnonzero(weights))
    assert merged["m.q.lora_A.weight"].shape == (min(rank, MOST_RANK), 12)
    tensors, same = peft.aggregate_lora([{k: torch.tensor(x) for k, x in a.items()} for a in adapters], rule, f=1)
    assert np.array_equal(same, weights)
    assert np.array_equal(tensors["m.q.lora_B.weight"], merged["m.q.lora_B.weight"])


def test_adapters_that_are_not_finite_have_no_weight() -> None:
    adapters = [lora(k, 4) for k in range(5)]
    adapters[1]["m.v.lora_A.weight"][0, 0] = np.nan
    merged, weights = peft.aggregate_lora(adapters, "geometric_median", f=1)
    assert weights[1] == 0
    assert all(np.isfinite(x).all() for x in merged.values())
    with pytest.raises(rk.NonFiniteError):
        peft.aggregate_lora(adapters, "geometric_median", f=0)


def test_what_is_no_adapter() -> None:
    good = [lora(k, 4) for k in range(4)]
    for wrong, message in (
        ({"m.q.lora_A.weight": np.ones((2, 3))}, "adapter 4 has m.q.lora_A.weight and no m.q.lora_B.weight"),
        (good[0] | {"head": np.ones(3)}, "adapter 4 has head, which is no pair of lora_A and lora_B"),
        ({}, "adapter 4 holds no lora_A and lora_B"),
        (
            good[0] | {"m.q.lora_B.weight": np.ones((9, 3))},
            r"adapter 4, m.q.weight: A of shape \(4, 12\) and B of \(9, 3\) have no product",
        ),
        (
            good[0] | {"m.q.lora_B.weight": np.ones((5, 4))},
            "adapter 4 has other modules or shapes than most, first in m.q",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            peft.aggregate_lora([*good, wrong], "mean")
    whole = {key: (x * 10).astype(np.int64) for key, x in good[0].items()}
    with pytest.raises(TypeError, match=r"adapter 4, m.q.weight: A has dtype int64 and B int64; expected floats"):
        peft.aggregate_lora([*good, whole], "mean")
    with pytest.raises(TypeError, match="adapters: expected a list of mappings with lora_A and lora_B; got dict"):
        peft.aggregate_lora(good[0], "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scalings: expected 4 finite numbers"):
        peft.aggregate_lora(good, "mean", scalings=[1, 2])
    with pytest.raises(ValueError, match="it looks at columns"):
        peft.aggregate_lora(good, "median")


WRONG: tuple[tuple[Any, str], ...] = (
    (None, "adapter 0 is NoneType; expected a mapping with lora_A and lora_B"),
    ({}, "adapter 0 holds no lora_A and lora_B"),
    ({"m.q.lora_A.weight": np.ones((2, 3))}, "adapter 0 has m.q.lora_A.weight and no m.q.lora_B.weight"),
    (lora(9, 4) | {"m.q.lora_B.weight": np.ones((9, 3))}, "have no product"),
    (
        lora(9, 4) | {"m.q.lora_B.weight": np.ones((5, 4))},
        "adapter 0 has other modules or shapes than most, first in m.q",
    ),
    (
        {key: (x * 10).astype(np.int64) for key, x in lora(9, 4).items()},
        "A has dtype int64 and B int64; expected floats",
    ),
)


@pytest.mark.parametrize(("wrong", "reason"), WRONG)
def test_no_client_ends_a_round_of_adapters(wrong: Any, reason: str) -> None:
    """It counts as one of the f, as a row of NaN does, wherever it comes; and the reason is told."""
    good = [lora(k, r) for k, r in enumerate((4, 8, 2, 4, 4, 8))]
    spoilt = {key: np.full_like(x, np.nan) for key, x in lora(9, 4).items()}
    for rule in ("krum", "ctma(geometric_median)", "nnm | multi_krum"):
        want, shares = peft.aggregate_lora([spoilt, *good], rule, f=1)
        with pytest.raises((TypeError, ValueError), match=reason):
            peft.aggregate_lora([wrong, *good], rule, f=1)
        with pytest.warns(UserWarning, match=rf"{reason}.* \(it counts as one of the f that may be bad\)"):
            merged, weights = peft.aggregate_lora([wrong, *good], rule, f=1, bad="count")
        assert np.array_equal(weights, shares)
        assert weights[0] == 0
        assert all(np.array_equal(merged[key], x) for key, x in want.items())
    with pytest.raises(rk.NonFiniteError), pytest.warns(UserWarning, match="adapter 0.*counts"):
        peft.aggregate_lora([wrong, *good], "krum", f=0, bad="count")


def test_adapters_that_are_all_bad() -> None:
    with pytest.raises(ValueError, match="no adapter can be used; the first: adapter 0 holds no lora_A and lora_B"):
        peft.aggregate_lora([{}] * 4, "krum", f=1, bad="count")
    with pytest.raises(ValueError, match="bad must be 'error' or 'count'; got 'drop'"):
        peft.aggregate_lora([lora(k, 4) for k in range(4)], "krum", f=1, bad="drop")
    with pytest.raises(ValueError, match="mean: bad='count' needs a rule that tolerates bad rows"):
        peft.aggregate_lora([lora(k, 4) for k in range(4)], "mean", bad="count")


def folder(path: Path, adapter: Any, config: Any) -> Path:
    from safetensors.numpy import save_file

    path.mkdir()
    save_file(adapter, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_folders_need_the_packages_of_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs safetensors, .* \(pip install 'robustkern\[cli\]'\)"):
        peft.aggregate_lora_folders([tmp_path], "mean", out=tmp_path / "merged")


def test_folders_of_adapters(tmp_path: Path) -> None:
    settings = [{"r": 4, "lora_alpha": 8}, {"r": 8, "lora_alpha": 16, "use_rslora": True}, {"r": 4, "lora_alpha": 4}]
    adapters = [lora(k, config["r"]) for k, config in enumerate(settings)]
    paths = [
        folder(tmp_path / f"{k}", a, c | {"peft_type": "LORA"})
        for k, (a, c) in enumerate(zip(adapters, settings, strict=True))
    ]
    weights = peft.aggregate_lora_folders(paths, "mean", out=tmp_path / "merged")
    np.testing.assert_allclose(weights, np.full(3, 1 / 3))
    from safetensors.numpy import load_file

    merged = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    rank = config["r"]
    assert rank == merged["m.q.lora_A.weight"].shape[0] == min(16, MOST_RANK)
    assert (config["lora_alpha"], config["use_rslora"], config["peft_type"]) == (rank, False, "LORA")
    want = np.mean([product(a, s) for a, s in zip(adapters, (2.0, 16 / np.sqrt(8), 1.0), strict=True)], axis=0)
    np.testing.assert_allclose(product(merged, config["lora_alpha"] / config["r"]), want, rtol=1e-5, atol=1e-6)
    again = folder(tmp_path / "again", adapters[0], settings[0] | {"peft_type": "LORA"})
    evil = folder(tmp_path / "evil", adapters[0], {"r": 4, "lora_alpha": 8, "base_model_name_or_path": "http://evil"})
    peft.aggregate_lora_folders([evil, *paths], "mean", out=tmp_path / "whole")
    assert "evil" not in (tmp_path / "whole" / "adapter_config.json").read_text()
    with pytest.raises(FileExistsError, match="exists"):
        peft.aggregate_lora_folders(paths, "mean", out=tmp_path / "merged")
    for k, (config, message) in enumerate(
        (
            ("{", "is no JSON"),
            ("[" * 100_000, "is no JSON"),
            ("[]", "has no rank r"),
            ({"r": True}, "has no rank r"),
            (
                {"r": 4, "rank_pattern": {"q": 2}},
                "has rank_pattern, so that its products alone do not say what it does",
            ),
            ({"r": 4, "use_dora": True}, "has use_dora, so that its products alone"),
            ({"r": 4, "use_bdlora": {"nblocks": 2}}, "has use_bdlora, so that its products alone"),
            ({"r": 4, "use_something_of_the_next_year": True}, "has use_something_of_the_next_year, so that"),
            ({"r": 4, "bias": "all"}, "has bias='all', which changes the model beside the products"),
            ({"r": 4, "init_lora_weights": "pissa"}, "has init_lora_weights='pissa', which changes the model"),
            ({"r": 4, "init_lora_weights": ["olora"]}, "has init_lora_weights=.*, which changes the model"),
            ({"r": 4, "peft_type": "ADALORA"}, "is of peft_type 'ADALORA'; expected LORA"),
            ({"r": 4, "peft_type": None}, "is of peft_type None; expected LORA"),
            ({"r": 4, "lora_alpha": "8"}, "lora_alpha must be a number; got '8'"),
            ({"r": 4, "lora_alpha": 10**400}, "lora_alpha must be a number; got"),
            ({"r": 5}, "its rank r=5 is not that of its lora_A"),
            (" " * (1 << 20) + "{}", "has more than 1048576 bytes"),
        )
    ):
        bad = folder(tmp_path / f"bad{k}", adapters[0], config)
        with pytest.raises(ValueError, match=message):
            peft.aggregate_lora_folders([*paths, bad], "mean", out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        with pytest.warns(UserWarning, match=rf"{message}.* \(it counts as one of the f that may be bad\)"):
            weights = peft.aggregate_lora_folders(
                [bad, *paths, again], "krum", f=1, out=tmp_path / f"out{k}", bad="count"
            )
        assert weights[0] == 0
        kept = json.loads((tmp_path / f"out{k}" / "adapter_config.json").read_text())
        assert kept.keys() == {"peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights"}
    with pytest.warns(UserWarning, match="nowhere.*no such file.*counts as one of the f"):
        peft.aggregate_lora_folders(
            [*paths, again, tmp_path / "nowhere"], "krum", f=1, out=tmp_path / "out", bad="count"
        )


def test_no_few_adapters_decide_a_setting(tmp_path: Path) -> None:
    """Whatever else differs: paths of the base model, the order of sets, dropout; and forged ones that are alike."""
    own = [
        {
            "r": 4,
            "lora_alpha": 4,
            "peft_type": "LORA",
            "target_modules": ["q", "v"][:: (-1) ** k],
            "lora_dropout": k / 9,
        }
        | {"base_model_name_or_path": f"/home/{k}/model", "init_lora_weights": [True, "gaussian"][k % 2], "new": k // 4}
        for k in range(5)
    ]
    forged = {"target_modules": ["q"], "base_model_name_or_path": "http://evil", "exclude_modules": "v"}
    adapters = [lora(k, 4) for k in range(7)]
    honest = [folder(tmp_path / f"{k}", adapters[k], config) for k, config in enumerate(own)]
    evil = [folder(tmp_path / f"evil{k}", adapters[5 + k], own[0] | forged) for k in range(2)]
    for k, paths in enumerate(([*honest, *evil], [*evil, *honest])):
        peft.aggregate_lora_folders(paths, "ctma(geometric_median)", f=2, out=tmp_path / f"out{k}")
        text = (tmp_path / f"out{k}" / "adapter_config.json").read_text()
        settings = json.loads(text)
        assert settings["target_modules"] == ["q", "v"]
        assert settings["init_lora_weights"] is True
        assert "evil" not in text
        assert not settings.keys() & {"base_model_name_or_path", "lora_dropout"}
        assert settings["exclude_modules"] is None
    with pytest.raises(ValueError, match="no exclude_modules is what more than half of the adapters say"):
        peft.aggregate_lora_folders([honest[0], evil[0]], "mean", out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_dtypes_are_those_of_nobody(tmp_path: Path) -> None:
    """A first row in half precision, of no weight, once decided the result's: digits lost, 1e5 became Inf."""
    adapters: list[Any] = [lora(k, 4, 1e6) for k in range(5)]
    adapters[0] = {key: (x / 1e6).astype(np.float16) for key, x in adapters[0].items()}
    merged, weights = peft.aggregate_lora(adapters, "multi_krum(m=3)", f=1)
    assert weights[0] == 0
    assert {x.dtype for x in merged.values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(product(merged), weights @ [product(adapter) for adapter in adapters], rtol=1e-4)
    wide = [{key: x.astype(np.float64) * 1e30 for key, x in adapter.items()} for adapter in adapters[1:]]
    assert {x.dtype for x in peft.aggregate_lora(wide, "mean")[0].values()} == {np.dtype(np.float64)}
    wide = [{key: x * np.float32(1e32) for key, x in adapter.items()} for adapter in adapters[1:]]
    with pytest.raises(ValueError, match=r"too large for float32 in m.q.weight \(pass float64 adapters\)"):
        peft.aggregate_lora(wide, "mean", scalings=[1e3] * 4)


def test_ranks_above_what_a_product_can_have() -> None:
    """They come, from small layers or as results of the call itself; they cost and count no more than the product."""
    tall = [
        {"q.lora_A.w": np.random.default_rng(k).standard_normal((9, 4)), "q.lora_B.w": np.ones((30, 9)) / 9}
        for k in range(4)
    ]
    wide = [{"q.lora_A.w": adapter["q.lora_B.w"].T, "q.lora_B.w": adapter["q.lora_A.w"].T} for adapter in tall]
    for adapters, shape in ((tall, (4, 4)), (wide, (4, 30))):
        want = np.mean([x["q.lora_B.w"] @ x["q.lora_A.w"] for x in adapters], axis=0)
        once, _ = peft.aggregate_lora(adapters, "mean")
        assert once["q.lora_A.w"].shape == shape
        again, _ = peft.aggregate_lora([once, once, *adapters], "mean")
        for got in (once, again):
            np.testing.assert_allclose(got["q.lora_B.w"] @ got["q.lora_A.w"], want, rtol=1e-6)
    tall[0]["q.lora_A.w"][0, 0] = np.nan
    merged, weights = peft.aggregate_lora(tall, "geometric_median", f=1)
    assert weights[0] == 0
    assert np.isfinite(merged["q.lora_B.w"]).all()
    two = [{**{f"a.lora_{x}.w": np.ones((2, 2)) for x in "AB"}, **lora(k, 2)} for k in range(3)]
    assert {x.shape[0] for key, x in peft.aggregate_lora(two, "mean")[0].items() if "_A" in key} == {6}


def test_files_that_numpy_does_not_know(tmp_path: Path) -> None:
    good = [folder(tmp_path / f"{k}", lora(k, 4), {"r": 4}) for k in range(3)]
    (good[0] / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: no such file \(save_pretrained writes it"):
        peft.aggregate_lora_folders(good, "mean", out=tmp_path / "out")
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (good[0] / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(ValueError, match="cannot be read: it has a dtype that NumPy has not"):
        peft.aggregate_lora_folders(good, "mean", out=tmp_path / "out")


def test_an_adapter_counts_once(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from robustkern.cli.commands import app

    paths = [folder(tmp_path / f"c{k}", lora(k, 4), {"r": 4, "lora_alpha": 4}) for k in range(5)]
    (tmp_path / "link").symlink_to(paths[0])
    (tmp_path / "hard").mkdir()
    for file in paths[0].iterdir():
        (tmp_path / "hard" / file.name).hardlink_to(file)
    for k, again in enumerate((tmp_path / "link", tmp_path / "hard", f"{paths[0]}/.", paths[0])):
        with pytest.raises(ValueError, match=r"is the same file as .*, and no worker counts twice"):
            peft.aggregate_lora_folders([*paths, again], "krum", f=1, out=tmp_path / "out")
        with pytest.warns(UserWarning, match=r"no worker counts twice .*counts as one of the f that may be bad"):
            weights = peft.aggregate_lora_folders([*paths, again], "ctma(geometric_median)", f=1, out=tmp_path / f"out{k}", bad="count")  # fmt: skip
        np.testing.assert_allclose(weights, [0.2] * 5 + [0])
        given = ["lora", *paths, again, "--f", 1, "--bad-files", "count", "--out", tmp_path / f"json{k}", "--json"]
        told = json.loads(CliRunner().invoke(app, list(map(str, given))).stdout)
        assert [told["weights"][str(path)] for path in paths] == pytest.approx([0.2] * 5)


def test_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from robustkern.cli.commands import app

    paths = [folder(tmp_path / f"{k}", lora(k, 4, 1.0 if k else -9.0), {"r": 4, "lora_alpha": 4}) for k in range(5)]

    def run(*more: Any) -> Any:
        return CliRunner().invoke(app, ["lora", *map(str, more)], env={"COLUMNS": "200"})

    result = run(*paths, "--rule", "krum", "--f", 1, "--out", tmp_path / "one")
    assert result.exit_code == 0, result.stderr
    assert "1.0000" in result.stdout
    result = run(*paths, "--f", 1, "--out", tmp_path / "two", "--json")
    weights = json.loads(result.stdout)["weights"]
    assert [weights[str(path)] for path in paths] == [0, 0.25, 0.25, 0.25, 0.25]
    for arguments, message in (
        ([*paths, "--f", 1, "--out", tmp_path / "two"], "exists (pass a new folder)"),
        ([*paths, "--rule", "median", "--out", tmp_path / "three"], "it looks at columns"),
        ([*paths, "--rule", "medain", "--out", tmp_path / "three"], "'medain' is not known"),
        (
            [tmp_path / "none", "--out", tmp_path / "three"],
            "no such file (name folders of LoRA adapters, as PEFT writes them)",
        ),
    ):
        result = run(*arguments)
        assert result.exit_code in (1, 2)
        assert message in " ".join(result.stderr.split())
    (paths[2] / "adapter_model.safetensors").write_bytes(b"garbage")
    result = run(*paths, "--f", 1, "--out", tmp_path / "three")
    assert result.exit_code == 1
    assert "cannot be read" in " ".join(result.stderr.split())
    result = run(*paths, "--f", 2, "--bad-files", "count", "--out", tmp_path / "three", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["weights"][str(paths[2])] == 0
    assert "cannot be read" in " ".join(result.stderr.split())


# ---- NVFlare -----------------------------------------------------------------------------------------------------------


class ParamsType(str, Enum):
    FULL = "FULL"
    DIFF = "DIFF"


class FLModel:
    """As much of NVFlare's as the adapter uses."""

    def __init__(self, params_type: Any = ParamsType.FULL, params: Any = None, **rest: Any) -> None:
        self.params_type, self.params = params_type, params
        self.current_round, self.total_rounds = rest.get("current_round"), rest.get("total_rounds")


class ModelAggregator:
    def __init__(self) -> None:
        self.fl_ctx: Any = None
        self.said: list[str] = []

    def warning(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture
def nvflare(monkeypatch: pytest.MonkeyPatch) -> Any:
    try:
        importlib.import_module("nvflare")
    except ImportError:
        places = {
            "nvflare.app_common.abstract.fl_model": {"FLModel": FLModel, "ParamsType": ParamsType},
            "nvflare.app_common.aggregators.model_aggregator": {"ModelAggregator": ModelAggregator},
        }
        for name, classes in places.items():
            parts = name.split(".")
            for k in range(1, len(parts) + 1):
                monkeypatch.setitem(sys.modules, ".".join(parts[:k]), types.ModuleType(".".join(parts[:k])))
            vars(sys.modules[name]).update(classes)
        # Parents were made anew for the second place.
        vars(sys.modules["nvflare.app_common.aggregators.model_aggregator"]).update(
            places["nvflare.app_common.aggregators.model_aggregator"]
        )
    monkeypatch.delitem(sys.modules, "robustkern.adapters.nvflare", raising=False)
    yield importlib.import_module("robustkern.adapters.nvflare")
    sys.modules.pop("robustkern.adapters.nvflare", None)


class Lazy:
    def __init__(self, x: Array) -> None:
        self.x = x

    def materialize(self) -> Array:
        return self.x


def model(nvflare: Any, params: Any, diff: bool = False) -> Any:
    kind = nvflare.ParamsType.DIFF if diff else nvflare.ParamsType.FULL
    made = nvflare.FLModel(params_type=kind, params={}, current_round=3, total_rounds=9)
    made.params = params
    return made


def test_nvflares_rounds(nvflare: Any) -> None:
    g = np.random.default_rng(0)
    rows = [
        {"w": g.standard_normal((3, 4)), "steps": np.int64(k), "t": torch.tensor(g.standard_normal(5))}
        for k in range(7)
    ]
    for row in rows:
        row["t"] = np.asarray(row["t"])
    own = nvflare.RobustAggregator("ctma(geometric_median)", f=2)
    own.fl_ctx = None
    for row in rows[:6]:
        own.accept_model(model(nvflare, {"w": Lazy(row["w"]), "steps": row["steps"], "t": row["t"]}))
    own.accept_model(model(nvflare, {"w": np.ones((2, 2))}))
    found = own.aggregate_model()
    want = rk.aggregate([{k: np.asarray(x) for k, x in row.items()} for row in rows[:6]], "ctma(geometric_median)", f=1)
    assert np.array_equal(found.params["w"], want["w"])
    assert found.params["steps"] == want["steps"]
    assert (own.info.n, own.info.f) == (6, 1)
    assert found.current_round == 3
    assert found.params_type == nvflare.ParamsType.FULL
    for params in ("text", {}, {"w": "text"}, {"w": rows[0]["w"] * np.nan, "steps": np.int64(1), "t": rows[0]["t"]}):
        for row in rows[:6]:
            own.accept_model(model(nvflare, dict(row)))
        own.accept_model(model(nvflare, params))
        assert np.isfinite(own.aggregate_model().params["w"]).all()


def test_nvflares_rounds_of_nothing(nvflare: Any) -> None:
    own = nvflare.RobustAggregator("median", delta=0.2)
    with pytest.raises(ValueError, match="there are no models to combine"):
        own.aggregate_model()
    bad = [model(nvflare, {"w": np.ones(k)}) for k in range(1, 6)]
    for one in bad:
        own.accept_model(one)
    with pytest.raises(rk.NonFiniteError, match="the first round's models cannot be used"):
        own.aggregate_model()
    for k in range(5):
        own.accept_model(model(nvflare, {"w": np.full(3, float(k))}))
    assert own.aggregate_model().params["w"].tolist() == [2.0] * 3
    for one in bad:
        own.accept_model(one)
    assert own.aggregate_model().params["w"].tolist() == [2.0] * 3  # as it was
    for k in range(5):
        own.accept_model(model(nvflare, {"w": np.full(3, np.nan if k < 3 else 1.0)}, diff=True))
    assert own.aggregate_model().params["w"].tolist() == [0.0] * 3
    few = nvflare.RobustAggregator("krum", f=1)
    few.accept_model(model(nvflare, {"w": np.ones(3)}))
    few.accept_model(model(nvflare, {"w": np.ones(3)}))
    with pytest.raises(rk.NonFiniteError, match="the first round's models cannot be used"):
        few.aggregate_model()
    for wrong in (np.ma.masked_array(np.ones(3)), torch.ones(3).to_sparse(), torch.ones(3, device="meta")):
        for k in range(5):
            own.accept_model(model(nvflare, {"w": wrong if k == 1 else np.ones(3)}))
        assert own.aggregate_model().params["w"].tolist() == [1.0] * 3
    own.accept_model(bad[0])
    own.reset_stats()
    with pytest.raises(ValueError, match="there are no models"):
        own.aggregate_model()
    for options in ({}, {"f": 1, "delta": 0.1}):
        with pytest.raises(ValueError, match="RobustAggregator: pass f or delta; got"):
            nvflare.RobustAggregator("median", **options)
    with pytest.raises(ValueError, match="trusts a row by its number"):
        nvflare.RobustAggregator("ctma(monna)", f=1)
    for options, message in (({"f": True}, "f must be an integer of at least 0"), ({"delta": 0.5}, "0 <= delta < 0.5")):
        with pytest.raises(ValueError, match=message):
            nvflare.RobustAggregator("median", **options)


def results_of(own: Any, models: list[Any]) -> Any:
    own.fl_ctx = None
    for one in models:
        own.accept_model(one)
    return own.aggregate_model()


def test_differences_are_not_applied_twice(nvflare: Any) -> None:
    own = nvflare.RobustAggregator("median", f=1)
    diffs = [model(nvflare, {"w": np.full(3, float(k))}, diff=True) for k in range(5)]
    nothing = [model(nvflare, {}, diff=True) for _ in range(5)]
    others = [model(nvflare, {"w": np.full(3, np.nan)}) for _ in range(5)]
    for unusable in (nothing, others):
        assert results_of(own, diffs).params["w"].tolist() == [2.0] * 3
        found = results_of(own, unusable)
        assert found.params_type == nvflare.ParamsType.DIFF
        assert found.params["w"].tolist() == [0.0] * 3


def test_nvflares_messages(nvflare: Any) -> None:
    good = [model(nvflare, {"w": np.ones(3)}) for _ in range(4)]
    text = r"models cannot be used: 1 of 5 models cannot be used, f=0 \(raise f or delta, or look at them\)"
    with pytest.raises(rk.NonFiniteError, match=text):
        results_of(nvflare.RobustAggregator("median", f=0), [model(nvflare, {}), *good])
    with pytest.raises(rk.NonFiniteError, match=r"models cannot be used: krum: 2\*f must be below n"):
        results_of(nvflare.RobustAggregator("krum", f=2), good)
    own = nvflare.RobustAggregator("krum", f=2)
    said: list[str] = []
    own._say = said.append
    with pytest.raises(rk.NonFiniteError):
        results_of(own, good)
    assert "krum: 2*f must be below n" in said[-1]
    assert said[-1].endswith("; nothing changes")
    for params, kind in (("text", "str"), (None, "NoneType"), ([np.ones(3)], "list"), ({}, "empty")):
        said.clear()
        assert results_of(own, [model(nvflare, params), *good, *good]).params["w"].tolist() == [1.0] * 3
        assert said == [f"robustkern: a reply is left out, and counted as a bad one: model 0: its params are {kind}"]


@pytest.mark.parametrize("rule", ["ctma(centre)", "centred_clipping(tau=1.0)", "nnm | monna(pivot='centre')", "centre"])
def test_rules_with_a_centre_are_refused_where_nobody_gives_one(nvflare: Any, rule: str) -> None:
    message = r"RobustAggregator: .* measures from a centre, which nobody gives here \(take ctma\(median\)\)"
    with pytest.raises(ValueError, match=message):
        nvflare.RobustAggregator(rule, f=1)
    with pytest.raises(ValueError, match=r"monna trusts a row by its number, .* \(take ctma\(median\)\)"):
        nvflare.RobustAggregator("monna", f=1)


def test_limits_that_numpy_made(nvflare: Any) -> None:
    diffs = [model(nvflare, {"w": np.full(3, float(k))}) for k in range(5)]
    for limit in ({"f": np.int64(1)}, {"delta": np.float32(0.25)}):
        assert results_of(nvflare.RobustAggregator("median", **limit), diffs).params["w"].tolist() == [2.0] * 3
    with pytest.raises(ValueError, match=r"delta must satisfy 0 <= delta < 0.5; got 'half'"):
        nvflare.RobustAggregator("median", delta="half")


# ---- mergekit ------------------------------------------------------------------------------------------------------


def test_a_merge_method() -> None:
    pytest.importorskip("mergekit")
    from mergekit.merge_methods.api import merge_state_dicts

    import robustkern.adapters.mergekit  # noqa: F401

    g = torch.Generator().manual_seed(0)
    models = [
        {
            "w": torch.randn(3, 5, generator=g).to(torch.bfloat16),
            "b": torch.randn(4, generator=g),
            "steps": torch.tensor(3),
        }
        for _ in range(6)
    ]
    models[2]["w"].fill_(float("nan"))
    models[2]["b"].fill_(1e30)

    def merged(**parameters: Any) -> Any:
        base = parameters.pop("base", None)
        return merge_state_dicts(models, "robust", parameters=parameters, base=base)

    for rule in ("median", "trimmed_mean", "krum", "ctma(geometric_median)", "nnm | trimmed_mean"):
        found = merged(rule=rule, f=1)
        for name in ("w", "b"):
            want = rk.aggregate([model[name] for model in models], rule, f=1)
            assert found[name].dtype == want.dtype
            assert torch.equal(found[name], want), (rule, name)
        assert found["steps"] == 3
    found = merged(rule="mean", f=0, weight=[1, 2, 1, 1, 1], base=2)["b"]  # all but the base, which is bad here
    want = rk.aggregate([models[k]["b"] for k in (0, 1, 3, 4, 5)], "mean", weights=[1, 2, 1, 1, 1])
    assert torch.equal(found, want)
    found = merged(rule="centered_clipping(tau=1.0)", f=1, base=0)["b"]
    want = rk.aggregate([model["b"] for model in models[1:]], "centered_clipping(tau=1.0)", f=1, centre=models[0]["b"])
    assert torch.equal(found, want)
    for weight, message in ((0, "weights are all 0"), (float("nan"), "got nan for row 0"), (-1, "got -1.0 for row 0")):
        with pytest.raises(ValueError, match=message):
            merged(rule="mean", f=0, weight=weight)
    with pytest.raises(ValueError, match=r"measures from a centre \(name a base_model\)"):
        merged(rule="centered_clipping(tau=1.0)", f=1)
    with pytest.raises(ValueError, match=r"tensor w: .*NaN or Inf"):
        merged(rule="krum", f=0)
    with pytest.raises(ValueError, match="'means' is not known"):
        merged(rule="means", f=0)
