# %% [markdown]
# # 04 BatchTopK: a budget for the whole batch
#
# In 03 every token got the same number of latents. Here the batch gets one budget, and tokens compete for it.
#
# **After this notebook you can**
#
# - write the flat cut, with its ties and its rounding, and say what it does to a token's neighbours;
# - predict which tokens will spend more than their share, and check it;
# - read a table "trained with × cut by", and find the single token that spoils a number in it;
# - attack a BatchTopK SAE through its neighbours, and prove how little such an attack can do;
# - say why an SAE that is trained by batch must not be *used* by batch, which is where 06 begins.
#
# **You need** 03 (the row cut, AuxK, dead latents). **Time**: about two hours with all exercises, of which nine are
# core and three ask for one letter only. Nothing is trained here; the claims about training rest on the two shipped
# SAEs (20 million activations each) and on `benchmarks/results/lessons/nb04.json`.

# %% tags=["setup"]
pass

# %%
import html
import itertools

import ipywidgets
import torch
from IPython.display import HTML
from jaxtyping import Float, Int
from matplotlib.patches import Rectangle
from torch import Tensor

from tutorial_sae import heldout_slice, load_model, load_pretrained
from tutorial_sae.checks import nb04 as check
from tutorial_sae.checks import progress
from tutorial_sae.latents import kind_of
from tutorial_sae.measures import fvu
from tutorial_sae.plots import COLOURS, NAMES, l0_by_kind, picture
from tutorial_sae.saes.base import keep_batch, keep_row
from tutorial_sae.widgets.explorer import explorer, explorer_data, explorer_figure
from tutorial_sae.widgets.highlight import highlight

# %% [markdown]
# The held-out slice, the two SAEs, and the text of each token. Rows of `x` are activations after block 15, as before.

# %%
model = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
store = heldout_slice(model)
x = store[:]
saes = {name: load_pretrained(name).requires_grad_(False) for name in ("topk", "batchtopk")}
k = 32
pieces = [store.piece(i) for i in range(len(x))]
shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
print(f"{len(x):,} activations of width {x.shape[1]}; SAEs with {saes['topk'].d_sae} latents, k = {k}")

# %% [markdown]
# ## 1. Two tokens, one budget
#
# Take one sentence of the slice, and two of its tokens: a comma, and the beginning of a name. The TopK SAE gives
# 32 latents to each. Which of them are worth having?

# %%
start = next(i for i in range(len(x)) if "".join(pieces[i : i + 5]).startswith(" The city of Coventry"))
sentence = torch.arange(start, start + 18)
print("".join(pieces[i] for i in sentence))
comma = next(int(i) for i in sentence if pieces[i] == ",")
name = next(int(i) for i in sentence if pieces[i] == " Cov")

both = saes["topk"].pre_activations(x[[name, comma]]).sort(dim=1, descending=True).values
bar = both.flatten().sort(descending=True).values[2 * k - 1]  # the last of the 64 largest of both
figure, (axis,) = picture("Sorted pre-activations of a comma and of the piece Cov; the comma's fall faster.", width=7.5)
for z, label, style in zip(both, ("' Cov', the start of a name", "',', a comma"), ("-", "--"), strict=True):
    axis.plot(range(1, 81), z[:80], style, color=COLOURS["topk"], label=label, linewidth=2)
    print(f"{label:<28} z at place 32: {z[31]:.2f}, at place 33: {z[32]:.2f}; above the bar: {(z >= bar).sum()}")
axis.axvline(32.5, color="#444444", linewidth=1, linestyle=":", label="the row cut: 32 places for each")
axis.axhline(bar, color=COLOURS["batchtopk"], linewidth=1.5, label="one bar for both: 64 places in all")
axis.set(xlabel="place in the token's own order", ylabel="pre-activation z", yscale="log")
axis.set_title("The comma's last places go to entries that the name could use better")
axis.legend(frameon=False)
figure

# %% [markdown]
# *Text: Wikipedia, CC BY-SA 4.0; see NOTICE.*
#
# The last entry that the comma may keep is smaller than the first that the name must give up. If we could move one
# place from the comma to the name, more would be kept, at the same total. Now do that until no such move is left. Where
# does it end? With one bar across all tokens: everything above it is kept, wherever it stands. That is the **flat
# cut**.
#
# > **Why a total, and not a bar?** A bar must be set, and nobody knows where before training. A total is what we wanted
# > to fix in the first place: n tokens with k latents each are n·k entries. So keep the n·k largest entries of the
# > whole matrix, and let the bar be wherever that puts it.
#
# In the paper's words (Bussmann, Leask and Nanda 2024, section 3) BatchTopK keeps the $n \cdot k$ largest entries
# over a batch of $n$ samples and sets the others to 0. The loss is TopK's: $\|x - \hat x\|^2$ + AuxK / 32.
#
# ### Exercise 4.1: the flat cut
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 12 minutes · core
# > The step from TopK to BatchTopK, exactly: the budget, the rounding, the ties.
#
# Three things have to be settled that "the n·k largest" leaves open.
#
# - **k need not be whole.** For n tokens the budget is `floor(k * n + 1e-6)` entries. (The `1e-6`: try `2.3 * 100` in
#   Python.) A budget of 0 is a mistake of the caller: raise a `ValueError` that says so.
# - **Ties.** Two entries may be equal, and only one place left. The one with the lower flat index stays (row 0 before
#   row 1, in a row from left to right), so that two machines keep the same entries.
# - **Fewer positive entries than the budget**: keep them all, and nothing else.
#
# **Predict first.** Four tokens with the pre-activations below, k = 2. Which token ends with nothing? Write it down,
# then run the next cell.
#
# | token | latent 0 | 1 | 2 | 3 | 4 |
# |---|---|---|---|---|---|
# | A | .9 | .8 | 0 | .1 | 0 |
# | B | .3 | .2 | .1 | 0 | .2 |
# | C | .7 | .6 | .6 | .5 | .4 |
# | D | 0 | .4 | 0 | .7 | 0 |

