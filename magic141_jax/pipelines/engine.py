"""The compiled stages that every pipeline is made of, and the clock over them.

    encode_text   prompts [and first images]       -> token states, mask, pooled vector
    condition     states, first images             -> Conditioning: image tokens before the text, one known latent
    encode_known  frames (b, t, y, x, 3)           -> known latents and mask of a clip
    denoise       conditioning, seeds              -> latents
    decode        latents (b, f, h, w, c)          -> frames (b, t, y, x, 3) in [0, 1]
    window        state, prompts                   -> frames, state: the three above, of a long video, as one program

Each stage is one compiled program per set of shapes, with the parameters as arguments (`denoise` is two where these
come and go: what prepares the steps need not be there while they are taken). An image, a clip and every
window of a long video share them: which latent frames are known is data, not a shape. Noise is drawn inside, from
(seed, index in the call, purpose), so that neither the batch nor the devices change it.

With `components.mesh` a stage is compiled for all devices of the mesh, and what comes in is laid over it: the batch
split where it divides, copied otherwise. How the networks split the rest is theirs: weights, pictures over space.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magic141_jax import sharding
from magic141_jax.diffusion import conditioning, flow, guidance, samplers, timesteps
from magic141_jax.diffusion.conditioning import Conditioning, LatentMask
from magic141_jax.errors import UserError
from magic141_jax.models import lora
from magic141_jax.models.mmdit import Prepared
from magic141_jax.models.network import Network, apart
from magic141_jax.models.resident import Held, Lent, of_part, read_by
from magic141_jax.models.seam import prepare_walk, walk_fn
from magic141_jax.models.text import TextStates
from magic141_jax.models.vae import latent_frames
from magic141_jax.pipelines import window
from magic141_jax.pipelines.components import Components, Continuation, Model
from magic141_jax.pipelines.options import SamplingOptions, per_prompt
from magic141_jax.pytree import Params, flatten
from magic141_jax.shapes import Frames, Images, Latents, TokenMask, Tokens

IMAGE_PURPOSE = 0  # of noise; window w of a video has purpose w + 1


class Prompts(NamedTuple):
    """Encoded prompts, and the negative ones where guidance takes a second pass."""

    positive: TextStates
    negative: TextStates | None


class Stage:
    """A function of (params, *arrays, **static) compiled once per set of shapes; compile time is counted apart.

    Over a mesh, on which the parameters lie, arrays come in from the host or from another stage. Of parameters that are
    not there to stay those that the program reads are fetched for each call, which counts as "move".

    `donate` are the arrays, by number, whose memory the results may take. With `wait` false a call returns as soon as
    its program is started; whoever reads the results waits for them. `convolves` is that of `compiled`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        params: Held,
        seconds: collections.Counter[str],
        *,
        mesh: jax.sharding.Mesh | None = None,
        donate: Sequence[int] = (),
        wait: bool = True,
        convolves: bool = False,
    ) -> None:
        self._function, self._seconds = sharding.over(mesh, function), seconds
        self._params = params if isinstance(params, Lent) else apart(params)
        self._mesh, self._wait, self._convolves = mesh, wait, convolves
        self._donate = tuple(1 + number for number in donate)  # behind the parameters
        self._programs: dict[Any, tuple[Callable[..., Any], Collection[str]]] = {}

    def __call__(self, label: str, *arrays: Any, **static: Any) -> Any:
        """Runs the stage and adds its seconds to `label`; blocks until the result is there, if it is to wait."""
        leaves, structure = jax.tree.flatten(arrays)
        leaves = list(map(jnp.asarray, leaves)) if self._mesh is None else sharding.spread(leaves, self._mesh)
        key = (structure, *((x.shape, x.dtype, x.sharding) for x in leaves), *sorted(static.items()))
        arrays = jax.tree.unflatten(structure, leaves)
        if key not in self._programs:
            with clock(self._seconds, "compile"):
                program, params, read = self._program(arrays, static)
                self._programs[key] = compiled(program.lower(params, *arrays), convolves=self._convolves), read
        program, read = self._programs[key]
        params = self._taken(read)
        with clock(self._seconds, label):
            made = program(params, *arrays)
            return jax.block_until_ready(made) if self._wait else made

    def _program(self, arrays: Sequence[Any], static: Mapping[str, Any]) -> tuple[Any, Params, Collection[str]]:
        """The jitted function, what parameters to trace it with, and the paths of those that are to be fetched."""
        function, params, read = functools.partial(self._function, **static), self._params, ()
        if isinstance(params, Lent):
            read, whole = read_by(function, params.shapes, *arrays), flatten(params.shapes)
            function, params = of_part(function, params.shapes), {path: whole[path] for path in read}
        return jax.jit(function, donate_argnums=self._donate), params, read

    def _taken(self, read: Collection[str]) -> Params:
        if not isinstance(self._params, Lent):
            return self._params
        with clock(self._seconds, "move"):
            there = self._params.bring(read)
            return jax.block_until_ready({path: there[path] for path in read})


