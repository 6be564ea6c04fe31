// What validation, scrubbing, edits and the audit found: a part for each that was run on the folder.
import { auditPart } from "./audited.js";
import { data } from "./data.js";
import { $, el, running, svg, token } from "./dom.js";
import { editsPart } from "./edited.js";
import { count, known, num, percent, plain, power } from "./format.js";
import { makeTable } from "./table.js";
import { interval } from "./tables.js";

// ---- rows of dots with whiskers ----
const ROWS = { width: 1000, left: 330, right: 90, height: 26, top: 8, bottom: 40 };
// the first is ours alone
const HUE_OF = (i) => `var(${i ? ["--hue-1", "--hue-2", "--hue-3", "--hue-4", "--hue-5"][(i - 1) % 5] : "--accent"})`;
const clamp = (x) => Math.max(0, Math.min(1, x));

// lines: { name, value, low, high, hue, text }; share places a value between 0 and 1; ticks are { value, text }
function dotRows(label, lines, share, ticks, { bars = false, axis = "" } = {}) {
  const bottom = ROWS.top + lines.length * ROWS.height, end = ROWS.width - ROWS.right;
  const x = (v) => ROWS.left + clamp(share(v)) * (end - ROWS.left);
  const grid = ticks.flatMap((t) => [
    svg("line", { class: "grid", x1: x(t.value), x2: x(t.value), y1: ROWS.top, y2: bottom }),
    svg("text", { class: "tick", x: x(t.value), y: bottom + 16, "text-anchor": "middle" }, t.text)]);
  const rows = lines.map((line, i) => {
    const y = ROWS.top + (i + 0.5) * ROWS.height, certain = !known(line.low) || !known(line.high);
    const group = svg("g", { class: "line", "data-tip": line.text },
      svg("text", { class: "row-name", x: ROWS.left - 14, y, dy: "0.34em", "text-anchor": "end" }, line.name.length > 44 ? `${line.name.slice(0, 43)}…` : line.name),
      bars && svg("rect", { class: "amount", x: Math.min(x(0), x(line.value)), width: Math.abs(x(line.value) - x(0)), y: y - 7, height: 14 }),
      certain ? null : svg("path", { class: "whisker", d: `M${x(line.low)} ${y} H${x(line.high)} M${x(line.low)} ${y - 4} v8 M${x(line.high)} ${y - 4} v8` }),
      svg("circle", { class: share(line.value) < 0 ? "point clipped" : "point", cx: x(line.value), cy: y, r: 4 }));
    group.style.setProperty("--hue", line.hue);
    return group;
  });
  return el("div", { class: "plot-wrap" }, svg("svg", { class: "plot", viewBox: `0 0 ${ROWS.width} ${bottom + ROWS.bottom}`, role: "img", "aria-label": `${label}. ${lines.map((line) => line.text.replace("\n", ": ")).join(". ")}` },
    grid, rows, svg("text", { class: "axis-name", x: (ROWS.left + end) / 2, y: bottom + 34, "text-anchor": "middle" }, axis)));
}

const checkPart = (id, title, note, ...children) => el("article", { class: "check", id }, el("h3", {}, title), el("p", { class: "note" }, note), children);
const holder = (className = "scroll tall") => el("div", { class: className });

