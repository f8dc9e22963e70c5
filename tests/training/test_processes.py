"""Many processes: shards that cannot be shared out evenly, batches without images, torchrun, and two hosts."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mmfuse.training.checkpoints import damage
from mmfuse.training.streaming import read_sample_log

pytestmark = pytest.mark.slow

WriteConfig = Callable[..., Path]
ReadRows = Callable[[Path], list[dict[str, float]]]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
WITH_IMAGE = ("0-3", "2-8", "2-21")


def write_shard(path: Path, number: int, count: int) -> None:
    """Chats, nearly all of text alone."""
    png = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 20, 200)).save(png, "png")
    with tarfile.open(path, "w") as tar:
        for place in range(count):
            key = f"{number}-{place}"
            image = key in WITH_IMAGE
            turns = [("user", "<image>Which?" if image else "5"), ("assistant", "1")]
            record = {"messages": [{"role": role, "content": content} for role, content in turns]}
            members = [("json", json.dumps(record).encode()), *([("0.png", png.getvalue())] if image else [])]
            for suffix, data in members:
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def uneven(write_config: WriteConfig, tmp_path: Path) -> Path:
    """A config of 38 steps over shards of 7, 1 and 30 samples, one at a time."""
    for number, count in enumerate((7, 1, 30)):
        write_shard(tmp_path / f"part-{number}.tar", number, count)
    config = write_config()
    settings = yaml.safe_load(config.read_text())
    source = {"train": {"chats": {"path": str(tmp_path / "part-*.tar")}}, "batch_size": 1}
    settings["data"] = {"class_path": "MultimodalData", "init_args": source}
    rates = {"encoder": 1e-3, "connector": 1e-3, "decoder": 1e-3}
    settings["stages"] = [{"name": "s", "steps": 38, "data": {"chats": 1.0}, "lr": rates}]
    settings["checkpoint_every"] = 100
    config.write_text(yaml.safe_dump(settings))
    return config


def environment(**more: str) -> Mapping[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_uneven_shards_and_batches_of_text_alone(
    strategy: str, uneven: Path, tmp_path: Path, read_rows: ReadRows
) -> None:
    """No rank waits for another one, and each sample comes once in each of two epochs."""
    words = ["fit", "--config", uneven, "--out", tmp_path / "run", "--log_samples", "--trainer.devices", "2"]
    ran = subprocess.run(
        [sys.executable, "-m", "mmfuse", *map(str, words), "--trainer.strategy", strategy],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment(),
    )
    assert ran.returncode == 0, ran.stderr
    assert all(row["train/loss"] < 100 for row in read_rows(tmp_path / "run"))
    log = read_sample_log(tmp_path / "run")
    assert len(log) == 38 and all([len(ids) for ids in ranks] == [1, 1] for ranks in log.values())
    drawn = [ids[0].rpartition(":")[2] for ranks in log.values() for ids in ranks]
    for epoch in (drawn[:38], drawn[38:]):
        assert len(set(epoch)) == 38
    apart = [[ids[0].rpartition(":")[2] in WITH_IMAGE for ids in ranks] for ranks in log.values()]
    assert Counter(map(sum, apart))[1] >= 4, "steps in which one rank has an image and the other has none"


def test_torchrun_ends_the_job_when_a_rank_dies(write_config: WriteConfig, tmp_path: Path, settings: Any) -> None:
    stages = [{**settings["stages"][1], "steps": 3000}]
    config = write_config({"stages": stages, "checkpoint_every": 2, "trainer": {"val_check_interval": 3000}})
    words = ["fit", "--config", str(config), "--out", str(tmp_path / "run"), "--trainer.devices", "2"]
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "mmfuse", *words]
    process = subprocess.Popen(
        [*command, "--trainer.strategy", "ddp"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 200
    while not last.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before its rank was killed"
        time.sleep(0.05)
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(max(map(int, listed.stdout.split())), signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in error, error
    assert damage(last) is None


#: Two hosts with a cable between them, each with a network of its own. Arguments: the command of each.
TWO_HOSTS = """
mount -t tmpfs tmpfs /run
ip netns add one && ip netns add two && ip link add to-two type veth peer name to-one
ip link set to-two netns one && ip link set to-one netns two
ip -n one addr add 10.77.0.1/24 dev to-two && ip -n one link set lo up && ip -n one link set to-two up
ip -n two addr add 10.77.0.2/24 dev to-one && ip -n two link set lo up && ip -n two link set to-one up
[ -n "$1" ] || exit 0
ip netns exec one env GLOO_SOCKET_IFNAME=to-two "$@" --node-rank 0 -m mmfuse $FIT & first=$!
ip netns exec two env GLOO_SOCKET_IFNAME=to-one "$@" --node-rank 1 -m mmfuse $FIT & second=$!
wait $first; code=$?; wait $second && exit $code
"""


def in_two_hosts(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    enter = ["unshare", "--map-root-user", "--net", "--mount", "sh", "-e", "-c", TWO_HOSTS, "sh"]
    return subprocess.run(
        [*enter, *command], capture_output=True, text=True, timeout=240, check=False, env=environment(**more)
    )


def test_two_hosts(write_config: WriteConfig, tmp_path: Path, read_rows: ReadRows) -> None:
    missing = [tool for tool in ("unshare", "ip") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"network namespaces need {', '.join(missing)}")
    if (tried := in_two_hosts("")).returncode:
        pytest.skip(f"network namespaces cannot be made here: {tried.stderr.strip()}")
    one, two = tmp_path / "one", tmp_path / "two"
    config = write_config()
    shared = f"fit --config {config} --log_samples --trainer.strategy ddp"
    here = [sys.executable, "-m", "mmfuse", *shared.split(), "--trainer.devices", "2", "--out", str(one)]
    subprocess.run(here, capture_output=True, timeout=240, check=True, env=environment())
    command = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "10.77.0.1"]
    fit = f"{shared} --trainer.devices 1 --trainer.num_nodes 2 --out {two}"
    ran = in_two_hosts(*command, "--master-port", "29517", FIT=fit)
    assert ran.returncode == 0, ran.stderr
    assert (two / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()
    losses = [[row["train/loss"] for row in read_rows(run)] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "predictions.jsonl" in {path.name for path in two.iterdir()}
