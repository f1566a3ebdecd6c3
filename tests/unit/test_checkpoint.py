"""A state as bytes, any change of which is recognised; and blocks that change all or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from imbalanced_losses._rows import checkpoint as _checkpoint
from imbalanced_losses._rows.checkpoint import AveragedState, pack, unchanged_on_error, unpack

# --- Packed states -------------------------------------------------------------------------------

NUMBERS = st.lists(st.floats() | st.integers(-(2**53), 2**53) | st.booleans(), max_size=5)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool)


@st.composite
def rows(draw: st.DrawFn) -> Tensor | None:
    """[n, k], of any bits that a dtype has: NaN, infinite and −0 among them."""
    dtype = draw(st.none() | st.sampled_from(DTYPES))
    if dtype is None:
        return None
    count, columns = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    numbers = st.floats() if dtype.is_floating_point else st.integers(0, 255)
    values = draw(st.lists(numbers, min_size=count * columns, max_size=count * columns))
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    return torch.tensor(values, dtype=wide).to(dtype).reshape(count, columns)


def bits(numbers: Any) -> list[int]:
    found = torch.as_tensor(numbers, dtype=torch.float64).flatten()
    return torch.where(found.isnan(), torch.nan, found).view(torch.int64).tolist()


@given(NUMBERS, rows())
def test_what_is_packed_comes_back(numbers: list[float], given_rows: Tensor | None) -> None:
    state = pack(numbers, given_rows)
    size = 0 if given_rows is None else given_rows.numel()
    assert (state.dtype, state.shape) == (torch.uint8, (8 * (3 + len(numbers) + size),))
    found, found_rows = unpack(state, len(numbers))
    assert bits(found) == bits([float(number) for number in numbers])
    assert bits(found_rows) == bits([] if given_rows is None else given_rows)


@given(NUMBERS, rows(), st.integers(0), st.integers(1, 255))
def test_any_changed_byte_is_recognised(
    numbers: list[float], given_rows: Tensor | None, place: int, change: int
) -> None:
    state = pack(numbers, given_rows)
    state[place % len(state)] += change  # modulo 256
    with pytest.raises(AveragedState, match="has changed since it was saved"):
        unpack(state, len(numbers))


PACKED = pack([0.3, 7, 1], torch.linspace(-3, 3, 12).reshape(6, 2))


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.int16, torch.uint16, torch.int64],
    ids=str,
)
def test_bytes_survive_a_cast(dtype: torch.dtype) -> None:
    found, expected = unpack(PACKED.to(dtype), 3), unpack(PACKED, 3)
    assert found[0] == expected[0]
    assert found[1].equal(expected[1])


@pytest.mark.parametrize(
    "state",
    [
        torch.zeros_like(PACKED),
        torch.full_like(PACKED, 255),
        PACKED.float() / 2,
        PACKED.double() + 0.25,
        PACKED.double() * torch.nan,
        PACKED.double() + 256,
        PACKED.int() - 256,
        PACKED.to(torch.int8),
        PACKED.bool(),
        PACKED.flip(0),
        PACKED[:-8],
        torch.cat((PACKED, PACKED[-8:])),
        torch.cat((PACKED[:24], PACKED[32:40], PACKED[24:32], PACKED[40:])),
    ],
    ids=lambda state: str(state.dtype),
)
def test_what_is_made_of_bytes_as_of_weights_is_recognised(state: Tensor) -> None:
    with pytest.raises(AveragedState):
        unpack(state, 3)


def words(*numbers: float) -> Tensor:
    """Packed by somebody who knows how, whatever it says."""
    inner = torch.tensor(numbers, dtype=torch.float64).view(torch.int64)
    return torch.cat((_checkpoint._checksum(inner), inner)).view(torch.uint8)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (PACKED[:-1], ValueError, "must be bytes in eights, got 143"),
        (PACKED[:16], ValueError, "must be bytes in eights, got 16"),
        (None, TypeError, "must be a dense tensor with values, got NoneType"),
        (PACKED.to("meta"), TypeError, "must be a dense tensor with values"),
        (PACKED.to_sparse(), TypeError, "must be a dense tensor with values"),
        (PACKED.to(torch.complex64), TypeError, "must be real, got torch.complex64"),
        (pack([1.0, 2.0]), ValueError, "the same kind of loss"),
        (words(2, 3, 0.3, 7, 1), ValueError, "this version or an older one"),
    ],
    ids=["bytes", "head", "none", "meta", "sparse", "complex", "kind", "version"],
)
def test_what_was_never_packed_so_is_refused(
    state: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        unpack(state, 3)
    assert not isinstance(raised.value, AveragedState)


# --- Blocks that raise ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_done", [False, True], ids=["in the middle", "at the end"])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_unchanged_on_error(error: type[BaseException] | None, is_done: bool) -> None:
    """Numbers, what names point to, names themselves, and the places of tensors that are named."""
    tensor = torch.tensor([0.0, torch.nan, -0.0, 3.0], requires_grad=True)
    attributes: dict[str, Any] = {"tensor": tensor, "count": 1, "gone": None}
    before, values = dict(attributes), tensor.detach().clone()

    def block() -> None:
        with unchanged_on_error(attributes, writes=[(tensor, slice(1, 3))], unless=lambda: is_done):
            attributes.update(count=2, new=3, tensor=torch.zeros(4))
            del attributes["gone"]
            with torch.no_grad():
                tensor[1:] = 9.0  # the last of them is nobody's business
            if error is not None:
                raise error

    if error is None:
        block()
    else:
        with pytest.raises(error):
            block()
    if error is None or is_done:
        assert (list(attributes), attributes["count"]) == (["tensor", "count", "new"], 2)
        assert tensor.tolist() == [0, 9, 9, 9]
    else:
        assert list(attributes) == list(before)
        assert all(attributes[name] is value for name, value in before.items())
        assert bits(tensor[:3]) == bits(values[:3])
        assert tensor[3] == 9
