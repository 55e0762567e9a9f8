"""How the processes of a run find each other where a launcher may start them again (`--max_restarts`)."""

import os
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler

SCHEME = "started-together"


def init_method() -> str | None:
    """What `init_process_group` is told: None, its own way, unless a launcher keeps one store through its restarts.

    The launchers of PyTorch do (torch 2.11): the addresses of the processes before a restart still stand in the store,
    and who reads them calls on a process that is gone. Nor do the launchers of several machines count restarts alike.
    """
    return f"{SCHEME}://" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None


def agree(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name that the `world` processes started together, and none before them, agree on, through a store they share.

    A process other than the first leaves a word of its own and waits for the answer to it, then says that it has it;
    the first answers every word it finds, left by the living or the dead, until each process has said so. A launcher
    starts processes only when those before them are gone: who answers lives, and only the living say that they have it.

    Raises:
        torch.distributed.DistError: they have not come together within `timeout`.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"word of {rank}", own)
        store.wait([f"answer to {own}"], timeout)
        name = store.get(f"answer to {own}").decode()
        store.set(f"{own} has {name}", "")
        return name
    missing, words, end = set(range(1, world)), {}, time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise dist.DistStoreError(f"timed out waiting for process {min(missing)} of {world}")
        for other in sorted(missing):
            if not store.check([f"word of {other}"]):
                continue
            word = store.get(f"word of {other}").decode()
            if words.get(other) != word:
                words[other] = word
                store.set(f"answer to {word}", own)
            elif store.check([f"{word} has {own}"]):
                missing.remove(other)
        time.sleep(0.005)
    return own


def _handler(_url: str, timeout: timedelta, **_: object) -> Iterator[tuple[dist.Store, int, int]]:
    """The launcher's store, under a name that only the processes started together know."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False, timeout=timeout)
    yield dist.PrefixStore(agree(store, rank, world, timeout), store), rank, world


register_rendezvous_handler(SCHEME, _handler)
