// Beside the strip: what comes next after the chosen token, and the chosen node: ablate it, its edges, where it looks.
import { $, chip, colour, el, token } from "../dom.js";
import { count, num, percent, plain, short } from "../format.js";
import { hideTip, showTip } from "../tip.js";
import { change, known, onChange, state, toggleAblation, writers } from "./state.js";

const SQUARE = 280;
const portColour = (port) => (["q", "k", "v"].includes(port) ? `--${port}` : "--in");
const chosen = () => Math.min(state.token ?? known.answer.tokens.length - 1, known.answer.tokens.length - 1);
const nameOf = (k) => (known.facts.graphs.length > 1 ? `${plain(known.facts.graphs[k].name)}, ` : "");
const titled = (k, words) => (nameOf(k) ? nameOf(k) + words : words[0].toUpperCase() + words.slice(1));

// ---- what comes next ----
function next() {
  const t = chosen(), { runs, predictions, tokens } = known.answer;
  const head = runs.map((run) => el("th", { scope: "col" }, `${nameOf(run.graph)}${run.ablated.length ? "ablated" : "whole"}`));
  const rows = predictions[t].map((guess) => el("tr", {}, el("td", { class: "text" }, token(guess.text, `id ${guess.id}`)), guess.p.map((p) => {
    const cell = el("td", { class: "share" }, percent(p));
    cell.style.setProperty("--share", `${(100 * (p ?? 0)).toFixed(1)}%`);
    return cell;
  })));
  const far = runs.map((run) => el("td", {}, run.kl_nats ? num(run.kl_nats[t]) : "–"));
  return [
    el("p", { class: "dim small" }, "after ", token(tokens[t].text), state.token === null ? "the last token; choose another above" : `token ${t}`),
    el("div", { class: "wide" }, el("table", {}, el("caption", { class: "hidden" }, "Likeliest next tokens"), el("thead", {}, el("tr", {}, el("th", { scope: "col", class: "text" }, "next"), head)),
      el("tbody", {}, rows, runs.length > 1 ? el("tr", { class: "far" }, el("td", { class: "text" }, "nats away"), far) : null))),
  ];
}

// ---- the chosen node ----
const ablateButton = (name, words) => el("button", { type: "button", class: "plain", "aria-pressed": String(state.ablate.includes(name)), onclick: () => toggleAblation(name) }, state.ablate.includes(name) ? "put back" : words);
function picker() {
  const use = known.answer.graphs[0].use ?? {}, total = (name) => (use[name] ?? []).reduce((a, b) => a + (b ?? 0), 0);
  const options = writers().map((node) => el("option", { value: node.name, selected: node.name === state.node }, `${short(node.name)}${node.name in use ? `  ${num(total(node.name), 2)} nats` : ""}`));
  return el("label", { class: "pick" }, el("span", { class: "hidden" }, "Node"), el("select", { id: "pick-node", onchange: (event) => change({ node: event.target.value || null }) }, el("option", { value: "", selected: state.node === null }, "choose a node…"), options));
}
function edgeRow(edge, top) {
  const cut = edge.port.lastIndexOf("."), port = edge.port.slice(cut + 1), dst = edge.port.slice(0, cut), name = `${edge.src}->${edge.port}`;
  const nats = edge.use.reduce((a, b) => a + (b ?? 0), 0), best = edge.use.indexOf(Math.max(...edge.use));
  const link = (node) => el("button", { type: "button", class: "link", onclick: () => change({ node }) }, short(node));
  const item = el("li", { "data-tip": `${plain(name)}\n${num(nats)} nats, most on token ${best}, ${plain(known.answer.tokens[best].text, { spaces: true })}` },
    el("span", { class: "ends" }, link(edge.src), "→", chip(port, portColour(port)), link(dst)), el("span", {}, num(nats, 2), " ", ablateButton(name, "ablate")));
  item.style.setProperty("--share", `${((100 * nats) / top).toFixed(1)}%`);
  return item;
}
function edges(graph, k) {
  if (!graph.edges?.length) return null;
  const total = (edge) => edge.use.reduce((a, b) => a + (b ?? 0), 0), top = Math.max(1e-300, ...graph.edges.map(total));
  return el("section", {}, el("h3", {}, titled(k, "strongest edges on this text")), el("ol", { class: "rows edges" }, graph.edges.map((edge) => edgeRow(edge, top))));
}
function pattern(graph, k) {
  if (!graph.pattern) return null;
  const n = graph.pattern.length, cell = SQUARE / n, canvas = el("canvas", { class: "pattern", width: SQUARE * 2, height: SQUARE * 2, role: "img", "data-own-tip": "", "aria-label": "Attention pattern: one row per token, from each to the tokens it looks at" });
  const pen = canvas.getContext("2d");
  pen.scale(2, 2);
  pen.fillStyle = colour("--accent");
  graph.pattern.forEach((row, q) => row.forEach((p, key) => {
    if (!p) return;
    pen.globalAlpha = p;
    pen.fillRect(key * cell, q * cell, cell, cell);
  }));
  pen.globalAlpha = 1;
  pen.strokeStyle = colour("--fg");
  if (state.token !== null && state.token < n) pen.strokeRect(0.5, state.token * cell, SQUARE - 1, cell);
  const place = (event) => [event.offsetY, event.offsetX].map((x) => Math.max(0, Math.min(n - 1, Math.floor(x / cell))));
  canvas.addEventListener("pointermove", (event) => {
    const [q, key] = place(event), said = (t) => plain(known.answer.tokens[t].text, { spaces: true });
    showTip(`from ${said(q)} (${q}) to ${said(key)} (${key}): ${percent(graph.pattern[q][key])}`, event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("click", (event) => change({ token: place(event)[0] }));
  return el("section", {}, el("h3", {}, titled(k, "where it looks")), el("p", { class: "dim small" }, "One row per token, the first above; columns are the tokens it looks at."), canvas);
}
function about() {
  const { graphs } = known.answer, node = known.facts.graphs[0].nodes.find((one) => one.name === state.node), parts = [picker()];
  if (node?.writes) {
    parts.push(el("div", { class: "controls" }, ablateButton(node.name, "ablate it"), el("button", { type: "button", class: "plain", id: "measure", "aria-pressed": String(state.measure), onclick: () => change({ measure: !state.measure }), "data-tip": "One run per token: this node at its mean there alone" }, "measure it on each token")));
  }
  return [...parts, ...graphs.flatMap((graph, k) => [pattern(graph, k), edges(graph, k)]).filter(Boolean)];
}

// ---- what is ablated ----
function ablations() {
  if (!state.ablate.length) return [el("span", { class: "note" }, "Nothing is ablated: choose a node and ablate it, and it says only its mean", ` over ${plain(known.facts.means_over)}.`)];
  return [el("span", {}, "Ablated:"), ...state.ablate.map((name) => el("button", { type: "button", class: "gone", "data-tip": "Put it back", onclick: () => toggleAblation(name) }, short(name), " ×")),
    el("button", { type: "button", class: "plain", onclick: () => change({ ablate: [] }) }, state.ablate.length > 1 ? `put all ${count(state.ablate.length)} back` : "put back")];
}
export function startSide() {
  onChange(() => {
    if (!known.answer) return;
    const held = document.activeElement?.id;
    $("next").replaceChildren(...next());
    $("node").replaceChildren(...about());
    $("ablated").replaceChildren(...ablations());
    if (held === "pick-node" || held === "measure") $(held)?.focus();
  });
}
