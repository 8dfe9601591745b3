# %% [markdown]
# # 09 Full training: from minutes to hours
#
# So far everything took minutes. GPT-2, Gemma 2, a billion tokens, a GPU: what does it take to do it for real? Mostly
# arithmetic before it starts, and a good checkpoint before it breaks.
#
# **After this notebook you can**
#
# - say how much memory and how many hours a training run takes, before you rent anything;
# - tell which of two bills is the larger, that of the language model or that of the SAEs, and share the first;
# - write a checkpoint from which a run goes on as if it had never stopped, equal to the last bit;
# - cut one batch that lies on many GPUs, and say what has to be sent for it;
# - fold the normalisation into the weights, and hand an SAE to another library.
#
# **You need** 04 (the batch cut) and 06 (the threshold θ). **Time**: about an hour and a half with all five exercises,
# all of them core. No GPU is needed. **Where a GPU or the hub is missing, this notebook runs the same code on a small
# model with random weights. Nothing that comes out of that model says anything about GPT-2.**

# %% tags=["setup"]
pass

# %%
import copy
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import ipywidgets
import pyarrow
import torch
from jaxtyping import Float
from pyarrow.parquet import write_table
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from tutorial_sae import (
    ActivationStore,
    BatchTopKSAE,
    TrainConfig,
    heldout_slice,
    load_model,
    load_pretrained,
    load_text,
    train,
)
from tutorial_sae.checks import nb09 as check
from tutorial_sae.checks import progress
from tutorial_sae.interop import to_sae_lens
from tutorial_sae.models import KNOWN
from tutorial_sae.planning import EFFICIENCY, MACHINES, Machine, Plan, in_words, plan
from tutorial_sae.plots import COLOURS, picture
from tutorial_sae.saes.base import budget_of, keep_batch
from tutorial_sae.training import FULL, RECIPES

REAL = False  # True: with a GPU and the hub, section 4 trains the recipe on the real GPT-2, too

# %% [markdown]
# A **recipe** is what the package trains on a model unless told otherwise. Two of them are for real models. Width, k,
# batch size and Adam's settings are the paper's (Bussmann, Leask and Nanda 2024, section 4 and appendix A.1). The
# short recipes see 20 million activations, the full ones the paper's billion.

# %%
print(f"{'recipe':<20}{'hook point':<28}{'d_in':>6}{'width':>8}{'k':>4}{'batch':>7}{'activations':>15}")
for name in ("gpt2", "gemma-2-2b"):
    for recipe, full in ((RECIPES[name], ""), (FULL[name], " --full")):
        sizes = (KNOWN[name].shape.d_model, recipe.d_sae, recipe.k, recipe.config.batch_size, recipe.config.tokens)
        print(f"{name + full:<20}{KNOWN[name].hook:<28}" + "{:>6}{:>8}{:>4}{:>7}{:>15,}".format(*sizes))

# %% [markdown]
# ## 1. Plan it: memory
#
# A run that does not fit dies after the minutes it takes to load the model, or after hours, in its first evaluation. So
# count first. Four things lie in memory while an SAE is trained:
#
# 1. **The language model**, a few bytes for each of its weights. It does not learn, so that is all.
# 2. **The SAE, and what trains it.** Its numbers are `W_enc` and `W_dec`, each of d_in × `d_sae`, `b_enc` with one
#    number for each latent, and `b_dec` with one for each dimension of x. Each has a gradient. Adam remembers two
#    numbers more for each: a running mean of its gradients, and one of their squares. All in float32.
# 3. **A step.** The pre-activations z of the whole batch are made before anything is cut.
# 4. **Activations that wait**, so that they can be shuffled.
#
# ### Exercise 9.1: bytes by hand
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 8 minutes · core
# > The two numbers that grow when you make the SAE wider.
#
# Write how many bytes, in float32, (1) an SAE in training takes, with its gradients and Adam's memory, and (2) z takes
# for a batch of n tokens.
#
# **Predict first.** With GPT-2's recipe, which is larger? And which of the two does k change?


# %%
def training_bytes(d_in: int, d_sae: int, n: int) -> tuple[int, int]:
    """Bytes of an SAE with all that trains it, and of z for n tokens."""
    ### BEGIN SOLUTION
    weights = 2 * d_in * d_sae + d_sae + d_in
    return 4 * 4 * weights, 4 * n * d_sae
    ### END SOLUTION


# %%
check.bytes_by_hand(training_bytes)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# A number in float32 has 4 bytes. How many numbers belong to one weight while it is trained?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Count the SAE's numbers, biases included. Then count each four times: itself, its gradient, and two moments.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# With `weights = 2 * d_in * d_sae + d_sae + d_in` the first is `4 * 4 * weights`. z has n rows and `d_sae` columns.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 9.1: passed (a tiny SAE, GPT-2's, Gemma 2's). 1 of 5 in this notebook.`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** Sixteen bytes a weight is the number to remember. It is the same for language models that are trained with
# Adam in float32. Usual mistakes: counting the file (4 bytes a weight), forgetting the gradient because it lives only
# for a step, and counting z once per kept entry. z is dense: the cut needs all of it to know what is large.

# %% [markdown]
# The package's `plan` does this arithmetic for all four parts, for any machine. On an A100:

