// The three-cuts explorer: arithmetic, then controls and picture. It runs in a notebook (default export, anywidget) and
// on a page of its own (mount). What the lists in `data` hold, and why they suffice, is told in explorer.py.

export const CUTS = ["row", "batch", "threshold"];
const TELLS = ["the k largest of each token", "the n·k largest of all n tokens together", "everything above θ"];
const SHAPES = { row: "■", batch: "▲", threshold: "◆" }, DASHES = { row: [7, 3], batch: [3, 3], threshold: [1, 3] };

// -- arithmetic: no page needed --------------------------------------------------------------------------------

function array(Kind, part) {
  if (typeof part === "string") part = new DataView(Uint8Array.from(atob(part), (c) => c.charCodeAt(0)).buffer);
  return new Kind(part.buffer.slice(part.byteOffset, part.byteOffset + part.byteLength));
}

// All that has to be sorted is sorted here, once; a slider that moves only looks things up.
export function prepare(data) {
  const values = array(Float32Array, data.values), starts = [0], row = new Int32Array(values.length);
  data.lengths.forEach((length, t) => {
    row.fill(t, starts[t], starts[t] + length);
    starts.push(starts[t] + length);
  });
  // Largest first; at a tie the lower token, then the lower latent: the place in the list says both.
  const order = Uint32Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);
  const beside = data.beside.map(([name, n, larger]) => [name, { n, larger: array(Int32Array, larger) }]);
  const energies = array(Float32Array, data.energy), energy = energies.reduce((sum, one) => sum + one, 0);
  return {
    ...data, values, starts, row, order, energies, energy, n: starts.length - 1, mostK: Math.min(128, data.latents),
    beside: new Map(beside), columns: array(Int32Array, data.columns), errors: array(Float32Array, data.errors),
    top: values.length ? values[order[0]] : 1,
  };
}

// The first place in low..high at which a test fails that holds up to there.
function first(low, high, test) {
  while (low < high) {
    const middle = (low + high) >> 1;
    if (test(middle)) low = middle + 1;
    else high = middle;
  }
  return low;
}

// How many entries of each token a cut keeps; they are its largest ones.
export function kept(s, cut, { k, theta, beside }) {
  if (cut === "row") return Int32Array.from(s.lengths, (length) => Math.min(k, length));
  if (cut === "threshold") {
    const bar = Math.fround(theta), above = (i) => s.values[i] > bar;
    return Int32Array.from(s.lengths, (_, t) => first(s.starts[t], s.starts[t + 1], above) - s.starts[t]);
  }
  const { n, larger } = s.beside.get(beside), counts = new Int32Array(s.n), budget = k * (s.n + n);
  const end = first(0, s.order.length, (i) => i + larger[s.order[i]] < budget);
  for (let i = 0; i < end; i++) counts[s.row[s.order[i]]]++;
  return counts;
}

// The share of the squared length that is left: of all tokens, and of each.
export function lost(s, counts) {
  const left = Array.from(counts, (count, t) => s.errors[s.starts[t] + t + count]);
  return { error: left.reduce((sum, one) => sum + one, 0) / s.energy, each: left.map((one, t) => one / s.energies[t]) };
}

// -- controls --------------------------------------------------------------------------------------------------

