"""Samples in files: what is read of them, what reaches the model, and what is refused in words."""

import io
import json
import pickle
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from paredown.core.errors import UserError
from paredown.data import parting
from paredown.data.files import arrays
from paredown.data.files.pictures import Pictures
from paredown.data.files.read import read, read_splits
from paredown.data.files.table import Table
from paredown.data.fitting import fit
from paredown.data.samples import labels_of
from paredown.graph.doors.opened import Wanted


def npz(path, **columns):
    np.savez(path, **columns)
    return path


def picture(path, size=(8, 6), mode="RGB", value=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 1)).save(path)
    return path


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file_has_a_column_for_each_array(tmp_path, save):
    x, label = np.random.default_rng(0).random((12, 3, 2), np.float32), np.arange(12)
    save(tmp_path / "x.npz", x=np.asfortranarray(x), label=label)
    table = read(tmp_path / "x.npz")
    assert (len(table), table.label, sorted(table.columns)) == (12, "label", ["label", "x"])
    assert np.array_equal(np.asarray(table.columns["x"]), x)
    assert table.row(3)["label"] == 3
    mapped = isinstance(table.columns["x"], np.memmap)
    assert mapped == (save is np.savez)  # what is not packed is not read before it is asked for


def test_a_folder_of_npy_files_and_one_of_them(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 2)))
    np.save(tmp_path / "b.npy", np.arange(4))
    table = read(tmp_path)
    assert sorted(table.columns) == ["a", "b"] and table.named
    alone = read(tmp_path / "a.npy")
    assert not alone.named and len(alone) == 4


