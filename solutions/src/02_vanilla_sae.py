# %% [markdown]
# # 02 A vanilla SAE: a penalty
#
# A sparse autoencoder rewrites an activation as a short list of latents. This notebook builds the oldest kind from
# its parts: nobody says how many latents a token may use, there is only a price on using them. The price is called
# L1. It works, and it has two faults that the following notebooks are about.
#
# **Afterwards you will be able to**
#
# - write encode, decode, the loss and the projected gradient, and put them together into a training loop;
# - say why the decoder's rows must have length 1, by cheating the penalty yourself;
# - read two curves that fight, and tell a run that cheats from one that started too cold;
# - measure how much too short an L1 SAE's reconstructions are, prove by how much, and say whether its error comes
#   from the **choice** of latents or from their **values**.
#
# **You need** PyTorch, and notebook 01 for what an activation is. **Time:** about 75 minutes, nine exercises (eight
# core).

# %% tags=["setup"]
pass

# %%
import json
import time
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tutorial_sae import VanillaSAE, heldout_slice, load_model, load_pretrained
from tutorial_sae.checks import nb02 as check
from tutorial_sae.checks import progress
from tutorial_sae.measures import fvu, refit, shrinkage
from tutorial_sae.plots import COLOURS, NAMES, picture
from tutorial_sae.pretrained import manifest

# %% [markdown]
# ## 1. Two maps and a relu
#
# | symbol | shape | what it is |
# |---|---|---|
# | `x` | (tokens, d_in) | activations, normalised: mean 0, and the mean of $\|x\|^2$ is `d_in` |
# | `W_enc`, `b_enc` | (d_in, d_sae), (d_sae,) | the encoder |
# | `W_dec`, `b_dec` | (d_sae, d_in), (d_in,) | the decoder: **a row of `W_dec` is the direction of one latent** |
# | `z` | (tokens, d_sae) | pre-activations, `relu((x - b_dec) @ W_enc + b_enc)` |
# | latents, $f$ | (tokens, d_sae) | what is kept of `z`. Here: all of it |
# | `x_hat` | (tokens, d_in) | the reconstruction, `latents @ W_dec + b_dec` |
# | `l1` | a number | the price of a latent, for each unit of its size |
# | L0 | a number | how many latents are above 0, for the mean token |
#
# A *feature* is a property of the data; a *latent* is a unit of the SAE. In the picture of this course, one matrix
# and different cuts, the vanilla SAE is the one whose cut is called **own**: each entry of `z` survives on its own
# merit, by being positive.
#
# The activations are those of notebook 01: 16,384 of SmolLM2-135M after block 15, on text that no SAE here has seen.

# %%
model = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
x_raw = heldout_slice(model)[:]
mean = x_raw.mean(dim=0)
scale = ((x_raw - mean).square().sum(dim=1).mean() / x_raw.shape[1]).sqrt()
x = (x_raw - mean) / scale
print(tuple(x.shape), f"mean of |x|^2: {x.square().sum(dim=1).mean():.1f}")

# %% [markdown]
# > **Why subtract `b_dec` first?** The decoder adds `b_dec` to everything it builds, so `b_dec` is what the SAE says
# > about a token of which it knows nothing. The encoder should look at what is left after that: `x - b_dec`.
#
# ### Exercise 2.1: encode and decode
#
# > Difficulty: ●○○○○ 1/5 · Importance: ●●●●● 5/5 · about 5 minutes · core
# > Two lines that every SAE of this course shares.


# %%
def encode(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"],
) -> Float[Tensor, "tokens d_sae"]:
    """The latents: relu((x - b_dec) @ W_enc + b_enc)."""
    ### BEGIN SOLUTION
    return ((x - b_dec) @ W_enc + b_enc).relu()
    ### END SOLUTION


def decode(
    latents: Float[Tensor, "tokens d_sae"], W_dec: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, " d_in"]
) -> Float[Tensor, "tokens d_in"]:
    """The reconstruction: a sum of decoder rows, each times its latent, plus b_dec."""
    ### BEGIN SOLUTION
    return latents @ W_dec + b_dec
    ### END SOLUTION


