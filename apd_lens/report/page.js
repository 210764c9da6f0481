"use strict";
// Whatever comes from the data is put in by textContent.

const data = JSON.parse(document.getElementById("data").textContent);
const words = data.words;
const C = data.components.length;
const sum = (values) => values.reduce((a, b) => a + b, 0);
const mainMatrix = data.shares.map((shares) => shares.indexOf(Math.max(...shares)));
const rank = data.ranks.map(sum);
const tbody = document.querySelector("#components tbody");

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") made.textContent = value;
    else if (value !== null) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// Numbers as people write them, in four digits.
function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e-4 && size < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(3);
}
// For a column of numbers: as many decimals for each, so that the largest has three digits.
function inColumn(values) {
  const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  if (largest === 0) return () => "0";
  if (largest < 1e-3 || largest >= 1e6) return (value) => value.toExponential(1);
  const decimals = Math.max(0, 2 - Math.floor(Math.log10(largest)));
  return (value) => value.toFixed(decimals);
}
const percent = (share) => (share === 0 || share >= 0.9995 ? `${Math.round(100 * share)}%` : share < 0.0001 ? "<0.01%" : `${(100 * share).toFixed(share < 0.1 ? 2 : 1)}%`);

// What cannot be seen, or turns what follows round, is named. Spaces stay, as the page shows them as they are.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]/u;
const SHORT = { "\n": "↵", "\r": "␍", "\t": "⇥", "\0": "␀" };
const named = (character) => SHORT[character] || `‹${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`;
function visible(string) {
  if (!UNSEEN.test(string)) return string;
  return Array.from(string, (character) => (UNSEEN.test(character) ? named(character) : character)).join("");
}

function colourOf(matrix) {
  return `hsl(${Math.round(205 + (360 * matrix) / Math.max(data.matrices.length, 3)) % 360} 55% 52%)`;
}

// The list.

// The words at which the component matters most; where it is active, if it ever is.
function peaks(component) {
  if (!data.hasTokens) return features(component);
  const found = [];
  for (const [, , active, tokens, shades] of data.components[component].inputs) {
    if (!tokens.length || (data.activity[component] && !active)) continue;
    let peak = 0;
    for (let i = 1; i < shades.length; i++) if (shades[i] > shades[peak]) peak = i;
    const word = visible(words[tokens[shades.length ? peak : 0]]).trim() || "␣";
    if (!found.includes(word)) found.push(word);
    if (found.length === 4) break;
  }
  return found.join(" · ");
}

// The features, without their values, that are largest where it is active.
function features(component) {
  const sizes = new Map();
  for (const [, , active, found, shades] of data.components[component].inputs) {
    if (data.activity[component] && !active) continue;
    found.forEach((word, i) => {
      const name = words[word].slice(0, words[word].lastIndexOf(" "));
      sizes.set(name, (sizes.get(name) || 0) + Number(shades[i]));
    });
  }
  return [...sizes].sort((a, b) => b[1] - a[1]).slice(0, 3).map(([name]) => visible(name)).join(" · ");
}

// The output units that it raises, those by little left out.
function raised(component) {
  const { promoted } = data.components[component];
  return promoted
    .filter(([, by]) => by > 0 && by >= promoted[0][1] / 3)
    .slice(0, 3)
    .map(([word]) => visible(words[word]).trim() || "␣")
    .join(" · ");
}

const largestActivity = Math.max(...data.activity, 1e-12);
const change = data.ablation.change[0];
const asAttribution = inColumn(data.attribution), asChange = inColumn(change);

function whereBar(component) {
  let from = 0;
  const stops = data.shares[component].map((share, i) => {
    const stop = `${colourOf(i)} ${(100 * from).toFixed(1)}% ${(100 * (from + share)).toFixed(1)}%`;
    from += share;
    return stop;
  });
  const where = element("span", { class: "where", title: `mostly ${data.matrices[mainMatrix[component]]}` });
  where.style.background = `linear-gradient(90deg, ${stops.join(",")}${stops.length === 1 ? `,${colourOf(0)} 100%` : ""})`;
  return where;
}