def test_lines_of_json_hold_numbers_lists_and_texts(tmp_path):
    rows = [{"text": f"no {n}", "ids": [n, 1], "x": n / 2} for n in range(3)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    table = read(tmp_path / "x.jsonl")
    assert table.columns["text"][2] == "no 2"
    assert table.columns["ids"].tolist() == [[0, 1], [1, 1], [2, 1]]
    assert table.columns["ids"].dtype == np.int64 and table.columns["x"].dtype == np.float64
    (tmp_path / "y.jsonl").write_text("[1, 2]\n[3, 4]\n")
    assert not read(tmp_path / "y.jsonl").named


def test_pictures_have_the_class_of_their_folder(tmp_path):
    for n, name in enumerate(("cat", "dog", "dog")):
        picture(tmp_path / name / f"{n}.png", value=n)
    table = read(tmp_path)
    assert table.classes == ("cat", "dog") and list(table.columns["label"]) == [0, 1, 1]
    assert table.columns["image"][2].shape == (6, 8, 3) and table.columns["image"][2][0, 0, 0] == 2
    flat = tmp_path / "flat"
    picture(flat / "b.png", mode="L")
    assert read(flat).label is None and read(flat).columns["image"][0].shape == (6, 8)


def test_splits_that_data_have_are_taken(tmp_path):
    for name, size in (("train", 6), ("val", 3), ("test", 4)):
        npz(tmp_path / f"{name}.npz", x=np.zeros((size, 2)))
    npz(tmp_path / "valid.npz", x=np.zeros((3, 2)))
    with pytest.raises(UserError, match="its validation split is there twice"):
        read_splits(tmp_path)
    (tmp_path / "valid.npz").unlink()
    found = read_splits(tmp_path)
    assert {name: len(table) for name, table in found.items()} == {
        "test": 4,
        "train": 6,
        "validation": 3,
    }
    pictures = tmp_path / "pictures"
    for split in ("training", "validation"):
        for name in ("cat", "dog"):
            picture(pictures / split / name / "1.png")
    assert sorted(read_splits(pictures)) == ["train", "validation"]
    assert list(read_splits(tmp_path / "test.npz")) == [""]


def _no_zip(path):
    path.write_bytes(b"no zip at all")


def _cut(path):
    whole = npz(path, x=np.random.random((50, 9))).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def _objects(path):
    np.savez(path, x=np.array([{}, []], dtype=object))


def _single(path):
    np.savez(path, x=np.zeros((3, 2)), version=np.float32(1))


def _uneven(path):
    np.savez(path, x=np.zeros((3, 2)), y=np.zeros(4))


def _empty(path):
    np.savez(path, x=np.zeros((0, 2)))


def _nothing(path):
    np.savez(path)


def _complex(path):
    np.savez(path, x=np.zeros((3, 2), complex))


def _lying(path):
    """The header says more than the member holds."""
    header = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": (10**6,)}
    np.lib.format.write_array_header_1_0(header, about)
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x.npy", header.getvalue() + bytes(16))


def _twice(path):
    _nothing(path)
    with zipfile.ZipFile(path, "w") as made:
        for _ in range(2):
            data = io.BytesIO()
            np.save(data, np.zeros((3, 2)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made.writestr("x.npy", data.getvalue())


NPZ = {
    _twice: "an array is there twice",
    _no_zip: "is no .npz file, or a damaged one",
    _cut: "is no .npz file, or a damaged one",
    _objects: r"'x': holds pickled objects, which are code and are not read",
    _single: r"'version': is a single value; expected one for each sample",
    _uneven: "expected as many rows in every column, got x has 3, y has 4",
    _empty: "holds no samples; its columns are empty",
    _nothing: "holds no samples",
    _complex: "expected numbers or texts, got complex128",
    _lying: "is no .npz file, or a damaged one: x.npy is of",
}


@pytest.mark.parametrize(("make", "said"), NPZ.items(), ids=lambda each: str(each)[:20])
def test_what_is_wrong_with_an_npz_file_is_said(tmp_path, make, said):
    make(tmp_path / "x.npz")
    with pytest.raises(UserError, match=said):
        read(tmp_path / "x.npz")


def test_a_file_that_would_fill_the_memory_is_not_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((1000, 1000)))
    monkeypatch.setattr(arrays.machine, "free_bytes", lambda: 10**7)
    with pytest.raises(UserError, match=r"takes 0\.008 GB once it is unpacked, and 0\.01 GB"):
        read(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", x=np.zeros((1000, 1000)))  # is mapped
    assert len(read(tmp_path / "y.npz")) == 1000


def test_pickled_arrays_are_not_read(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="pickled objects"):
        read(tmp_path / "x.npy")
    (tmp_path / "y.npy").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(UserError, match=r"is no \.npy file"):
        read(tmp_path / "y.npy")


LINES = {
    '{"x": 1}\n{"x": ': "line 2 is no JSON",
    '{"x": 1}\n{"z": 1}': "line 2 has the keys z, and line 1 x",
    '{"x": [[1], [1, 2]]}': "line 1: 'x': expected a number, a text, or a list .* several lengths",
    '{"x": null}': "got NoneType",
    '{"x": {"y": 1}}': "got dict",
    '{"x": 1}\n{"x": "a"}': "line 2: 'x'",
    "": "holds no samples",
}


@pytest.mark.parametrize(("text", "said"), LINES.items())
def test_what_is_wrong_with_a_line_is_said(tmp_path, text, said):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        read(tmp_path / "x.jsonl")


def test_what_is_wrong_with_pictures_names_the_file(tmp_path):
    whole = picture(tmp_path / "flat" / "a.png", (64, 64))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(whole)
    whole.write_bytes(whole.read_bytes()[:900])
    with pytest.raises(UserError, match=r"flat/a\.png: the picture cannot be read: .*trunc"):
        read(tmp_path / "flat").columns["image"][0]
    mixed = tmp_path / "mixed"
    picture(mixed / "a.png"), picture(mixed / "cat" / "b.png")
    with pytest.raises(UserError, match=r"holds pictures beside folders of them, such as a\.png"):
        read(mixed)
    (mixed / "a.png").unlink(), (mixed / "empty").mkdir()
    with pytest.raises(UserError, match="its folder 'empty' holds no pictures"):
        read(mixed)


def test_what_is_no_data_is_told(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "none.npz")
    (tmp_path / "x.csv").touch()
    with pytest.raises(UserError, match=r"x\.csv: expected \.npz, \.npy or \.jsonl, a folder"):
        read(tmp_path / "x.csv")
    with pytest.raises(UserError, match="nothing in this folder can be read"):
        read(tmp_path)


# --- to a model's inputs -----------------------------------------------------------------------


def table(**columns):
    return Table("x.npz", columns)


def test_columns_go_to_the_inputs_of_their_names():
    made = fit(
        table(b=np.zeros((3, 2), np.float32), a=np.arange(3, dtype=np.int32), label=np.zeros(3)),
        [Wanted("a", "int64", (None,)), Wanted("b", "float32", (None, 2))],
    )
    inputs = made.inputs(2)
    assert list(inputs) == ["a", "b"] and inputs["a"].dtype == torch.int64 and inputs["a"] == 2
    assert made.notes == ()


def test_the_only_column_serves_the_only_input():
    made = fit(table(pixels=np.zeros((3, 2), np.float32)), [Wanted("x", "float32", (1, 2))])
    assert made.inputs(0)["x"].shape == (2,)
    optional = Wanted("mask", "int64", (None, 2), optional=True)
    made = fit(table(pixels=np.zeros((3, 2))), [Wanted("x", "float32", (None, 2)), optional])
    assert list(made.inputs(0)) == ["x"]


@pytest.mark.parametrize(
    ("shape", "wanted", "became"),
    [
        ((8, 6, 3), (3, 8, 6), (3, 8, 6)),
        ((3, 8, 6), (8, 6, 3), (8, 6, 3)),
        ((8, 6, 3), (8, 6, 3), (8, 6, 3)),
        ((8, 6), (1, 8, 6), (1, 8, 6)),
        ((8, 6), (8, 6, 1), (8, 6, 1)),
        ((1, 4), (4,), (4,)),
        ((8, 6, 3), (3, None, "width"), (3, 8, 6)),
    ],
)
def test_shapes_are_brought_to_the_inputs(shape, wanted, became):
    values = np.random.default_rng(0).random((3, *shape), np.float32)
    made = fit(table(x=values), [Wanted("x", "float32", (None, *wanted))])
    found = made.inputs(1)["x"]
    assert tuple(found.shape) == became
    assert torch.equal(
        found.flatten().sort().values, torch.tensor(values[1]).flatten().sort().values
    )
    if shape[-1] == 3 and wanted[0] == 3:
        assert torch.equal(found[2], torch.tensor(values[1, :, :, 2]))


def test_whole_numbers_become_floats_and_it_is_told():
    made = fit(table(x=np.full((3, 2), 200, np.uint8)), [Wanted("x", "float32", (None, 2))])
    assert made.inputs(0)["x"].tolist() == [200.0, 200.0]
    assert "holds whole numbers (uint8, 200 to 200 in the first example)" in made.notes[0]
    big = fit(table(x=np.full((3, 2), 2**24 + 1)), [Wanted("x", "float32", (None, 2))])
    with pytest.raises(UserError, match="whole numbers that float32 cannot hold exactly"):
        big.inputs(0)
    small = fit(table(x=np.full((3, 2), 300)), [Wanted("x", "uint8", (None, 2))])
    with pytest.raises(UserError, match="holds 300 to 300, which uint8 cannot hold"):
        small.inputs(0)


ONE = [Wanted("x", "float32", (None, 3, 8, 8))]
UNFIT = [
    (table(x=np.zeros((4, 3, 9, 9), np.float32)), ONE, r"takes 'x' float32 \(\?, 3, 8, 8\).* 9\)"),
    (table(x=np.zeros((3, 8, 8), np.float32)), ONE, r"3 examples of shape \(8, 8\)"),
    (table(a=np.zeros((4, 1)), b=np.zeros((4, 1))), ONE, "the samples have 'a', 'b', and none for"),
    (table(x=np.array(["a", "b"])), [Wanted("x", "int64", (None,))], "takes int64, .* holds text"),
    (table(x=np.zeros(4)), [Wanted("x", "int64", (None,))], "takes int64, .* holds float64"),
    (
        table(x=np.zeros((4, 2))),
        [Wanted("x", "float32", (None, 2)), Wanted("mask", "int64", (None, 2))],
        "and none for input 'mask'",
    ),
]


@pytest.mark.parametrize(("given", "wanted", "said"), UNFIT, ids=range(len(UNFIT)))
def test_what_does_not_fit_is_told(given, wanted, said):
    with pytest.raises(UserError, match=said):
        fit(given, wanted)


def test_lists_of_several_lengths_need_one(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"ids": [1, 2]}\n{"ids": [1, 2, 3]}\n')
    made = fit(read(tmp_path / "x.jsonl"), [Wanted("ids", "int64", (None, "length"))])
    assert made.inputs(0)["ids"].tolist() == [1, 2]
    with pytest.raises(UserError, match=r"example 1: column 'ids' has shape \(3,\).*pad or cut"):
        made.inputs(1)


def test_pictures_come_in_the_channels_that_are_wanted(tmp_path):
    picture(tmp_path / "a.png", (8, 6), "L"), picture(tmp_path / "b.png", (8, 6))
    for channels in (1, 3):
        wanted = [Wanted("x", "float32", (None, channels, 6, 8))]
        made = fit(read(tmp_path), wanted)
        assert {tuple(made.inputs(n)["x"].shape) for n in range(2)} == {(channels, 6, 8)}
    with pytest.raises(UserError, match="Bring the pictures to 224 x 224 first"):
        fit(read(tmp_path), [Wanted("x", "float32", (None, 3, 224, 224))])
    assert isinstance(read(tmp_path).columns["image"], Pictures)


# --- labels and splits -------------------------------------------------------------------------


def test_labels_are_numbers_names_or_marks():
    numbers, _ = labels_of(table(x=np.zeros(3), y=np.array([0, 2, 1], np.uint8)), ["x"], ())
    assert numbers.tensor(1) == 2 and numbers.tensor(1).dtype == torch.int64
    texts, _ = labels_of(table(x=np.zeros(2), label=["dog", "cat"]), ["x"], ("cat", "dog"))
    assert [int(texts.tensor(n)) for n in range(2)] == [1, 0]
    marks, notes = labels_of(table(x=np.zeros(2), label=np.eye(2)), ["x"], ())
    assert [int(marks.tensor(n)) for n in range(2)] == [0, 1] and "marks each class" in notes[0]
    folders = Table("p", {"image": [0, 0], "label": [0, 1]}, classes=("cat", "dog"))
    named, _ = labels_of(folders, ["x"], ("dog", "bird", "cat"))
    assert [int(named.tensor(n)) for n in range(2)] == [2, 0]
    counted, notes = labels_of(folders, ["x"], ())
    assert int(counted.tensor(1)) == 1 and "0 is 'cat', 1 is 'dog'" in notes[0]
    assert labels_of(table(x=np.zeros(3), y=np.zeros(3)), ["x", "y"], ())[0] is None
    with pytest.raises(UserError, match="holds texts such as 'dog'"):
        labels_of(table(x=np.zeros(2), label=["dog", "cat"]), ["x"], ())


def test_splits_are_made_by_the_seed_and_share_nothing():
    made, again, other = parting.parted(200, 0), parting.parted(200, 0), parting.parted(200, 1)
    for name, rows in made.items():
        assert np.array_equal(rows, again[name]) and not np.array_equal(rows, other[name])
    every = np.concatenate(list(made.values()))
    assert sorted(every) == list(range(200))
    with pytest.raises(UserError, match="holds 1 sample; at least 10 are needed"):
        parting.parted(1, 0)


def test_splits_that_are_missing_are_cut_out():
    made, said = parting.completed({"train": 50}, 0)
    rows = {name: set(chosen) for name, (_, chosen) in made.items()}
    assert len(rows["train"]) + len(rows["validation"]) + len(rows["test"]) == 50
    assert not rows["train"] & rows["test"] and not rows["validation"] & rows["test"]
    assert "no validation split" in said and "no test split" in said
    made, _ = parting.completed({"test": 20}, 0)
    assert {name: len(chosen) for name, (_, chosen) in made.items()} == {
        "test": 10,
        "validation": 10,
    }
    assert parting.completed({"validation": 3, "test": 3}, 0)[1] == ""
    with pytest.raises(UserError, match="and none to decide on"):
        parting.completed({"calibration": 20}, 0)


# --- a dataset saved by Hugging Face -----------------------------------------------------------


def test_a_saved_dataset_is_read(tmp_path):
    hub = pytest.importorskip("datasets", reason="the datasets package is not installed")
    classes = hub.ClassLabel(names=["no", "yes"])
    features = hub.Features(
        {
            "x": hub.Sequence(hub.Value("float32")),
            "image": hub.Image(),
            "text": hub.Value("string"),
            "label": classes,
        }
    )

    def made(count):
        images = [Image.new("RGB", (4, 3), (n, 0, 0)) for n in range(count)]
        rows = {
            "x": [[n, 1.0] for n in range(count)],
            "image": images,
            "text": [f"no {n}" for n in range(count)],
            "label": [n % 2 for n in range(count)],
        }
        return hub.Dataset.from_dict(rows, features=features)

    made(6).save_to_disk(tmp_path / "one")
    table = read_splits(tmp_path / "one")[""]
    assert table.classes == ("no", "yes") and len(table) == 6
    row = table.row(3)
    assert row["text"] == "no 3" and row["label"] == 1 and row["x"].tolist() == [3.0, 1.0]
    assert row["image"].shape == (3, 4, 3) and row["image"][0, 0].tolist() == [3, 0, 0]
    fitted = fit(table, [Wanted("x", "float32", (None, 2))])
    assert fitted.inputs(2)["x"].tolist() == [2.0, 1.0]
    several = hub.DatasetDict({"train": made(4), "validation": made(3), "test": made(2)})
    several.save_to_disk(tmp_path / "several")
    found = read_splits(tmp_path / "several")
    assert {name: len(each) for name, each in found.items()} == {
        "train": 4,
        "validation": 3,
        "test": 2,
    }
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match="is no saved dataset, or a damaged one"):
        read_splits(tmp_path / "one")


def test_a_saved_dataset_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_info.json").touch()
    with pytest.raises(UserError, match=r"pip install 'paredown\[huggingface\]'"):
        read_splits(tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_read_or_refused_in_words(tmp_path, save):
    save(tmp_path / "x.npz", x=np.arange(12.0).reshape(4, 3), label=np.arange(4))
    whole = (tmp_path / "x.npz").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / "y.npz").write_bytes(damaged)
        try:
            table = read(tmp_path / "y.npz")
            assert all(np.asarray(table.columns[name]).size for name in table.columns)
        except UserError as error:
            assert str(error).startswith(str(tmp_path / "y.npz"))
