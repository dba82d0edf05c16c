from __future__ import annotations

import copy
import gc
import io
import os
import random
import subprocess
import sys
import threading

import pytest
import torch

from minifuse.runtime.pool import EASY, KEEP, PAGE, SLACK, SMALL, Lease, Pool

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]
LITTLE = [((0,), (1,)), ((0, 5), (5, 1)), ((10**7, 0), (1, 1)), ((), ()), ((3,), (1,))]


def _big(pool: Pool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape = (SMALL // 64, 64)
    return pool.tensor(shape, (64, 1), dtype)


def _bytes(pool: Pool, nbytes: int) -> torch.Tensor:
    return pool.tensor((nbytes,), (1,), torch.uint8)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each segment that pools got from the system."""
    asked: list[int] = []
    get = Pool._fresh
    monkeypatch.setattr(Pool, "_fresh", lambda pool, size: (asked.append(size), get(pool, size))[1])
    return asked


class User:
    """Leaves something with a piece of memory."""


def test_a_released_arena_is_leased_again() -> None:
    pool = Pool()
    first = pool.lease(100_000)
    at = first.tensor.data_ptr()
    assert at % 64 == 0 and first.tensor.dtype is torch.uint8 and first.tensor.nbytes >= 100_000
    other = pool.lease(100_000)
    assert other.tensor.data_ptr() != at
    first.release()
    first.release()
    with pool.lease(99_900) as again:
        assert again.tensor.data_ptr() == at
    rounded = -(-100_000 // PAGE) * PAGE
    assert pool.used_bytes == rounded and pool.held_bytes == 2 * rounded


def test_a_released_lease_has_no_memory() -> None:
    lease = Pool().lease(10)
    lease.release()
    with pytest.raises(RuntimeError, match="released"):
        lease.tensor  # noqa: B018


def test_a_forgotten_lease_comes_back() -> None:
    pool = Pool()
    pool.lease(5000)
    gc.collect()
    assert pool.used_bytes == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pooled_tensor_looks_like_an_empty_one(dtype: torch.dtype) -> None:
    rows = SMALL // 16
    for shape, stride in (((rows, 64), (64, 1)), ((rows, 64), (1, rows)), ((rows, 32), (64, 1)), ((4, rows), (0, 64))):
        t = Pool().tensor(shape, stride, dtype)
        like = torch.empty_strided(shape, stride, dtype=dtype)
        assert (t.shape, t.stride(), t.dtype, t.device) == (like.shape, like.stride(), dtype, like.device)
        assert t.untyped_storage().nbytes() == like.untyped_storage().nbytes()
        assert not t._is_view() and t.is_leaf and not t.requires_grad


@pytest.mark.parametrize(("shape", "stride"), LITTLE)
def test_small_and_empty_tensors_are_torch_s(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    pool = Pool()
    t = pool.tensor(shape, stride, torch.float32)
    assert t.shape == shape and t.stride() == stride and pool.held_bytes == 0


def test_a_piece_returns_when_the_last_view_dies() -> None:
    pool = Pool()
    t = _big(pool)
    at = t.data_ptr()
    holders = [t[1:], t.detach(), t.view(-1), t.numpy(), t.untyped_storage(), t.t()]
    del t
    while holders:
        assert pool.used_bytes > 0
        holders.pop(0)
        gc.collect()
    assert pool.used_bytes == 0
    assert _big(pool).data_ptr() == at


def test_a_saved_tensor_holds_its_piece() -> None:
    pool = Pool()
    t = _big(pool).fill_(3).requires_grad_()
    y = (t * t).sum()
    grad_of = t
    del t
    y.backward()
    assert torch.equal(grad_of.grad, torch.full_like(grad_of, 6))  # type: ignore[arg-type]
    del y, grad_of
    gc.collect()
    assert pool.used_bytes == 0


def test_a_dead_pool_s_tensors_live_on() -> None:
    t = _big(Pool()).fill_(2)
    gc.collect()
    assert (t == 2).all()


def test_the_pool_holds_nothing_of_a_tensor_that_python_no_longer_sees() -> None:
    pool = Pool()
    x = _big(pool).fill_(1)
    w = torch.ones(64, requires_grad=True)
    y = (x * w).sum()
    del x
    gc.collect()
    assert pool.used_bytes > 0  # only autograd's saved tensor has it now
    y.backward()
    gc.collect()
    assert pool.used_bytes == 0


def test_tensor_methods_behave() -> None:
    t = _big(Pool()).fill_(1)
    t.add_(1).mul_(2)
    assert (t == 4).all() and (t.numpy() == 4).all()
    t.numpy()[0, 0] = 9
    assert t[0, 0] == 9 and t.is_contiguous() and t.is_set_to(t.view_as(t))
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    assert torch.equal(torch.load(file), t)
    assert torch.equal(copy.deepcopy(t), t) and torch.equal(t.clone(), t)
    with pytest.raises(RuntimeError, match="resiz"):
        t.clone()[:0].set_(t.untyped_storage()).resize_(t.numel() * 2)
    assert t.detach().resize_(10, 10).shape == (10, 10)
    shared = t.detach()
    shared.share_memory_()
    assert shared.is_shared() and torch.equal(shared, t)


def test_two_threads_hold_leases_at_once_and_all_come_back() -> None:
    pool = Pool()
    failures: list[str] = []

    def work(mark: int) -> None:
        for k in range(200):
            with pool.lease(20_000 + k % 7 * 5000) as lease:
                lease.tensor.fill_(mark)
                t = _big(pool, torch.uint8) if k % 20 == 0 else None
                if t is not None:
                    t.fill_(mark)
                if not (lease.tensor == mark).all() or (t is not None and not (t == mark).all()):
                    failures.append("shared")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert failures == [] and pool.used_bytes == 0


def test_a_tensor_may_die_on_another_thread() -> None:
    pool = Pool()
    box = [_big(pool)]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    gc.collect()
    assert pool.used_bytes == 0


def test_trim_gives_unused_segments_back_and_leaves_used_ones() -> None:
    pool = Pool()
    held = pool.lease(1 << 20)
    for lease in [pool.lease(1 << 16), pool.lease(1 << 17)]:
        lease.release()
    assert pool.trim(max_age=1000, limit_bytes=1 << 30) == 0
    assert pool.trim(max_age=1000, limit_bytes=1 << 17) == 1 << 16
    assert pool.trim() == 1 << 17
    assert pool.held_bytes == pool.used_bytes == 1 << 20
    held.release()


def test_trim_forgets_what_was_in_use_together() -> None:
    pool = Pool()
    for lease in [pool.lease(32 << 20), pool.lease(32 << 20)]:
        lease.release()
    pool.trim()
    pool.lease(8 << 20).release()
    lease = pool.lease(16 << 20)
    assert pool.held_bytes == 16 << 20  # where 64 MiB may lie idle, the 8 would have
    lease.release()


def test_an_operators_result_takes_the_place_of_a_free_segment() -> None:
    pool = Pool()
    for _ in range(3):
        mine = pool.tensor((SMALL,), (1,), torch.uint8)
        held = pool.held_bytes
        del mine
        pool.lend(SMALL)
        assert pool.held_bytes == held - SMALL
        made = torch.arange(SMALL // 4, dtype=torch.float32).view(-1, 64)
        address = made.data_ptr()
        result = pool.own(made)
        del made
        assert (pool.held_bytes, pool.used_bytes) == (held, SMALL)
        assert result.data_ptr() == address and result.shape == (SMALL // 256, 64) and result.stride() == (64, 1)
        assert torch.equal(result.flatten(), torch.arange(SMALL // 4, dtype=torch.float32))
        view = result[1:]
        del result
        assert pool.free_bytes == 0  # a view holds it
        del view
        assert pool.free_bytes == SMALL
        again = pool.tensor((SMALL,), (1,), torch.uint8)
        assert again.data_ptr() == address
        del again


def test_what_is_small_or_in_use_is_not_lent() -> None:
    pool = Pool()
    used, free = (pool.tensor((4 * SMALL,), (1,), torch.uint8) for _ in range(2))
    del free
    held = pool.held_bytes
    for nbytes in (0, 64, SMALL - 1):
        pool.lend(nbytes)
        assert pool.held_bytes == held
    pool.lend(4 * SMALL)
    pool.lend(4 * SMALL)
    assert pool.held_bytes == held - 4 * SMALL and used.numel() == 4 * SMALL
    small, part = torch.ones(8), torch.ones(SMALL + 1)[1:]
    assert pool.own(small) is small and pool.own(part) is part


def resident(nbytes: int) -> int:
    """The change since as many bytes were resident, in MiB."""
    return round((_resident() - nbytes) / (1 << 20))


def _resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages go back one by one on Linux alone")
def test_free_parts_of_a_segment_in_use_go_back_to_the_system() -> None:
    pool = Pool()
    before = _resident()
    _bytes(pool, 64 << 20).fill_(1)
    lower, upper = _bytes(pool, 16 << 20), _bytes(pool, 32 << 20)
    upper.fill_(3)
    assert pool.held_bytes == 64 << 20 and resident(before) == 64
    del lower
    assert pool.trim(max_age=1000, limit_bytes=24 << 20) == 8 << 20 and resident(before) == 56
    assert pool.trim(max_age=1000, limit_bytes=24 << 20) == 0
    assert pool.trim() == 24 << 20 and pool.held_bytes == 32 << 20 and resident(before) == 32
    again = _bytes(pool, 16 << 20).fill_(2)  # the pages come back as they are written
    assert pool.held_bytes == 48 << 20 and resident(before) == 48
    assert again.min() == 2 and upper.max() == 3
    del again, upper
    assert pool.free_bytes == pool.held_bytes == 48 << 20  # the last piece was cold
    whole = _bytes(pool, 64 << 20).fill_(4)
    assert pool.held_bytes == 64 << 20 and resident(before) == 64
    del whole


def test_without_pages_to_give_back_parts_stay_and_segments_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minifuse.runtime.pool.LIBC", None)
    pool = Pool()
    _bytes(pool, 8 << 20)
    lower, upper = _bytes(pool, 2 << 20), _bytes(pool, 6 << 20)
    del lower
    assert pool.trim() == 0 and pool.held_bytes == 8 << 20
    del upper
    assert pool.trim() == 8 << 20 and pool.held_bytes == 0


def test_room_is_made_for_an_operator_s_result_of_another_size() -> None:
    pool = Pool()
    used, free, other = (_bytes(pool, 4 * SMALL) for _ in range(3))
    del free, other
    pool.lend(5 * SMALL)
    result = pool.own(torch.empty(5 * SMALL, dtype=torch.uint8))
    assert pool.held_bytes <= 12 * SMALL * (EASY + 1) // EASY
    pool.expect(peak=12 * SMALL, given=4 * SMALL, limited=True)
    del result
    pool.lend(6 * SMALL)
    result = pool.own(torch.empty(6 * SMALL, dtype=torch.uint8))
    assert pool.held_bytes <= 12 * SMALL * (SLACK + 1) // SLACK
    del used, result


def test_what_lies_idle_makes_room_for_what_a_call_holds_beside_the_pool() -> None:
    pool = Pool()
    given, idle = (_bytes(pool, 4 * SMALL) for _ in range(2))
    del idle
    pool.expect(peak=16 * SMALL, given=4 * SMALL, limited=True)
    pool.beside(8 * SMALL)  # and 8 in the pool are the peak
    assert pool.held_bytes == 8 * SMALL
    pool.expect(peak=4 * SMALL, given=0, limited=True)  # of another graph: what the first needs stays
    pool.beside(2 * SMALL)
    assert pool.held_bytes == 8 * SMALL
    pool.expect(peak=16 * SMALL, given=4 * SMALL, limited=True)
    pool.beside(11 * SMALL)
    assert pool.held_bytes == 4 * SMALL
    new = _bytes(pool, 4 * SMALL)
    assert pool.held_bytes == 8 * SMALL  # what is in use is in use
    del new
    assert pool.held_bytes == 4 * SMALL  # and goes as it dies
    pool.beside(0)
    _bytes(pool, 4 * SMALL)
    assert pool.held_bytes == 8 * SMALL
    del given


def test_memory_beyond_the_limit_goes_back_when_more_is_asked() -> None:
    pool = Pool(limit_bytes=1 << 16)
    pool.lease(1 << 20).release()
    pool.lease(1 << 21)
    assert pool.free_bytes <= 1 << 21 and pool.held_bytes == 1 << 21


def test_tensors_alive_at_exit_do_no_harm() -> None:
    script = """
import torch
from minifuse.runtime.pool import Pool, SMALL
pool = Pool()
kept = [pool.tensor((SMALL,), (1,), torch.float32) for _ in range(3)]
torch.kept = pool.tensor((SMALL,), (1,), torch.float32)
lease = pool.lease(10_000)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_its_own_pool() -> None:
    pool = Pool()
    t = _big(pool).fill_(1)
    pool.lease(1000).release()
    with pool._lock:  # as if another thread were inside
        pool._torn = True
        child = os.fork()
        if child == 0:
            pool.lease(1000).tensor[0] = 1
            pool.lease(5000)
            os._exit(0 if t[0, 0] == 1 else 1)
        pool._torn = False
    assert os.waitpid(child, 0)[1] == 0 and (t == 1).all()


def test_what_is_held_stays_near_what_was_once_in_use_together() -> None:
    pool = Pool()
    for megabytes in (8, 16, 32, 24, 12):
        pool.lease(megabytes << 20).release()
    assert pool.held_bytes <= 34 << 20


def test_a_piece_is_split_and_its_parts_coalesce(fresh: list[int]) -> None:
    pool = Pool()
    at = _bytes(pool, 3 << 20).data_ptr()
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        parts = [_bytes(pool, 1 << 20) for _ in range(3)]
        assert [p.data_ptr() - at for p in parts] == [0, 1 << 20, 2 << 20]
        assert [p.untyped_storage().nbytes() for p in parts] == [1 << 20] * 3
        assert pool.used_bytes == 3 << 20 and pool.free_bytes == 0
        for k in order:
            parts[k] = parts[k][:0].clone()
            assert pool.used_bytes + pool.free_bytes == 3 << 20
        assert _bytes(pool, 3 << 20).data_ptr() == at
    assert fresh == [3 << 20] and pool.held_bytes == 3 << 20


def test_the_smallest_piece_that_fits_is_taken() -> None:
    pool = Pool()
    sizes = [8 << 20, 2 << 20, 4 << 20]
    at = {n: t.data_ptr() for n, t in [(n, _bytes(pool, n)) for n in sizes]}
    assert _bytes(pool, 3 << 20).data_ptr() == at[4 << 20]
    assert _bytes(pool, (2 << 20) - 100).data_ptr() == at[2 << 20]
    assert _bytes(pool, 5 << 20).data_ptr() == at[8 << 20]


def test_small_rests_are_not_split_off_and_small_arenas_split_nothing(fresh: list[int]) -> None:
    pool = Pool()
    _bytes(pool, 2 << 20)
    with pool.lease((2 << 20) - KEEP + PAGE) as lease:
        assert lease.tensor.nbytes == 2 << 20
    with pool.lease(PAGE):
        assert fresh == [2 << 20, PAGE]
    with pool.lease((2 << 20) - KEEP) as lease:
        assert lease.tensor.nbytes == (2 << 20) - KEEP and pool.free_bytes == KEEP + PAGE


def test_a_memo_is_found_again_over_the_same_memory_alone() -> None:
    pool, user = Pool(), User()
    with pool.lease(2 << 20) as lease:
        lease.memo[user] = "left"
        at = lease.tensor.data_ptr()
    for _ in range(3):
        assert pool.used_bytes == 0  # it is among the free pieces now
        with pool.lease(2 << 20) as lease:
            with pool.lease(2 << 20) as other:
                assert user not in other.memo
            assert lease.memo[user] == "left" and lease.tensor.data_ptr() == at
        assert pool.trim(max_age=1000, limit_bytes=2 << 20) == 2 << 20  # what `other` had goes, the younger stays
    with pool.lease(1 << 20) as lower, pool.lease(1 << 20) as upper:
        assert lower.tensor.data_ptr() == at and user not in lower.memo and user not in upper.memo
        lower.memo[user] = upper.memo[user] = "of a half"
    assert pool.used_bytes == 0
    with pool.lease(2 << 20) as lease:
        assert lease.tensor.data_ptr() == at and user not in lease.memo


def test_the_arena_given_back_last_is_leased_first() -> None:
    pool = Pool()
    first, second, third = leases = [pool.lease(1 << 20) for _ in range(3)]
    at = second.tensor.data_ptr()
    for lease in (third, first, second):
        lease.release()
    assert pool.used_bytes == 0 and leases
    assert pool.lease(1 << 20).tensor.data_ptr() == at


def test_pieces_in_use_never_overlap() -> None:
    """Three threads take, mark, check and give back at random, tensors and arenas, some over each other's threads."""
    pool = Pool()
    failures: list[str] = []
    shared: list[tuple[int, torch.Tensor, Lease | None]] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for k in range(250):
            nbytes = rng.choice([SMALL, SMALL * 3 // 2, SMALL * 3, rng.randrange(SMALL, 4 * SMALL)])
            lease = pool.lease(rng.choice([nbytes // 100, nbytes])) if rng.random() < 0.4 else None
            data = _bytes(pool, nbytes) if lease is None else lease.tensor
            if data.data_ptr() % 64:
                failures.append("unaligned")
            mark = seed * 40 + k % 40
            shared.append((mark, data.fill_(mark), lease))
            del data, lease
            while len(shared) > 6:
                try:
                    mark, data, lease = shared.pop(rng.randrange(len(shared)))
                except (IndexError, ValueError):
                    break
                if not (data == mark).all():
                    failures.append("shared")
                if lease is not None:
                    lease.release()
                del data, lease

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shared.clear()
    gc.collect()
    assert failures == [] and pool.used_bytes == 0 and pool.held_bytes == pool.free_bytes
    assert pool.trim() > 0
    assert pool.held_bytes == 0 and pool._free == {} and pool._sizes == []


def test_a_piece_may_come_back_inside_the_pool_s_own_code() -> None:
    pool = Pool()
    box = [_bytes(pool, 2 << 20)]
    lease = pool.lease(1 << 20)
    with pool._lock:  # as a finaliser that a collection runs there
        box.clear()
        lease.release()
    assert pool.used_bytes == 0 and pool.free_bytes == 3 << 20


def test_segments_that_others_were_wanted_for_are_not_split_again() -> None:
    pool = Pool()
    bound = (6 << 20) * (EASY + 1) // EASY

    def step() -> int:
        with pool.lease(4 << 20):
            kept = [_bytes(pool, 2 << 20)]
        kept = [_bytes(pool, 1 << 20), *kept]
        late = _bytes(pool, 1 << 20)
        del kept[1]
        whole = _bytes(pool, 4 << 20)
        held = pool.held_bytes
        del kept, late, whole
        return held

    held = [step() for _ in range(6)]
    assert held[-1] <= bound and held[-2] <= bound and pool.held_bytes <= bound


def test_a_request_that_the_system_refuses_changes_nothing() -> None:
    pool = Pool()
    t = _big(pool)
    used, held = pool.used_bytes, pool.held_bytes
    with pytest.raises(RuntimeError, match="memory"):
        pool.lease(1 << 60)
    assert (pool.used_bytes, pool.held_bytes, pool._most) == (used, held, used)
    del t
    assert pool.used_bytes == 0


def test_a_change_that_an_interrupt_stopped_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    t = _big(pool).fill_(1)
    _bytes(pool, 2 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(Pool, "_insert", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _bytes(pool, 3 << 20)
    others = [_bytes(pool, 2 << 20).fill_(k) for k in range(3)]
    assert (t == 1).all() and all((o == k).all() for k, o in enumerate(others)) and pool.used_bytes == 6 << 20
    del t, others
    assert pool.used_bytes == 0
