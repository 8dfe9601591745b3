# %% [markdown]
# # 00 Start here: one matrix, different cuts
#
# A language model turns each word it reads into a list of numbers, its *activations*. Every number means a little of
# everything. A **sparse autoencoder** (SAE) rewrites such a list as a few *latents* out of thousands, many of which
# can be named. This course is about how that works, and about one question: *which few?*
#
# **After this notebook you can**
#
# - say what an SAE does to a sentence, and what the three cuts are called: row, batch, threshold;
# - say where each of the ten notebooks stands, and which of them you need;
# - work with an exercise and its check.
#
# **You need** PyTorch, a rough idea of what a transformer is, and no GPU. **Time**: about half an hour.

# %% tags=["setup"]
pass

# %%
import torch
from IPython.display import HTML, display
from jaxtyping import Float
from torch import Tensor

from tutorial_sae import heldout_slice, load_model, load_pretrained
from tutorial_sae.checks import nb00 as check
from tutorial_sae.checks import progress
from tutorial_sae.latents import Latents
from tutorial_sae.plots import COLOURS, picture
from tutorial_sae.widgets.explorer import explorer, explorer_data, explorer_figure, three_cuts
from tutorial_sae.widgets.highlight import highlight

# %% [markdown]
# ## 1. Play first
#
# Below are two things that the rest of the course takes apart: a small language model (SmolLM2-135M-Instruct, its
# weights rounded to 4 bits) and an SAE that was trained on its activations and comes with the course. The first time,
# the model is fetched (about 100 MB); after that everything runs offline.

# %%
model = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
sae = load_pretrained("batchtopk")
sentence = "The old lighthouse of Genoa, first mentioned in 1128, still guides ships into the harbour at night."
neighbours = {
    "poor": "one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen",
    "rich": "Quantum chromodynamics, Baroque counterpoint, Byzantine tax law, coral reefs, sourdough, chess openings",
}
data = explorer_data(model, sae, sentence, neighbours=neighbours)
data

# %% [markdown]
# Each row is a token of the sentence, each cell one latent's strength on that token: a matrix, called `z` from here to
# the last notebook. Dark cells are strong. A **cut** decides which cells are kept; those have colour. Try this:
#
# 1. Choose the cut **row** and move **k**. Every token keeps the same number.
# 2. Choose **batch**, with k at 32. Which tokens give latents away, and which receive them?
# 3. Stay with **batch** and change the **neighbouring text**: the sentence is the same. Is its code?
# 4. Choose **threshold**, and change the neighbours again.
# 5. Switch to the view **by strength**, and go through the cuts once more.

# %%
explorer(model, sae, sentence, neighbours=neighbours)

# %% [markdown]
# The same as a picture, for k = 32, in the view by strength. (Where no widget can run, on GitHub for example, this is
# what there is to see.)

# %%
explorer_figure(data)

# %% [markdown]
# What you may have seen: under the **row** cut the coloured part ends on a straight line. Under **batch** and
# **threshold** it is ragged: some tokens keep far more than others, but all stop at one and the same *height*. The
# batch decides that height together, so under **batch** other people's text changes yours. Under **threshold** the
# height is fixed, and nothing else can move it. The same in numbers, with each of the three neighbourhoods:

# %%
for name in ("alone", "poor", "rich"):
    for cut, result in three_cuts(data, neighbours=name).items():
        lowest, highest = int(result.l0.min()), int(result.l0.max())
        shown = f"{lowest} to {highest} latents a token, mean {result.l0.float().mean():.1f}"
        print(f"{name:<6}{cut:<10}{shown:<42}error {result.error:.3f}")

# %% [markdown]
# The *error* is the share of the sentence's squared length that the kept latents fail to rebuild. An error never stands
# alone here: as a rule it falls when more latents are kept, so errors at different L0 are not to be compared. (Why does
# the threshold keep 43.6 a token, when k is 32? θ was set so that 32 is the mean over *much mixed text*; a sentence so
# full of content gets more, code and commas get less.)
#
# ## 2. What it is for
#
# Why would anyone want a few latents in place of 576 numbers? Because many latents stand for something. These three
# were not picked by their names (nobody gave them any). Each line is a stretch of text that the SAE was not trained on;
# the darker a token, the stronger the latent on it. What would you call them?

# %%
store = heldout_slice(model)  # 16,384 activations of text that no SAE here was trained on
index = Latents(sae, store)  # every value, by latent
for latent in (43, 50, 76):
    lines = [highlight(e.pieces, e.values, peak=e.peak) for e in index.examples(latent, 4, window=9)]
    display(HTML(f"<h4>latent {latent}</h4>" + "".join(lines)))

