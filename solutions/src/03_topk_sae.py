# %% [markdown]
# # 03 TopK: what if we just said how many?
#
# In the last notebook a penalty made latents few, and how few was found by trying. Here you say the number.
#
# **You will be able to**
#
# - write TopK, ties included, and say what it costs that every token spends the same;
# - turn k after training, and say what the entries beyond the k of training are worth;
# - write AuxK, and show by gradients that it touches dead latents only;
# - tell two kinds of dead latent apart, and say which of them AuxK can bring back.
#
# **You need** notebooks 01 and 02, or: PyTorch, and the idea that an SAE rewrites an activation as a short list of
# latents.
#
# **Time** about two hours; the cells by themselves take under a minute on two free cores.

# %% tags=["setup"]
pass

# %%
import html
import json
from pathlib import Path

import ipywidgets as widgets
import torch
from IPython.display import HTML
from jaxtyping import Bool, Float
from torch import Tensor

from tutorial_sae import TopKSAE, TrainConfig, heldout_slice, load_model, load_pretrained, train
from tutorial_sae.checks import nb03 as check
from tutorial_sae.checks import progress
from tutorial_sae.latents import kind_of
from tutorial_sae.measures import fvu, refit
from tutorial_sae.plots import COLOURS, picture
from tutorial_sae.saes.base import keep_row
from tutorial_sae.widgets.highlight import highlight

# %% [markdown]
# | symbol | shape | what it is |
# |---|---|---|
# | `x` | tokens × `d_in` | activations: here 576 numbers for each token |
# | `z` | tokens × `d_sae` | pre-activations, `relu((x - b_dec) @ W_enc + b_enc)`: 2304 for each token |
# | `k` | | how many entries of `z` a token may keep |
# | `latents` | tokens × `d_sae` | `z` where it is kept, 0 elsewhere |
# | `x_hat` | tokens × `d_in` | the reconstruction, `latents @ W_dec + b_dec` |
# | L0 | | latents kept per token, on average |
# | FVU | | fraction of the variance of `x` that `x_hat` leaves unexplained |
#
# A *feature* is a property of the data, a *latent* a unit of the SAE.

# %%
model = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
store = heldout_slice(model)  # activations of text that no SAE here was trained on
x = store[:]
sae = load_pretrained("topk").requires_grad_(False)
print(f"{len(x):,} activations of width {x.shape[1]}; the SAE has {sae.d_sae} latents and keeps k = {sae.k} a token")

# %% [markdown]
# ## 1. A count instead of a price
#
# Here is the matrix `z` for one sentence, each row sorted: on the left a token's largest pre-activation. The dashed
# line is the whole method.

# %%
FIRST, LAST = 10_055, 10_095
pieces = [store.piece(i) for i in range(FIRST, LAST)]
passage = x[FIRST:LAST]
ranked = sae.pre_activations(passage).sort(dim=1, descending=True).values

figure, (axis,) = picture(
    "Pre-activations of a sentence: tokens as rows, sorted, largest left; a dashed line after the 32nd.", 1, 8.6, 6.6
)
shades = axis.imshow(ranked[:, :80].clamp(max=4), aspect="auto", cmap="Blues", interpolation="nearest")
axis.axvline(31.5, color="#D55E00", linestyle="--", linewidth=2)
axis.text(33, -1.1, "cut here: k = 32", color="#D55E00")
axis.set_yticks(range(len(pieces)), [repr(piece)[1:-1] for piece in pieces], fontsize=7, family="monospace")
axis.set(xlabel="rank of the pre-activation within its token", title="One sentence, its strongest latents first\n")
axis.grid(visible=False)
figure.colorbar(shades, label="z (normalised units; darkest: 4 and more)", shrink=0.7)
figure

# %% [markdown]
# Text: Wikipedia, CC BY-SA 4.0; see `NOTICE`.
#
# Look along the dashed line. To its right the rows go on, some of them for long. And the shade *at* the line differs
# from row to row: the same count is a different bar for each token.
#
# > **Why?** An L1 penalty does two jobs with one number: it makes latents few, and it makes their values small. The
# > second job nobody asked for: 02 called it shrinkage. If sparsity is what you want, then say how sparse, and take no
# > price.
#
# $$\texttt{latents} = \mathrm{TopK}(z, k) \qquad \mathcal{L} = \lVert x - \hat x\rVert^2$$
#
# Nothing else: the loss has no sparsity term (Gao et al. 2024, arXiv 2406.04093, section 2.3; Bussmann et al. 2024,
# arXiv 2412.06410, section 2). The cut is by *row*: an entry competes with the other entries of its token.

