"""From the caller's updates to a source of rows, and from the result back to the caller's kind."""

from __future__ import annotations

import functools
import math
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import is_torch_array
from numpy.typing import NDArray

from robustkern.contract.rows import DTYPES, MAX_ROWS, Block, Rows, one_segment
from robustkern.errors import BackendUnavailable, plain
from robustkern.inputs.arrays import (
    address_of,
    array_view,
    check_dtype,
    checked_out,
    described,
    empty,
    empty_tensor,
    leaf_of,
    library_of,
    name_of,
    pairs,
    place_of,
    where_is,
)
from robustkern.inputs.devices import DeviceArray
from robustkern.inputs.leaves import EVERYTHING, Choice, computed
from robustkern.inputs.memory import Leaf, MemorySource, check_disjoint, plain_leaf
from robustkern.inputs.plain import Plain, look, new_like

__all__ = ["adapt", "in_the_order_of", "jax_array"]

#: Leaves that are no arrays: an update may carry settings, epochs, names.
PLAIN = (bool, int, float, complex, str, bytes)
#: Kinds of mappings that stand for one another.
MAPPINGS = (dict, OrderedDict, defaultdict)


def _check_count(n: int) -> None:
    if not 1 <= n <= MAX_ROWS:
        raise ValueError(f"updates: expected between 1 and {MAX_ROWS} rows; got {n}")


def adapt(
    updates: Any,
    out: Any = None,
    centre: Any = None,
    choice: Choice = EVERYTHING,
    within: Callable[[int], Any] | None = None,
    apart: bool = False,
) -> tuple[MemorySource, Any]:
    """Turn updates into rows.

    Parameters
    ----------
    updates : array of shape (n, ...), sequence of n arrays, or sequence of n pytrees of arrays
        NumPy (ml_dtypes included), torch, or on a GPU CuPy and what speaks DLPack; never written, never copied whole.
    out : like one update, optional
        Receives the result.
    centre : like one update, optional
        Joins the rows of the source as one more.
    choice : Choice
        Which leaves take part, and in what dtype.
    within : callable, optional
        Returns the `robustkern.engine.Limits` of n rows, where something hangs on who may be Byzantine.
    apart : bool
        Whether each leaf becomes a source of its own too (`MemorySource.parts`).

    Returns
    -------
    source : MemorySource
        The rows.
    result : like one update
        Where the result goes, in the caller's kind, unless the source has something to `finish`.

    Raises
    ------
    TypeError, ValueError
        If the updates are not of one kind, structure, shape and dtype; the message names the row and leaf.
    """
    if centre is None and choice is EVERYTHING and (plain := _adapt_plain(updates, out)) is not None:
        return plain
    if isinstance(updates, np.ndarray) or is_torch_array(updates) or hasattr(updates, "__dlpack_device__"):
        if centre is None:
            _require_names(choice)
            return _adapt_stacked(updates, out, choice)
        updates = [updates[i] for i in range(_rows_of(array_view(updates, "updates").shape))]
    if isinstance(updates, (str, bytes, Mapping)) or not isinstance(updates, Sequence):
        raise TypeError(
            f"updates is {described(updates)}; expected an array of shape (n, ...) or a list with one array or "
            "one pytree of arrays for each of the n workers"
        )
    n = len(updates)
    _check_count(n)
    if centre is not None:
        if n == MAX_ROWS:
            raise ValueError(f"updates: with a centre, which is one row more, expected at most {n - 1} rows; got {n}")
        updates = [*updates, centre]
    kind = type(updates[0])
    one_leaf = kind is np.ndarray or (is_torch_array(updates[0]) and not apart)
    if one_leaf and all(type(u) is kind for u in updates):
        _require_names(choice)
        leaf, result = _make_leaf(updates, n, (), out, choice, _looked([updates], [out])[0])
        if out is not None:
            check_disjoint([leaf])
        return MemorySource.of(n, [leaf], centre is not None), result
    try:
        return _adapt_trees(updates, n, out, choice, within, apart)
    except RecursionError:
        raise ValueError("updates: a pytree is nested too deeply, or contains itself") from None


def _rows_of(shape: tuple[int, ...]) -> int:
    """Return n of an array of rows."""
    if len(shape) < 2:
        raise ValueError(
            f"updates: expected an array of shape (n, ...) with at least 2 axes; got shape {shape} "
            "(for one number a row pass x[:, None])"
        )
    _check_count(shape[0])
    return shape[0]


def _require_names(choice: Choice) -> None:
    """Raise where leaves of arrays are chosen by name."""
    if choice.only or choice.exclude:
        raise ValueError(f"{choice}: the updates are arrays, which have no named leaves (pass mappings of them)")