# %%
toy = torch.tensor([[0.9, 0.8, 0, 0.1, 0], [0.3, 0.2, 0.1, 0, 0.2], [0.7, 0.6, 0.6, 0.5, 0.4], [0, 0.4, 0, 0.7, 0]])
figure, axes = picture("The toy matrix cut by row and by batch; token B keeps nothing under the batch cut.", 2, 3.6, 3)
for axis, cut, kept in zip(axes, ("row", "batch"), (keep_row(toy, 2), keep_batch(toy, 2)), strict=True):
    colour = COLOURS["topk" if cut == "row" else "batchtopk"]
    axis.imshow(toy, cmap="Greys", vmax=2)
    for i, j in toy.nonzero().tolist():
        on = kept[i, j] > 0
        look = {"color": colour, "weight": "bold"} if on else {"color": "#777777"}
        axis.text(j, i, f"{toy[i, j]:.1f}", ha="center", va="center", **look)
        if on:
            axis.add_patch(Rectangle((j - 0.45, i - 0.45), 0.9, 0.9, fill=False, edgecolor=colour, linewidth=2))
    axis.grid(visible=False)
    axis.set_xticks(range(5))
    axis.set_yticks(range(4), ["ABCD"[i] + f": {int((kept[i] > 0).sum())} kept" for i in range(4)])
    axis.set(title=f"cut by {cut}, k = 2", xlabel="latent")
figure


# %%
def batch_topk(z: Float[Tensor, "tokens latents"], k: float) -> Float[Tensor, "tokens latents"]:
    """Keep the floor(k * tokens + 1e-6) largest entries of the whole matrix, unchanged, and zero the rest.

    z is non-negative. Of equal entries those with the lower flat index stay. A budget of 0 raises ValueError.
    """
    ### BEGIN SOLUTION
    budget = int(k * len(z) + 1e-6)
    if budget == 0:
        raise ValueError(f"k = {k} for {len(z)} tokens is a budget of 0 entries")
    flat = z.flatten()
    first = flat.argsort(descending=True, stable=True)[:budget]
    kept = torch.zeros_like(flat)
    kept[first] = flat[first]
    return kept.view_as(z)
    ### END SOLUTION


# %%
check.flat_cut(batch_topk)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# You know how to keep the largest entries of one vector. Which vector do you need here?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# A matrix laid out as one long row is a vector. Order it, keep the first `budget` places, put the values back where
# they came from, give it its shape again. A sort can be told to leave equal entries in their order.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `flat = z.flatten()`; `flat.argsort(descending=True, stable=True)[:budget]`; a tensor of zeros, filled at those
# places; `.view_as(z)`.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 4.1: passed (values, counts, one token, k = 2.3, k = 2.4, k = 0.5, ties, fewer positives than the budget, a
# budget of 0). 1 of 10 in this notebook.`
# </details>
#
# **What you just saw.** The budget goes where the large entries are. Two things may bother you. Token B got nothing: is
# that fair to it? And what C keeps depends on A, B and D. Keep the second thought; section 5 makes a weapon of it.

# %% [markdown] tags=["solution"]
# **Why so.** Flattening makes the whole matrix one row, so the flat cut *is* the row cut of one very long row with a
# budget of k·n. The package writes it in one line, `keep_row(z.reshape(1, -1), budget)`. The stable sort settles ties;
# `topk` alone promises no order among equals, and with ReLU outputs in low precision equal values do occur. Usual
# mistakes: cutting each row (that is TopK); `z >= cut` on the value of the last entry (keeps all ties); `int(k) * n`
# (loses the fraction of k), or `int(k * n)` without the 1e-6 (229 instead of 230).

# %% [markdown]
# ## 2. Who gets the budget?
#
# From here on the package's own cuts do the work: `sae.encode(x, "batch")` cuts as you did. The next cell cuts the
# slice in shuffled batches of 4096, with both SAEs and both cuts, and keeps the number of latents of each token (its
# **L0**) and the reconstructions.

# %%
l0, x_hat = {}, {}
for trained, sae in saes.items():
    for cut in ("row", "batch"):
        counts, rebuilt = torch.empty(len(x), dtype=torch.long), torch.empty_like(x)
        for batch in shuffled.split(4096):
            kept = sae.encode(x[batch], cut)
            counts[batch], rebuilt[batch] = (kept > 0).sum(dim=1), sae.decode(kept)
        l0[trained, cut], x_hat[trained, cut] = counts, rebuilt
        print(f"{NAMES[trained]:<10} cut by {cut:<6} L0 {counts.float().mean():.1f}")

# %% [markdown]#
# ### Exercise 4.2: commas or surnames
# > Difficulty: ●○○○○ 1/5 · Importance: ●●●○○ 3/5 · about 3 minutes · core
# > To have an opinion before the figure has one.
#
# The mean L0 is 32 for both cuts. Under the flat cut of the BatchTopK SAE, which tokens spend most? Kinds of token
# here: a *word start* begins with a space (` Cov`), a *word continuation* is a later piece (`entry`), then digits,
# punctuation, and white space (line breaks and indents of the code in the slice).
#
# - **a** All kinds about the same, near 32: the SAE was trained to spend 32.
# - **b** Punctuation and white space: they are the most frequent, so many latents have learned them.
# - **c** Word starts: each opens a new word, which is where something new is said.
# - **d** Word continuations: `entry` after ` Cov`.

# %%
### BEGIN SOLUTION
#: spends_most = ...  # "a", "b", "c" or "d"
spends_most = "d"
### END SOLUTION

# %%
check.budget_goes_to(spends_most)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# What does a token's activation have to hold for the model to go on from there?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# A comma after anything is still a comma. What does the model know at `entry` that it did not know at ` Cov`?
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# Only at its last piece is a word complete, and all that is known of the thing it names becomes available.
# </details>


# %%
kinds = [kind_of(piece) for piece in pieces]
spent = l0["batchtopk", "batch"]


def mean_l0(values: Int[Tensor, " tokens"], groups: list[str]) -> dict[str, float]:
    return {g: float(values[torch.tensor([h == g for h in groups])].float().mean()) for g in sorted(set(groups))}


means = {"topk": mean_l0(l0["topk", "row"], kinds), "batchtopk": mean_l0(l0["batchtopk", "batch"], kinds)}
for kind, value in means["batchtopk"].items():
    print(f"{kind:<18}{kinds.count(kind):>6} tokens, mean L0 {value:.0f}")
l0_by_kind(means)

# %% [markdown]
# A later piece of a word takes three times what white space takes. In the sentence from above, the darker the ground,
# the more latents (hover for the number):

# %%
HTML(highlight([pieces[i] for i in sentence], spent[sentence].tolist()))

# %% [markdown]
# *Text: Wikipedia, CC BY-SA 4.0; see NOTICE.*
#
# Two more ways to ask. By **position** in the row: what can be said of a token that has hardly any context? And by
# **kind of text**: the slice holds introductions from Wikipedia, Python code and documentation.