const STYLE = `
.cuts3 { --ink: var(--jp-ui-font-color1, var(--vscode-editor-foreground, var(--colab-primary-text-color, #1f2328)));
  --row: #0072B2; --batch: #D55E00; --threshold: #009E73; --soft: #80808022; --line: #80808066;
  color: var(--ink); font: 13px/1.5 var(--jp-ui-font-family, system-ui, sans-serif); max-width: 1100px; padding: 4px; }
@media (prefers-color-scheme: dark) { .cuts3 { --ink: var(--jp-ui-font-color1,
  var(--vscode-editor-foreground, var(--colab-primary-text-color, #e6e6e6))); } }
.cuts3.dark { --row: #56B4E9; --batch: #E69F00; --threshold: #2fc49a; }
.cuts3, .cuts3 * { box-sizing: border-box; } .cuts3 [hidden] { display: none !important; }
.cuts3 .bar { display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center; margin: 8px 0; }
.cuts3 label { display: inline-flex; align-items: center; gap: 7px; vertical-align: middle; cursor: pointer; }
.cuts3 input, .cuts3 select, .cuts3 button { font: inherit; color: inherit; accent-color: var(--focus); margin: 0; }
.cuts3 input[type=text], .cuts3 select, .cuts3 button { background: var(--soft); border: 1px solid var(--line);
  border-radius: 5px; padding: 2px 8px; }
.cuts3 option { color: #1f2328; background: #fff; } .cuts3 canvas { display: block; width: 100%; border-radius: 4px; }
.cuts3 .kn, .cuts3 .thetan { width: 62px; } .cuts3 input[type=range] { width: 140px; }
.cuts3 .say { display: flex; gap: 8px; } .cuts3 .say label, .cuts3 .text { flex: 1; min-width: 0; }
.cuts3 :focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
.cuts3 table { border-collapse: collapse; width: 100%; color: inherit; font-size: 13px; margin: 0; }
.cuts3 th, .cuts3 td { text-align: right; padding: 3px 8px; vertical-align: middle;
  border: 0; font-variant-numeric: tabular-nums; }
.cuts3 .l { text-align: left; } .cuts3 thead tr { border-bottom: 1px solid var(--line); }
.cuts3 tbody tr { background: none; cursor: pointer; } .cuts3 tbody tr.on { background: var(--soft); }
.cuts3 .shape { width: 1em; line-height: 1; text-align: center; } .cuts3 p { margin: 3px 0; min-height: 1.5em; }
.cuts3 .message { border-left: 4px solid #D55E00; background: var(--soft); padding: 4px 10px; margin: 6px 0; }
`;

const MARKUP = `
<form class="say"><label>sentence <input class="text" type="text" dir="auto" autocomplete="off"></label>
  <button type="submit">cut it</button></form>
<p class="message" role="alert" hidden></p>
<div class="bar"><label>k <input class="k" type="range" min="1"></label>
  <input class="kn" type="text" inputmode="numeric" aria-label="k, as a number">
  <label>θ <input class="theta" type="range" min="0" max="400"></label>
  <input class="thetan" type="text" inputmode="decimal" aria-label="θ, as a number">
  <label class="with">batch shared with <select class="beside"></select></label>
  <button class="reset" type="button">reset</button></div>
<table class="three"><thead><tr><th class="l" scope="col">cut</th><th class="l" scope="col">keeps</th>
  <th scope="col">mean L0</th><th scope="col">L0 from – to</th><th scope="col">error</th></tr></thead><tbody></tbody>
</table>
<div class="bar views"><span>columns:</span>
  <label><input type="radio" value="latent" checked> latents, strongest first</label>
  <label><input type="radio" value="strength"> each token’s entries, largest first</label></div>
<canvas tabindex="0" role="application" aria-roledescription="matrix"></canvas>
<p class="status" role="status"></p><p class="readout" aria-live="polite"></p>
<details><summary>every token as a table, and what the words mean</summary>
  <p>A row is a token, an entry how strongly a latent (a unit of the SAE) responds to it. L0: latents kept. Error: the
  share of the squared length that is left unexplained, after subtracting the training data’s mean; nearly FVU.</p>
  <table class="all"><thead><tr><th class="l" scope="col">token</th></tr></thead><tbody></tbody></table></details>`;

const visible = (piece) => piece.replace(/\n/g, "⏎").replace(/\t/g, "⇥").trim() || "␣";
const make = (tag, textContent = "", className = "", more = {}) =>
  Object.assign(document.createElement(tag), { textContent, className, ...more });
const digits = (x) => Number(x.toPrecision(4)).toString();
const doubled = (size, least) => { while (size < least) size *= 2; return size; };
let made = 0;