// ---- validation ----
const placeOf = (row) => `${plain(row.data)}${row.type === "all" ? "" : `, ${plain(row.type)}`}`;
function validationVerdict(facts) {
  const groups = new Map();
  for (const row of facts.rows) groups.set(placeOf(row), [...(groups.get(placeOf(row)) ?? []), row]);
  const lost = [];
  let rivals = 0;
  for (const [where, rows] of groups) {
    const ours = rows.find((row) => row.graph === facts.candidate);
    for (const row of rows) {
      if (row === ours || !ours || ["original", "every channel at its mean"].includes(row.graph)) continue;
      rivals++;
      if (!(ours.kl_nats.high < row.kl_nats.low)) lost.push(`${plain(row.graph)} (${where})`);
    }
  }
  const size = known(facts.size) ? ` With ${percent(facts.size)} of the numbers in the model’s channels:` : "";
  if (!rivals) return `${size} there was no baseline to compare with.`;
  return lost.length ? `${size} the graph’s interval is below that of ${count(rivals - lost.length)} of ${count(rivals)} baselines of its size; not below ${lost.slice(0, 4).join(", ")}${lost.length > 4 ? ", …" : ""}.` : `${size} the graph’s interval is below that of every baseline of its size, in every row.`;
}
function validationPlot(facts) {
  const names = [facts.candidate, ...new Set(facts.rows.map((row) => row.graph))].filter((name, i, all) => name !== "original" && all.indexOf(name) === i);
  const rows = facts.rows.filter((row) => row.graph !== "original" && row.kl_nats.value > 0);
  if (!rows.length) return null;
  const values = rows.flatMap((row) => [row.kl_nats.value, row.kl_nats.low, row.kl_nats.high]).filter((v) => known(v) && v > 0);
  const high = Math.ceil(Math.log10(Math.max(...values))), low = Math.max(high - 7, Math.floor(Math.log10(Math.min(...values))));
  const share = (v) => (Math.log10(Math.max(v, 1e-30)) - low) / (high - low || 1);
  const lines = rows.slice(0, 60).map((row) => ({ name: `${plain(row.graph)} · ${placeOf(row)}`, ...row.kl_nats, hue: HUE_OF(names.indexOf(row.graph)), text: `${plain(row.graph)}, ${placeOf(row)}\n${num(row.kl_nats.value)} nats per token, 95% interval ${num(row.kl_nats.low)} to ${num(row.kl_nats.high)}` }));
  const ticks = Array.from({ length: high - low + 1 }, (_, i) => ({ value: 10 ** (low + i), text: power(low + i) }));
  return dotRows("Divergence from the model", lines, share, ticks, { axis: "KL, nats per token; a hollow mark lies further left" });
}
function validationPart(facts) {
  const table = holder(), worst = holder();
  const figure = (name, key, help, format) => ({ name, help, value: (r) => r[key]?.value, show: (r) => interval(r[key], format) });
  const tail = (name, key, help) => ({ name, help, value: (r) => r[key], show: (r) => num(r[key]) });
  makeTable(table, "How far the graph and baselines of its size are from the model, by data and kind of token", [
    { name: "data", text: true, value: (r) => r.data, show: (r) => plain(r.data) },
    { name: "tokens of kind", text: true, value: (r) => r.type, show: (r) => plain(r.type) },
    { name: "graph", text: true, head: true, value: (r) => r.graph, show: (r) => plain(r.graph) },
    figure("KL, nats", "kl_nats", "Mean divergence from the model’s output, nats per token"),
    tail("99%", "kl_p99", "What 1 token in 100 exceeds"), tail("99.9%", "kl_p999", "What 1 token in 1,000 exceeds"), tail("max", "kl_max", "The worst token"),
    figure("same first guess", "agreement", "How often it puts the same token first", percent),
    figure("loss recovered", "loss_recovered", "100% is the model’s loss, 0% the loss with every channel at its mean", percent),
    { name: "tokens", value: (r) => r.n_tokens, show: (r) => count(r.n_tokens) },
  ], { rowClass: (r) => (r.graph === facts.candidate ? "ours" : null) })(facts.rows);
  makeTable(worst, "Where the graph is furthest from the model", [
    { name: "data", text: true, value: (r) => r.data, show: (r) => plain(r.data) },
    { name: "nats", value: (r) => r.nats, show: (r) => num(r.nats) },
    { name: "text up to the token", value: (r) => r.text, show: (r) => el("span", { class: "passage" }, el("span", { class: "before" }, running([...r.text].slice(-90).join("")))) },
    { name: "model says", text: true, value: (r) => r.network, show: (r) => token(r.network) },
    { name: "graph says", text: true, value: (r) => r.graph, show: (r) => token(r.graph) },
  ], { empty: "No token was recorded." })(facts.worst);
  const left = Object.entries(facts.left_out).map(([name, why]) => el("p", { class: "note keys" }, `No ${plain(name)}: ${plain(why)}.`));
  return checkPart("check-validation", "Validation", "Divergence from the model by data set and kind of token, next to baselines that store as many numbers (or, for a circuit, keep as many edges). Intervals are 95%, over sequences.",
    el("p", { class: "verdict" }, validationVerdict(facts).trim()), validationPlot(facts), table, left, el("h4", {}, "The tail, as texts"), worst);
}

