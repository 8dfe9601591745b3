// All latents of an SAE, to search and to read. What `data` holds is told in latents.py. Every text goes in as a text
// node, never as HTML. The latent shown stands in the address (#latent=421), so that it can be linked to.

const BLUE = "0, 114, 178"; // Okabe and Ito's
const STYLE = `
.latents { font: 14px/1.5 system-ui, sans-serif; display: grid; grid-template-columns: minmax(230px, 300px) 1fr;
  gap: 0 24px; max-width: 1240px; margin: 0 auto; padding: 12px; color: CanvasText; }
.latents header { grid-column: 1 / -1; margin-bottom: 8px; } .latents header p { margin: 2px 0; opacity: .8; }
.latents label { display: block; margin-bottom: 6px; } .latents input, .latents select, .latents button { font: inherit; }
.latents input { width: 100%; box-sizing: border-box; padding: 4px 6px; }
.latents nav ol { list-style: none; margin: 6px 0 0; padding: 0 !important; height: 68vh; overflow-y: auto; border: 1px solid #8886; }
.latents nav a { display: grid; grid-template-columns: 4.2em 1fr 4.6em; padding: 1px 6px; color: inherit !important;
  text-decoration: none; white-space: pre; overflow: hidden; }
.latents nav a:hover, .latents nav a[aria-current] { background: rgba(${BLUE}, .18); }
.latents nav a[aria-current] { box-shadow: inset 4px 0 rgb(${BLUE}); }
.latents nav span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.latents article { min-width: 0; } .latents h2 { margin: 0 0 4px; font-size: 20px; }
.latents h3 { margin: 16px 0 4px; font-size: 15px; }
.latents .text { font-family: ui-monospace, monospace; font-size: 13px; white-space: pre-wrap; margin: 2px 0;
  padding: 2px 0; border-bottom: 1px solid #8883; overflow-wrap: anywhere; }
.latents .text small { opacity: .65; float: right; margin-left: 1em; font-family: system-ui, sans-serif; }
.latents code { background: #8882; padding: 0 3px; margin-right: 6px; white-space: pre-wrap; }
.latents mark.peak { text-decoration: underline; text-decoration-thickness: 2px; }
@media (max-width: 700px) { .latents { grid-template-columns: 1fr; } .latents nav ol { height: 30vh; } }`;