function rowOf(component) {
  const row = element("tr", { class: data.activity[component] ? "row" : "row dead", id: `component-${component}` });
  const button = element("button", { type: "button", "aria-expanded": "false", text: component });
  const active = element("td", { class: "num" });
  if (data.activity[component]) {
    const bar = element("span", { class: "bar" });
    bar.style.width = `${((2.6 * data.activity[component]) / largestActivity).toFixed(3)}rem`;
    active.append(bar);
  }
  active.append(percent(data.activity[component]));
  const inputs = peaks(component), outputs = raised(component);
  row.append(
    element("td", { class: "num" }, button),
    active,
    element("td", { class: "num", text: asAttribution(data.attribution[component]) }),
    element("td", { class: "num", text: asChange(change[component]) }),
    element("td", { class: "num", text: rank[component].toFixed(2) }),
    element("td", {}, whereBar(component)),
    element("td", { class: "texts", text: inputs }),
    element("td", { class: "texts", text: outputs }),
  );
  return row;
}

const rows = [];
const details = new Map();
let order = data.order.slice();
let sorted = { by: "active", up: false };

const KEYS = {
  number: (c) => c,
  active: (c) => data.activity[c],
  attribution: (c) => data.attribution[c],
  change: (c) => change[c],
  rank: (c) => rank[c],
  where: (c) => mainMatrix[c] - data.shares[c][mainMatrix[c]],
};
const UP_FIRST = ["number", "where"];

function sortBy(by, up) {
  sorted = { by, up };
  const key = KEYS[by];
  const place = new Map(data.order.map((component, i) => [component, i]));
  order = data.order.slice().sort((a, b) => (up ? key(a) - key(b) : key(b) - key(a)) || place.get(a) - place.get(b));
  for (const button of document.querySelectorAll("#components > thead button")) {
    const heading = button.parentElement;
    if (button.dataset.sort === by) heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    else heading.removeAttribute("aria-sort");
  }
  show();
}

// What is searched in, made when it is first asked for.
const texts = [];
function textOf(component) {
  if (texts[component] === undefined) {
    const { promoted, suppressed, inputs } = data.components[component];
    const found = new Set([...promoted, ...suppressed].map(([word]) => word));
    for (const input of inputs) for (const word of input[3]) found.add(word);
    texts[component] = Array.from(found, (word) => words[word].toLowerCase()).join("\n");
  }
  return texts[component];
}

const search = document.getElementById("search"), alive = document.getElementById("alive"), matrix = document.getElementById("matrix");

