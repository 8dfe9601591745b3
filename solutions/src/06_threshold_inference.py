# %% [markdown]
# # 06 Threshold inference: one bar, and for which text?
#
# Under the batch cut of 04 your neighbours could change your code, by moving one number: the bar. So fix the number.
# Which number should it be, how well do you know it, and does it stay where it was put?
#
# **After this notebook you can**
#
# - make one number θ of the bars of many batches, and prove that another, quite different rule must land beside it;
# - say where the rules part: tiny batches, short runs, and in which direction each goes wrong;
# - predict what a fixed θ does on text that it was not calibrated for, and read L0 beside the error there;
# - put an error bar on θ, and not the one that is a fifth of the truth;
# - show that nothing of 04's attack is left, and hand the SAE on as a JumpReLU SAE, equal bit for bit.
#
# **You need** 04: the flat cut, and the bar. Not 05: what is needed of it are two sentences, in section 1. **Time**:
# about an hour and a half with all six exercises, all of them core. Nothing is trained here. What is said of training
# rests on `benchmarks/results/lessons/nb06.json`.

# %% tags=["setup"]
pass

# %%
import json
import math
from pathlib import Path

import ipywidgets
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tutorial_sae import ActivationStore, calibrate_threshold, heldout_slice, load_model, load_pretrained, load_text
from tutorial_sae.checks import nb06 as check
from tutorial_sae.checks import progress
from tutorial_sae.measures import fvu
from tutorial_sae.plots import COLOURS, picture
from tutorial_sae.saes.base import keep_above, keep_batch
from tutorial_sae.widgets.explorer import explorer, explorer_data, explorer_figure

# %% [markdown]
# | symbol | what it is |
# |---|---|
# | `z` | pre-activations of n tokens, here after the ReLU: `relu((x - b_dec) @ W_enc + b_enc)`, 2304 for each token |
# | `k` | latents per token that the SAE was trained to keep, on average over a batch: 32 |
# | bar | of a batch: the smallest entry that its flat cut keeps |
# | θ (`theta`) | one number in place of the bars; an entry is kept if `z > theta` |
# | L0, FVU | latents kept per token; fraction of the variance of `x` that the reconstruction leaves unexplained |
#
# z and θ are in normalised units, in which an activation has the squared length 576 on average.
#
# Two sets of text, neither of which the SAE was trained on: one to find θ on (the *calibration* text), one to try it
# on (the *held-out* text). Both are mixtures of English Wikipedia, Python code and documentation. Their tokens are
# shuffled here, as they are in training. (The first run harvests these activations, in about half a minute; later runs
# read them from the cache.)

# %%
model = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
heldout = heldout_slice(model)
calibration = ActivationStore(
    model, load_text(split="calibration"), heldout.hook, tokens=16_384, norm_limit=heldout.norm_limit
)
sae = load_pretrained("batchtopk").requires_grad_(False)
k = 32


def encoded(x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens latents"]:
    return torch.cat([sae.pre_activations(part) for part in x.split(2048)])


shuffled = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))
z_in_order = encoded(calibration[:])  # the text as it runs
z = z_in_order[shuffled]
sample = torch.randperm(len(heldout), generator=torch.Generator().manual_seed(1))[:4096]
x_test = heldout[sample]
z_test = encoded(x_test)
print(f"to calibrate on: {len(z):,} tokens; to try it on: {len(z_test):,} tokens; {z.shape[1]} latents, k = {k}")

# %% [markdown]
# ## 1. A bar for each batch, and their mean
#
# Cut the calibration text in 16 batches of 1024 tokens, and note the bar of each. (The package's `calibrate_threshold`,
# given a single batch, finds just that.)

# %%
x_calibration = calibration[shuffled]
theta_shipped = float(sae.threshold)


def calibrated(x: Float[Tensor, "tokens d_in"], n: int = 1024):
    """What `calibrate_threshold` finds; it also sets the SAE's θ, and here that is put back."""
    result = calibrate_threshold(sae, x, batch_size=n)
    sae.threshold.fill_(theta_shipped)
    return result


bars = torch.tensor([calibrated(batch).theta for batch in x_calibration.split(1024)])
figure, (axis,) = picture("The bars of sixteen batches, scattered between 0.80 and 0.87 around their mean.", width=7)
axis.plot(range(1, 17), bars, "^", color=COLOURS["batchtopk"], markersize=9, label="the bar of a batch")
axis.axhline(bars.mean(), color="#444444", linestyle=":", label="their mean")
axis.set(xlabel="batch of 1024 tokens", ylabel="smallest entry kept", title="Each batch has a bar of its own")
axis.set_ylim(0.75, 0.92)
axis.legend(frameon=False)
print(f"bars from {bars.min():.2f} to {bars.max():.2f}, mean {bars.mean():.3f}, standard deviation {bars.std():.3f}")
figure

# %% [markdown]
# > **Why the mean?** The bars differ because batches hold different tokens. None of them is the right one: a token is
# > to be cut as it would be in *some* batch of this kind of text, and nobody knows which. So take what they are on
# > average.
#
# $$\theta = \mathbb{E}_X\left[\,\min\{\, z_{ij}(X) : z_{ij}(X) \text{ is kept} \,\}\right] \qquad
# \text{then keep } z \text{ where } z > \theta$$
#
# This is the paper's rule (Bussmann, Leask and Nanda 2024, section 3: the mean, over batches $X$, of the smallest
# positive value that survives). How many batches, and of which text, it does not say.
#
# A **JumpReLU** SAE has a bar for each latent, learned in training: its code is z where $z > \theta_j$, and 0
# elsewhere. What you are about to make is one of those in which all latents share one θ; that is how the paper puts it,
# too.
#
# ### Exercise 6.1: the mean of the bars
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 12 minutes · core
# > The paper's θ, with the cases that a formula with an E in front leaves open.
#
# - Batches are n consecutive rows of `z`. A last, smaller batch is **left out**: its bar scatters more, and would count
#   as much as the others.
# - A batch in which nothing is positive keeps nothing. It has **no bar**, and is left out too.
#
# Use the package's `keep_batch(z, k)`: z with only what the flat cut keeps, 0 elsewhere.