# %%
check.encode_decode(encode, decode)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Write the shapes beside each other: (tokens, d_in) times (d_in, d_sae). A bias adds itself to every row.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Off with `b_dec`, through `W_enc`, on with `b_enc`, and only then the relu. The decoder has no relu at all.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `((x - ...) @ ... + ...).relu()` and `latents @ ... + ...`
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 2.1: passed (both ways, two tokens, ten tokens, ...)`
# </details>
#
# **What you just saw.** That is the whole model. Everything else in this course is about which entries survive, and
# about how the four tensors are found.

# %% [markdown] tags=["solution"]
# **Why so.** The encoder asks each latent how much of it is in `x`, the decoder adds up directions. Usual mistakes:
# `b_dec` not taken off (then the two do not agree about where zero is), `b_enc` after the relu (then no latent can
# learn to stay silent for small values), a relu in the decoder (activations are negative as often as positive).

# %% [markdown]
# ## 2. A price on latents
#
# With 2304 latents for 576 numbers, a perfect reconstruction is easy, and worthless: all latents on, all the time. We
# want few of them on. The honest penalty would be L0, the *number* of latents that are on.
#
# > **Why L1 and not L0?** A count does not change when a latent moves from 0.31 to 0.30, so its gradient is 0
# > wherever it exists, and training gets no hint. L1 charges for *size* instead: 0.30 is cheaper than 0.31, all the
# > way down to 0. It is the nearest price that has a slope. Remember the swap: we wanted to charge for number and we
# > charge for size. Section 6 presents the bill.
#
# $$\text{loss} = \text{mean over tokens of}\quad \|x - \hat x\|^2 + s \cdot l_1 \cdot \sum_i f_i$$
#
# (BatchTopK paper, section 2, writes it as $\lambda S(f)$.) The factor $s$ is for later: it is 1 except at the start
# of a run.
#
# ### Exercise 2.2: the loss
#
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 5 minutes · core
# > Sums and means: half of all SAE code that cannot be compared differs here.
#
# The squared error is **summed** over dimensions, the penalty is **summed** over latents, and both are **averaged**
# over tokens.


# %%
def sae_loss(
    x: Float[Tensor, "tokens d_in"],
    x_hat: Float[Tensor, "tokens d_in"],
    latents: Float[Tensor, "tokens d_sae"],
    l1: float,
    strength: float,
) -> Float[Tensor, ""]:
    """Squared error + strength * l1 * (sum of the latents), the mean over tokens."""
    ### BEGIN SOLUTION
    error = (x - x_hat).square().sum(dim=1).mean()
    return error + strength * l1 * latents.sum(dim=1).mean()
    ### END SOLUTION


# %%
check.loss(sae_loss)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Do one token first: two sums. Then think about what happens with many tokens.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# `.sum(dim=1).mean()` twice. Latents are never negative, so their L1 norm is their sum.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `(x - x_hat).square().sum(dim=1).mean() + ... * latents.sum(dim=1).mean()`
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 2.2: passed (..., two strengths, a gradient)`
# </details>
#
# **What you just saw.** One number in the loss decides how sparse the SAE is. What L0 does `l1 = 2` give? Nobody can
# tell from the formula. Keep that.

# %% [markdown] tags=["solution"]
# **Why so.** Some code takes the mean of the squared error over dimensions as well. Nothing is wrong with that, but
# its `l1` is then 576 times smaller than ours for the same SAE: a coefficient without its loss says nothing. Usual
# mistakes: `.mean()` over everything; a sum over tokens, so that a larger batch is a larger loss; `.item()`, after
# which there is nothing to differentiate.

# %% [markdown]
# ## 3. The penalty can be cheated
#
# The penalty charges for the size of the latents. It does not charge for the size of the decoder.
#
# ### Exercise 2.3: cheat the penalty
#
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●○ 4/5 · about 8 minutes · core
# > You will pay a tenth for the same reconstruction.
#
# **Predict first.** Is there a limit to how small the penalty can be made without changing a single reconstruction?