# %%
position = torch.tensor([store.place(i)[1] for i in range(len(x))])
some = range(0, len(x), 16)  # every 16th activation: looking up the source of each takes long
source = [store.context(i).source.split(":")[0].split("/")[0].split()[0] for i in some]
by_source = mean_l0(spent[:: some.step], source)

figure, axes = picture("Latents per token: their distribution, by position in the row, and by kind of text.", 3, 3.9)
counts = torch.bincount(spent).float() / len(x)
axes[0].stairs(counts, color=COLOURS["batchtopk"], fill=True, alpha=0.8)
axes[0].axvline(k, color="#444444", linestyle=":")
axes[0].set(xlabel="L0 of a token", ylabel="share of tokens", title="Most tokens spend less than k", xlim=(0, 130))
edges = [1, 2, 3, 5, 9, 17, 33, 65, 128]
spans = [(position >= a) & (position < b) for a, b in itertools.pairwise(edges)]
by_position = [float(spent[span].float().mean()) for span in spans]
axes[1].plot(edges[:-1], by_position, "o-", color=COLOURS["batchtopk"])
axes[1].axhline(k, color="#444444", linestyle=":")
axes[1].set(xlabel="position in the row (BOS is 0)", ylabel="mean L0", xscale="log", ylim=(0, 40))
axes[1].set_title("Poor start, then level")
axes[2].bar(list(by_source), list(by_source.values()), color=COLOURS["batchtopk"], width=0.6)
axes[2].axhline(k, color="#444444", linestyle=":")
axes[2].set(ylabel="mean L0", title="Prose about the world costs more")
print({name: round(value) for name, value in by_source.items()}, "- dotted in the figure: k = 32")
figure

# %% [markdown]
# The paper shows the same distribution for its SAE: from one active latent to more than 80, with a peak at the far left
# that is BOS (section 4, figure 3). Ours has no BOS, for the mask of 01 leaves it out. How L0 goes with the position
# and the kind of token is not in the paper; the figures above are ours, of one SAE.
#
# So "k = 32" is a statement about a *mixture of text*. On Wikipedia alone this SAE would not spend 32, unless the cut
# were made on Wikipedia alone, and then all codes would be others. That thought again.

# %% [markdown]
# ## 3. Trained with × cut by
#
# You have two SAEs, trained by row and by batch, and either can be cut either way. That makes a table of four cells,
# all at L0 = 32, and it separates two things that are easily mixed up: is it the *cut* that helps, or the *training*
# under it?
#
# ### Exercise 4.3: trained with one cut, used with another
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 4 minutes · core
# > Whether the gain is free.
#
# You have a TopK SAE, trained long ago. Someone says: "Cut it flat when you use it! Same L0, better spent: FVU must
# fall." And then there is the BatchTopK SAE cut by row. What happens to the FVU of each when its cut is changed?
#
# - **a** The flat cut lowers the FVU of both: it spends better, whoever made the matrix.
# - **b** Each SAE has the lowest FVU with the cut it was trained with.
# - **c** The row cut lowers the FVU of both: no token starves.
# - **d** It makes next to no difference: both keep 32 of the largest entries.

# %%
### BEGIN SOLUTION
#: other_cut = ...  # "a", "b", "c" or "d"
other_cut = "b"
### END SOLUTION

# %%
check.other_cut(other_cut)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# What did each SAE's training compare with what?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# In TopK an entry competes with others of its own token only. Whether z = 2 at one token is worth as much as z = 2 at
# another never mattered.
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# Run the next cell and read the two lines.
# </details>

# %%
table = {}
print(f"{'FVU, held out':<16}{'cut by row':>12}{'cut by batch':>14}     L0 = 32 in all four")
for trained in saes:
    for cut in ("row", "batch"):
        table[trained, cut] = fvu(x, x_hat[trained, cut])
    print(f"{NAMES[trained]:<16}{table[trained, 'row']:>12.3f}{table[trained, 'batch']:>14.3f}")

# %% [markdown]
# So the flat cut is no gift that any SAE can be handed: TopK's FVU *rises*. What lowers it is **training under the cut
# that you use**. On the other diagonal, the BatchTopK SAE cut by row is the price of the wrong cut; remember that cell.
#
# Does the language model agree? Put the reconstruction in place of the activations, and measure how much the
# cross-entropy rises (nats per token, on 11,789 held-out tokens; FVU on the 16,384 of the slice; L0 32.0 everywhere,
# from `benchmarks/results/lessons/nb04.json`):
#
# | CE increase | cut by row | cut by batch |
# |---|---:|---:|
# | TopK | 0.107 | 0.082 |
# | BatchTopK | 0.136 | 0.054 |
#
# In cross-entropy the flat cut **helps** the TopK SAE, by almost a quarter. Two measures, two answers, at the same L0,
# and the shorter runs in `benchmarks/results/compare-seed0.json` and `compare-seed1.json` (one million activations) say
# the same twice. When two measures disagree there is something to find.
#
# ### Exercise 4.4: the thief
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●●○ 4/5 · about 12 minutes · core
# > To ask of a number which tokens it comes from.
#
# FVU is a ratio of sums over tokens, so one token can own it. Look for the greediest token first:

# %%
greedy = int(l0["topk", "batch"].argmax())
taken = round(int(l0["topk", "batch"][greedy]), -2)
print(f"activation {greedy}: {pieces[greedy]!r}, position {store.place(greedy)[1]} of its row")
print(f"it keeps about {taken} of the {4096 * k:,} entries of its batch; the BatchTopK SAE gives it {spent[greedy]}")
norms = x.norm(dim=1)
print(f"its norm is {norms[greedy]:.0f}, the median {norms.median():.0f}, the mask's limit {store.norm_limit:.0f}")
for cut in ("row", "batch"):
    error = (x - x_hat["topk", cut]).square().sum(dim=1)
    print(f"its share of the squared error of all {len(x):,} tokens, cut by {cut}: {error[greedy] / error.sum():.1%}")

# %% [markdown]
# A token at position 1, eight times as long as usual: an **attention sink** (01) that is just short enough to slip
# under the mask. Sixteen hundred latents are added up for it, and the sum misses by far.
#
# 1. Write the FVU of *the other tokens*: the tokens in `left_out` are gone, from the errors, from the variance and from
#    the mean that the variance is measured from.
# 2. Why does this token take so much of the budget in the TopK SAE?
#    - **a** It carries the information of sixteen hundred features.
#    - **b** All its pre-activations are large because its activation is long, and the flat cut compares them with other
#      tokens' as they stand; the row cut never compared them with anything but each other.
#    - **c** AuxK has revived dead latents on it.
#    - **d** Rounding: float32 is too coarse for norms like that.


