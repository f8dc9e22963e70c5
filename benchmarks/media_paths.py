"""What strategies save in prefill and training, beside what their FLOPs promise.

    python benchmarks/media_paths.py --visual-tokens 576 --text-tokens 64 --rounds 5

One decoder of middle size with random weights, each strategy against plain causal attention, in one run whose rounds
alternate between the strategies. The promise is the ratio of the FLOPs that the profiler counts. The second part
answers many questions about one image, each prompt from its beginning and with the prefix read once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from mmfuse.analysis.profile import profile_model
from mmfuse.analysis.workload import Workload, workload_tokens
from mmfuse.models import MultimodalConfig, MultimodalLM, PrefixCache
from mmfuse.sequence import TokenMap

STRATEGIES = ("causal", "mma", "naavit", "saisa", "composite", "cross_attention", "hyper_attention", "moda")
IMAGE_TOKEN = 3


def build(fusion: str, options: argparse.Namespace) -> MultimodalLM:
    config = MultimodalConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 1024,
            "hidden_size": options.hidden,
            "intermediate_size": 11 * options.hidden // 4,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.hidden // 64,
            "num_key_value_heads": options.hidden // 64,
            "max_position_embeddings": 4096,
        },
        # LLaVA's encoder is a quarter as wide as its decoder.
        encoders={
            "image": {
                "type": "precomputed", "hidden_size": options.hidden // 4, "num_tokens": options.visual_tokens,
            }
        },
        connectors={"image": {"type": "mlp"}},
        fusion=fusion,
        media_token_ids={"image": IMAGE_TOKEN},
    )  # fmt: skip
    torch.manual_seed(0)
    return MultimodalLM(config)


def prefill(model: MultimodalLM, work: Workload) -> None:
    with torch.inference_mode():
        work.run(model, model.new_cache())


def training_step(model: MultimodalLM, work: Workload) -> None:
    model.zero_grad()
    work = replace(work, embeds=work.embeds.requires_grad_())
    work.run(model).square().mean().backward()


def measure(
    models: dict[str, MultimodalLM], options: argparse.Namespace, step: Callable[[MultimodalLM, Workload], None]
) -> dict[str, float]:
    """Median seconds of each strategy; every round runs all of them, and the first does not count."""
    works = {
        name: Workload.random(model, workload_tokens(model, options.text_tokens, options.visual_tokens))
        for name, model in models.items()
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.rounds + 1):
        for name, model in models.items():
            started = time.perf_counter()
            step(model, works[name])
            times[name].append(time.perf_counter() - started)
    return {name: median(seconds[1:]) for name, seconds in times.items()}


def ratios(title: str, seconds: dict[str, float], flops: dict[str, int]) -> None:
    print(f"\n{title:<18}{'ms':>9}{'faster':>9}{'promised':>10}{'kept':>7}")
    for name, value in seconds.items():
        faster, promised = seconds["causal"] / value, flops["causal"] / flops[name]
        print(f"{name:<18}{1e3 * value:>9.1f}{faster:>8.2f}×{promised:>9.2f}×{faster / promised:>7.0%}")


def many_questions(models: dict[str, MultimodalLM], options: argparse.Namespace) -> None:
    print(f"\n{options.questions} questions about one image, one new token each; seconds without and with one prefix")
    for name in ("causal", "saisa", "composite"):
        model = models[name].eval()
        prompts = [question(options, number) for number in range(options.questions)]
        features = torch.randn(1, options.visual_tokens, options.hidden // 4)

        def without(model: Any = model, prompts: Any = prompts, features: Any = features) -> None:
            for ids, tokens in prompts:
                model.generate(ids, tokens, image_features=features, max_new_tokens=1, do_sample=False)

        def with_prefix(model: Any = model, prompts: Any = prompts, features: Any = features) -> None:
            ids, tokens = prompts[0]
            length = options.visual_tokens + 1
            prefix = PrefixCache(model, ids[:, :length], tokens.columns(0, length), image_features=features)
            prefix.generate([i for i, _ in prompts], [t for _, t in prompts], max_new_tokens=1, do_sample=False)

        times: list[list[float]] = []
        for _ in range(options.rounds):
            row = []
            for answer in (without, with_prefix):
                started = time.perf_counter()
                answer()
                row.append(time.perf_counter() - started)
            times.append(row)
        plain, cached = (median(column) for column in zip(*times, strict=True))
        print(f"{name:<18}{plain:>9.2f}{cached:>9.2f}{plain / cached:>8.1f}×")


def question(options: argparse.Namespace, number: int) -> tuple[torch.Tensor, TokenMap]:
    generator = torch.Generator().manual_seed(number)
    tokens = TokenMap.from_layout([("text", 1), ("image", options.visual_tokens), ("text", 12)])
    ids = torch.randint(4, 1024, tokens.shape, generator=generator)
    ids[:, 0] = 1
    return torch.where(tokens.is_media, IMAGE_TOKEN, ids), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visual-tokens", type=int, default=576)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=16)
    options = parser.parse_args()
    models = {name: build(name, options) for name in STRATEGIES}
    flops = {
        name: profile_model(model, options.text_tokens, options.visual_tokens).executed_flops
        for name, model in models.items()
    }
    print(f"{options.visual_tokens} visual + {options.text_tokens} text tokens, hidden {options.hidden}, ", end="")
    print(f"{options.layers} layers, float32, {torch.get_num_threads()} threads, medians of {options.rounds}")
    ratios("prefill", measure({name: model.eval() for name, model in models.items()}, options, prefill), flops)
    ratios("training step", measure({n: m.train() for n, m in models.items()}, options, training_step), flops)
    many_questions(models, options)


if __name__ == "__main__":
    main()
