"""Races of this package against torch: same weights, same shapes, same steps, in one process and in turns.

    python benchmarks/against_torch.py [--cases dit-clip,vae-default] [--repeats 9] [--json FILE]
    python benchmarks/against_torch.py --device cuda       the published 13B layout at 544x960x81, random weights, bf16

    dit-*    one evaluation of the transformer       diffusers' HunyuanVideoTransformer3DModel, same random weights
    loop-*   the Euler walk of a few steps           the same network in a loop
    vae-*    one decode                              diffusers' autoencoder; the light VAE written in torch, its weights

Torch runs eager and compiled. Before anything is timed, the outputs are compared, and a difference beyond float32's
(bfloat16's) rounding ends the run. On a CPU both sides have `--threads` cores; torch's barriers don't spin
(OMP_WAIT_POLICY=PASSIVE), which on a shared machine would cost it several times its time. Compilation is not timed.
With `other_cores` near 0 read the wall's seconds, else those of the process's own cores, divided by the threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Read when torch and JAX start, which is later.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from magic141_jax import flops
from magic141_jax.convert import hunyuan_dit, hunyuan_vae
from magic141_jax.convert.engine import OnDevices, Table, to_ours
from magic141_jax.convert.memory import layout
from magic141_jax.convert.tensors import LazyTensor
from magic141_jax.diffusion import samplers, timesteps
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.errors import OneLineParser, UserError, run_entry_point
from magic141_jax.evaluation.speed import clock
from magic141_jax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from magic141_jax.models.mmdit import MMDiT, MMDiTConfig, emoji, hunyuan_13b
from magic141_jax.models.network import Network, apart
from magic141_jax.models.seam import prepare_walk, walk_fn
from magic141_jax.pipelines.components import DEFAULT, find_folder, load_model
from magic141_jax.pipelines.engine import compiled
from magic141_jax.pytree import Params, flatten
from magic141_jax.weights import part

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of the largest value
SHIFT = 4.0
OURS = "jax"


class DiT(NamedTuple):
    """A race of transformers: latents (f, h, w), text rows of which the first `valid` count; steps of a walk, or 0."""

    config: MMDiTConfig
    latents: tuple[int, int, int]
    text: int
    valid: int
    steps: int = 0


class VAE(NamedTuple):
    """A race of decoders: of the published layout, or (None) the default's own weights; latents (f, h, w)."""

    config: HunyuanVAEConfig | None
    latents: tuple[int, int, int]


class Race(NamedTuple):
    """What runs against each other, by name, and the operations of one run."""

    sides: dict[str, Callable[[], Any]]
    operations: float


def default_transformer() -> MMDiTConfig:
    """The embedded default's, but for what diffusers has not: positions added once, held frames, samples predicted."""
    return dataclasses.replace(emoji(), absolute_positions=False, hold_known=False, prediction="velocity")


def wide_transformer() -> MMDiTConfig:
    """Width 512 in the published layout: 2 double and 4 single blocks."""
    return MMDiTConfig(
        width=512,
        heads=8,
        head_width=64,
        double_blocks=2,
        single_blocks=4,
        rope_axes=(16, 24, 24),
        text_width=512,
    )


def half_width_vae() -> HunyuanVAEConfig:
    """The published autoencoder with half its channels."""
    return HunyuanVAEConfig(block_out_channels=(64, 128, 256, 256))