# %%
a100 = MACHINES[2]
for name in ("gpt2", "gemma-2-2b"):
    recipe, d_in = RECIPES[name], KNOWN[name].shape.d_model
    weights = 2 * d_in * recipe.d_sae + recipe.d_sae + d_in
    made = plan(name, recipe, recipe.config, machine=a100)
    print(f"{name}: 16 bytes x {weights:,} weights = {16 * weights / 1e9:.2f} GB")
    print(f"{'':<4}one z: 4 bytes x {recipe.config.batch_size} x {recipe.d_sae} = ", end="")
    print(f"{4 * recipe.config.batch_size * recipe.d_sae / 1e9:.2f} GB")
    print(f"{'':<4}plan: " + ", ".join(f"{part} {gb:.2f}" for part, gb in made.parts.items()), end="")
    print(f"; together {made.memory_gb:.1f} of {a100.memory_gb} GB")
    assert abs(made.parts["SAE and Adam"] - 16 * weights / 1e9) < 0.001

# %% [markdown]
# A step takes more than one z: the cut matrix, their gradients and so on. The plan counts six of them on a GPU. And k
# is nowhere: it changes which entries of z are kept, not how many there are.
#
# ## 2. Plan it: hours
#
# Training an SAE is nearly all products of matrices, and a product is easy to count.
#
# > **Why 2 per weight and token?** Each weight of a matrix is used once for each token: one multiplication, one
# > addition. These are *floating point operations*, FLOP. Going backward costs twice as much: one product for the
# > gradient of the weights, one for the gradient of what came in. So a layer that learns costs 6 per weight and token,
# > one that only runs costs 2.
#
# The language model only runs, and only up to the hook point. Its 8 or 13 lower layers must run once for each new
# token: the **harvest**. Each SAE has two matrices that learn. (That is the *dense* step. On a CPU the package works on
# the entries that survive the cut, which is cheaper. And an input needs no gradient, so 6 is a little too much.)
#
# A machine reaches part of what its data sheet says. The package counts with a share of `EFFICIENCY` = 0.4.
#
# ### Exercise 9.2: hours by hand
# > Difficulty: ●●○○○ 2/5 · Importance: ●●●●● 5/5 · about 10 minutes · core
# > Two bills: one for the harvest, one for each SAE.
#
# Several SAEs of different widths can be trained at the same time **on one harvest**: each activation is made once and
# shown to all of them. How many hours does it take? `weights_below` is the number of weights of the language model up
# to the hook point, `flops` what the data sheet promises per second.


# %%
def hours(tokens: float, weights_below: float, d_in: int, widths: list[int], flops: float) -> float:
    """Hours to train SAEs of these widths together, all on the same tokens, at 0.4 of the machine's rate."""
    ### BEGIN SOLUTION
    harvest = 2 * weights_below
    steps = sum(6 * 2 * d_in * width for width in widths)
    return tokens * (harvest + steps) / (0.4 * flops) / 3600
    ### END SOLUTION


# %%
check.hours_by_hand(hours)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# What does one token cost? First the language model, once; then every SAE.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# FLOP per token, times tokens, divided by FLOP per second, gives seconds.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# Per token: `2 * weights_below`, and for each width `6 * 2 * d_in * width`. Divide by `0.4 * flops`, then by 3600.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 9.2: passed (one SAE, four SAEs). 2 of 5 in this notebook.`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** The harvest stands outside the sum, and that is the whole point of training together. Usual mistakes: 6
# per weight for the language model too, which learns nothing here; and forgetting that one SAE has two matrices. Such
# hours are good to a factor of two or so. Reading text, shuffling and Adam's own pass over the weights are not in them.

# %% [markdown]
# Now the two bills side by side. How many SAEs of the recipe's width cost as much as the harvest that they share?

# %%
print(f"{'million FLOP per token':<26}{'harvest':>9}{'one SAE':>9}{'SAEs that cost one harvest':>29}")
for name in ("gpt2", "gemma-2-2b"):
    shape, recipe = KNOWN[name].shape, RECIPES[name]
    layers = int(KNOWN[name].hook.split(".")[1]) + KNOWN[name].hook.endswith("post")
    harvest, step = 2 * layers * shape.block, 12 * shape.d_model * recipe.d_sae
    print(f"{name:<26}{harvest / 1e6:>9.0f}{step / 1e6:>9.0f}{harvest / step:>29.1f}")
    made = plan(name, FULL[name], FULL[name].config, machine=a100)
    by_hand = FULL[name].config.tokens * (harvest + step) / (EFFICIENCY * a100.flops) / 3600
    assert abs(made.hours - by_hand) < 0.001 * by_hand

# %% [markdown]
# With GPT-2 one wide SAE costs as much as the model itself. With Gemma the harvest is the larger bill, until
# four or five SAEs ride on it. The paper trained a whole grid on each model. All of a grid together, or each by itself:

# %%
for name in ("gpt2", "gemma-2-2b"):
    recipe = FULL[name]
    widths = [width for _, width, _ in recipe.grid]
    together = plan(name, recipe, recipe.config, widths, machine=a100)
    alone = [plan(name, recipe, recipe.config, [width], machine=a100) for width in widths]
    print(f"{name}: {len(widths)} SAEs, a billion activations, {a100.name}, by arithmetic")
    print(f"    together on one harvest: {together.hours:5.1f} hours, {together.memory_gb:4.1f} GB")
    print(f"    one after the other:     {sum(p.hours for p in alone):5.1f} hours, ", end="")
    print(f"{max(p.memory_gb for p in alone):4.1f} GB at most")

# %% [markdown]
# Sharing saves hours and costs memory: every SAE brings its own sixteen bytes a weight.
#
# ## 3. The budget planner
#
# The same arithmetic under your hands. A pure function makes the plan, another makes the page, and the callback only
# assigns. "A laptop's CPU" is a made-up machine: 16 GB, and 0.1 TFLOP per second.

