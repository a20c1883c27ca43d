"""Fingerprints: what no version counter records, compared without waiting."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchaccel import fingerprint as module
from torchaccel.fingerprint import PendingCheck, bits, differs, equal, fingerprint


@settings(max_examples=200)
@given(st.data())
def test_equal_bits_give_equal_prints_and_a_changed_or_exchanged_value_another(data: Any) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64]))
    size = data.draw(st.integers(1, 40))
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).mul(50).to(dtype)
    before = fingerprint([tensor])
    assert equal(fingerprint([tensor.clone()]), before)
    place = data.draw(st.integers(0, size - 1))
    changed = tensor.clone()
    raw = changed.view(torch.uint8)
    byte = place * tensor.element_size() + data.draw(st.integers(0, tensor.element_size() - 1))
    raw[byte] ^= 1 << data.draw(st.integers(0, 7))
    assert not equal(fingerprint([changed]), before)
    other = data.draw(st.integers(0, size - 1))
    swapped = tensor.clone()
    swapped[place], swapped[other] = tensor[other], tensor[place]
    assert equal(fingerprint([swapped]), before) == torch.equal(swapped.view(torch.uint8), tensor.view(torch.uint8))


@settings(max_examples=300)
@given(st.data())
def test_signs_that_change_together_do_not_cancel_each_other(data: Any) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.float64]))
    size = data.draw(st.integers(1, 48))
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).to(dtype)
    flipped = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    changed = tensor.clone()
    changed[list(flipped)] *= -1
    assert not equal(fingerprint([changed]), fingerprint([tensor]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_neither_do_they_in_a_whole_tensor_or_in_every_second_or_fourth_place(dtype: torch.dtype) -> None:
    for seed in range(300):
        tensor = torch.randn(32, generator=torch.Generator().manual_seed(seed)).to(dtype)
        before = fingerprint([tensor])
        for step, first in ((1, 0), (2, 0), (2, 1), (4, 3), (8, 7)):
            changed = tensor.clone()
            changed[first::step] *= -1
            assert not equal(fingerprint([changed]), before), (seed, step, first)
    words = torch.randint(-(2**62), 2**62, (64,))
    assert module._mixed(torch.cat([words, ~words, -words])).unique().numel() == 192


def test_a_fingerprint_takes_tensors_of_any_kind() -> None:
    tensors = [
        torch.empty(0), torch.tensor(1.5), torch.tensor(True), torch.zeros(3, dtype=torch.uint8), torch.randn(3, 5).T,
        torch.randn(2, 2, dtype=torch.complex64), torch.zeros(5, dtype=torch.float8_e4m3fn),
        nn.Parameter(torch.ones(2)), torch.arange(3.0)[::2][1:], torch.arange(8.0)[4:].reshape(2, 2),
    ]  # fmt: skip
    prints = fingerprint(tensors)
    assert equal(fingerprint([tensor.detach().clone() for tensor in tensors]), prints)
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            changed = [other.detach().clone().contiguous() for other in tensors]
            module._bytes(changed[index])[-1] ^= 1
            assert not equal(fingerprint(changed), prints)
    assert fingerprint([]) == ()
    assert fingerprint([torch.empty(0)])[0].tolist() == [0]


@pytest.mark.parametrize(
    "view",
    [torch.conj, lambda tensor: tensor.conj().imag, lambda tensor: tensor[0, :1].conj().imag],
    ids=["conjugate", "negative", "one negative, which is contiguous"],
)
def test_what_is_computed_only_when_it_is_read_counts_by_its_values(view: Any) -> None:
    tensor = torch.randn(3, 2, dtype=torch.complex64)
    assert equal(fingerprint([view(tensor)]), fingerprint([view(tensor).resolve_conj().resolve_neg().clone()]))
    assert not equal(fingerprint([view(tensor)]), fingerprint([view(tensor).conj_physical().neg()]))


@pytest.mark.parametrize("size", [4, module.SMALL_BYTES])
def test_the_bits_of_a_tensor_of_any_size_tell_whether_it_was_written_to(size: int) -> None:
    tensor = torch.full((size,), float("nan"))[::2]
    before = bits(tensor)
    assert equal(bits(tensor), before)
    tensor[-1] = -tensor[-1]
    assert not equal(bits(tensor), before)
    assert not equal(bits(tensor[:-1]), before)


def test_a_comparison_is_the_host_s_whatever_the_default_device() -> None:
    check = PendingCheck()
    with torch.device("meta"):
        check.start(fingerprint([torch.ones(2, device="cpu")]), ())
    assert check.take() is True


@pytest.mark.parametrize("sizes", [(1,), (16,), (17,), (64, 1), (3, 40, 5), (100, 100), (15, 1, 16, 0, 33)])
def test_what_is_summed_at_a_time_is_bounded_and_no_byte_is_lost(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 16)
    parts = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    chunks = list(module._chunks(parts))
    assert all(sum(piece.numel() for piece in chunk) <= 16 for chunk in chunks)
    assert torch.equal(torch.cat([piece for chunk in chunks for piece in chunk]), torch.cat(parts))
    before = fingerprint(parts)
    for part in parts:
        for place in range(part.numel()):
            part[place] ^= 4
            assert not equal(fingerprint(parts), before)
            part[place] ^= 4
    assert equal(fingerprint(parts), before)


def test_every_bit_of_every_word_counts() -> None:
    before = fingerprint([torch.zeros(6, dtype=torch.int64)])
    for place in range(6):
        for bit in range(64):
            changed = torch.zeros(6, dtype=torch.int64)
            changed[place] = (1 << bit) - (1 << 64 if bit == 63 else 0)
            assert not equal(fingerprint([changed]), before), f"bit {bit} of word {place}"


def test_zero_and_minus_zero_and_two_nans_of_other_bits_have_different_prints() -> None:
    assert not equal(fingerprint([torch.tensor([0.0])]), fingerprint([torch.tensor([-0.0])]))
    quiet, other = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert not equal(fingerprint([quiet]), fingerprint([other]))
    assert equal(fingerprint([quiet]), fingerprint([quiet.clone()]))


def test_a_pending_check_gives_its_result_once() -> None:
    one, other = fingerprint([torch.zeros(3)]), fingerprint([torch.ones(3)])
    check = PendingCheck()
    assert check.take() is None
    for then, expected in ((one, False), (other, True)):
        check.start(one, then)
        assert check.is_under_way
        assert check.take() is expected
        assert check.take() is None
    check.start(one, other)
    check.forget()
    assert check.take() is None


def test_prints_of_other_sizes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 16)
    short, long = fingerprint([torch.zeros(4)]), fingerprint([torch.zeros(8)])  # one chunk, and two
    assert differs(short, long) is None
    assert not equal(short, long)


def test_one_chunk_that_differs_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 16)
    before, after = (fingerprint([torch.tensor([0.0, 0, 0, 0, last, 0, 0, 0])]) for last in (0.0, 1.0))
    found = differs(before, after)
    assert found is not None
    assert found.item() is True
    same = differs(before, before)
    assert same is not None
    assert same.item() is False


def test_prints_of_no_tensors_are_compared_on_the_host() -> None:
    one, none = fingerprint([torch.zeros(3)]), fingerprint([])
    assert differs(one, none) is None
    assert not equal(one, none)
    check = PendingCheck()
    check.start(one, none)
    assert check.take() is True