# %%
def fvu_without(x: Float[Tensor, "tokens d_in"], x_hat: Float[Tensor, "tokens d_in"], left_out: list[int]) -> float:
    """Fraction of variance unexplained of the tokens that are not left out, as if the others had never been there."""
    ### BEGIN SOLUTION
    stays = torch.ones(len(x), dtype=torch.bool)
    stays[left_out] = False
    x, x_hat = x[stays], x_hat[stays]
    return float((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum())
    ### END SOLUTION


### BEGIN SOLUTION
#: why_so_greedy = ...  # "a", "b", "c" or "d"
why_so_greedy = "b"
### END SOLUTION

# %%
check.thief(fvu_without, why_so_greedy)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Three places in the formula know the tokens: the sum above the line, the sum below it, the mean.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Take the rows out of `x` and `x_hat` first. After that it is the usual FVU.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `stays = torch.ones(len(x), dtype=torch.bool)`, `stays[left_out] = False`, then `x[stays]` and `x_hat[stays]`.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 4.4: passed (1 left out, 2 left out, 0 left out; the flat cut compares lengths that the row cut never had
# to).`
# </details>
#
# What is left of the surprise without that one token:

# %%
others = torch.arange(len(x)) != greedy
print(f"{'FVU':<16}{'row':>8}{'batch':>8}{'row*':>12}{'batch*':>12}     * without that token")
for trained in saes:
    both = [f"{table[trained, cut]:>8.3f}" for cut in ("row", "batch")]
    without = [f"{fvu(x[others], x_hat[trained, cut][others]):>12.4f}" for cut in ("row", "batch")]
    print(f"{NAMES[trained]:<16}", *both, *without, sep="")

# %% [markdown]
# **What you just saw.** For TopK almost the whole difference was **one token in 16,384**. Without it the flat cut
# neither helps nor hurts its FVU. BatchTopK's line hardly moves. What may be said, then? "Under the flat cut a TopK SAE
# can be robbed by an outlier; apart from that it gains nothing in FVU, and something in cross-entropy." And what may
# not: to drop the token and report the rest without a word. Leaving out is honest when the rule is the same for all and
# is stated; the mask is such a rule, and here it was a little too wide. That the BatchTopK SAE cannot be robbed like
# that fits: in its training such a token would have taken a fortune from all others in its batch. (That training
# works against it is our reading; it was not tested.)

# %% [markdown] tags=["solution"]
# **Why so.** Leaving a token out means that nobody has to explain it any more: it leaves the numerator, the denominator
# and the mean. With a token as long as this one the mean alone moves visibly. Usual mistakes: dropping only its error
# (its variance below the line then flatters all others), keeping the old mean, or averaging one ratio for each token,
# which is another quantity (07 has a whole list of those).
#
# The letter is b: pre-activations grow with the length of the activation. Within one row a common factor changes
# nothing about who is among the k largest. Across rows it decides everything.

# %% [markdown]
# ## 4. Why it has to be trained
#
# What *is* a place in the budget worth? Take a kept latent away, and the token's squared error grows: that growth is
# the latent's worth. If the decoder's rows stood at right angles to each other and each z were the exact coordinate,
# the worth of an entry would be z². Then the flat cut would be *the best* choice of n·k entries: dropping an entry
# costs z², so one drops the smallest. (That is the whole proof.)
#
# > **Why is it not so simple?** 2304 directions in 576 dimensions cannot be at right angles. What a latent is worth
# > depends on which others are there. z² is a *price tag*. It is right only if training has made it so.
#
# So look at the marginal places. Group tokens by how many latents the flat cut gives them, take away the last four that
# each token keeps (its smallest), and see by how much the error grows, for both SAEs and both cuts.

# %%
groups = {"under 16": (4, 16), "16-31": (16, 32), "32-63": (32, 64), "64-127": (64, 128)}
sample = shuffled[:4096]
lost = {}
for trained, sae in saes.items():
    flat = (sae.encode(x[sample], "batch") > 0).sum(dim=1)
    for cut in ("row", "batch"):
        kept = sae.encode(x[sample], cut)
        last = torch.where(kept > 0, kept, torch.inf).topk(4, dim=1, largest=False).indices
        errors = [(x[sample] - sae.decode(c)).square().sum(dim=1) for c in (kept, kept.scatter(1, last, 0.0))]
        growth = (errors[1] - errors[0]) / sae.norm_scale**2 / 4  # for each of the four, in normalised units
        lost[trained, cut] = [float(growth[(flat >= a) & (flat < b)].mean()) for a, b in groups.values()]

figure, axes = picture("Worth of a token's last latents by its flat L0; level only for BatchTopK cut by batch.", 2, 4.6)
for axis, trained in zip(axes, saes, strict=True):
    for cut, style in (("row", "s--"), ("batch", "^-")):
        axis.plot(list(groups), lost[trained, cut], style, color=COLOURS[trained], label=f"cut by {cut}", markersize=8)
    axis.axhline(0, color="#444444", linewidth=0.8)
    axis.set(xlabel="latents that the flat cut gives the token", title=f"trained as {NAMES[trained]}", ylim=(-1.2, 5.2))
    axis.legend(frameon=False)
axes[0].set_ylabel("worth of one of the last four\n(growth of squared error)")
for (trained, cut), values in lost.items():
    print(f"{NAMES[trained]:<10} cut by {cut:<6}", "  ".join(f"{v:5.1f}" for v in values))
figure

# %% [markdown]
# Read it as a market. **Cut by row** (dashed), the last places of cheap tokens are worth next to nothing and those of
# dear tokens a lot: someone should trade. **BatchTopK cut by batch** has traded: from 16 latents to 127 the last place
# is worth nearly the same, so no move from one token to another would gain much. (Tokens with few latents keep only
# large ones; their next entries are small.) **TopK cut by batch** tried to trade too, by its price tags, and overshot:
# the last places of dear tokens are worth less than nothing, without them the error would be smaller. TopK was never
# trained to add up more than 32 rows; what its 50th latent says, others have said already. That is what training under
# the flat cut does: it makes prices that mean the same at every token.
#
# ### Exercise 4.5: what a latent is worth
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●○○ 3/5 · about 15 minutes · bonus
# > To see where z² comes from, and what is added to it.
#
# Write the worth of **every** kept entry by itself, without decoding again for each. With the error $e = x - \hat x$
# and the decoder's row $d_j$ (length 1), the error without latent j is $e + z_j d_j$. Expand $|e + z_j d_j|^2 - |e|^2$.


# %%
def latent_worth(
    error: Float[Tensor, "tokens d_in"], latents: Float[Tensor, "tokens latents"], W_dec: Float[Tensor, "latents d_in"]
) -> Float[Tensor, "tokens latents"]:
    """By how much each token's squared error grows without each of its latents, one at a time; 0 where none is kept."""
    ### BEGIN SOLUTION
    return 2 * latents * (error @ W_dec.T) + latents.square()
    ### END SOLUTION


# %%
check.worth(latent_worth)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# |a + b|² has three terms, and one of them cancels.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# The middle term is 2 z times the inner product of the error with the latent's row: one matrix product gives all of
# them.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `error @ W_dec.T` is (tokens, latents). Multiply by 2 z, add z². Where z is 0 both terms vanish by themselves.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 4.5: passed (1 x 3 entries, 6 x 10 entries).`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** $|e + z d|^2 - |e|^2 = 2 z\, e \cdot d + z^2$. The second term is the price tag; the first says whether
# the reconstruction already overshoots along this latent (negative: the latent is worth less than its tag, or even does
# harm) or falls short. At a minimum over the *values* of the kept latents the error would be at right angles to all of
# them, $e \cdot d = 0$, and worth would be z² exactly: `measures.refit` finds such values (02). Usual mistakes: the
# sign of the middle term (without the latent its part comes *back* into the error), and forgetting the 2.

# %% [markdown]
# ## 5. The neighbour attack
#
# Now the catch. Nothing in the definition says that a token's code is about that token. Watch a sentence of our own
# while only its *company* changes: alone in its batch, beside a text of little content, beside a text full of names.

# %%
ours = "The ferry to Rothesay leaves the harbour at seven, in any weather."
company = {
    "poor": ">>> x = 1\n" * 18,
    "rich": "Kowalczyk, Oyelaran, Vaszary, Thorvaldsen, Mbeki, Quispe, Nakamura, Szymborska and Achterberg met in "
    "Guimaraes, Szeged, Oaxaca, Trondheim, Ouagadougou and Bialystok to fund glaciology, oenology and numismatics.",
}
data = explorer_data(model, saes["batchtopk"], ours, neighbours=company)
explorer(data)

# %% [markdown]
# Choose other neighbours in the widget and look at the batch cut; row and threshold do not move. (Where you see no
# widget, the figures show the same.)

# %%
explorer_figure(data, neighbours="poor")

# %%
explorer_figure(data, neighbours="rich")

# %% [markdown]
# ### Exercise 4.6: the neighbour attack
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●●● 5/5 · about 15 minutes · core
# > To break it on purpose, so that you know what kind of thing can go wrong by chance.
#
# You may not touch the text. You may choose the other n tokens of its batch, from a pool. Choose them so that the text
# keeps **few** entries (`rich=True`: rich neighbours take much), or **many** (`rich=False`). The best choice of all is
# hard to find; a good one is wanted.
#
# Think about what a neighbour *is* to your text. It has 2304 pre-activations. Which of them matter to you?


# %%
def neighbours(pool: Float[Tensor, "pool latents"], n: int, k: float, rich: bool) -> Int[Tensor, " n"]:
    """The numbers of the n rows of `pool` (pre-activations) that leave a text beside them the least, or the most."""
    ### BEGIN SOLUTION
    taken = (keep_batch(pool, k) > 0).sum(dim=1)
    return taken.argsort(descending=rich)[:n]
    ### END SOLUTION


# %%
check.attack(neighbours)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# A neighbour with one enormous entry: how many places does it take from you?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# One. What counts is how *many* entries of the neighbour stand above the bar, not how far. Where the bar is you can
# find out roughly by a flat cut of the pool.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `taken = (keep_batch(pool, k) > 0).sum(dim=1)`: what each token of the pool gets. Sort by it.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 4.6: passed (beside rich neighbours the text keeps ... per token, beside poor ones ...).`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** The text and its neighbours compete for places, and a neighbour takes as many places as it has entries
# above the bar. Sum, norm and largest entry measure how far above it they stand, which is of no interest to a rival.
# The ranking depends on the bar, and the bar on the choice; the flat cut of the pool is a first guess that is good
# enough (one could choose, cut again, and choose again). Usual mistakes: ranking by sum or norm, and mixing up the two
# directions. On real activations sums and counts go together, so ranking by `z.sum(dim=1)` attacks about as well: try
# it in the next cell. The pool of the check is made so that they part.

# %% [markdown]
# On the real slice, with the sentence about Coventry and batches of 128, neighbours chosen from all other rows of text:

# %%
z = torch.cat([saes["batchtopk"].pre_activations(part) for part in x.split(4096)])
row_of = torch.tensor([store.place(i)[0] for i in range(len(x))])
pool = (row_of != row_of[start]).nonzero().squeeze(1)
ranked = pool[spent[pool].argsort(stable=True)]
random = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(4))]
beside = 128 - len(sentence)
companies = {"poor": ranked[:beside], "rich": ranked.flip(0)[:beside], "random": random[:beside]}
companies["other random"] = random[beside : 2 * beside]
text_code = {c: keep_batch(z[torch.cat([sentence, rows])], k)[: len(sentence)] for c, rows in companies.items()}


