"""`LayeredFile`: tensors come back bit for bit, by safetensors' own library too, and a group is one aligned piece."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from headstart.weights.files import CACHE_LINE, DTYPES, PADDING, PAGE, CheckpointFiles, LayeredFile


def header_of(path):
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))


def bits(x):
    return x.contiguous().view(-1).view(torch.uint8)


def random_bits(*shape, dtype):
    size = torch.empty((), dtype=dtype).element_size()
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(0, 256, (*shape, size), dtype=torch.uint8).view(dtype).squeeze(-1)


def groups():
    """Every dtype, odd sizes, scalars, empty tensors, what is not contiguous; a group of whole pages, an empty one."""
    odd = {f"odd.{name}": random_bits(3, 7, dtype=dtype) for name, dtype in DTYPES.items()}
    odd |= {"scalar": random_bits(1, dtype=torch.float32)[0], "empty": torch.empty(0, 5, dtype=torch.bfloat16)}
    one = {"layers.0.w": random_bits(64, 40, dtype=torch.bfloat16), "layers.0.n": random_bits(577, dtype=torch.int64)}
    one |= {"layers.0.t": random_bits(8, 16, dtype=torch.float16).T, "layers.0.v": random_bits(13, dtype=torch.int8)}
    return [odd, one, {"layers.1.w": random_bits(2 * PAGE, dtype=torch.uint8)}, {}, {"layers.3.é": torch.ones(1)}]


def test_comes_back_aligned_and_in_order(tmp_path):
    path, wanted = tmp_path / "model.safetensors", groups()
    names = [name for group in wanted for name in group]
    with LayeredFile(path, [*names, "never", "added"]) as file:
        for group in wanted:
            file.add(group)
    everything = {name: x for group in wanted for name, x in group.items()}
    loaded = load_file(path)
    assert {name for name in loaded if not name.startswith(PADDING)} == everything.keys()
    for name, x in everything.items():
        assert loaded[name].dtype == x.dtype and loaded[name].shape == x.shape
        assert torch.equal(bits(loaded[name]), bits(x))

    start, header = header_of(path)
    assert header.pop("__metadata__") == {"format": "pt"} and start % PAGE == 0
    spans = sorted((x["data_offsets"], name) for name, x in header.items())
    assert [a[1] for (a, _) in spans[:-1]] == [b[0] for (b, _) in spans[1:]] and spans[0][0][0] == 0  # no holes
    assert start + spans[-1][0][1] == path.stat().st_size
    end = start
    for i, group in enumerate(wanted):
        spans = [[start + offset for offset in header[name]["data_offsets"]] for name in group]
        if f"{PADDING}{i}" in header:
            spans.append([start + offset for offset in header[f"{PADDING}{i}"]["data_offsets"]])
        assert min((span[0] for span in spans), default=end) == end and end % PAGE == 0
        assert sum(b - a for a, b in spans) == max((span[1] for span in spans), default=end) - end  # nothing between
        end = max((span[1] for span in spans), default=end)
        for name, x in group.items():
            first = start + header[name]["data_offsets"][0]
            assert first % x.element_size() == 0 and (x.nbytes % CACHE_LINE or first % CACHE_LINE == 0)
    assert end == path.stat().st_size and f"{PADDING}2" not in header  # whole pages need no padding


def test_padding_is_hidden_from_our_reader_alone(tmp_path):
    with LayeredFile(tmp_path / "model.safetensors", ["a"]) as file:
        file.add({"a": torch.arange(3)})
    files = CheckpointFiles(tmp_path)
    assert files.names() == ["a"] and f"{PADDING}0" not in files
    with safe_open(tmp_path / "model.safetensors", "pt") as whole:
        assert not whole.get_tensor(f"{PADDING}0").any() and whole.metadata() == {"format": "pt"}


def test_a_name_is_added_once_and_only_if_it_was_given(tmp_path):
    with pytest.raises(ValueError, match="LayeredFile: expected the names given before, each once, got b"):
        with LayeredFile(tmp_path / "file", ["a"]) as file:
            file.add({"b": torch.ones(1)})
    with pytest.raises(ValueError, match="each once, got a"):
        with LayeredFile(tmp_path / "file", ["a"]) as file:
            file.add({"a": torch.ones(1)})
            file.add({"a": torch.ones(1)})
    with pytest.raises(ValueError, match="not a whole safetensors file"):  # its header was never written
        (tmp_path / "file").rename(tmp_path / "model.safetensors")
        CheckpointFiles(tmp_path)


def test_nothing_added(tmp_path):
    with LayeredFile(tmp_path / "file", []):
        pass
    assert load_file(tmp_path / "file") == {}