# %% [markdown]
# ### Exercise 3.1: k per token
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 15 minutes · core
# > You write the cut, with a rule for ties, so that the same input gives the same code on every machine.
#
# `z` has been through the ReLU, so nothing in it is negative. Keep the k largest entries of each row as they are. Where
# entries are equal and there is not room for all of them, **those with the lower index stay**. A row with fewer than k
# positive entries keeps what it has: zeros are not worth keeping, and nobody will see whether you did.
#
# **Predict first.** A row is `.5 .2 .5 .5` and k is 2. Which entries stay?


# %%
def topk(z: Float[Tensor, "tokens latents"], k: int) -> Float[Tensor, "tokens latents"]:
    """The k largest entries of each row, unchanged; the rest 0. Of equal entries the lower index stays."""
    ### BEGIN SOLUTION
    first = z.argsort(dim=-1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(z).scatter(-1, first, z.gather(-1, first))
    ### END SOLUTION


# %%
check.topk(topk)

# %% [markdown] tags=["solution"]
# **Why so.** A stable sort leaves equals in the order in which they came, so of equal entries the lower index comes
# first: the tie rule for nothing. `scatter` puts the values back where they were. The package sorts nothing, because
# that is slow: it finds the k-th largest value, keeps what is above, and fills the room that is left with the first
# that equal it.
#
# **Usual mistakes.** Comparing with the k-th largest: `>=` keeps too many where there is a tie, `>` drops the k-th
# itself. `torch.topk` alone is right except at ties, where it makes no promise which of them it gives. Cutting the
# whole matrix at once is the next notebook. Writing into `z` changes a tensor that somebody else may still need.

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# `torch.topk` promises nothing about ties. Which PyTorch function does?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Sort each row so that equals stay in their order; the first k positions of the sorted row are the ones to keep. Then
# put their values back where they came from.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `argsort(dim=-1, descending=True, stable=True)[:, :k]` gives the places; `gather` reads the values there, and
# `scatter` writes them into a matrix of zeros.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 3.1: passed (values, ties, fewer positives than k, one token, 96 latents, many ties).` and how many you
# have.
# </details>
#
# **What you just saw.** TopK is two lines. Is the tie rule pedantry? Count the tokens whose 32nd and 33rd largest are
# equal, in float32, and when the same numbers are rounded to bfloat16, the precision that models often run in:

# %%
z = sae.pre_activations(x[:4096])
for name, values in (("float32", z), ("bfloat16", z.bfloat16().float())):
    largest = values.topk(33, dim=1).values
    print(f"{name:<9}{(largest[:, 31] == largest[:, 32]).float().mean():.0%} of tokens have a tie at k = 32")

# %% [markdown]
# In low precision a tie is an everyday event, and without a rule two machines would give two codes for the same token.
#
# ## 2. L0 is what you asked for
#
# In 02 you turned a coefficient and watched where L0 went. Now:

# %%
code = sae.encode(x[:4096])
kept = (code > 0).sum(dim=1)
print(f"L0 {kept.float().mean():.1f}; fewest latents of a token {kept.min()}, most {kept.max()}")
print(f"FVU {fvu(x[:4096], sae.decode(code)):.3f}")

# %% [markdown]
# Not 32 on average: 32 for every single token. That is the promise of TopK, and its price.
#
# ## 3. The price: a comma as much as a surname
#
# ### Exercise 3.2: a comma as much as a surname
# > Difficulty: ●○○○○ 1/5 · Importance: ●●●●○ 4/5 · about 5 minutes · core
# > You predict who pays when all spend the same.
#
# The SAE spends 32 latents on each token. Sort the tokens into kinds: punctuation, digits, pieces that start a word
# (" oper"), pieces that go on with one ("atic", "otti"). On which of them is the squared error **largest**?
#
# - **a** punctuation
# - **b** digits
# - **c** pieces that start a word
# - **d** pieces that continue a word

# %%
### BEGIN SOLUTION
#: answer = ...
answer = "d"
### END SOLUTION

# %%
check.who_pays(answer)

# %% [markdown] tags=["solution"]
# **Why so.** By its second or third piece a word has been recognised: the activation carries what the word is, what is
# known of it, and how it is spelled, and that takes many latents. A comma carries little besides being a comma. With
# one count for all, the error goes where the need is.
#
# **Usual mistake.** Thinking that equal L0 means equal error. L0 is what is spent, not what is needed.

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Which tokens have most to say that their neighbours do not say?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# "P" could begin anything. After " Pav", "ar" and "otti" the model knows who is meant.
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# It is one of the two kinds of piece that words are made of, and the one that comes later.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 3.2: passed (the later pieces of words, names above all; see the figure below).`
# </details>

# %%
part = x[:4096]
kinds = [kind_of(store.piece(i)) for i in range(len(part))]
variance = (part - part.mean(dim=0)).square().sum(dim=1).mean()
error = (part - sae(part)).square().sum(dim=1) / variance  # its mean is the FVU
names = ["space", "punctuation", "digits", "word start", "word continuation"]
by_kind = [error[[kind == name for kind in kinds]].mean().item() for name in names]

figure, (axis,) = picture("Mean squared error of each kind of token, bars; word continuations highest.", 1, 7.5, 3)
axis.barh(names, by_kind, color=COLOURS["topk"])
axis.axvline(error.mean(), color="#444444", linestyle=":", label=f"all tokens: {error.mean():.3f}")
axis.set(xlabel="squared error, in units of the mean variance (32 latents a token)", title="Equal L0, unequal error")
axis.margins(x=0.28)
axis.legend(frameon=False, loc="lower right")
figure

# %% tags=["nbval-ignore-output"]
mine = (passage - sae(passage)).square().sum(dim=1) / variance
assert 0.05 < mine.mean() < 0.4
HTML(highlight(pieces, mine.tolist(), top=0.5))

# %% [markdown]
# The darker, the larger the error of that token (point at it for the number). Text: Wikipedia, CC BY-SA 4.0; see
# `NOTICE`.
#
# **What you just saw.** Everyone gets 32, and the error of a word's later pieces is more than twice that of a space or
# a newline. If you could take latents from the commas and give them to the names, you would gain. Keep that thought:
# it is notebook 04.
#
# ## 4. k after training
#
# Nothing forces you to use the k of training. The weights are what they are, and k is a knob of the encoder.
#
# ### Exercise 3.3: k after training
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●○ 4/5 · about 15 minutes · core
# > You measure an SAE at a k that it was not trained with, and leave it as you found it.
#
# Give the FVU of `x` and the L0 **that comes out** (counted, not assumed) when `sae` keeps `k` latents a token. Your
# function must leave `sae.k` as it was.
#
# **Predict first.** This SAE learned with k = 32. As k goes from 32 to 2304, does its FVU (1) fall all the way, (2)
# fall and then stay, or (3) fall and rise again? And what will L0 be at k = 2304?


# %%
def error_at(sae: TopKSAE, x: Float[Tensor, "tokens d_in"], k: int) -> tuple[float, float]:
    """(FVU, L0) of `x` when `sae` keeps k latents a token; `sae.k` is afterwards what it was before."""
    ### BEGIN SOLUTION
    before, sae.k = sae.k, k
    latents = sae.encode(x)
    sae.k = before
    return fvu(x, sae.decode(latents)), (latents > 0).sum().item() / len(x)
    ### END SOLUTION


# %%
check.error_at(error_at)

# %% [markdown] tags=["solution"]
# **Why so.** `sae.k` is all that the cut looks at, so setting it is enough. Putting it back is part of the job: an SAE
# that quietly works at another k in the next cell is a bug that no error message will tell you of. (In a library one
# would write `try: ... finally:`, so that it is put back even when something fails in between.)
#
# **Usual mistakes.** Reporting k as L0; dividing by the squared length of `x` instead of its variance, which flatters;
# and leaving `sae.k` changed.

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Two things are wanted from one and the same matrix of latents.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Remember `sae.k`, set it, `sae.encode(x)`, set it back. Decode for the FVU, count positive entries for L0.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `before, sae.k = sae.k, k`; then `latents = sae.encode(x)`; then `sae.k = before`; `fvu(x, sae.decode(latents))` and
# `(latents > 0).sum() / len(x)`.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 3.3: passed (k = 2, 4, 8, 40; fewer positives than k; the SAE left as it was).`
# </details>
#
# Now the sweep, once for all tokens and once for each kind:

# %%
some = x[:2048]
z = sae.pre_activations(some)
ks = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 2304]
spread = (some - some.mean(dim=0)).square().sum(dim=1).mean()
errors, spent = [], []
for k in ks:
    latents = keep_row(z, k)
    errors.append((some - sae.decode(latents)).square().sum(dim=1) / spread)
    spent.append((latents > 0).sum().item() / len(some))
