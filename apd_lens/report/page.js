"use strict";
// Whatever comes from the data is put in by textContent.

// One or two decompositions; `data` is the one that is listed.
let sides, names, words, side = 0, data, C;
const sum = (values) => values.reduce((a, b) => a + b, 0);
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

// How much a word says where whole examples are the data points: less if it is in many of them.
function rarities(some) {
  const seen = new Map();
  for (const { inputs } of some.components) for (const [number, , , tokens] of inputs) seen.set(number, tokens);
  const counts = new Map();
  for (const tokens of seen.values()) for (const word of new Set(tokens)) counts.set(word, (counts.get(word) || 0) + 1);
  return (word) => Math.log(1 + seen.size / (counts.get(word) || 1));
}

// The words at which the component matters most; where it is active, if it ever is.
function peaks(component) {
  if (!data.hasTokens) return features(component);
  const found = [];
  for (const [, , active, tokens, shades, positions] of data.components[component].inputs) {
    if (!tokens.length || (data.activity[component] && !active)) continue;
    let peak = 0;
    const size = (i) => Number(shades[i]) * (positions ? 1 : rarity(tokens[i]));
    for (let i = 1; i < shades.length; i++) if (size(i) > size(peak)) peak = i;
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

let mainMatrix, rank, rarity, largestActivity, change, asAttribution, asChange;

function whereBar(component) {
  let from = 0;
  const stops = data.shares[component].map((share, i) => {
    const stop = `${colourOf(i)} ${(100 * from).toFixed(1)}% ${(100 * (from + share)).toFixed(1)}%`;
    from += share;
    return stop;
  });
  const where = element("span", { class: "where", title: `mostly ${data.short[mainMatrix[component]]}, ${data.matrices[mainMatrix[component]]}` });
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

const rows = new Map();
const details = new Map();
let order;
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
const texts = new Map();
function textOf(component) {
  if (!texts.has(component)) {
    const { promoted, suppressed, inputs } = data.components[component];
    const found = new Set([...promoted, ...suppressed].map(([word]) => word));
    for (const input of inputs) for (const word of input[3]) found.add(word);
    texts.set(component, Array.from(found, (word) => words[word].toLowerCase()).join("\n"));
  }
  return texts.get(component);
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

function listed(component) {
  if (!rows.has(component)) rows.set(component, rowOf(component));
  return rows.get(component);
}

function more(n = AT_ONCE) {
  const made = document.createDocumentFragment();
  for (const component of shown.slice(nRows, nRows + n)) {
    made.append(listed(component));
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

// `where` says of which data the example is: 0 of the data, 1 of the other data.
function tokensOf(input, where) {
  const [example, , , tokens, shades, active, first, cut] = input;
  const here = data.here[where][example] || [];
  const line = element("span", { class: "tokens" });
  if (first > 0) line.append(element("span", { class: "faint", text: "… " }));
  tokens.forEach((word, i) => {
    const shown = visible(words[word]);
    const shade = shades ? Number(shades[i]) : 0;
    const classes = `token${active[i] === "1" ? " active" : ""}${data.hasTokens ? "" : " feature"}`;
    const at = here[first + i];
    const token = element(at ? "button" : "span", { class: classes, text: shown === "" ? "∅" : shown });
    if (at) {
      token.type = "button";
      token.tabIndex = line.querySelector("button") ? -1 : 0; // the others by arrow keys
      token.setAttribute("aria-expanded", "false");
      const [from, all] = [side, data];
      token.addEventListener("click", () => showHere(token, at, () => onSide(from, all, () => hereOf(at, shown, first + i, where, example))));
    }
    if (shade) token.style.backgroundColor = `rgba(var(--shade), ${(0.75 * shade) / 9})`;
    if (data.hasTokens) token.title = `position ${first + i}`;
    line.append(token);
    if (shown.endsWith("↵")) line.append(document.createElement("wbr"));
  });
  if (cut) line.append(element("span", { class: "faint", text: " …" }));
  if (!tokens.length) line.append(element("span", { class: "faint", text: "all zero" }));
  return line;
}

// What is at one token, under its line; in the place of what was there before.
function showHere(token, at, make) {
  const line = token.closest(".example");
  const open = token.getAttribute("aria-expanded") === "true";
  line.querySelector(".here")?.remove();
  for (const other of line.querySelectorAll("[aria-expanded]")) other.setAttribute("aria-expanded", "false");
  if (open) return;
  token.setAttribute("aria-expanded", "true");
  line.append(make());
}

function hereOf(at, shown, position, where, example) {
  const part = element("div", { class: "here" }, element("span", { text: `at “${shown.trim() || "␣"}”, position ${position}:` }));
  const written = inColumn(at.filter((_, i) => i % 2));
  for (let i = 0; i < at.length; i += 2) {
    const line = element("span", {}, jumpTo(at[i]), ` ${written(at[i + 1])}`);
    const own = where === 0 && data.components[at[i]].inputs.find(([number]) => number === example);
    if (own && own[8].length) line.append(element("span", { class: "faint", text: ` off: ${changes(own[8], 1)}` }));
    part.append(line);
  }
  if (!at.length) part.append(element("span", { class: "faint", text: "no component" }));
  return part;
}

function jumpTo(component) {
  return element("button", { class: "jump", type: "button", "data-jump": component, "data-side": side, text: `#${component}` });
}

// The outputs that change most without the component.
function changes([, , changed], n) {
  const written = data.centred ? percent : number;
  return changed.slice(0, n).map(([word, before, after]) => `${visible(words[word]).trim() || "␣"} ${written(before)} → ${written(after)}`).join(", ");
}

function examplesOf(component) {
  const part = element("section", {}, element("h3", { text: "Top examples" }));
  const { inputs } = data.components[component];
  const written = inColumn(inputs.map((input) => input[1]));
  for (const input of inputs) {
    const on = input[2] === 1;
    const value = element("span", { class: "value", text: written(input[1]), title: `example ${input[0]}, ${on ? "active" : "not active"}` });
    const line = element("div", { class: on ? "example on" : "example" }, value, tokensOf(input, 0));
    const off = input[8];
    if (off.length) line.append(element("span", { class: "off", text: `off here: ${changes(off, 3)}`, title: `${data.distance} ${number(off[0])}, at position ${off[1]} of the output` }));
    part.append(line);
  }
  const shaded = data.hasTokens ? "Shaded by the attribution of each position." : "Shaded by size.";
  const where = data.centred ? "Off here: probabilities with the component and without it, those that change most." : "Off here: outputs with the component and without it, those that change most.";
  part.append(element("p", { class: "note", text: `Attribution on the left; bold where the component was active. ${shaded} ${where}` }));
  return part;
}

function othersOf(component) {
  if (!data.othersActive) return null;
  const part = element("section", {}, element("h3", { text: "On other data" }));
  const { others } = data.components[component];
  const written = inColumn(others.map((input) => input[1]));
  for (const input of others.slice(0, 4)) {
    const on = input[2] === 1;
    const value = element("span", { class: "value", text: written(input[1]), title: `example ${input[0]}, ${on ? "active" : "not active"}` });
    part.append(element("div", { class: on ? "example on" : "example" }, value, tokensOf(input, 1)));
  }
  part.append(element("p", { class: "note", text: `Active on ${percent(data.othersActive[component])} of ${number(data.nOthers)} data points. Shaded as above, on the same scale.` }));
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
    const name = element("span", { class: "matrix" }, element("span", { class: "key" }), element("span", { title: visible(data.matrices[i]), text: visible(data.short[i]) }));
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
    return [jumpTo(other), count, lift, jaccard];
  });
  part.append(table([["component", false], ["data points", true], ["lift", true], ["Jaccard", true]], lines));
  part.append(element("p", { class: "note", text: "Lift is 1 where two fire independently." }));
  return part;
}

function twinsOf(component) {
  const { twins } = data.components[component];
  if (C < 2) return null;
  return element("section", {}, element("h3", { text: "Closest in weights" }),
    table([["component", false], ["cosine", true]], twins.map(([other, cosine]) => [jumpTo(other), cosine])));
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

function partsOf(component) {
  const parts = (...makers) => makers.map((make) => make(component)).filter((part) => part !== null);
  return element("div", { class: "parts" },
    element("div", {}, ...parts(examplesOf, outputsOf, othersOf)),
    element("div", {}, ...parts(ablationOf, whereOf, matchesOf, twinsOf, togetherOf)));
}

// What `make` gives with another decomposition in the place of the listed one.
function onSide(which, all, make) {
  const before = [side, data, C];
  [side, data, C] = [which, all, all.components.length];
  try {
    return make();
  } finally {
    [side, data, C] = before;
  }
}

// The component beside its closest one in the other decomposition.
function pairOf(component) {
  const [peer, cosine, jaccard] = data.peers[component], other = 1 - side;
  const about = `cosine of weights ${number(cosine)}, Jaccard index of activity ${number(jaccard)}`;
  const there = onSide(other, sides[other], () => [jumpTo(peer), partsOf(peer)]);
  return element("div", { class: "beside" },
    element("section", {}, element("h3", { text: `${names[side]}, #${component}` }), element("p", { class: "note", text: "The one that was opened." }), partsOf(component)),
    element("section", {}, element("h3", {}, `${names[other]}, `, there[0]), element("p", { class: "note", text: `The closest: ${about}.` }), there[1]));
}

function detailOf(component) {
  const inside = data.peers ? pairOf(component) : partsOf(component);
  const cell = element("td", { colspan: 8 }, inside);
  return element("tr", { class: "detail", id: `detail-${component}`, "aria-label": `component ${component}` }, cell);
}

function toggle(component, open = !details.has(component)) {
  const row = listed(component);
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

function jump(component, to = side) {
  if (to !== side) use(to);
  if (!(component >= 0 && component < C)) return;
  if (!fits(component)) {
    search.value = matrix.value = "";
    alive.value = "all";
  }
  toggle(component, true);
  show();
  if (shown.indexOf(component) >= nRows) more(shown.indexOf(component) + AT_ONCE - nRows);
  listed(component).querySelector("button").focus({ preventScroll: true });
  listed(component).scrollIntoView({ block: "start" });
}

tbody.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.jump) jump(Number(button.dataset.jump), Number(button.dataset.side));
  else if (button.closest(".row")) toggle(Number(button.textContent));
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

const sideChoice = document.getElementById("side");
sideChoice.addEventListener("change", () => use(Number(sideChoice.value)));

// Lists one of the decompositions.
function use(which) {
  [side, data] = [which, sides[which]];
  sideChoice.value = which;
  C = data.components.length;
  mainMatrix = data.shares.map((shares) => shares.indexOf(Math.max(...shares)));
  rank = data.ranks.map(sum);
  rarity = rarities(data);
  largestActivity = data.activity.reduce((most, share) => Math.max(most, share), 1e-12);
  change = data.ablation.change[0];
  [asAttribution, asChange] = [inColumn(data.attribution), inColumn(change)];
  for (const made of [rows, details, texts]) made.clear();
  const any = element("option", { value: "", text: "any matrix" });
  matrix.replaceChildren(any, ...data.short.map((name, i) => element("option", { value: i, text: visible(name), title: visible(data.matrices[i]) })));
  if (!data.activity.some((share) => share > 0)) alive.value = "all";
  sortBy("active", false);
}

// Keys that do something where nobody writes.
document.addEventListener("keydown", (event) => {
  const at = document.activeElement, { key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || (key !== "Escape" && at.matches("input, select"))) return;
  const go = (step, selector, all) => {
    const found = [...all.querySelectorAll(selector)];
    const next = found[found.indexOf(at.closest(selector.split(" ")[0]) ?? at) + step];
    if (!next) return;
    event.preventDefault();
    (next.matches("button") ? next : next.querySelector("button")).focus();
  };
  if (key === "/") {
    event.preventDefault();
    search.focus();
  } else if (key === "Escape") {
    if (at === search) {
      clearTimeout(waiting); // a list that is made anew later would take the focus from its rows
      event.preventDefault();
      search.value = "";
      show();
    } else {
      const open = at.closest(".row, .detail")?.id.split("-")[1];
      if (open !== undefined && details.has(Number(open))) {
        toggle(Number(open), false);
        listed(Number(open)).querySelector("button").focus();
      }
    }
  } else if ((key === "ArrowDown" || key === "ArrowUp") && at.closest(".row")) go(key === "ArrowDown" ? 1 : -1, ".row", tbody);
  else if ((key === "ArrowRight" || key === "ArrowLeft") && at.matches(".token")) go(key === "ArrowRight" ? 1 : -1, "button.token", at.parentElement);
});

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
  const packed = document.getElementById("plotly");
  document.head.append(element("script", { text: await unpacked(packed.textContent) }));
  packed.remove();
  const config = { displayModeBar: false, responsive: true };
  const plots = sides[0].figures.map(({ title, about, figure }) => {
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
async function start() {
  const state = document.getElementById("figures-state");
  try {
    if (typeof DecompressionStream === "undefined") throw new Error("it needs a browser of 2023 or later");
    const packed = document.getElementById("data");
    ({ sides, names, words } = JSON.parse(await unpacked(packed.textContent)));
    sideChoice.append(...names.map((name, i) => element("option", { value: i, text: name })));
    document.getElementById("of").hidden = sides.length < 2;
    use(0);
    const wanted = /^#component-(\d+)$/.exec(location.hash);
    if (wanted) jump(Number(wanted[1]));
    await new Promise((next) => requestAnimationFrame(() => setTimeout(next)));
    performance.mark("list");
    await draw();
  } catch (error) {
    state.textContent = `Not all of this page could be drawn: ${error.message}`;
    throw error;
  } finally {
    performance.mark("drawn");
    document.documentElement.dataset.drawn = "true";
  }
}
start();
