"""Everything that learns, in one module: what `bridge.safetensors` holds.

Stage 1 trains `vision_norm`, `qformer` and the alignment heads; stage 2 trains `vision_norm`,
`qformer` and the projection into the language model. Image encoder and language model stay outside.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clover.core.config import QFormerConfig
from clover.core.errors import CloverError
from clover.core.linear import Linear
from clover.qformer.model import ImageKeys, LanguageHead, QFormer


class AlignmentHeads(nn.Module):
    """The heads of stage 1: two contrastive projections, a matcher and a next-word head."""

    def __init__(self, config: QFormerConfig, *, temperature: float = 0.07) -> None:
        super().__init__()
        width, size = config.hidden_size, config.embedding_size
        self.vision_projection = Linear(width, size)
        self.text_projection = Linear(width, size)
        self.matching = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.language = LanguageHead(config)

    def embed_image(self, hidden: Tensor) -> Tensor:
        """Query rows [B, Q, D] -> unit vectors [B, Q, size]."""
        return F.normalize(self.vision_projection(hidden), dim=-1)

    def embed_text(self, hidden: Tensor) -> Tensor:
        """`[CLS]` row [B, D] -> unit vectors [B, size]."""
        return F.normalize(self.text_projection(hidden), dim=-1)

    def match(self, hidden: Tensor) -> Tensor:
        """Query rows [B, Q, D] -> logits [B, 2], averaged over queries; index 1 = match."""
        logits: Tensor = self.matching(hidden).mean(dim=1)
        return logits


class Bridge(nn.Module):
    """LayerNorm on image tokens, Q-Former, and the heads of the stage.

    Args:
        config: The Q-Former's sizes.
        language_width: Width of the language model; adds the projection of stage 2.
        has_alignment: Adds the heads of stage 1.
    """

    def __init__(
        self,
        config: QFormerConfig,
        *,
        language_width: int | None = None,
        has_alignment: bool = False,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        self.config = config
        # 1e-5, not the encoder's 1e-6: the published ln_vision is torch's default (SPEC, 3.1).
        self.vision_norm = nn.LayerNorm(config.encoder_width, eps=1e-5)
        self.qformer = QFormer(config)
        self.qformer.word_embedding.requires_grad_(config.train_word_embedding)
        self.heads = AlignmentHeads(config, temperature=temperature) if has_alignment else None
        self.projection = (
            Linear(config.hidden_size, language_width) if language_width is not None else None
        )

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: each stage has passes of its own.

        Raises:
            CloverError: always.
        """
        raise CloverError(
            "a Bridge is not called itself; give features to read_image, then call visual_prefix, "
            "or qformer's own passes"
        )

    @property
    def alignment(self) -> AlignmentHeads:
        """The heads of stage 1."""
        assert self.heads is not None, "this bridge was built without alignment heads"
        return self.heads

    def read_image(self, features: Tensor) -> ImageKeys:
        """Image tokens [B, P, E] as the encoder gave them -> keys for the Q-Former."""
        return self.qformer.project_image(features.to(self.vision_norm.weight), self.vision_norm)

    def visual_hidden(
        self, image: ImageKeys, ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the query rows [B, Q, D] that the projection reads; see `visual_prefix`."""
        if ids is None or mask is None:
            return self.qformer.encode_queries(image).hidden
        return self.qformer.encode_pair(image, ids, mask, queries_only=True)

    def visual_prefix(
        self, image: ImageKeys, ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return what the language model reads of the image.

        Args:
            image: From `read_image`; of B images, or of fewer that several questions share
                (`QFormer.encode_pair`).
            ids: The question's word pieces [B, T]; None for a Q-Former that does not read it.
            mask: [B, T], 1 = a token.

        Returns:
            [B, Q, width of the language model].
        """
        return self.project(self.visual_hidden(image, ids, mask))

    def project(self, hidden: Tensor) -> Tensor:
        """Query rows [B, Q, D] -> visual tokens [B, Q, width of the language model]."""
        assert self.projection is not None, "this bridge was built without a language model"
        prefix: Tensor = self.projection(hidden)
        return prefix

    def num_trainable(self) -> int:
        """Return how many parameters learn, or learnt: a loaded model takes no gradient."""
        words = self.qformer.word_embedding.weight.numel()
        still = 0 if self.config.train_word_embedding else words
        return sum(item.numel() for item in self.parameters()) - still
