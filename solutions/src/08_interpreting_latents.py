# %% [markdown]
# # 08 Interpreting latents: what does number 1420 mean?
#
# Until now latents were counted. Here you look at them one by one, say what they are, and find out whether that is
# true.
#
# **After this notebook you can**
#
# - find the contexts in which a latent fires, and know why the top ones alone mislead;
# - read off what a latent writes towards the next token, and how far to trust that;
# - put your explanation of a latent to a test that it can fail, against chance and against a simple rival;
# - tell what a latent *goes with* from what it *does*: take it out, and put it in;
# - examine a sick SAE by four charts and name its fault.
#
# **You need** 04 and 06 (the BatchTopK SAE and its threshold θ); the rest is said again where it is used. **Time**:
# about an hour and a half with all exercises, six of which are core. Nothing is trained here. The claims rest on the
# shipped SAE (20 million activations) and on `benchmarks/results/lessons/nb08.json`.

# %% tags=["setup"]
pass

# %%
import copy
import json
import random
from html import escape
from math import comb
from pathlib import Path

import torch
from IPython.display import HTML
from jaxtyping import Float, Int
from torch import Tensor

from tutorial_sae import heldout_slice, load_model, load_pretrained, load_text
from tutorial_sae.checks import nb08 as check
from tutorial_sae.checks import progress
from tutorial_sae.latents import Latents, ablation, logit_effects, steered
from tutorial_sae.measures import fvu, shrinkage
from tutorial_sae.plots import COLOURS, picture
from tutorial_sae.widgets.highlight import highlight

# %% [markdown]
# The held-out slice, the shipped BatchTopK SAE cut by its threshold, and an **index**: every non-zero value on the
# slice, sorted by latent. Held-out text, because what the SAE was trained on it may know by heart.

# %%
model = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
store = heldout_slice(model)
sae = load_pretrained("batchtopk").requires_grad_(False)
index = Latents(sae, store)
place = [store.place(i) for i in range(len(store))]  # row of text and position in it, of each activation
row_of = torch.tensor([row for row, _ in place])
texts = {row: store.context(place.index((row, at))) for row, at in sorted(dict(place).items())}  # each row once
rows = torch.tensor([text.tokens for text in texts.values()])
pieces = [store.piece(i) for i in range(len(store))]
entries = int((index.density * len(store)).round().sum())
print(f"{len(store):,} tokens in {len(rows)} rows of text, {sae.d_sae} latents, {entries:,} values above the threshold")

# %% [markdown]
# ## 1. Two thousand things without a name
#
# The first thing to know of a latent is its **density**: on what fraction of the tokens it fires.

# %%
figure, (axis,) = picture("Histogram of the density of all latents, on a logarithmic axis.", width=7.5)
never = index.density == 0
edges = torch.linspace(-4.5, -0.5, 41)
axis.hist(index.density[~never].log10(), edges, color=COLOURS["batchtopk"], alpha=0.85)
axis.axvline(torch.tensor(32 / sae.d_sae).log10(), color="#444444", linestyle=":", label="if all fired equally often")
axis.set_xticks([-4, -3, -2, -1], ["0.01 %", "0.1 %", "1 %", "10 %"])
axis.set(xlabel="density: share of tokens on which the latent fires", ylabel="latents", title="Most latents are rare")
axis.legend(frameon=False)
print(f"median density {index.density.median():.2%}, largest {index.density.max():.0%}, never here: {int(never.sum())}")
figure

# %% [markdown]
# A latent that fires on one token in a thousand fires about 16 times in this slice: enough to look at, too few for fine
# statistics. And a latent that never fires here need not be dead; one in 16,384 is as far as this slice sees. What does
# the package say of such a latent, and of one that does not exist?

# %%
silent = int(never.nonzero()[0])
print(f"latent {silent}: {len(index.fired(silent)[0])} tokens, examples: {index.examples(silent)}")
try:
    index.examples(sae.d_sae)
except IndexError as error:
    print("IndexError:", error)

# %% [markdown]
# ## 2. A dashboard by hand
#
# Take latent 1420. Where is it largest? Here are its five largest values, and what stands there:

# %%
her = 1420
token, value = index.fired(her)
for i in value.argsort(descending=True)[:5].tolist():
    row, at = place[int(token[i])]
    start = max(0, int(token[i]) - 6)
    print(
        f"{value[i]:5.1f}  row {row:>3}   {''.join(pieces[start : int(token[i])])!r:<52} -> {pieces[int(token[i])]!r}"
    )

# %% [markdown]
# *Text: Wikipedia, CC BY-SA 4.0; see NOTICE.*
#
# A guess is not hard to make. But look at the rows: several of the five may be from one text, and then five contexts
# are one piece of evidence. A text about one queen would make a "queen" of any latent for women.
#
# ### Exercise 8.1: contexts by hand
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●○ 4/5 · about 8 minutes · core
# > What a list of top contexts has to leave out.
#
# Write the list: the tokens with the largest values, **at most one from each row of text**, and none on which the
# latent is silent. Of two equal values the earlier token comes first.


# %%
def top_contexts(values: Float[Tensor, " tokens"], row: Int[Tensor, " tokens"], n: int) -> list[int]:
    """The numbers of up to n tokens with the largest positive values, largest first, at most one of each row."""
    ### BEGIN SOLUTION
    found: list[int] = []
    used = set()
    for i in values.argsort(descending=True, stable=True).tolist():
        if values[i] > 0 and len(found) < n and int(row[i]) not in used:
            found.append(i)
            used.add(int(row[i]))
    return found
    ### END SOLUTION