def _adapt_stacked(updates: Any, out: Any, choice: Choice) -> tuple[MemorySource, Any]:
    array = array_view(updates, "updates")
    n = _rows_of(array.shape)
    check_dtype(array.dtype, "updates", False, library_of(updates))
    shape, form = array.shape[1:], choice.form(array.dtype)
    assert form is not None
    if isinstance(array, DeviceArray) and form.dtype != array.dtype:
        raise TypeError(f"updates are on {array.place}, where {array.dtype} is not combined as {form.result} (convert)")
    wanted = None if form.result == array.dtype else form.result
    result = (
        empty(shape, updates, array, wanted) if out is None else checked_out(out, shape, updates, array, "out", wanted)
    )
    target = array_view(result, "out", is_input=False)
    if form.factor == 2:
        array, target, shape = pairs(array), pairs(target), (*shape, 2)
    leaf = Leaf((), shape, form.dtype, array, target, place=place_of(array))
    if out is not None:
        check_disjoint([leaf])
    source = MemorySource.of(n, [leaf])
    if library_of(updates) == "jax":
        source.finish = functools.partial(jax_array, result)
    return source, result


def jax_array(result: NDArray[Any]) -> Any:
    """Return a result as a JAX array, or raise where JAX would change its dtype."""
    import jax.numpy

    made = jax.numpy.asarray(result)
    if made.dtype != result.dtype:
        raise TypeError(f"JAX would return {made.dtype} for {result.dtype} (switch jax_enable_x64 on, or drop dtype=)")
    return made


def _adapt_plain(updates: Any, out: Any) -> tuple[MemorySource, Any] | None:
    """Adapt rows of one contiguous array: the usual case, kept short for small calls.

    None sends all others on, to where there are words for what cannot be used.
    """
    if type(updates) is np.ndarray:
        if updates.dtype not in DTYPES or not updates.flags.c_contiguous:
            return None
        dtype, first, shape = updates.dtype, address_of(updates), updates.shape
    elif is_torch_array(updates) and (plain := look([(updates,)], 1)[0]) is not None:
        dtype, first, shape = plain.dtype, int(plain.begins[0]), tuple(updates.shape)
    else:
        return None
    if len(shape) < 2 or not 0 < shape[0] <= MAX_ROWS or 0 in shape:
        return None
    n, d = shape[0], math.prod(shape[1:])
    step, offsets = d * dtype.itemsize, one_segment(d)
    if out is None:
        result = np.empty(shape[1:], dtype) if type(updates) is np.ndarray else empty_tensor(shape[1:], updates)
        target = address_of(result) if isinstance(result, np.ndarray) else result.data_ptr()
    else:
        result = out
        if type(out) is not type(updates) or out.dtype != updates.dtype or tuple(out.shape) != shape[1:]:
            return None
        if type(out) is np.ndarray:
            if not (out.flags.c_contiguous and out.flags.writeable):
                return None
            target = address_of(out)
        elif (plain := look([(out,)], 0)[0]) is not None:
            target = int(plain.begins[0])
        else:
            return None
        if target % dtype.alignment or first - step < target < first + n * step:
            return None
    addresses = np.arange(first, first + n * step, step, dtype=np.uint64)
    block = Block(
        (Rows(addresses[None], offsets, dtype, updates),),
        (Rows(np.array([[target]], dtype=np.uint64), offsets, dtype, result),),
    )
    return MemorySource(n, d, {dtype}, "cpu", block), result


def _name_of_row(i: int, n: int) -> str:
    return f"row {i}" if i < n else "centre"


def _looked(columns: Sequence[Sequence[Any]], targets: Sequence[Any]) -> list[Plain | None]:
    """Look at the leaves' columns of arrays, and what their results shall be written to."""
    if targets[0] is None:
        return look(columns, len(columns[0]), 1)
    return look([(*column, target) for column, target in zip(columns, targets, strict=True)], len(columns[0]))