curve = torch.stack(errors)  # (ks, tokens)
for k, l0, e in zip(ks, spent, curve.mean(dim=1).tolist(), strict=True):
    print(f"k = {k:<5} L0 {l0:6.1f}   FVU {e:.3f}")

# %%
shown = len(ks) - 1  # 2304 would be far off to the right, and no different
figure, (left, right) = picture(
    "FVU against k, for all tokens, with a close-up from 24 on, and for each kind; lowest near 64.", 2, 4.6, 3.6
)
left.plot(ks[:shown], curve.mean(dim=1)[:shown], "s-", color=COLOURS["topk"], label="all tokens")
left.axvline(32, color="#444444", linestyle=":", label="k of training")
left.set(xscale="log", xlabel="k at inference", ylabel="FVU", title="More latents, up to a point")
left.legend(frameon=False, loc="lower left")
close_up = left.inset_axes((0.52, 0.5, 0.46, 0.42))
close_up.plot(ks[ks.index(24) : shown], curve.mean(dim=1)[ks.index(24) : shown], "s-", color=COLOURS["topk"], ms=4)
close_up.set(xscale="log", title="from 24 on")
close_up.title.set_fontsize(9)
close_up.set_xticks([24, 32, 64, 128], ["24", "32", "64", "128"], fontsize=8)
close_up.tick_params(axis="y", labelsize=8)
close_up.minorticks_off()
close_up.grid(alpha=0.25)
colours = ["#CC79A7", "#E69F00", "#7f7f7f", "#009E73", "#D55E00"]
for name, colour, line in zip(names, colours, ["--", "-.", ":", "-", "-"], strict=True):
    of_kind = torch.tensor([kind == name for kind in kinds[: len(some)]])
    right.plot(ks[:shown], curve[:shown, of_kind].mean(dim=1), line, color=colour, label=name)