# %%
check.contexts(top_contexts)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Go down the sorted list, one token at a time. What do you have to remember on the way?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# The rows that you have taken from already. Stop when n are found, or when the values have come down to 0.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `for i in values.argsort(descending=True, stable=True).tolist():`, a set of used rows, and three conditions.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 8.1: passed (the 2 of a small text, the 3 of a small text, the 5 of a small text, ties, a latent that never
# fires). 1 of 6 in this notebook.`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** One row of text is one witness, however often it speaks. Usual mistakes: taking the n largest first and
# then dropping repeated rows (fewer than n are left, though more rows have the latent); filling up with zeros, so that
# the "contexts" of a rare latent are random text; forgetting that equal values need an order.

# %% [markdown]
# ### Not only the top
#
# From here on `index.examples` makes the list. With `at=0.5` it looks in the middle: contexts whose values are nearest
# to half of the peak. The darker the ground, the larger the value; the token in question is underlined.


# %%
def contexts_html(latent: int, tops: int = 4, middles: int = 4, window: int = 9) -> str:
    """Contexts of a latent from the top and from the middle of its range, as HTML."""
    top, parts = float(index.peak[latent]), []
    for title, n, at in (("largest values", tops, 1.0), ("half of that", middles, 0.5)):
        parts.append(f"<p style='margin:6px 0 0'><b>{title}</b></p>")
        for example in index.examples(latent, n, window=window, at=at):
            parts.append(highlight(example.pieces, example.values, top=top, peak=example.peak))
    return "".join(parts)


HTML(contexts_html(her))

# %% [markdown]
# *Text: Wikipedia, CC BY-SA 4.0, and Django, SymPy and NetworkX, BSD-3-Clause; see NOTICE.*
#
# At the top: a queen, women, a female. But the fourth of the largest is an *officially the* (the Great Ming), and the
# middle has it again. Whoever looks at the first three and calls 1420 "women" has described a part of what it does. How
# much of a latent's work is near its peak? Three latents, the last one chosen because no other has so much of it there:

# %%
above = {}  # the share of a latent's values that exceed half of its peak
for latent in range(sae.d_sae):
    value = index.fired(latent)[1]
    if len(value) >= 50:
        above[latent] = float((value > 0.5 * index.peak[latent]).float().mean())
highest = max(above, key=lambda latent: above[latent])
print(f"median over {len(above)} latents: {torch.tensor(list(above.values())).median():.0%} of the values above half")
print(f"latent {highest}: {above[highest]:.0%}; it fires on", repr(index.examples(highest, 1)[0].pieces[12]))

figure, axes = picture("Where the values of three latents lie between the threshold and the peak.", 3, 3.6, 3)
for axis, latent in zip(axes, (her, 52, highest), strict=True):
    axis.hist(index.fired(latent)[1] / index.peak[latent], torch.linspace(0, 1, 21), color=COLOURS["batchtopk"])
    axis.axvline(float(sae.threshold) / float(index.peak[latent]), color="#444444", linestyle=":")
    axis.set(xlabel="value / peak (dotted: θ)", title=f"latent {latent}, peak {index.peak[latent]:.1f}", xlim=(0, 1))
axes[0].set_ylabel("tokens")
figure

# %% [markdown]
# For most latents six sevenths of their values lie in the lower half. So read the middle before you give a name.
#
# ### What it writes
#
# Contexts show what a latent *reads*. It also *writes*: when it fires with value v, the SAE adds v times its row of the
# decoder to the (normalised) activation, and the layers above read that. What would come out if they did nothing, and
# the stream went straight to the logits?
#
# > **Why not simply `W_dec @ W_U`?** On the way out the stream passes the final norm: it is divided by its length, then
# > each coordinate is multiplied by a learned **gain**, and the unembedding `W_U` makes logits of it. The length is a
# > matter of the token, one number for all logits, so it is left out and the *order* stays. The gain is not. And a
# > constant that is added to all logits changes no probability, so only the difference from the mean over the
# > vocabulary counts.
#
# ### Exercise 8.2: what a latent writes
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●●○ 4/5 · about 10 minutes · core
# > The direct path from a latent to the logits, in the right units.
#
# Write what **one unit** of the latent adds to the logits: its direction in *raw* units (an SAE normalises inside, by
# `sae.norm_scale`), the gain, the unembedding, less the mean over the vocabulary.


# %%
def written(
    sae, latent: int, gain: Float[Tensor, " d_in"], W_U: Float[Tensor, "d_in vocab"]
) -> Float[Tensor, " vocab"]:
    """What one unit of a latent adds to each logit, the stream's length left out, less the mean over the vocabulary."""
    ### BEGIN SOLUTION
    logits = (sae.W_dec[latent] * sae.norm_scale * gain) @ W_U
    return logits - logits.mean()
    ### END SOLUTION


# %%
check.writes(written)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Encoder or decoder? A column or a row?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Four steps: row of the decoder, into raw units, times the gain (coordinate by coordinate), through the unembedding.
# Then the mean.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `logits = (sae.W_dec[latent] * sae.norm_scale * gain) @ W_U`, and subtract `logits.mean()`.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 8.2: passed (latent 0, latent 7). 2 of 6 in this notebook.`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** In normalised units one unit of the latent adds `W_dec[latent]`; raw activations are `norm_scale` times
# that (plus a mean that is there anyhow). Usual mistakes: the encoder's column, which says what the latent looks for
# and not what it says; leaving the gain out, which changes the order of the tokens; dividing by the length of the
# direction, as if the final norm saw it alone.

# %% [markdown]
# The package's `logit_effects` does the same. For 1420, and for four others:

# %%
some = [her, 2271, 450, 84, 688]
effects = logit_effects(model, sae, some)
for latent, effect in zip(some, effects, strict=True):
    print(f"{latent:>5}:", "  ".join(repr(model.tokenizer.decode([t])) for t in effect.topk(7).indices.tolist()))

