# %% [markdown]
# # 01 Activations: where do the numbers come from?
#
# A sparse autoencoder (SAE) is trained on vectors. This notebook is about those vectors: where they are read, what is
# in them that should not be, and how to hand them on without breaking them. Nearly every SAE that fails quietly fails
# here.
#
# **After this notebook you can**
#
# - read the residual stream of a language model with a hook of your own, and with TransformerLens, and show that both
#   give the same numbers to the last bit;
# - explain why one direction "explains 99.7 % of the variance", and why that is no discovery;
# - say why five features fit into two dimensions, and so why neurons are not features;
# - measure whether a store of activations really shuffles;
# - fit the normalisation, and recognise an SAE that is used in the wrong units;
# - flatten (batch, pos, d) and say what three wrong ways of doing it look like.
#
# **You need** PyTorch, a rough idea of a transformer, and notebook 00, which shows the cuts: a cut says which entries
# of `z` are kept. **BatchTopK** keeps the k · n largest of a whole batch of n tokens, or, once trained, whatever
# exceeds a threshold θ. **Time**: about two hours with all exercises, of which ten are core and four ask for one
# letter only. Cells that take longer than ten seconds on two cores say so.

# %% tags=["setup"]
pass

# %%
import torch
from einops import rearrange
from IPython.display import HTML
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tutorial_sae import heldout_slice, load_model, load_pretrained, load_text
from tutorial_sae.checks import nb01 as check
from tutorial_sae.checks import progress
from tutorial_sae.measures import fvu
from tutorial_sae.models import activations_at, token_losses
from tutorial_sae.plots import COLOURS, picture
from tutorial_sae.saes.base import keep_batch
from tutorial_sae.widgets.highlight import highlight

# %% [markdown]
# The symbols of the course, the same in text and code:
#
# | symbol | shape | what it is |
# |---|---|---|
# | `x` | (tokens, d_in) | activations: one vector per token; here d_in = 576 |
# | `W_enc`, `b_enc` | (d_in, d_sae), (d_sae) | encoder of the SAE; here d_sae = 2304 latents |
# | `W_dec`, `b_dec` | (d_sae, d_in), (d_in) | decoder |
# | `z` | (tokens, d_sae) | pre-activations, `relu((x - b_dec) @ W_enc + b_enc)` |
# | `k`, `theta` (θ) | numbers | latents per token; the threshold that a kept entry of `z` must exceed |
# | `x_hat` | (tokens, d_in) | reconstruction |
#
# A *feature* is a property of the data ("this is a surname"), a *latent* is a unit of an SAE. The aim is that latents
# stand for features; nothing guarantees it. **L0** is the mean number of latents a token keeps, **FVU** the fraction
# of the variance that a reconstruction leaves unexplained.
#
# ## 1. A text becomes a matrix
#
# Here is a language model, and sixteen rows of text that no SAE of this course was trained on. Each row opens with a
# special token (BOS, *beginning of sequence*) and has 128 tokens in all.

# %%
model = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
HOOK, LAYER = model.card.hook, 15
text = load_text(split="heldout")
tokens = next(iter(text.rows(model, context=128, rows_at_once=16, shuffle=True))).tokens.long()
print(f"{model.card.name}: {model.cfg.n_layers} blocks, width {model.cfg.d_model}; tokens: {tuple(tokens.shape)}")
print(model.tokenizer.decode(tokens[12, 1:37]))

# %% [markdown]
# *Text: Wikipedia, CC BY-SA 4.0; see `NOTICE`.*
#
# A transformer keeps one vector per token, and every block *adds* to it. That running sum is the **residual stream**.
# We read it after block 15, half-way up: what the model knows about a token by then is in those 576 numbers, and all
# that the upper blocks will ever learn about it must come from them and from those of the other tokens.

# %%
figure, (axis,) = picture(
    "Blocks 0 to 29 add to the residual stream; the hook reads it after block 15.", width=9, height=1.9
)
axis.annotate("", (9.4, 0.4), (0, 0.4), arrowprops={"arrowstyle": "-|>", "lw": 3, "color": "#444444"})
boxes = {0.8: "embed", 2.3: "block 0", 3.5: "…", 4.7: "block 15", 6.2: "block 16", 7.3: "…", 8.5: "block 29"}
for place, name in boxes.items():
    here = name == "block 15"
    box = {"boxstyle": "round,pad=0.35", "fc": COLOURS["topk"] if here else "#e8e8e8", "ec": "none"}
    axis.text(place, 1.2, name, ha="center", color="white" if here else "black", bbox=box if name != "…" else None)
    if name != "…":
        axis.annotate(
            "", (place + 0.25, 0.45), (place + 0.1, 0.95), arrowprops={"arrowstyle": "->", "color": "#777777"}
        )
axis.plot(5.4, 0.4, "o", color=COLOURS["batchtopk"], ms=11)
axis.text(5.4, -0.15, "blocks.15.hook_resid_post", ha="center", color=COLOURS["batchtopk"], family="monospace")
axis.text(0.1, 0.05, "residual stream", color="#444444")
axis.set(xlim=(0, 9.5), ylim=(-0.4, 1.7), title="Every block adds to the stream; we read it after block 15")
axis.axis("off")
figure

# %% [markdown]
# ### Exercise 1.1: a hook of your own
#
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 12 minutes · core
# > You will read the residual stream with nothing but PyTorch.
#
# Any PyTorch module takes a *forward hook*: a function that is called with `(module, inputs, output)` whenever the
# module has run. Underneath our model is a Hugging Face model, `model.original_model`, with its blocks in
# `hf.model.layers`. Hook the right block, run the model once, take the hook off again.
#
# **Predict first.** What happens to later runs if the hook is left on? And what if the hook *returns* something?