def changed(one: str, other: str) -> float:
    """The share of the text's entries that differ between two companies, of those kept in either."""
    a, b = text_code[one] > 0, text_code[other] > 0
    return float((a != b).sum() / (a | b).sum())


for name, code in text_code.items():
    print(f"beside {name + ' neighbours':<26} L0 of the text {(code > 0).sum(dim=1).float().mean():5.1f}")
print(f"entries changed, poor to rich: {changed('poor', 'rich'):.0%}")
print(f"entries changed, random to other random: {changed('random', 'other random'):.0%}")
top = float(torch.stack([(c > 0).sum(dim=1).max() for c in text_code.values()]).max())
shown = []
for name in ("poor", "random", "rich"):
    spends = (text_code[name] > 0).sum(dim=1).tolist()
    shown += [f"<p>beside {name} neighbours</p>", highlight([pieces[i] for i in sentence], spends, top=top)]
HTML("".join(shown))

# %% [markdown]
# *Text: Wikipedia, CC BY-SA 4.0; see NOTICE.*
#
# Not one token of the text was touched. **Said honestly:** those neighbours were chosen to do harm. Over 40 texts of 24
# tokens (`benchmarks/results/lessons/nb04.json`; share of the entries kept in either of two batches that differ):
#
# | batch | chosen: rich against poor (latents a token beside each) | random against random |
# |---:|---:|---:|
# | 128 | 88 % (8 or 69 latents a token) | 6 % |
# | 1024 | 86 % (10 or 73) | 2.4 % |
# | 4096 | 77 % (15 or 66) | 1.1 % |
#
# So in training, with shuffled batches of thousands, the coupling is a little noise. In *use* it is a defect: a result
# that cannot be repeated unless you repeat the whole batch, and a code that someone else's text can change. The paper
# names the coupling itself, and the remedy (section 3): another cut for inference.