# %%
def cheated(
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    s: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Other weights (W_enc, b_enc, W_dec, b_dec): the same x_hat for every x, and an L1 penalty s times smaller."""
    ### BEGIN SOLUTION
    return W_enc / s, b_enc / s, W_dec * s, b_dec
    ### END SOLUTION


# %%
check.cheat(cheated)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# A latent reaches the reconstruction only as a product: latent times decoder row.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Make every latent `s` times smaller and every row `s` times longer. What does `relu(v / s)` equal?
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# Everything inside the relu is divided by `s`, both `W_enc` and `b_enc`; `W_dec` is multiplied; `b_dec` meets no
# latent.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 2.3: passed (the same reconstructions, a penalty s times smaller: ...)`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** relu(v / s) = relu(v) / s for s > 0, so the factor passes through to the decoder and cancels there.
# Usual mistakes: `b_enc` left as it was (the relu then cuts elsewhere), and `b_dec` scaled along.

# %% [markdown]
# On the shipped vanilla SAE, which was trained with its rows held at length 1:

# %%
vanilla = load_pretrained("vanilla")
part = x_raw[:2048]
with torch.no_grad():
    honest = vanilla.loss(part)
    for s in (2.0, 10.0):
        thief = load_pretrained("vanilla")
        thief.W_enc /= s
        thief.b_enc /= s
        thief.W_dec *= s
        stolen = thief.loss(part)
        print(f"s = {s:4.1f}: penalty {honest.penalty:.1f} -> {stolen.penalty:.1f}", end=", ")
        print(f"FVU {honest.fvu:.3f} -> {stolen.fvu:.3f}, L0 unchanged: {bool((stolen.l0 - honest.l0).abs() < 0.05)}")

# %% [markdown]
# **What you just saw.** There is no limit. Gradient descent finds this by itself if it may: lengthening the decoder
# lowers the loss, so it lengthens the decoder, the penalty melts away and latents come back. Two cures are in use:
#
# - rows of **length 1**, restored after every step (Towards Monosemanticity, 2023). This is what we do;
# - rows of any length, and a penalty that is multiplied by it, $\sum_i f_i \|W_{dec,i}\|$ (Anthropic's update of
#   April 2024; `VanillaSAE(..., decoder_norm="weighted")`). Look back at the cheat: which of its two factors does
#   this price cancel?
#
# ### Exercise 2.4: project the gradient
#
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●○○ 3/5 · about 8 minutes · core
# > A step should turn a row, and not lengthen it.
#
# > **Why, if the rows are made length 1 afterwards anyway?** The part of the gradient along the row is undone at
# > once, but Adam has seen it: it goes into the running averages, and they set the size of the next steps. So it is
# > taken out before Adam looks.
#
# With $g$ the gradient of a row and $w$ the row, of length 1, keep $g - (g \cdot w)\,w$, for each row by itself.


# %%
def project(grad: Float[Tensor, "d_sae d_in"], W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae d_in"]:
    """The gradient without what points along the decoder's rows, which have length 1."""
    ### BEGIN SOLUTION
    along = (grad * W_dec).sum(dim=1, keepdim=True)
    return grad - along * W_dec
    ### END SOLUTION


# %%
check.projection(project)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# How much of `g` points along `w`? One number for each row.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# `(grad * W_dec).sum(dim=1, keepdim=True)` are those numbers, as a column. Each is to be multiplied with its row.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `grad - (...) * W_dec`. Afterwards the inner product of each row with its gradient must be 0: try it.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 2.4: passed (..., a gradient along its rows)`
# </details>
#
# **What you just saw.** A step at right angles to a row of length 1 lengthens it only in second order: a step of size
# 0.01 makes it 1.00005. What little is left is divided away after the step.

# %% [markdown] tags=["solution"]
# **Why so.** It is Pythagoras: the part along `w` is $(g \cdot w) w$, the rest stands at right angles. Usual
# mistakes: `dim=0` (that projects columns, and no latent lives in a column), one product for the whole matrix, and
# `grad -= ...`, which changes the caller's tensor.

# %% [markdown]
# ## 4. The loop
#
# Now the parts together. `VanillaSAE` has them as methods, and each is what you wrote: `sae.loss` is 2.1 and 2.2,
# `sae.project_decoder_grad` is 2.4, `sae.normalize_decoder` divides the rows by their lengths. The loop around them
# has an order that matters: the gradient is projected **before** Adam steps, the rows are renewed **after**.
#
# For a short run, about half a minute on two cores, we take half the width of the shipped SAEs, and learn from seven
# eighths of the slice.
# (The slice is held out from the *shipped* SAEs; ours may learn from it, as long as it is judged on the rest.)

# %%
order = torch.randperm(len(x_raw), generator=torch.Generator().manual_seed(0))
learn, judge = x_raw[order[:14_336]], x_raw[order[14_336:]]


def train_by_hand(l1: float, *, steps: int = 150, n: int = 256, lr: float = 3e-3, warmup: float = 0.2, seed: int = 0):
    sae = VanillaSAE(x_raw.shape[1], 1152, l1=l1, seed=seed)
    sae.fit_normalization(learn)
    adam = torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.9, 0.99))
    draw = torch.Generator().manual_seed(seed)
    history = []
    for step in range(steps):
        batch = learn[torch.randint(len(learn), (n,), generator=draw)]
        strength = min(1.0, (step + 1) / max(1, warmup * steps))  # the penalty's warm-up
        for group in adam.param_groups:  # the learning rate falls to 0 over the last fifth
            group["lr"] = lr * min(1.0, 5 * (steps - step) / steps)
        loss = sae.loss(batch)
        adam.zero_grad()
        (loss.mse + strength * loss.penalty).backward()
        sae.project_decoder_grad()  # before the step
        adam.step()
        sae.normalize_decoder()  # after it
        if step % 5 == 4:  # on 512 activations that it does not learn from
            with torch.no_grad():
                seen = sae.eval().loss(judge[:512])
                sae.train()
            history.append({"seen": (step + 1) * n, "fvu": float(seen.fvu), "l0": float(seen.l0)})
    return sae.eval(), history


# %% tags=["nbval-ignore-output"]
start = time.perf_counter()
mine, history = train_by_hand(l1=3.0)
with torch.no_grad():
    mine_l0, mine_fvu = float((mine.encode(judge) > 0).sum(dim=1).float().mean()), fvu(judge, mine(judge))
print(f"{time.perf_counter() - start:.0f} s; on tokens it has not seen: L0 {mine_l0:.1f}, FVU {mine_fvu:.3f}")

# %%
assert 15 < mine_l0 < 80
assert 0.25 < mine_fvu < 0.55