# %%
def read_by_hand(hf, tokens: Int[Tensor, "rows pos"], layer: int) -> Float[Tensor, "rows pos d_in"]:
    """The residual stream after block `layer` of the Hugging Face model `hf`.

    One forward pass, without gradients; no hook is left on the model.
    """
    ### BEGIN SOLUTION
    kept = {}

    def keep(module, inputs, output):
        kept["x"] = output  # returns None: a hook that returns something replaces the output

    handle = hf.model.layers[layer].register_forward_hook(keep)
    try:
        with torch.no_grad():
            hf(tokens)
    finally:
        handle.remove()
    return kept["x"]
    ### END SOLUTION


# %%
check.hook(read_by_hand)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# A hook cannot return its catch to you. It needs a place to put it: a list or a dictionary outside of it.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# `handle = block.register_forward_hook(f)`, run the model, `handle.remove()`. In the current transformers a block's
# `output` is the tensor itself, (rows, pos, d_in).
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# ```python
# kept = []
# handle = hf.model.layers[layer].register_forward_hook(lambda module, inputs, output: kept.append(output))
# with torch.no_grad():
#     ...
# ```
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 1.1: passed (block 1, block 0, block 2). 1 of 11 in this notebook.`
# </details>
#
# **What you just saw.** There is no magic in a hook point. The check used a tiny model of the same family, with
# random weights; in a moment the real one.

# %% [markdown] tags=["solution"]
# **Why so.** The hook stores the block's output and returns `None`, so it changes nothing. The `try … finally` takes
# it off even if the run fails. **Usual mistakes**: taking `inputs[0]`, the stream *before* the block (one layer too
# early); forgetting `remove()`, after which every later run pays for the hook and overwrites its catch; leaving
# gradients on, so that the result keeps the whole forward pass in memory; `output_hidden_states=True`, whose entry 0
# is the embedding and whose last entry has been through the final norm.

# %% [markdown]
# ## 2. The same with TransformerLens
#
# TransformerLens gives every place in a model a name. `run_with_cache` runs it and keeps what you name, and
# `stop_at_layer` saves the work above. (TransformerLens 4 wraps the Hugging Face modules instead of rewriting them,
# so we may ask for equality to the last bit. With folded or centred weights the streams would differ, and an SAE
# trained on one would be wrong on the other.) Let us read one row in three ways.

# %%
row = tokens[12:13]
with torch.no_grad():
    _, cache = model.run_with_cache(row, names_filter=HOOK, stop_at_layer=LAYER + 1)
    hidden = model.original_model.model(row, output_hidden_states=True).hidden_states
caught = []
handle = model.original_model.model.layers[LAYER].register_forward_pre_hook(
    lambda module, inputs: caught.append(inputs[0])
)
with torch.no_grad():
    model.original_model(row)
handle.remove()
print("TransformerLens and hidden_states[16]:", torch.equal(cache[HOOK], hidden[LAYER + 1]))
print("TransformerLens and what enters block 15:", torch.equal(cache[HOOK], caught[0]))
print("hidden_states:", len(hidden), "entries for", model.cfg.n_layers, "blocks: entry 0 is the embedding")

# %% tags=["solution"]
print("TransformerLens and your hook:", torch.equal(cache[HOOK], read_by_hand(model.original_model, row, LAYER)))

# %% [markdown]
# The first comparison says `True`, to the last bit. The one with what enters block 15 says `False`, and should: that
# is the stream after block 14, the output of another block.
#
# ### Exercise 1.2: one layer too few
#
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●○ 4/5 · about 3 minutes · core
# > You will learn the off-by-one that costs people an afternoon.
#
# We want `blocks.15.hook_resid_post`, so somebody writes
#
# ```python
# out, cache = model.run_with_cache(row, names_filter="blocks.15.hook_resid_post", stop_at_layer=15)
# ```
#
# What is in `cache`? **a** the stream after block 15 · **b** the stream after block 14 · **c** nothing, and no error
# is raised · **d** the call raises an error.

# %%
### BEGIN SOLUTION
#: answer = ...
answer = "c"
### END SOLUTION

# %%
check.too_few(answer)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Which blocks does `blocks[:15]` hold?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# The hook point lies inside block 15. A hook in a block that is not run is never called.
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# A cache starts empty, and only hooks put things into it.
# </details>

# %% [markdown] tags=["solution"]
# **c.** Block 15 never runs, its hook is never called, and an empty cache is not an error. **Usual mistakes**:
# reading `stop_at_layer` as "the last layer that runs"; taking `out` for the activations, as the next cell shows.

# %%
with torch.no_grad():
    out, empty = model.run_with_cache(row, names_filter=HOOK, stop_at_layer=LAYER)
print("in the cache:", list(empty.keys()))
print("what came out:", tuple(out.shape), "equal to what enters block 15:", torch.equal(out, caught[0]))

# %% [markdown]
# Look at the second line: the call gives back a tensor of the right shape, and of the wrong layer. The course's
# `activations_at(model, tokens, hook)` does the counting, and refuses a hook that is not there.
#
# ## 3. A puzzle
#
# Now all sixteen rows, 2,048 vectors of 576 numbers. Before anybody trains anything: how complicated are they?
#
# > **Why?** If a few directions held nearly all of what varies, we could describe a token by a few numbers and would
# > need no SAE. Principal components tell: of all sets of n directions, they leave the least squared error.
#
# With `c = x - mean(x)` and singular values $s_1 \ge s_2 \ge \dots$ of `c`, the best n directions explain the share
# $(s_1^2 + \dots + s_n^2) / (s_1^2 + \dots + s_d^2)$ of the variance.
#
# ### Exercise 1.3: the best n directions
#
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●○ 4/5 · about 8 minutes · core
# > You will measure how far a flat description can get.


# %%
def explained(x: Float[Tensor, "tokens d_in"], n: int) -> float:
    """The share of the variance of `x` (0 to 1) that its best n directions explain together."""
    ### BEGIN SOLUTION
    squares = torch.linalg.svdvals(x - x.mean(dim=0)).square()
    return float(squares[:n].sum() / squares.sum())
    ### END SOLUTION