# %% [markdown]
# ## 6. They can move only one number
#
# How bad can an attack be? It changed most of the entries. Could neighbours make the SAE say *anything* about the text?
#
# Look at what is left of a batch from the text's point of view. Its own pre-activations do not depend on anyone. The
# flat cut keeps the largest entries of all; so there is a **bar** (any number from the largest entry dropped up to, but
# not including, the smallest kept), and what the text keeps is exactly what it has above the bar. All that a thousand
# neighbours can do is to push this one number up or down.
#
# ### Exercise 4.7: one number
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●●● 5/5 · about 12 minutes · core
# > A proof that you can run.
#
# Write a function that gets a text's pre-activations `z` and *some* code of it, and finds the bar that explains the
# code: a number such that the code is z where `z > bar`, and 0 elsewhere. If no number does, it returns `None`. (Assume
# that no two entries are equal.)
#
# Then finish the proof on paper, in two sentences: *the codes of a text beside any two companies are nested*, that
# is, one of them contains all entries of the other.


# %%
def one_bar(z: Float[Tensor, "tokens latents"], code: Float[Tensor, "tokens latents"]) -> float | None:
    """A bar with code == where(z > bar, z, 0), or None if there is none."""
    ### BEGIN SOLUTION
    dropped = z[code == 0]
    bar = float(dropped.max()) if len(dropped) else 0.0
    return bar if torch.equal(torch.where(z > bar, z, 0), code) else None
    ### END SOLUTION


# %%
check.one_number(one_bar)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Every entry dropped lies at or below the bar, every entry kept above it. Which of your entries is the closest from
# below?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# The largest entry that was dropped is the only candidate you need. Then test it: does it give this code back, values
# and all?
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `bar = float(z[code == 0].max())` (0 if nothing was dropped), and compare `torch.where(z > bar, z, 0)` with the code.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 4.7: passed (six kinds of neighbours, and three codes that no bar gives).`
# </details>
# <details><summary>The proof</summary>
#
# Beside company A the text keeps what lies above a bar a, beside company B what lies above a bar b. One of the two
# numbers is the larger, say b: whatever is above b is above a too, so B's code is contained in A's, with the same
# values. ∎ (With equal entries, a batch may split a tie at the bar; then the claim holds up to that tie.)
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** If a bar explains the code at all, then so does the largest entry dropped: it lies below everything kept.
# So one candidate decides, and testing it is the proof that it works. The row cut fails the test, because each of its
# rows has a bar of its own: with TopK there are as many numbers as tokens, but each belongs to its token and no
# neighbour can move it. Usual mistakes: returning the smallest entry *kept* (`z > bar` then drops it), and forgetting
# that values must agree too.

# %% [markdown]
# Here is the whole freedom of all neighbours in one picture. The curve needs the text alone: its L0 as a function of
# the bar. The points are batches.

# %%
bars = torch.logspace(-1.5, 0.8, 200)
curve = [(z[sentence] > bar).sum() / len(sentence) for bar in bars]
points = {}
for name, rows in companies.items():
    batch = keep_batch(z[torch.cat([sentence, rows])], k)
    points[name] = (batch[batch > 0].min(), (text_code[name] > 0).sum() / len(sentence))
figure, (axis,) = picture("L0 of the text against the bar: every batch is a point on one curve.", width=7)
axis.plot(bars, curve, color="#444444", linewidth=1.5, label="the text alone: entries above the bar")
for (name, (bar, value)), marker in zip(points.items(), "v^oD", strict=True):
    axis.plot(bar, value, marker, color=COLOURS["batchtopk"], markersize=10, label=f"beside {name} neighbours")
axis.set(xscale="log", xlabel="the bar: smallest entry kept in the batch", ylabel="L0 of the text (latents per token)")
axis.set_title("Neighbours choose a point on the curve, and nothing else")
axis.legend(frameon=False)
nested = all(bool(((text_code["rich"] > 0) <= (text_code[n] > 0)).all()) for n in ("random", "other random", "poor"))
print("the code beside rich neighbours is contained in all the others:", nested)
figure

# %% [markdown]
# That makes the remedy obvious. If neighbours can move only one number, **fix the number**. Call it θ. Then each
# token's code depends on the token alone, for good. Which number? That is 06.

# %% [markdown]
# ## 7. Batches of one
#
# Suppose you do not fix it, and simply keep cutting by batch when the SAE is in use. Then the batch size becomes a
# setting of your results. People call an SAE on one sentence, or on one token.
#
# ### Exercise 4.8: batches of one
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●○ 4/5 · about 10 minutes · core
# > What a wrong batch size costs, and to which cell of the table it leads.
#
# **Predict first.** With batches of *one* token, which cell of the table in section 3 do you get? Then write the FVU of
# a BatchTopK SAE that cuts by batch, in batches of n consecutive rows of `x` (the last may be smaller).


# %%
def fvu_in_batches(sae: torch.nn.Module, x: Float[Tensor, "tokens d_in"], n: int) -> float:
    """FVU of all tokens of x together, each cut by batch among the n tokens of its batch."""
    ### BEGIN SOLUTION
    x_hat = torch.cat([sae.decode(sae.encode(part, "batch")) for part in x.split(n)])
    return float((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum())
    ### END SOLUTION


# %%
check.small_batches(fvu_in_batches)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# One token with a budget of k: whom does it compete with?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Split, encode each part with `cut="batch"`, decode, join. One FVU for everything, at the end.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `torch.cat([sae.decode(sae.encode(part, "batch")) for part in x.split(n)])`, then the ratio of sums.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 4.8: passed (batches of 25, batches of 50, batches of 16, batches of 1).`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** A batch of one has nobody to share with: its budget of k is the row cut. The larger the batch, the more
# evenly the bar is shared. Usual mistakes: averaging the FVU of batches (a batch of one token has no variance to divide
# by), dropping the last partial batch, and forgetting that a BatchTopK SAE in eval mode cuts by threshold unless it is
# told otherwise.