# %%
figure, (left, right) = picture("FVU and L0 against activations seen; the warm-up is shaded.", columns=2)
seen = [line["seen"] / 1000 for line in history]
for axis, key, label in ((left, "fvu", "FVU"), (right, "l0", "L0 (latents per token)")):
    axis.plot(seen, [line[key] for line in history], "o-", color=COLOURS["vanilla"], linewidth=1.8, markersize=3)
    axis.axvspan(0, 0.2 * seen[-1], color="#bbbbbb", alpha=0.35, linewidth=0)
    axis.text(0.22 * seen[-1], 0.04, "warm-up ends", transform=axis.get_xaxis_transform(), fontsize=8)
    axis.set(xlabel="activations seen (thousands)", ylabel=label)
right.set(yscale="log", title="What is spent")
right.set_yticks([50, 100, 200, 500], ["50", "100", "200", "500"])
right.minorticks_off()
left.set_title("What is lost")
figure

# %% [markdown]
# FVU is the fraction of variance left unexplained: 0 is perfect, 1 is no better than the mean. Watch the two
# quantities fight. At first the penalty is weak: hundreds of latents are on, and the error falls. As the penalty
# rises, L0 is squeezed and the error is driven up again. Then the directions get better, and both improve together.
# At fixed `l1` the fight ends in a truce. Where, the formula does not say.
#
# ### Exercise 2.5: four runs
#
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●●○ 4/5 · about 8 minutes · core
# > Diagnosing a run from its curves, before looking at its code.
#
# Four runs, of 150,000 activations each, from `benchmarks/results/lessons/nb02.json`. Two are as they should be, and
# differ in `l1`. One had **no warm-up**: the whole penalty from the first step. One had its **decoder free**: nothing
# kept its rows at length 1. The third panel shows the mean size of a latent that is on, which is what the penalty
# charges for each. Which run is which?

# %%
results = json.loads(Path("../benchmarks/results/lessons/nb02.json").read_text(encoding="utf-8"))

runs = {letter: results["runs"][i] for letter, i in zip("ABCD", (2, 7, 8, 4), strict=True)}  # recipes: after the check
styles = {"A": ("#0072B2", "-"), "B": ("#D55E00", "--"), "C": ("#009E73", "-."), "D": ("#7f7f7f", ":")}
figure, axes = picture("L0, FVU and mean size of an active latent in four runs A to D.", columns=3, width=3.7)
panels = (
    ("L0 (latents per token)", lambda line, l1: line["l0"]),
    ("FVU", lambda line, l1: line["fvu"]),
    ("mean size of an active latent", lambda line, l1: line["penalty"] / l1 / line["l0"]),
)
for axis, (label, value) in zip(axes, panels, strict=True):
    for name, run in runs.items():
        colour, dashes = styles[name]
        seen = [line["tokens"] / 1000 for line in run["history"]]
        values = [value(line, run["l1"]) for line in run["history"]]
        axis.plot(seen, values, dashes, color=colour, label=name, linewidth=1.8)
    axis.set(xlabel="activations seen (thousands)", title=label)
axes[0].set_yscale("log")
axes[0].set_yticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
axes[0].minorticks_off()
axes[0].legend(frameon=False, ncols=2)
figure

# %%
### BEGIN SOLUTION
#: cheats = ...  # "a", "b", "c" or "d": its decoder was free
#: no_warm_up = ...  # and this one had no warm-up
cheats = "c"
no_warm_up = "b"
### END SOLUTION