# %% [markdown]
# *Text: Wikipedia, CC BY-SA 4.0, and documentation and code of free software; see NOTICE.*
#
# A warning to keep through all ten notebooks. The word **feature** will mean a property of the data ("this is a
# year"); the word **latent** a unit of the SAE. That a latent *is* a feature is a claim to be tested, one latent at a
# time: notebook 08 does so, and shows latents that fail.
#
# ## 3. What an SAE computes
#
# With an activation vector `x` (576 numbers here) every SAE of this course does three things:
#
# | step | formula | in words |
# |---|---|---|
# | encode | $z = \mathrm{relu}((x - b_{dec})\, W_{enc} + b_{enc})$ | 2,304 strengths, the *pre-activations* |
# | cut | keep some entries of $z$, set the others to 0 | the *latents* |
# | decode | $\hat x = \text{latents} \cdot W_{dec} + b_{dec}$ | a sum of as many directions as were kept |
#
# Training makes $\hat x$ resemble $x$. Nothing else would stop all latents from being on; the cut is what makes the
# code sparse, and the variants of SAE differ in the cut:
#
# | variant | cut | which entries survive | notebook |
# |---|---|---|---|
# | vanilla, Gated | own | those that are positive; a penalty keeps them few | 02 |
# | TopK | row | the k largest of each token | 03 |
# | BatchTopK, in training | batch | the n·k largest of n tokens together | 04 |
# | JumpReLU | own | those above a learned bar of their latent | 05 |
# | BatchTopK, afterwards | threshold | those above one number, θ | 06 |

# %%
x = store[:1000]
with torch.no_grad():
    z = sae.pre_activations(x)
    latents = sae.encode(x)
    x_hat = sae.decode(latents)
print(f"x {tuple(x.shape)} -> z {tuple(z.shape)} -> latents {tuple(latents.shape)} -> x_hat {tuple(x_hat.shape)}")
print(f"positive entries of z per token: {(z > 0).sum(dim=1).float().mean():.0f}")
print(f"of them kept, above theta = {float(sae.threshold):.3f}: {(latents > 0).sum(dim=1).float().mean():.1f}")
print(f"that is with these 1,000 tokens; with 8,000: {(sae.encode(store[:8000]) > 0).sum(dim=1).float().mean():.1f}")

# %% [markdown]
# ## 4. A first exercise
#
# All exercises look like this one: a stub, a check, folded hints. The cell right below a stub runs its check. A check
# never stops the notebook; it tells you what it saw. This once the stub is not empty but **wrong on purpose**: run the
# check first and read what it says, then mend the function.
#
# ### Exercise 0.1: how many latents?
#
# > Difficulty: ●○○○○ 1/5 · Importance: ●●●●○ 4/5 · about 5 minutes · core
# > You will compute L0, the number that stands beside every error in this course.
#
# **L0** is the number of latents that are on (not 0) for a token, averaged over tokens. Where does the name come from?
# From the "norm" $\|f\|_0$, which counts the entries of $f$ that are not 0.


# %%
def l0(latents: Float[Tensor, "tokens d_sae"]) -> float:
    """The mean number of latents per token that are not 0."""
    ### BEGIN SOLUTION
    #: return float((latents != 0).float().mean())
    return float((latents != 0).sum(dim=-1).float().mean())
    ### END SOLUTION