# %% [markdown]
# The first three speak for themselves: *she, her*; after "in **which**" comes a clause: *we, they*; and 450, which
# fires on *modern* and *currently*, says *now, today*. The last two, a latent for *second-largest* and one for *both*,
# are a muddle of fragments that hardly occur in any text. Two reasons, and both are general.
#
# **Rare tokens crowd the list.** The vocabulary has 49,152 entries, and the rows of seldom-seen ones lie together in
# odd corners; a direction that points there by chance raises them all. So ask only about tokens that occur: here those
# that occur at least five times in the whole held-out text.

# %%
counts = torch.zeros(effects.shape[1], dtype=torch.long)
for block in load_text(split="heldout").rows(model):
    counts += torch.bincount(block.tokens.flatten().long(), minlength=len(counts))
occurs = counts >= 5


def says(latent: int, n: int = 6) -> list[str]:
    """The tokens, of those that occur, whose logits the latent's direction raises most."""
    effect = logit_effects(model, sae, [latent])[0].masked_fill(~occurs, -torch.inf)
    return [model.tokenizer.decode([t]) for t in effect.topk(n).indices.tolist()]


print(f"{int(occurs.sum()):,} of {len(occurs):,} tokens occur five times or more")
for latent in some:
    print(f"{latent:>5}:", "  ".join(map(repr, says(latent))))

# %% [markdown]
# **Many latents do not speak to the output.** This SAE sits after block 15 of 30. Half of the model is still to come,
# and a latent can do all its work by being read there: "the second-largest city" has to become a fact before it becomes
# a word. No list of logits shows that.
#
# ### Company
#
# The last part of a dashboard: which latents fire on the same tokens? `share` is how often the other fires where this
# one does; they come in the order of the cosine, which also asks how often this one fires where the other does.

# %%
for other in index.together(her, 4):
    best = [e.pieces[e.peak] for e in index.examples(other.latent, 5)]
    print(
        f"{other.latent:>5} on {other.share:4.0%} of its tokens, density {index.density[other.latent]:5.1%}:",
        *map(repr, best),
    )

# %% [markdown]
# 693 is a latent for *officially*: so the odd *the* in the list of 1420 has company that explains it. What fires
# together is often about the same thing, and reading the neighbours is a good way to correct a name.
#
# Put together, that is a dashboard. Six latents, all found by browsing; decide for each whether you would give it a
# name before you open the next cell.


# %%
def dashboard(latent: int, tops: int = 3, middles: int = 3) -> str:
    """Density, contexts, logits and company of a latent, as HTML."""
    near = ", ".join(f"{other.latent} ({other.share:.0%})" for other in index.together(latent, 3))
    words = " ".join(f"<code>{escape(word)}</code>" for word in says(latent))
    head = f"<h4 style='margin:18px 0 0'>latent {latent}: on {index.density[latent]:.2%} of the tokens, "
    head += f"peak {index.peak[latent]:.1f}</h4>"
    return (
        f"{head}{contexts_html(latent, tops, middles)}<p style='margin:6px 0'>raises {words}; fires beside {near}</p>"
    )


HTML("".join(dashboard(latent) for latent in (2294, 1531, 2271)))

# %%
HTML("".join(dashboard(latent) for latent in (250, 1231, 52)))

# %% [markdown]
# *Text: Wikipedia, CC BY-SA 4.0, and Django, SymPy and NetworkX, BSD-3-Clause; see NOTICE.*
#
# Ours: 2294 is **points of the compass**. 1531 is the **`=` of a keyword argument**, and its company (2119, 643) are
# latents for other `=`. 2271 is **"which" after a preposition**; "*, which*" has a latent of its own, 1340. Then it
# gets harder. 250 is **the letter e**, as in *e.g.*, *E* and *eccentricity*: that is a name, though of a spelling and
# not of a thing. 1231 looks like *strong* and *strengthen*, if it were not for *Census*, *conflict* and *special*. And
# 52 we cannot name. That is not rare: of the 40 latents of the next section, drawn at random, two got an explanation
# that says itself that there is no clear pattern.
#
# **All of them.** `python -m tutorial_sae export tutorial_sae/pretrained/batchtopk --to html latents` (run in the
# course's folder) writes one page with all 2304 dashboards, with a search and a link for each (`#latent=2294`). Do that
# now, and look for ten minutes: search for `north`, `=`, a word of yours. It is the best way to get a feeling for what
# is in there.

# %% [markdown]
# ## 3. Guess the latent
#
# A name is a claim. It must be possible for it to be wrong. So: write the explanation from *some* texts, and let it
# predict on *others* where the latent fires.
#
# The cell below takes latent 84. The contexts to explain from are of the first half of the rows; the test is of the
# second half: 20 texts that end on a token (underlined). On 10 of them the latent fires there, with values from all
# over its range, so that an explanation that holds for the top only is found out. On the other 10 it is silent; five of
# those are **near misses**, tokens on which a latent fires that often keeps it company. (A document may reach into both
# halves. A stricter test separates documents; the one with 40 latents below does.)


# %%
def quiz(latent: int, seed: int = 0) -> tuple[list[int], list[bool]]:
    """20 tokens of the second half of the rows, and whether the latent fires on each."""
    order, half = random.Random(seed), len(rows) // 2
    token, value = index.fired(latent)
    later = row_of[token] >= half
    down = token[later][value[later].argsort(descending=True)].tolist()
    fires = [down[round(n * (len(down) - 1) / 9)] for n in range(10)]
    company = torch.cat([index.fired(other.latent)[0] for other in index.together(latent, 5)])
    silent = set(range(len(row_of))) - set(token.tolist())
    near = sorted(i for i in silent & set(company.tolist()) if row_of[i] >= half)
    far = sorted(i for i in silent if row_of[i] >= half)
    chosen = [(i, True) for i in fires] + [(i, False) for i in order.sample(near, 5) + order.sample(far, 5)]
    order.shuffle(chosen)
    return [i for i, _ in chosen], [on for _, on in chosen]