def compiled(lowered: jax.stages.Lowered, *, convolves: bool) -> jax.stages.Compiled:
    """Compiles a program; on a CPU one whose time goes into convolutions with Eigen's, which are a quarter faster.

    XLA gives them to YNNPACK unless told otherwise, by an option that other versions may not know, and with them all
    products of matrices, for which YNNPACK is better where they are large.
    """
    if convolves and sharding.platform() == "cpu":
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return lowered.compile({"xla_cpu_experimental_ynn_fusion_type": ""})
    return lowered.compile()


class Engine:
    """The stages over one set of components.

    `seconds` counts by label: text, image, video, decode, compile, move. All of a window of a long video counts as
    "video", decoding and encoding too, where it is one program; what is counted is how long its caller waited for it.
    """

    def __init__(self, components: Components, *, stage: Callable[..., Stage] = Stage) -> None:
        """Over components; `stage` makes a stage, with the arguments of `Stage`."""
        self.components, self._make = components, stage
        self.seconds: collections.Counter[str] = collections.Counter()
        self._denoise = self._denoiser(components.transformer)
        self._encode_known = self._stage(_encode_known, components.vae, convolves=True)
        self._decode = self._stage(_decode, components.vae, convolves=True)
        seeing = components.image_encoder
        self._image_tokens = None if seeing is None else self._stage(_prepend_image_tokens, seeing)
        self._window = self._fused_window()
        self._text_sizes: set[int] = set()

    @functools.cached_property
    def _continue(self) -> Callable[..., Latents]:
        """Denoises behind a sink where a window is several programs, which is seldom."""
        going_on = self.components.continuation
        return self._denoise if going_on is None else self._denoiser(going_on)

    @property
    def runs_ahead(self) -> bool:
        """Whether `next_window` returns before its frames are there: not where parameters come and go."""
        return self._window is not None

    def encode_text(
        self, prompts: Sequence[str], options: SamplingOptions, *, images: Sequence[np.ndarray] | None = None
    ) -> Prompts:
        """Encodes the prompts, and the negative prompts if guidance needs them, in one batch.

        An encoder that reads pictures is given `images` (y, x, 3), one each, of any size, and a black picture with
        the negative prompts, as HunyuanVideo's image-to-video pipeline does.
        """
        negative = [p or "" for p in per_prompt(options.negative_prompt, len(prompts), "negative_prompt")]
        twice = options.guidance_scale != 1 and not self.components.transformer.network.config.guidance_embedding
        texts = [*prompts, *negative] if twice else list(prompts)
        shown = None
        if images is not None and self.components.text_encoder.image_tokens:
            black = np.zeros((options.height, options.width, 3), np.float32)  # pyright: ignore[reportCallIssue]
            shown = [*images, *[black] * (len(texts) - len(prompts))]
        encode = functools.partial(self.components.text_encoder.encode, texts, shown)
        if len(texts) not in self._text_sizes:
            with clock(self.seconds, "compile"):  # a first call is nearly all compilation
                jax.block_until_ready(encode())
            self._text_sizes.add(len(texts))
        with clock(self.seconds, "text"):
            states = jax.block_until_ready(encode())
        count = len(prompts)
        positive, other = (TextStates(*(a[part] for a in states)) for part in (slice(count), slice(count, None)))
        return Prompts(positive, other if twice else None)

    def condition(
        self, prompts: Prompts, options: SamplingOptions, *, images: Images | None = None
    ) -> tuple[Conditioning, TextStates | None]:
        """The conditioning of a clip and the negative text.

        With `images` (b, y, x, 3) the first latent frame is known and their tokens stand before the text; where the
        text encoder read the pictures, their rows are there already.
        """
        text, mask, pooled = prompts.positive
        if images is None:
            known, known_mask = self._nothing_known(len(text), options)
            return Conditioning(text, mask, pooled, known, known_mask), prompts.negative
        length = text.shape[1]
        if not self.components.text_encoder.image_tokens:
            text, mask = self._image_tokens("image", images, text, mask)
        known, known_mask = self.encode_known(np.asarray(images)[:, None], options, label="image")
        cond = Conditioning(text, mask, pooled, known, known_mask, image_tokens=text.shape[1] - length)
        return cond, prompts.negative

    def encode_known(self, frames: Frames, options: SamplingOptions, *, label: str) -> tuple[Latents, LatentMask]:
        """Pixel frames (b, 4(k-1)+1, y, x, 3) -> the first k known latents of a clip, and their mask."""
        return self._encode_known(label, frames, total=self._latent_shape(options)[0])

    def denoise(
        self,
        cond: Conditioning,
        negative: TextStates | None,
        options: SamplingOptions,
        *,
        purpose: int,
        history_noise: float = 0.0,
    ) -> Latents:
        """Samples latents of the shape of `cond.known`, whose known frames come back as they are.

        Args:
          cond, negative: from `condition`.
          options: seeds, steps, guidance; `options.latents` replaces the noise.
          purpose: which noise of a seed: IMAGE_PURPOSE, or w + 1 for window w of a video.
          history_noise: level of noise on what the network sees of the known latents.
        """
        walk = self._walk(cond, negative, options, purpose=purpose, history_noise=history_noise)
        return self._denoise("image" if purpose == IMAGE_PURPOSE else "video", walk, **self._made_for(options))

    def decode(self, latents: Latents) -> np.ndarray:
        """Normalised latents -> frames in [0, 1] on the host, without those that the weights' makers drop."""
        drop = self.components.sampling.dropped_frames if latents.shape[1] > 1 else 0
        return sharding.to_host(self._decode("decode", latents))[:, drop:]

    def begin(
        self, cond: Conditioning, images: Images, options: SamplingOptions, *, purpose: int, plan: window.Plan
    ) -> window.State:
        """The state before window 0: `cond` knows the first images (b, y, x, 3); its noise is that of `purpose`."""
        walk = self._walk(cond, None, options, purpose=purpose, history_noise=0.0)
        return window.begin(walk, options.history_noise, images, plan=plan)

    def next_window(
        self, state: window.State, prompts: Prompts, options: SamplingOptions, *, plan: window.Plan
    ) -> tuple[Frames, window.State]:
        """Starts the next window of a long video; see `window.step`. `state` is used up. Frames are for `fetch`.

        One program, which is not waited for. Where parameters come and go it is the stages one by one, with only one
        network on the devices at a time, and what passes between them on the host.
        """
        static, total = self._made_for(options), self._latent_shape(options)[0]
        if self._window is not None:
            return self._window("video", state, prompts, plan=plan, total=total, **static)

        def from_host(stage: Callable[..., Any] | None, label: str, **static: Any) -> Callable[..., Any]:
            return lambda *arrays: sharding.to_host(stage(label, *arrays, **static))

        stages = window.Stages(
            denoise=from_host(self._continue if plan.sink else self._denoise, "video", **static),
            decode=from_host(self._decode, "decode"),
            encode=from_host(self._encode_known, "video", total=total),
            look=from_host(self._image_tokens, "image"),
        )
        return window.step(stages, state, *prompts, plan=plan)

    def fetch(self, frames: Frames) -> np.ndarray:
        """A window's frames on the host, once they are there."""
        with clock(self.seconds, "video"):
            return sharding.to_host(frames)

    def _nothing_known(self, batch: int, options: SamplingOptions) -> tuple[Latents, LatentMask]:
        shape = (batch, *self._latent_shape(options))
        channels = self.components.vae.network.config.latent_channels
        return np.zeros((*shape, channels), np.float32), np.zeros((*shape, 1), np.float32)

    def _latent_shape(self, options: SamplingOptions) -> tuple[int, int, int]:
        vae = self.components.vae.network.config
        frames = latent_frames(options.num_frames, vae.temporal_factor)
        return frames, options.height // vae.spatial_factor, options.width // vae.spatial_factor

    def _walk(
        self,
        cond: Conditioning,
        negative: TextStates | None,
        options: SamplingOptions,
        *,
        purpose: int,
        history_noise: float,
    ) -> _Walk:
        shape = cond.known.shape
        noise = options.latents
        if noise is not None and np.shape(noise) != shape:
            raise UserError(f"latents have shape {np.shape(noise)}; this call takes {shape}")
        seeds = per_prompt(options.seed, shape[0], "seed")
        indices = range(shape[0]) if isinstance(options.seed, int) else [0] * shape[0]
        draws = np.array([[seed, index, purpose] for seed, index in zip(seeds, indices, strict=True)], np.uint32)
        return _Walk(
            cond,
            negative,
            noise,
            draws,
            times=timesteps.grid(options.num_inference_steps, options.shift),
            guidance_scale=np.float32(options.guidance_scale),
            history_noise=np.float32(history_noise),
            adapter=np.float32(0),
        )

    def _made_for(self, options: SamplingOptions) -> dict[str, Any]:
        """What a program of `_denoise` is compiled for."""
        made_for = self.components.sampling
        asked = {"sampler": options.sampler, "callback": options.callback}
        return {**asked, "image_share": made_for.image_share, "keep": made_for.keep_known}

    def _fused_window(self) -> Stage | None:
        """The program of a window; None where parameters come and go, since it needs all of them at once."""
        names = ("transformer", "vae", "image_encoder", "continuation")
        models = {name: getattr(self.components, name) for name in names}
        models = {name: model for name, model in models.items() if model is not None}
        params = {name: model.params for name, model in models.items()}
        if any(isinstance(held, Lent) for held in params.values()):
            return None
        networks = {name: model.network for name, model in models.items()}
        function = functools.partial(_window, networks)
        return self._make(function, params, self.seconds, mesh=self.components.mesh, donate=[0], wait=False)

    def _denoiser(self, model: Model | Continuation) -> Callable[..., Latents]:
        """(label, walk, **static) -> latents: a stage; where parameters come and go one that prepares, and the rest."""
        if not isinstance(model.params, Lent):
            return self._stage(_denoise, model)
        prepare, evaluate = (self._stage(each, model) for each in (_prepare, _evaluate))
        return lambda label, walk, **static: evaluate(label, walk, prepare(label, walk), **static)

    def _stage(self, function: Callable[..., Any], model: Model | Continuation, *, convolves: bool = False) -> Stage:
        bound = functools.partial(function, model.network)
        return self._make(bound, model.params, self.seconds, mesh=self.components.mesh, convolves=convolves)


