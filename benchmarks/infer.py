"""Answers to questions on images: vlft's batches against transformers' ``generate``.

Middle-sized random models with LoRA, several questions of 20 tokens on each image after a system
prompt of 45, greedy replies of equal length on all sides. transformers computes each prompt whole,
one after the other or in padded batches. In float32 all sides must choose the same tokens.

    python -m benchmarks infer --clock cpu --threads 1 --output benchmarks/results/infer-cpu
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig

from benchmarks.command import changed, new_parser, note, prepare, publish
from benchmarks.measure import measure_steps
from benchmarks.samples import RandomProcessor
from benchmarks.sides import add_job_options, cases_of, make_samples
from vlft.inference.generate import Sampling
from vlft.inference.order import portions, spans
from vlft.inference.replier import Replier

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from vlft.data.encode import ChatFormat, EncodedSample

COLUMNS = {
    "model": "{model}", "workload": "{workload}", "dtype": "{dtype}", "reply": "{reply}",
    "side": "{side}", "s": "{seconds:.2f}", "questions/s": "{rate:.2f}",
    "vlft, times": "{gain:.2f}", "peak, MiB": "{peak_mib:.0f}",
}  # fmt: skip


class _Processor(RandomProcessor):
    def reply_text(self, token_ids: Sequence[int]) -> str:
        """See Processor."""
        return " ".join(map(str, token_ids))


def main(arguments: list[str]) -> None:
    """Measures, prints the table, writes the files."""
    parser = new_parser("infer", __doc__, repeats=3)
    add_job_options(parser, workloads=("q1", "q5", "q10"), dtype="float32")
    parser.add_argument("--replies", nargs="+", type=int, default=[8], help="tokens; default: 8")
    parser.add_argument("--batch-size", type=int, default=5, help="default: 5")
    options = parser.parse_args(arguments)
    _, content = prepare(options)
    results = []
    for model in options.models:
        for case in cases_of(options, model):
            for reply in options.replies:
                results += compare(changed(case, reply=reply))
                note(f"{model} {case.workload} {reply}")
    publish(options, content, COLUMNS, results)


def compare(case: argparse.Namespace) -> list[dict[str, Any]]:
    """All sides on the same prompts; the gain is vlft's over each."""
    replies: dict[str, list[list[int]]] = {}
    results = []
    for side, answer in sides_of(case).items():

        def step(side: str, answer: Callable[[], list[list[int]]]) -> float:
            replies[side] = answer()
            return float(len(replies[side]))

        found = measure_steps(
            partial(step, side, answer), torch.device(case.device), case.clock, case.repeats
        )
        names = {name: getattr(case, name) for name in ("model", "workload", "dtype", "reply")}
        results.append({**names, "side": side, **found, "rate": case.samples / found["seconds"]})
    if case.dtype == "float32" and any(found != replies["vlft"] for found in replies.values()):
        raise SystemExit(f"{case.model} {case.workload}: the sides choose different tokens")
    return [{**one, "gain": one["seconds"] / results[-1]["seconds"]} for one in results]


def sides_of(case: argparse.Namespace) -> dict[str, Callable[[], list[list[int]]]]:
    """Functions that return the reply of each sample, by their names; vlft is the last."""
    plain, samples = make_samples(case, plain=True)
    built, _ = make_samples(case)
    prompts = [prompt_of(sample) for sample in samples.samples]
    for one in (plain, built):
        one.tuned.eval()
    # No random model ends a reply with the token of an image.
    ends = {"bos_id": 1, "eos_id": int(built.native["image_token_id"]), "window": None}
    names = {**vars(samples.processor.chat), **ends, "ngram_exempt": ()}
    given = {name: getattr(samples.processor, name) for name in ("family", "pixels", "max_length")}
    processor = _Processor(
        **given, chat=cast("ChatFormat", SimpleNamespace(**names)),
        views=samples.processor.views, inputs=samples.processor.inputs,
    )  # fmt: skip
    config = GenerationConfig(
        max_new_tokens=case.reply, do_sample=False, pad_token_id=0, eos_token_id=ends["eos_id"]
    )

    def generate(size: int) -> list[list[int]]:
        made = []
        for start in range(0, len(prompts), size):
            batch = processor.collate(prompts[start : start + size])
            length = batch["input_ids"].shape[1]
            del batch["labels"]
            inputs = {name: value.to(plain.weight.device) for name, value in batch.items()}
            with torch.inference_mode():
                output = plain.tuned.generate(**inputs, generation_config=config)
            made += output[:, length:].tolist()
        return made

    def answer() -> list[list[int]]:
        replier = Replier(built.tuned, processor, Sampling(case.reply))
        groups = [prompt.images[0].key for prompt in prompts]
        made: dict[int, list[int]] = {}
        for portion in portions(groups, list(map(len, prompts)), case.batch_size):
            chosen = {number: prompts[number] for number in portion}
            for span in spans(chosen, groups, case.batch_size):
                numbers = [number for batch in span for number in batch]
                places = [[numbers.index(number) for number in batch] for batch in span]
                batches = replier.replies([prompts[n] for n in numbers], [0] * len(numbers), places)
                for batch, replies in zip(span, batches, strict=True):
                    made.update(zip(batch, (reply.token_ids for reply in replies), strict=True))
        return [made[number] for number in range(len(prompts))]

    return {
        "transformers, one by one": partial(generate, 1),
        f"transformers, batches of {case.batch_size}": partial(generate, case.batch_size),
        "vlft": answer,
    }


def prompt_of(sample: EncodedSample) -> EncodedSample:
    """A sample without its reply."""
    tokens = sample.prompt_tokens
    return replace(sample, input_ids=sample.input_ids[:tokens], labels=sample.labels[:tokens])