def line(i: int, value: float, before: int = 14) -> str:
    """The text up to token i, in which only that token is marked."""
    at = place[i][1]
    shown = texts[place[i][0]].pieces[max(1, at - before) : at + 1]
    return highlight(shown, [0.0] * (len(shown) - 1) + [value], top=float(index.peak[84]), peak=len(shown) - 1)


token, value = index.fired(84)
first_half = torch.zeros(len(store))
first_half[token] = value * (row_of[token] < len(rows) // 2)
ranked = first_half.argsort(descending=True, stable=True)[: int((first_half > 0).sum())].tolist()
HTML("<p><b>latent 84, first half</b></p>" + "".join(line(i, float(first_half[i])) for i in ranked[:6] + ranked[12::6]))

# %%
asked, fires = quiz(84)
HTML("<ol>" + "".join(f"<li>{line(i, 1.0)}</li>" for i in asked) + "</ol>")

# %% [markdown]
# *Text: Wikipedia, CC BY-SA 4.0, and Django, SymPy and NetworkX, BSD-3-Clause; see NOTICE.*
#
# ### Exercise 8.3: guess the latent
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 12 minutes · core
# > What it takes to explain a latent: to be right about texts that you had not seen.
#
# Write your explanation *first*, from the first list. Then read the second list with nothing but your explanation in
# mind, and answer for each of the 20: does it fire on the underlined token? (`fires` has the truth. The check holds
# your letters against it; 14 right pass.)

# %%
### BEGIN SOLUTION
#: explanation = ...  # "a sentence: it fires on ..."
#: guesses = ...  # 20 letters, y or n: "y n n y ..."
explanation = "superlatives that rank a place or thing by size, most of all after an ordinal (third-largest)"
guesses = "y y n n y y y n n n y n y y n y y n n n"
### END SOLUTION

# %%
check.guess(explanation, guesses, fires)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# What do the largest values have in common that the smaller ones lack, and what have all of them in common?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Two things meet in the strongest contexts: a place in an order (*third*, *sixth*), and the end of a scale. One of them
# is enough for a small value.
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# Say yes to superlatives that rank something, whatever is ranked. For the rest, remember that ten
# of the twenty fire, some of them weakly.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 8.3: passed (... of 20 are right, ... missed, ... false alarms). 3 of 6 in this notebook.` Ours had 16.
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** The explanation is ours, written from the first list; the letters were given with the second list in view
# and the truth not, and 16 were right. The mistakes are in the lower part of the range, on words *near* a superlative.
# Usual mistakes: an explanation of the top only (*ordinals before largest* misses plain
# superlatives), and one so wide ("comparisons") that it cannot fail.

# %% [markdown]
# ### Forty latents, chosen by a die
#
# One latent that we chose ourselves proves little. So 40 were drawn at random, from those that fire on between 1 in
# 5000 and 1 in 20 tokens of 60,000 held-out ones. For each, a reader (a language model) wrote an explanation from 14
# contexts of *calibration* documents, 10 from the top and 4 from the middle. Another reader saw the explanation and 20
# *held-out* contexts, made like yours (10 fire, over the whole range; 10 do not, half of them near misses), and said
# yes or no.
#
# Two rivals. **Luck**: how often does one who knows nothing get 14 right? **A keyword list**: say yes if the token is
# one of the 14 tokens that were underlined in the contexts for the explanation. If that does as well, the explanation
# was not needed.

# %%
results = json.loads(Path("../benchmarks/results/lessons/nb08.json").read_text(encoding="utf-8"))
forty = sorted(results["latents"], key=lambda one: (-one["right"], -one["keyword_right"], one["latent"]))


def luck(least: int, of: int = 20, yes: int = 10) -> float:
    """The chance of at least so many right for one who says yes to 10 of 20 contexts, any 10, where 10 fire."""
    ways = {hits: comb(yes, hits) * comb(of - yes, yes - hits) for hits in range(yes + 1)}
    return sum(n for hits, n in ways.items() if 2 * hits >= least) / comb(of, yes)


figure, (axis,) = picture("Right answers out of 20 for 40 latents: reader with explanation, and keyword list.", width=9)
for n, one in enumerate(forty):
    axis.plot([n, n], [one["keyword_right"], one["right"]], color="#bbbbbb", linewidth=1, zorder=1)
axis.plot([one["right"] for one in forty], "o", color=COLOURS["batchtopk"], label="reader with the explanation")
axis.plot([one["keyword_right"] for one in forty], "s", color=COLOURS["topk"], markersize=5, label="keyword list")
axis.axhline(10, color="#444444", linestyle=":", label="luck, on average")
axis.set(xlabel="latents, in the order of the reader's score", ylabel="right, of 20", ylim=(5, 20.7), xticks=[])
axis.set_title("An explanation is worth more than a list of words, for most latents")
axis.legend(frameon=False, loc="lower left", ncols=3)
reader, words = results["summary"]["reader"], results["summary"]["keyword"]
for name, one in (("reader", reader), ("keyword list", words)):
    print(f"{name:<14}{one['mean']:.1f} ± {one['standard_error']:.1f} right on average; 14 or more: ", end="")
    print(f"{one['at_least_14']} of 40, where luck has {one['at_least_14_by_luck']:.1f}")
print(f"luck, for the reader: 14 or more with probability {luck(14):.3f}, times 40 is {40 * luck(14):.1f}")
figure

# %% [markdown]
# Why is the reader's score always even? It had been told that 10 of the 20 fire, and said yes ten times for each
# latent; then each wrong yes comes with a wrong no. That is help which the keyword list does not have, and luck profits
# too: for a tosser of coins 14 right have probability .058, with ten times yes .089. The comparison of the two is fair
# only in so far; ask of any such score what the judge was told. Where do the mistakes come from?

# %%
print(f"{'contexts':<34}{'how many':>9}{'reader':>9}{'keywords':>10}   (share right)")
told = {
    "fires": "the latent fires",
    "same piece": "silent, a token as in the examples",
    "related": "silent, a related latent fires",
    "random": "silent, drawn at random",
}
for kind, name in told.items():
    one = results["right_by_kind"][kind]
    print(f"{name:<34}{one['contexts']:>9}{one['reader']:>9.0%}{one['keyword']:>10.0%}")
print()
for one in forty:
    print(f"{one['latent']:>5} {one['right']:>3} (keywords {one['keyword_right']:>2})  {one['explanation'][:92]}")

# %% [markdown]
# Random silent contexts are easy, near misses are not: of tokens that look exactly like those in the examples the
# reader recognises only half as silent. (The keyword list has them all wrong, by construction.) With random negatives
# only, all of these explanations would look better than they are. **A score of an explanation is a score of the test as
# well**: say how the negatives were chosen, and from which part of the range the positives are.
#
# And the failures, at the end of the list. 410 and 817 have no pattern that anyone could see. For 2, 593 and 1831 (line
# breaks, the space before a number, *self*) the list of words does better than the long explanation.

# %% [markdown]
# ## 4. Causes
#
# So far a latent was something that *goes with* a kind of context. What does the language model do with it? Two
# experiments: take it out, and put it in.
#
# > **Why take it off x, and not decode without it?** The SAE's reconstruction lacks what the SAE fails to explain. If
# > you put a reconstruction in place of x you change two things at once: the latent and the error. So leave the error
# > in, and subtract from x itself only what this latent adds.
#
# ### Exercise 8.4: take a latent out
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 8 minutes · core
# > An intervention that changes one thing.
#
# x and the result are raw activations. The latent's value on each token is what the SAE's cut leaves of it.


# %%
def without(sae, x: Float[Tensor, "tokens d_in"], latent: int) -> Float[Tensor, "tokens d_in"]:
    """Raw activations less what a latent adds to their reconstruction; all else, the SAE's error too, stays."""
    ### BEGIN SOLUTION
    return x - sae.encode(x)[:, latent, None] * sae.W_dec[latent] * sae.norm_scale
    ### END SOLUTION


# %%
check.take_out(without)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# On a token where the latent is silent, what has to come out?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# x itself. Elsewhere x less value times direction, both in the same units.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `sae.encode(x)[:, latent, None]` is (tokens, 1), `sae.W_dec[latent]` is (d_in,), and the SAE normalises by
# `sae.norm_scale`.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 8.4: passed (latent 2, latent 9). 4 of 6 in this notebook.`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** x = reconstruction + error, and the reconstruction is a sum with one term for each latent. Usual mistakes:
# `sae.decode` of the code without the latent (the error goes too, and CE rises on every token, for reasons that have
# nothing to do with this latent); projecting the direction out of x (other latents have parts along it: 2304 directions
# in 576 dimensions cannot be at right angles); raw and normalised units mixed.

# %% [markdown]
# ### Exercise 8.5: where does it hurt
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●○○ 3/5 · about 3 minutes · core
# > To have an opinion on what a latent is for.
#
# Latent 688 fires on *both* ("specify both the style and the radius"), and now and then on *dual* or *neither*. Take it
# out, with all else left as it was, and let the layers above finish. At which tokens does the language model's loss
# rise?
#
# - **a** At *both* itself: the model no longer knows that it is there.
# - **b** At the words that follow, most of all at the *and* that *both* asks for.
# - **c** At all tokens after it, about equally: the text has been damaged.
# - **d** Nowhere to speak of: with 2304 latents in 576 dimensions the others make up for one.

# %%
### BEGIN SOLUTION
#: it_hurts = ...  # "a", "b", "c" or "d"
it_hurts = "b"
### END SOLUTION

# %%
check.hurts(it_hurts)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# The loss at a place is about the token that comes *next*. What has the model read by then?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Whoever says *both* owes you something. Which word pays?
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# "Both the style ...": go on.
# </details>
#
# The experiment, on five rows with large values (`ablation` gives the rise of the loss of each next token). The darker
# the ground, the harder the token has become; the latent fires on the underlined one.


# %%
def hurt(latent: int, n: int = 5) -> tuple[list[int], Tensor]:
    """The token of the largest value in each of n rows, and how much harder each token of these rows becomes."""
    token, value = index.fired(latent)
    best: dict[int, int] = {}
    for i in token[value.argsort(descending=True)].tolist():
        best.setdefault(place[i][0], i)
    chosen = dict(list(best.items())[:n])
    rise = ablation(model, sae, rows[list(chosen)], latent)
    return list(chosen.values()), torch.nn.functional.pad(rise, (1, 0))  # the first token has no loss


effect_of = {latent: hurt(latent) for latent in (688, 1340)}
shown = []
for latent, (tokens, rise) in effect_of.items():
    shown.append(f"<p style='margin:8px 0 0'><b>without latent {latent}</b></p>")
    for i, harder in zip(tokens, rise, strict=True):
        at = place[i][1]
        start, text = max(1, at - 6), texts[place[i][0]].pieces
        part = [harder[j].clamp(min=0.02 * (j == at)).item() for j in range(start, min(128, at + 9))]
        shown.append(highlight(text[start : at + 9], part, top=1.0, peak=at - start))
HTML("".join(shown))

# %% [markdown]
# *Text: Wikipedia, CC BY-SA 4.0, and Django, SymPy and NetworkX, BSD-3-Clause; see NOTICE.*
#
# Without 688 the model no longer expects the *and*. Latent 1340 (", **which**") is more short-sighted: without it the
# model no longer expects a verb right after. Over all tokens of these rows, by the distance from the nearest token
# before on which the latent fired:


# %%
def by_distance(latent: int) -> list[float]:
    """Mean rise of the loss: before the latent fires, on the 1st, 2nd to 6th, and later tokens after it."""
    tokens, rise = effect_of[latent]
    groups: list[list[float]] = [[], [], [], []]
    for i, harder in zip(tokens, rise, strict=True):
        fired = [place[j][1] for j in index.fired(latent)[0].tolist() if place[j][0] == place[i][0]]
        for at in range(1, 128):
            distance = min((at - f for f in fired if f < at), default=0)
            groups[0 if not distance else 1 if distance == 1 else 2 if distance < 7 else 3].append(float(harder[at]))
    return [sum(group) / max(1, len(group)) for group in groups]


figure, (axis,) = picture("Mean rise of the loss by distance from the token on which the latent fires.", width=7.5)
names = ["before", "1st token after", "2nd to 6th", "later"]
for shift, latent, label in ((-0.2, 688, "688: both"), (0.2, 1340, "1340: , which")):
    rises = by_distance(latent)
    colour = COLOURS["batchtopk" if latent == 688 else "topk"]
    axis.bar([n + shift for n in range(4)], rises, 0.38, color=colour, label=label)
    told = (f"{name} {round(rise, 2) + 0.0:.2f}" for name, rise in zip(names, rises, strict=True))
    print(f"without {label:<14}", "   ".join(told))
axis.set_xticks(range(4), names)
axis.axhline(0, color="#444444", linewidth=0.8)
axis.set(ylabel="rise of the loss (nats per token)", title="It hurts where the latent's news is needed")
axis.legend(frameon=False)
figure

# %% [markdown]
# **What you just saw.** Nothing changes before the latent fires (it cannot: the model reads from left to right), little
# later, and in between just where the name said. That is a cause. It is also *small*: some tenths of a nat in the mean,
# up to a nat or two on a single token, and hardly to be seen in a mean over a text. One latent in 32 is not much, and
# others say related things.

# %% [markdown] tags=["solution"]
# **Why so.** A place's loss is about the next token, so *both* itself (a) cannot suffer: it was predicted before the
# latent fired. The latent's part is still read several tokens later, because attention in the layers above fetches it
# from the place of *both*. That c is wrong is the more important half: a damaged *text* would hurt everywhere, a
# missing *fact* hurts where it matters. And d is what one fears with any redundant code; here the rest does not make up
# for it.

# %% [markdown]
# ### Put it in
#
# The reverse: take a text that has nothing to do with the latent, add the latent's direction on every token (behind
# BOS), and see how the model goes on. `steered(model, sae, prompt, latent, value)` does that; `value` is in the
# latent's own units, so `index.peak[latent]` is "as strong as it ever was". Value 0 is the text without steering. The
# likeliest token is taken each time, so nothing here is luck; but nothing is chosen by us either except latent, prompt
# and scale.


# %% tags=["nbval-ignore-output"]
said: dict[tuple[str, int, float], str] = {}


def table(prompt: str, pushes: list[tuple[int, float]], tokens: int = 20) -> str:
    """How a prompt goes on, steered by each latent at a value given in multiples of its peak, as HTML."""
    lines = []
    for latent, scale in pushes:
        text = steered(model, sae, prompt, latent, scale * float(index.peak[latent]), tokens=tokens)
        said[prompt, latent, scale] = text
        name = f"latent {latent}, {scale:.2g} × peak" if scale else "not steered"
        lines.append(
            f"<tr><td style='white-space:nowrap'>{name}</td><td style='text-align:left'>… {escape(text)}</td></tr>"
        )
    return f"<p><b>{escape(prompt)}</b> …</p><table>{''.join(lines)}</table>"


went, neighbour = "Last week I went to the", "My neighbour is a"
first = table(went, [(0, 0), (1195, 1), (1769, 1), (1705, 1)])
HTML(first + table(neighbour, [(0, 0), (1195, 1), (1420, 0.7)]))

# %%
assert "ech" in said[went, 1195, 1]  # technology, tech
assert "ech" in said[neighbour, 1195, 1]
assert "city" in said[went, 1769, 1]
assert "woman" in said[neighbour, 1420, 0.7]
for latent in (1195, 1769, 1705, 1420):
    words = dict.fromkeys(e.pieces[e.peak].strip() for e in index.examples(latent, 6))
    print(f"{latent:>5} fires most on", ", ".join(words))

# %% [markdown]
# The last cell says what each latent fires on, so that you can hold its name against what it does. **1195** (computing
# and electronics) turns a trip to the market into one to a centre of technology, and the neighbour into a hacker.
# **1769** (*city*) names a city. **1420** makes the neighbour a woman. **1705** (food, at the top of its range) leads
# to a restaurant. These prompts have nothing to do with the contexts that the names came from.
#
# **Is it the latent, or the push?** Any strong push changes a text. So push as hard in other directions: three latents
# drawn by lot, at the same *value* as 1195 above. And **it breaks**: here is 1420, stronger and stronger.

# %% tags=["nbval-ignore-output"]
drawn = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(8))[:3].tolist()
same = [(latent, float(index.peak[1195] / index.peak[latent])) for latent in drawn]
first = table(went, same)
HTML(first + table(neighbour, [(1420, 0.2), (1420, 1), (1420, 2), (1420, 4)]))