right.axhline(curve[ks.index(32)].mean(), color="#444444", linewidth=0.8)
right.set(xscale="log", xlabel="k at inference", ylabel="squared error / mean variance", title="Who needs how many")
right.legend(frameon=False, fontsize=8)
for axis in (left, right):
    axis.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], ["1", "2", "4", "8", "16", "32", "64", "128"])
    axis.minorticks_off()
figure

# %% [markdown]
# Three things to read off.
#
# - **k is a knob.** At half the latents the SAE still works; nothing breaks, it degrades.
# - **Beyond about 64 the error rises again**, although the SAE is allowed more. And k = 2304 is no special case: a
#   token has only about a hundred positive pre-activations, so L0 stops there. Fewer positives than k, in real life.
# - **On the right, follow the thin horizontal line**, the mean error at k = 32. Punctuation crosses it early, the
#   later pieces of words late or never: that is the price of section 3 as a count.
#
# ### A widget for it
#
# Move k with the arrow keys and watch the sentence. It takes about thirty lines, and has one rule worth copying: **all
# the work is in a pure function from settings to HTML; the callback only assigns.** So you can call it in a cell and
# see what it says, which is the only way to see an error: what a callback raises goes nowhere.


# %%
def page(k: int, show: str = "error") -> str:
    """What the widget shows for this k: one line of numbers, then the sentence with `show` on each token."""
    if k < 1:
        return "<p>k = 0 keeps nothing: every reconstruction is the same vector. Choose at least 1.</p>"
    if k > sae.d_sae:
        return f"<p>k = {k} asks for more latents than there are: choose at most {sae.d_sae}.</p>"
    latents = keep_row(sae.pre_activations(passage), k)
    error = (passage - sae.decode(latents)).square().sum(dim=1) / variance
    l0 = (latents > 0).sum(dim=1).float()
    values, top = (error, 0.5) if show == "error" else (l0, 150.0)
    numbers = f"k = {k}: L0 {l0.mean():.1f}, squared error {error.mean():.3f} of the mean variance"
    return f"<p>{html.escape(numbers)}</p>{highlight(pieces, values.tolist(), top=top)}"


choices = [0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 2304, 4000]
k_slider = widgets.SelectionSlider(options=choices, value=32, description="k")
show_box = widgets.Dropdown(options=["error", "L0"], description="show")
view = widgets.HTML(page(32))


def redraw(_change=None):
    view.value = page(k_slider.value, show_box.value)


k_slider.observe(redraw, "value")
show_box.observe(redraw, "value")

# %% tags=["nbval-ignore-output"]
widgets.VBox([widgets.HBox([k_slider, show_box]), view])

# %% [markdown]
# Text: Wikipedia, CC BY-SA 4.0; see `NOTICE`. The figure above shows the same for all tokens, if no widget appears
# here. And the callback, called by hand:

# %%
k_slider.value = 8
assert "k = 8: L0 8.0" in view.value
k_slider.value, show_box.value = 32, "L0"
assert "L0 32.0" in view.value
show_box.value = "error"
print(page(0))
print(page(4000))

# %% [markdown]
# Switch to "L0" and go up to 256: the colours stop being equal only when tokens run out of positive entries.
#
# ## 5. Values or choice, again
#
# In 02 the question to the vanilla SAE was: is the error in *which* latents it keeps or in the *values* it gives them?
# Refitting the values on the same latents took off much of it. Ask TopK the same:

# %%
few = x[:512]
for k in (32, 96):
    sae.k = k
    own, best = fvu(few, sae(few)), fvu(few, sae.decode(refit(sae, few)))
    print(f"k = {k}: FVU {own:.3f} with its own values, {best:.3f} with the best ones: {1 - best / own:.0%} less")
