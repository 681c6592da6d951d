# SPDX-License-Identifier: MIT
"""Report how far the server's logits are from a float32 reference.

    python tests/measure/numerics.py                  the demo model in bfloat16
    python tests/measure/numerics.py --model FOLDER --device cuda
    python tests/measure/numerics.py --quantize int8  how far the answers drift from bfloat16

Sequences of source text are served all at once: prompts around the borders of pages,
shared beginnings and long contexts, in a cache so small that some are preempted. Each
step is given the text's own next token in place of the likeliest (teacher forcing), and
its logits are compared with those of one float32 forward pass of the whole sequence.
`sdpa` in the same dtype is measured in the same way, without the server's engine: an
error of at most 1.1 times its error is what rounding explains. The share of steps in
which the likeliest token is that of the reference is reported for both.
"""

import argparse
import asyncio
import logging
import sysconfig
from pathlib import Path
from typing import Any

import _setup  # noqa: F401
import torch
import transformers
from torch import Tensor

import api
import model_download

LENGTHS = (
    20,
    34,
    100,
    255,
    256,
    257,
    300,
    511,
    512,
    513,
    700,
    767,
    768,
    769,
    900,
    1023,
)
LENGTHS += (1024, 1025, 1500, 2047, 2048, 2049, 3000, 4097, 6000, 7900)
ALONE = (2100, 5000, 7600)  # asked one after the other, with nothing beside them
SHARED = 600  # tokens that four sequences begin with


def sequences(
    tokenizer: Any, longest: int, steps: int
) -> dict[str, tuple[int, Tensor]]:
    """Prompt length and token ids (prompt and `steps` more) by name."""
    library = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "typing", "inspect", "tarfile", "zipfile", "ast", "pdb")
    found = [next(library.glob(f"{name}*"), library) for name in names]
    files = [path if path.is_file() else path / "__init__.py" for path in found]
    text = "".join(path.read_text() for path in files if path.is_file())
    tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    result, start = {}, 0
    for length in (n for n in LENGTHS + ALONE if n + steps <= longest):
        end = length + steps
        start = start + 997 if start + 997 + end < len(tokens) else 500
        name = f"{length} tokens" + ", alone" * (length in ALONE)
        result[name] = (length, tokens[start : start + end])
    for more in (1, 50, 168, 169):
        body = tokens[5000 + more * 10 :][: more + steps]
        name = f"{SHARED} shared and {more} tokens"
        result[name] = (SHARED + more, torch.cat((tokens[:SHARED], body)))
    return result


def compared(logits: Tensor, exact: Tensor) -> Tensor:
    """(..., 2): mean square error, and whether the likeliest token is the same."""
    same = logits.argmax(-1) == exact.argmax(-1)
    return torch.stack(((logits - exact).square().mean(-1), same.float()), -1)


class Forced:
    """Mixed into the server's runner: compares logits, then forces the next token."""

    known: dict[str, tuple[int, Tensor]]
    reference: dict[str, Tensor]
    errors: dict[str, dict[int, Tensor]]

    def compute_batch(self: Any, model: Any, batch: dict[str, Any]) -> None:
        super().compute_batch(model, batch)
        ios = self.inputs_and_outputs
        pairs = getattr(ios, "io_pairs", None)
        host = pairs[ios.current_pair].host_io if pairs else ios
        requests = host.requests_in_batch
        states = [each.state for each in requests if each.has_new_token]
        with api.batching.utils.stream_context(ios.compute_stream):
            for row, state in enumerate(states):
                if state.request_id not in self.known:  # of the warm-up
                    continue
                length, tokens = self.known[state.request_id]
                at = state.position_offset - length
                if at == len(tokens) - length:  # a step too far, begun before the end
                    continue
                exact = self.reference[state.request_id][at]
                self.errors[state.request_id][at] = compared(self.logits[row], exact)
                ios.output_ids[0, row] = tokens[length + at]


def logits(model: Any, length: int, tokens: Tensor) -> Tensor:
    """(steps, vocabulary) of one forward pass, in float32."""
    ids = tokens[None, :-1]
    with torch.no_grad():
        out = model(ids, logits_to_keep=ids.shape[1] - length + 1, use_cache=False)
    return out.logits[0].float()