# %%
assert not any("tech" in said[went, latent, scale].lower() for latent, scale in same)
assert said[neighbour, 1420, 4] != said[neighbour, 1420, 1]
print("values of the directions by lot:", ", ".join(f"{scale * index.peak[latent]:.1f}" for latent, scale in same))

# %% [markdown]
# Directions by lot change the text too, but not towards technology. They do bring food: so the restaurant of 1705 is
# worth little as evidence, the prompt leans that way by itself, and what 1705 fires on is not all food either. Without
# the control we would have counted it. And there is a window of scales: at a fifth of its peak the first thing that
# 1420 does is to turn a *him* into a *her*; at twice the peak the sentence loses its thread, at four times its grammar,
# and 1769 walks in circles at its peak already. We tried some twenty latents at three scales on two prompts to find
# these. Perhaps a third did visibly what their name said; the others changed the text in ways that we would not have
# predicted, or not until it broke. What you are shown of steering has always been chosen.
#
# ### An open question, without a check: a leash of your own
#
# Choose a latent on the page of all latents, a prompt and a scale. Predict the continuation first, then look. Which
# kinds of latents steer, and which only disturb? (Ours: latents for a *topic* or a *next word* do; those for
# punctuation, code and form mostly break the text before they change it.)

# %% [markdown]
# ## 5. The SAE hospital
#
# You can examine single latents. Now four whole SAEs come in. Each was made from the healthy one (the shipped SAE) by
# planting **one fault**, drawn from six that the next cell defines; which patient has which the charts must tell. They
# are:
#
# - the table: **FVU** (fraction of variance unexplained), **L0** (latents per token), and **γ**, the factor by which
#   the reconstruction is too long: 1 is right, below 1 is *shrinkage* (02);
# - the histogram of **densities**, "never" at the left;
# - for each decoder row the **largest cosine** with another row: near 1 means a twin.


