"""What one decode step is given: queries, lengths, and the tokens they are made to look for."""

import math

import torch

from speed.shapes import BLOCK_SIZE, DTYPE, RECENT, RESIDUAL, SINKS, Shape

PLANTED = 8
PLANTED_ODDS = math.exp(3)


class Inputs:
    """One shape, context and batch, the same for every kind of layer and for vLLM.

    In every row and KV head `PLANTED` tokens are heavy: their K has the same product with each
    query head of the group, so high that together they weigh about `PLANTED_ODDS` times as
    much as all other tokens would if their scores were 0.
    """

    def __init__(self, shape: Shape, context: int, batch: int) -> None:
        self.shape, self.context, self.batch = shape, context, batch
        self.scale = shape.head_size**-0.5
        self.query = torch.randn(batch, shape.heads, shape.head_size).to(DTYPE)
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32)
        self.planted = self._planted_tokens()
        self.planted_key = self._planted_key()

    def _planted_tokens(self) -> torch.Tensor:
        """Positions [B, Hk, PLANTED], neither sinks nor among the newest tokens."""
        # Neither read exactly by a dense layer, nor always by a sparse one.
        middle = self.context - max(RESIDUAL, RECENT) - BLOCK_SIZE - SINKS
        order = torch.rand(self.batch, self.shape.kv_heads, middle).argsort(-1)
        return order[..., :PLANTED] + SINKS

    def _planted_key(self) -> torch.Tensor:
        """What is added to K of planted tokens, [B, Hk, d]: the least that reaches the score."""
        score = math.log(self.context / PLANTED * PLANTED_ODDS) / self.scale
        heads = self.query.double().unflatten(1, (self.shape.kv_heads, -1))
        wanted = torch.full((*heads.shape[:3], 1), score, dtype=torch.float64)
        return (torch.linalg.pinv(heads) @ wanted).squeeze(-1).float()