async def serve(
    engine: api.Engine, asked: dict[str, tuple[int, Tensor]], n: int
) -> int:
    """Have most sequences served at once. Returns the number of preemptions."""
    done, loop = asyncio.Queue(), asyncio.get_running_loop()
    router, scheduler = engine.manager.output_router, engine.manager.batch_processor
    router.deliver_batch = lambda outs: loop.call_soon_threadsafe(done.put_nowait, outs)
    router.deliver = lambda out: router.deliver_batch([out])
    preempted, offload = [], scheduler.offloading_manager.offload_requests

    def count(*args: Any, **options: Any) -> Any:
        preempted.append(args)
        return offload(*args, **options)

    scheduler.offloading_manager.offload_requests = count
    engine.manager.start()
    alone = [name for name in asked if name.endswith("alone")]
    for group in ([name for name in asked if name not in alone], *zip(alone)):
        for name in group:
            length, tokens = asked[name]
            ids = tokens[:length].tolist()
            engine.manager.add_request(ids, name, n, True, eos_token_id=[-1])
        left = set(group)
        while left:
            for output in await asyncio.wait_for(done.get(), 300):
                if output.error:
                    raise RuntimeError(output.error)
                if output.is_finished():
                    left.discard(output.request_id)
    engine.manager.stop(True, 15)
    return len(preempted)


def main() -> None:
    """Measure and print a line for each sequence and the summary."""
    parser = argparse.ArgumentParser(description="Compare logits with float32.")
    parser.add_argument("--model", type=Path, help="default: the demo model")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="bfloat16", help="of the server")
    parser.add_argument("--quantize", default="none", help="none, fp8, int8 or int4")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--longest", type=int, default=8192, help="tokens in all")
    parser.add_argument("--cache-tokens", type=int, default=20480)
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    api.logger.setLevel("INFO")
    folder = options.model or model_download.demo_model()
    settings = api.Settings(
        model=folder,
        demo=options.model is None,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        cache_tokens=options.cache_tokens,
        max_in_flight=32,
    )
    device = model_download.preflight(settings)
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = {
        name: (length, tokens.to(device))
        for name, (length, tokens) in sequences(
            tokenizer, options.longest, options.steps
        ).items()
    }
    plain = {}
    for dtype in ("float32", options.dtype):
        model = load(folder, dtype=dtype, device_map=device, attn_implementation="sdpa")
        plain[dtype] = {name: logits(model, *each) for name, each in asked.items()}
        del model
    reference, rounded = plain["float32"], plain[options.dtype]
    base = {name: compared(rounded[name], exact) for name, exact in reference.items()}
    del plain, rounded
    pick = api.install_patches

    def pick_forced(*given: Any) -> str:
        name = pick(*given)
        found = api.batching.continuous_api.ModelRunner
        errors = {name: {} for name in asked}
        Forced.known, Forced.reference, Forced.errors = asked, reference, errors
        runner = type("ForcedRunner", (Forced, found), {})
        api.batching.continuous_api.ModelRunner = runner
        return name

    api.install_patches = pick_forced
    engine = api.Engine(settings)
    engine.load()
    preempted = asyncio.run(serve(engine, asked, options.steps))
    ratios, ours, theirs = {}, [], []
    for name, found in Forced.errors.items():
        ours.append(torch.stack([found[at] for at in range(options.steps)]))
        theirs.append(base[name])
        error, least = ours[-1][:, 0].mean(), theirs[-1][:, 0].mean().clamp(min=1e-12)
        ratios[name] = (error / least).sqrt()
        print(f"{name:32} {error.sqrt():.5f} {ratios[name]:6.2f}")
    (error, same), (least, usual) = (
        torch.stack(kind).mean((0, 1)).tolist() for kind in (ours, theirs)
    )
    error, least = error**0.5, max(least**0.5, 1e-6)
    print(f"root mean square error: {error:.5f}, of sdpa {least:.5f}", end=", ")
    print(f"ratio {error / least:.3f}, worst sequence {max(ratios.values()):.2f}")
    print(f"likeliest token as in float32: {same:.2%} of steps, of sdpa {usual:.2%}")
    print(f"requests preempted: {preempted}")


if __name__ == "__main__":
    main()
