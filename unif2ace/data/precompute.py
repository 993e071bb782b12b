"""`unif2ace precompute`: a set of pictures with words to shards of codes, features and words.

Shard k holds samples k * size to (k + 1) * size of the set, encoded in the same batches by one thread whoever does it:
the bytes do not depend on the number of processes, nor on how often the work was stopped. A shard counts once its
index is there; whatever else a stopped run left is made again.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from unif2ace.data.config import SetConfig
from unif2ace.data.encode import Encoding, EncodingConfig
from unif2ace.data.samples import Sample, SampleError
from unif2ace.data.shards import FORMAT, JOB, MANIFEST, index_path, shard_name, write_shard
from unif2ace.data.sources import Source, open_source
from unif2ace.errors import UserError
from unif2ace.files import alone_in, digest, read_json, write_json


@dataclass(frozen=True)
class PrecomputeConfig:
    """Attributes:
    set: what to read.
    encoding: what to make of it.
    out: folder for the shards.
    shard: samples of one shard.
    batch: pictures encoded at once.
    processes: that share the work; 1: this one.
    max_corrupt: samples that cannot be read are passed over up to this many, then it stops.
    """

    set: SetConfig
    encoding: EncodingConfig
    out: str
    shard: int = 1000
    batch: int = 16
    processes: int = 1
    max_corrupt: int = 100

    def check(self, where: str = "precompute") -> PrecomputeConfig:
        """The config itself; UserError names a key that is wrong."""
        for key, least in (("shard", 1), ("batch", 1), ("processes", 1), ("max_corrupt", 0)):
            if getattr(self, key) < least:
                raise UserError(f"{where}.{key}: expected at least {least}, got {getattr(self, key)}")
        self.encoding.check(f"{where}.encoding")
        return self


def precompute(config: PrecomputeConfig, progress: bool = True) -> dict[str, Any]:
    """Write every shard that is not there yet, then the manifest, and return it.

    Raises:
        UserError: the set or a network cannot be read, the folder cannot be written or holds other shards, another
            process is at work in it, or too many samples cannot be read.
    """
    config.check()
    source = open_source(config.set, "set")
    # Where others do the work, this process keeps no networks.
    encoding = config.encoding.build() if config.processes == 1 else None
    job = {
        "format": FORMAT,
        "samples": len(source),
        "source": source.fingerprint,
        "fields": vars(config.set.fields),
        "encoding": (encoding or config.encoding).describe(),
        "shard": config.shard,
        "batch": config.batch,
    }
    name = digest(json.dumps(job, sort_keys=True).encode())
    out = Path(config.out)
    with alone_in(out):
        _same_job(out, job)
        for left in out.glob(".*.partial"):
            left.unlink()
        shards = range(-(-len(source) // config.shard))
        indices = {shard: index for shard in shards if (index := _finished(out, shard, name)) is not None}
        missing = [shard for shard in shards if shard not in indices]
        corrupt = list(map(list, source.damaged))
        with tqdm(total=len(source), desc="precompute", unit="sample", disable=not progress) as bar:
            bar.update(sum(index["samples"] + len(index["skipped"]) for index in indices.values()))
            if encoding is None:
                made = _made_beside(config, name, missing, bar)
            else:
                made = _made_here(_Worker(config, name, source, encoding, bar.update), missing)
            for index in itertools.chain([*indices.values()], made):
                indices[index["first"] // config.shard] = index
                corrupt += [[where, reason] for where, reason, damage in index["skipped"] if damage]
                if len(corrupt) > config.max_corrupt:
                    raise UserError(
                        f"{len(corrupt)} samples could not be read, max_corrupt allows {config.max_corrupt}; the last: "
                        f"{': '.join(corrupt[-1])}"
                    )
        return _manifest(out, job, [indices[shard] for shard in shards], len(source.damaged))


def _manifest(out: Path, job: dict[str, Any], indices: list[dict[str, Any]], damaged: int) -> dict[str, Any]:
    """Write it, if it is not there as it should be; `damaged` is what was found when the set was opened."""
    skipped = [damage for index in indices for _, _, damage in index["skipped"]]
    manifest = {
        "format": FORMAT,
        "job": job,
        "samples": sum(index["samples"] for index in indices),
        "skipped": {"corrupt": damaged + sum(skipped), "unusable": len(skipped) - sum(skipped)},
        "shards": [{key: index[key] for key in ("file", "samples", "bytes", "sha256")} for index in indices],
    }
    if not (out / MANIFEST).exists() or read_json(out / MANIFEST) != manifest:
        write_json(out / MANIFEST, manifest)
    return manifest


def _finished(out: Path, shard: int, job: str) -> dict[str, Any] | None:
    """The index of a shard that is there, whole and of this job.

    Until all are done, one with damaged samples is made again: they may have been mended in the meantime.
    """
    path = out / f"{shard_name(shard)}.tar"
    if not index_path(path).exists() or not path.exists():
        return None
    index = read_json(index_path(path))
    whole = index["job"] == job and path.stat().st_size == index["bytes"]
    damaged = any(damage for _, _, damage in index["skipped"])
    return index if whole and ((out / MANIFEST).exists() or not damaged) else None


def _same_job(out: Path, job: dict[str, Any]) -> None:
    """Write the job into a new folder, or hold it against what the folder's shards were made with."""
    path = out / JOB
    if not path.exists():
        write_json(path, job)
        return
    before = read_json(path)
    others = [key for key in job if before.get(key) != job[key]]
    if others:
        key = others[0]
        raise UserError(
            f"{out} holds shards made with another {key} ({before.get(key)} there, {job[key]} now): name "
            "another folder or remove it"
        )