def _make_leaf(
    values: Sequence[Any], n: int, path: tuple[Any, ...], out: Any, choice: Choice, plain: Plain | None
) -> tuple[Leaf, Any]:
    """Check that all n rows, and what follows them, have the same leaf, and allocate its result."""
    like = values[0]
    if plain is not None and (choice.dtype is None or choice.dtype == plain.dtype):
        result, begins = out, plain.begins
        if out is None:
            result, begins[-1] = new_like(like)
        writeable = out is None or type(out) is not np.ndarray or out.flags.writeable
        if writeable and begins[-1] % plain.dtype.alignment == 0:
            return Leaf(path, tuple(like.shape), plain.dtype, values, result, begins), result
    where, arrays = leaf_of(path), []
    for i, value in enumerate(values):
        row = _name_of_row(i, n)
        array = array_view(value, f"{row}{where}")
        if i == 0:
            first = array
            check_dtype(array.dtype, f"row 0{where}", bool(path), library_of(like))
        elif type(value) is not type(like) and library_of(value) != library_of(like):
            raise TypeError(
                f"{row}{where} is a {library_of(value)} array, row 0 a {library_of(like)} array (convert one)"
            )
        elif place_of(array) != place_of(first):
            raise ValueError(f"{row}{where} is on {where_is(array)}, row 0 on {where_is(first)} (move one)")
        elif array.shape != first.shape or choice.kind(array.dtype) != choice.kind(first.dtype):
            mixed = array.shape == first.shape and computed(array.dtype) and computed(first.dtype)
            remedy = (
                "convert it, x.to(row0.dtype)" if library_of(like) == "torch" else "convert it, x.astype(row0.dtype)"
            )
            raise ValueError(
                f"{row}{where} has shape {array.shape} and dtype {array.dtype}; "
                f"row 0 has shape {first.shape} and dtype {first.dtype}"
                + (f" (pass dtype='float32' to combine them, or {remedy})" if mixed else "")
            )
        arrays.append(array)
    shape, form, wanted = first.shape, choice.form(first.dtype), choice.result(first.dtype)
    if isinstance(first, DeviceArray) and ((form is not None and form.dtype != first.dtype) or wanted != first.dtype):
        raise TypeError(
            f"row 0{where} is on {first.place}, where {first.dtype} is not combined as {wanted} (convert it)"
        )
    changed = None if wanted == first.dtype else wanted
    result = (
        empty(shape, like, first, changed)
        if out is None
        else checked_out(out, shape, like, first, f"out{where}", changed)
    )
    target = array_view(result, f"out{where}", is_input=False)
    if form is not None and form.factor == 2:
        arrays, target, shape = list(map(pairs, arrays)), pairs(target), (*shape, 2)
    dtype = first.dtype if form is None else form.dtype
    return Leaf(path, shape, dtype, arrays, target, place=place_of(first), stored=first.dtype), result


def _adapt_trees(
    updates: Sequence[Any],
    n: int,
    out: Any,
    choice: Choice,
    within: Callable[[int], Any] | None,
    apart: bool,
) -> tuple[MemorySource, Any]:
    import optree

    whole_out, others = out, []
    if choice.only or choice.exclude:
        names: list[str] = []
        _named(updates[0], (), names)
        choice.check(names)
        left_out: list[Any] = []
        updates = [_pruned(update, choice, (), left_out) for update in updates]
        if out is not None:
            others = [leaf for value in left_out if (leaf := _input_only(value)) is not None]
            out = _pruned(out, choice, (), [])
    paths, spec, columns, targets = _flattened(updates, n, out)
    made, settings, results, places = [], [], [], []
    for column, path, target, seen in zip(columns, paths, targets, _looked(columns, targets), strict=True):
        if type(column[0]) in PLAIN and all(type(value) in PLAIN for value in column):
            weights = None if within is None else within(n).weights
            settings.append(plain_leaf(path, column[:n], weights))
            results.append(settings[-1].value)
        else:
            leaf, result = _make_leaf(column, n, path, target, choice, seen)
            made.append(leaf)
            places.append(len(results))
            results.append(result)
    if not made:
        raise ValueError(
            "row 0 holds no arrays, only numbers or texts of Python (pass numpy.asarray(x) of each number)"
        )
    library = _only_library([column[0] for column in columns], made)
    tied = _tied(made, n, within) if within is not None and len(made) > 1 else {}
    copies: list[tuple[Any, Any]] = []
    for k, other in tied.items():
        if out is None:
            results[places[k]] = results[places[other]]
        elif made[k].out_address != made[other].out_address:
            copies.append((results[places[k]], results[places[other]]))
    kept = [leaf for k, leaf in enumerate(made) if k not in tied]
    if out is not None:
        also = [made[k] for k in tied]  # written too, where their results are not those of what they are tied to
        outs = {leaf.out_address: leaf for leaf in (*reversed(also), *reversed(kept))} if tied else {}
        check_disjoint([*kept, *(leaf for leaf in also if outs[leaf.out_address] is leaf)], [*others, *also])
    source = MemorySource.of(n, kept, len(updates) > n, settings)
    if apart:
        source.parts = _parts(source, kept)
    if library == "jax" or copies or whole_out is not out:

        def finish() -> Any:
            for target, result in copies:
                np.copyto(_on_host(target), _on_host(result))
            if library == "jax":
                results[:] = [jax_array(r) if isinstance(r, np.ndarray) else r for r in results]
            tree = optree.tree_unflatten(spec, results)
            return tree if whole_out is out else _merged(whole_out, tree)

        source.finish = finish
    return source, optree.tree_unflatten(spec, results)


