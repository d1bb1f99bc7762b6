"""The header of a weights file: each claim that is not true is refused, before the memory it asks for is taken."""

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import nn

from vaelab import weights
from vaelab.errors import RunError, UsageError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.c": torch.tensor(True),
    "empty": torch.zeros(0, 4, dtype=torch.int64),
    "half": torch.ones(3, dtype=torch.bfloat16),
}


def file_of(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header and this body, whether they agree or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def one(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_tensors_come_back_with_their_bits(tmp_path):
    path = tmp_path / "x.safetensors"
    weights.save_weights(path, TENSORS)
    found = weights.load_weights(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert weights.numbers(path) == 6 + 1 + 0 + 3


@pytest.mark.parametrize("dtype", weights.DTYPES)
def test_every_dtype_of_the_table(tmp_path, dtype):
    name, size = weights.DTYPES[dtype]
    tensor = torch.ones(2, dtype=getattr(torch, name))
    assert tensor.element_size() == size
    weights.save_weights(tmp_path / "x", {"t": tensor})
    assert weights.header(tmp_path / "x")["t"].dtype == dtype
    assert torch.equal(weights.load_weights(tmp_path / "x")["t"], tensor)


def test_a_view_that_is_not_contiguous_is_written_as_it_looks(tmp_path):
    weights.save_weights(tmp_path / "x", {"t": TENSORS["a"].t()})
    assert torch.equal(weights.load_weights(tmp_path / "x")["t"], TENSORS["a"].t())


BAD = {
    "nothing": (b"", "claims 0 bytes, and the file has 0"),
    "seven bytes": (b"1234567", "not a whole safetensors file"),
    "a length beyond the file": (file_of({}, length=3), "claims 3 bytes, and the file has 2"),
    "a length of 2^64 - 1": (file_of({}, length=(1 << 64) - 1), "18,446,744,073,709,551,615"),
    "a zip": (b"PK\x03\x04" + bytes(100), "claims 67,324,752 bytes"),
    "no JSON": (file_of(b"hello"), "not JSON"),
    "a list": (file_of([]), "its header is a list"),
    "NaN": (file_of(b'{"a": NaN}'), "NaN"),
    "a name twice": (file_of(b'{"a": {}, "a": {}}'), "the key 'a' stands there twice"),
    "deep": (file_of(b'{"a":' + b"[" * 10**5), "nested more than 64 deep"),
    "metadata that is a number": (file_of({"__metadata__": {"a": 1}}), "metadata are not text"),
    "metadata that is a list": (file_of({"__metadata__": []}), "metadata are not text"),
    "a tensor that is a number": (file_of({"a": 1}), "'a' is not described by dtype, shape and data_offsets"),
    "a field is missing": (file_of({"a": {"dtype": "U8", "shape": []}}), "'a' is not described"),
    "a field more": (file_of({"a": one(code="x")}, bytes(4)), "'a' is not described"),
    "an unknown dtype": (file_of({"a": one("F4")}, bytes(4)), "has the dtype 'F4', expected one of BOOL"),
    "a dtype that is a list": (file_of({"a": one(["U8"])}, bytes(4)), "has the dtype"),
    "a negative size": (file_of({"a": one(shape=[-4, -1])}, bytes(4)), "has the shape [-4, -1]"),
    "a size that is true": (file_of({"a": one(shape=[True, 4])}, bytes(4)), "has the shape"),
    "a size that is a float": (file_of({"a": one(shape=[4.0])}, bytes(4)), "has the shape"),
    "a size of 2^63": (file_of({"a": one(shape=[1 << 63])}, bytes(4)), "has the shape"),
    "a shape that is a number": (file_of({"a": one(shape=4)}, bytes(4)), "has the shape"),
    "17 axes": (file_of({"a": one(shape=[1] * 16 + [4])}, bytes(4)), "at most 16 sizes"),
    "2^96 numbers": (
        file_of({"a": one(shape=[1 << 32] * 3)}, bytes(4)), "claims 79,228,162,514,264,337,593,543,950,336 numbers",
    ),
    "2^64 numbers, which are 0 in 64 bits": (file_of({"a": one(shape=[1 << 32] * 2, offsets=[0, 0])}), "in 0 bytes"),
    "one offset": (file_of({"a": one(offsets=[4])}, bytes(4)), "has the offsets"),
    "offsets that run back": (file_of({"a": one(offsets=[4, 0])}, bytes(4)), "claims 4 numbers of U8 in -4 bytes"),
    "a negative offset": (file_of({"a": one(offsets=[-4, 0])}, bytes(4)), "has the offsets"),
    "beyond the file": (file_of({"a": one(shape=[8], offsets=[0, 8])}, bytes(4)), "take 8 bytes, and 4 are there"),
    "bytes that are nobody's": (file_of({"a": one()}, bytes(5)), "take 4 bytes, and 5 are there"),
    "a gap": (file_of({"a": one(), "b": one(offsets=[5, 9])}, bytes(9)), "'b' begins at byte 5, where 4 was expected"),
    "an overlap": (file_of({"a": one(), "b": one(offsets=[2, 6])}, bytes(6)), "'b' begins at byte 2, where 4"),
    "the same bytes twice": (file_of({"a": one(), "b": one()}, bytes(4)), "'b' begins at byte 0, where 4"),
    "an empty name": (file_of({"": one()}, bytes(4)), "a tensor's name is ''"),
    "a long name": (file_of({"n" * 1001: one()}, bytes(4)), "1,001 characters"),
    "a name over two lines": (file_of({"a\nerror: b": one()}, bytes(4)), "a tensor's name is"),
    "a name for a terminal": (file_of({"\x1b[2J": one()}, bytes(4)), "U+001B"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_sentence(tmp_path, case):
    data, reason = BAD[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    for read in (
        weights.header,
        weights.load_weights,
        weights.numbers,
        lambda path: weights.load_model(path, nn.Linear(2, 2)),
    ):
        with pytest.raises(RunError) as caught:
            read(path)
        text = str(caught.value)
        assert text.startswith(f"'{path}' ") and reason in text, text
        assert text.isprintable() and len(text) < 600


def test_a_claim_costs_no_memory(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"a": one("F64", [1 << 40], [0, 1 << 43])}, bytes(8)))
    tracemalloc.start()
    try:
        with pytest.raises(RunError, match="8 are there"):
            weights.load_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(1 << 31)  # sparse
    with pytest.raises(RunError, match="at most 16,777,216 are read"):
        weights.load_weights(path)


def test_what_is_no_file_is_told(tmp_path):
    for name in ("gone", "."):
        with pytest.raises(RunError, match="cannot be read"):
            weights.load_weights(tmp_path / name)


# --- models ---


class Tied(nn.Module):
    """Two layers that share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("kind", [Tied, lambda: nn.Linear(2, 3), lambda: nn.BatchNorm1d(3)])
def test_a_model_comes_back_with_what_it_shares(tmp_path, kind):
    model, other = kind(), kind()
    weights.save_model(tmp_path / "m", model)
    weights.load_model(tmp_path / "m", other)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_the_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "m"
    for saved, reason in {
        nn.Linear(3, 2): r"'bias' is float32 \(2,\), and float32 \(3,\) in the model",
        nn.Linear(2, 3).double(): r"'bias' is float64 \(3,\), and float32",
        nn.Linear(2, 3, bias=False): "[Mm]issing.*bias",
        nn.Bilinear(2, 2, 3): "'weight' is float32",
        nn.BatchNorm1d(3): "which the model does not have",
    }.items():
        weights.save_model(path, saved)
        model = nn.Linear(2, 3)
        with pytest.raises(RunError, match=f"does not hold this run's model: .*{reason}"):
            weights.load_model(path, model)


def test_shared_and_strange_tensors_are_not_written(tmp_path):
    base = torch.zeros(4)
    for tensors, reason in (
        ({"a": base, "b": base}, "cannot be written"),
        ({"": base}, "cannot be named"),
        ({"__metadata__": base}, "cannot be named"),
        ({"a\n": base}, "cannot be named"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "'a' is torch.complex64"),
    ):
        with pytest.raises(UsageError, match=reason):
            weights.save_weights(tmp_path / "x", tensors)
    assert not list(Path(tmp_path).iterdir())