// Builds the explorer inside `el`. `say(text)`, if given, asks for another sentence: `update` and `answered` are told.
export function mount(el, data, say) {
  const root = make("div", "", "cuts3"), $ = (name) => root.querySelector(name), id = `cuts3-${++made}-${Date.now()}`;
  root.innerHTML = MARKUP;
  root.prepend(make("style", STYLE));
  root.onkeydown = (event) => event.stopPropagation(); // else JupyterLab takes the arrow keys from the controls
  el.append(root);
  let s, now, view = "latent", cut = "batch", cell = null, frame = 0, counts = {}, errors = {}, at, colour;
  const canvas = $("canvas"), g = canvas.getContext("2d"), again = () => (frame ||= requestAnimationFrame(draw));

  const complain = (text) => Object.assign($(".message"), { textContent: text, hidden: !text });
  function set(change) {
    now = { ...now, ...change };
    complain("");
    refresh();
  }
  // θ has a slider of ratios, from a thousandth of the largest entry to the largest.
  const toTheta = (x) => s.top * Math.pow(1000, x / 400 - 1);
  const fromTheta = (theta) => 400 * (1 + Math.log(Math.max(theta / s.top, 0.001)) / Math.log(1000));

  $(".say").hidden = !say;
  root.querySelectorAll(".views input").forEach((input) => {
    input.name = `${id}-view`;
    input.onchange = () => { view = input.value; cell = null; refresh(); };
  });
  CUTS.forEach((name, i) => {
    const tr = make("tr"), th = make("th", "", "l"), label = make("label"), shape = make("span", SHAPES[name], "shape");
    const radio = make("input", "", "", { type: "radio", name: id, value: name, checked: name === cut });
    radio.onchange = () => { cut = name; refresh(); };
    tr.onclick = () => radio.checked || radio.click();
    Object.assign(shape, { ariaHidden: "true" }).style.color = `var(--${name})`;
    label.append(radio, shape, make("span", name));
    th.append(label);
    tr.append(th, make("td", TELLS[i], "l"), make("td"), make("td"), make("td"));
    $(".three tbody").append(tr);
    $(".all thead tr").append(make("th", `L0 ${name}`), make("th", "error"));
  });
  $(".k").oninput = () => set({ k: Number($(".k").value) });
  $(".theta").oninput = () => set({ theta: toTheta(Number($(".theta").value)) });
  $(".beside").onchange = () => set({ beside: $(".beside").value });
  $(".reset").onclick = () => set({ k: Math.min(s.k, s.mostK), theta: s.theta, beside: "alone" });
  $(".kn").onchange = () => {
    const k = Number($(".kn").value);
    if (Number.isInteger(k) && k >= 1 && k <= s.mostK) set({ k });
    else complain(`k has to be a whole number from 1 to ${s.mostK}`);
  };
  $(".thetan").onchange = () => {
    const text = $(".thetan").value.trim().replace(",", "."), theta = Number(text);
    if (text && Number.isFinite(theta) && theta >= 0) set({ theta });
    else complain("θ has to be a number of at least 0");
  };
  $(".say").onsubmit = (event) => {
    event.preventDefault();
    complain("");
    $(".status").textContent = "asking the model …";
    say($(".text").value);
  };
  $("details").ontoggle = tabulate;

  function update(data) {
    s = prepare(data);
    now ??= { k: Math.min(s.k, s.mostK), theta: s.theta, beside: "alone" };
    $(".beside").replaceChildren(...[...s.beside].map(([value, { n }]) =>
      make("option", n ? `${value} (${n} tokens)` : value, "", { value })));
    $(".with").hidden = s.beside.size < 2;
    $(".k").max = s.mostK;
    $(".text").value = s.sentence;
    cell = null;
    refresh();
  }

  function refresh() {
    $(".k").value = $(".kn").value = now.k;
    $(".theta").value = Math.round(fromTheta(now.theta));
    $(".theta").ariaValueText = $(".thetan").value = digits(now.theta);
    $(".beside").value = now.beside;
    root.style.setProperty("--focus", `var(--${cut})`);
    CUTS.forEach((name, i) => {
      const mine = (counts[name] = kept(s, name, now)), { error, each } = lost(s, mine), tr = $(".three tbody").rows[i];
      const mean = (mine.reduce((a, b) => a + b, 0) / s.n).toFixed(1), ends = [Math.min(...mine), Math.max(...mine)];
      errors[name] = each;
      tr.className = name === cut ? "on" : "";
      [mean, ends.join(" – "), error.toFixed(3)].forEach((text, j) => (tr.cells[j + 2].textContent = text));
      if (name !== cut) return;
      const set = name === "threshold" ? `θ ${digits(now.theta)}` : `k ${now.k}`;
      const among = name === "batch" && now.beside !== "alone" ? `, batch shared with ${now.beside}` : "";
      const told = `${name} cut, ${set}${among}: L0 ${ends.join(" to ")}, mean ${mean}, error ${error.toFixed(3)}`;
      $(".status").textContent = told;
      canvas.ariaLabel = `${s.n} tokens by latents. ${told}. Arrow keys walk through the entries.`;
    });
    if ($("details").open) tabulate();
    readout();
    again();
  }
  function tabulate() {
    $(".all tbody").replaceChildren(...s.pieces.map((piece, t) => {
      const tr = make("tr"), cells = CUTS.flatMap((name) => [counts[name][t], errors[name][t].toFixed(3)]);
      tr.append(make("th", visible(piece), "l"), ...cells.map((text) => make("td", text)));
      return tr;
    }));
  }
  function readout() {
    const out = $(".readout");
    if (!cell) return (out.textContent = "Point at an entry, or walk to it with the arrow keys.");
    const { t, c } = cell, mine = s.columns.subarray(s.starts[t], s.starts[t + 1]), token = `“${visible(s.pieces[t])}”`;
    const rank = view === "latent" ? mine.indexOf(s.shown[c]) : c < mine.length ? c : -1;
    const who = CUTS.filter((name) => rank < counts[name][t]).join(", ") || "none";
    const none = view === "latent" ? `latent ${s.shown[c]}: not active` : "no further entry";
    out.textContent = rank < 0 ? `${token}, ${none}` : `${token}, latent ${mine[rank]}: ` +
      `z = ${s.values[s.starts[t] + rank].toFixed(3)}, number ${rank + 1} of its token, kept by ${who}`;
  }

  // -- the matrix ----------------------------------------------------------------------------------------------

  function draw() {
    frame = 0;
    const style = getComputedStyle(root), ink = style.color, [red, green, blue] = ink.match(/[\d.]+/g).map(Number);
    const width = root.clientWidth - 8, scale = window.devicePixelRatio;
    root.classList.toggle("dark", red * 0.3 + green * 0.6 + blue * 0.1 > 128);
    colour = Object.fromEntries(CUTS.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    if (width <= 0) return;
    const most = Math.max(...CUTS.flatMap((name) => [...counts[name]]), 1), h = s.n <= 24 ? 20 : s.n <= 48 ? 15 : 12;
    const left = Math.min(110, width * 0.17), bars = Math.min(190, width * 0.22), top = 18, height = top + h * s.n + 2;
    const columns = view === "latent" ? s.shown.length : doubled(64, most), w = (width - left - bars - 14) / columns;
    const right = left + w * columns + 14, unit = (bars - 34) / doubled(32, most), gap = w > 5 ? 1 : w > 3 ? 0.5 : 0;
    const fill = (strength, style, x, y, wide, tall) => {
      g.globalAlpha = strength;
      g.fillStyle = style;
      g.fillRect(x, y, wide, tall);
    };
    const write = (text, x, y, textAlign) =>
      Object.assign(g, { globalAlpha: 1, fillStyle: ink, textAlign }).fillText(text, x, y);
    at = { left, top, w, h, columns };
    Object.assign(canvas, { width: width * scale, height: height * scale });
    canvas.style.height = `${height}px`;
    g.setTransform(scale, 0, 0, scale, 0, 0);
    Object.assign(g, { font: `${Math.min(12, h - 2)}px ${style.fontFamily}`, textBaseline: "middle" });
    const place = new Map(s.shown.map((latent, c) => [latent, c])), mine = counts[cut];
    for (let t = 0; t < s.n; t++) {
      const y = top + t * h;
      let name = visible(s.pieces[t]);
      while (g.measureText(name).width > left - 10) name = `${name.slice(0, -2)}…`;
      write(name, left - 8, y + h / 2, "right");
      fill(0.05, ink, left, y, w * columns, h - 1);
      for (let i = s.starts[t]; i < s.starts[t + 1]; i++) {
        const rank = i - s.starts[t], c = view === "latent" ? place.get(s.columns[i]) : rank;
        if (c === undefined || c >= columns) continue;
        const strength = Math.sqrt(s.values[i] / s.top), on = rank < mine[t];
        const depth = on ? 0.3 + 0.7 * strength : 0.07 + 0.4 * strength;
        fill(depth, on ? colour[cut] : ink, left + c * w, y, w - gap, h - 1);
      }
      fill(0.85, colour[cut], right, y + 2, mine[t] * unit, h - 5);
      write(mine[t], width - 2, y + h / 2, "right");
    }
    fill(0.6, ink, right + now.k * unit, top, 1, h * s.n);
    write("k", right + now.k * unit, 9, "center");
    write("L0", width - 2, 9, "right");
    write(view === "latent" ? "strongest latents first" : "largest entries first", left + w * columns, 9, "right");
    if (view === "strength") for (const name of CUTS.filter((one) => one !== cut).concat(cut)) edge(name, name === cut);
    Object.assign(g, { globalAlpha: 1, lineWidth: 2, strokeStyle: ink });
    if (cell) g.strokeRect(left + cell.c * w - 1, top + cell.t * h - 1, Math.max(w, 3) + 1, h + 1);
  }
  // Where a cut stops in each token, as one line down the matrix.
  function edge(name, focus) {
    g.beginPath();
    counts[name].forEach((count, t) => {
      g.lineTo(at.left + count * at.w, at.top + t * at.h);
      g.lineTo(at.left + count * at.w, at.top + t * at.h + at.h);
    });
    Object.assign(g, { globalAlpha: 1, lineWidth: focus ? 2.5 : 1.5, textAlign: "center" });
    g.strokeStyle = g.fillStyle = colour[name];
    g.setLineDash(focus ? [] : DASHES[name]);
    g.stroke();
    g.setLineDash([]);
    g.fillText(SHAPES[name], at.left + counts[name][0] * at.w, 9);
  }

  function go(t, c) {
    cell = { t: Math.max(0, Math.min(s.n - 1, t)), c: Math.max(0, Math.min(at.columns - 1, c)) };
    readout();
    again();
  }
  canvas.onpointermove = (event) => {
    const t = Math.floor((event.offsetY - at.top) / at.h), c = Math.floor((event.offsetX - at.left) / at.w);
    if (t >= 0 && t < s.n && c >= 0 && c < at.columns) go(t, c);
  };
  canvas.onkeydown = (event) => {
    const { t, c } = cell ?? { t: 0, c: -1 }, rows = { ArrowUp: t - 1, ArrowDown: t + 1, PageUp: 0, PageDown: s.n };
    const steps = { ArrowLeft: c - 1, ArrowRight: c + 1, Home: 0, End: at.columns };
    if (!(event.key in rows || event.key in steps)) return;
    event.preventDefault();
    go(rows[event.key] ?? t, steps[event.key] ?? c);
  };

  const size = new ResizeObserver(again), theme = new MutationObserver(again);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  size.observe(root);
  for (const node of [document.documentElement, document.body]) theme.observe(node, { attributes: true });
  scheme.addEventListener("change", again);
  update(data);
  return {
    update,
    answered({ message }) { refresh(); complain(message ?? ""); },
    stop() { size.disconnect(); theme.disconnect(); scheme.removeEventListener("change", again); },
  };
}

export default {
  render({ model, el }) {
    const say = (text) => {
      if (text === model.get("sentence")) return answer(); // nothing changes, so nobody would answer
      model.set("sentence", text);
      model.save_changes();
    };
    const here = mount(el, model.get("data"), model.get("live") ? say : undefined);
    const fresh = () => here.update(model.get("data")), answer = () => here.answered(model.get("answer"));
    model.on("change:data", fresh);
    model.on("change:answer", answer);
    return () => { here.stop(); model.off("change:data", fresh); model.off("change:answer", answer); };
  },
};
