"""Wrong programs that the tests must see, each of which somebody wrote or might: test_mutants.py runs them."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
  """One change of one file. `old` stands there exactly once; each of `tests` (in tests/) fails on `new`."""
  why: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]


TRAINING, DECODING, DRAFTERS = "dspark_jax/training", "dspark_jax/decoding", "dspark_jax/drafters"
MUTANTS = (
  # Training
  Mutant("the same anchors at every step", f"{TRAINING}/step.py",
         "key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)",
         "key = jax.random.wrap_key_data(state.key)", ("test_training.py::test_anchors_are_drawn_anew",)),
  Mutant("Muon's matrices do not decay", f"{TRAINING}/step.py", "consistent_rms=0.2, **common,",
         "consistent_rms=0.2, eps=config.eps,", ("test_training.py::test_weight_decay[muon]",)),
  Mutant("what Muon leaves to Adam does not decay", f"{TRAINING}/step.py", "adam_weight_decay=config.weight_decay",
         "adam_weight_decay=0.0", ("test_training.py::test_weight_decay[muon]",)),
  Mutant("a mean of means over microbatches", f"{TRAINING}/step.py", "                      weights=weights)",
         "                      weights=None)", ("test_training.py::test_microbatches_and_devices_are_one_batch",)),
  Mutant("a label is its own previous token: the slot convention", f"{TRAINING}/anchors.py",
         "label = jnp.where(keep[..., None], previous + 1, 0)", "label = jnp.where(keep[..., None], previous, 0)",
         ("test_training.py::test_labels_and_previous_tokens",)),
  Mutant("the mask is read one token early", f"{TRAINING}/anchors.py",
         "same & _at(batch.loss_mask, jnp.minimum(label, last))",
         "same & _at(batch.loss_mask, jnp.minimum(previous, last))",
         ("test_training.py::test_labels_and_previous_tokens",)),
  Mutant("recurrent drafters learn from the next document", f"{TRAINING}/anchors.py", "keep[..., None] & inside & _at(",
         "keep[..., None] & _at(", ("test_recurrent.py::test_blocks_of_every_position",)),
  Mutant("recurrent drafters learn the next document's first token", f"{TRAINING}/anchors.py",
         "jnp.where(known, blocks.labels, -1)", "blocks.labels",
         ("test_recurrent.py::test_labels_end_with_their_document",)),
  Mutant("the loss's cotangent is ignored", f"{TRAINING}/losses.py", "* cotangent[0])", "* 1.0)",
         ("test_losses.py::test_a_scaled_loss_has_scaled_gradients",)),
  Mutant("the teacher learns", f"{TRAINING}/losses.py", "target_hidden=jax.lax.stop_gradient(target_hidden)",
         "target_hidden=target_hidden", ("test_losses.py::test_only_the_drafter_learns",)),
  Mutant("total variation in bfloat16", f"{TRAINING}/losses.py", "jax.nn.log_softmax(mine(hidden, latent))",
         "jax.nn.log_softmax(mine(hidden, latent).astype(hidden.dtype)).astype(jnp.float32)",
         ("test_losses.py::test_softmaxes_are_float32_under_bfloat16",)),
  Mutant("the lens is fitted to padding", f"{TRAINING}/starts.py", " & (batch.segments[:, :length] > 0)", "",
         ("test_training.py::test_a_lens_fitted_in_closed_form",)),
  Mutant("the lens is fitted across documents", f"{TRAINING}/starts.py",
         "(batch.segments[:, :length] == batch.segments[:, ahead:])", "(batch.segments[:, ahead:] > 0)",
         ("test_training.py::test_a_lens_fitted_in_closed_form",)),
  Mutant("a teacher over the draft words alone", f"{TRAINING}/losses.py", "p = jnp.exp(base(rows) - total)",
         "p = jax.nn.softmax(base(rows))", ("test_losses.py::test_loss_is_the_formula[words1]",)),
  # Drafters
  Mutant("a lens reads over its document's start", f"{DRAFTERS}/starts.py",
         "jnp.take_along_axis(batch.positions, anchors, axis=1)[..., None] > 0", "anchors[..., None] > 0",
         ("test_drafters.py::test_a_start_holds_what_training_reads[lens]",)),
  Mutant("columns of a long prompt ignore the blocks before", f"{DRAFTERS}/recurrent.py",
         "    x, q, k, v = self.project(target.embed(committed.next_tokens)",
         "    place = place.replace(hi=jnp.broadcast_to(place.start[:, None, None], place.hi.shape))\n"
         "    x, q, k, v = self.project(target.embed(committed.next_tokens)",
         ("test_recurrent.py::test_long_prompts_in_blocks[eagle3]",)),
  Mutant("the block stands one position early in training", f"{DRAFTERS}/backbone.py",
         "positions = start + jnp.arange(", "positions = start - 1 + jnp.arange(",
         ("test_drafters.py::test_teacher_forced_equals_sampled[vanilla]",)),
  Mutant("the block stands one position early in decoding", f"{DRAFTERS}/backbone.py",
         "positions = cache.length[:, None] + jnp.arange(embeddings.shape[1]",
         "positions = cache.length[:, None] - 1 + jnp.arange(embeddings.shape[1]",
         ("test_drafters.py::test_teacher_forced_equals_sampled[vanilla]",)),
  Mutant("rejected rows stay in the draft's cache", f"{DRAFTERS}/backbone.py",
         "layers=tuple(layers)).commit(n)", "layers=tuple(layers)).commit(jnp.full_like(n, features.shape[1]))",
         ("test_drafters.py::test_rejected_rows_are_overwritten_before_they_are_read[vanilla]",)),
  Mutant("every draft follows the anchor", f"{DRAFTERS}/heads.py", "return (state, token), (token,",
         "return (state, anchor), (token,", ("test_drafters.py::test_teacher_forced_equals_sampled[vanilla]",)),
  Mutant("a causal block", "dspark_jax/nn/attention.py", "own = jnp.ones((1, 1, hi.shape[2], hi.shape[2]), bool)",
         "own = jnp.tril(jnp.ones((1, 1, hi.shape[2], hi.shape[2]), bool))",
         ("test_drafters.py::test_block_is_bidirectional", "test_training.py::test_what_a_block_sees")),
  Mutant("drafts are drawn at another temperature than their q", f"{DRAFTERS}/heads.py",
         "(keys, k), probs)\n", "(keys, k), sp.probabilities(2 * logits, sampling))\n",
         ("test_sampled.py::test_text_follows_the_target",)),
  Mutant("all drafts of a block share their noise", f"{DRAFTERS}/heads.py",
         "jax.vmap(jax.random.fold_in, (0, None))(keys, k)", "keys",
         ("test_sampled.py::test_text_follows_the_target",)),
  Mutant("the anchor's own features in the context", f"{DRAFTERS}/backbone.py",
         "jnp.where(blocks.keep, blocks.anchors, 0)[..., None], shape)",
         "jnp.where(blocks.keep, blocks.anchors + 1, 0)[..., None], shape)",
         ("test_drafters.py::test_context_ends_before_the_anchor[vanilla]",)),
  Mutant("a recurrent draft starts from a rejected column", f"{DRAFTERS}/recurrent.py",
         "newest(hidden, n, state.hidden)", "newest(hidden, jnp.full_like(n, hidden.shape[1]), state.hidden)",
         ("test_drafters.py::test_rows_absorbed_at_once_or_one_by_one[eagle3]",)),
  Mutant("documents of a row see each other in their block", "dspark_jax/nn/attention.py",
         "own = own & (segments[..., :, None] == segments[..., None, :])", "pass",
         ("test_targets.py::test_packed_documents_equal_separate_rows",)),
  # Decoding
  Mutant("a small residual is taken for none", f"{DECODING}/verify.py", "mass <= 1e-8", "mass <= 1e-3",
         ("test_verify.py::test_a_small_residual",)),
  Mutant("acceptance and the token after it share their noise", f"{DECODING}/round.py",
         "bonus_keys=bonus_keys", "bonus_keys=accept_keys", ("test_sampled.py::test_text_follows_the_target",)),
  Mutant("only the anchor's row reaches the drafter", f"{DECODING}/round.py", "Committed(out, tokens, n_commit)",
         "Committed(out, tokens, jnp.minimum(n_commit, 1))", ("test_generate.py::test_golden_generation",)),
  Mutant("a token after the stop token", f"{DECODING}/round.py",
         "n_new = n_commit - (live & stopped).astype(jnp.int32)", "n_new = n_commit",
         ("test_generate.py::test_scripted_drafts",)),
  Mutant("a text with rounds in one run only is compared", f"{DECODING}/acceptance.py", "(counts[..., 1] > 0).all(0)",
         "(counts[..., 1] > 0).any(0)", ("test_compare.py::test_a_text_without_rounds_is_not_compared",)),
  Mutant("a reduced vocabulary's q at the wrong words", f"{DECODING}/verify.py",
         "q = jnp.zeros_like(p).at[:, proposal.words].set(q)", "q = jnp.zeros_like(p).at[:, :q.shape[1]].set(q)",
         ("test_verify.py::test_one_slot_gives_back_the_target_exactly[words1]",)),
  Mutant("a row goes on after a stop token among its drafts", f"{DECODING}/round.py", "ended = stopped | is_stop(",
         "ended = is_stop(", ("test_generate.py::test_scripted_drafts",)),
  Mutant("rows that are done commit more", f"{DECODING}/round.py", "n_commit = jnp.where(live, kept + 1, 0)",
         "n_commit = kept + 1", ("test_round.py::test_reports_tell_the_texts[greedy]",)),
  Mutant("logits of NaN are a token", f"{DECODING}/round.py", "| (verdict.next_token >= vocabulary)", "",
         ("test_generate.py::test_nan_after_the_first_token",)),
  # Folders and runs
  Mutant("a failed rename loses the only copy", "dspark_jax/checkpoints/atomic.py",
         "`old` holds the only copy.\n    put_back(folder)\n", "`old` holds the only copy.\n",
         ("test_saving.py::test_a_rename_that_fails",)),
  Mutant("the test of a kill does not kill", "tests/test_programs.py", "  run.kill()\n", "  run.wait()\n",
         ("test_programs.py::test_kill_and_the_run_goes_on",)),
)