# %%
check.directions(explained)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# `torch.linalg.svdvals` gives the singular values, largest first. Of which matrix do you want them?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Variance is squared distance from the mean: subtract it first, and square the singular values.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `squares = torch.linalg.svdvals(x - x.mean(dim=0)) ** 2`, then a ratio of two sums.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 1.3: passed (one direction, three, a long mean, all).` and how many you have.
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** The squared singular values of the centred matrix are the variances along the principal directions,
# times the number of tokens, which cancels. **Usual mistakes**: not centring (a residual stream has a long mean,
# which then looks like a great direction); summing singular values without squaring; taking the n largest
# coordinates, which are only 576 of infinitely many directions.

# %%
# about 10 seconds on two cores
everything = activations_at(model, tokens, HOOK)  # (16, 128, 576)
share = check.share_explained(everything.flatten(0, 1), 1)
print(f"one direction explains {share:.1%} of the variance")

# %% [markdown]
# One direction out of 576, and more than 99 %! FVU would be below 0.01 with a single number per token. **Are we
# done?**
#
# A number like this should be put to a test that does not know about variance. We *splice*: let the model run on with
# the one-direction version in place of its activations, and see how well it still predicts text (cross-entropy, CE,
# in nats per token; lower is better).

# %%
# about 15 seconds on two cores
flat, centre = everything.flatten(0, 1), everything.flatten(0, 1).mean(dim=0)
direction = torch.linalg.svd(flat - centre, full_matrices=False).Vh[0]
one = ((everything - centre) @ direction)[..., None] * direction + centre
some = slice(12, 14)
spliced = {"as they are": everything, "one direction": one, "every token the mean": centre.expand_as(everything)}
for name, new in spliced.items():
    print(f"{name:<21}CE {token_losses(model, tokens[some], HOOK, new[some]).mean():.1f}")

# %% [markdown]
# The one direction keeps 99.7 % of the variance and nothing of the text: the model predicts as badly as if it had
# seen no words at all. So *whose* variance is it?
#
# ## 4. Attention sinks
#
# Here is part of one row, each token coloured by the norm of its vector.

# %%
norms = everything.norm(dim=-1)
pieces = [model.tokenizer.decode([int(token)]) for token in tokens[12, :60]]
print(f"first token {norms[12, 0]:,.0f}, median of all tokens {norms.median():.0f}")
HTML(highlight(pieces, norms[12, :60].tolist()))

# %% [markdown]
# *Text: Wikipedia, CC BY-SA 4.0; see `NOTICE`.*
#
# Two tokens are coloured, and neither is a word: the BOS token, which this model writes `<|im_start|>`, and the
# separator between two articles, `<|endoftext|>`. The rest is so small beside them that it stays white. (Hover over a
# token to read its norm.)
#
# ### Exercise 1.4: find the sinks
#
# > Difficulty: ●○○○○ 1/5 · Importance: ●●●●○ 4/5 · about 5 minutes · core
# > You will write the mask that every SAE of this course is trained under.
#
# Mark every token whose norm exceeds `factor` times the median norm of all the tokens given.
#
# **Predict first.** Why the median, and not the mean?


# %%
def sinks(norms: Float[Tensor, "rows pos"], factor: float = 10.0) -> Bool[Tensor, "rows pos"]:
    """True where a norm exceeds `factor` times the median of all norms."""
    ### BEGIN SOLUTION
    return norms > factor * norms.median()
    ### END SOLUTION