# %%
laptop = Machine("a laptop's CPU", 16, 0.1e12, False, gpu=False)
machines = {machine.name: machine for machine in (laptop, *MACHINES)}
colours = dict(
    zip(
        ("Python", "model", "SAE and Adam", "activations", "a harvest", "a step", "reading the weights"),
        ("#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
        strict=True,
    )
)


def budget(name: str, machine: Machine, width: int, batch: int, tokens: int, saes: int) -> Plan:
    """The plan for so many SAEs of one width, on one harvest of so many activations."""
    recipe = RECIPES[name]._replace(harvest=tokens)
    config = TrainConfig(tokens=tokens, batch_size=batch)
    return plan(name, recipe, config, [width] * saes, machine=machine)


def page(made: Plan, k: int) -> str:
    """A plan as a picture in words and bars: the parts of the memory against what the machine has."""
    room = made.machine.memory_gb
    scale = 560 / (1.05 * max(room, made.memory_gb))
    verdict = "fits" if made.fits else "does NOT fit"
    said = f"{made.memory_gb:.1f} GB of {room} GB: {verdict}. About {in_words(made.hours)}, by arithmetic."
    bars, rows, left = "", "", 0.0
    for part, gb in made.parts.items():
        bars += f'<rect x="{left:.1f}" y="14" width="{gb * scale:.1f}" height="30" fill="{colours[part]}"/>'
        rows += f'<tr><td style="color:{colours[part]}">&#9632;</td><td>{part}</td><td>{gb:.2f} GB</td></tr>'
        left += gb * scale
    line = f'<path d="M{room * scale:.1f} 4V54" stroke="#222" stroke-width="3"/>'
    label = f'<text x="{room * scale - 4:.1f}" y="68" font-size="12" text-anchor="end">the machine has {room} GB</text>'
    picture = f'<svg width="580" height="74" role="img" aria-label="{said}">{bars}{line}{label}</svg>'
    advice = "" if made.fits else f"<p>{made.advice.replace('`', '')}</p>"
    return f"<p><b>{said}</b></p>{picture}<table>{rows}</table>{advice}<p>k = {k} is in none of these numbers.</p>"


def slider(label: str, options: list[int], value: int) -> ipywidgets.SelectionSlider:
    shown = [(f"{option:,}" if option < 10**6 else f"{option // 10**6:,} million", option) for option in options]
    return ipywidgets.SelectionSlider(options=shown, value=value, description=label, continuous_update=False)


recipe_of = ipywidgets.Dropdown(options=["gpt2", "gemma-2-2b"], description="model")
machine_of = ipywidgets.Dropdown(options=list(machines), value=MACHINES[1].name, description="machine")
width_of = slider("width", [2**i for i in range(11, 18)], 16_384)
batch_of = slider("batch", [1024, 2048, 4096, 8192, 16_384], 4096)
tokens_of = slider("tokens", [20_000_000, 100_000_000, 500_000_000, 1_000_000_000], 20_000_000)
saes_of = ipywidgets.IntSlider(value=1, min=1, max=16, description="SAEs")
k_of = slider("k", [16, 32, 64, 128], 32)
controls = [recipe_of, machine_of, width_of, batch_of, tokens_of, saes_of, k_of]
view = ipywidgets.HTML()


def redraw(change: dict | None = None) -> None:
    name, machine, *sizes, k = (control.value for control in controls)
    view.value = page(budget(name, machines[machine], *sizes), k)


for control in controls:
    control.observe(redraw, "value")
redraw()
at_first = [control.value for control in controls]

# %% tags=["nbval-ignore-output"]
ipywidgets.VBox([*controls, view])

# %% [markdown]
# The callback, called by hand. Follow one question: what does it take to make a run fit?


# %%
def headline() -> str:
    return view.value.split("</b>")[0].removeprefix("<p><b>")


print("GPT-2, 24 GB:         ", headline())
recipe_of.value = "gemma-2-2b"
print("Gemma 2, 24 GB:       ", headline())
saes_of.value = 9
print("... nine SAEs:        ", headline())
width_of.value = 65_536
print("... four times wider: ", headline())
before = view.value
k_of.value = 128
assert view.value == before.replace("k = 32", "k = 128"), "k changes nothing else"
assert "does NOT fit" in view.value
saes_of.value = 1
print("... one SAE of them:  ", headline())
for control, value in zip(controls, at_first, strict=True):
    control.value = value

# %% [markdown]
# The same as a picture that needs no widget: both recipes, and both grids, in memory.

# %%
jobs = []
for name in ("gpt2", "gemma-2-2b"):
    jobs.append((f"{name}\none SAE", name, [FULL[name].d_sae]))
    jobs.append((f"{name}\ngrid of {len(FULL[name].grid)}", name, [width for _, width, _ in FULL[name].grid]))
figure, (axis,) = picture("Memory of four jobs as stacked bars against two machines.", width=8.4, height=3.8)
for place, (_, name, widths) in enumerate(jobs):
    left = 0.0
    for part, gb in plan(name, FULL[name], FULL[name].config, widths, machine=a100).parts.items():
        label = part if place == 0 else None
        axis.barh(place, gb, left=left, color=colours[part], height=0.62, label=label, edgecolor="white")
        left += gb
    print(f"{jobs[place][0].replace(chr(10), ', '):<26}{left:5.1f} GB")
for machine in MACHINES[1:3]:
    axis.axvline(machine.memory_gb, color="#444444", linestyle=":")
    axis.text(
        machine.memory_gb - 0.4, -0.42, machine.name.split(" (")[0], rotation=90, ha="right", va="top", fontsize=8
    )
axis.set_yticks(range(len(jobs)), [job[0] for job in jobs])
axis.invert_yaxis()
axis.set(xlabel="GB (model in bfloat16, batch 4096)", title="What lies in memory (dotted: what the machines have)")
figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
figure

# %% [markdown]
# ## 4. Run it
#
# For a run of hours the disk becomes too small before the clock runs out. A billion activations of GPT-2 are this much:

# %%
print(
    f"1,000,000,000 x {KNOWN['gpt2'].shape.d_model} x 2 bytes = {1e9 * KNOWN['gpt2'].shape.d_model * 2 / 1e12:.1f} TB"
)

# %% [markdown]
# So a long run **streams**: `ActivationStore(..., stream=True)` harvests while it trains, keeps what waits in memory,
# and writes nothing. Text streams too: it comes document by document, in the order in which it arrives. On a machine
# with a GPU and the hub, one command does it all, from the plan to the trained SAE:
#
#     python -m tutorial_sae train gpt2
#
# **Here the same code runs on a CPU, on a small model with random weights.** It has GPT-2's architecture: learned
# positions, LayerNorm, GELU. Its tokenizer is that of the course's own model, so nothing has to be downloaded. The text
# is real: a few hundred documents of the course's corpus, in a parquet file, as the hub would send them.

# %%
if REAL and torch.cuda.is_available():
    _ = subprocess.run([sys.executable, "-m", "tutorial_sae", "train", "gpt2"], check=True)

smollm2 = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
scratch = tempfile.TemporaryDirectory()
here = Path(scratch.name)

logging.disable_progress_bar()
torch.manual_seed(0)
sizes = {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": 128, "initializer_range": 0.1}
GPT2LMHeadModel(GPT2Config(vocab_size=len(smollm2.tokenizer), **sizes)).save_pretrained(here / "small-gpt2")
_ = smollm2.tokenizer.save_pretrained(here / "small-gpt2")
small = load_model(here / "small-gpt2", device="cpu", dtype=torch.float32)

documents = [document for _, document in itertools.islice(load_text().documents(), 600)]
columns = {"text": [d.text for d in documents], "source": [d.source for d in documents]}
write_table(pyarrow.table(columns), here / "text.parquet")
print(f"{len(documents)} documents, {sum(len(d.text) for d in documents):,} characters")
print(
    f"the model: {sum(w.numel() for w in small.original_model.parameters()):,} random weights; hook {small.card.hook}"
)

# %% [markdown]
# The shuffling memory is set so small that the activations come in several parts, as they do in a long run.

# %%
config = TrainConfig(tokens=100_000, batch_size=1024, lr=1e-3)


class Unplugged(ActivationStore):
    """A stream that somebody stops with Ctrl-C: after so many batches, or never."""

    after = None

    def batches(self, n, epochs=None, start=None):
        for count, batch in enumerate(super().batches(n, epochs, start)):
            if count == self.after:
                raise KeyboardInterrupt
            yield batch


def stream() -> Unplugged:
    text = load_text(here / "text.parquet", stream=True)
    return Unplugged(small, text, tokens=config.tokens, stream=True, memory_gb=0.03)


def new_sae() -> BatchTopKSAE:
    return BatchTopKSAE(small.cfg.d_model, 512, k=8, seed=0)


never_stopped = train(new_sae(), stream(), config, out=here / "never-stopped")
print(f"{config.steps} steps of {config.batch_size} activations")
print("the run's folder:", ", ".join(sorted(file.name for file in (here / "never-stopped").iterdir())))

# %% [markdown]
# ## 5. Lose it, resume it
#
# A run of hours will be stopped. A spot machine is taken away, a quota ends, somebody closes the laptop. What must be
# on disk, so that nothing is lost?
#
# Here is a training loop with everything that is in the real one, in small: a weight, Adam, a learning rate that
# follows the number of the step, and data in an order that a generator draws.


# %%
class Loop:
    """A training loop that holds all that its next step depends on."""

    def __init__(self, seed: int):
        self.data = torch.randn(512, 8, generator=torch.Generator().manual_seed(seed))  # always the same
        self.order = torch.Generator().manual_seed(seed + 1)  # draws the batches
        self.weight = torch.nn.Parameter(torch.ones(8))
        self.adam = torch.optim.Adam([self.weight])
        self.step = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            x = self.data[torch.randint(len(self.data), (16,), generator=self.order)]
            self.adam.param_groups[0]["lr"] = 0.1 / (1 + self.step)  # the schedule
            loss = (x @ self.weight - x[:, 0] * x[:, 1]).square().mean()
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()
            self.step += 1


# %% [markdown]
# ### Exercise 9.3: lose it, resume it
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●●● 5/5 · about 15 minutes · core
# > A checkpoint is everything that the rest of the run depends on. Most that fail leave one thing out.
#
# `save_state` gives a dictionary of what a loop has to remember. The loop then trains on; what was saved must **not**
# change with it. `load_state` puts that state into a fresh loop of the same seed. From there on both must take the same
# steps, equal to the last bit. The data itself need not be saved.
#
# **Predict first.** How many things are there? And if you forget one: does anything crash?


# %%
def save_state(loop: Loop) -> dict:
    """All that the rest of the run depends on."""
    ### BEGIN SOLUTION
    parts = {"weight": loop.weight.detach(), "adam": loop.adam.state_dict()}
    return copy.deepcopy(parts) | {"step": loop.step, "order": loop.order.get_state()}
    ### END SOLUTION


def load_state(loop: Loop, state: dict) -> None:
    """Make a fresh loop go on from there."""
    ### BEGIN SOLUTION
    loop.weight.data.copy_(state["weight"])
    loop.adam.load_state_dict(state["adam"])
    loop.order.set_state(state["order"])
    loop.step = state["step"]
    ### END SOLUTION


# %%
check.resume(Loop, save_state, load_state)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Read `run` line by line. Whatever is read before it is written, and changes from step to step, is part of the state.
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# Four things: the weight, Adam's memory, the number of the step, the place in the data. A tensor that is kept without a
# copy goes on changing.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# Adam has `state_dict()` and `load_state_dict(...)`, a generator has `get_state()` and `set_state(...)`. Copy with
# `copy.deepcopy`. Put the weight back with `loop.weight.data.copy_(...)`, into the tensor that Adam knows.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 9.3: passed (stopped after 3 of 8 steps: equal to the last bit). 3 of 5 in this notebook.`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** None of the four can be computed from the others here. Nothing crashes without them, and that is the
# danger: the loss looks plausible, and the run is another one. Usual mistakes: `state_dict()` without a copy (it holds
# the tensors themselves; written to a file at once it does no harm), Adam's moments without the number of its steps,
# and a new `Parameter` in place of the old one, which Adam then never touches.

# %% [markdown]
# What does it cost to forget one of them? A loop of 60 steps loses one thing after 20.

# %%
forget = {
    "Adam's memory": lambda loop: loop.adam.state.clear(),
    "the step (learning rate)": lambda loop: setattr(loop, "step", 0),
    "the place in the data": lambda loop: loop.order.manual_seed(2),
}


def path(lose) -> Float[Tensor, "steps 8"]:
    """The weight after each of 60 steps, of a loop that loses something after 20."""
    loop, weights = Loop(1), []
    for step in range(60):
        if step == 20:
            lose(loop)
        loop.run(1)
        weights.append(loop.weight.detach().clone())
    return torch.stack(weights)


whole = path(lambda loop: None)
figure, (axis,) = picture(
    "Distance from the run that never stopped, after one thing is forgotten.", width=7.6, height=3.6
)
for (what, lose), colour, style in zip(
    forget.items(), ("#0072B2", "#D55E00", "#009E73"), ("-", "--", "-."), strict=True
):
    away = (path(lose) - whole).norm(dim=1)
    axis.plot(range(21, 61), away[20:], color=colour, linestyle=style, label=what)
    print(f"forgotten: {what:<26} distance 1 step later {away[20]:.3f}, 40 steps later {away[-1]:.3f}")
print(f"forgotten: nothing; run a second time, distance {(path(lambda loop: None) - whole).norm():.3f}")
axis.set(
    yscale="log", xlabel="step", ylabel="distance of the weight", title="Stopped after 20 steps, one thing forgotten"
)
axis.legend(frameon=False, loc="lower right")
figure

# %% [markdown]
# None of them crashes, and each makes another run of it. The learning rate's schedule begins again at its highest: that
# one you would see in the loss. The other two hardly show, and never go away. (The fourth is the weight itself. Whoever
# forgets that has forgotten the run.)
#
# Now the real one. Somebody presses Ctrl-C while the small model's SAE is trained:

# %%
unplugged = stream()
unplugged.after = 70
try:
    _ = train(new_sae(), unplugged, config, out=here / "stopped")
except KeyboardInterrupt:
    print("stopped by Ctrl-C")
with safe_open(here / "stopped" / "checkpoint" / "state.safetensors", framework="pt") as file:
    notes = json.loads(file.metadata()["notes"])
    for name in sorted(file.keys()):
        print(f"    {name:<28}{tuple(file.get_slice(name).get_shape())}")

# %% [markdown]
# There are your four. The SAE with its counters and normalisation; Adam's two moments and its steps, for each
# parameter; and, in the notes, the step and the place in the stream:

# %%
place = notes["positions"][0]
print(f"step {notes['step']} of {config.steps}")
print(f"in part {place['part']} of the stream, {place['batch']} of its batches are out")
print(f"the part begins after {place['kept']:,} activations, at document {place['text']['document']}, ", end="")
print(f"with {len(place['text']['tokens'])} tokens left over from the one before")

# %% [markdown]
# `left.0` holds activations of the part before, too few for a batch. A part is shuffled by a generator of its own,
# drawn from seed, epoch and part. So its order need not be saved. Resuming harvests this part again, skips the batches
# that are out, and goes on.

# %%
resumed = train(new_sae(), stream(), config, out=here / "stopped")
states = [result.sae.state_dict() for result in (never_stopped, resumed)]
for name in states[0]:
    assert torch.equal(states[0][name], states[1][name]), name
print(f"{len(states[0])} tensors of the SAE, the threshold among them: equal bit for bit")
lines = [[{**line, "seconds": 0} for line in result.history] for result in (never_stopped, resumed)]
print("every line of the log, but for the seconds:", "equal" if lines[0] == lines[1] else "different")

# %%
figure, (axis,) = picture("The logged FVU of both runs; the resumed one covers the other.", width=7.6, height=3.4)
for (name, result), style, wide in zip(
    {"never stopped": never_stopped, "stopped and resumed": resumed}.items(), ("-", "--"), (4, 1.5), strict=True
):
    colour = COLOURS["topk"] if wide == 4 else COLOURS["batchtopk"]
    line = [(point["step"], point["fvu"]) for point in result.history]
    axis.plot(*zip(*line, strict=True), color=colour, linestyle=style, linewidth=wide, label=name)
axis.axvline(70, color="#444444", linestyle=":")
axis.text(71, 0.9 * max(point["fvu"] for point in resumed.history), "Ctrl-C")
axis.set(xlabel="step", ylabel="FVU of the batch", title="A small GPT-2 with random weights: one run, or two halves")
axis.legend(frameon=False)
figure

# %% [markdown]
# From the command line it is the same: run the command again with `--resume` and the same `--out`.
#
# After **`kill -9`**, or a power cut, nobody can write anything any more. Then the run goes on from the last checkpoint
# that was written, at most `checkpoint_seconds` ago, and takes a few steps a second time. The end is the same. That a
# checkpoint is *whole or not there* matters most in this case. The package writes it beside the old one and renames it
# when it is complete. The project's tests kill runs at chosen moments and compare the bits.
#
# ## 6. Many GPUs
#
# With w GPUs there are w processes, called **ranks**. Each has the whole SAE, and its own part of each batch. For most
# SAEs that is simple: every rank computes the gradient of its own part, and all take the mean. Batch cuts are harder,
# for the cut belongs to the *whole* batch, and no rank has seen it.
#
# What if each rank cuts its own part, with its own share of the budget? Let us see, in one process, on real
# pre-activations: 4096 held-out tokens of SmolLM2, and the shipped BatchTopK SAE. Once each rank has tokens from
# everywhere. Once it reads text of its own, as ranks that stream do.

# %%
sae = load_pretrained("batchtopk").requires_grad_(False)
heldout = heldout_slice(smollm2)
k = 32
everywhere = torch.randperm(len(heldout), generator=torch.Generator().manual_seed(0))[:4096]
batches = {
    "tokens from everywhere": sae.pre_activations(heldout[everywhere]),
    "text of its own": sae.pre_activations(heldout[:4096]),
}
ranks = [1, 2, 4, 8, 16, 32]
moved = {}
for name, z in batches.items():
    one = keep_batch(z, k) > 0
    moved[name] = []
    for w in ranks:
        local = torch.cat([keep_batch(part, k) for part in z.chunk(w)]) > 0
        moved[name].append(float((local != one).sum() / (local | one).sum()))
    print(f"{name:<24}" + "  ".join(f"{w} ranks: {share:.1%}" for w, share in zip(ranks, moved[name], strict=True)))
figure, (axis,) = picture("Share of entries that local cuts decide otherwise, against the number of ranks.", width=7)
for (name, shares), style in zip(moved.items(), ("o-", "s--"), strict=True):
    colour = COLOURS["topk"] if style == "o-" else COLOURS["batchtopk"]
    axis.plot(ranks, [100 * share for share in shares], style, color=colour, label=name)
axis.set(xscale="log", xlabel="ranks that share a batch of 4096 tokens", ylabel="entries decided otherwise (%)")
axis.set_title("A cut for each rank is another cut")
axis.set_xticks(ranks, [str(w) for w in ranks])
axis.minorticks_off()
axis.set_ylim(0)
axis.legend(frameon=False)
figure

# %% [markdown]
# The more ranks share the batch, the more differs, and more still where each reads text of its own. It is 04 again: who
# your neighbours are decides what you keep. Some call that good enough. But then the number of GPUs is a setting of the
# SAE. The exact cut costs little. Gathering all of z would be much: the whole matrix, at every step. What is needed of
# it?
#
# ### Exercise 9.4: one cut for all ranks
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●●○ 4/5 · about 12 minutes · core
# > An exact answer needs less than everything.
#
# The whole batch has a budget of `budget` entries. Write two functions:
#
# - `to_send`: what *one* rank sends to all the others, knowing nothing but its own z and the budget. As few numbers as
#   are always enough; all ranks send equally many.
# - `bar`: from what all ranks sent, the smallest **positive** entry that the cut of the whole batch keeps.
#
# (If there are fewer positive entries than the budget, all of them are kept.)


# %%
def to_send(z: Float[Tensor, "tokens latents"], budget: int) -> Float[Tensor, " numbers"]:
    """What a rank tells the others of its z."""
    ### BEGIN SOLUTION
    return z.flatten().topk(budget).values
    ### END SOLUTION


def bar(sent: list[Float[Tensor, " numbers"]], budget: int) -> float:
    """The smallest positive entry that the cut of all ranks' entries keeps."""
    ### BEGIN SOLUTION
    kept = torch.cat(sent).topk(budget).values
    return float(kept[kept > 0].min())
    ### END SOLUTION


# %%
check.one_cut(to_send, bar)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# How many of the kept entries can lie on one rank, at most?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# All of them, if the others have nothing large. More than the budget, never: an entry that is not among the `budget`
# largest of its own rank is not among the `budget` largest of all.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# Send `z.flatten().topk(budget).values`. The bar: put together what was sent, take the `budget` largest, and of those
# that are positive the smallest.
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 9.4: passed (two ranks, one has all, four ranks, few positives). 4 of 5 in this notebook.`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** If an entry is kept, fewer than `budget` entries of the whole batch are larger. Then fewer than `budget`
# of its own rank are larger, and it is sent. Usual mistakes: sending only the rank's share, which is right as long as
# luck spreads the large entries; and the mean of the ranks' bars, which is θ's rule from 06, but not the cut.

# %% [markdown]
# Eight ranks, each with text of its own, against one process with the whole batch:

# %%
z = batches["text of its own"]
parts, n_kept = z.chunk(8), budget_of(k, len(z))
sent = [part.flatten().topk(n_kept).values for part in parts]
cut = torch.cat(sent).topk(n_kept).values.min()
exact = torch.cat([torch.where(part >= cut, part, 0) for part in parts])
print("entries decided otherwise:", int(((exact > 0) != (keep_batch(z, k) > 0)).sum()), f"of {n_kept:,}")
print(f"sent by each rank: {n_kept / parts[0].numel():.0%} of its z")
fires = torch.stack([(part > 0).any(dim=0) for part in exact.chunk(8)])
print(f"latents that fire: on rank 0 {int(fires[0].sum())}, on any rank {int(fires.any(dim=0).sum())}")

# %% [markdown]
# The last line is the next trap. A latent that is silent on rank 0 may be alive on rank 3. If each rank kept its own
# count of tokens since a latent last fired, AuxK would revive the living. So the ranks ask "did *any* of us see it?",
# the maximum over ranks. In short, what ranks must agree on:
#
# | what | how |
# |---|---|
# | gradients | mean over ranks (each has equally many tokens) |
# | the cut of a batch | every rank sends its `budget` largest; one cut |
# | who has fired | any (a maximum) |
# | normalisation, initial weights, θ | rank 0 says |
# | when to save, when to stop | any; then all at the same step |
# | the text | each rank reads documents of its own |
#
# The command for four GPUs in one machine:
#
#     torchrun --nproc-per-node=4 -m tutorial_sae train gpt2
#
# **What is exact, and what is not.** The cut is exact: on the same batch, w ranks keep what one process would keep. The
# sums of gradients are taken in another order, so the last digits differ. The text is divided, so a streaming run on
# four ranks sees its batches in another order than one on a single GPU. Resumed on *as many* ranks as before, it goes
# on exactly. Moved to *another* number of ranks, all begin at the earliest document that one of them was at: a little
# text is read twice, none is left out.
#
# ## 7. Hand it over
#
# A trained SAE is for others, too. Most of them use SAELens, or code that reads its files. There a JumpReLU SAE
# computes on activations **as they are**. Ours first takes off a mean and divides by a scale:
#
# $$x_n = (x - \text{mean}) / \text{scale} \qquad z = (x_n - b_\text{dec})\, W_\text{enc} + b_\text{enc} \qquad
# \hat x = (f\, W_\text{dec} + b_\text{dec}) \cdot \text{scale} + \text{mean}$$
#
# > **Why fold?** Each of these steps is linear, and two linear steps in a row are one. Find weights with which
# > `(x - b_dec) @ W_enc + b_enc` and `f @ W_dec + b_dec` do the same on raw x. Then there is nothing that the receiver
# > could forget.
#
# ### Exercise 9.5: units folded away
# > Difficulty: ●●●○○ 3/5 · Importance: ●●●●○ 4/5 · about 12 minutes · core
# > The most common way to break a good SAE is to feed it in the wrong units.
#
# Write the new weights, so that on raw activations z and the reconstruction are the same as before. `b_enc` stays as it
# is, and so does θ: the latents are the same numbers.


# %%
def fold(
    W_enc: Float[Tensor, "d_in latents"],
    b_enc: Float[Tensor, " latents"],
    W_dec: Float[Tensor, "latents d_in"],
    b_dec: Float[Tensor, " d_in"],
    mean: Float[Tensor, " d_in"],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc, b_enc, W_dec and b_dec of an SAE that does the same on raw activations."""
    ### BEGIN SOLUTION
    return W_enc / scale, b_enc, W_dec * scale, b_dec * scale + mean
    ### END SOLUTION


# %%
check.folded_away(fold)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Begin with the decoder. What comes out when no latent fires?
# </details>
# <details><summary>Hint 2: the idea</summary>
#
# When nothing fires, x_hat is `b_dec * scale + mean`: that is the new `b_dec`. Each row of the decoder is as much
# longer. Now write x_n - b_dec with the new `b_dec`.
# </details>
# <details><summary>Hint 3: almost the code</summary>
#
# `x_n - b_dec` is `(x - mean - b_dec * scale) / scale`, so `(x - new_b_dec) / scale`. Who can take the division?
# </details>
# <details><summary>Expected output</summary>
#
# `Exercise 9.5: passed (scale 4.0, scale 0.25). 5 of 5 in this notebook.`
# </details>

# %% [markdown] tags=["solution"]
# **Why so.** The decoder tells the new `b_dec` and the new rows; the encoder then has only the division left, and
# `W_enc` takes it. Usual mistakes: the encoder scaled the wrong way (raw x is larger, so `W_enc` becomes smaller), and
# the mean multiplied by the scale. The decoder's rows now have length `scale` instead of 1. Whoever compares latents by
# size has to know that.

# %% [markdown]
# `to_sae_lens` does the same and writes the two files that SAELens reads. Here they are read back without SAELens, by
# its formula, and held against the original on raw held-out activations:

# %%
folder = to_sae_lens(sae, here / "for_sae_lens")
theirs = load_file(folder / "sae_weights.safetensors")
x = heldout[everywhere[:1024]]
pre = (x - theirs["b_dec"]) @ theirs["W_enc"] + theirs["b_enc"]
code = torch.where(pre > theirs["threshold"], pre.relu(), 0)
ours = sae.encode(x)
only_one = int(((code > 0) != (ours > 0)).sum())
difference = float((code @ theirs["W_dec"] + theirs["b_dec"] - sae(x)).norm() / sae(x).norm())
print(", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(theirs.items())))
print(
    f"scale {float(sae.norm_scale):.2f}; rows of the decoder: {float(sae.W_dec.norm(dim=1).mean()):.2f} before, ",
    end="",
)
print(f"{float(theirs['W_dec'].norm(dim=1).mean()):.2f} after")
assert only_one <= 3
assert difference < 1e-5
print(f"{(ours > 0).sum() / 1000:.0f} thousand entries are kept; codes and reconstructions agree up to rounding")

# %% [markdown]
# With SAELens installed, its own code was tried on the shipped SAEs: of all entries, so many are kept by one of the two
# only (`benchmarks/results/sae_lens.json`).

# %%
tried = json.loads(Path("../benchmarks/results/sae_lens.json").read_text(encoding="utf-8"))
print(f"SAELens {tried['versions']['sae-lens']}, {tried['tokens']:,} held-out tokens")
for name, row in tried["saes"].items():
    print(f"{name:<10}{row['active']:,} entries kept, {row['active_in_one_only']} of them by one only")

# %% [markdown]
# What does not travel: the mask. This SAE has never seen an attention sink (01), and the file can only *say* so. It is
# in the notes of `cfg.json`, beside the fingerprint of the model.

# %%
card = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))["metadata"]
print(f"hook {card['hook_name']}; mask: norms up to {card['trained_with']['mask']['norm_limit']:.0f}")

# %% [markdown]
# ## 8. What is measured, and what is not
#
# You have seen many numbers of hours. Be exact about what they are.
#
# - **Nothing in this project was measured on the real weights of GPT-2 or Gemma 2, and nothing on a GPU.** Hours on
#   GPUs are arithmetic from data sheets, good to a factor of two or so.
# - **Memory** was held against true sizes, on a CPU and with random weights: see below.
# - **Resuming and many ranks** were tested on CPUs, on small models: bit for bit, and cut for cut.
# - **The settings for GPT-2 and Gemma** are the paper's where it states them. What it leaves open is ours: AuxK after
#   10 million tokens, the normalisation, the price of JumpReLU's L0.
# - **The paper's results** on these models are plots without numbers. So there is no table to compare your run with,
#   only directions: which curve lies below which. The package draws a grid beside these claims (`--grid paper`).
#
# If you have a GPU for a night, you will know more than this notebook does. Look first at `python -m tutorial_sae train
# --list`, which plans for *your* machine.
#
# The plans of memory, against what the processes took at their peak (`benchmarks/results/true_size.json`; GPT-2 Small
# was killed twice on the way, and Gemma 2 2B has only the layers up to 12):

# %%
measured = json.loads(Path("../benchmarks/results/true_size.json").read_text(encoding="utf-8"))
for name in ("gpt2", "gemma-2-2b"):
    for command in measured[name]["commands"]:
        if command["planned_gb"]:
            print(f"{name:<11}planned {command['planned_gb']:.1f} GB, at its peak {command['peak_gb']:.2f} GB")

# %%
progress()

# %% [markdown]
# ## Summary
#
# - **Memory**: sixteen bytes for each weight of an SAE, some copies of z (n × `d_sae`), the activations that wait, the
#   language model. k is in none of them.
# - **Hours**: 2 per weight and token for what only runs, 6 for what learns. With Gemma the harvest is the larger bill,
#   so let several SAEs share it.
# - **A checkpoint** is all that the rest of the run depends on: weights, Adam, step, place in the data. Whoever forgets
#   one gets another run, without a warning.
# - **Many ranks, one cut**: each sends its `budget` largest, and the cut is exact. Who has fired is asked of all.
# - **Handing on**: mean and scale fold into the weights. Mask and model travel as notes.
#
# ## Quiz
#
# **1.** Your run does not fit. Which of these help: a smaller k, a smaller batch, a narrower SAE, fewer tokens?
#
# <details><summary>Answer</summary>
#
# A smaller batch (less z) and a narrower SAE (less of everything). Not k. Fewer tokens make it shorter, not smaller,
# unless the activations that wait are fewer than the memory set aside for them.
# </details>
#
# **2.** After resuming, the loss makes a jump upward and then comes down again. What was probably not saved?
#
# <details><summary>Answer</summary>
#
# The step, most likely: the learning rate begins its schedule again. Or Adam's memory: without it the first steps are
# all as long as the rate allows. A forgotten place in the data makes no jump. That is why it is found last.
# </details>
#
# **3.** A colleague doubles the number of GPUs and keeps the batch of each. The new SAE has another L0 in evaluation.
# Where do you look?
#
# <details><summary>Answer</summary>
#
# The whole batch is twice as large, and so fewer steps are taken for the same tokens. And if their code cuts each GPU's
# part by itself, neighbours are others. Then at θ: on which text was it found, and did all ranks agree on one?
# </details>
#
# ## Where this goes wrong in practice
#
# - **Planning the training and forgetting the evaluation.** Eight rows of 127 tokens, times Gemma's vocabulary of
#   256,000, times 4 bytes, are a gigabyte of logits.
# - **A checkpoint that was never resumed.** Stop a short run on purpose, before the long one.
# - **A stream that is not shuffled enough.** Documents come in order; what waits in memory is all that mixes them.
# - **A different number of GPUs, the same settings.** The batch size of `TrainConfig` is that of all ranks together. In
#   other libraries it may be that of each.
# - **Activations in the wrong units.** Folded or not, check FVU on a few hundred tokens after every handover.
# - **Ten SAEs, ten harvests.** With a large model nearly all of the money goes into the same forward passes, ten times.
#
# ## What of the paper this covered
#
# Section 4 and appendix A.1 of Bussmann, Leask and Nanda 2024 (arXiv 2412.06410): models, widths, k, batch size, Adam,
# number of tokens. Planning, resuming, many ranks and formats are not in it.
#
# ## Where to go from here
#
# This is the end of the course. You have built five kinds of SAE, and the one this is about from its cut to its file.
# Some next steps:
#
# - Train one on a model that you care about: `load_model` takes a folder, `load_text` a file.
# - Run the paper's grid for a night, and see which of its claims hold for you. 07 tells how to be fair.
# - Open your SAE with the dashboards of 08, and try to be wrong about a latent.
# - Read the other side: *Sparse but Wrong* (Chanin and Garriga-Alonso) on what a wrong L0 does, and Gao et al. 2024 on
#   how SAEs scale.
