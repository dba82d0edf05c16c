"""Random numbers: Philox4x32-10 by its known answers, and what the IR makes of its words."""

import math

import pytest
import torch

from minifuse.ir.interpret import philox, philox_words, run_kernel
from minifuse.ir.text import parse_kernel

F32 = torch.float32


def philox_by_hand(counter, key, rounds=10):
    """Philox4x32 on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


# The known-answer tests of Random123 1.14 (kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(low, high):
    both = low | high << 32
    return both - 2**64 if both >= 2**63 else both


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, answer):
    assert tuple(philox_by_hand(counter, key)) == answer
    index = torch.tensor([signed(*counter[:2])])
    words = philox_words(signed(*key), counter[2] | counter[3] << 32, index)
    assert tuple(int(w) for w in words) == answer


def test_philox_kinds_are_made_of_the_words_as_documented():
    seed, offset = -(2**63) + 12345, 2**40 + 3
    index = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7])
    key = (seed % 2**32, (seed >> 32) % 2**32)

    def stream(n):
        return philox_by_hand(((n >> 2) % 2**32, n >> 34, offset % 2**32, offset >> 32), key)[n % 4]

    uniform = philox("uniform", seed, offset, index)
    assert uniform.dtype is F32
    assert uniform.tolist() == [(stream(n) >> 8) * 2.0**-24 for n in index.tolist()]
    words = [(stream(2 * n), stream(2 * n + 1)) for n in index.tolist()]
    assert philox("bits", torch.tensor(seed), offset, index).tolist() == [signed(*w) for w in words]
    normal = philox("normal", seed, offset, index)
    want = [
        math.sqrt(-2 * math.log(((w[0] >> 8) + 1) * 2.0**-24)) * math.cos(2 * math.pi * (w[1] >> 8) * 2.0**-24)
        for w in words
    ]
    torch.testing.assert_close(normal, torch.tensor(want), rtol=1e-5, atol=1e-5)


def test_random_numbers_have_their_distribution():
    index = torch.arange(100_000)
    uniform, normal = philox("uniform", 1, 0, index), philox("normal", 1, 0, index)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.005
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    assert not torch.equal(uniform, philox("uniform", 2, 0, index))
    assert not torch.equal(uniform, philox("uniform", 1, 1, index))


def test_a_random_value_depends_on_its_logical_index_alone():
    text = """
    kernel k  i < 6, j < 4
      param seed : i64[]
      param out : f32[6, 4]
      store out[i, j] = random(normal, seed load seed[], offset 5, index {index})
    """
    seed, a, b = torch.tensor(-77), torch.empty(6, 4), torch.empty(6, 4)
    run_kernel(parse_kernel(text.format(index="4*i + j")), {"seed": seed, "out": a}, {})
    run_kernel(parse_kernel(text.format(index="6*j + i")), {"seed": seed, "out": b}, {})
    assert torch.equal(a.flatten(), philox("normal", -77, 5, torch.arange(24)))
    assert torch.equal(b.t().flatten(), a.flatten())
