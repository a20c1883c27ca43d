"""Fingerprints of weights: they see what no version counter records, without a host synchronisation."""

from collections.abc import Iterable, Iterator, Sequence

import torch

# 2⁶⁴ over the golden ratio, as a signed number: its products look unrelated (Knuth, volume 3).
SPREAD = 0x9E3779B97F4A7C15 - 2**64
CHUNK_BYTES = 16 << 20  # what is summed at a time: it bounds the memory that a fingerprint takes while it is computed
SMALL_BYTES = 1 << 16

Fingerprint = tuple[torch.Tensor, ...]


@torch.no_grad()
def fingerprint(tensors: Iterable[torch.Tensor]) -> Fingerprint:
    """A position-weighted sum of the tensors' raw bits, modulo 2⁶⁴: one number for each chunk, left on its device.

    Equal bits give equal numbers; a changed bit, or two values exchanged, gives others. Shapes and dtypes do not count.
    """
    raw: dict[torch.device, list[torch.Tensor]] = {}
    with torch.inference_mode(False):
        for tensor in tensors:
            raw.setdefault(tensor.device, []).append(_bytes(_written_out(tensor.detach())))
        return tuple(torch.stack([_weighted_sum(chunk) for chunk in _chunks(parts)]) for parts in raw.values())


@torch.no_grad()
def bits(tensor: torch.Tensor) -> Fingerprint:
    """What tells, by `equal`, whether a tensor is as it was: of a small one a copy, which is quicker to make."""
    if tensor.numel() * tensor.element_size() > SMALL_BYTES:
        return fingerprint([tensor])
    with torch.inference_mode(False):
        return (_bytes(_written_out(tensor.detach())).clone(),)


def _written_out(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in contiguous memory, with nothing left to do when it is read, as PyTorch leaves `conj()`."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor; what has one element is that with any strides, and `view` asks for 1."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _chunks(parts: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The bytes of all parts in order, in lists of at most `CHUNK_BYTES`."""
    chunk: list[torch.Tensor] = []
    room = CHUNK_BYTES
    for part in parts:
        for piece in (part,) if part.numel() <= room else (part[:room], *part[room:].split(CHUNK_BYTES)):
            if piece.numel() > room:
                yield chunk
                chunk, room = [], CHUNK_BYTES
            chunk.append(piece)
            room -= piece.numel()
    yield chunk


def _weighted_sum(pieces: list[torch.Tensor]) -> torch.Tensor:
    """Words times weights that depend on their places: both mixed, since changes of weights are regular.

    Two changed signs, each the highest bit of a word, would cancel each other in a sum of words as they are, and four
    signs in a row, with weights that grow from place to place by the same.
    """
    padding = -sum(piece.numel() for piece in pieces) % 8
    words = torch.cat([*pieces, pieces[0].new_zeros(padding)]).view(torch.int64)
    place = torch.arange(1, words.numel() + 1, device=words.device, dtype=torch.int64)
    return (_mixed(words) * (_mixed(place) | 1)).sum()


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Every bit of a word moved up by the product, and the upper half then laid over the lower; no two words alike."""
    words = words * SPREAD
    low, high = words.view(torch.int32).view(-1, 2).unbind(1)
    low.bitwise_xor_(high)
    return words


def differs(one: Fingerprint, other: Fingerprint) -> torch.Tensor | None:
    """Whether two fingerprints differ: a boolean on their device, or None where only the host can tell.

    That is where they are of different sizes, or spread over several devices.
    """
    if len(one) != 1 or len(other) != 1 or one[0].shape != other[0].shape or one[0].device != other[0].device:
        return None
    return (one[0] != other[0]).any()


def equal(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two fingerprints are equal; waits for their devices."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


class PendingCheck:
    """A comparison of two fingerprints whose result the host takes when it is there, without waiting for it."""

    def __init__(self) -> None:
        self._found: torch.Tensor | None = None
        self._done: torch.cuda.Event | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether a result is still to be taken."""
        return self._found is not None

    def start(self, now: Fingerprint, then: Fingerprint) -> None:
        """Enqueue the comparison on the current stream; it takes the place of one that is under way."""
        for part in (*now, *then):
            if part.is_cuda:  # another stream may have made it, and would take its memory when it goes
                part.record_stream(torch.cuda.current_stream(part.device))
        found = differs(now, then)
        if found is None:
            found = torch.tensor(not equal(now, then), device="cpu")
        self._done = None
        if found.is_cuda:
            self._found = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True).copy_(
                found, non_blocking=True
            )
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(found.device))
        else:
            self._found = found

    def take(self) -> bool | None:
        """Whether they differed, once; None while nothing is known."""
        if self._found is None or (self._done is not None and not self._done.query()):
            return None
        found = bool(self._found)
        self.forget()
        return found

    def forget(self) -> None:
        """Drop the comparison: the weights that it is about are no longer those of the engines."""
        self._found = self._done = None
