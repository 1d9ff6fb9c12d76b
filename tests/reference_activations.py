"""Records what each layer of a published HunyuanVideo transformer computes, for `python -m magic141_jax.convert check`.

Needs torch and diffusers. From the root of the repository:

    python tests/reference_activations.py REPOSITORY/transformer ref.safetensors [--dtype float32]
    python -m magic141_jax.convert check REPOSITORY --reference ref.safetensors

Inputs are random, small, and padded differently in each row of the batch. Names and layouts are those of
`MMDiT.__call__(..., intermediates=True)`: channels last, layers stacked.
"""

import argparse
import functools

import numpy as np

FRAMES, HEIGHT, WIDTH, TEXT, BATCH = 3, 4, 6, 9, 2
TIMES = (0.25, 0.875)
GUIDANCE = (6.0, 1.0)


def record(model, seed=0):
    """Runs a diffusers transformer on random inputs: {name: array} of its inputs and of every layer's output."""
    import torch

    config = model.config
    make = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=make)
    mask = torch.arange(TEXT)[None] < torch.tensor([[TEXT], [TEXT // 2]])
    inputs = {
        "hidden_states": draw(BATCH, config.in_channels, FRAMES, HEIGHT, WIDTH),
        "encoder_hidden_states": draw(BATCH, TEXT, config.text_embed_dim),
        "pooled_projections": draw(BATCH, config.pooled_projection_dim),
    }
    scalars = {"timestep": 1000 * torch.tensor(TIMES)}
    if config.guidance_embeds:
        scalars["guidance"] = 1000 * torch.tensor(GUIDANCE)

    kept = {}
    hooks = [
        (model.time_text_embed, "condition"),
        (model.x_embedder, "patch_in"),
        (model.context_embedder, "text_in"),
        *((block, "double_blocks") for block in model.transformer_blocks),
        *((block, "single_blocks") for block in model.single_transformer_blocks),
    ]
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: kept.setdefault(name, []).append(out))
        for module, name in hooks
    ]
    with torch.no_grad():
        cast = {name: value.to(model.dtype) for name, value in inputs.items()}
        output = model(**cast, **scalars, encoder_attention_mask=mask).sample
    for handle in handles:
        handle.remove()

    first = {name: kept[name][0] for name in ("condition", "patch_in", "text_in")}
    if isinstance(first["condition"], tuple):  # the second is for clean frames
        first["condition"] = first["condition"][0]
    made = first | {
        "double_blocks.video": torch.stack([video for video, _ in kept["double_blocks"]]),
        "double_blocks.text": torch.stack([text for _, text in kept["double_blocks"]]),
        "single_blocks": torch.stack([torch.cat(pair, dim=1) for pair in kept["single_blocks"]]),
        "output": output.movedim(1, -1),
        "input.inputs": inputs["hidden_states"].movedim(1, -1),
        "input.t": torch.tensor(TIMES),
        "input.text": inputs["encoder_hidden_states"],
        "input.pooled": inputs["pooled_projections"],
    }
    if config.guidance_embeds:
        made["input.guidance"] = torch.tensor(GUIDANCE)
    arrays = {name: np.ascontiguousarray(value.float().numpy()) for name, value in made.items()}
    return arrays | {"input.text_mask": mask.numpy()}


def main():
    import diffusers
    import torch
    from safetensors.numpy import save_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("target")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = diffusers.HunyuanVideoTransformer3DModel.from_pretrained(args.folder, torch_dtype=dtype)
    save_file(record(model.eval()), args.target)


if __name__ == "__main__":
    main()