function fits(component) {
  const active = data.activity[component] > 0;
  if ((alive.value === "alive" && !active) || (alive.value === "dead" && active)) return false;
  if (matrix.value !== "" && mainMatrix[component] !== Number(matrix.value)) return false;
  const wanted = search.value.toLowerCase();
  if (!wanted.trim()) return true;
  if (/^#\d+$/.test(wanted.trim())) return component === Number(wanted.trim().slice(1));
  return textOf(component).includes(wanted);
}

// Rows come as far as somebody scrolls: a browser takes a second to lay out thousands.
const AT_ONCE = 150;
let shown = [], nRows = 0;

function more(n = AT_ONCE) {
  const made = document.createDocumentFragment();
  for (const component of shown.slice(nRows, nRows + n)) {
    made.append((rows[component] ??= rowOf(component)));
    if (details.has(component)) made.append(details.get(component));
  }
  tbody.append(made);
  nRows = Math.min(nRows + n, shown.length);
  document.getElementById("more").hidden = nRows === shown.length;
}

function show() {
  shown = order.filter(fits);
  nRows = 0;
  tbody.replaceChildren();
  more();
  document.getElementById("none").hidden = shown.length > 0;
  document.getElementById("count").textContent = `${number(shown.length)} of ${number(C)}`;
}

// One component, made when it is opened.

function tokensOf(input) {
  const [, , , tokens, shades, active, first, cut] = input;
  const line = element("span", { class: "tokens" });
  if (first > 0) line.append(element("span", { class: "faint", text: "… " }));
  tokens.forEach((word, i) => {
    const shown = visible(words[word]);
    const shade = shades ? Number(shades[i]) : 0;
    const classes = `token${active[i] === "1" ? " active" : ""}${data.hasTokens ? "" : " feature"}`;
    const token = element("span", { class: classes, text: shown === "" ? "∅" : shown });
    if (shade) token.style.backgroundColor = `rgba(var(--shade), ${(0.75 * shade) / 9})`;
    if (data.hasTokens) token.title = `position ${first + i}`;
    line.append(token);
    if (shown.endsWith("↵")) line.append(document.createElement("wbr"));
  });
  if (cut) line.append(element("span", { class: "faint", text: " …" }));
  if (!tokens.length) line.append(element("span", { class: "faint", text: "all zero" }));
  return line;
}

function examplesOf(component) {
  const part = element("section", {}, element("h3", { text: "Top examples" }));
  const { inputs } = data.components[component];
  const written = inColumn(inputs.map((input) => input[1]));
  for (const input of inputs) {
    const on = input[2] === 1;
    const value = element("span", { class: "value", text: written(input[1]), title: `example ${input[0]}, ${on ? "active" : "not active"}` });
    part.append(element("div", { class: on ? "example on" : "example" }, value, tokensOf(input)));
  }
  const shaded = data.hasTokens ? "Shaded by the attribution of each position." : "Shaded by size.";
  part.append(element("p", { class: "note", text: `Attribution on the left; bold where the component was active. ${shaded}` }));
  return part;
}

function unitsOf(title, units, direction) {
  const largest = Math.max(...units.map(([, by]) => Math.abs(by)), 1e-12);
  const written = inColumn(units.map(([, by]) => by));
  const list = element("ol");
  const logits = inColumn(units.map(([, , logit]) => logit ?? 0));
  for (const [word, by, logit] of units) {
    const signed = (value, text) => `${value > 0 ? "+" : "−"}${text(Math.abs(value))}`;
    const line = element("li", {}, element("span", { class: "unit", text: visible(words[word]) || "∅" }), element("span", { class: `num ${direction}`, text: signed(by, written) }));
    if (logit !== undefined) line.append(element("span", { class: "num faint", text: ` (${signed(logit, logits)})` }));
    const share = (100 * Math.abs(by)) / largest;
    line.style.background = `linear-gradient(90deg, rgba(var(--shade), 0.16) ${share.toFixed(1)}%, transparent ${share.toFixed(1)}%)`;
    list.append(line);
  }
  if (!units.length) list.append(element("li", { class: "faint", text: "nothing" }));
  return element("div", {}, element("h3", { text: title }), list);
}

function outputsOf(component) {
  const { promoted, suppressed } = data.components[component];
  const n = data.nExamples[component];
  const examples = n === 1 ? "the top example" : `the ${n} top examples`;
  const over = data.activity[component] ? `${examples} on which it is active` : `${examples} (it was never active)`;
  const of = data.centred ? "probabilities (and, in brackets, logits less their mean over outputs)" : "outputs";
  const about = `How much higher or lower ${of} are with the component than without it, mean over ${over}.`;
  const lists = element("div", { class: "units" },
    unitsOf("Raises", promoted.filter(([, by]) => by > 0), "up"),
    unitsOf("Lowers", suppressed.filter(([, by]) => by < 0), "down"));
  return element("section", {}, lists, element("p", { class: "note", text: about }));
}

function table(header, lines) {
  const head = element("tr", {}, ...header.map(([text, numeric]) => element("th", { scope: "col", class: numeric ? "num" : null, text })));
  const body = lines.map((line) => element("tr", {}, ...line.map((cell, i) => {
    const made = element("td", { class: header[i][1] ? "num" : null });
    made.append(cell instanceof Node ? cell : number(cell));
    return made;
  })));
  const whole = element("table", { class: "plain" }, element("thead", {}, head), element("tbody", {}, ...body));
  return element("div", { class: "scroll" }, whole);
}

function ablationOf(component) {
  const names = { change: "change of the output (root mean square)", distance: data.distance, loss: "rise of the loss" };
  const lines = Object.entries(data.ablation).map(([name, [found, twin]]) => [names[name], found[component], twin[component]]);
  return element("section", {}, element("h3", { text: "Taken out" }),
    table([["on its top examples", false], ["component", true], ["random twin", true]], lines));
}

function whereOf(component) {
  const of = data.shares[component].map((share, i) => [i, share]).sort((a, b) => b[1] - a[1]);
  const lines = of.slice(0, 8).map(([i, share]) => {
    const name = element("span", { class: "matrix" }, element("span", { class: "key" }), visible(data.matrices[i]));
    name.firstChild.style.background = colourOf(i);
    return [name, percent(share), data.norms[component][i], Number(data.ranks[component][i].toFixed(2))];
  });
  const part = element("section", {}, element("h3", { text: "Where it is" }),
    table([["matrix", false], ["share", true], ["norm", true], ["eff. rank", true]], lines));
  if (of.length > 8) part.append(element("p", { class: "note", text: `and ${of.length - 8} more` }));
  if (data.heads.length && data.heads[component].length) {
    const heads = data.heads[component].map(([name, share]) => [name, percent(share)]);
    part.append(table([["attention head", false], ["share", true]], heads));
  }
  return part;
}

function togetherOf(component) {
  const part = element("section", {}, element("h3", { text: "Fires with" }));
  const found = data.components[component].together;
  if (!found.length) {
    part.append(element("p", { class: "note", text: data.activity[component] ? "No other component." : "It never fires." }));
    return part;
  }
  const lines = found.map(([other, count, lift, jaccard]) => {
    const button = element("button", { class: "jump", type: "button", "data-jump": other, text: `#${other}` });
    return [button, count, lift, jaccard];
  });
  part.append(table([["component", false], ["data points", true], ["lift", true], ["Jaccard", true]], lines));
  part.append(element("p", { class: "note", text: "Lift is 1 where two fire independently." }));
  return part;
}

function matchesOf(component) {
  const found = data.matches[component];
  if (!data.matchColumns.length) return null;
  const part = element("section", {}, element("h3", { text: "Matches" }));
  if (!found) {
    part.append(element("p", { class: "note", text: "None." }));
    return part;
  }
  const numeric = data.matchColumns.map((_, i) => found.every((row) => row[i] === null || typeof row[i] === "number"));
  const lines = found.map((row) => row.map((cell) => (typeof cell === "string" ? element("span", { text: visible(cell) }) : cell)));
  part.append(table(data.matchColumns.map((name, i) => [visible(name), numeric[i]]), lines));
  return part;
}

function detailOf(component) {
  const parts = (...makers) => makers.map((make) => make(component)).filter((part) => part !== null);
  const inside = element("div", { class: "parts" },
    element("div", {}, ...parts(examplesOf, outputsOf)),
    element("div", {}, ...parts(ablationOf, whereOf, togetherOf, matchesOf)));
  const cell = element("td", { colspan: 8 }, inside);
  return element("tr", { class: "detail", id: `detail-${component}`, "aria-label": `component ${component}` }, cell);
}

function toggle(component, open = !details.has(component)) {
  const row = (rows[component] ??= rowOf(component));
  const button = row.querySelector("button");
  button.setAttribute("aria-expanded", String(open));
  row.classList.toggle("open", open);
  if (!open) {
    details.get(component)?.remove();
    details.delete(component);
  } else if (!details.has(component)) {
    details.set(component, detailOf(component));
    if (row.isConnected) row.after(details.get(component));
  }
}

function jump(component) {
  if (!(component >= 0 && component < C)) return;
  if (!fits(component)) {
    search.value = matrix.value = "";
    alive.value = "all";
  }
  toggle(component, true);
  show();
  if (shown.indexOf(component) >= nRows) more(shown.indexOf(component) + AT_ONCE - nRows);
  rows[component].querySelector("button").focus({ preventScroll: true });
  rows[component].scrollIntoView({ block: "start" });
}

tbody.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.jump) jump(Number(button.dataset.jump));
  else toggle(Number(button.textContent));
});
document.querySelector("#components > thead").addEventListener("click", (event) => {
  const by = event.target.closest("button")?.dataset.sort;
  if (by) sortBy(by, sorted.by === by ? !sorted.up : UP_FIRST.includes(by));
});
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
let waiting;
search.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(show, C > 500 ? 120 : 0);
});
new IntersectionObserver((seen) => seen.some((entry) => entry.isIntersecting) && more(), { rootMargin: "1200px" }).observe(document.getElementById("more"));
alive.addEventListener("change", show);
matrix.addEventListener("change", show);
data.matrices.forEach((name, i) => matrix.append(element("option", { value: i, text: visible(name) })));
if (!data.activity.some((share) => share > 0)) alive.value = "all";
sortBy("active", false);
const wanted = /^#component-(\d+)$/.exec(location.hash);
if (wanted) jump(Number(wanted[1]));