# %%
check.find_sinks(sinks)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# A comparison of a tensor with a number gives a tensor of truth values.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# `norms.median()` without `dim` is the median of everything.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `norms > factor * ...`
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 1.4: passed (sinks in many places, none, factor 16).` and how many you have.
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** Half of the tokens would have to be sinks before the median moved much; the mean is pulled up by the
# very tokens that you look for. **Usual mistakes**: the mean; a median for each row; marking position 0 only, when
# sinks stand elsewhere too; returning the norms instead of a mask.

# %%
store = heldout_slice(model)  # activations under the mask of the shipped SAEs, with its limit
large = norms > store.norm_limit
print(f"the limit is {store.norm_limit:,.0f}: {int(large.sum())} of {large.numel():,} tokens are above it")
for r, p in large.nonzero().tolist():
    if p > 0:
        print(f"row {r:>2}, position {p:>2}: {model.tokenizer.decode([int(tokens[r, p])])!r}, norm {norms[r, p]:,.0f}")

with torch.no_grad():
    _, cache = model.run_with_cache(tokens[12:13], names_filter=lambda name: name.endswith("hook_resid_post"))
by_layer = torch.stack([cache[f"blocks.{i}.hook_resid_post"][0].norm(dim=-1) for i in range(model.cfg.n_layers)])
squares = everything[0, 0].square()
print(f"of the squared norm of BOS, {squares.max() / squares.sum():.1%} is in coordinate {int(squares.argmax())}")

# %%
figure, (left, right) = picture(
    "Norms by layer, for BOS, separator and median token; and norms after block 15.", columns=2
)
styles = {"BOS": ("-", "batchtopk"), "separator": ("--", "jumprelu"), "median": ("-", "topk")}
lines = {"BOS": by_layer[:, 0], "separator": by_layer[:, 37], "median": by_layer.median(dim=1).values}
for name, values in lines.items():
    left.plot(values, styles[name][0], color=COLOURS[styles[name][1]], label=name)
left.axvline(LAYER, color="#888888", linestyle=":", linewidth=1)
left.set(xlabel="after block", ylabel="norm", yscale="log", title="Sinks appear in block 11")
left.legend(frameon=False, fontsize=8)
right.plot(norms.flatten().sort(descending=True).values, ".", color=COLOURS["topk"], ms=4)
right.axhline(store.norm_limit, color=COLOURS["batchtopk"], linestyle="--", linewidth=1)
right.text(2000, store.norm_limit * 1.15, "limit of the mask", ha="right", color=COLOURS["batchtopk"], fontsize=8)
right.set(xlabel="token, sorted by norm", ylabel="norm", yscale="log", title="After block 15: two kinds of token")
figure

# %% [markdown]
# There is a gap, not a tail: ordinary tokens differ by a factor of two or so, and sinks are 10 to 150 times longer;
# in BOS nearly all of it is a single coordinate. First tokens on which attention rests whatever they mean are known
# as *attention sinks* (Xiao et al. 2023, arXiv 2309.17453), and such coordinates as *massive activations* (Sun et al.
# 2024, arXiv 2402.17762). The two tend to come together; what the attention does with them is not measured here.
#
# A word can be a sink too now and then: `'bytes'`, the first token after BOS in its row, lies just above the limit.
# In the figure on the left the great jump is in block 11; but BOS stands apart before that, at about 800 after blocks
# 2 to 7, where the median token has about 100.
#
# So they are no rubbish, and the model needs them. Replace them by the mean of the ordinary tokens, and see.

# %%
ordinary = everything[~large]
gone = torch.where(large[..., None], ordinary.mean(dim=0), everything)
print(f"CE with the sinks replaced: {token_losses(model, tokens[some], HOOK, gone[some]).mean():.1f}")
print(
    f"share of the squared norm of all tokens that sinks hold: {norms[large].square().sum() / norms.square().sum():.1%}"
)

# %% [markdown]
# These numbers, like those of the puzzle, are of two rows. Over four groups of rows the means are: CE 2.6 clean, 8.2
# with one direction for every token (the puzzle), 8.1 when every ordinary token is replaced by their mean and the
# sinks stay, and 3.5 when only the sinks are replaced, as here (`benchmarks/results/lessons/nb01.json`).
#
# > **Why drop them, then?** Squared error counts a vector by its squared length: nearly all of the loss of an SAE
# > would come from one token in a hundred, always with the same vector in it. The SAE would learn that vector, show a
# > splendid FVU, and have no reason to learn anything else.
#
# The rule of this course, the same in training, FVU and splicing: special tokens and tokens above 10 times the median
# are left out, and when we splice they keep their own activations. Others do alike: Gemma Scope leaves out BOS, EOS
# and padding (arXiv 2408.05147). The BatchTopK paper kept BOS: it is the peak at the far left of its Figure 3 (§4).
#
# ### Exercise 1.5: what one direction explains now
#
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●○○ 3/5 · about 2 minutes · core
# > You will guess before you look.
#
# With the sinks gone, how much of the variance does the best single direction explain? **a** still more than 90 % ·
# **b** about a half · **c** about a tenth · **d** about one in a thousand.

# %%
### BEGIN SOLUTION
#: answer = ...
answer = "c"
### END SOLUTION

# %%
check.one_direction(answer)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# If all 576 directions were alike, what would each explain?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Text has many independent properties, so no one of them has half. But some are common: where does the sentence
# stand, is this code?
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# Compute it: `explained(everything[~large], 1)`.
# </details>

# %% [markdown] tags=["solution"]
# **c.** Directions of text are not all alike (that would be 0.17 % each), and no single one rules. **Usual mistake**:
# trusting a share of variance without asking which tokens the variance belongs to.

# %%
# about 40 seconds on two cores
x = store[:]  # 16,384 held-out activations
sae = load_pretrained("batchtopk").requires_grad_(False)
codes = sae.encode(x)
counts = [1, 2, 4, 8, 16, 32, 64, 128, 256, 576]
shares = [check.share_explained(x, n) for n in counts]
l0, left_over = float((codes > 0).sum(dim=1).float().mean()), fvu(x, sae.decode(codes))
print(f"one direction {shares[0]:.1%}, 32 directions {shares[5]:.1%} of the variance")
print(f"BatchTopK SAE: L0 {l0:.1f}, explains {1 - left_over:.1%}")

# %%
figure, (axis,) = picture(
    "Share of variance explained by n principal directions, and by an SAE at the same number.", width=6
)
axis.plot(counts, shares, "o-", color=COLOURS["pca"], label="the n best directions, the same for all tokens")
axis.plot(
    l0, 1 - left_over, "^", color=COLOURS["batchtopk"], ms=11, label="SAE: n of 2304 latents, chosen for each token"
)
axis.axhline(share, color=COLOURS["topk"], linestyle=":", label="one direction, sinks included")
axis.set(xscale="log", xlabel="numbers per token", ylabel="share of variance explained", ylim=(0, 1.05))
axis.set_title("Without sinks, no few directions will do")
axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.05))
figure

# %% [markdown]
# Thirty-two directions explain a half. The SAE explains far more with as many numbers per token, because it may
# choose *other* latents for each. (It also has to say which it chose; comparisons come in 07.) That such a dictionary
# exists at all is the next surprise: 2304 latents, in a space that has room for 576 independent directions.
#
# ## 5. Why neurons are not features
#
# > **Why?** If the model gave each feature an axis of its own, we could read the axes and would need no SAE. It has
# > far more features than axes. When does it pay to squeeze them in?
#
# A toy, after *Toy Models of Superposition* (Elhage et al. 2022, arXiv 2209.10652). There are five features; each is
# on with probability p, and then has a value between 0 and 1. They must pass through **two** numbers and be read
# again:
#
# $$h = f W, \qquad \hat f = \mathrm{relu}(h W^T + b), \qquad \text{loss} = |f - \hat f|^2$$
#
# Row i of `W` (5 × 2) is the direction in which feature i is written.
#
# ### Exercise 1.6: five features, two dimensions
#
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●○○ 3/5 · about 3 minutes · bonus
# > You will see when a model shares its space.
#
# A feature counts as **kept** if its row of `W` is longer than 0.7: a row of length 0 writes nothing, and one of
# length 1 writes the feature in full.
#
# We train three toys, with p = 1 (all features always on), p = 0.3 and p = 0.1. About how many features will each
# keep, in this order? **a** 2, 2, 2: there are two dimensions · **b** 5, 4, 2 · **c** 2, 4, 5 · **d** 5, 5, 5.

# %%
### BEGIN SOLUTION
#: answer = ...
answer = "c"
### END SOLUTION

# %%
check.crowd(answer)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Two features in nearby directions disturb each other only when both are on.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# How often are two given features on at the same time, for p = 1 and for p = 0.1?
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# At p = 0.1 in one case of a hundred: sharing costs little, leaving a feature out costs all of it.
# </details>

# %% [markdown] tags=["solution"]
# **c.** With p = 1 sharing always hurts; with p = 0.1 two given features meet in one sample of a hundred, and the
# ReLU with its negative bias cuts off what little of one is heard in another. **Usual mistake**: counting dimensions.
# Linear algebra allows two *independent* directions in a plane; it does not forbid five that are nearly enough apart.


# %% tags=["nbval-ignore-output"]
def train_toys(chances: list[float], copies: int = 6, steps: int = 600) -> tuple[Tensor, Tensor]:
    """For each chance, the best of a few toys trained side by side: their W (toys, 5, 2), and their losses."""
    order = torch.Generator().manual_seed(0)
    p = torch.tensor(chances).repeat_interleave(copies)[:, None, None]
    W = (0.5 * torch.randn(len(p), 5, 2, generator=order)).requires_grad_()
    b = torch.zeros(len(p), 1, 5, requires_grad=True)
    adam = torch.optim.Adam([W, b], lr=0.02)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        drawn = torch.rand(2, len(p), 512, 5, generator=order)
        f = drawn[0] * (drawn[1] < p)
        losses = (f - (f @ W @ W.mT + b).relu()).square().sum(dim=-1).mean(dim=-1)
        adam.zero_grad()
        losses.sum().backward()
        adam.step()
    best = losses.view(-1, copies).argmin(dim=1) + copies * torch.arange(len(chances))
    return W.detach()[best], losses.detach()[best]


chances = [1.0, 0.3, 0.1]  # about 20 seconds on two cores
toys, toy_losses = train_toys(chances)
kept = (toys.norm(dim=-1) > 0.7).sum(dim=-1).tolist()
print("features kept:", dict(zip(chances, kept, strict=True)))

# %%
assert kept[0] <= 3
assert kept[1:] == [4, 5]
figure, axes = picture(
    "Directions of five features in two dimensions, for three probabilities.", columns=3, width=3.1, height=3.3
)
for axis, W, p, n in zip(axes, toys, chances, kept, strict=True):
    for i, arrow in enumerate(W):
        colour = list(COLOURS.values())[i]
        axis.annotate("", arrow.tolist(), (0, 0), arrowprops={"arrowstyle": "-|>", "lw": 2.2, "color": colour})
        axis.plot(*arrow.tolist(), "o", color=colour, ms=5)
    axis.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", title=f"on with p = {p:g}: {n} kept")
    axis.set(xlabel="first number")
axes[0].set_ylabel("second number")
figure

# %% [markdown]
# On the right is the pentagon: five features in two dimensions, each 72° from its neighbours. Now look at it with the
# eyes of somebody who studies *neurons*, that is, the two axes. Each axis answers to nearly all five features, and no
# axis is one of them. The features are there, as directions; the axes are the wrong place to look for them. (All five
# seeds end with four kept at p = 0.3 and five at p = 0.1, and one or two at p = 1; `nb01.json`.)
#
# At p = 1 only "about two" is meant. All five features are then equally important, and a plane through their space
# may be turned freely at hardly any cost: the squared lengths of the rows add up to about two, but may be spread over
# more rows than two, so how many exceed 0.7 is chance.
#
# An SAE is the attempt to find those directions from the vectors alone, relying on what made the pentagon possible:
# only a few features are on at a time. Whether real models keep their features so is a hypothesis, and SAEs are one
# way to probe it.
#
# ## 6. A store that really shuffles
#
# Neighbouring tokens come from the same text, and texts of one kind often come in long runs: all of Wikipedia, then
# all of the code. An SAE trained in that order sees one subject at a time. A BatchTopK SAE is hit twice, since its
# batch also shares one budget.
#
# > **Why measure it?** "Shuffled" is a claim about the data, and it fails without a sound: a buffer shorter than the
# > run of one kind of text mixes too little, and a shuffle of the wrong things mixes nothing. So we want a number that
# > is 1 for well mixed batches.
#
# The mean of n *independent* vectors varies n times less than they do. So with $m_b$ the mean of batch b and $m$ the
# overall mean,
#
# $$\text{clumping} = n \cdot \frac{\text{mean over batches of } |m_b - m|^2}{\text{mean over tokens of } |x - m|^2}$$
#
# is about 1 if the batches were drawn at random, and n if every batch holds n copies of one vector.
#
# ### Exercise 1.7: how mixed is a batch?
#
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●○ 4/5 · about 8 minutes · core
# > You will build an instrument that hears what a loss curve does not tell.


# %%
def clumping(batches: list[Float[Tensor, "n d_in"]]) -> float:
    """n times the mean |m_b - m|^2 of the batches, over the mean |x - m|^2 of the tokens. All batches have n tokens."""
    ### BEGIN SOLUTION
    x = torch.cat(batches)
    means = torch.stack([batch.mean(dim=0) for batch in batches])
    between = (means - x.mean(dim=0)).square().sum(dim=1).mean()
    each = (x - x.mean(dim=0)).square().sum(dim=1).mean()
    return float(len(batches[0]) * between / each)
    ### END SOLUTION


# %%
check.mixed(clumping)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Three steps: the mean of each batch, the mean of everything, two averages of squared distances.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# `torch.cat(batches)` gives all tokens, `torch.stack([batch.mean(dim=0) for batch in batches])` the batch means.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `between = (means - x.mean(dim=0)).square().sum(dim=1).mean()`, the same with `x` for the tokens, and a factor n.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 1.7: passed (clumps, mixed, one batch).` and how many you have.
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** It is the ratio that an analysis of variance looks at. Squared distances are summed over the 576
# coordinates before anything is divided, so coordinates count by how much they vary. **Usual mistakes**: the factor
# n; distances from 0 instead of the mean; comparing with the spread *inside* batches, which shrinks as the clumps
# grow.