# %%
sizes = [4**i for i in range(7)]
of_sample = z[sample]
by_size = []
for n in sizes:
    cut_small = torch.cat([keep_batch(part, k) for part in of_sample.split(n)])
    by_size.append(fvu(x[sample], saes["batchtopk"].decode(cut_small)))
by_row = fvu(x[sample], saes["batchtopk"].decode(keep_row(of_sample, k)))
figure, (axis,) = picture("FVU against the size of the batch in which the cut is made.", width=6.5)
axis.plot(sizes, by_size, "^-", color=COLOURS["batchtopk"], label="BatchTopK, cut by batch (L0 = 32)")
axis.axhline(by_row, color="#444444", linestyle=":", label="BatchTopK, cut by row (L0 = 32)")
axis.set(xscale="log", xlabel="tokens in a batch", ylabel="FVU", title="A batch of one is the row cut")
axis.legend(frameon=False)
print("  ".join(f"n = {n}: {value:.3f}" for n, value in zip(sizes, by_size, strict=True)), f"  by row: {by_row:.3f}")
figure

# %% [markdown]
# **What you just saw.** At n = 1 the best cell of the table turns into BatchTopK cut by row: FVU a fifth higher, at the
# same L0. From a few dozen tokens on, FVU forgives; the *codes* do not settle that soon: against batches of 4096, with
# shuffled tokens, 13 % of the entries differ in batches of 16, 7 % in batches of 64 and 4 % in batches of 256
# (`benchmarks/results/lessons/nb04.json`, three seeds). And the tokens of one sentence are no shuffled sample.

# %% [markdown]
# ## 8. A widget of your own
#
# In 03 you moved k at inference and saw each token cut by row. Now build its sibling, for the batch cut. It takes about
# twenty lines, and the pattern is the same for every small widget you will ever want: **a pure function** that makes
# the page from its arguments, **a slider**, and **one line** that joins them.
#
# ### Exercise 4.9: a widget of your own
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●○○ 3/5 · about 20 minutes · core
# > To put your own question under your own hands.
#
# 1. `cut_html(pieces, z, k)` gives an HTML table, one `<tr>` for each token: its text (stripped of blanks, and escaped
#    with `html.escape`, for a token may be `<b>`) in the first `<td>`, the number of entries that the batch cut keeps
#    in the last. Between them whatever you like: a bar, for instance. For a budget of 0, or k above the number of
#    latents, it gives a sentence that says what is wrong, and no table.
# 2. `cut_widget(pieces, z)` gives an `ipywidgets.VBox` of one `IntSlider` or `FloatSlider` for k, which runs from 0 to
#    `z.shape[1] + 1`, and one `ipywidgets.HTML`, whose value follows the slider.
#
# The check moves your slider. Use `keep_batch` from the package.


# %%
def cut_html(pieces: list[str], z: Float[Tensor, "tokens latents"], k: float) -> str:
    """A table of tokens and of how many entries the batch cut keeps of each; a sentence where there is no such cut."""
    ### BEGIN SOLUTION
    if k > z.shape[1]:
        return f"k = {k:g} is more than the {z.shape[1]} latents that there are."
    try:
        counts = (keep_batch(z, k) > 0).sum(dim=1).tolist()
    except ValueError as error:
        return html.escape(str(error))
    rows = []
    for piece, n in zip(pieces, counts, strict=True):
        bar = f'<div style="background:{COLOURS["batchtopk"]};height:0.8em;width:{4 * n}px"></div>'
        rows.append(f"<tr><td><code>{html.escape(piece.strip())}</code></td><td>{bar}</td><td>{n}</td></tr>")
    return f"<table>{''.join(rows)}</table>"
    ### END SOLUTION


def cut_widget(pieces: list[str], z: Float[Tensor, "tokens latents"]) -> ipywidgets.VBox:
    """A slider for k above the page of `cut_html`."""
    ### BEGIN SOLUTION
    slider = ipywidgets.IntSlider(value=4, min=0, max=z.shape[1] + 1, description="k")
    page = ipywidgets.HTML(cut_html(pieces, z, slider.value))

    def redraw(change: dict) -> None:
        page.value = cut_html(pieces, z, change["new"])

    slider.observe(redraw, "value")
    return ipywidgets.VBox([slider, page])
    ### END SOLUTION


