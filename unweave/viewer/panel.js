// The side panel: what the chosen node reads and writes, in directions and in tokens, and its strongest edges.
import { data, edgesIn, edgesOut, isHead, nats, nodeName, portColour, score, unit, weight } from "./data.js";
import { $, chip, el, svg, token } from "./dom.js";
import { count, known, num, plain } from "./format.js";
import { go } from "./graph.js";
import { kernelLegend, kernelPicture } from "./kernels.js";
import { change, onChange, view } from "./view.js";

const EDGES = 8, BARS = 64, BEST = 12;
const KINDS = { embed: "embedding", mlp: "MLP", map: "feature map", unembed: "output", other: "node" };

const link = (i, ...content) => el("button", { type: "button", class: "link", onclick: () => go(i) }, content.length ? content : nodeName(i));
const part = (title, ...content) => el("section", {}, el("h4", {}, title), content);

// a name and a figure over a line as long as the figure is large
function listed(share, tip, name, figure) {
  const item = el("li", { "data-tip": tip }, el("span", { class: "ends" }, name), el("span", {}, figure));
  item.style.setProperty("--share", `${(100 * share).toFixed(1)}%`);
  return item;
}
function strongestNodes() {
  const ranked = data.nodes.map((_, i) => ({ i, nats: score(i) })).filter((row) => known(row.nats)).sort((a, b) => b.nats - a.nats).slice(0, BEST);
  const top = Math.max(1e-300, ranked[0]?.nats ?? 0);
  return [
    el("h3", {}, "Strongest nodes"),
    el("p", { class: "dim" }, "What the output would lose if a node said only its mean, estimated. Choose one here or in the graph."),
    el("ol", { class: "rows" }, ranked.map((row) => listed(row.nats / top, null, link(row.i), num(row.nats)))),
  ];
}

// one bar per direction, in nats
function spectrum(key, nats) {
  const values = nats.slice(0, BARS).map((v) => (known(v) ? Math.max(0, v) : 0)), top = Math.max(...values, 1e-300);
  const width = 296, height = 46, step = Math.min(14, width / values.length);
  const port = key.startsWith("read.") ? key.slice(5) : null;
  const root = svg("svg", { class: "spectrum", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": `Spectrum of ${plain(key)}: ${values.slice(0, 8).map((v) => num(v, 2)).join(", ")}${values.length > 8 ? " and less" : ""} nats` },
    values.map((v, k) => {
      const h = Math.max(1, (height - 1) * (v / top));
      return svg("g", { "data-tip": `direction ${k}: ${num(v)} nats` }, svg("rect", { class: "reach", x: k * step, y: 0, width: step, height }), svg("rect", { x: k * step, y: height - h, width: Math.max(1, step - 1.5), height: h }));
    }));
  root.style.setProperty("--p", port === null ? "var(--accent)" : `var(${portColour(port)})`);
  return root;
}
function subspaces(node) {
  const spectra = node.spectra ?? {}, ranks = node.ranks ?? {};
  return [...new Set([...Object.keys(spectra), ...Object.keys(ranks)])].map((key) => {
    const nats = spectra[key] ?? [], total = nats.reduce((sum, v) => sum + (v ?? 0), 0);
    const rank = ranks[key] ?? nats.length, name = key === "write" ? "writes" : ["reads at ", chip(key.replace(/^read\./, ""), portColour(key.replace(/^read\./, "")))];
    return el("div", { class: "space" }, el("div", { class: "pair" }, el("span", {}, name), el("span", { class: "dim" }, `${count(rank)} ${rank === 1 ? "dimension" : "dimensions"}${nats.length ? `, ${num(total)} nats` : ""}`)), nats.length ? spectrum(key, nats) : null);
  });
}

function edgeList(title, edges, other) {
  const best = [...edges].sort((a, b) => weight(b) - weight(a)).slice(0, EDGES), top = best.length ? weight(best[0]) : 1;
  if (!best.length) return null;
  const total = edges.reduce((sum, edge) => sum + weight(edge), 0);
  return part([title, el("span", { class: "dim" }, ` ${count(edges.length)}, ${num(total)} nats`)], el("ol", { class: "rows" }, best.map((edge) =>
    listed(weight(edge) / (top || 1), `${num(edge.nats)} ± ${num(edge.se, 2)} nats per ${unit}, ${edge.measured ? "measured" : "estimated"}`, [kernelPicture(edge) ?? chip(edge.port, portColour(edge.port)), link(edge[other])], num(nats(edge))))));
}

const tokens = (pairs) => pairs.map(([text, value]) => token(text, known(value) ? `${plain(text, { spaces: true })}: ${num(value)}` : null));
const direction = (name, nats, ...lines) => el("li", {}, el("div", { class: "pair" }, el("span", {}, name), el("span", { class: "dim" }, `${num(nats)} nats`)), lines);
function written(node) {
  if (!node.writes?.length) return null;
  return part("What its writing does to the output", el("p", { class: "dim small" }, "Each direction straight to the output: the tokens it raises and lowers most. A direction’s sign is arbitrary."), el("ol", { class: "directions" }, node.writes.map((w) =>
    direction(`direction ${w.dimension}`, w.nats, el("div", {}, el("span", { class: "sign", "aria-label": "raises" }, "▲"), tokens(w.promotes)), el("div", {}, el("span", { class: "sign", "aria-label": "lowers" }, "▼"), tokens(w.suppresses))))));
}
function read(node) {
  if (!node.reads?.length) return null;
  return part("Tokens it reads", el("p", { class: "dim small" }, "The tokens whose embeddings lie furthest along each direction that is read."), el("ol", { class: "directions" }, node.reads.map((r) =>
    direction([chip(r.port, portColour(r.port)), ` direction ${r.dimension}`], r.nats, el("div", {}, tokens(r.tokens))))));
}

function toPage() {
  $("node-page").scrollIntoView({ block: "start" });
  $("h-node").focus({ preventScroll: true });
}
function about(i) {
  const node = data.nodes[i], facts = [isHead(node) ? "attention head" : KINDS[node.kind] ?? "node"];
  if (node.kind !== "embed" && node.kind !== "unembed") facts.push(`layer ${node.layer}`);
  if (known(node.n_parameters)) facts.push(`${count(node.n_parameters)} parameters`);
  return [
    el("div", { class: "pair" }, el("h3", {}, nodeName(i)), el("button", { type: "button", class: "close", "aria-label": "Close the panel", "data-tip": "Close (Esc)", onclick: () => change({ node: null }) }, "×")),
    el("p", { class: "dim" }, facts.join(" · ")),
    known(node.score_nats) ? el("p", { class: "score" }, el("strong", {}, num(node.score_nats)), ` ± ${num(node.score_se, 2)} nats per ${unit} if it said only its mean`) : null,
    ...[subspaces(node)].filter((list) => list.length).map((list) => part("Subspaces", list)),
    [...edgesIn[i], ...edgesOut[i]].some((edge) => edge.kernel) ? kernelLegend() : null,
    el("button", { type: "button", class: "more", onclick: toPage }, node.kind === "map" ? "All kernels and edges ↓" : "Examples, attention, all edges ↓"),
    edgeList("Edges in", edgesIn[i], "src"), edgeList("Edges out", edgesOut[i], "dst"), written(node), read(node),
  ].filter(Boolean);
}
export function startPanel() {
  const draw = () => {
    $("panel").replaceChildren(...(view.node === null ? strongestNodes() : about(view.node)));
    $("panel").classList.toggle("open", view.node !== null);
    $("panel").scrollTop = 0;
  };
  onChange((part) => { if ("node" in part || "kind" in part) draw(); });
  draw();
}