// The figures, by plotly.js, which is packed.

function unpacked(text) {
  const alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%.()*+-;,=>?@^_`{|}~";
  const values = new Uint8Array(128);
  for (let i = 0; i < 85; i++) values[alphabet.charCodeAt(i)] = i;
  const missing = (5 - (text.length % 5)) % 5;
  const bytes = new Uint8Array(((text.length + missing) / 5) * 4);
  for (let from = 0, to = 0; from < text.length; from += 5, to += 4) {
    let value = 0;
    for (let i = from; i < from + 5; i++) value = value * 85 + (i < text.length ? values[text.charCodeAt(i)] : 84);
    bytes[to] = value >>> 24;
    bytes[to + 1] = value >>> 16;
    bytes[to + 2] = value >>> 8;
    bytes[to + 3] = value;
  }
  const stream = new Blob([bytes.subarray(0, bytes.length - missing)]).stream();
  return new Response(stream.pipeThrough(new DecompressionStream("gzip"))).text();
}

const dark = matchMedia("(prefers-color-scheme: dark)");

function themed(layout) {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line") };
  return {
    ...layout,
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { color: colour("--text"), size: 12, family: getComputedStyle(document.body).fontFamily },
    xaxis: { ...layout.xaxis, ...axis },
    yaxis: { ...layout.yaxis, ...axis },
  };
}

async function draw() {
  const state = document.getElementById("figures-state");
  if (typeof DecompressionStream === "undefined") {
    state.textContent = "The figures need a browser of 2023 or later.";
    return;
  }
  const packed = document.getElementById("plotly");
  document.head.append(element("script", { text: await unpacked(packed.textContent) }));
  packed.remove();
  const config = { displayModeBar: false, responsive: true };
  const plots = data.figures.map(({ title, about, figure }) => {
    const plot = element("div", { class: "plot", role: "img", "aria-label": title });
    const caption = element("figcaption", {}, element("h3", { text: title }), element("p", { text: about }));
    document.getElementById("figures").append(element("figure", {}, caption, plot));
    return [plot, figure];
  });
  for (const [plot, figure] of plots) {
    await Plotly.newPlot(plot, figure.data, themed(figure.layout), config);
    await new Promise((next) => setTimeout(next)); // so that the list can be used meanwhile
  }
  dark.addEventListener("change", () => {
    for (const [plot, figure] of plots) Plotly.relayout(plot, themed(figure.layout));
  });
  state.remove();
}

// The list first: figures are drawn when it has been painted.
async function drawBehindTheList() {
  await new Promise((next) => requestAnimationFrame(() => setTimeout(next)));
  performance.mark("list");
  try {
    await draw();
  } catch (error) {
    document.getElementById("figures-state").textContent = `The figures could not be drawn: ${error.message}`;
    throw error;
  } finally {
    performance.mark("drawn");
    document.documentElement.dataset.drawn = "true";
  }
}
drawBehindTheList();