# %%
check.widget(cut_html, cut_widget)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Get `cut_html` right first: it can be called and looked at without any widget.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# `slider.observe(redraw, "value")` calls `redraw(change)` whenever the value changes; `change["new"]` is the new value.
# `redraw` sets `page.value`. A test of k comes before the cut; `keep_batch` raises a `ValueError` for a budget of 0,
# which can be caught.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# ```python
# slider = ipywidgets.IntSlider(value=4, min=0, max=z.shape[1] + 1, description="k")
# page = ipywidgets.HTML(cut_html(pieces, z, slider.value))
# slider.observe(lambda change: setattr(page, "value", cut_html(pieces, z, change["new"])), "value")
# return ipywidgets.VBox([slider, page])
# ```
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 4.9: passed (the page at six k, the slider moved six times).`
# </details>
#
# When it passes, try it on the ferry: `cut_widget(data.pieces, strongest)`, with

# %%
strongest = data.z[:, data.z.square().sum(dim=0).argsort(descending=True)[:60]]  # the sentence's 60 strongest latents
print(f"{strongest.shape[0]} tokens, {strongest.shape[1]} latents")

# %% tags=["solution"]
cut_widget(data.pieces, strongest)

# %% [markdown] tags=["solution"]
# **Why so.** All that can go wrong is in the pure function, where it can be tested without a browser. An error inside a
# callback is easily lost, so the callback does one thing only. Usual mistakes: forgetting `observe` (the page stays as
# it is); a callback that raises at k = 0; adding to `page.value` instead of replacing it; unescaped tokens, so that
# `<b>` makes the rest of the table bold.

# %% [markdown]
# ## 9. Fair play
#
# On the shipped SAEs BatchTopK wins: FVU .127 against .138 at L0 = 32. Is that always so? The table has TopK cut by row
# and BatchTopK cut by batch, on held-out text, L0 32.0 everywhere; d_sae 2304, k = 32, SmolLM2-135M after block 15,
# batches of 1024 (`benchmarks/results/lessons/nb04.json` and, for the second line,
# `benchmarks/results/compare-seed0.json` and `compare-seed1.json`). Lowest to highest of the seeds:
#
# | activations seen | TopK | BatchTopK |
# |---:|---:|---:|
# | 99,328 (three seeds) | .262 to .264 | .266 to .281 |
# | 999,424 (two seeds, more held-out text) | .168 to .169 | .160 to .161 |
# | 19,999,744 (one seed, a lower learning rate: the shipped SAEs) | .138 | .127 |
#
# ### Exercise 4.10: fair play
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●○ 4/5 · about 3 minutes · core
# > Which sentence the table allows.
#
# - **a** "BatchTopK reconstructs better than TopK at equal L0."
# - **b** "TopK is the better method; BatchTopK only catches up after a very long training."
# - **c** "On this model, at this width and k, BatchTopK had the lower FVU in runs of a million activations and more,
#   and the higher one in the shortest."
# - **d** "The differences are within the noise between seeds."

# %%
### BEGIN SOLUTION
#: may_be_said = ...  # "a", "b", "c" or "d"
may_be_said = "c"
### END SOLUTION

# %%
check.fair_play(may_be_said)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Which of the sentences has conditions in it?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# A general claim falls with one counterexample in the table.
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# Compare the first line with the last, and the spread of seeds with the gap.
# </details>
#
# Is it the thief again? No: without that one token the first line reads .263 against .267 to .277. Why TopK is ahead at
# first we have not tested. A guess that fits section 4: prices that mean the same at every token have to be learned,
# and until they are, a rule that spends evenly is the safer one. The paper trains for a billion tokens, and finds
# BatchTopK ahead of TopK in most settings (section 4, figures 1 and 2). The authors' code fixes one seed.

# %% [markdown] tags=["solution"]
# **Why so.** The table has one row that contradicts a, and two that contradict b; the seeds of the two SAEs stand apart
# in each of the rows that have more than one, which contradicts d (three and two seeds are few, but the gap of the
# second row is many times their spread). What is left is the sentence with its conditions.

# %% [markdown]
# ### An open question, without a check: a cut that nobody can rob
#
# In section 3 one token took sixteen hundred places. Invent a cut that keeps at most `floor(k * n)` entries, is as flat
# as possible, and cannot be robbed. Then measure the TopK SAE with it on the slice: can you get *below* the FVU of its
# own row cut? (A start: nobody gets more than c places. Which c?)


# %%
def my_cut(z: Float[Tensor, "tokens latents"], k: float) -> Float[Tensor, "tokens latents"]:
    """A flat cut that no single token can rob."""
    ### BEGIN SOLUTION
    return keep_batch(keep_row(z, min(2 * int(k), z.shape[1])), k)  # nobody gets more than twice the mean
    ### END SOLUTION


# %% tags=["solution"]
capped = torch.empty_like(x)
for batch in shuffled.split(4096):
    capped[batch] = saes["topk"].decode(my_cut(saes["topk"].pre_activations(x[batch]), k))
cells = (table["topk", "row"], table["topk", "batch"], fvu(x, capped))
print("TopK at L0 = 32: by row {:.4f}, flat {:.4f}, flat with a cap {:.4f}".format(*cells))

# %% [markdown] tags=["solution"]
# A cap of 2k, applied before the flat cut, takes the TopK SAE to a slightly lower FVU than the cut it was trained with,
# at the same L0. Other good answers: rank entries by z divided by the token's norm (but then short tokens grow
# expensive), or by what each is worth (section 4). None of them removes the coupling between neighbours.

# %%
progress()

# %% [markdown]
# ## Summary
#
# - **The flat cut** keeps the floor(k·n) largest entries of the whole batch: the row cut of one long row. L0 is k on
#   average, and each token spends what its entries are worth: later pieces of words most, white space least.
# - **The gain comes from training under it.** In FVU the flat cut gains the TopK SAE nothing (and loses it nothing, but
#   for one token), while BatchTopK needs it. In CE increase it helps the TopK SAE too. Training makes z a price that
#   means the same at every token.
# - **One token can own a number.** Most of "the flat cut hurts TopK" was one leftover attention sink.
# - **Codes depend on neighbours.** Chosen neighbours change most entries, random ones few. All of it is one number, the
#   bar: codes are nested.
# - **A batch of one is the row cut**, a fifth worse in FVU. In use, the bar must be fixed: θ.
#
# ## Quiz
#
# **1.** A BatchTopK SAE with k = 32 is used, cut by batch, on a text of 10 tokens that is all white space. What is
# its mean L0?
#
# <details><summary>Answer</summary>
#
# 32 (if that many entries are positive). The budget is 32 a token whatever the tokens are; beside other text the same
# white space would get about 15.
# </details>
#
# **2.** Beside company A a text keeps latent 7 of token 3 and not latent 9 of token 5. Can it be the other way round
# beside company B?
#
# <details><summary>Answer</summary>
#
# No. The first says z[3, 7] is above A's bar and z[5, 9] is not, so z[3, 7] > z[5, 9]; beside B it would have to be
# less. Codes are nested.
# </details>
#
# **3.** You cut a TopK SAE flat and its FVU goes up by a tenth at equal L0. What do you look at before you conclude
# anything?
#
# <details><summary>Answer</summary>
#
# Which tokens the error comes from, and which take the budget. Here it was one token; and CE increase had gone down.
# </details>
#
# ## Where this goes wrong in practice
#
# - **Evaluating by batch and calling it inference.** The authors' own code measures CE with the batch cut on 4096
#   tokens (their repository, `logs.py`); what you would deploy is the threshold. Say which cut a number belongs to.
# - **A batch that is not shuffled, or small, or split over devices.** The bar then belongs to one document, one
#   micro-batch, one GPU. With gradient accumulation the budget is that of the micro-batch.
# - **Activations of shape (batch, pos, d).** If only the first dimension is counted as tokens, the budget is off by a
#   factor of pos. SAELens had that fault in its evaluation (pull request 570). The package here flattens all leading
#   dimensions.
# - **Outliers that slip under the mask.** They take hundreds of places from everybody, and unlike here nobody may look.
# - **k as an integer by habit.** `int(k * n)` loses entries to rounding; k = 0.5 is legal, and a budget of 0 is not.
#
# ## What of the paper this covered
#
# Section 3 (BatchTopK, its loss, and why inference needs another cut), section 4 (figures 1 and 2 as far as TopK goes,
# figure 3), and the coupling within a batch, which section 3 names. Not covered: the comparison with JumpReLU, which
# needs 05.
#
# ## Next
#
# BatchTopK ends with one bar for all latents, found by a batch. What if each latent learned a bar **of its own**? A bar
# is a step, and a step has no gradient. **05 JumpReLU** opens with that. If you are on the short path, go on to **06**:
# which number should the bar be, and does it stay where it was put?
