"""What the stream of samples costs, side by side with webdataset, and what packing gives. Runs offline, on CPUs.

    python benchmarks/streaming.py --samples 4000 --rounds 4

Both sides read the same shards (JPEG, text) in shuffled order, as people use them: webdataset shuffles shards and a
buffer of 1000 samples, and decodes by itself; the stream reads by the plan and gives the same images. Opening shards
counts. With workers both go through a DataLoader that sends one batch at a time. Rounds alternate, so that both see the
same machine, and each gives one ratio; printed are medians. Four parts:

1. samples/s with JPEG decoding, at 0 and 2 workers, and without decoding;
2. time from a saved state to the first batch, early and late in a run;
3. memory of the process over many samples;
4. useful tokens/s of a small model on ragged texts, one sample in a row against packed rows.
"""

from __future__ import annotations

import argparse
import io
import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import SiglipImageProcessor

from mmfuse.data import BatchStream, Encoding, Plan, Source, StagePlan, StreamLoader, StreamSettings, open_source
from mmfuse.data.handwriting_tokenizer import load_tokenizer
from mmfuse.data.sources.undecoded import decode
from mmfuse.models import MultimodalProcessor
from mmfuse.testing import tiny_model

BATCH = 32


def write_shards(
    folder: Path, samples: int, per_shard: int = 500, size: int = 224, *, images: bool = True
) -> list[str]:
    """JPEGs of 224 x 224, or none, with ragged captions of digits, 8 to 200 of them."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    names = []
    for first in range(0, samples, per_shard):
        names.append(str(folder / f"train-{first // per_shard:05d}.tar"))
        with webdataset.TarWriter(names[-1], mtime=0, encoder=False) as writer:
            for number in range(first, min(first + per_shard, samples)):
                media = {}
                if images:
                    pixels = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((size, size))
                    file = io.BytesIO()
                    pixels.save(file, "JPEG", quality=90)
                    media["jpg"] = file.getvalue()
                length = int(np.clip(rng.lognormal(3.4, 0.8), 8, 200))
                text = "".join(map(str, rng.integers(0, 10, length)))
                writer.write({"__key__": f"{number:08d}", **media, "txt": text.encode()})
    return names


# 1. Throughput


class Drawn(IterableDataset[Any]):
    """Samples in the order of the plan, shared out among workers; the part of the stream that reads and decodes."""

    def __init__(self, source: Source, plan: Plan, *, decoding: bool) -> None:
        self.source, self.plan, self.decoding = source, plan, decoding

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        own, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in range(own, len(self.plan), workers):
            samples = [self.source.read(draw.sample) for draw in self.plan.window(0, number)]
            if self.decoding:
                yield [(sample.key, sample.text, np.asarray(decode(sample.images[0]))) for sample in samples]
            else:
                yield [(sample.key, sample.text, sample.images[0].read()) for sample in samples]


def ours(shards: list[str], samples: int, workers: int, *, decoding: bool) -> Iterator[Any]:
    source = open_source(str(Path(shards[0]).parent))
    plan = Plan({"a": source.parts}, [StagePlan({"a": 1}, samples // BATCH)], window=BATCH)
    yield from DataLoader(Drawn(source, plan, decoding=decoding), batch_size=None, num_workers=workers, collate_fn=list)


def theirs(shards: list[str], samples: int, workers: int, *, decoding: bool) -> Iterator[Any]:
    data = webdataset.WebDataset(shards, shardshuffle=100, seed=1, empty_check=False).shuffle(1000, seed=1)
    data = data.decode("rgb8") if decoding else data
    data = data.to_tuple("__key__", "txt", "jpg").batched(BATCH, collation_fn=list, partial=False)
    yield from DataLoader(data, batch_size=None, num_workers=workers, collate_fn=list)


def rate(side: Callable[..., Iterator[Any]], *arguments: Any, **settings: Any) -> float:
    begun = time.perf_counter()
    count = sum(len(batch) for batch in side(*arguments, **settings))
    return count / (time.perf_counter() - begun)


def throughput(shards: list[str], samples: int, rounds: int) -> None:
    print(f"\n1. samples/s, {samples} samples of 224 px, batches of {BATCH}, {rounds} rounds")
    for workers, decoding in ((0, True), (2, True), (0, False), (2, False)):
        pairs = []
        for number in range(rounds):
            sides = (ours, theirs) if number % 2 else (theirs, ours)
            got = {side: rate(side, shards, samples, workers, decoding=decoding) for side in sides}
            pairs.append((got[ours], got[theirs]))
        ratio = statistics.median(one / other for one, other in pairs)
        mine, wds = (statistics.median(column) for column in zip(*pairs, strict=True))
        what = "JPEG decoded" if decoding else "bytes"
        print(f"   {what:<12} {workers} workers: mmfuse {mine:7.0f}  webdataset {wds:7.0f}  ratio {ratio:.2f}")


# 2, 3 and 4: the whole stream


def loader(source: Source, settings: StreamSettings, batches: int, **where: Any) -> StreamLoader:
    pixels = SiglipImageProcessor(size={"height": 16, "width": 16}, do_convert_rgb=True)
    processor = MultimodalProcessor(pixels, load_tokenizer(), visual_tokens=4)
    plan = Plan(
        {"a": source.parts},
        [StagePlan({"a": 1}, batches)],
        window=settings.samples(where.get("rows", BATCH)),
        lanes=settings.lanes,
        window_is_batch=settings.window_is_batch,
    )
    encoding = Encoding({"a": source}, processor, settings, where.pop("rows", BATCH), seed=0)
    return StreamLoader(BatchStream(plan, encoding, **where))


def restore(source: Source) -> None:
    print("\n2. seconds from the state to the first batch")
    for settings, name in ((StreamSettings(), "one sample in a row"), (StreamSettings(pack_to=512), "packed")):
        for start in (0, 1000, 1_000_000):
            # Lanes stand where they would after so many batches.
            lanes = [place._replace(window=place.window + start) for place in first(settings.lanes)]
            stream = loader(source, settings, 2_000_000, start=start, lanes=lanes, rows=4)
            begun = time.perf_counter()
            next(iter(stream))
            print(f"   {name:<20} at batch {start:>9}: {time.perf_counter() - begun:.3f}")


def first(lanes: int) -> Any:
    from mmfuse.data.stream import first_places

    return first_places(lanes)


def memory(folder: Path, samples: int) -> None:
    print(f"\n3. memory over {samples} samples of text, packed to 512 tokens, through the 48 lanes")
    write_shards(folder, 4000, images=False)
    done, marks = 0, []
    for batch in loader(open_source(folder), StreamSettings(pack_to=512), 1_000_000):
        done += len(batch["keys"])
        if done >= samples * (len(marks) + 1) / 10:
            marks.append(resident())
        if done >= samples:
            break
    print("   MiB after each tenth: " + " ".join(f"{mark:.0f}" for mark in marks))
    print(f"   growth from the second tenth to the last: {marks[-1] - marks[1]:.1f} MiB; peak {peak():.0f} MiB")


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def packing(source: Source, rounds: int) -> None:
    print("\n4. useful tokens/s, forward and backward of a small model on ragged captions (8 to 200 digits)")
    model = tiny_model("mma", hidden_size=128, intermediate_size=256, max_position_embeddings=1024).train()
    model.config.media_token_ids["image"] = load_tokenizer().convert_tokens_to_ids("<image>")
    sides = {
        "one sample in a row": loader(source, StreamSettings(max_tokens=256), 1000, rows=32),
        "buckets": loader(source, StreamSettings(max_tokens=256, bucket=True), 1000, rows=32),
        "packed to 256": loader(source, StreamSettings(pack_to=256), 1000, rows=6),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    filled = {}
    streams = {name: iter(side) for name, side in sides.items()}
    for _ in range(rounds + 1):
        for name, stream in streams.items():
            live = slots = 0
            begun = time.perf_counter()
            for batch in itertools.islice(stream, 12):
                inputs = {key: value for key, value in batch.items() if key not in ("keys", "origin")}
                model(**inputs, return_logits=False).loss.backward()
                model.zero_grad()
                live += int((~batch["tokens"].is_pad).sum())
                slots += batch["tokens"].is_pad.numel()
            rates[name].append(live / (time.perf_counter() - begun))
            filled[name] = live / slots
    plain = statistics.median(rates["one sample in a row"][1:])
    for name, values in rates.items():
        median = statistics.median(values[1:])
        print(f"   {name:<20} {median:8.0f} tokens/s  x {median / plain:.2f}   {filled[name]:.0%} of slots in use")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--memory_samples", type=int, default=100_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        shards = write_shards(Path(scratch) / "images", options.samples)
        source = open_source(Path(scratch) / "images")
        for part in (
            partial(throughput, shards, options.samples, options.rounds),
            partial(restore, source),
            partial(memory, Path(scratch) / "texts", options.memory_samples),
            partial(packing, source, options.rounds),
        ):
            part()


if __name__ == "__main__":
    main()