sae.k = 32

# %% [markdown]
# At k = 32, where it was trained, better values take off little: no penalty has shrunk them. At k = 96 they take off a
# lot, which explains the curve of section 4: entries below rank 32 were **never trained to be right**, since outside
# the cut no gradient reaches them. With the best values (least squares, on the latents as they were kept) more latents
# can only help; with their own, they first help and then add noise. (`benchmarks/results/lessons/nb03.json`, under
# `refit`, has four values of k on 1,024 tokens.)
#
# How can a choice be wrong at all, when TopK takes the *largest*? Because largest `z` is the encoder's opinion.
#
# ### Exercise 3.4: make TopK choose wrongly
# > Difficulty: ●●●○○ 3/5 · Importance: ●●○○○ 2/5 · about 10 minutes · bonus
# > You build the smallest SAE that keeps the worse of two latents.
#
# Two dimensions, two latents, k = 1, no biases. Choose `x` (2), `W_enc` (2 × 2, a column for each latent) and `W_dec`
# (2 × 2, a row of length 1 for each latent) so that the latent with the larger `z = x @ W_enc` leaves a clearly larger
# error than the other would have, even when each gets its best value.

# %%
### BEGIN SOLUTION
#: point, encoder, decoder = ..., ..., ...
point = torch.tensor([1.0, 0.1])  # nearly the first direction
encoder = torch.tensor([[0.1, 0.0], [0.0, 5.0]])  # but the second latent shouts
decoder = torch.eye(2)
### END SOLUTION

# %%
check.wrong_choice(point, encoder, decoder)