# %%
def twins(
    sick,
):  # a third of the latents are lost; in their places stand copies of another third, each with half the value
    order = torch.randperm(sick.d_sae, generator=torch.Generator().manual_seed(1))
    one, other = order[:768], order[768:1536]
    sick.W_enc[:, other], sick.b_enc[other] = sick.W_enc[:, one], sick.b_enc[one]
    sick.W_dec[one] /= 2
    sick.W_dec[other] = sick.W_dec[one]


def half_dead(sick):  # every second latent has a bias that no activation overcomes
    sick.b_enc[::2] = -1000.0


def no_mean(sick):  # the mean of the activations is not subtracted
    sick.norm_mean.zero_()


def too_short(sick):  # every value comes out a fifth too small
    sick.W_dec *= 0.8


def low_bar(sick):  # θ was read off before its moving average had arrived
    sick.threshold *= 0.6


def nothing(sick):  # healthy
    pass


faults = (twins, half_dead, no_mean, too_short, low_bar, nothing)  # numbers 1 to 6
ward = {"healthy": nothing} | dict(zip("ABCD", random.Random(100).sample(faults, 4), strict=True))
some_x = store[::4]
chart = {}
for name, fault in ward.items():
    sick = copy.deepcopy(sae)
    fault(sick)
    latents = sick.encode(some_x)
    direction = torch.nn.functional.normalize(sick.W_dec, dim=1)
    chart[name] = {
        "fvu": fvu(some_x, sick.decode(latents)),
        "l0": float((latents > 0).sum(dim=1).float().mean()),
        "gamma": shrinkage(some_x, sick.decode(latents)),
        "density": (latents > 0).float().mean(dim=0),
        "cosine": (direction @ direction.T).fill_diagonal_(-1).amax(dim=1),
    }
