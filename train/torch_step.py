"""The same training step in PyTorch, written as the reference writes it: what train.bench compares ours with.

A dense mask of [queries, context + queries], all logits at once, `torch.optim.AdamW`. Features are given.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
import torch.nn.functional as F

from dspark_jax.drafters.dspark import DSparkConfig
from dspark_jax.training.losses import EPSILON


class Step:
  """One row of T tokens with A blocks of G drafts.

  params: float32 by the names that checkpoints use. embeddings, head: f[V,D] of the target. features f[T,F], hidden
  f[T,D]: what the target says. tokens i[T]; anchors i[A], all of them kept. `seconds()` is of one more step.
  """

  def __init__(self, config: DSparkConfig, params: dict, embeddings, head, features, hidden, tokens, anchors):
    tensor = lambda x: torch.from_numpy(np.array(x))
    self.config = config
    self.params = {name: tensor(value).requires_grad_() for name, value in params.items()}
    self.embeddings, self.head, self.features, self.hidden = map(tensor, (embeddings, head, features, hidden))
    self.tokens, self.anchors = tensor(tokens).long(), tensor(anchors).long()
    self.optimizer = torch.optim.AdamW(self.params.values(), lr=6e-4, weight_decay=0.0)
    context, block = len(features), config.block_size
    place = self.anchors[:, None] + torch.arange(block)
    # The label of the last position must be inside the row, and so must all before it.
    self.supervised = (place + 1 < context).float()
    self.place, self.label = place.clamp(max=context - 1), (place + 1).clamp(max=context - 1)
    far = torch.arange(context) < self.anchors.repeat_interleave(block)[:, None]
    number = torch.arange(len(anchors)).repeat_interleave(block)
    self.mask = torch.cat([far, number[:, None] == number], 1)

  def seconds(self) -> tuple[float, float]:
    """(seconds of a step, its loss before the update)."""
    began = time.perf_counter()
    self.optimizer.zero_grad()
    loss = self.loss()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
    self.optimizer.step()
    return time.perf_counter() - began, loss.item()

  def loss(self) -> torch.Tensor:
    """L of DSpark 3.3, with the released weights."""
    p, block = self.params, self.config.block_size
    hidden = self.backbone().reshape(len(self.anchors), block, -1)
    previous = F.embedding(self.tokens[self.place], p["markov_head.markov_w1.weight"])
    logits = hidden @ self.head.T + previous @ p["markov_head.markov_w2.weight"].T
    with torch.no_grad():
      teacher = torch.softmax(self.hidden[self.place] @ self.head.T, -1)
    decay = self.supervised * torch.exp(-torch.arange(block) / 4.0)
    mean = lambda term: (decay * term).sum() / (decay.sum() + EPSILON)
    ce = F.cross_entropy(logits.flatten(0, 1), self.tokens[self.label].flatten(), reduction="none").view_as(decay)
    tv = (torch.softmax(logits, -1) - teacher).abs().sum(-1)
    read = torch.cat([hidden, previous], -1)
    survive = F.linear(read, p["confidence_head.proj.weight"], p["confidence_head.proj.bias"])[..., 0]
    accept = (1 - tv.detach() / 2).clamp(0, 1)
    confidence = F.binary_cross_entropy_with_logits(survive, accept, reduction="none")
    return 0.1 * mean(ce) + 0.9 * mean(tv) + mean(confidence)

  def backbone(self) -> torch.Tensor:
    """f[A*G,D]: [anchor, mask, ...] through the draft layers, over the features before the anchor."""
    p, spec = self.params, self.config.spec
    norm = lambda x, name: F.rms_norm(x, x.shape[-1:], p[f"{name}.weight"], spec.rms_norm_eps)
    context = norm(F.linear(self.features, p["fc.weight"]), "hidden_norm")
    tokens = torch.full_like(self.place, self.config.mask_token_id)
    tokens[:, 0] = self.tokens[self.anchors]
    x = F.embedding(tokens.flatten(), self.embeddings)
    own = (self.anchors[:, None] + torch.arange(self.config.block_size)).flatten()
    places = turns(torch.cat([torch.arange(len(context)), own]), spec)
    mine = [x[len(context):] for x in places]
    for i in range(self.config.num_layers):
      name = f"layers.{i}."
      y = norm(x, f"{name}input_layernorm")
      project = lambda x, kind: F.linear(x, p[f"{name}self_attn.{kind}_proj.weight"]).unflatten(-1, (-1, spec.head_dim))
      both = torch.cat([context, y])
      q, k, v = rotate(project(y, "q"), mine), rotate(project(both, "k"), places), project(both, "v")
      out = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=self.mask,
                                           enable_gqa=True)[0].transpose(0, 1).flatten(1)
      x = x + F.linear(out, p[f"{name}self_attn.o_proj.weight"])
      y = norm(x, f"{name}post_attention_layernorm")
      gate, up, down = (p[f"{name}mlp.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
      x = x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)
    return norm(x, "norm")


def turns(positions: torch.Tensor, spec) -> tuple[torch.Tensor, torch.Tensor]:
  """(cos, sin), f[N,1,h/2], of a rotary embedding at positions i[N]."""
  half = spec.head_dim // 2
  angle = positions[:, None, None] * torch.exp(-math.log(spec.rope_theta) * torch.arange(half) / half)
  return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, places) -> torch.Tensor:
  """Rotary embedding in half rotation, of x f[N,heads,h]."""
  (a, b), (cos, sin) = x.split(x.shape[-1] // 2, -1), places
  return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