@contextlib.contextmanager
def clock(seconds: collections.Counter[str], label: str) -> Iterator[None]:
    """Adds the time spent inside to `seconds[label]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[label] += time.perf_counter() - start


class _Walk(NamedTuple):
    """The arrays of `_denoise`, which prepares the steps (`_prepare`) and takes them (`_evaluate`).

    Attributes:
      draws: (b, 3), (seed, index, purpose) of each sample, used where noise is None.
      history_noise: level of noise on what the network sees of the known latents.
      adapter: behind a sink, how much an adapter of the network counts.
    """

    cond: Conditioning
    negative: TextStates | None
    noise: Latents | None
    draws: np.ndarray
    times: jax.Array
    guidance_scale: np.float32
    history_noise: np.float32
    adapter: np.float32


def _denoise(network: Network, params: Params, walk: _Walk, **static: Any) -> Latents:
    return _evaluate(network, params, walk, _prepare(network, params, walk), **static)


def _prepare(network: Network, params: Params, walk: _Walk) -> Prepared:
    told = walk.cond
    if walk.negative is not None:
        told = guidance.joined(told, conditioning.replace_text(told, *walk.negative))
    embedded = walk.guidance_scale if network.config.guidance_embedding else None
    params = lora.scaled(params, walk.adapter) if walk.cond.sink else params
    return prepare_walk(network, params, told, walk.times[:-1], guidance=embedded)


def _evaluate(
    network: Network,
    params: Params,
    walk: _Walk,
    steps: Prepared,
    *,
    sampler: samplers.Sampler,
    callback: samplers.StepCallback | None,
    image_share: float,
    keep: bool,
) -> Latents:
    cond, keys = walk.cond, jax.vmap(_keys)(walk.draws)
    params = lora.scaled(params, walk.adapter) if cond.sink else params
    noise = flow.draw_noise(keys[:, 0], cond.known.shape) if walk.noise is None else walk.noise
    if image_share:
        noise = flow.interpolate(cond.known[:, :1], noise, 1 - image_share)
    velocity = walk_fn(network, params, steps, walk.times[:-1])
    if walk.negative is not None:
        velocity = guidance.guided(velocity, conditioning.replace_text(cond, *walk.negative), walk.guidance_scale)
    seen = conditioning.noise_known(cond, keys[:, 1], walk.history_noise)
    return samplers.sample(
        lambda x, t, _: velocity(x, t, seen),
        cond,
        noise,
        walk.times,
        sampler=sampler,
        key=keys[:, 2],
        callback=callback,
        keep=keep,
    )


def _keys(draw: jax.Array) -> jax.Array:
    """(seed, index, purpose) -> three keys: for the noise, the history noise and the sampler."""
    seed, index, purpose = draw
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), purpose), 3)


def _encode_known(network: Network, params: Params, frames: Frames, *, total: int) -> tuple[Latents, LatentMask]:
    latents = network(params, frames, method="encode_latents")
    return conditioning.known_latents(latents, latents.shape[1], total)


def _decode(network: Network, params: Params, latents: Latents) -> Frames:
    return network(params, latents, method="decode_latents")


def _prepend_image_tokens(
    network: Network, params: Params, images: Images, text: Tokens, mask: TokenMask
) -> tuple[Tokens, TokenMask]:
    return conditioning.with_image_tokens(text, mask, network(params, images))


def _window(
    networks: Mapping[str, Network],
    params: Mapping[str, Params],
    state: window.State,
    prompts: Prompts,
    *,
    plan: window.Plan,
    total: int,
    **static: Any,
) -> tuple[Frames, window.State]:
    def bound(function: Callable[..., Any], name: str, **static: Any) -> Callable[..., Any]:
        return functools.partial(function, networks.get(name), params.get(name), **static)

    denoising = "continuation" if plan.sink and "continuation" in networks else "transformer"
    stages = window.Stages(
        denoise=bound(_denoise, denoising, **static),
        decode=bound(_decode, "vae"),
        encode=bound(_encode_known, "vae", total=total),
        look=bound(_prepend_image_tokens, "image_encoder"),
    )
    return window.step(stages, state, *prompts, plan=plan)