# %% [markdown] tags=["solution"]
# **Why so.** The value that reconstructs best with one unit row `w` alone is `w @ x`, and the error that remains is
# `|x|² - (w @ x)²`. TopK compares `z` instead, and `z` is `w @ x` only if the encoder is the decoder's transpose, as
# it is at the start of training. With k > 1 it is worse: rows that are not orthogonal explain some of the same.
#
# **Usual mistake.** Making the decoder's rows long: then small values do, and the comparison means nothing. That is one
# reason why the decoder has unit rows.

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# The encoder and the decoder need not agree. Let them disagree.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Let `x` point along the first decoder row, and let the encoder multiply the second latent by a large number.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `x = [1, .1]`, the decoder the identity, the encoder diagonal: which diagonal makes the second `z` the larger?
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 3.4: passed (at their best values the latent TopK keeps leaves ..., and the other ...).`
# </details>
#
# **What you just saw.** The encoder guesses, in one matrix product, which latents are worth keeping. What remains of
# TopK's error at its own k is that guess, and that 2304 directions can only do so much; these experiments do not tell
# the two apart.
#
# ## 6. Latents that die
#
# A row cut has winners, and so it has losers: a latent that never gets among the k largest gets no gradient, and stays
# where it is. Our shipped SAE has none such, since it was trained with care. So we made it hard on purpose: k = 8,
# 300 steps of 1,024 activations, and learning rates
# up to 0.02. `benchmarks/results/lessons/nb03.json` has all runs.

# %%
lesson = json.loads(Path("../benchmarks/results/lessons/nb03.json").read_text(encoding="utf-8"))
setting = lesson["setting"]
print({name: setting[name] for name in ("d_sae", "k", "steps", "batch_size", "dead_after_tokens", "tokens_distinct")})


def curves(axis, lr, ways):
    """Draw the share of dead latents during training, one line for each seed."""
    styles = {"none": ("#444444", "-"), "auxk": (COLOURS["topk"], "--"), "resample": ("#D55E00", ":")}
    for way in ways:
        runs = [run for run in lesson["runs"] if (run["lr"], run["revive"]) == (lr, way)]
        for i, run in enumerate(runs):
            seen, dead = zip(*run["curve"], strict=True)
            colour, line = styles[way]
            label = {"none": "nothing done", "auxk": "AuxK", "resample": "resampling"}[way] if i == 0 else None
            axis.plot([t / 1000 for t in seen], dead, line, color=colour, label=label, linewidth=1.6)
    axis.set(xlabel="activations seen (thousands)", ylabel="share of latents dead", ylim=(0, 1))
    axis.set_title(f"learning rate {lr:g}")
    axis.legend(frameon=False, fontsize=8)


rates = sorted({run["lr"] for run in lesson["runs"]})
figure, axes = picture("Share of latents dead in training with nothing done, by learning rate.", len(rates), 4.2, 3.2)
for axis, lr in zip(axes, rates, strict=True):
    curves(axis, lr, ["none"])
figure

# %% [markdown]
# *Dead* in these curves: silent on the last 20,000 activations. The window is part of the definition: Gao et al. wait
# for 10 million tokens, the BatchTopK authors' code for five batches (20,480 tokens), and neither number is comparable
# to the other.
#
# > **Why not simply ignore them?** You pay for a dead latent in memory and in every matrix product, and it explains
# > nothing. Gao et al. report up to 90 % of latents dead in large SAEs when nothing is done (section 2.4).
#
# ### AuxK
#
# > **Why?** A dead latent lacks a gradient because it never takes part. So give it a part: let the dead try to explain
# > what the living left over. If one of them is any good at that, it grows in a direction that is needed, and may win
# > next time.
#
# $$e = x - \hat x \;\text{(detached)} \qquad \hat e = \mathrm{TopK}(z_{\text{dead}}, k_{\text{aux}})\, W_{dec} \qquad
# \mathcal{L} = \lVert x - \hat x\rVert^2 + \tfrac{1}{32}\lVert e - \hat e\rVert^2$$
#
# (Gao et al., section 2.4; Bussmann et al., section 2, with `aux_k` usually 512.) What may it touch?
#
# - **The dead only**: their columns of `W_enc`, entries of `b_enc` and rows of `W_dec`. The error is *detached*, so
#   that the living are not pulled towards leaving an error that the dead find easy.
# - **The ReLU stays**: `z` of the dead is cut at 0 like everybody's.
# - **`b_dec` is not added to `e_hat`.** It is in `x_hat`, so `e` has none left. A gradient reaches it by one way only,
#   the encoder's input `x - b_dec`.
#
# ### Exercise 3.5: AuxK, and what it may touch
# > Difficulty: ●●●●○ 4/5 · Importance: ●●●●● 5/5 · about 25 minutes · core
# > You write the auxiliary loss; the check looks at its gradients, one weight at a time.
#
# Give |e − ê|², summed over `d_in` and averaged over tokens, *without* the 1/32. `dead` is a mask of latents, with at
# least one of them dead; `aux_k` may be larger than the number of dead. `keep_row(z, k)` is the package's cut, your
# 3.1.


# %%
def auxk(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
    dead: Bool[Tensor, " d_sae"],
    aux_k: int,
) -> Float[Tensor, ""]:
    """Mean over tokens of |e - e_hat|^2: what the living leave over, explained by the `aux_k` strongest of the dead."""
    ### BEGIN SOLUTION
    z = torch.relu((x - b_dec) @ W_enc + b_enc)
    error = (x - (keep_row(z, k) @ W_dec + b_dec)).detach()
    revived = keep_row(torch.where(dead, z, 0), min(aux_k, int(dead.sum())))
    return (error - revived @ W_dec).square().sum(dim=-1).mean()
    ### END SOLUTION


# %%
check.auxk(auxk)

# %% [markdown] tags=["solution"]
# **Why so.** `torch.where` sets the living to 0, and a 0 is never kept, so of all weights only those of the dead are
# in the product. `.detach()` makes the error a target: a number to be hit, not something that may move. `min(...)`
# because one cannot keep more than there are.
#
# **Usual mistakes**, all of them met in published code: an error that is not detached (the reference code of
# BatchTopK); `b_dec` added a second time (an issue of sparsify, number 132); `aux_k` taken from `d_sae` instead of
# `d_in` (an issue of SAELens, number 432). None of them raises anything, and the loss looks as usual. The gradients
# tell.

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Write the ordinary forward pass first. Two things then happen to its results: one is frozen, the other is masked.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# `z` as always; `error` from the ordinary cut, detached; then the cut once more, of a `z` in which the living are 0.
# Decode that without `b_dec`.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `error = (x - (keep_row(z, k) @ W_dec + b_dec)).detach()`, then `keep_row(torch.where(dead, z, 0), ...)`, where the
# dots are the smaller of `aux_k` and `dead.sum()`; the squared difference, `.sum(dim=-1).mean()`.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 3.5: passed (the loss; its gradient on the dead, on the living, on b_dec; more aux_k than dead).`
# </details>
#
# **What you just saw.** A loss is a value *and* a set of pulls. Without
# `.detach()` the value is exactly right; what gives the slip away is who gets pulled.
#
# ## 7. Two ways to be dead
#
# ### Exercise 3.6: whom can AuxK reach?
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 5 minutes · core
# > You predict from the formula which latents AuxK helps.
#
# Two latents are dead. On 20,000 tokens, before the ReLU,
#
# - **A** was never above 0;
# - **B** was above 0 on 300 tokens, and always behind at least k others.
#
# AuxK is on, and `aux_k` is large enough for all the dead. Which of them gets a gradient?
#
# - **a** both
# - **b** B only
# - **c** A only
# - **d** neither