# %%
check.four_runs(cheats, no_warm_up)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# All four begin alike: without training, half of all latents are on. Where do they part?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Without warm-up: cut down at once, and far. With a free decoder: rows get longer, so latents stay small, the price
# of one falls, and more of them are worth it.
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# A and C part late. In the third panel, whose latents stop growing? Of B and D, whose L0 falls below 1?
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 2.5: passed (C ...; B ...)`
# </details>

# %%
for name, run in runs.items():
    print(f"{name}: {run['recipe']:<13} l1 = {run['l1']:.0f}  L0 {run['l0']:5.1f}  FVU {run['fvu']:.3f}", end="  ")
    print(f"mean length of a decoder row {run['decoder_norm']:.2f}, latents that never fire {run['dead']:.0%}")
assert [run["recipe"] for run in runs.values()] == ["warm-up", "no warm-up", "free decoder", "warm-up"]

# %% [markdown]
# **What you just saw.** Held-out numbers of the four runs. At the same `l1`, the cheat keeps more latents than A,
# because each costs about half: its rows have grown. The lesson for practice: look at the decoder's lengths before
# you believe a penalty. B and D have the same `l1` too; the only difference is the first fifth of the run. D has
# more latents that never fire than B, 54% against 6%; why was not measured.

# %% [markdown] tags=["solution"]
# **Why so.** C and A have the same `l1` and part when C's rows begin to grow: its latents can stay small. B never had
# a time in which latents could find their directions before they had to be few; its FVU of 1 says that for a while it
# knew no more than the mean. Usual mistake: to take D for the cold run because it ends with few latents. Few at the
# end is what a high `l1` is for.

# %% [markdown]
# ## 5. A coefficient without a meaning
#
# What L0 does an `l1` give? The only way to know is to train. Here is what five values gave in runs like those above,
# with warm-up and without, two seeds each.

# %%
figure, (left, right) = picture("L0 against l1, and FVU against L0, with and without warm-up.", columns=2)
for recipe, marker, filled in (("warm-up", "o", True), ("no warm-up", "X", False)):
    chosen = [run for run in results["runs"] if run["recipe"] == recipe]
    look = {"marker": marker, "s": 48, "color": COLOURS["vanilla"] if filled else "#444444", "label": recipe}
    left.scatter([run["l1"] for run in chosen], [run["l0"] for run in chosen], alpha=0.8, **look)
    right.scatter([run["l0"] for run in chosen], [run["fvu"] for run in chosen], alpha=0.8, **look)
left.axhline(32, color="#444444", linestyle=":", linewidth=1)
left.text(7.9, 34, "L0 = 32", ha="right", fontsize=8)
left.set(xlabel="l1", ylabel="L0 (latents per token)", yscale="log", title="What an l1 gives is found by trying")
right.set(xlabel="L0 (latents per token)", ylabel="FVU", xscale="log", title="The price of being sparse")
right.legend(frameon=False)
figure

# %%
for recipe in ("warm-up", "no warm-up"):
    for l1 in sorted({run["l1"] for run in results["runs"] if run["recipe"] == recipe}):
        found = [run for run in results["runs"] if (run["recipe"], run["l1"]) == (recipe, l1)]
        l0s, errors = [f"{run['l0']:.1f}" for run in found], [f"{run['fvu']:.3f}" for run in found]
        print(f"{recipe:<11} l1 = {l1:.0f}: L0 {' and '.join(l0s):<16} FVU {' and '.join(errors)}")

# %% [markdown]
# Two things to read off. **Doubling `l1` does not halve L0**: there is no exchange rate. And **warm-up matters where
# the penalty is strong**: at `l1 = 2` it makes next to no difference here; at 5 and at 8 the cold runs end with fewer
# latents and a larger error. In the right panel they lie only a little above the line of the others: what the cold
# start ruins is above all the L0 that you aimed at.
#
# ### Exercise 2.6: what an l1 gives
#
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●○ 4/5 · about 5 minutes · core
# > A prediction that you can check a few cells further down.
#
# In the sweep, `l1 = 2` gave an L0 of a little over 60. The shipped vanilla SAE was trained with nearly the same `l1`,
# 2.12, but with **twice as many latents** and on **more than thirty times as many** activations. What is its L0,
# roughly?
#
# - (a) about 130: twice the latents, twice as many on
# - (b) about 65: the price is the same
# - (c) about 30
# - (d) about 4

# %%
### BEGIN SOLUTION
#: answer = ...  # "a", "b", "c" or "d"
answer = "c"
### END SOLUTION

# %%
check.what_l1_gives(answer)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# The price is the same. Are the goods the same?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Better directions explain more with fewer latents; both width and training make directions better.
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# In your own curves above, what did L0 do after the warm-up was over?
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 2.6: passed (an l1 belongs to ...)`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** `l1` sets what a latent must be worth to be kept, not how many are worth it. That number depends on how
# good the directions are, and so on width, data, learning rate and length of training. Usual mistake: to copy an `l1`
# from a paper. Even with the same loss, the L0 that comes with it will be another.

# %% [markdown]
# Beside the shipped vanilla SAE, two others for comparison: **Gated**, in which a gate decides which latents are on
# and only the gate pays the penalty (section 8 explains Gated), and **TopK**, which keeps the `k` largest
# pre-activations of a token (03 is about TopK). Gated saw the same 5 million activations as vanilla.

# %%
made = manifest()["saes"]
saes = {name: load_pretrained(name) for name in ("vanilla", "gated", "topk") if name in made}
few = x_raw[:4096]
codes, hats = {}, {}
with torch.no_grad():
    for name, sae in saes.items():
        codes[name] = sae.encode(few)
        hats[name] = sae.decode(codes[name])
        l0 = (codes[name] > 0).sum(dim=1).float().mean()
        print(f"{NAMES[name]:<8} L0 {l0:.1f}  FVU {fvu(few, hats[name]):.3f}", end="")
        print(f"  ({made[name]['tokens_seen'] / 1e6:.0f} million activations seen)")

# %% [markdown]
# So a target such as "32 latents" means a search: train, look, correct, train again. TopK (notebook 03) replaces the
# search by a number that you set. And at about equal L0, the vanilla SAE has the largest error. Against TopK, part
# of that may be that it has seen fewer activations; Gated saw no more of them than vanilla, and 7 has a pair of
# vanilla and TopK that was trained alike. Most of it is something else.
#
# ## 6. The bill: shrinkage
#
# We charged for size although we meant number. What does a single latent do about that? Take one direction of length
# 1, and a token that holds the amount $a$ of it. The latent's value $f \ge 0$ may be chosen freely. The loss is $(a -
# f)^2 + l_1 f$.
#
# ### Exercise 2.7: one latent, by hand
#
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●●● 5/5 · about 10 minutes · core
# > Two lines of calculus that explain most of what is wrong with L1.
#
# **Predict first.** With `l1 = 2`, and 3 units of the direction in the token: what does the latent say?


