// The page of one node, below the graph: examples of each direction, where a head looks, and all edges.
import { data, edgesIn, edgesOut, isHead, kinds, nats, nodeName, portColour, score, unit, weight } from "./data.js";
import { $, bar, chip, el, svg, token } from "./dom.js";
import { count, known, num, percent, pieces, plain } from "./format.js";
import { go } from "./graph.js";
import { kernelColumn } from "./kernels.js";
import { makeTable } from "./table.js";
import { onChange, view } from "./view.js";

const EDGES_LISTED = 60, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const drivers = data.drivers;
const directionsAt = data.nodes.map(() => []), patternsAt = data.nodes.map(() => []);
for (const direction of drivers?.directions ?? []) directionsAt[direction.node].push(direction);
for (const pattern of drivers?.patterns ?? []) patternsAt[pattern.node].push(pattern);
const GROUPS = { top: "highest", quantile: "at even quantiles", bottom: "lowest", random: "at random" };
// what is looked at on this page: a direction and an example with a pattern, by place
const look = { direction: 0, pattern: 0 };

const stringAt = (text, t) => drivers.strings[drivers.texts[text][t]];
// a token tinted by a value of −1 to 1; spaces and what cannot be seen are spelled out
function tinted(text, value, here, tip) {
  const shown = pieces(text, { spaces: true }).map((piece) => piece.text).join("");
  const node = el("bdi", { class: `tint${here ? " here" : ""}`, dir: "ltr", "data-tip": tip }, shown || "empty");
  node.style.setProperty("--hue", value < 0 ? "var(--k)" : "var(--accent)");
  node.style.setProperty("--share", `${Math.round(42 * Math.min(1, Math.abs(value)))}%`);
  return node;
}
function exampleRow(direction, example) {
  const { text, start, position, around, value, quantile } = example;
  const words = around.map((part, k) => tinted(stringAt(text, start + k), part / 100, start + k === position, `${plain(stringAt(text, start + k), { spaces: true })}: ${num((part / 100) * direction.largest, 2)}`));
  const pattern = patternsAt[view.node].findIndex((p) => p.text === text && p.position === position);
  const button = pattern < 0 ? null : el("button", { type: "button", class: "link see", "data-tip": "Show where the head looks here", onclick: () => { look.pattern = pattern; drawAttention(); } }, "attention");
  return el("li", { class: "example" }, el("span", { class: "value", "data-tip": known(quantile) ? `quantile ${percent(quantile, 0)}` : null }, num(value, 2)), el("div", { class: "window" }, words), button);
}
function legendOf(direction) {
  const steps = [-1, -0.5, 0, 0.5, 1].map((share) => tinted(num(share * direction.largest, 2), share, false, null));
  return el("p", { class: "dim small legend" }, "value of the direction: ", steps, " · the marked token is the one looked at");
}
function described({ description }) {
  if (!description) return el("p", { class: "dim small" }, "No description was tried.");
  const { label, score: held, random_score: random, null_score: chance, note } = description;
  if (label === null) return el("p", { class: "dim" }, `No label: ${plain(note)}.`);
  return el("p", { class: "label" }, plain(label), el("span", { class: "dim small" }, ` explains ${percent(held, 0)} of its variance on held-out text (descriptions of other directions ${percent(Math.max(0, random ?? 0), 0)}, chance ${percent(chance)})`));
}
function favoured(node, k) {
  const said = node.writes?.find((w) => w.dimension === k);
  const list = (sign, name, pairs) => el("div", {}, el("span", { class: "sign", "aria-label": name }, sign), pairs.map(([text, value]) => token(text, known(value) ? num(value) : null)));
  return said ? [list("▲", "raises", said.promotes), list("▼", "lowers", said.suppresses)] : null;
}
function drawDirection() {
  const node = data.nodes[view.node], all = directionsAt[view.node], direction = all[look.direction];
  const tabs = all.map((d, i) => el("button", { type: "button", "aria-pressed": String(i === look.direction), onclick: () => { look.direction = i; drawDirection(); } }, `direction ${d.dimension}`, el("span", { class: "dim small" }, ` ${num(node.spectra?.write?.[d.dimension], 2)} nats`)));
  const groups = Object.entries(GROUPS).map(([kind, name]) => [name, direction.examples.filter((e) => e.kind === kind)]).filter(([, rows]) => rows.length);
  $("page-directions").replaceChildren(
    el("div", { class: "tabs", role: "group", "aria-label": "Directions" }, tabs), described(direction),
    el("div", { class: "favoured" }, favoured(node, direction.dimension)), legendOf(direction),
    el("div", { class: "examples" }, groups.map(([name, rows]) => el("section", {}, el("h4", {}, name), el("ol", {}, rows.map((example) => exampleRow(direction, example)))))),
    el("p", { class: "dim small" }, `Over ${count(drivers.n_tokens)} tokens: mean ${num(direction.mean, 2)}, standard deviation ${num(direction.std, 2)}. The sign of a direction is arbitrary.`));
}