CASES: dict[str, dict[str, DiT | VAE]] = {
    "cpu": {
        "dit-image": DiT(default_transformer(), (1, 8, 8), 24, 14),
        "dit-clip": DiT(default_transformer(), (5, 8, 8), 40, 30),
        "loop-clip": DiT(default_transformer(), (5, 8, 8), 40, 30, steps=4),
        "dit-512-1k": DiT(wide_transformer(), (4, 32, 32), 256, 200),
        "dit-512-4k": DiT(wide_transformer(), (16, 32, 32), 256, 200),
        "vae-default": VAE(None, (5, 8, 8)),
        "vae-half": VAE(half_width_vae(), (5, 8, 8)),
    },
    # All text counts, so that torch needs no mask, with which it has no flash attention.
    "cuda": {
        "dit-13b": DiT(dataclasses.replace(hunyuan_13b(), remat="none", attention="auto"), (21, 68, 120), 540, 540),
        "loop-13b": DiT(
            dataclasses.replace(hunyuan_13b(), remat="none", attention="auto"), (21, 68, 120), 540, 540, steps=4
        ),
    },
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the flags; raises `UserError` for what is wrong with them."""
    parser = OneLineParser(prog="benchmarks/against_torch.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(CASES), default="cpu")
    parser.add_argument(
        "--cases", metavar="LIST", help="some of " + "; ".join(f"{k}: {', '.join(CASES[k])}" for k in CASES)
    )
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="timed runs of each side")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="cores of each side, on a CPU")
    parser.add_argument("--modes", default="eager,compile", metavar="LIST", help="of torch: eager, compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values here")
    args = parser.parse_args(argv)
    args.cases = list(CASES[args.device]) if args.cases is None else args.cases.split(",")
    args.modes = args.modes.split(",")
    for name, given, known in (("cases", args.cases, CASES[args.device]), ("modes", args.modes, ("eager", "compile"))):
        if strange := set(given) - set(known):
            raise UserError(f"--{name} has {', '.join(sorted(strange))}; known are {', '.join(known)}")
    if args.repeats < 1 or args.threads < 1:
        raise UserError("--repeats and --threads must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; raises `UserError` for what the user can mend."""
    args = parse(argv)
    torch = start(args.device, args.threads)
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    ceiling = clock.matmul(jnp.dtype(dtype))
    matmul = dataclasses.asdict(ceiling[0]) | {"operations": ceiling[1]}
    found = {"machine": about(torch, args, dtype), "matmul": matmul, "races": {}}
    for name in args.cases:
        made = prepare(CASES[args.device][name], torch, device=args.device, dtype=dtype, modes=args.modes)
        found["races"][name] = run(made, ceiling, repeats=args.repeats, dtype=dtype)
        print(table(found, only=name), flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def start(device: str, threads: int) -> Any:
    """Imports torch, with the cores that both sides may use; raises `UserError` where it or the device is missing."""
    try:
        import torch
    except ImportError:
        raise UserError("torch is not installed; pip install -r requirements-dev.txt") from None
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if device == "cuda" and not (torch.cuda.is_available() and jax.default_backend() == "gpu"):
        raise UserError("no CUDA device that both torch and JAX see; on a machine with one install jax[cuda13]")
    if device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA makes a thread for each core
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return torch


def about(torch: Any, args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Whose numbers these are."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    versions = {"torch": torch.__version__, "jax": jax.__version__}
    return {"device": device, "threads": args.threads, "dtype": dtype, "flags": os.environ.get("XLA_FLAGS"), **versions}


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def prepare(case: DiT | VAE, torch: Any, *, device: str, dtype: str, modes: Sequence[str]) -> Race:
    """Draws the weights and the inputs of a case, and both sides from them."""
    if isinstance(case, DiT):
        return transformers(case, torch, device=device, dtype=dtype, modes=modes)
    return decoders(case, torch, modes=modes)


def run(race: Race, ceiling: tuple[clock.Timing, float], *, repeats: int, dtype: str) -> dict[str, Any]:
    """Compares the outputs, then times: name -> timing, with the largest difference and the ratio to the best torch.

    Raises:
      UserError: the outputs differ.
    """
    outputs = {name: np.asarray(side(), np.float32) for name, side in race.sides.items()}
    want = outputs["eager"] if "eager" in outputs else next(v for k, v in outputs.items() if k != OURS)
    differences = {name: float(np.abs(out - want).max() / np.abs(want).max()) for name, out in outputs.items()}
    if not max(differences.values()) < TOLERANCE[dtype] or not np.std(want) > 0:
        raise UserError(f"the sides don't compute the same: differences of {differences} of the largest value")
    timings = clock.in_turns(race.sides, repeats)
    shares = {name: clock.share(race.operations, t, ceiling) for name, t in timings.items()}
    times = {name: dataclasses.asdict(t) for name, t in timings.items()}
    theirs = [t for name, t in times.items() if name != OURS]
    ratios = {key: times[OURS][key] / min(t[key] for t in theirs) for key in ("median", "least", "cpu", "cpu_least")}
    found = {"operations": race.operations, "differences": differences, "times": times}
    return found | {"shares_of_matmul": shares, "ratios": ratios}


def table(found: Mapping[str, Any], *, only: str | None = None) -> str:
    """The races as markdown; `only` one of them as its rows."""
    threads = found["machine"]["threads"]
    head = [
        "| race | side | wall s, median [min-max] | CPU s / threads | other cores | GFLOP/s at min | of matmul's rate "
        "| difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = []
    for name, race in found["races"].items():
        if only not in (None, name):
            continue
        for side, t in race["times"].items():
            rate = race["operations"] / t["least"]
            own = "{:.4g} [{:.4g}-{:.4g}]".format(*(t[key] / threads for key in ("cpu", "cpu_least", "cpu_most")))
            wall = f"{t['median']:.4g} [{t['least']:.4g}-{t['most']:.4g}] of {t['repeats']}"
            others = "?" if t["other_cores"] is None else f"{t['other_cores']:.1f}"
            rows.append(
                f"| {name} | {side} | {wall} | {own} | {others} | {rate / 1e9:.0f} "
                f"| {race['shares_of_matmul'][side]:.0%} | {race['differences'][side]:.1e} |"
            )
        ratios = ", ".join(f"{key} {value:.2f}" for key, value in race["ratios"].items())
        rows.append(f"| {name} | jax / best of torch | {ratios} | | | | | |")
    first = only is None or only == next(iter(found["races"]))
    return "\n".join((head if first else []) + rows)


# Transformers


def transformers(case: DiT, torch: Any, *, device: str, dtype: str, modes: Sequence[str]) -> Race:
    """diffusers' network against ours with its weights, over one evaluation or a walk."""
    theirs = their_transformer(case.config, torch, device, dtype)
    config = dataclasses.replace(case.config, compute_dtype=dtype)
    network = Network.create(MMDiT, config)
    params = ours_from(theirs, hunyuan_dit.table(config), network)
    inputs = draw(case)
    calls = {mode: theirs if mode == "eager" else torch.compile(theirs) for mode in modes}
    walk = torch_walk if case.steps else torch_evaluation
    sides = {mode: walk(call, inputs, case, torch, theirs) for mode, call in calls.items()}
    program = jax.jit(functools.partial(jax_walk if case.steps else jax_evaluation, network, case.steps))
    return with_ours(sides, program, (apart(params), inputs), convolves=False)


def their_transformer(config: MMDiTConfig, torch: Any, device: str, dtype: str) -> Any:
    """diffusers' network of a config with random weights."""
    from diffusers import HunyuanVideoTransformer3DModel
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

    class Unmasked(HunyuanVideoAttnProcessor2_0):
        """For text that counts as a whole: flash attention takes no mask."""

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
            return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)

    given = {k: v for k, v in hunyuan_dit.config_from_ours(config).items() if not k.startswith("_")}
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = HunyuanVideoTransformer3DModel(**given).eval()
    torch.set_default_dtype(before)
    if device == "cuda":
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.attn.processor = Unmasked()
    return model


def ours_from(model: Any, rules: Table, network: Network) -> Params:
    """A torch network's weights as our parameters on the default device, tensor by tensor."""

    def array(tensor: Any) -> np.ndarray:
        if str(tensor.dtype) == "torch.bfloat16":
            return tensor.cpu().view(dtype=_torch_int16(tensor)).numpy().view(jnp.bfloat16)
        return tensor.cpu().numpy()

    def lazy(tensor: Any) -> LazyTensor:
        dtype = jnp.dtype(str(tensor.dtype).removeprefix("torch."))
        return LazyTensor(tuple(tensor.shape), dtype, lambda i: array(tensor if i is None else tensor[i]))

    tensors = {name: lazy(tensor) for name, tensor in model.state_dict().items()}
    place = OnDevices(flatten(layout(network.abstract_params, None)))
    return to_ours(tensors, rules, network.abstract_params, place=place)


def _torch_int16(tensor: Any) -> Any:
    return sys.modules[type(tensor).__module__.split(".")[0]].int16


def draw(case: DiT) -> dict[str, np.ndarray]:
    """Noise (1, f, h, w, c), a known first latent frame, and text, of which the first rows count."""
    random, config = np.random.default_rng(0), case.config
    shape = (1, *case.latents, config.out_channels)
    frames = np.arange(shape[1])[None, :, None, None, None]
    mask = np.broadcast_to((frames == 0) & (shape[1] > 1), (*shape[:-1], 1)).astype(np.float32)
    drawn = {
        "noise": shape,
        "known": shape,
        "text": (1, case.text, config.text_width),
        "pooled": (1, config.pooled_width),
    }
    inputs = {name: random.standard_normal(shape, np.float32) for name, shape in drawn.items()}
    inputs["known"] *= mask
    return inputs | {"mask": mask, "text_mask": np.arange(case.text)[None] < case.valid}


def jax_evaluation(network: Network, steps: int, params: Params, inputs: Mapping[str, Any]) -> jax.Array:
    """One evaluation at time .875, of the noise as it is."""
    del steps
    x = jnp.concatenate([inputs["noise"], inputs["known"], inputs["mask"]], -1)
    t = jnp.full((x.shape[0],), 0.875)
    return network(params, x, t, inputs["text"], inputs["text_mask"], inputs["pooled"])


def jax_walk(network: Network, steps: int, params: Params, inputs: Mapping[str, Any]) -> jax.Array:
    """The walk as one program."""
    cond = Conditioning(*(inputs[name] for name in ("text", "text_mask", "pooled", "known", "mask")))
    times = timesteps.grid(steps, SHIFT)
    prepared = prepare_walk(network, params, cond, times[:-1])
    velocity = walk_fn(network, params, prepared, times[:-1])
    return samplers.sample(velocity, cond, inputs["noise"], times, keep=False)


def torch_inputs(inputs: Mapping[str, np.ndarray], torch: Any, model: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Noise, and what stands beside it on the channels, channels first; the text as keywords of diffusers."""
    parameter = next(model.parameters())
    put = {k: torch.tensor(v, device=parameter.device) for k, v in inputs.items()}
    noise, known, mask = (put[k].permute(0, 4, 1, 2, 3).contiguous() for k in ("noise", "known", "mask"))
    text = {
        "encoder_hidden_states": put["text"].to(parameter.dtype),
        "encoder_attention_mask": put["text_mask"],
        "pooled_projections": put["pooled"].to(parameter.dtype),
    }
    return noise, torch.cat([known, mask], 1), text


def torch_evaluation(call: Any, inputs: Mapping[str, np.ndarray], case: DiT, torch: Any, model: Any) -> Callable:
    """`jax_evaluation` of a network of theirs."""
    del case
    noise, beside, text = torch_inputs(inputs, torch, model)
    x = torch.cat([noise, beside], 1).to(next(model.parameters()).dtype)
    time = torch.tensor([875.0], device=x.device)
    return finished(lambda: call(x, time, **text, return_dict=False)[0], torch)


def torch_walk(call: Any, inputs: Mapping[str, np.ndarray], case: DiT, torch: Any, model: Any) -> Callable:
    """`jax_walk` of a network of theirs."""
    noise, beside, text = torch_inputs(inputs, torch, model)
    times = np.asarray(timesteps.grid(case.steps, SHIFT))
    dtype = next(model.parameters()).dtype

    def walk() -> Any:
        x = noise
        for t, t_next in itertools.pairwise(times):
            time = torch.tensor([1000 * float(t)], device=x.device)
            velocity = call(torch.cat([x, beside], 1).to(dtype), time, **text, return_dict=False)[0]
            x = x + float(t_next - t) * velocity
        return x

    return finished(walk, torch)


def finished(function: Callable[[], Any], torch: Any, *, channels_first: bool = True) -> Callable[[], Any]:
    """Without gradients, waiting for the device, as an array that numpy takes, channels last."""

    def call() -> Any:
        with torch.inference_mode():
            out = function()
        if out.is_cuda:
            torch.cuda.synchronize()
        return Output(out, channels_first)

    return call


class Output:
    """A tensor that is copied to the host when it is asked for, not when it is timed."""

    def __init__(self, tensor: Any, channels_first: bool) -> None:
        self.tensor, self.channels_first = tensor, channels_first

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.tensor.float().cpu().numpy()
        return np.asarray(np.moveaxis(values, 1, -1) if self.channels_first else values, dtype)


# Decoders


def decoders(case: VAE, torch: Any, *, modes: Sequence[str]) -> Race:
    """A decode by torch against ours, in float32."""
    if case.config is None:
        from benchmarks.torch_patch_vae import PatchDecoder

        network, params = load_model(part(find_folder(DEFAULT), "vae"))
        theirs = PatchDecoder(jax.tree.map(np.asarray, params)).eval()
        channels_first, call = False, {"eager": theirs, "compile": torch.compile(theirs)}
    else:
        from diffusers import AutoencoderKLHunyuanVideo

        config = {k: v for k, v in hunyuan_vae.config_from_ours(case.config).items() if not k.startswith("_")}
        theirs = AutoencoderKLHunyuanVideo(**config).eval()
        network = Network.create(HunyuanVAE, case.config)
        params = ours_from(theirs, hunyuan_vae.table(case.config), network)
        # The tiles are cut in Python: what is compiled is the decoder of one.
        halves = {"eager": theirs.decoder, "compile": torch.compile(theirs.decoder)}
        call = {mode: functools.partial(decode_tiles, theirs, decoder) for mode, decoder in halves.items()}
        channels_first = True
    shape = (1, *case.latents, network.config.latent_channels)
    raw = np.random.default_rng(0).standard_normal(shape, np.float32)
    given = torch.tensor(np.moveaxis(raw, -1, 1).copy() if channels_first else raw)
    make = functools.partial(finished, torch=torch, channels_first=channels_first)
    sides = {mode: make(functools.partial(call[mode], given)) for mode in modes}
    program = jax.jit(functools.partial(network, method="decode"))
    return with_ours(sides, program, (params, raw), convolves=True)


def with_ours(sides: dict[str, Callable[[], Any]], function: Any, given: Any, *, convolves: bool) -> Race:
    """The race with a jitted function of ours in it, compiled as pipelines do."""
    given = jax.device_put(given)
    traced = function.trace(*given)
    program = compiled(traced.lower(), convolves=convolves)
    return Race(sides | {OURS: lambda: program(*given)}, flops.count(traced.jaxpr))


def decode_tiles(vae: Any, decoder: Any, raw: Any) -> Any:
    """A decode of diffusers' autoencoder with a decoder in the place of its own."""
    vae._modules["decoder"] = decoder
    return vae.decode(raw, return_dict=False)[0]


if __name__ == "__main__":
    run_entry_point(main)
