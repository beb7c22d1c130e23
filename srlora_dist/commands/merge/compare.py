"""Compares models by their logits of random inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

NUM_ROWS, ROW_LENGTH = 4, 16
"""Size of the random inputs."""
IMAGE_SIZE = 224
"""Size of the random pictures for a model that takes any size."""


def random_inputs(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Rows of tokens or pictures, the same every time; one by one, because a model may lack a padding token."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        config, size = model.config, getattr(model.config, "image_size", None) or IMAGE_SIZE
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (NUM_ROWS, 1, getattr(config, "num_channels", 3), height, width)
        return [{"pixel_values": row.to(model.dtype)} for row in torch.randn(shape, generator=generator)]
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or ROW_LENGTH
    shape = (NUM_ROWS, 1, min(ROW_LENGTH, most))
    num_embeddings, end = model.get_input_embeddings().num_embeddings, model.config.get_text_config().eos_token_id
    tokens = torch.randint(num_embeddings, shape, generator=generator)
    if isinstance(end, int) and end < num_embeddings:
        tokens[..., -1] = end  # BART's and T5's classifiers read what stands there
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]


@torch.no_grad()
def logits(model: nn.Module, inputs: list[dict[str, Tensor]]) -> list[Tensor]:
    """The logits of each row, in float32; the inputs are brought into the type of the model."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    rows = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in row.items()} for row in inputs]
    return [model.eval()(**row).logits.float() for row in rows]


def relative_difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference over that of what was expected.

    Raises:
        ValueError: It is not a number.
    """
    got, expected = torch.cat(got), torch.cat(expected)
    difference = ((got - expected).norm() / expected.norm()).item()
    if not difference < float("inf"):
        raise ValueError("the merged model's logits are NaN or infinite: choose a wider --dtype, such as float32")
    return difference