def _flattened(
    updates: Sequence[Any], n: int, out: Any
) -> tuple[list[tuple[Any, ...]], Any, list[tuple[Any, ...]], Sequence[Any]]:
    """Return paths and structure of row 0, its leaves' columns of all rows, and what their results go to."""
    import optree

    paths, leaves, spec = optree.tree_flatten_with_path(updates[0])
    if not leaves:
        raise ValueError("row 0 holds no arrays; expected an array or a pytree of arrays")
    # What is an array needs no look into optree's registry, which is most of its time.
    is_leaf = functools.partial(type.__instancecheck__, type(leaves[0]))
    get, kinds = _getter(updates[0], paths), set(map(type, leaves))

    def flat(update: Any, name: str) -> Sequence[Any]:
        if get is not None and type(update) in MAPPINGS and update.keys() == updates[0].keys():
            values = get(update)
            if kinds.issuperset(map(type, values)):
                return values
        found, its = optree.tree_flatten(update, is_leaf)
        if its != spec:  # mappings are matched by their keys, whatever their kind and order
            found, its = optree.tree_flatten(in_the_order_of(updates[0], update), is_leaf)
        if its != spec:
            raise ValueError(f"{name} {_difference(paths, update)}")
        return found

    rows = [leaves, *(flat(update, _name_of_row(i, n)) for i, update in enumerate(updates[1:], start=1))]
    targets = [None] * len(leaves) if out is None else flat(out, "out")
    return paths, spec, list(zip(*rows, strict=True)), targets


def _getter(first: Any, paths: list[tuple[Any, ...]]) -> Callable[[Any], tuple[Any, ...]] | None:
    """Return what takes the leaves out of a flat mapping, in half of optree's time; None where it is none."""
    if type(first) not in MAPPINGS or not len(first) == len(paths) > 1 or any(len(path) > 1 for path in paths):
        return None
    return operator.itemgetter(*(name for (name,) in paths))


def _only_library(leaves: Sequence[Any], made: list[Leaf]) -> str:
    """Return of which library the arrays of row 0 are, all of one and in one place."""
    kinds = {type(leaf): leaf for leaf in leaves}
    libraries = sorted({library_of(leaf) for kind, leaf in kinds.items() if kind not in PLAIN})
    if len(libraries) > 1:
        raise TypeError(f"row 0 mixes {' and '.join(libraries)} leaves (convert them to one library)")
    for leaf in made:
        if leaf.place != made[0].place:
            here, there = (str(place or "cpu") for place in (leaf.place, made[0].place))
            first = name_of(made[0].path)
            raise ValueError(f"row 0{leaf_of(leaf.path)} is on {here}, leaf {first} on {there} (move one)")
    return libraries[0]


def _on_host(result: Any) -> NDArray[Any]:
    view = array_view(result, "out", is_input=False)
    assert isinstance(view, np.ndarray)  # ties are looked for in the host's memory only
    return view


def _input_only(value: Any) -> Leaf | None:
    """Return a leaf of one row that is left out, whose memory must not be written; None where it has none."""
    try:
        view = array_view(value, "a leaf that is left out", is_input=False)
    except (TypeError, ValueError, BackendUnavailable):
        return None
    return None if isinstance(view, DeviceArray) else Leaf((), view.shape, view.dtype, [view], view)


def _parts(source: MemorySource, leaves: list[Leaf]) -> dict[str, MemorySource]:
    """Return a source for each leaf of floats; the first has the leaves that are no arrays too."""
    parts: dict[str, MemorySource] = {}
    for leaf in leaves:
        if leaf.dtype in DTYPES:
            name = ".".join(map(str, leaf.path))
            parts[name if name not in parts else name_of(leaf.path)] = MemorySource.of(
                source.n, [leaf], source.has_centre, () if parts else source.plain
            )
    return parts


