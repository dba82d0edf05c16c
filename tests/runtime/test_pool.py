from __future__ import annotations

import copy
import gc
import io
import os
import subprocess
import sys
import threading

import pytest
import torch

from minifuse.runtime.pool import SMALL, Pool, size_class

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]
LITTLE = [((0,), (1,)), ((0, 5), (5, 1)), ((10**7, 0), (1, 1)), ((), ()), ((3,), (1,))]


def _big(pool: Pool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape = (SMALL // 64, 64)
    return pool.tensor(shape, (64, 1), dtype)


def test_size_classes_waste_an_eighth_at_most() -> None:
    for n in [*range(513, 5000), *(2**k + d for k in range(13, 40) for d in (-1, 0, 1))]:
        assert n <= size_class(n) <= n * 1.125
        assert size_class(n) % 64 == 0


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
    assert pool.used_bytes == size_class(100_000) and pool.held_bytes == 2 * size_class(100_000)


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


def test_a_block_returns_when_the_last_view_dies() -> None:
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


def test_a_saved_tensor_holds_its_block() -> None:
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


def test_trim_gives_unused_blocks_back_and_leaves_used_ones() -> None:
    pool = Pool()
    held = pool.lease(1 << 20)
    for lease in [pool.lease(1 << 16), pool.lease(1 << 17)]:
        lease.release()
    assert pool.trim(max_age=1000, limit_bytes=1 << 30) == 0
    assert pool.trim(max_age=1000, limit_bytes=1 << 17) == 1 << 16
    assert pool.trim() == 1 << 17
    assert pool.held_bytes == pool.used_bytes == 1 << 20
    held.release()


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
        child = os.fork()
        if child == 0:
            pool.lease(1000).tensor[0] = 1
            pool.lease(5000)
            os._exit(0 if t[0, 0] == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0 and (t == 1).all()


def test_what_is_held_stays_near_what_was_once_in_use_together() -> None:
    pool = Pool()
    for megabytes in (8, 16, 32, 24, 12):
        pool.lease(megabytes << 20).release()
    assert pool.held_bytes <= 34 << 20