# %%
### BEGIN SOLUTION
#: answer = ...
answer = "b"
### END SOLUTION

# %%
check.reach(answer)

# %% [markdown] tags=["solution"]
# **Why so.** The gradient comes back through the ReLU, and the slope of the ReLU is 0 where its input is negative. A is
# negative on every token: whatever the loss, nothing reaches its encoder, and its decoder row is multiplied by 0. B is
# *outbid*: it has something to say and is never heard, and AuxK lets it speak.
#
# **Usual mistake.** Thinking that AuxK revives dead latents. It revives those that were outbid.

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Follow the gradient from `e_hat` back to the encoder. What stands in its way?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# The ReLU passes a gradient only where it passed a value.
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# For A the ReLU passed nothing, ever.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 3.6: passed (a gradient needs a token on which z is positive).`
# </details>
#
# ### Exercise 3.7: post mortem
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●○ 4/5 · about 15 minutes · core
# > You write the diagnosis: given pre-activations, who is dead, and of what.
#
# `pre` are the pre-activations of some tokens **before the ReLU**. A latent is dead if TopK keeps it on none of them.
# Give two masks: dead and *outbid* (positive on at least one token), dead and *never positive*.


# %%
def post_mortem(
    pre: Float[Tensor, "tokens latents"], k: int
) -> tuple[Bool[Tensor, " latents"], Bool[Tensor, " latents"]]:
    """(outbid, never positive): two masks of the latents that are kept on no token."""
    ### BEGIN SOLUTION
    dead = ~(keep_row(pre.relu(), k) > 0).any(dim=0)
    positive = (pre > 0).any(dim=0)
    return dead & positive, dead & ~positive
    ### END SOLUTION


# %%
check.post_mortem(post_mortem)

# %% [markdown] tags=["solution"]
# **Why so.** Two questions, one for each half: was it ever kept (after the ReLU and the cut), and was it ever positive
# (before both)? One token is enough for "ever", hence `any` over the tokens.
#
# **Usual mistakes.** Cutting before the ReLU: a token with fewer than k positives then "keeps" negative entries, and
# latents seem alive that give nothing. Forgetting `dead &`: most latents that are positive somewhere are perfectly
# well.

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# "Kept on none" and "positive on at least one" are both questions with `any` in them.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# `keep_row(pre.relu(), k) > 0` says where each latent fires; `pre > 0` where it could have.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `dead = ~fires.any(dim=0)`, `positive = (pre > 0).any(dim=0)`, and two combinations of them.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 3.7: passed (3 x 5, k = 2, 1 x 5, k = 2, 3 x 5, k = 5, 60 latents, fewer positives than k).`
# </details>
#
# Now a patient of our own: trained here, far too hot, for a few seconds (and so with other shares of the two kinds than
# in the table of section 8).

# %% tags=["nbval-ignore-output"]
too_hot = TrainConfig(tokens=80 * 512, batch_size=512, lr=0.02, dead_after_tokens=20_000, revive="none")
patient = TopKSAE(576, 2304, k=8)
_ = train(patient, x[:12_288], too_hot)

ward = x[-4096:]  # not trained on
ward_n = patient._normalized(ward)[0]  # an SAE normalises its input; this is what its weights see
with torch.no_grad():
    pre = (ward_n - patient.b_dec) @ patient.W_enc + patient.b_enc
    dead = patient.tokens_since_fired >= patient.dead_after_tokens
    ever_positive = (pre > 0).sum(dim=0) > 0
    error = ward_n - (keep_row(pre.relu(), 8) @ patient.W_dec + patient.b_dec)

patient.train()  # AuxK works in train mode only,
patient.aux_k = 512  # and `revive="none"` had switched it off
patient.zero_grad()
patient.auxk(ward_n, error).backward()
pulled = (patient.W_enc.grad != 0).any(dim=0) | (patient.W_dec.grad != 0).any(dim=1)
groups = {"living": ~dead, "dead, outbid": dead & ever_positive}
groups["dead, never positive"] = dead & ~ever_positive
for name, group in groups.items():
    print(f"{name:<22}{int(group.sum()):5} latents, {int((pulled & group).sum()):5} of them pulled at by AuxK")

# %%
assert 0.3 < dead.float().mean() < 0.95
assert not (pulled & groups["living"]).any()
assert not (pulled & groups["dead, never positive"]).any()
assert (pulled & groups["dead, outbid"]).sum() > 0.5 * groups["dead, outbid"].sum() > 0
print("AuxK pulls at the outbid, and at nobody else")

