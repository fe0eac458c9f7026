"""An open artifact as a user calls it: inputs in any form, checked alike in every runtime."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paredown.core.errors import UserError
from paredown.targets.runtimes import Predictor as Opened


class Outputs(tuple[np.ndarray, ...]):
    """The arrays that a file gives, by place and by name.

    Example:
        >>> found = Outputs((np.zeros((1, 3)), np.ones(1)), ("logits", "score"))
        >>> found["score"], list(found), len(found[1:])
        (array([1.]), [array([[0., 0., 0.]]), array([1.])], 1)
        >>> dict(found).keys(), found
        (dict_keys(['logits', 'score']), Outputs(logits float64 (1, 3), score float64 (1,)))
    """

    names: tuple[str, ...]

    def __new__(cls, arrays: tuple[np.ndarray, ...], names: tuple[str, ...]) -> Outputs:
        made = super().__new__(cls, arrays)
        made.names = names
        return made

    def __getitem__(self, key: Any) -> Any:
        """An array by its name or place, or a tuple of some by a slice.

        Raises:
            KeyError: there is no output of that name.
        """
        if not isinstance(key, str):
            return super().__getitem__(key)
        if key not in self.names:
            raise KeyError(f"{key!r} is not one of the outputs {', '.join(self.names)}")
        return super().__getitem__(self.names.index(key))

    def keys(self) -> tuple[str, ...]:
        return self.names

    def items(self) -> Iterator[tuple[str, np.ndarray]]:
        return zip(self.names, self, strict=True)

    def __repr__(self) -> str:
        told = (f"{name} {array.dtype.name} {array.shape}" for name, array in self.items())
        return f"Outputs({', '.join(told)})"


class Predictor:
    """An open file of any runtime: call it with its inputs, get its outputs by place and name.

    Inputs come in the order of ``input_names``, by keyword, or as one dict; each is a NumPy array,
    a torch tensor, or numbers in lists. An array or a tensor has the file's dtype; numbers in lists
    become it: floats are rounded, and no number becomes infinite or another whole number. NaN is
    given to the model as it is; a runtime may make ordinary numbers of it (OpenVINO does).

    Attributes:
        input_names, output_names: as they stand in the file.
        path: where the file lies.
        runtime: what runs it, with its version.
        threads: of one inference.

    Example:
        >>> import tempfile, paredown
        >>> model = paredown.capture(torch.nn.Linear(4, 2), (torch.zeros(1, 4),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = paredown.export(model, paredown.Target("pytorch"), f"{folder}/m.safetensors")
        ...     predict = paredown.open(path.path)
        >>> predict([[1, 2, 3, 4]])["output"].shape, predict(input=torch.zeros(3, 4))[0].shape
        ((1, 2), (3, 2))
        >>> predict(torch.zeros(3, 5))
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: input 'input': expected shape (batch, 4), got (3, 5).
    """

    def __init__(self, opened: Opened, path: Path, runtime: str, threads: int) -> None:
        self._opened, self.path = opened, path
        self.runtime, self.threads = runtime, threads
        self.input_names, self.output_names = opened.input_names, opened.output_names

    def __call__(self, *inputs: Any, **named: Any) -> Outputs:
        """Run the file.

        Raises:
            UserError: the inputs are not those of the file, in number, name, dtype or shape, or the
                runtime refuses what they hold.
        """
        given = self._ordered(inputs, named)
        arrays, sizes = [], dict[str, int]()
        for item in self._opened.signature:
            array = _array(item["name"], given[item["name"]], item["dtype"])
            _check_shape(item, array, sizes)
            arrays.append(array)
        try:
            outputs = self._opened(*arrays)
        except MemoryError:
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"{self.path}: running it in {self.runtime} failed: {reason}"
            ) from error
        return Outputs(tuple(outputs), tuple(self.output_names))

    def __repr__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        lines = [f"<paredown.Predictor {self.path}", f"runtime: {self.runtime}, {threads}"]
        for item in self._opened.signature:
            shape = "" if item["shape"] is None else f" {_told(item['shape'])}"
            lines.append(f"input:   {item['name']} {item['dtype'] or '?'}{shape}")
        lines += [f"output:  {name}" for name in self.output_names]
        return "\n  ".join(lines) + ">"

    def _ordered(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """What was given for each input, by its name."""
        first = inputs[0] if inputs else None
        if len(inputs) == 1 and isinstance(first, Mapping):
            inputs, named = (), _flat(first, "") | named
        names = self.input_names
        given = dict(zip(names, inputs, strict=False)) | named
        expected = f"expected {len(names)} input{'s' * (len(names) != 1)} ({', '.join(names)})"
        if len(inputs) > len(names):
            raise UserError(f"inputs: {expected}, got {len(inputs)}.")
        for name in named:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                raise UserError(
                    f"inputs: {expected}, got {name!r}"
                    + (f"; did you mean {near[0]!r}?" if near else ".")
                )
        twice = [name for name in names[: len(inputs)] if name in named]
        if twice:
            raise UserError(f"inputs: {twice[0]!r} is given twice, by its place and by its name.")
        missing = [name for name in names if name not in given]
        if missing:
            got = f"{', '.join(given)} alone" if given else "none"
            raise UserError(f"inputs: {expected}, got {got}.")
        return given


def _flat(given: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    """Inputs in dicts within dicts, by the names that files have for them.

    Example:
        >>> _flat({"a": {"b": 1}, "c": 2}, "")
        {'a.b': 1, 'c': 2}
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def _array(name: str, value: Any, dtype: str) -> np.ndarray:
    """An input as an array of that dtype; "" takes any."""
    numbers = not isinstance(value, (np.ndarray, np.generic, torch.Tensor))
    if isinstance(value, torch.Tensor):
        array = _of_tensor(name, value, dtype)
    else:
        array = _of_numbers(name, value)
    wanted = np.dtype(dtype) if dtype else array.dtype
    if numbers:
        return _converted(name, array, wanted)
    if array.dtype.newbyteorder("=") != wanted:
        raise UserError(
            f"input {name!r}: expected {wanted.name}, got {array.dtype.name}; convert it first."
        )
    return np.require(array, wanted, ("C", "W"))  # runtimes take no strides


def _of_tensor(name: str, value: torch.Tensor, dtype: str) -> np.ndarray:
    try:
        array: np.ndarray = value.detach().cpu().numpy()
    except (TypeError, RuntimeError) as error:
        kind = str(value.dtype).removeprefix("torch.")
        raise UserError(
            f"input {name!r}: expected {dtype or 'a dense tensor'}, got {kind}, which NumPy does "
            "not have; convert it first."
            if value.layout is torch.strided
            else f"input {name!r}: expected a dense tensor, got a sparse one."
        ) from error
    return array


def _of_numbers(name: str, value: Any) -> np.ndarray:
    expected = f"input {name!r}: expected an array, a tensor or numbers in lists"
    try:
        array = np.asarray(value)
    except ValueError as error:  # NumPy's words for lists of several lengths
        raise UserError(f"{expected}, got lists of several lengths.") from error
    except Exception as error:
        raise UserError(f"{expected}, got a list that holds something else.") from error
    if array.dtype.kind not in "biufc":
        raise UserError(f"{expected}, got {_kind(value)}.")
    return array


def _kind(value: Any) -> str:
    """What something is that is no numbers."""
    if value is None:
        return "None"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype.name}"
    held = isinstance(value, (list, tuple))
    return "a list that holds something else" if held else f"a {type(value).__name__}"


def _converted(name: str, array: np.ndarray, wanted: np.dtype[Any]) -> np.ndarray:
    """Numbers from lists in a file's dtype."""
    with np.errstate(all="ignore"):
        made = array.astype(wanted)
    floats = wanted.kind == "f" and array.dtype.kind in "biuf"
    same = (
        np.array_equal(np.isfinite(made), np.isfinite(array)) if floats else (made == array).all()
    )
    if not same:
        raise UserError(
            f"input {name!r}: expected {wanted.name}, got numbers that {wanted.name} does not have."
        )
    return made


def _check_shape(item: dict[str, Any], array: np.ndarray, sizes: dict[str, int]) -> None:
    """Refuse another shape than the file takes; ``sizes`` are those of names so far."""
    wanted = item["shape"]
    if wanted is None:
        return
    name = item["name"]
    if len(wanted) != array.ndim:
        raise UserError(f"input {name!r}: expected shape {_told(wanted)}, got {array.shape}.")
    for size, got in zip(wanted, array.shape, strict=True):
        if isinstance(size, int):
            fits = size == got
        else:
            symbol, least, most = size
            fits = least <= got and (most is None or got <= most)
            if fits and symbol != "?" and sizes.setdefault(symbol, got) != got:
                raise UserError(
                    f"input {name!r}: expected {symbol} to be {sizes[symbol]}, as in the inputs "
                    f"before it, got {got} in shape {array.shape}."
                )
        if not fits:
            empty = "" if got or isinstance(size, int) else f"; {symbol} is at least {least}"
            told = f"expected shape {_told(wanted)}, got {array.shape}{empty}."
            raise UserError(f"input {name!r}: {told}")


def _told(shape: list[Any]) -> str:
    """A shape in words.

    Example:
        >>> _told([["batch", 1, None], 20]), _told([["?", 1, 24]]), _told([["t", 2, None], 1])
        ('(batch, 20)', '(? up to 24,)', '(t from 2, 1)')
    """
    sizes = [str(size) if isinstance(size, int) else _varying(*size) for size in shape]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"


def _varying(name: str, least: int, most: int | None) -> str:
    if most is None:
        return name if least <= 1 else f"{name} from {least}"
    return f"{name} up to {most}" if least <= 1 else f"{name} from {least} to {most}"