# %%
def best_value(a: Float[Tensor, " n"], l1: float) -> Float[Tensor, " n"]:
    """For each a, the f >= 0 that makes (a - f)^2 + l1 * f smallest."""
    ### BEGIN SOLUTION
    return (a - l1 / 2).relu()
    ### END SOLUTION


# %%
check.one_latent(best_value)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Differentiate by $f$ and set to 0. Then ask what happens where the solution is negative.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# $-2(a - f) + l_1 = 0$. Below 0 the parabola only rises to the right, so the best allowed value is 0.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `(a - ...).relu()`
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 2.7: passed (large, small, negative; ...)`
# </details>

# %%
a = torch.linspace(-1, 4, 201)
figure, (axis,) = picture("A latent's value against the amount in the token: L1 takes l1/2 off.", width=5.6)
axis.plot(a, a.relu(), color="#444444", linestyle=":", label="what is there")
axis.plot(a, (a - 1).relu(), color=COLOURS["vanilla"], linewidth=2, label="what an L1 latent says (l1 = 2)")
axis.annotate("", (3, 2), (3, 3), arrowprops={"arrowstyle": "->", "color": "#444444"})
axis.text(3.07, 2.4, "l1 / 2", fontsize=9)
axis.set(xlabel="a, the amount in the token", ylabel="f, the latent", title="The toll that every latent pays")
axis.legend(frameon=False)
figure

# %% [markdown]
# **What you just saw.** The penalty does two jobs with one knob: it decides (below $l_1/2$ a latent is off), and it
# takes the toll $l_1/2$ from each latent that is on, large or small. The first is what we wanted. The second is
# called **shrinkage**.
#
# Does that hold in a trained SAE, with 2304 latents at odd angles? There is a short proof that it must, on average.
# At the end of training the gradient of `b_enc[i]` is 0. Only tokens on which latent $i$ is on contribute to it, and
# each contributes $l_1 - 2\, e \cdot d_i$, with $e = x - \hat x$ the error and $d_i$ the decoder row. So over those
# tokens
#
# $$\text{mean of}\quad e \cdot d_i = l_1 / 2 .$$
#
# Every latent leaves $l_1/2$ of *its own direction* in the error: it could do better by just being larger, and is
# paid not to. Without a penalty the same argument gives 0. Let us look, at every latent that fires at least 32 times
# on these 4,096 tokens, and at Gated and TopK beside it (section 8 explains Gated; 03 is about TopK).

# %%
left_over = {}
with torch.no_grad():
    for name, sae in saes.items():
        error = (few - hats[name]) / sae.norm_scale  # in normalised units, in which l1 is
        on = codes[name] > 0
        sums, counts = ((error @ sae.W_dec.T) * on).sum(dim=0), on.sum(dim=0)
        left_over[name] = (sums / counts)[counts >= 32]
        print(f"{NAMES[name]:<8} median {left_over[name].median():.2f}", end="")
        print(f", and l1 / 2 is {sae.l1 / 2:.2f}" if name == "vanilla" else "")

# %%
figure, (axis,) = picture("Histogram over latents of the error's part along their own direction.", width=6.4)
for name, values in left_over.items():
    look = {"histtype": "step", "linewidth": 1.8, "color": COLOURS[name], "label": NAMES[name]}
    axis.hist(values.tolist(), bins=60, range=(-0.5, 2), **look)
axis.axvline(saes["vanilla"].l1 / 2, color="#444444", linestyle=":", label="l1 / 2 of the vanilla SAE")
axis.set(
    xlabel="mean of e · d over the tokens on which the latent is on",
    ylabel="latents",
    title="What latents leave of themselves",
)
axis.legend(frameon=False, fontsize=9)
figure

# %% [markdown] tags=["solution"]
# **Why so (2.7).** The minimum of $f^2 - (2a - l_1) f$ lies at $f = a - l_1/2$; if that is negative, at the edge $f =
# 0$. Usual mistakes: forgetting the 2 of the square (then `l1` comes off, not half of it), no edge, and the answer to
# another question: with $l_1 f^2$ values shrink in proportion and are never exactly 0, which is why L2 makes nothing
# sparse.

# %% [markdown]
# ### Exercise 2.8: how much too short?
#
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●○ 4/5 · about 8 minutes · core
# > One number for the shrinkage of a whole SAE.
#
# The Gated paper (Rajamanoharan et al. 2024, section 4.2) measures
#
# $$\gamma = \frac{E\,\|\hat x\|^2}{E\,[\hat x \cdot x]},$$
#
# the factor $1/\gamma$ is what one would multiply $\hat x$ with to bring it closest to $x$. Below 1: too short.
#
# > **Why centre first?** The mean activation is long, and every SAE gets it right through `b_dec`. Left in, it makes
# > any $\gamma$ look like 1. So subtract the mean of `x` from **both** `x` and `x_hat`.


# %%
def gamma(x: Float[Tensor, "tokens d_in"], x_hat: Float[Tensor, "tokens d_in"]) -> float:
    """E|x_hat|^2 / E[x_hat . x], of vectors less the mean of x."""
    ### BEGIN SOLUTION
    centre = x.mean(dim=0)
    c, c_hat = x - centre, x_hat - centre
    return float(c_hat.square().sum() / (c_hat * c).sum())
    ### END SOLUTION


# %%
check.how_short(gamma)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# One mean, taken from `x`, subtracted twice.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# E is a mean over tokens, above and below the line, so the numbers of tokens cancel: a sum divided by a sum.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `c_hat.square().sum() / (c_hat * c).sum()`, as a float.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 2.8: passed (3 tokens, 20 tokens, a perfect SAE)`
# </details>