# %% [markdown]
# ### Exercise 1.8: which store does not shuffle?
#
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●●○ 4/5 · about 6 minutes · core
# > You will find a bug that raises no error.
#
# Below, the slice is put in the order of the worst case: one kind of text after the other. Three stores draw batches
# from it. One of them moves no token to another batch: its batches hold what they would hold with no shuffling at all,
# `run.split(256)`. Which? Read the code, or call `clumping(list(stores["a"]()))` and so on, and compare with
# `clumping(list(run.split(256)))`.

# %%
row_of = torch.tensor([store.place(i)[0] for i in range(len(store))])
new_row = torch.cat([torch.tensor([True]), row_of[1:] != row_of[:-1]])
source_of = [store.context(int(i)).source for i in new_row.nonzero()]
kinds = sorted(set(source_of))
kind = torch.tensor([kinds.index(source) for source in source_of])[new_row.cumsum(dim=0) - 1]
run = x[kind.argsort(stable=True)]  # one kind of text after the other
BATCH = 256


def store_a():
    for buffer in run.split(2048):
        yield from buffer[torch.randperm(len(buffer))].split(BATCH)


def store_b():
    for number in torch.randperm(len(run) // BATCH):
        yield run[number * BATCH : (number + 1) * BATCH]


def store_c():
    yield from run[torch.randperm(len(run))].split(BATCH)


stores = {"a": store_a, "b": store_b, "c": store_c}
print("tokens:", {name: int((kind == i).sum()) for i, name in enumerate(kinds)})

# %%
### BEGIN SOLUTION
#: answer = ...
answer = "b"
### END SOLUTION

# %%
check.which_store(answer)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# In each store, ask what changes places with what.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# One of them permutes numbers of batches, not of tokens.
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# Clumping of the three is about 9, 14 and 1.
# </details>

# %% [markdown] tags=["solution"]
# **b.** It draws the *order* of the batches at random; each batch is still one stretch of the run. Store a is better
# and not good: a buffer of 2,048 tokens mixes what is in it, and cannot mix what is further apart. **Usual
# mistake**: judging a shuffle by its call to `randperm`.

# %% tags=["nbval-ignore-output"]
_ = torch.manual_seed(0)
measured = {name: check.clumping_of(list(make())) for name, make in stores.items()}
measured["no shuffling"] = check.clumping_of(list(run.split(BATCH)))
measured["rows as packed"] = check.clumping_of(list(x.split(BATCH)))
print({name: round(value, 1) for name, value in measured.items()})

# %% [markdown]
# Store b gives exactly the number of no shuffling. Store a does move tokens from batch to batch, and is still at about
# 9: a batch is drawn at random from its buffer, but each of the eight buffers holds only one or two kinds of text and
# few documents. The buffers differ, and no shuffling inside them can make them alike; that alone is 8.0 of it
# (`clumping(list(run.split(2048))) / 8`). So a short buffer mixes less than one expects.
#
# A cut by batch feels how its batch is mixed. Here is the smallest entry that the shipped SAE keeps in each batch, for
# three orders of the same activations.

# %%
# about 20 seconds on two cores
assert measured["c"] < 1.1 < 3 < measured["a"]
assert max(12, measured["a"]) < measured["b"] < 16
orders = {"one kind after the other": run, "rows of mixed documents": x, "shuffled": torch.cat(list(store_c()))}
lowest = {}
for name, ordered in orders.items():
    kept_entries = [sae.encode(batch, "batch") for batch in ordered.split(BATCH)]
    lowest[name] = [float(codes[codes > 0].min()) for codes in kept_entries]
    print(f"{name:<25}smallest entry kept: varies by {torch.tensor(lowest[name]).std():.2f} (standard deviation)")

# %%
figure, (axis,) = picture("The smallest entry kept in each batch, for three orders of the same activations.", width=7.5)
for (name, values), key in zip(lowest.items(), ("batchtopk", "vanilla", "topk"), strict=True):
    axis.plot(values, color=COLOURS[key], label=name, linewidth=1.6)
axis.set(
    xlabel="batch of 256 tokens",
    ylabel="smallest entry kept",
    title="What one batch lets through depends on its company",
)
axis.legend(frameon=False, fontsize=8)
figure

# %% [markdown]
# All three lines are the same 16,384 activations and the same SAE, at L0 = 32 in every batch. In mixed batches the
# smallest entry kept hardly moves between batches; where one kind of text fills a batch it swings, because a rich text
# crowds its own tokens and a poor one lets anything through. Remember this number: its average will be the threshold θ
# in 06. (The kinds come in the order code, documentation, Wikipedia here; in the trainings of the table below
# Wikipedia comes first.)
#
# Does training feel it? Three BatchTopK SAEs that saw the same 102,400 activations once each, in three orders, at
# L0 = 32 on held-out text (`benchmarks/results/lessons/nb01.json`, three seeds):
#
# | order | FVU, all text | FVU, Wikipedia |
# |---|---|---|
# | one kind after the other (Wikipedia first) | .311 to .317 | .424 to .432 |
# | rows as packed (documents mixed, rows whole) | .270 to .271 | .336 to .337 |
# | shuffled | .246 to .271 | .308 to .345 |
#
# A long run of one kind is plainly bad, and what was seen first is forgotten most. Rows of mixed documents are a mild
# case: their error lies within the scatter of the shuffled runs. That scatter between seeds is wide in so short a
# training, so this table does not say that whole rows hurt. How mixed your text already is decides how much your
# shuffle has to do.
#
# ## 7. One mean, one scale
#
# > **Why?** θ, an L1 coefficient, the bandwidth of JumpReLU and a learning rate are all numbers in the units of `x`.
# > Streams of different models and layers differ in scale a hundredfold (look at the median line in the figure
# > above). If every SAE sees vectors of one standard size, its numbers can be compared and reused.
#
# The course's choice, `normalize="dataset"`: subtract the mean of the data, divide by **one** number, so that
# $E|x|^2 = d_{in}$, that is, 1 per coordinate on average.
#
# ### Exercise 1.9: one mean, one scale
#
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 8 minutes · core
# > You will write what stands at the entrance of every SAE here.


# %%
def fit(x: Float[Tensor, "tokens d_in"]) -> tuple[Float[Tensor, " d_in"], float]:
    """(mean, scale) such that (x - mean) / scale has mean 0 and a mean squared norm of d_in."""
    ### BEGIN SOLUTION
    mean = x.mean(dim=0)
    scale = ((x - mean).square().sum(dim=1).mean() / x.shape[1]).sqrt()
    return mean, float(scale)
    ### END SOLUTION


# %%
check.normalisation(fit)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Write down $E|(x - mean) / scale|^2 = d_{in}$ and solve for the scale.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# The squared norm is a sum over dimension 1; its mean is over tokens; then divide by d_in and take the root.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `scale = ((x - mean).square().sum(dim=1).mean() / x.shape[1]).sqrt()`
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 1.9: passed (values).` and how many you have.
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** The norm is measured after the mean is off, because that is what the SAE gets to see. **Usual
# mistakes**: forgetting the root; a scale for each coordinate, which would change angles and so which directions look
# important; E|x|² = 1 instead of d_in, which is the subject of the next section.

# %%
normal = (x - sae.norm_mean) / sae.norm_scale
per_number = normal.square().sum(dim=1).mean() / 576
print(f"the SAE divides by {float(sae.norm_scale):.2f}; after that, E|x|^2 / d_in = {per_number:.2f}")
print(f"length of the mean: {float(sae.norm_mean.norm()):.0f}, of a median token: {x.norm(dim=1).median():.0f}")

# %% [markdown]
# Note the second line: most of a token's length is the mean, which is the same for all tokens and says nothing about
# any.
#
# ## 8. The scale trap
#
# "Unit mean squared norm" is written in papers, and read in two ways: E|x|² = 1, or 1 per coordinate, E|x|² = d_in.
# They differ by √576 = 24. Gemma Scope sets its bandwidth and first thresholds (0.001, §3.2) in its units; copy them
# into the others and they mean something else. No shape is wrong and no error is raised. Break it: give the shipped
# SAE a scale that is off by a factor.

# %%
some_x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:4096]]
factors, right_scale = [1 / 24, 1 / 4, 1 / 2, 1 / 1.25, 1, 1.25, 2, 4, 24], float(sae.norm_scale)
trap = []
for factor in factors:
    sae.norm_scale.fill_(right_scale * factor)
    codes = sae.encode(some_x)
    trap.append((float((codes > 0).sum(dim=1).float().mean()), fvu(some_x, sae.decode(codes))))
    print(f"scale x {factor:<8.3g}L0 {trap[-1][0]:>7.1f}   FVU {trap[-1][1]:.2f}")
_ = sae.norm_scale.fill_(right_scale)

# %%
figure, (left, right) = picture("L0 and FVU of an SAE whose normalisation is off by a factor.", columns=2)
for axis, values, label in (
    (left, [t[0] for t in trap], "L0 (latents per token)"),
    (right, [t[1] for t in trap], "FVU"),
):
    axis.plot(factors, values, "o-", color=COLOURS["batchtopk"])
    axis.axvline(1, color="#888888", linestyle=":", linewidth=1)
    axis.set(xscale="log", xlabel="scale used / right scale", ylabel=label)
    axis.set_xticks([1 / 24, 1 / 4, 1, 4, 24], ["1/24", "1/4", "1", "4", "24"])
left.set(title="Too small a scale: too much passes θ", yscale="symlog", ylim=(-0.2, 3000))
right.set(title="Either way the error explodes", yscale="log")
figure

# %% [markdown]
# ### Exercise 1.10: the same SAE in other units
#
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●●○ 4/5 · about 10 minutes · core
# > You broke it; now mend it: what must change with the units, and by how much?
#
# Somebody hands you activations in new units: `x_new = x / c`. The weight matrices stay. How must `b_enc`, `b_dec`, θ
# and the L1 coefficient `l1` change so that the same latents are kept, `x_hat_new = x_hat / c`, and the two terms of
# the loss `|x - x_hat|^2 + l1 * sum(z)` keep their balance?


# %%
def in_other_units(
    b_enc: Float[Tensor, " d_sae"], b_dec: Float[Tensor, " d_in"], theta: float, l1: float, c: float
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_in"], float, float]:
    """(b_enc, b_dec, theta, l1) for activations x / c; W_enc and W_dec stay as they are."""
    ### BEGIN SOLUTION
    return b_enc / c, b_dec / c, theta / c, l1 / c
    ### END SOLUTION


# %%
check.units(in_other_units)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Write `z = (x - b_dec) @ W_enc + b_enc` with `x / c` in place of `x`. What makes the whole of it `z / c`?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Three of the four are compared with, or added to, things that were divided by c. For `l1`, ask how each term of the
# loss changes.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# The squared error falls by c², the sum of `z` by c. The factor that `l1` needs makes both fall alike.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 1.10: passed (c = 2, c = 0.5, c = 24).` and how many you have.
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** Everything with the units of `x` is divided by c: `b_dec`, and through `W_enc` also `z`, `b_enc` and θ.
# The squared error is divided by c², the sum of `z` by c, so `l1 / c` leaves a loss that is c² times smaller and
# otherwise the same. A bandwidth goes with θ. **Usual mistakes**: leaving θ; `l1 / c**2`; multiplying.

# %% [markdown]
# ## 9. Three dimensions to two
#
# Models speak (batch, pos, d), SAEs (tokens, d). In between stands one line, and it can go wrong in ways that keep
# every shape intact. `einops` makes you say what you mean:
#
# ```python
# rows = rearrange(x, "batch pos d -> (batch pos) d")
# ```
#
# ### Exercise 1.11: three dimensions to two, and back
#
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 8 minutes · core
# > You will let any function of rows work on a batch of texts.
#
# `f` takes (tokens, d) and gives (tokens, e), where e may be another width, as an encoder's is. Apply it to all
# tokens of `x` **at once**, in reading order, and give the result the shape (batch, pos, e).
#
# **Predict first.** Would it do to call `f` on each text by itself? For which cut not?


# %%
def on_rows(f, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos e"]:
    """f of all tokens at once, as rows in reading order; the result with its batch and pos dimensions back."""
    ### BEGIN SOLUTION
    rows = f(rearrange(x, "batch pos d -> (batch pos) d"))
    return rearrange(rows, "(batch pos) e -> batch pos e", batch=x.shape[0])
    ### END SOLUTION


# %%
check.three_to_two(on_rows)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Two `rearrange`s, with `f` in between. In the second, einops must be told one of the two lengths.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# `"batch pos d -> (batch pos) d"` there, `"(batch pos) e -> batch pos e"` back.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `rearrange(rows, "(batch pos) e -> batch pos e", batch=x.shape[0])`
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 1.11: passed (batch cut, another width).` and how many you have.
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** The last dimension is the one that is never split, so (batch pos) can be merged without moving a number.
# **Usual mistakes**: `x.reshape(d, -1).T`, which has the right shape and mixes tokens; moving d to the front first;
# giving `x` to `f` as it is, so that a batch cut takes the number of *texts* for the number of tokens; the order (pos
# batch).

# %% [markdown]
# What do the wrong ways look like? The shipped BatchTopK SAE, on 32 texts of 128 tokens: first as it should be, then
# with a batch cut that takes only dimension 0 for the batch (SAELens had this, and mended it in pull request 570),
# then with two reshapes that give the right shape.

# %%
texts = x[:4096].view(32, 128, 576)
rows = rearrange(texts, "batch pos d -> (batch pos) d")
z = sae.pre_activations(texts)  # (32, 128, 2304)
scrambled = texts.reshape(576, -1).T.contiguous()
moved = texts.permute(2, 0, 1).reshape(-1, 576)
tries = {
    "(batch pos) d": (rows, keep_batch(rearrange(z, "batch pos d -> (batch pos) d"), 32)),
    "cut over dimension 0 only": (texts, keep_batch(z, 32)),
    "reshape(d, -1).T, cut by batch": (scrambled, sae.encode(scrambled, "batch")),
    "reshape(d, -1).T, cut at θ": (scrambled, sae.encode(scrambled)),
    "d to the front, cut at θ": (moved, sae.encode(moved)),
}
for name, (given, codes) in tries.items():
    l0 = float((codes > 0).sum(dim=-1).float().mean())
    print(f"{name:<32}L0 {l0:>6.2f}   FVU {fvu(given.reshape(-1, 576), sae.decode(codes).reshape(-1, 576)):>5.2f}")

# %% [markdown]
# - **Over dimension 0 only**, the budget is 32 for each *text*, a quarter of a latent per token: L0 tells at once.
# - **Scrambled, cut by batch**, L0 is 32.0, exactly what you asked for. A budget is spent whatever it is spent on: L0
#   is no alarm here, and only the error tells.
# - **Scrambled, cut at θ**, L0 jumps: a threshold has no budget to hide behind.
#
# In this package, `sae(x)` and `sae.encode(x)` take any leading dimensions and count all of them as the batch.

# %%
progress()

# %% [markdown]
# ## Summary
#
# - Activations are the residual stream, read by a hook. By hand and by TransformerLens they are equal, bit for bit.
# - `stop_at_layer=L` runs blocks 0 to L − 1: for `blocks.L.hook_resid_post` give L + 1.
# - A few sinks hold nearly all the variance. Mask them, in training and in every number you report; leave them to the
#   model.
# - Features outnumber dimensions, and rare ones can share: directions, not neurons.
# - Measure your shuffle. One kind of text after the other makes batches that swing, and a worse SAE.
# - Normalise to E|x|² = d_in; θ, `l1`, biases and bandwidths carry units.
# - Flatten with names. L0 catches some wrong reshapes, the error catches the rest.
#
# **Quiz**
#
# 1. A colleague reports an FVU of 0.01 with one latent per token. What do you ask first?
#
# <details><summary>Answer</summary>
#
# Whether BOS and other sinks were included. One direction explains more than 99 % of the variance then, and predicts
# nothing.
# </details>
#
# 2. An SAE from the hub gives L0 = 250 on your activations; its card says 32. Name two causes from this notebook.
#
# <details><summary>Answer</summary>
#
# The scale: half of the right one gives such an L0. Or scrambled vectors from a wrong reshape. (The wrong layer would
# be a third.)
# </details>
#
# 3. Your batches have a clumping of 9 at n = 256. Is that much?
#
# <details><summary>Answer</summary>
#
# Yes. Batch means vary nine times as much as they would by chance: a batch of 256 knows as much about the data as
# some 28 independent tokens would.
# </details>
#
# > **Where this goes wrong in practice**
# >
# > - An SAE used at the wrong hook: `resid_pre` of block 16 equals `resid_post` of block 15, but `resid_pre` of 15
# >   does not.
# > - Weights folded or centred by one library and raw in another: the stream is another one, and nothing says so.
# > - FVU quoted with BOS by one paper and without by the next: not comparable.
# > - A streaming buffer shorter than a run of one kind of text: mixed a little, and far from shuffled.
# > - θ or a penalty copied from a paper with other units.
# > - Padding tokens kept as data. (Rows here are packed, so there are none.)
#
# **Of the BatchTopK paper** (arXiv 2412.06410) this covered the set-up: which activations, of which layer, in
# sequences of at most 128 tokens (§4 and Appendix A.1), and the BOS token in Figure 3 (§4). How inputs are normalised
# the paper does not say; the authors' code standardises each token.
#
# **Next, 02:** we have clean vectors, 576 numbers per token. Can thirty lines of PyTorch find the directions that
# they are made of, when all we ask is that few be used at a time?