print(f"{'':<10}{'FVU':>7}{'L0':>7}{'γ':>7}")
for name, one in chart.items():
    print(f"{name:<10}{one['fvu']:>7.3f}{one['l0']:>7.1f}{one['gamma']:>7.2f}")

# %%
grey = "#bbbbbb"
low = torch.linspace(-4, -0.5, 36)


def shown_density(density: Tensor) -> Tensor:
    return density.log10().clamp(min=-3.95)  # what never fires goes into the first bar


figure, axes = picture("Density histograms of the four patients, each on the healthy SAE's in grey.", 4, 3.1, 2.9)
for axis, patient in zip(axes, "ABCD", strict=True):
    axis.hist(shown_density(chart["healthy"]["density"]), low, color=grey)
    axis.hist(shown_density(chart[patient]["density"]), low, color=COLOURS["batchtopk"], histtype="step", linewidth=1.6)
    axis.set_xticks([-3.95, -3, -2, -1], ["never", "0.1 %", "1 %", "10 %"], fontsize=8)
    axis.set(xlabel="density", title=f"patient {patient}", ylim=(0, 330))
axes[0].set_ylabel("latents (grey: healthy)")
for patient in "ABCD":
    print(f"{patient}: {int((chart[patient]['density'] == 0).sum())} latents never fire, ", end="")
    print(f"median density {chart[patient]['density'].median():.2%}")
figure

# %%
figure, axes = picture("Largest cosine of each decoder row, four patients, on the healthy SAE's in grey.", 4, 3.1, 2.9)
for axis, patient in zip(axes, "ABCD", strict=True):
    edges = torch.linspace(0, 1.0001, 41)
    axis.hist(chart["healthy"]["cosine"], edges, color=grey)
    axis.hist(chart[patient]["cosine"], edges, color=COLOURS["batchtopk"], histtype="step", linewidth=1.6)
    axis.set(xlabel="largest cosine with another row", title=f"patient {patient}", yscale="log", ylim=(0.7, 3000))
