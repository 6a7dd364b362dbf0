"""Fixtures: tiny language models with random weights."""

from __future__ import annotations

import pytest
import torch

from clover.language.decoder_only import DecoderOnly
from clover.language.encoder_decoder import EncoderDecoder

from .tiny import tiny_llama, tiny_t5


@pytest.fixture(scope="session")
def llama() -> DecoderOnly:
    return tiny_llama()


@pytest.fixture(scope="session")
def t5() -> EncoderDecoder:
    return tiny_t5()


@pytest.fixture
def visual() -> torch.Tensor:
    """Visual tokens `[B=3, Q=4, H=32]`."""
    return torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