# %%
for name in saes:
    whole = float(hats[name].square().sum() / (hats[name] * few).sum())
    print(f"{NAMES[name]:<8} gamma {shrinkage(few, hats[name]):.2f}   (not centred: {whole:.3f})")
assert shrinkage(few, hats["vanilla"]) < 0.95 < shrinkage(few, hats["topk"])

# %% [markdown]
# **What you just saw.** The vanilla SAE's reconstructions are too short; TopK, which pays no penalty, has nothing to
# shrink for. And the number in brackets shows why to centre: uncentred, the fault all but disappears.

# %% [markdown] tags=["solution"]
# **Why so.** Minimise $E\|x - c\,\hat x\|^2$ over the number $c$ and you get $c = E[\hat x \cdot x] / E\|\hat x\|^2 =
# 1/\gamma$. Dividing by $E\|x\|^2$ instead would call every SAE too short: a reconstruction that misses something
# *is* shorter than the original. Usual mistakes: centring `x_hat` on its own mean, and averaging a ratio for each
# token.

# %% [markdown]
# ## 7. Choice or values?
#
# An SAE's code says two things: *which* latents, and *how much* of each. L1 meddles with both. How much of the error
# comes from which? The test: keep the vanilla SAE's choice, and replace its values by the best ones for that choice.
# What error remains is the fault of the choice (and of the directions).
#
# ### Exercise 2.9: the best values
#
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●●○ 4/5 · about 10 minutes · bonus
# > Least squares, the tool that separates the two.
#
# For one token: `target` is $x - b_{dec}$, and `rows` are the decoder rows of the latents that are on. Find the
# values that bring `values @ rows` as close to `target` as possible. They may be negative, and the rows do not stand
# at right angles.


# %%
def best_values(target: Float[Tensor, " d_in"], rows: Float[Tensor, "n d_in"]) -> Float[Tensor, " n"]:
    """The values v for which |target - v @ rows|^2 is smallest."""
    ### BEGIN SOLUTION
    return torch.linalg.lstsq(rows.T, target[:, None]).solution.squeeze(1)
    ### END SOLUTION