class _Worker:
    """What makes shards; `step(n)` is called after each n samples."""

    def __init__(
        self, config: PrecomputeConfig, job: str, source: Source, encoding: Encoding, step: Callable[[int], object]
    ) -> None:
        self.config, self.job, self.source, self.encoding, self.step = config, job, source, encoding, step

    def shard(self, number: int) -> dict[str, Any]:
        """Make one shard and return its index without what only readers need."""
        config, skipped = self.config, []
        first = number * config.shard
        indices = range(first, min(first + config.shard, len(self.source)))
        made: list[Sample] = []
        for start in range(0, len(indices), config.batch):
            batch = indices[start : start + config.batch]
            for each in self._encoded(batch):
                if isinstance(each, Sample):
                    made.append(each)
                else:
                    skipped.append([each.where, each.reason, each.corrupt])
            self.step(len(batch))
        index = write_shard(Path(config.out), number, made, first, skipped, self.job)
        return {key: index[key] for key in ("file", "first", "samples", "bytes", "sha256", "skipped")}

    def _encoded(self, indices: range) -> list[Sample | SampleError]:
        """In the order of the set, with what cannot be used in its place."""
        read: list[Sample | SampleError] = []
        for index in indices:
            try:
                read.append(self.source[index])
            except SampleError as error:
                read.append(error)
        encoded = iter(self.encoding.batch([each for each in read if isinstance(each, Sample)]))
        return [next(encoded) if isinstance(each, Sample) else each for each in read]


def _made_here(worker: _Worker, shards: list[int]) -> Iterator[dict[str, Any]]:
    """The indices of `shards` as they are made, by this process."""
    import cv2

    threads = torch.get_num_threads(), cv2.getNumThreads()
    try:
        _one_thread()
        for shard in shards:
            yield worker.shard(shard)
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def _one_thread() -> None:
    """Sums in one order whoever makes them, and processes that do not fight for cores."""
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(1)


_worker: _Worker | None = None  # of a process of the pool


def _start(config: PrecomputeConfig, job: str, done: Any, started: Any) -> None:
    global _worker

    def step(count: int) -> None:
        with done.get_lock():
            done.value += count

    with started.get_lock():
        number = started.value
        started.value += 1
    _one_thread()
    encoding = config.encoding.of_process(number).build()
    _worker = _Worker(config, job, open_source(config.set, "set"), encoding, step)


def _run(number: int) -> dict[str, Any]:
    assert _worker is not None
    return _worker.shard(number)


def _made_beside(config: PrecomputeConfig, job: str, shards: list[int], bar: tqdm) -> Iterator[dict[str, Any]]:
    """The indices of `shards` as they are made, by processes, in any order."""
    if not shards:
        return
    count, before = min(config.processes, len(shards)), bar.n
    # Networks and their threads do not survive a fork of this process; one that has only imported may be forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    done, started = context.Value("q", 0), context.Value("q", 0)
    with ProcessPoolExecutor(count, context, _start, (config, job, done, started)) as pool:
        waiting = iter(shards)
        running: set[Future] = {pool.submit(_run, shard) for shard in itertools.islice(waiting, 2 * count)}
        try:
            while running:
                ready, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(before + done.value - bar.n)
                for each in ready:
                    running |= {pool.submit(_run, shard) for shard in itertools.islice(waiting, 1)}
                    yield each.result()
        except BrokenProcessPool as error:
            raise UserError("a process was lost, out of memory perhaps; run it again to go on") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