# %%
check.l0(l0)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# For three tokens with 2, 1 and 3 latents on, the answer is 2. What does the stub give, and what did it divide by?
#
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Two steps: first count along each row, then average the counts.
#
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `(latents != 0)` is a matrix of booleans. `.sum(dim=-1)` counts along rows; a count is a whole number, so `.float()`
# before `.mean()`.
#
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 0.1: passed (three tokens, one token, …). 1 of 1 in this notebook.`
#
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The count belongs to a token, so the sum runs along the latents (the last dimension), the mean over tokens.
# The stub's mean over *all* entries is the same number divided by `d_sae`: the *density*. It looks harmless, but 0.014
# says nothing until one knows the width, while "32 latents" can be compared between SAEs of any width.
#
# **Usual mistakes**: summing the values (that is L1, and notebook 02 is about what it does); averaging over `dim=0`
# first, which counts tokens per latent.

# %% [markdown]
# **What you just saw.** The check did not only say "wrong": it recognised *which* wrong. It does so by making the known
# mistakes itself and comparing. If your mistake is a new one, it shows the smallest case that fails. It never shows you
# the solution; for that there is the folder `solutions/`.
#
# ## 5. The map

# %%
NOTEBOOKS = {
    "00": ("start here", 0, 1),
    "01": ("activations", 1, 1),
    "02": ("vanilla SAE", 2, 1),
    "03": ("TopK", 3, 2),
    "04": ("BatchTopK", 4, 2),
    "05": ("JumpReLU", 3, 0),
    "06": ("threshold", 5, 1),
    "07": ("evaluating", 6, 2),
    "08": ("interpreting", 6, 0),
    "09": ("full training", 7, 1),
}
ARROWS = ["00-01", "01-02", "02-03", "02-05", "03-04", "04-06", "05-06", "06-07", "06-08", "06-09"]
SHORT = ["00-03", "03-04", "04-06"]

figure, (axis,) = picture(
    "Map of the notebooks: 00 to 01 to 02, then 03 and 04 above and 05 below, which meet in 06; 07, 08, 09 after it. "
    "The short path goes 00, 03, 04, 06.",
    width=10,
    height=3.6,
)
boxes = {}
for number, (name, across, up) in NOTEBOOKS.items():
    on = number in ("00", "03", "04", "06")
    box = {"boxstyle": "round,pad=0.45", "facecolor": "#FBE3D3" if on else "#EEEEEE", "edgecolor": "none"}
    label = axis.text(across, up, f"{number}\n{name}", ha="center", va="center", color="#1a1a1a", bbox=box)
    boxes[number] = label.get_bbox_patch()
for arrows, look in ((ARROWS, {"color": "#777777", "lw": 1.5}), (SHORT, {"color": COLOURS["batchtopk"], "lw": 3})):
    for start, end in (arrow.split("-") for arrow in arrows):
        ends = {"patchA": boxes[start], "patchB": boxes[end], "shrinkA": 2, "shrinkB": 4}
        look |= {"arrowstyle": "-|>", "mutation_scale": 14}
        axis.annotate("", NOTEBOOKS[end][1:], NOTEBOOKS[start][1:], arrowprops=look | ends)
axis.set(xlim=(-0.5, 7.5), ylim=(-0.5, 2.6), title="What leads where; in orange the short path, about half a day")
axis.axis("off")
figure

# %% [markdown]
# | notebook | its question |
# |---|---|
# | 01 activations | Where do the numbers come from, and what is in them? |
# | 02 vanilla SAE | How are latents learned, and what does a penalty on their size do to them? |
# | 03 TopK | What if we just said how many? |
# | 04 BatchTopK | Who should get the budget? |
# | 05 JumpReLU | How can a bar be learned, when a step has no gradient? |
# | 06 threshold inference | How does one number replace the batch? |
# | 07 evaluating | How does each number flatter, and do the paper's claims hold here? |
# | 08 interpreting | Which latents can be named, and what do they do? |
# | 09 full training | How is this done on GPT-2 Small and Gemma 2 2B? |
#
# This version of the course holds notebooks 00 to 04; the others are being written.
#
# The paper behind it is *BatchTopK Sparse Autoencoders* (Bussmann, Leask and Nanda 2024,
# [arXiv:2412.06410](https://arxiv.org/abs/2412.06410)). Notebooks cite its sections, and say so where something is not
# from the paper, or does not come out here as it does there.
#
# ## 6. Is everything there?
#
# Everything above has run, so the model, the SAE and the text are in place. What remains is a look at the versions, for
# when you ask somebody for help.

# %% tags=["nbval-ignore-output"]
from tutorial_sae.runtime import versions

for package, version in versions("tutorial-sae", "torch", "transformer-lens", "ipywidgets", "anywidget").items():
    print(f"{package:<18}{version or 'missing: pip install -r requirements.txt'}")

# %%
assert all(versions("tutorial-sae", "torch", "transformer-lens", "ipywidgets", "anywidget").values())
progress()

# %% [markdown]
# ## Summary
#
# - An SAE turns an activation into a matrix row `z` of thousands of strengths, keeps a few, and rebuilds the activation
#   from them.
# - The cut says which: the k largest of each token (row), the n·k largest of n tokens (batch), all above θ (threshold),
#   or each entry on its own merit (own).
# - L0 counts the latents of a token. It stands beside every error.
#
# ## Quiz
#
# <details><summary>1. Under the batch cut with k = 32, can a token keep 70 latents?</summary>
#
# Yes, if others keep fewer: the budget is 32 *on average over the batch*. You can see such tokens in the picture above.
#
# </details>
# <details><summary>2. You change the neighbours. Under which cut does your sentence's code change?</summary>
#
# Under batch only. Row looks at one token, threshold at one entry.
#
# </details>
# <details><summary>3. An SAE has L0 = 64 and half the error of one with L0 = 16. Which is better?</summary>
#
# Nobody can say: as a rule more latents leave less error. Compare at equal L0, or whole curves of error against L0.
#
# </details>
#
# > **Where this goes wrong in practice.** People load a BatchTopK SAE and cut by batch at inference, so that results
# > depend on what else was in the batch; or compare errors of SAEs with different L0. Both are easy to do without
# > noticing.
#
# **Sections of the paper covered**: the idea of 2 and 3; the formulas follow in 02 to 06.
#
# **Next**: the matrix came from a model's activations. Where do those come from, and why would one direction seem to
# explain almost all of them? That is [01](01_activations.ipynb).