function node(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const line = (text) => text.replaceAll("\n", "↵");
const percent = (share) => (share === 0 ? "never" : `${(100 * share).toPrecision(2)} %`);
const peakOf = ([pieces, , peak]) => pieces[peak];

// What to call a latent in the list: the piece of text that it fires on most often among its strongest.
function label(one) {
  const counts = new Map();
  for (const piece of one.top.map(peakOf)) counts.set(piece, (counts.get(piece) ?? 0) + 1);
  return line([...counts].sort((a, b) => b[1] - a[1])[0]?.[0] ?? "");
}

function context([pieces, values, peak, source], top) {
  const shown = pieces.map((piece, i) => {
    if (!(values[i] > 0)) return line(piece);
    const share = Math.min(1, values[i] / top);
    const style = `background: rgba(${BLUE}, ${share.toFixed(2)}); color: ${share > 0.6 ? "white" : "inherit"}`;
    return node("mark", { title: values[i].toFixed(2), style, className: i === peak ? "peak" : "" }, line(piece));
  });
  const told = node("small", {}, `${values[peak].toFixed(1)} · ${source}`);
  return node("p", { className: "text" }, told, ...shown);
}

export function mount(root, data) {
  const latents = data.latents.map((one, index) => ({ ...one, index, label: label(one) }));
  for (const one of latents) {
    one.fires = one.top.map(peakOf).join(" ").toLowerCase();
    one.says = [...one.top, ...one.middle].map(([pieces]) => pieces.join("")).join("\n").toLowerCase();
  }
  const search = node("input", { type: "search", placeholder: "a number, or words" });
  const order = node("select", {}, ...["number", "density", "largest value"].map((name) => node("option", {}, name)));
  const status = node("p", { role: "status" }), list = node("ol"), page = node("article", { tabIndex: -1 });
  const links = latents.map((one) => node("a", { href: `#latent=${one.index}` }, node("span", {}, String(one.index)),
    node("span", {}, one.label), node("span", {}, percent(one.density))));
  let shown = latents, current = 0;

  function found(words) {
    if (/^\d+$/.test(words[0] ?? "") && words.length === 1 && latents[words[0]]) return [latents[words[0]]];
    const all = (text) => words.every((word) => text.includes(word));
    const [first, rest] = [latents.filter((one) => all(one.fires)), latents.filter((one) => !all(one.fires))];
    return [...first, ...rest.filter((one) => all(one.says))];
  }

  function refresh() {
    shown = found(search.value.toLowerCase().split(/\s+/).filter(Boolean));
    const by = { density: "density", "largest value": "peak" }[order.value];
    if (by) shown = [...shown].sort((a, b) => b[by] - a[by]);
    list.replaceChildren(...shown.map((one) => node("li", {}, links[one.index])));
    status.textContent = `${shown.length} of ${latents.length} latents`;
  }

  function near(step) {
    const place = shown.findIndex((one) => one.index === current) + step;
    if (shown.length) go(shown[(place + shown.length) % shown.length].index);
  }

  function section(title, examples, one) {
    return examples.length ? [node("h3", {}, title), ...examples.map((example) => context(example, one.peak))] : [];
  }

  function show() {
    const one = latents[current], tokens = (list) => list.map((text) => node("code", {}, line(text)));
    links.forEach((link) => link.removeAttribute("aria-current"));
    links[current].setAttribute("aria-current", "true");
    const step = (name, by) => node("button", { type: "button", onclick: () => near(by) }, name);
    const told = one.count
      ? `Fires on ${percent(one.density)} of ${data.tokens.toLocaleString("en")} tokens (${one.count}); its largest value is ${one.peak.toFixed(1)}.`
      : `Never fires on these ${data.tokens.toLocaleString("en")} tokens.`;
    const company = one.near.map(([other, share]) => node("p", { style: "margin: 0" },
      follow(node("a", { href: `#latent=${other}` }, `latent ${other}`)), ` ${latents[other].label}: on ${percent(share)} of them`));
    page.replaceChildren(
      node("h2", {}, `Latent ${current}`), node("p", {}, told, " ", step("‹ previous", -1), " ", step("next ›", 1)),
      ...section("Where it is largest", one.top, one), ...section("From the middle of its range", one.middle, one),
      ...(company.length ? [node("h3", {}, "On the tokens where it fires, these fire too"), ...company] : []),
      node("h3", {}, "Next tokens that its direction raises"), node("p", {}, ...tokens(one.up)),
      node("h3", {}, "and lowers"), node("p", {}, ...tokens(one.down)),
    );
  }

  // In a frame a plain link would leave the page; the address is set by hand, where there is one to set.
  function go(index) {
    current = index;
    try { location.hash = `latent=${index}`; } catch { /* a frame without an address */ }
    show();
    links[index].scrollIntoView({ block: "nearest" });
  }

  function follow(link) {
    link.onclick = (event) => {
      event.preventDefault();
      go(Number(link.getAttribute("href").split("=")[1]));
    };
    return link;
  }

  function addressed() {
    const asked = /^#latent=(\d+)$/.exec(location.hash)?.[1] ?? data.first;
    if (asked in latents) { if (Number(asked) !== current || !page.childElementCount) go(Number(asked)); return; }
    page.replaceChildren(node("p", { role: "alert" }, `There is no latent ${asked}: choose 0 to ${latents.length - 1}.`));
  }

  links.forEach(follow);
  search.oninput = order.onchange = refresh;
  search.onkeydown = (event) => { if (event.key === "Enter" && shown.length) go(shown[0].index); };
  const nav = node("nav", { "aria-label": "latents" }, node("label", {}, "Search ", search), node("label", {}, "Order by ", order), status, list);
  const head = node("header", {}, node("h1", { style: "font-size: 22px; margin: 0" }, data.title), ...data.about.map((text) => node("p", {}, text)));
  root.append(node("style", {}, STYLE), node("div", { className: "latents" }, head, nav, page));
  addEventListener("hashchange", addressed);
  refresh();
  addressed();
}