# %%
def batch_min_mean(z: Float[Tensor, "tokens latents"], k: float, n: int) -> float:
    """The mean, over batches of n tokens, of the smallest entry that the batch cut keeps."""
    ### BEGIN SOLUTION
    smallest = []
    for batch in z[: len(z) // n * n].split(n):
        kept = keep_batch(batch, k)
        if kept.any():
            smallest.append(float(kept[kept > 0].min()))
    return sum(smallest) / len(smallest)
    ### END SOLUTION


# %%
check.bars(batch_min_mean)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# What is the smallest entry of a matrix that is nearly all 0?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# For each batch: cut it, look at the positive entries of the result only, take the smallest. Then one mean over
# batches.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `z[: len(z) // n * n].split(n)` gives the whole batches. In each: `kept = keep_batch(batch, k)`; if `kept.any()`, note
# `kept[kept > 0].min()`.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 6.1: passed (two batches, k = 2.3, batches of one, a last, smaller batch, a batch without positives, few
# positives). 1 of 6 in this notebook.`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** The bar of a batch is the entry that took the last place. Usual mistakes: `kept.min()`, which is 0 in
# every batch; the mean of all that is kept; and the mean of the *rows'* smallest entries, which is the bar of batches
# of one, a different number as section 4 shows.

# %% [markdown]
# The package does the same, writes θ into the SAE, and says what L0 it leads to on the same tokens. The shipped SAE
# came with a θ, from 32,768 other tokens:

# %%
found = calibrated(x_calibration)
theta_mean = float(found.theta)


def at(theta: float, x: Tensor = x_test, z: Tensor = z_test) -> tuple[float, float]:
    """L0 and FVU of x when everything above theta is kept."""
    kept = keep_above(z, theta)
    return float((kept > 0).sum() / len(x)), fvu(x, sae.decode(kept))


print(f"found here: θ = {theta_mean:.3f}, with L0 {found.l0:.1f} on the calibration text")
for name, theta in (("found here", theta_mean), ("shipped", theta_shipped)):
    print("on held-out text, θ {}: L0 {:.1f}, FVU {:.3f}".format(name, *at(theta)))

# %% [markdown]
# Two honest calibrations of the same SAE on the same kind of text, and they differ by 4 %. Keep that number; in
# section 6 you can say where it comes from.
#
# ## 2. Another rule, the same number
#
# Why go through batches at all? What was wanted was k latents per token. So ask for that: put **all** calibration
# tokens in one pool, and choose θ such that k per token lie above it. The package calls this `target_l0`.
#
# ### Exercise 6.2: one pool
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●●○ 4/5 · about 15 minutes · core
# > A second estimator, and the proof that it cannot be far from the first.
#
# Write θ for a pool: a number, at least 0, such that exactly `floor(k * tokens + 1e-6)` entries of z are **strictly**
# above it. If a tie stands at the cut, so that no number does it, keep fewer rather than more, but no fewer than
# necessary. If fewer entries are positive than the budget, all the positive ones are above it.
#
# Then, on paper: cut the same tokens in batches of equal size, and call the lowest of their bars *a* and the highest
# *b*. Assume that no two entries are equal, that k times the batch size is a whole number, and that every batch spends
# its whole budget. **Prove that the smallest entry kept by the pool lies between a and b.**


# %%
def pooled_theta(z: Float[Tensor, "tokens latents"], k: float) -> float:
    """The number above which k entries per token lie, of all tokens together."""
    ### BEGIN SOLUTION
    budget = int(k * len(z) + 1e-6)
    return float(z.flatten().sort(descending=True).values[budget])
    ### END SOLUTION


# %%
check.one_pool(pooled_theta)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# No entry is above itself. So θ may not be the smallest entry that is to be kept.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Sort everything, largest first. The first `budget` entries stay. Which is the next?
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `z.flatten().sort(descending=True).values[budget]`, counted from 0, is the largest entry dropped. For the proof: how
# many entries of one batch are at least as large as *b*? And as *a*?
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 6.2: passed (values, k = 0.5 of three tokens, k = 2.3, many tokens, a tie at the cut, fewer positives than
# the budget).`
# </details>
# <details><summary>The proof</summary>
#
# Every batch has exactly its budget of entries at or above its own bar, and the budgets add up to the pool's. Count
# entries at or above *b*: no bar is higher than b, so no batch has more of them than its budget, and all batches
# together have at most the pool's budget. So the pool's cut is not above b. Count entries at or above *a*: no bar is
# lower, so every batch has at least its budget of them, and together they are at least the pool's budget. So the pool's
# cut is not below a. ∎
# </details>
#
# **What you just saw.** Of all n · `d_sae` entries of the pool, the share k / `d_sae` lies above θ. A number with a
# given share of a list above it has a name: it is a **quantile**, here the 1 − k / `d_sae` quantile of z, zeros
# included. So `target_l0` is not merely close to the quantile, it is the quantile; and the mean of the bars, which also
# lies between a and b, is never further from it than the bars scatter.

# %% [markdown] tags=["solution"]
# **Why so.** The largest entry dropped is the smallest number that works; anything from there up to, but not including,
# the smallest entry kept does as well. With a tie at the cut the same expression keeps none of the tied entries, which
# is what was asked. Usual mistakes: index `budget - 1` (with a strict `>` one entry is lost), a quantile of the
# positive entries only (the share k / `d_sae` counts zeros too), and the mean of the rows' own cuts.


# %%
def bars_of(z: Float[Tensor, "tokens latents"], n: int) -> Float[Tensor, " batches"]:
    """The bars of all whole batches of n tokens at once: each laid out as one long row, and its k * n largest."""
    largest = z[: len(z) // n * n].reshape(-1, n * z.shape[1]).topk(k * n, dim=1, sorted=False).values
    return torch.where(largest > 0, largest, torch.inf).amin(dim=1)


values = z[z > 0].sort().values
theta_pool = float(values[-k * len(z) - 1])
few = z[:4096].flatten()  # torch.quantile takes no more than 16 million numbers
print(f"lowest bar {bars.min():.4f} <= pool {theta_pool:.4f} <= highest bar {bars.max():.4f}")
print(f"mean of the bars of batches of 1024: {theta_mean:.4f}, of 4096: {bars_of(z, 4096).mean():.4f}")
quantile = float(torch.quantile(few, 1 - k / z.shape[1]))
print(f"of 4096 tokens: pool {float(few[few > 0].sort().values[-k * 4096 - 1]):.4f}, quantile {quantile:.4f}")

# %% [markdown]
# They scatter by several hundredths, and their mean is a few ten-thousandths from the pool. That is closer than the
# proof promises. One more step explains it, and will be needed again.
#
# > **Why so close, and off in which direction?** Move every batch from its own bar to the pool's. A batch whose bar was
# > lower loses the entries between the two, one whose bar was higher gains some. The pool spends the same total, so
# > losses and gains are **equally many entries**. If entries lie equally densely on both sides, then the *distances*
# > balance too, and the mean of the bars is the pool's bar. If they are sparser on the low side, the low bars lie
# > further down, and the mean is too low; if on the high side, too high.


# %%
def sides(n: int) -> list[tuple[int, float]]:
    """For the bars below the pool's and those above it: entries between the two, and the bars' distances, summed."""
    own = bars_of(z, n)
    batches = z[: len(own) * n].reshape(len(own), -1)
    lost = ((batches >= own[:, None]) & (batches <= theta_pool)).sum(dim=1)
    gained = ((batches < own[:, None]) & (batches > theta_pool)).sum(dim=1)
    distance, low = (own - theta_pool).abs(), own <= theta_pool
    return [(int(lost[low].sum()), float(distance[low].sum())), (int(gained[~low].sum()), float(distance[~low].sum()))]


def show_sides(*sizes: int) -> None:
    print("tokens in    thousand entries between    entries per token and    mean of the bars")
    print("a batch      the two: low       high       .1 of z: low   high     less the pool's")
    for n in sizes:
        (lost, down), (gained, up) = sides(n)
        dense = (lost / down / n / 10, gained / up / n / 10)
        off = (up - down) / (len(z) // n)
        between = (lost / 1000, gained / 1000)
        print("{:<13}{:>12.1f}{:>11.1f}{:>19.1f}{:>7.1f}{:>19.4f}".format(n, *between, *dense, off))


show_sides(64, 1024)

# %% [markdown]
# ## 3. Short runs: an average with a memory
#
# Libraries do not wait until training is over. They keep θ while they train, as a **moving average** of the bars: after
# each step, `average = decay * average + (1 - decay) * bar`. SAELens starts its average at 0, with a decay of .99;
# dictionary_learning waits for 1000 steps, copies the bar of that step, and goes on with .999; until then its θ is −1.
#
# ### Exercise 6.3: an average with a memory
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●○ 4/5 · about 12 minutes · core
# > To recognise a run that was too short for its θ.
#
# 1. Write the moving average that starts at 0. After t bars the start still has the weight `decay ** t`; with
#    `corrected=True`, divide in the end by what the bars' weights sum to, as Adam does with its moments.
# 2. A run of **100 steps** saved its θ like that: from 0, decay .99, no correction. You load the SAE and evaluate it.
#    What do you see, compared with a θ that was calibrated properly?
#    - **a** L0 below k, and a larger FVU.
#    - **b** L0 above k, and a *smaller* FVU.
#    - **c** L0 near k, but a larger spread between batches.
#    - **d** Nothing: after 100 steps the average has forgotten its start.


# %%
def moving_average(bars: Float[Tensor, " steps"], decay: float, corrected: bool) -> float:
    """The moving average of the bars, oldest first, from 0; with or without the correction of its start."""
    ### BEGIN SOLUTION
    average = 0.0
    for bar in bars.tolist():
        average = decay * average + (1 - decay) * bar
    return average / (1 - decay ** len(bars)) if corrected else average
    ### END SOLUTION


### BEGIN SOLUTION
#: what_you_see = ...  # "a", "b", "c" or "d"
what_you_see = "b"
### END SOLUTION

# %%
check.memory(moving_average, what_you_see)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# On which side of the bars does the average lie, as long as it remembers its start?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# The weights of the bars are (1 − decay) · decayⁱ, and sum to 1 − decay ** t. The rest of the weight lies on 0. For the
# letter: a bar that is too low lets *more* through. What do more latents do to the error?
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# A loop over `bars.tolist()`; in the end `average / (1 - decay ** len(bars))` if corrected.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 6.3: passed (decay 0.5, decay 0.99, decay 0.9; too low, and FVU hides it).`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** With all bars near θ the average after t steps is about (1 − .99ᵗ) θ: 63 % of it after 100 steps, 95 %
# after 300. Too low a bar keeps too much, so L0 is too high, and the error *falls*: whoever looks at FVU alone sees an
# improvement. Usual mistakes: dividing at every step inside the loop (the correction then feeds back), one step too few
# in the exponent, and starting from the first bar, which is another remedy with another memory.

# %% [markdown]
# The average on this SAE, whose bars do not drift any more, with L0 and FVU on held-out text beside it:

# %%
pot = bars_of(z, 256)
draws = pot[torch.randint(len(pot), (400,), generator=torch.Generator().manual_seed(2))]
steps = torch.arange(1, 401)
weights = 0.99 ** (steps[:, None] - steps[None, :]) * (steps[:, None] >= steps[None, :]) * 0.01
raw = weights @ draws
mended = raw / (1 - 0.99**steps)
figure, axes = picture("The average starts at 0 and is near the bars only after 300; corrected, at once.", 2, 4.4)
axes[0].plot(steps, draws, ".", color="#bbbbbb", markersize=3, label="bars")
axes[0].plot(steps, raw, color=COLOURS["topk"], label="average from 0")
axes[0].plot(steps, mended, color=COLOURS["batchtopk"], label="corrected")
axes[0].set(
    xlabel="batches seen (256 tokens each)", ylabel="θ", title="The start is remembered for long", ylim=(0, 1.1)
)
axes[0].legend(frameon=False, loc="lower right")
marked = [10, 30, 100, 200, 400]
for t in marked:
    print("after {:>3} batches: θ {:.2f}, L0 {:.0f}, FVU {:.3f}".format(t, float(raw[t - 1]), *at(float(raw[t - 1]))))
for line, colour, style in ((raw, COLOURS["topk"], "o-"), (mended, COLOURS["batchtopk"], "o--")):
    axes[1].plot(marked, [at(float(line[t - 1]))[0] for t in marked], style, color=colour)
axes[1].axhline(k, color="#444444", linestyle=":")
axes[1].set(
    xlabel="batches seen", ylabel="L0 on held-out text", title="Too low a bar keeps too much (dotted: k)", ylim=(0, 100)
)
figure

# %% [markdown]
# In a real run the bars do drift, and then memory hurts in the *other* direction too. These are small BatchTopK SAEs,
# trained for 150 or 1000 steps (1152 latents, 256 tokens a step, three seeds; `benchmarks/results/lessons/nb06.json`):

# %%
lesson = json.loads(Path("../benchmarks/results/lessons/nb06.json").read_text(encoding="utf-8"))
runs = lesson["training"]
ways = {"from 0, decay .99": "#0072B2", "from the first bar, decay .999": "#009E73", "calibrated afterwards": "#D55E00"}
figure, axes = picture("Bars over 150 and 1000 steps of training, and what three rules leave as the threshold.", 2, 4.6)
for axis, count in zip(axes, (150, 1000), strict=True):
    for seed in lesson["seeds"]:
        line = runs["bars"][f"{count}, seed {seed}"]
        axis.plot(
            np.linspace(0, count, len(line)), line, color="#999999", linewidth=1, label="bar of the step" * (not seed)
        )
    for place, (way, colour) in zip((1.03, 1.06, 1.09), ways.items(), strict=True):
        ends = [row["theta"] for row in runs["rows"] if (row["steps"], row["way"]) == (count, way)]
        axis.plot([count * place] * len(ends), ends, "o", color=colour, label=way)
    axis.set(xlabel="step", title=f"{count} steps", ylim=(0, 2.6))
axes[0].set_ylabel("bar, or θ at the end")
axes[1].legend(frameon=False, fontsize=8)
print(f"{'steps':<7}{'θ kept as':<34}{'L0, three seeds':<22}FVU")
for count in (150, 1000):
    for way in dict.fromkeys(row["way"] for row in runs["rows"]):
        mine = [row for row in runs["rows"] if (row["steps"], row["way"]) == (count, way)]
        l0s, errors = ([row[key] for row in mine] for key in ("l0", "fvu"))
        print(f"{count:<7}{way:<34}{min(l0s):>6.1f} to {max(l0s):<12.1f}{min(errors):.3f} to {max(errors):.3f}")
figure

# %% [markdown]
# The bars start high and fall while the SAE learns. So one rule ends too low and another too high, in the same run.
# After 150 steps the average from 0 still remembers its 0 (L0 41); the one from the first bar, with its long memory,
# still remembers the beginning of training (L0 14 to 15). After 1000 steps the short memory is cured, the long one is
# not: a decay of .999 *is* a memory of 1000 steps. And a placeholder of −1 keeps whatever is positive. Calibrating
# afterwards gives 31.5 to 31.7 in all six runs. Look at the column of FVU once more: whatever keeps too much looks
# *better*.
#
# ("From 0" is the rule of SAELens 6.18; the wait until step 1000 is that of dictionary_learning, August 2025, whose
# average we also started without the wait, "from the first bar". The runs are ours, half as wide as the shipped SAE and
# short on purpose: a run many times longer than the memory forgets its start.)
#
# ## 4. Tiny batches
#
# The second place where the rules part. On calibration text, for batches of 1 to 4096 tokens; once with shuffled
# tokens, once with the text as it runs:

# %%
sizes = [4**i for i in range(7)]
by_size = {
    name: [float(bars_of(part, n).mean()) for n in sizes] for name, part in (("shuffled", z), ("in order", z_in_order))
}
figure, axes = picture("θ and L0 against the batch size; with single tokens θ is lowest and L0 highest.", 2, 4.4)
print(f"{'tokens in a batch':<15}", "".join(f"{n:>8}" for n in sizes).removeprefix("  "))
for (name, thetas), style in zip(by_size.items(), ("^-", "v--"), strict=True):
    l0s = [float((len(values) - torch.searchsorted(values, theta, right=True)) / len(z)) for theta in thetas]
    axes[0].plot(sizes, thetas, style, color=COLOURS["batchtopk"], label=f"tokens {name}")
    axes[1].plot(sizes, l0s, style, color=COLOURS["batchtopk"], label=f"tokens {name}")
    print(f"{name:<10}{'θ':<4}", "".join(f"{theta:>8.3f}" for theta in thetas))
    print(f"{'':<10}{'L0':<4}", "".join(f"{value:>8.1f}" for value in l0s))
axes[0].axhline(theta_pool, color="#444444", linestyle=":", label="the pool")
axes[1].axhline(k, color="#444444", linestyle=":", label="k")
for axis, label in zip(axes, ("θ, the mean of the bars", "L0 at this θ, same tokens"), strict=True):
    axis.set(xscale="log", xlabel="tokens in a batch", ylabel=label)
    axis.set_xticks(sizes, map(str, sizes))
    axis.minorticks_off()
    axis.legend(frameon=False)
axes[0].set_title("One token a batch: too low")
axes[1].set_title("... and too many latents")
figure

# %% [markdown]
# With single tokens θ is 4 to 5 % too low and L0 1.4 too high. With four shuffled tokens it is a little too **high**.
# (`benchmarks/results/calibration.json` has other SAEs, and batches of text in order: too low, the more so the smaller
# the batch.) So the direction is no law of nature. The table of section 2 says what decides it:

# %%
show_sides(1, 4)

# %% [markdown]
# (At n = 1 the two numbers of entries are not quite the same: a token with fewer than 32 positive entries does not
# spend its budget.) To be sure that you have understood it, build a world in which single tokens go wrong the other
# way, and by a lot.
#
# ### Exercise 6.4: break the mean of the bars
# > Difficulty: ●●●●○ 4/5 · Importance: ●●●○○ 3/5 · about 20 minutes · core
# > If you can make it fail on purpose, you know what it assumes.
#
# Here is a world in which batches of one give θ far too **low** at k = 4: a quarter of the tokens has many entries
# between 1 and 2, the others have only small ones.


# %%
def too_low(n: int) -> Float[Tensor, "n 64"]:
    """Pre-activations of n fresh tokens: a few have nearly all that is large."""
    rich = torch.rand(n, 1) < 0.25
    return torch.where(rich, 1 + torch.rand(n, 64), 0.1 * torch.rand(n, 64))


def l0_in(world, n: int, k: int = 4) -> float:
    """L0 on fresh tokens of a world, with θ from the mean of the bars of batches of n others."""
    kept = [keep_batch(batch, k) for batch in world(2048).split(n)]
    theta = torch.stack([part[part > 0].min() for part in kept]).mean()
    return float((world(2048) > theta).sum() / 2048)


_ = torch.manual_seed(0)
print(f"k = 4: L0 {l0_in(too_low, 1):.0f} with θ from single tokens, {l0_in(too_low, 512):.1f} from batches of 512")

# %% [markdown]
# Build one in which batches of one give θ too **high**: L0 at most 3.2 on fresh tokens, while batches of 512 find L0 =
# 4 within a tenth. Entries are never negative, and every call draws n new tokens (`torch.rand` and its kin).


# %%
def too_high(n: int) -> Float[Tensor, "n 64"]:
    """Pre-activations of n fresh tokens, of which single tokens give a bar that is too high on average."""
    ### BEGIN SOLUTION
    dear = torch.rand(n, 1) < 0.5
    few_and_large = (torch.arange(64) < 5) * (8 + torch.rand(n, 64))
    return torch.where(dear, few_and_large, torch.rand(n, 64))
    ### END SOLUTION


# %%
check.too_high(too_high)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# The mean is too high if entries are sparser on the high side. What is the sparsest there is?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Give some tokens a very high bar (their 4th largest entry), and hardly an entry more than these. They pull the mean
# up, and have nothing with which to fill the budget. The others, with many small entries, are what the pool's cut must
# reach down to.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# Draw `dear = torch.rand(n, 1) < 0.5`. A dear token has five entries near 8 and zeros otherwise; any other has 64
# entries from `torch.rand`. `torch.where(dear, ..., ...)` joins them.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 6.4: passed (on fresh tokens θ from batches of one gives L0 2.5..., θ from batches of 512 gives 4.0...).`
# Your numbers are those of your world.
# </details>
#
# **What you just saw.** The mean of the bars is a fair estimate while bars scatter little, which large batches see to.
# With small ones it goes wrong in a direction that the shape of the data decides, and no constant corrects it. The pool
# has no such trouble: it never looks at batches.

# %% [markdown] tags=["solution"]
# **Why so.** A dear token's bar is about 8, another's about .95; their mean, 4.5, is above everything that ordinary
# tokens have. So only the dear ones keep anything, five each: L0 2.5. The pool gives each dear token its five and
# ordinary ones three, with θ about .96. It also works without two kinds of token: with entries of a very heavy tail,
# `1 / torch.rand(n, 64)`, the mean of the bars is pulled up by the few tokens whose fourth largest is enormous. Usual
# mistakes: tokens with fewer than four positive entries and nobody to take their places (then large batches do not
# find L0 = 4 either), and the opposite direction.

# %% [markdown]
# ## 5. θ belongs to its text
#
# θ was found on a mixture of English Wikipedia, code and documentation. It is a number in the file of the SAE; nothing
# stops you from using it elsewhere.
#
# ### Exercise 6.5: the same θ in French
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 4 minutes · core
# > To have an opinion on shifted text before the table has one.
#
# The shipped SAE at its shipped θ has L0 near 32 on its mixture. How many latents a token on held-out **Python code**
# alone, and how many on the introductions of **French** Wikipedia, a language that the SAE has hardly seen?
#
# - **a** About 32 on both: that is what θ was calibrated for.
# - **b** About 32 on code, which is in the mixture; far fewer on French, which no latent has learned.
# - **c** Fewer than 32 on code, about twice 32 on French.
# - **d** More than 32 on code, next to none on French.

# %%
### BEGIN SOLUTION
#: l0_elsewhere = ...  # "a", "b", "c" or "d"
l0_elsewhere = "c"
### END SOLUTION

# %%
check.in_french(l0_elsewhere)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# θ fixes the height of the bar. What does it say about the number of entries above it?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# What happens to a vector that no latent was made for: does it meet no latent's direction, or a little of very many?
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# In 04, which kind of text had the lower L0 under one bar? And 2304 directions in 576 dimensions leave no vector alone.
# </details>

# %%
french = ActivationStore(
    model, load_text("embedded/fr", split="heldout"), heldout.hook, tokens=4096, norm_limit=heldout.norm_limit
)
x_french = french[:]
z_french = encoded(x_french)
names = {"wikipedia": "Wikipedia", "code": "code", "documentation": "documentation"}
kinds = [names[heldout.context(int(i)).source.split(":")[0].split("/")[0].split()[0]] for i in sample]
parts = {name: torch.tensor([kind == name for kind in kinds]) for name in names.values()}
texts = {name: (x_test[mine], z_test[mine]) for name, mine in parts.items()}
texts |= {"all three": (x_test, z_test), "French": (x_french, z_french)}
shift = {}
print(f"{'':<15}{'tokens':>7}{'θ':>8}{'L0':>7}{'FVU':>8}{'own θ':>11}{'L0':>7}{'FVU':>8}")
for name, (x_part, z_part) in texts.items():
    own = float(z_part[z_part > 0].sort().values[-k * len(z_part) - 1])
    shift[name] = [theta_shipped, *at(theta_shipped, x_part, z_part), own, *at(own, x_part, z_part)]
    print("{:<15}{:>7}{:>8.2f}{:>7.1f}{:>8.3f}{:>11.2f}{:>7.1f}{:>8.3f}".format(name, len(x_part), *shift[name]))

# %%
figure, axes = picture(
    "At one θ, L0 and FVU by kind of text; French keeps 65 latents and has the largest error.", 2, 4.6
)
for axis, at_shipped, at_own, label in ((axes[0], 1, 4, "L0 (latents per token)"), (axes[1], 2, 5, "FVU")):
    places = np.arange(len(shift))
    axis.bar(places - 0.2, [row[at_shipped] for row in shift.values()], 0.38, color="#D55E00", label="shipped θ")
    axis.bar(places + 0.2, [row[at_own] for row in shift.values()], 0.38, color="#56B4E9", label="θ of its own")
    axis.set_xticks(places, ["docs" if name == "documentation" else name for name in shift], fontsize=9)
    axis.set(ylabel=label, title="Who keeps how much" if at_own == 4 else "... and what it buys")
    axis.legend(frameon=False, loc="upper left")
axes[0].axhline(k, color="#444444", linestyle=":")
figure

# %% [markdown]
# **What you just saw.** "L0 = 32" holds for *no single kind* of text, only for a mixture (and for this one the shipped
# θ gives 30.5: section 6). French gets twice as many
# latents and still has nearly twice the error: vectors that no latent was made for meet a little of very many. You
# could calibrate on French, and would have your 32 latents, with an error nearly half as large again. Neither is the
# "right" L0. Which one you want depends on what the number is for: to compare two SAEs at equal L0 on French,
# recalibrate both; to use one SAE on a stream of all kinds of text, keep one θ, and report L0 *and* error for each
# kind. (Spanish, measured the same way: L0 64, FVU .247; `benchmarks/results/lessons/nb06.json`.)

# %% [markdown] tags=["solution"]
# **Why so.** The letter is c. Code spends less than the mixture's mean and Wikipedia more, as in 04 under a common bar.
# French surprises: one expects silence from latents that do not know it. But a pre-activation is an inner product with
# a direction, and a vector off all learned directions has middling products with many of them; the encoder's bias cuts
# away only what training taught it to. Usual mistake: taking L0 near 32 as a sign that θ "works" on some text, or far
# from it as a sign that it does not, without the error beside it.

# %% [markdown]
# ## 6. How well do you know θ?
#
# `calibrate_threshold` also gives a `spread`, the standard deviation of the bars. The mean of B bars is known better
# than one bar: spread / √B. Here with 16 batches of 1024:

# %%
for name, part in (("shuffled", z), ("in order", z_in_order)):
    sixteen = bars_of(part, 1024)
    print(f"tokens {name}: spread {sixteen.std():.3f}, so θ = {sixteen.mean():.3f} ± {sixteen.std() / 4:.3f}")
print(f"shipped θ {theta_shipped:.3f}, from other documents: {theta_shipped - theta_mean:+.3f}")

# %% [markdown]
# Same tokens, same θ, and two error bars, one four times the other. Which one is honest? Shuffled batches all contain
# the same documents, so they agree with each other, whatever documents those happen to be. What you want to know is how
# θ would differ with *other documents*. A batch of text in order is 1024 tokens, about eight rows of text of up to 127
# tokens each; the next one has eight others. A bootstrap says the same: draw rows of text with replacement, 20 times,
# and θ has a standard deviation of .026; draw single tokens, and it is .005 (`benchmarks/results/lessons/nb06.json`).
#
# In units that matter: near here .01 of θ is about a third of a latent per token. So θ from these 16,384 tokens leaves
# L0 open by about one latent, up or down. That is where the 4 % between the two calibrations of section 1 belongs:
# other documents, other shares of Wikipedia and code. Against it, the choice of estimator (with batches of 64 and more)
# is nothing. **More documents help; a cleverer formula does not.**
#
# ## 7. A widget: θ under your hands
#
# Everything so far was about one slider. Here it is, with five values of θ marked on it; C is the middle one of the
# bars that section 9 lets every latent learn for itself. As in 03, the work is in pure functions; the callback only
# assigns. It must move at once, so nothing is encoded while it moves: one **table**, made once. Codes at different θ
# are nested (04), so from one θ to the next lower one only the entries in between have to be added to the
# reconstruction.


# %%
def table_of(x: Tensor, z: Tensor, thetas: Tensor) -> tuple[list[float], list[float]]:
    """L0 and FVU of x at each of the thetas, which rise: sort the entries once, then add them in bands."""
    token, latent = z.nonzero(as_tuple=True)
    value, order = z[token, latent].sort(descending=True)
    token, latent = token[order], latent[order]
    left = (x - sae.decode(torch.zeros_like(z))) / sae.norm_scale  # nothing kept yet; in normalised units
    variance = float((x - x.mean(dim=0)).square().sum()) / float(sae.norm_scale) ** 2
    start, l0s, errors = 0, [], []
    for theta in thetas.flip(0).tolist():
        end = int((value > theta).sum())
        for band in torch.arange(start, end).split(50_000):
            left.index_add_(0, token[band], -value[band, None] * sae.W_dec[latent[band]])
        start = end
        l0s.append(end / len(x))
        errors.append(float(left.square().sum()) / variance)
    return l0s[::-1], errors[::-1]


thetas = torch.logspace(math.log10(0.1), math.log10(3), 60)
l0s, errors = table_of(x_test, z_test, thetas)

one_bar = {
    "A: mean of the bars": theta_mean,
    "B: target_l0, the pool": theta_pool,
    "C: learned, the latents' median": lesson["learned"][0]["theta_p1_p50_p99"][1],
    "D: moving average from 0, 100 batches": float(raw[99]),
    "E: target_l0 on French": shift["French"][3],
}


def look_up(theta: float) -> tuple[float, float]:
    """L0 and FVU at theta, read from the table, on a logarithmic scale of theta."""
    at_log, marks = math.log(theta), thetas.log()
    return float(np.interp(at_log, marks, l0s)), float(np.interp(at_log, marks, errors))


# %% [markdown]
# The table against the slow way, and the static figure:

# %%
for theta in (0.3, theta_shipped, 1.6):
    quick, slow = look_up(theta), at(theta)
    assert abs(quick[0] - slow[0]) < 0.3
    assert abs(quick[1] - slow[1]) < 0.002
    print("θ = {:.2f}: L0 {:.1f}, FVU {:.3f}".format(theta, *slow))

figure, (axis,) = picture(
    "L0 falls and FVU rises with θ; the estimators are marked on the curve of L0.", width=7.6, height=3.8
)
axis.plot(thetas, l0s, color=COLOURS["batchtopk"], linewidth=2, label="L0 (left)")
axis.set(xscale="log", xlabel="θ", ylabel="L0 (latents per token)", title="One slider: what θ keeps, and what is lost")
other = axis.twinx()
other.plot(thetas, errors, "--", color=COLOURS["topk"], linewidth=2, label="FVU (right)")
other.set_ylabel("FVU")
other.spines["right"].set_visible(True)
for name, theta in one_bar.items():
    height = look_up(theta)[0]
    axis.plot(theta, height, "o", color="#444444")
    shift_by = {"A": (-4, -16), "B": (8, -4), "C": (4, 8)}.get(name[0], (6, 6))
    axis.annotate(name[0], (theta, height), textcoords="offset points", xytext=shift_by)
axis.set_xticks([0.1, 0.2, 0.5, 1, 2, 3], ["0.1", "0.2", "0.5", "1", "2", "3"])
figure.legend(loc="outside lower center", ncols=2, frameon=False)
print("  ".join(one_bar))
figure


# %%
def page(theta: float) -> str:
    """What the widget shows at this theta: L0, FVU, a scale with the estimators on it, and how far each is away."""
    l0, error = look_up(theta)

    def place(t: float) -> float:
        return 600 * (math.log(t) - math.log(0.1)) / math.log(30)

    ticks = "".join(
        f'<line x1="{place(t):.0f}" x2="{place(t):.0f}" y1="{12 * (1 + i % 3)}" y2="60" stroke="#444"/>'
        f'<text x="{place(t) + 3:.0f}" y="{12 * (1 + i % 3) + 8}" font-size="12">{name[0]}</text>'
        for i, (name, t) in enumerate(one_bar.items())
    )
    mark = f'<rect x="{place(theta) - 3:.0f}" y="46" width="6" height="26" fill="{COLOURS["batchtopk"]}"/>'
    said = f"θ = {theta:.3f}: L0 {l0:.1f} latents per token, FVU {error:.3f}"
    line = f'<path d="M0 60H600" stroke="#444"/>{ticks}{mark}'
    scale = f'<svg width="620" height="76" role="img" aria-label="{said}">{line}</svg>'
    rows = "".join(
        "<tr><td>{}</td><td>{:.3f}</td><td>{:.1f}</td><td>{:.3f}</td></tr>".format(name, t, *look_up(t))
        for name, t in one_bar.items()
    )
    head = "<tr><th>estimator</th><th>θ</th><th>L0</th><th>FVU</th></tr>"
    return f"<p><b>{said}</b></p>{scale}<table>{head}{rows}</table>"


slider = ipywidgets.FloatLogSlider(value=theta_shipped, base=10, min=-1, max=0.47, step=0.005, description="θ")
view = ipywidgets.HTML(page(slider.value))


def redraw(change: dict) -> None:
    view.value = page(change["new"])


slider.observe(redraw, "value")

# %% tags=["nbval-ignore-output"]
ipywidgets.VBox([slider, view])

# %% [markdown]
# (Arrow keys move the slider. Where you see no widget, the figure above shows the same.) The callback, called by hand:

# %%
slider.value = 0.5
assert "θ = 0.500: L0 4" in view.value
slider.value = theta_mean
assert view.value == page(theta_mean)
print(page(1.0).split("</b>")[0].removeprefix("<p><b>"))

# %% [markdown]
# Look for the *lowest FVU*. It is not at the θ of any estimator: FVU falls all the way to the left end, where the SAE
# keeps almost three times what it was trained to keep. θ is not chosen by the error. It is chosen by L0.
#
# ## 8. The attack again
#
# In 04 a text's code changed by most of its entries when other neighbours sat beside it. Same text, same neighbours,
# fixed θ.
#
# ### Exercise 6.6: the attack again
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 10 minutes · core
# > To measure a zero, and to know that the instrument would have shown something else.
#
# Write the share of the text's entries that differ between two batches: the text followed by the neighbours `one`, and
# the text followed by the neighbours `other`. Of the entries kept in *either*, how many are kept in only one of the
# two? `sae.encode(x, cut)` takes the name of the cut. All are raw activations.
#
# **Predict first.** By batch: 04 had 88 % with chosen neighbours. By threshold?


# %%
def share_moved(
    sae: torch.nn.Module,
    text: Float[Tensor, "tokens d_in"],
    one: Float[Tensor, "some d_in"],
    other: Float[Tensor, "others d_in"],
    cut: str,
) -> float:
    """The share of the text's entries that depends on which neighbours sit beside it."""
    ### BEGIN SOLUTION
    beside_one = sae.encode(torch.cat([text, one]), cut)[: len(text)] > 0
    beside_other = sae.encode(torch.cat([text, other]), cut)[: len(text)] > 0
    return float((beside_one != beside_other).sum() / (beside_one | beside_other).sum())
    ### END SOLUTION


# %%
check.attack_again(share_moved)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Which rows of a batch's code belong to the text?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Encode two batches, keep the first `len(text)` rows of each, compare where they are positive.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `a = sae.encode(torch.cat([text, one]), cut)[: len(text)] > 0`, and `b` with `other`; then `(a != b).sum()` over
# `(a | b).sum()`.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 6.6: passed (by batch, by row, by threshold, an SAE with a fault, which makes its threshold leak). 6 of 6 in
# this notebook.`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** Only rows of the text count, and only entries that are kept somewhere. Because codes are nested (04), the
# two numbers of entries would be enough: 1 − smaller / larger. By row and by threshold nothing moves, for different
# reasons: by row each token competes with itself, by threshold with nobody. Usual mistakes: leaving `cut` out (in eval
# mode the SAE then cuts by threshold, and the attack seems to fail), and comparing the neighbours' rows too.

# %% [markdown]
# On held-out text: the first 24 tokens of one row, beside the poorest and beside the richest tokens of the others:

# %%
row_of = torch.tensor([heldout.place(int(i))[0] for i in range(4096)])
text = heldout[torch.arange(len(row_of))[row_of == 3][:24]]
elsewhere = torch.tensor([row_of.max() < heldout.place(int(i))[0] for i in sample]).nonzero().squeeze(1)
wealth = (z_test[elsewhere] > theta_shipped).sum(dim=1).argsort(stable=True)
poor, rich = x_test[elsewhere[wealth[:104]]], x_test[elsewhere[wealth.flip(0)[:104]]]
for cut in ("batch", "threshold"):
    codes = [sae.encode(torch.cat([text, beside]), cut)[: len(text)] for beside in (poor, rich)]
    a, b = (code > 0 for code in codes)
    l0 = [float((code > 0).sum() / len(text)) for code in codes]
    moved = float((a != b).sum() / (a | b).sum())
    print(f"by {cut:<10} L0 beside poor {l0[0]:5.1f}, beside rich {l0[1]:5.1f}; moved {moved:.0%} of the entries")
alone = torch.cat([sae.encode(token[None]) for token in text])
print("each token alone keeps the same entries as in the batch:", torch.equal(alone > 0, b))

# %% [markdown]
# Over 40 texts the batch cut moved 88 % of the entries on average, and θ moved 0 of 29,679
# (`benchmarks/results/lessons/nb06.json`). One grain of salt: matrix products of different sizes round differently in
# the last place, so an entry that lies within a millionth of θ might fall to either side. None did.
#
# The explorer of 00 and 04, with θ as it stands in the file. Choose other neighbours; follow the threshold's column.

# %%
ours = "The ferry to Rothesay leaves the harbour at seven, in any weather."
company = {
    "poor": ">>> x = 1\n" * 18,
    "rich": "Kowalczyk, Oyelaran, Vaszary, Thorvaldsen, Mbeki, Quispe, Nakamura, Szymborska and Achterberg met in "
    "Guimaraes, Szeged, Oaxaca, Trondheim, Ouagadougou and Bialystok to fund glaciology, oenology and numismatics.",
}
data = explorer_data(model, sae, ours, neighbours=company)
explorer(data)

# %%
explorer_figure(data, neighbours="rich")

# %% [markdown]
# ## 9. Is one bar a limit?
#
# One θ for 2304 latents: surely some of them would like a bar of their own? The package can ask them.
# `calibrate_threshold(method="learned")` starts every latent at θ, freezes all weights, and lets the bars learn, by the
# estimator that JumpReLU SAEs are trained with (05), under a penalty that holds L0 at k.
#
# **Predict first.** 98 % of the learned bars end between .75 and 1.3 times what one bar was (`nb06.json`). At *equal
# L0* on held-out text, by how much does FVU fall: by a tenth, by a hundredth, not at all?

# %%
print(f"{'calibrated on':<26}{'L0, both':>9}{'FVU, one bar':>15}{'FVU, learned':>15}")
for row in lesson["learned"]:
    pair = (row["learned"]["l0"], row["one"]["fvu"], row["learned"]["fvu"])
    print("{:<26}{:>9.1f}{:>15.4f}{:>15.4f}".format(f"{row['tokens']:,} tokens, draw {row['seed']}", *pair))

# %% [markdown]
# Not at all: it *rises*, by a ten-thousandth, in all three draws (each three quarters of the calibration text's rows;
# the one bar set so that held-out L0 is the same to the last entry; `nb06.json`). One bar is no limit **here**. That
# fits 04, where the last place was worth about the same at every token: this SAE was trained under one bar for all, so
# its encoder has learned to say everything in terms of it. It does not say that learned bars are useless: in an SAE
# that is *trained* with them, they are part of what the encoder adapts to (05). And it was one way to learn them, 200
# steps with frozen weights. Others report that with one θ some latents fire too much and others too little (Chanin and
# Garriga-Alonso, *Sparse but Wrong*, section 4.2), a question about single latents that FVU does not answer.
#
# ## 10. Handing it on
#
# With θ fixed, nothing about this SAE is "batch" any more. `to_jumprelu()` copies θ to every latent.

# %%
jump = sae.to_jumprelu()
print(
    type(jump).__name__, "with", jump.threshold.numel(), "thresholds, of which different:", len(jump.threshold.unique())
)
equal = [torch.equal(f(sae), f(jump)) for f in (lambda s: s.encode(x_test), lambda s: s(x_test))]
print("codes equal bit for bit:", equal[0], "- reconstructions:", equal[1])

# %% [markdown]
# It *is* a JumpReLU SAE: any code that can use one of those can use this one, and needs to know nothing of batches.
# What has changed for the tokens, compared with training? L0 of each held-out token by batch (of 4096) and by θ:

# %%
by_batch, by_theta = ((sae.encode(x_test, cut) > 0).sum(dim=1) for cut in ("batch", "threshold"))
figure, axes = picture(
    "L0 per token by batch and by threshold: nearly the same distribution, tokens near a line.", 2, 4.4
)
for counts, cut, colour, style in ((by_batch, "batch", "#0072B2", "-"), (by_theta, "threshold", "#D55E00", "--")):
    edges = np.arange(0, 136, 5)
    axes[0].stairs(
        np.histogram(counts, edges)[0] / len(counts), edges, color=colour, linestyle=style, label=f"by {cut}"
    )
axes[0].set(xlabel="L0 of a token", ylabel="share of tokens (bins of 5)", title="The same spread of budgets")
axes[0].legend(frameon=False)
axes[1].plot(by_batch, by_theta, ".", color="#D55E00", markersize=3, alpha=0.4)
axes[1].plot([0, 130], [0, 130], color="#444444", linewidth=0.8)
axes[1].set(xlabel="L0 by batch", ylabel="L0 by threshold", title="Token by token", xlim=(0, 130), ylim=(0, 130))
for counts, cut in ((by_batch, "batch"), (by_theta, "threshold")):
    low, high = torch.quantile(counts.float(), torch.tensor([0.01, 0.99])).tolist()
    print(f"by {cut:<10} mean L0 {counts.float().mean():.1f}, 1 % to 99 %: {low:.0f} to {high:.0f}")
figure

# %% [markdown]
# Tokens spend what they are worth, as before. (Most points lie a little below the line: the shipped θ, from other
# documents, is a little higher than these would give, as in sections 5 and 6.) What is gone is the promise about the
# total: by batch the mean is 32.0 whatever you put in; by θ it is what the text makes of it.

# %%
progress()

# %% [markdown]
# ## Summary
#
# - **θ is the mean of the batches' bars** (the paper's rule); the pool's θ, `target_l0`, is the 1 − k / `d_sae`
#   quantile of z. Where each batch has a whole budget and spends it, the pool's cut lies between the lowest bar and the
#   highest, and near their mean where entries are equally dense on both sides.
# - **They part** with tiny batches (the direction belongs to the data: you have built both), and in short runs, where
#   an average remembers its start.
# - **θ belongs to its text.** At one θ Wikipedia, code and French keep 44, 26 and 65 latents a token. Read L0 beside
#   the error.
# - **The error bar of θ** comes from documents, not from tokens: shuffling hides it.
# - **Nothing moves** under θ, a bar for each latent gains nothing on this SAE, and the export is a JumpReLU SAE, bit
#   for bit.
#
# ## Quiz
#
# **1.** A colleague's BatchTopK SAE (k = 32) has L0 46 in use, and a wonderful FVU. What do you ask first?
#
# <details><summary>Answer</summary>
#
# Where its θ comes from: perhaps a moving average from 0 that was stopped early. Then on which text L0 was measured.
# At L0 46 its FVU must not be compared with others at 32.
# </details>
#
# **2.** You calibrate with batches of 4096 shuffled tokens, and `spread` is tiny. May you write θ = .834 ± .005?
#
# <details><summary>Answer</summary>
#
# As a statement about these documents. With other documents of the same kind it moves five times as much.
# </details>
#
# **3.** With `target_l0` on 10,000 tokens, is the L0 at θ exactly k on *those* tokens? And on others?
#
# <details><summary>Answer</summary>
#
# On those, yes (up to ties and to rounding the budget down). On others it is whatever they have above θ.
# </details>
#
# ## Where this goes wrong in practice
#
# - **The θ of a run that was shorter than its average's memory.** Recalibrate after training: it takes seconds, and
#   needs no gradients. In a run that never reached the step at which its average begins, θ may be a placeholder such as
#   −1: then everything positive is kept.
# - **Calibrating on training batches, and on one kind of text.** The paper does not say which data. State yours.
# - **`>=` for `>`.** In float32 it hardly matters; in low precision values repeat, and a tie at θ is an everyday event.
# - **θ rounded to the precision of the weights.** A bfloat16 θ is up to .4 % off; the package keeps it in
#   float32.
# - **Comparing SAEs at "k = 32"** when one is cut by batch and the other by θ on text where that gives 44.
# - **Normalisation outside the SAE.** θ is in normalised units. Scale the activations differently, and θ is another
#   number in the same place.
#
# ## What of the paper this covered
#
# Section 3 of Bussmann, Leask and Nanda 2024 (arXiv 2412.06410): θ, and inference as a JumpReLU SAE with one threshold.
# Not in the paper, and measured here: which estimator, how many batches, other text, error bars. (The authors' own
# repository evaluates by batch; for the threshold they point to dictionary_learning.)
#
# ## Next
#
# You now have SAEs of five kinds that give the same code for the same token, whoever sits beside it, and each comes
# with an L0 and an FVU. In this notebook a *wrong* θ had the better FVU. **Which numbers would have told you, and which
# flatter?** That is **07**.