# %% [markdown]
# That is theory, confirmed on a real SAE. What is it worth in practice?
#
# ## 8. What helps, and what does not
#
# For those that are never positive there is **resampling**: from time to time give dead latents new weights, pointing
# at inputs that are badly reconstructed (Bricken et al. 2023, *Towards Monosemanticity*).
#
# **Predict first.** At a rate of 0.004, three ways: nothing, AuxK, resampling. Which leaves the fewest dead? And which
# the smallest error?

# %%
print(
    f"dead: silent on {setting['tokens_heldout']:,} held-out tokens; in brackets the largest difference between seeds\n"
)
print("rate    what is done  seeds  dead         outbid  never positive    L0    FVU")
for row in lesson["summary"]:
    m, r = row["mean"], row["range"]
    print(
        f"{row['lr']:<8g}{row['revive']:<14}{row['seeds']:<7}{m['dead']:4.0%} ({r['dead']:.0%}){m['outbid']:10.0%}"
        f"{m['never_positive']:16.0%}{m['l0']:6.1f}{m['fvu']:7.3f} ({r['fvu']:.3f})"
    )

# %%
figure, axes = picture("Share of dead latents in training: nothing done, AuxK, resampling.", 1, 7, 3.4)
curves(axes[0], 0.004, ["none", "auxk", "resample"])
figure

# %% [markdown]
# What holds here, and what does not (`benchmarks/results/lessons/nb03.json`, as many seeds as the table says):
#
# - **At 0.004 all the dead are outbid**, and AuxK does what its formula promises: of a third, about a tenth is left.
#   Resampling leaves about a quarter: its curve dips at the last resampling, half-way through the run, and climbs
#   again afterwards. (The curve counts a window of training, the table held-out tokens, so their ends differ a little.)
# - **The error barely moves**: by less than .005 of FVU, at the same L0, whichever way the dead were brought back.
#   Here a third of the latents could be idle and hardly be missed. Longer runs and wider SAEs were not measured.
# - **At 0.02 a new kind appears**: more than a fifth of all latents is never positive on any held-out token. Section 7
#   showed why AuxK is no help to them. And look at the last column: the rate did far more harm than any way of
#   reviving did good at 0.004. A learning rate is cheaper to lower than a latent is to revive.

# %%
progress()

# %% [markdown]
# ## Summary
#
# - TopK keeps the k largest pre-activations of each token. L0 is what you asked for, no penalty, no shrinkage, and a
#   tie rule so that codes are reproducible.
# - The price: a comma spends as much as a surname, and the error goes where the need is.
# - k can be turned after training. Beyond the k of training the entries have never been trained: here the error falls
#   a little further, up to twice that k, and then rises again, because of their values and not their number.
# - Dead latents are of two kinds. AuxK pulls at the outbid and provably at nobody else; the never positive need new
#   weights.
# - A count of dead latents is no measure of quality: look at the error, and at L0 beside it.
#
# ## Quiz
#
# **1.** A colleague reports "L0 = 64" because k is 64. What would you ask?
#
# <details><summary>Answer</summary>
#
# Whether it was counted. With few positive pre-activations a token keeps fewer than k; at k = 2304 our SAE keeps about
# a hundred.
# </details>
#
# **2.** Someone removes `.detach()` from AuxK. The loss values of the first step are the same. What changes?
#
# <details><summary>Answer</summary>
#
# The gradients: the living latents are now pulled towards leaving an error that the dead can explain, which is
# nobody's aim.
# </details>
#
# **3.** Half of your latents are dead and AuxK has been on all the time. What do you look at first?
#
# <details><summary>Answer</summary>
#
# Whether their pre-activations are ever positive. If not, AuxK cannot reach them; look at the learning rate, then
# resample.
# </details>
#
# ## Where this goes wrong in practice
#
# > - **The window.** "Dead" after 20 thousand and after 10 million silent tokens are different words. In a short run
# >   with a long window no latent ever counts as dead, and AuxK silently does nothing. Always state the window.
# > - **AuxK's details**, in published code: not detached, `b_dec` twice, applied to all latents. Test gradients, not
# >   values.
# > - **Loading a TopK SAE as a ReLU SAE** keeps every positive latent. Here L0 goes from 32 to 114 (section 4) and the
# >   error hardly moves, so nothing warns you. It happens when a file does not say which variant it holds.
# > - **Ties in low precision**, and `topk` implementations that differ in them: codes differ between machines.
#
# ## What this covered
#
# Bussmann, Leask and Nanda 2024 (arXiv 2412.06410), section 2: TopK and the auxiliary loss. Gao et al. 2024 (arXiv
# 2406.04093), sections 2.3 and 2.4. Resampling: Bricken et al. 2023.
#
# ## Next
#
# Punctuation is content with half of what it gets, and the later pieces of words are not with all of it. **Who should
# get the budget?** Notebook 04 lets the tokens of a batch compete for it.
