// Nodes by tokens: what every node is used for, on a canvas, because there may be a thousand rows.
import { $, colour, el } from "../dom.js";
import { num, plain, short } from "../format.js";
import { hideTip, showTip } from "../tip.js";
import { change, known, onChange, state, writers } from "./state.js";

const LABEL = 84, ROW = 17, NARROWEST = 7, WIDEST = 34, READABLE = 11, LARGEST_CANVAS = 16000;
let strips = [];

function makeStrip(k) {
  const canvas = el("canvas", { role: "img", "data-own-tip": "", "aria-label": "Use of every node on every token; choose nodes with the arrow keys or from the list" });
  const title = el("h2", {}), note = el("p", { class: "note small" });
  const figure = el("figure", { class: "card strip" }, title, note, el("div", { class: "field-of-heat" }, canvas));
  const strip = { k, canvas, title, note, figure, cell: 0, head: 0, rows: [], use: null };
  canvas.addEventListener("click", (event) => {
    const { row, token } = at(strip, event);
    if (row || token !== null) change({ ...(row ? { node: row } : {}), ...(token !== null ? { token } : {}) });
  });
  canvas.addEventListener("pointermove", (event) => {
    const { row, token } = at(strip, event), value = row && token !== null ? strip.use[row]?.[token] : null;
    if (!row) return hideTip();
    showTip(plain(row) + (token === null ? "" : `\non ${plain(known.answer.tokens[token].text, { spaces: true })}: ${num(value)} nats`), event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", hideTip);
  return strip;
}
function at(strip, event) {
  const box = strip.canvas.getBoundingClientRect(), x = event.clientX - box.left - LABEL, y = event.clientY - box.top - strip.head;
  const token = x < 0 ? null : Math.floor(x / strip.cell), row = y < 0 ? null : strip.rows[Math.floor(y / ROW)];
  return { row: row ?? null, token: token !== null && token < known.answer.tokens.length ? token : null };
}
function draw(strip) {
  const graph = known.answer.graphs[strip.k], tokens = known.answer.tokens, facts = known.facts.graphs[strip.k];
  strip.title.textContent = known.facts.graphs.length > 1 ? plain(facts.name) : "Use of every node";
  strip.canvas.hidden = !graph.use;
  if (!graph.use) {
    strip.note.textContent = "Edges of this graph carry only some dimensions; their use is not estimated. Choose a node and measure it.";
    return;
  }
  strip.use = graph.use;
  strip.rows = writers().map((node) => node.name).filter((name) => name in graph.use);
  const width = Math.max(160, strip.figure.clientWidth - 30), pen = strip.canvas.getContext("2d");
  strip.cell = Math.max(NARROWEST, Math.min(WIDEST, (width - LABEL) / tokens.length));
  strip.head = strip.cell < READABLE ? 4 : 64;
  const w = Math.ceil(LABEL + strip.cell * tokens.length), h = strip.head + ROW * strip.rows.length;
  const ratio = Math.max(w, h) * 2 > LARGEST_CANVAS ? 1 : Math.min(2, devicePixelRatio || 1);
  strip.canvas.width = Math.round(w * ratio);
  strip.canvas.height = Math.round(h * ratio);
  strip.canvas.style.width = `${w}px`;
  strip.canvas.style.height = `${h}px`;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const top = Math.max(1e-300, ...strip.rows.map((name) => Math.max(...graph.use[name])));
  strip.note.textContent = `Nats of the prediction${state.only && state.token !== null ? " after the chosen token" : "s"} that would change if a node said only its mean at one token; estimated. Darkest: ${num(top)}.`;
  heads(pen, strip, tokens);
  strip.rows.forEach((name, r) => line(pen, strip, name, r, top, tokens.length));
  frame(pen, strip, w, h);
}
function heads(pen, strip, tokens) {
  pen.fillStyle = colour("--dim");
  pen.font = `11px ${getComputedStyle(document.body).getPropertyValue("--mono")}`;
  if (strip.cell < READABLE) return;
  tokens.forEach((token, t) => {
    const text = plain(token.text, { spaces: true });
    pen.save();
    pen.translate(LABEL + (t + 0.5) * strip.cell + 4, strip.head - 6);
    pen.rotate(-Math.PI / 2);
    pen.fillText([...text].length > 8 ? `${[...text].slice(0, 7).join("")}…` : text, 0, 0);
    pen.restore();
  });
}
function line(pen, strip, name, r, top, n) {
  const y = strip.head + r * ROW, gone = state.ablate.includes(name);
  pen.globalAlpha = 1;
  pen.fillStyle = colour(gone ? "--k" : "--dim");
  pen.font = `${name === state.node ? "650 " : ""}11.5px ${getComputedStyle(document.body).fontFamily}`;
  const label = short(name);
  pen.fillText((gone ? "✕ " : "") + (label.length > 13 ? `…${label.slice(-12)}` : label), 0, y + ROW - 5, LABEL - 8);
  pen.fillStyle = colour(gone ? "--k" : "--accent");
  for (let t = 0; t < n; t++) {
    pen.globalAlpha = 0.04 + 0.96 * Math.cbrt(Math.max(0, strip.use[name][t] ?? 0) / top);
    pen.fillRect(LABEL + t * strip.cell, y, Math.max(1, strip.cell - 1), ROW - 1);
  }
}
// the chosen node and the chosen token, as a cross
function frame(pen, strip, w, h) {
  pen.globalAlpha = 1;
  pen.strokeStyle = colour("--fg");
  pen.lineWidth = 1.5;
  const r = strip.rows.indexOf(state.node);
  if (r >= 0) pen.strokeRect(LABEL - 1, strip.head + r * ROW - 1, w - LABEL, ROW + 1);
  if (state.token !== null && state.token < known.answer.tokens.length) pen.strokeRect(LABEL + state.token * strip.cell - 1, strip.head - 1, strip.cell + 1, h - strip.head);
}
let asked = false;
export function redraw() {
  if (asked || !known.answer) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; strips.forEach(draw); });
}
export function startStrips() {
  strips = known.facts.graphs.map((_, k) => makeStrip(k));
  $("strips").replaceChildren(...strips.map((strip) => strip.figure));
  $("strips").classList.toggle("two", strips.length > 1);
  new ResizeObserver(redraw).observe($("strips"));
  onChange(redraw);
}