# %%
check.best_values(best_values)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# For rows at right angles, `rows @ target` would be the answer. What is left in the error along each row at the best
# values?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Nothing: `rows @ (target - v @ rows) = 0`. These are n equations for n numbers. Or let `torch.linalg.lstsq` do it.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `torch.linalg.solve(rows @ rows.T, rows @ target)`
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 2.9: passed (1 latents, 2 latents, 4 latents)`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** At the minimum the error is at right angles to every row used; with the Gram matrix `rows @ rows.T` that
# is one linear system. Usual mistakes: inner products alone (two rows at a sharp angle then explain the same thing
# twice), and cutting negative values off, which is a decision about the choice and not about the values.

# %% [markdown]
# **Predict first.** TopK's values were never penalised. Whose error falls more when values are refitted, vanilla's or
# TopK's? And does the gap between the two close?
#
# `tutorial_sae.measures.refit` does your least squares for many tokens at once. On 1,024 tokens, for time's sake
# (about half a minute on two cores):

# %%
some = x_raw[:1024]
table = {}
with torch.no_grad():
    for name, sae in saes.items():
        before, after = fvu(some, sae(some)), fvu(some, sae.decode(refit(sae, some)))
        table[name] = (before, after)
        print(f"{NAMES[name]:<8} FVU {before:.3f}, refitted {after:.3f}: {1 - after / before:.0%} less")
gap = [table["vanilla"][i] - table["topk"][i] for i in (0, 1)]
print(f"gap between vanilla and TopK: {gap[0]:.3f} before, {gap[1]:.3f} after")

# %%
figure, (axis,) = picture("FVU before and after the values are refitted, for three SAEs.", width=6.0)
for place, (name, pair) in enumerate(table.items()):
    axis.bar([place - 0.2], [pair[0]], 0.38, color=COLOURS[name])
    axis.bar([place + 0.2], [pair[1]], 0.38, color=COLOURS[name], alpha=0.45, hatch="//", edgecolor="white")
    for side, value in zip((-0.2, 0.2), pair, strict=True):
        axis.text(place + side, value, f"{value:.3f}", ha="center", va="bottom", fontsize=9)
axis.set_xticks(range(len(table)), [NAMES[name] for name in table])
axis.grid(axis="x", visible=False)
axis.set(ylabel="FVU", title="As encoded (full), and values refitted (hatched)")
figure

# %% [markdown]
# **What you just saw.** Vanilla gains most: its values were pressed down. What remains between the two after the
# refit is the choice of latents and the directions themselves. For a comparison in which nothing else differs, here
# are small SAEs trained alike, with TopK's `k` set to the L0 that the vanilla SAE came out with:

# %%
for seed in sorted({p["seed"] for p in results["pair"]}):
    v, t = (
        next(p for p in results["pair"] if (p["variant"], p["seed"]) == (name, seed)) for name in ("vanilla", "topk")
    )
    print(f"seed {seed}, L0 {v['k']}: gap {v['fvu_before'] - t['fvu_before']:.3f} as encoded", end=", ")
    print(f"{v['fvu_after'] - t['fvu_after']:.3f} refitted (vanilla {v['less']:.0%} less, TopK {t['less']:.0%} less)")

# %% [markdown]
# "Choice or values?" is a question to put to every SAE, and notebooks 03 to 05 do. Refitting is no cure, though: it
# costs a system of equations for each token.
#
# ## 8. A cure: let the penalty see only the decision
#
# The Gated SAE (Rajamanoharan et al. 2024, section 3.2) splits the two jobs. A **gate** decides, a **magnitude** says
# how much, and the L1 penalty sees the gate alone:
#
# ```
# pi = (x - b_dec) @ W_gate + b_gate                         open where positive; L1 pulls here
# f  = 1[pi > 0] * relu(exp(r_mag) * ((x - b_dec) @ W_gate) + b_mag)     nothing pulls here
# ```
#
# The step 1[pi > 0] has no slope, so the gate learns from a reconstruction of its own, made of relu(pi) and a decoder
# that counts as a constant there (section 3.2.2). You have met its numbers already: in 5 its error, in 6 its $\gamma$
# and what it leaves along its latents, in 7 what it gains by refitting. The proof of 6 says why: no penalty reaches
# `b_mag`, so its latents leave nothing of themselves. The price is a second encoder path, a second reconstruction in
# each step, and still an `l1` whose L0 must be found by trying.

# %%
progress()

# %% [markdown]
# ## Summary
#
# - A vanilla SAE keeps every positive pre-activation (the cut **own**), and an L1 penalty makes them few.
# - The penalty charges for size, so the decoder must not be free: rows of length 1, gradient projected before the
#   step.
# - `l1` has no meaning of its own. What L0 it gives depends on width, data and length of training, and is found by
#   trying; a strong penalty needs a warm-up.
# - Each latent leaves $l_1/2$ of its own direction. With the values refitted, about two thirds of the gap to TopK go:
#   mostly values; the rest is choice and directions. Of the vanilla SAE's own error, refitting removes only about a
#   fifth (a quarter in the small runs).
# - Gated separates the decision from the size, and does not shrink.
#
# ## Quiz
#
# **1.** Your colleague's run has a penalty that falls steadily while L0 rises. What do you look at first?
# <details><summary>Answer</summary>
#
# The lengths of the decoder's rows. A penalty that gets cheaper while more latents are on is being cheated (2.3).
# </details>
#
# **2.** Two papers use `l1 = 0.001` and `l1 = 0.6`. Which SAE is sparser?
# <details><summary>Answer</summary>
#
# One cannot tell. The error may be averaged over dimensions in one and summed in the other, the activations may be
# scaled differently, and width and training differ. Ask for L0.
# </details>
#
# **3.** Why not simply multiply an L1 SAE's reconstruction by $1/\gamma$?
# <details><summary>Answer</summary>
#
# One factor for all stretches large and small values alike, and the toll is the same $l_1/2$ for each, so small
# values are hit harder. Refitting finds each latent's own value; a single factor recovers less.
# </details>
#
# ## Where this goes wrong in practice
#
# - **Normalising and projecting in the wrong order.** Rows renewed *before* the step are not of length 1 in what is
#   saved.
# - **No warm-up, strong penalty**: the run collapses before the latents have found anything, and does not recover.
# - **Comparing at equal `l1`** instead of at equal L0. An error without its L0 says nothing.
# - **Raw activations of another scale**: `l1` is in the units of `x`. Normalise first, and keep the constants with
#   the SAE.
#
# ## Sources
#
# BatchTopK (arXiv 2412.06410), section 2: the general form, reconstruction plus $\lambda S(f)$. Towards
# Monosemanticity (Bricken et al. 2023): ReLU and L1, unit rows, projected gradient. Anthropic's Circuits Updates,
# April 2024: the penalty times the row's length. Gated SAEs (arXiv 2404.16014), sections 3.2 and 4.2: the gate, and
# the relative reconstruction bias $\gamma$, there on vectors that are not centred.
#
# **Next.** We wanted few latents, and bought a number that nobody can translate into few. What if we just *said* how
# many? That is notebook 03, TopK.