// ---- scrubbing ----
function scrubbingPart(facts) {
  const figures = (row) => (known(row.loss_recovered.value) ? row.loss_recovered : row.recovered);
  const lines = facts.hypotheses.filter((row) => known(figures(row).value)).map((row, i) => ({ name: plain(row.name), ...figures(row), hue: HUE_OF(i), text: `${plain(row.name)}, ${plain(row.graph)}\n${percent(figures(row).value)} recovered, 95% interval ${percent(figures(row).low)} to ${percent(figures(row).high)}` }));
  const least = Math.min(0, ...lines.map((line) => line.low ?? line.value)), low = Math.max(-1, Math.floor(4 * least) / 4);
  const ticks = [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1].filter((v) => v >= low).map((value) => ({ value, text: percent(value, 0) }));
  const table = holder("scroll");
  makeTable(table, "Hypotheses tested by causal scrubbing", [
    { name: "hypothesis", text: true, head: true, value: (r) => r.name, show: (r) => el("span", { "data-tip": plain(r.description) }, plain(r.name)) },
    { name: "of", text: true, value: (r) => r.graph, show: (r) => plain(r.graph) },
    { name: "keys", help: "How many nodes and edges it says matter", value: (r) => r.keys.length, show: (r) => el("span", { "data-tip": plain(r.keys.slice(0, 12).join(", ")) }, count(r.keys.length)) },
    { name: "loss recovered", help: "100%: nothing is lost when all else is resampled. 0%: as if the output heard another input", value: (r) => r.loss_recovered.value, show: (r) => interval(r.loss_recovered, percent) },
    { name: "divergence recovered", value: (r) => r.recovered.value, show: (r) => interval(r.recovered, percent) },
    { name: "not swapped", help: "Largest share, over the keys, of draws that found no partner: they count as recovered though nothing was tested", value: (r) => Math.max(0, ...Object.values(r.alone)), show: (r) => percent(Math.max(0, ...Object.values(r.alone))) },
    { name: "form", text: true, value: (r) => r.form, show: (r) => plain(r.form) },
    { name: "tokens", value: (r) => r.n_tokens, show: (r) => count(r.n_tokens) },
  ])(facts.hypotheses);
  return checkPart("check-scrubbing", "Causal scrubbing", "How much of the behaviour is left when every value is replaced by one that the hypothesis calls equal. A hypothesis that is too coarse may recover all: compare with rivals.",
    lines.length ? dotRows("Recovered by hypothesis", lines, (v) => (v - low) / (1 - low), ticks, { bars: true, axis: "recovered" }) : null, table);
}

export function startChecks() {
  const found = data.checks ?? {}, parts = [];
  if (found.validation) parts.push(validationPart(found.validation));
  if (found.scrubbing) parts.push(scrubbingPart(found.scrubbing));
  if (found.edits) parts.push(checkPart("check-edits", "Edits", "Edits of the model’s weights and state, drawn at random or asked for: what the graph said they would do to the loss, against what they did. On the line the prediction is right. R² is that of the prediction as it is, not of a fit.", editsPart(found.edits)));
  if (found.audit) parts.push(checkPart("check-audit", "Audit", "Where graph and model part, and what carries it. What a graph computes like the model, a hidden behaviour included, no audit of it can show.", auditPart(found.audit)));
  $("checks").replaceChildren(...parts);
}