axes[0].set_ylabel("latents (grey: healthy)")
figure

# %% [markdown]
# ### Exercise 8.6: the SAE hospital
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●●● 5/5 · about 12 minutes · core
# > To read four charts together; each alone can be explained in several ways.
#
# Give each patient the number of its fault. No number is used twice, and two of the six are left over.
#
# - **1** Twins: a third of the latents are copies of another third.
# - **2** Half of the latents are dead.
# - **3** The mean of the activations is not subtracted.
# - **4** Every value comes out too small.
# - **5** The bar θ is too low.
# - **6** Nothing: it is healthy.
#
# **Predict first**: what should each fault do to L0, and to γ?

# %%
### BEGIN SOLUTION
#: diagnosis = ...  # {"A": "1", "B": ...}: the number of a fault, as text, for each of the patients A, B, C and D
diagnosis = {"A": "2", "B": "4", "C": "5", "D": "1"}
### END SOLUTION

# %%
check.hospital(diagnosis)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Begin with the patients whose histograms are exactly the healthy ones, and those that differ in one chart only.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# L0 halved: fewer latents that fire, or all of them less often? The densities tell. FVU *below* the healthy one: is
# that a good sign, at this L0?
# </details>
# <details><summary>Hint 3: almost the answer</summary>
#
# One patient has a tower at "never". One has every density moved to the right. One has a bar at cosine 1. The one that
# is left looks healthy in both histograms.
# </details>
#
# **What you just saw.** FVU alone would have ranked the patients, and put the one with the low bar *above* the healthy
# SAE: it spends half as many latents again. L0 beside it gives it away. And the patient with values too small has
# perfect histograms: latents fire where they should, and nobody who looks at contexts would notice.

# %% [markdown] tags=["solution"]
# **Why so.** A: 1152 latents at "never", L0 halved. B: both histograms and L0 are the healthy ones, γ is .8; the FVU
# has grown by about (1 - γ)². C: all densities higher, L0 too, γ and cosines as before. D: a bar at cosine 1, and a
# high FVU, for a third of the latents is lost; L0 hardly tells, because twins fire together. Usual mistakes: calling A
# a bar that is too *high* (that would make L0 small as well, but few latents would never fire), and giving B the
# missing mean.
#
# Which can be cured without training? C: calibrate θ again (06). B: divide the decoder by γ. A and D have lost what
# they knew.

# %% tags=["solution"]
sick = copy.deepcopy(sae)
too_short(sick)
sick.W_dec /= chart["B"]["gamma"]
cured = fvu(some_x, sick(some_x))
print(f"patient B, decoder divided by γ: FVU {cured:.3f}; healthy {chart['healthy']['fvu']:.3f} at the same L0")

# %%
progress()

# %% [markdown]
# ## Summary
#
# - **A dashboard** shows density, contexts from the top *and* the middle, one from each text, what the latent writes,
#   and its company. Top contexts alone make a latent look simpler than it is.
# - **Logit effects** are the direct path only: gain and unembedding, centred. In the middle of a model they speak for
#   some latents and are noise for most; rare tokens crowd the list.
# - **An explanation is a prediction.** Of 40 random latents a reader with a one-line explanation got 16.3 of 20
#   held-out contexts right, a keyword list 12.8, luck 10 (`benchmarks/results/lessons/nb08.json`). The score depends on
#   how the negatives were chosen.
# - **Causes**: without a latent the loss rises where its news is needed, by some tenths of a nat in the mean; with it
#   added, the text goes its way, up to the scale at which it breaks.
# - **The hospital**: no chart alone is a diagnosis, and FVU without L0 is not even a symptom.
#
# ## Quiz
#
# **1.** The ten top contexts of a latent all show the word *Kepler*. Is it a latent for Kepler?
#
# <details><summary>Answer</summary>
#
# Not known. Are they from ten texts, or from one article? What is in the middle of the range? And would it say no to
# other astronomers, in contexts that you had not seen?
# </details>
#
# **2.** You take a latent out by decoding the code without it, and the loss rises by 0.06 nats on average, on all kinds
# of text. What have you measured?
#
# <details><summary>Answer</summary>
#
# Mostly the SAE's error: the reconstruction of this very SAE costs that much (04) whichever latent you take. Subtract
# the latent's part from x, and the rest stays as it was.
# </details>
#
# **3.** Steering with three times the peak gives word salad. Does that show that the explanation was wrong?
#
# <details><summary>Answer</summary>
#
# No. It shows that the stream was pushed to where the layers above have never been. Try a scale that occurs, and
# compare with a random direction of the same length.
# </details>
#
# ## Where this goes wrong in practice
#
# - **Top contexts only.** They are chosen for being clean. A latent spends most of its firing lower down.
# - **Explained and tested on the same text**, or tested against random tokens only: every explanation looks good.
# - **The judge knows more than you think**: how many are positive, in which order they come, what the marked word is.
# - **Steering shown at the one scale and prompt that worked.** Show the unsteered text, the scale, and where it breaks.
# - **A latent is not a feature.** The same feature can be split over several latents (three kinds of `=` above), and
#   one latent can have two lives. Another seed finds others (07).
# - **A low FVU is no health certificate.** The lowest in the ward was that of a patient.
#
# ## What of the paper this covered
#
# None of its experiments: interpretability was not measured in the BatchTopK paper, which names that among its
# limitations. Everything here is about one SAE of one small model.
#
# ## Next
#
# All of this took minutes, on a model with 135 million parameters. What does it take to do it for real: GPT-2, Gemma 2,
# a billion tokens, a GPU? **09** opens with a piece of paper and some arithmetic.
