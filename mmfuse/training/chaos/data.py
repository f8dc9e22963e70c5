"""Faults of data: reads that fail or hang, damaged samples and shards, numbers that are none."""

from __future__ import annotations

import http.server
import io
import tarfile
import tempfile
import threading
from functools import partial
from pathlib import Path

from mmfuse.data.decoders import decode_file
from mmfuse.data.quarantine import QUARANTINE, read_quarantine
from mmfuse.data.sources import open_source
from mmfuse.errors import DataError
from mmfuse.training.chaos.bench import Bench, Outcome, fault, refused, saved_step
from mmfuse.training.chaos.payloads import payloads as payload_list
from mmfuse.training.streaming import read_sample_log
from mmfuse.training.verify_resume import first_difference

TIMEOUT = "--data.init_args.stream.timeout"
LIMIT = "--data.init_args.stream.bad_samples"
WORKERS = "--data.init_args.num_workers"


def flaky_reads(bench: Bench, name: str) -> Outcome:
    """A tenth of the samples fail when they, or their images, are read for the first time."""
    return bench.same(bench.finish(name, fault("FlakyReads", every=10)), "a fifth of the samples had to be read twice")


def dead_disk(bench: Bench, name: str) -> Outcome:
    """As when a network file system goes away."""
    return refused(bench.start(name, fault("DeadDisk", after=8)), "5 attempts to read failed")


def stalled_reads(bench: Bench, name: str) -> Outcome:
    """In two workers; without any, the run itself would hang in the read."""
    words = (fault("StalledReads", after=8), WORKERS, "2", TIMEOUT, "5")
    return refused(bench.start(name, *words), "The last samples that they read: ")


def bad_samples(bench: Bench, name: str) -> Outcome:
    """Two of a hundred, within the limit that is set here."""
    words = (fault("DamagedSamples", every=50), LIMIT, '{"share": 1.0, "count": 1000000}')
    run = bench.finish(name, *words)
    bad = {f"{entry['source']}/{entry['key']}" for entry in read_quarantine(run / QUARANTINE)}
    used = {one for batches in read_sample_log(run).values() for ids in batches for one in ids}
    again = read_quarantine(bench.finish(f"{name}-again", *words) / QUARANTINE)
    same = {f"{entry['source']}/{entry['key']}" for entry in again} == bad
    happened = (
        f"{len(bad)} named, {len(bad & used)} of them trained on, {'' if same else 'not '}the same in a second run"
    )
    return Outcome(bool(bad) and not bad & used and same, happened)


def too_many_bad(bench: Bench, name: str) -> Outcome:
    """Every other sample."""
    words = (fault("DamagedSamples", every=2), LIMIT, '{"share": 0.01, "count": 3}')
    return refused(bench.start(name, *words), "cannot be used, more than 1.00% and more than 3")


def truncated_shard(bench: Bench, name: str) -> Outcome:
    """At a boundary of 512 bytes, where a cut looks like an end."""
    shard, own = _own_shards(bench, name)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 1024 * 512])
    outcome = refused(bench.start(name, own), "is truncated", codes=(2,))
    return outcome._replace(passed=outcome.passed and shard.name in outcome.happened)


def changed_shard(bench: Bench, name: str) -> Outcome:
    """The last sample is gone from it, and it is a whole tar file."""
    shard, own = _own_shards(bench, name)
    with tarfile.open(shard) as tar:
        held = [(member, file.read()) for member in tar if (file := tar.extractfile(member)) is not None]
    last = held[-1][0].name.partition(".")[0]
    with tarfile.open(shard, "w") as tar:
        for member, content in held:
            if member.name.partition(".")[0] != last:
                tar.addfile(member, io.BytesIO(content))
    return refused(bench.start(name, own), f"the data of {shard.parent.name} was", codes=(2,))


def same_names(bench: Bench, name: str) -> Outcome:
    """A server of this machine has the shards, one of the same name for each source."""
    folder = bench.out / f"{name}-shards"
    local = bench.finish(f"{name}-local", fault("OwnShards", folder=str(folder)))
    handler = partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        remote = bench.finish(name, fault("RemoteShards", url=url, cache=str(bench.out / f"{name}-cache")))
        server.shutdown()
    difference = first_difference(local, remote)
    sources = len([one for one in folder.iterdir() if one.is_dir()])
    return Outcome(difference is None, difference or f"{sources} sources; samples and losses are those of local shards")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and prints nothing."""

    def log_message(self, *args: object) -> None:
        """Nothing."""


def _own_shards(bench: Bench, name: str) -> tuple[Path, str]:
    """A run on shards of its own up to its half; one of the shards, and the word that brings it in."""
    folder = bench.out / f"{name}-shards"
    own = fault("OwnShards", folder=str(folder))
    bench.finish(name, own, steps=bench.steps // 2)
    return sorted(folder.rglob("*.tar"))[0], own


def not_a_number(bench: Bench, name: str) -> Outcome:
    """Behind a checkpoint; the run is then resumed without the fault."""
    half = bench.steps // 2
    trial = bench.start(name, fault("PoisonedWeight", step=half + 1), every=half)
    outcome = refused(trial, "Samples of the step")
    step, wrong = saved_step(trial.run)
    if not outcome.passed or wrong is not None or step != half:
        return Outcome(False, f"{outcome.happened}; last.ckpt of step {step}: {wrong or 'whole'}")
    return bench.same(bench.finish(name), f"stopped, last.ckpt of step {step} is whole; resumed")


def payloads(bench: Bench, name: str) -> Outcome:
    """In this process."""
    accepted, ran = [], []
    with tempfile.TemporaryDirectory() as scratch:
        marker = Path(scratch) / "code_ran"
        for payload in payload_list(marker):
            try:
                if payload.ending is None:
                    open_source(payload.data.decode())
                else:
                    decode_file(payload.data, payload.ending, payload.name)
                accepted.append(payload.name)
            except DataError:
                pass
            if marker.exists():
                ran.append(payload.name)
                marker.unlink()
        count = len(payload_list(marker))
    happened = f"accepted: {', '.join(accepted) or 'none'}; ran: {', '.join(ran) or 'none'}; of {count}"
    return Outcome(not accepted and not ran, happened)