// ---- where a head looks ----
const shareOf = (character) => Math.max(0, DIGITS.indexOf(character)) / (DIGITS.length - 1);
const SQUARE = 15, LABEL = 86;
function heatMap(pattern) {
  const { rows, text, start, position } = pattern, n = rows.length, size = LABEL + SQUARE * (n + 1), high = LABEL - 20 + SQUARE * n;
  const name = (k) => plain(stringAt(text, start + k), { spaces: true }), cut = (word) => (word.length > 11 ? `${word.slice(0, 10)}…` : word);
  const keys = ["elsewhere", ...Array.from({ length: n }, (_, k) => name(k))];
  const cells = rows.flatMap((row, q) => [...row].slice(0, n + 1).flatMap((character, k) => {
    const share = shareOf(character);
    if (share === 0) return [];
    const cell = svg("rect", { class: "heat", x: LABEL + k * SQUARE, y: LABEL - 20 + q * SQUARE, width: SQUARE - 1, height: SQUARE - 1, "data-tip": `${percent(share, 0)} from ${name(q)} to ${k ? keys[k] : "tokens that are not shown"}` });
    cell.style.setProperty("--share", `${Math.round(6 + 94 * share)}%`);
    return [cell];
  }));
  const mark = svg("rect", { class: "heat-row", x: LABEL - 1, y: LABEL - 21 + (position - start) * SQUARE, width: SQUARE * (n + 1) + 1, height: SQUARE + 1 });
  return svg("svg", { class: "heat-map", viewBox: `0 0 ${size} ${high}`, width: size, height: high, role: "img", "aria-label": `Attention of ${nodeName(view.node)}: rows look at columns` },
    svg("rect", { class: "heat-ground", x: LABEL, y: LABEL - 20, width: SQUARE * (n + 1) - 1, height: SQUARE * n - 1 }), cells, mark,
    keys.map((word, k) => svg("text", { class: k - 1 === position - start ? "here" : null, transform: `translate(${LABEL + k * SQUARE + 11} ${LABEL - 25}) rotate(-60)` }, cut(word))),
    rows.map((_, q) => svg("text", { class: q === position - start ? "here" : null, x: LABEL - 6, y: LABEL - 9 + q * SQUARE, "text-anchor": "end" }, cut(name(q)))));
}
function drawAttention() {
  const all = patternsAt[view.node], pattern = all[look.pattern];
  $("page-attention").hidden = !pattern;
  if (!pattern) return;
  const tabs = all.map((p, i) => el("button", { type: "button", "aria-pressed": String(i === look.pattern), onclick: () => { look.pattern = i; drawAttention(); } }, "at ", token(stringAt(p.text, p.position))));
  $("page-attention").replaceChildren(el("h3", {}, "Where it looks"), el("div", { class: "tabs", role: "group", "aria-label": "Examples" }, tabs),
    el("p", { class: "dim small" }, "Rows are the tokens that look, columns what they look at; the darker, the more. The framed row is the example’s token."), el("div", { class: "heat-wrap" }, heatMap(pattern)));
}

// ---- edges ----
function edgesTable(place, caption, edges, other) {
  const sorted = [...edges].sort((a, b) => weight(b) - weight(a)), top = sorted.length ? weight(sorted[0]) : 1;
  const end = (edge) => el("button", { type: "button", class: "link", onclick: () => go(edge[other]) }, nodeName(edge[other]));
  const columns = [
    { name: other === "src" ? "from" : "to", text: true, value: (e) => data.nodes[e[other]].name, show: end },
    { name: "port", text: true, value: (e) => e.port, show: (e) => chip(e.port, portColour(e.port)) },
    { name: `nats/${unit}`, value: (e) => nats(e), show: (e) => bar(weight(e) / (top || 1), num(nats(e))) },
  ];
  if (edges.some((e) => e.kernel)) columns.splice(1, 0, kernelColumn);
  // of how many kinds of data the edge serves, the one it is worth most on
  if (kinds.length) columns.push({ name: "most on", text: true, value: (e) => bestKind(e), show: (e) => plain(bestKind(e)) });
  makeTable(place, caption, columns, { empty: "No edge." })(sorted.slice(0, EDGES_LISTED));
}
const bestKind = (edge) => kinds.reduce((best, k) => ((k.edges[edge.place] ?? 0) > (best.edges[edge.place] ?? 0) ? k : best), kinds[0]).name;

function kindBars(i) {
  const rows = kinds.map((k) => [plain(k.name), k.nodes[i]]).filter(([, value]) => known(value)), top = Math.max(1e-300, ...rows.map(([, value]) => value));
  return rows.length ? el("p", { class: "kind-bars" }, "On kinds of data: ", rows.map(([name, value]) => el("span", { class: "kind-bar" }, name, bar(value / top, num(value, 2))))) : null;
}
function drawPage() {
  const i = view.node;
  $("node-page").hidden = i === null;
  if (i === null) return;
  const node = data.nodes[i], worth = known(score(i)) ? `${num(score(i))} nats per ${unit}` : "its worth was not measured";
  $("h-node").textContent = nodeName(i);
  $("page-note").replaceChildren(`${isHead(node) ? "An attention head" : node.kind === "map" ? "A feature map" : "A node"} worth ${worth}${view.kind === null ? "" : ` on ${plain(kinds[view.kind].name)}`}. `, kindBars(i) ?? "");
  $("page-directions").hidden = !directionsAt[i].length;
  if (directionsAt[i].length) drawDirection();
  drawAttention();
  edgesTable($("page-in"), `Edges into ${nodeName(i)}`, edgesIn[i], "src");
  edgesTable($("page-out"), `Edges out of ${nodeName(i)}`, edgesOut[i], "dst");
}
export function startNodePage() {
  onChange((part) => {
    if ("node" in part) Object.assign(look, { direction: 0, pattern: 0 });
    if ("node" in part || "kind" in part) drawPage();
  });
}