def _tied(leaves: list[Leaf], n: int, within: Callable[[int], Any]) -> dict[int, int]:
    """Return leaves that are one memory with another in all rows but some that may be Byzantine: with which."""
    looked = [leaf.addresses for leaf in leaves if leaf.addresses is not None]
    if len(looked) == len(leaves):
        table = np.sort(np.concatenate(looked).reshape(len(looked), -1)[:, :n], axis=0)
        if (table[1:] != table[:-1]).all():
            return {}
    first: dict[tuple[Any, ...], int] = {}
    apart: dict[tuple[int, int], NDArray[np.bool_]] = {}
    for k, leaf in enumerate(leaves):
        if leaf.size == 0 or leaf.place is not None or not isinstance(leaf.arrays, (list, tuple)):
            continue
        for i, place in enumerate(leaf.places()[:n]):
            other = first.setdefault((i, leaf.dtype, *place), k)
            if other != k:
                apart.setdefault((k, other), np.ones(n, dtype=np.bool_))[i] = False
    tied: dict[int, int] = {}
    for (k, other), mask in apart.items():
        if k not in tied and within(n).tolerates(mask):
            tied[k] = tied.get(other, other)
    return tied


#: Stands for a leaf, or a mapping of leaves, that is left out.
_NOTHING = object()


def _named(tree: Any, path: tuple[Any, ...], names: list[str]) -> None:
    """Collect the names of all leaves."""
    if type(tree) in MAPPINGS:
        for key, value in tree.items():
            _named(value, (*path, key), names)
    elif type(tree) in (list, tuple):
        for k, value in enumerate(tree):
            _named(value, (*path, k), names)
    elif tree is not None:
        if isinstance(tree, (tuple, Mapping)):
            raise TypeError(
                f"only= and exclude= look into dicts, lists and tuples; leaf {name_of(path)} is a {type(tree).__name__}"
            )
        names.append(".".join(map(str, path)))


def _merged(whole: Any, part: Any) -> Any:
    """Return a tree with the leaves of another one that has some of them; see `_pruned`."""
    if isinstance(whole, Mapping):
        items = {key: _merged(value, part[key]) if key in part else value for key, value in whole.items()}
        kind: Any = type(whole) if type(whole) in MAPPINGS else dict
        return kind(whole.default_factory, items) if isinstance(whole, defaultdict) else kind(items)
    if type(whole) in (list, tuple):
        return type(whole)(a if b is None else _merged(a, b) for a, b in zip(whole, part, strict=True))
    return part


def _pruned(tree: Any, choice: Choice, path: tuple[Any, ...], left_out: list[Any]) -> Any:
    """Return a tree without the leaves that take no part: mappings lack their keys, sequences have None."""
    if type(tree) in MAPPINGS:
        items = {key: _pruned(value, choice, (*path, key), left_out) for key, value in tree.items()}
        left = {key: value for key, value in items.items() if value is not _NOTHING}
        if path and not left:
            return _NOTHING
        kind: Any = type(tree)
        return kind(tree.default_factory, left) if isinstance(tree, defaultdict) else kind(left)
    if type(tree) in (list, tuple):
        parts = [_pruned(value, choice, (*path, k), left_out) for k, value in enumerate(tree)]
        if path and all(part is _NOTHING for part in parts):
            return _NOTHING
        return type(tree)(None if part is _NOTHING else part for part in parts)
    if tree is None or choice.takes(".".join(map(str, path))):
        return tree
    left_out.append(tree)
    return _NOTHING


def in_the_order_of(first: Any, other: Any) -> Any:
    """Return a tree with mappings of the kind and the order of keys that another tree has, where the keys are equal."""
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        if first.keys() != other.keys() or type(first) not in MAPPINGS or type(other) not in MAPPINGS:
            return other
        items = ((key, in_the_order_of(first[key], other[key])) for key in first)
        kind: Any = type(first)
        return kind(first.default_factory, items) if isinstance(first, defaultdict) else kind(items)
    if type(first) is type(other) and type(other) in (list, tuple) and len(first) == len(other):
        return type(other)(in_the_order_of(*pair) for pair in zip(first, other, strict=True))
    return other


def _difference(paths: list[tuple[Any, ...]], other: Any) -> str:
    """Say which leaves another tree lacks or adds."""
    import optree

    names, theirs = (set(map(name_of, p)) for p in (paths, optree.tree_flatten_with_path(other)[0]))
    missing, extra = sorted(names - theirs), sorted(theirs - names)
    if missing or extra:
        return ", ".join(
            text
            for text in (
                f"lacks the {_some(missing)}" if missing else "",
                f"has the unexpected {_some(extra)}" if extra else "",
            )
            if text
        )
    return f"has another structure than row 0 ({plain(str(optree.tree_structure(other)), 200)})"


def _some(names: list[str]) -> str:
    """Name the first of some leaves, and say how many more there are."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"leaves {', '.join(plain(name, 100) or '(the update itself)' for name in names[:2])}{more}"
