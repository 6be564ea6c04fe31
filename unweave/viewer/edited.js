// Edits: predicted against true changes of the loss, both of either sign, on a scale that is logarithmic away from 0.
import { PLOT, hover } from "./curve.js";
import { el, svg } from "./dom.js";
import { count, known, num, percent, plain, power } from "./format.js";
import { makeTable } from "./table.js";
import { interval } from "./tables.js";

const FIELD = { left: 120, right: 560, top: 14, bottom: 350 };
const PREDICTORS = [["graph", "the graph"], ["second_order", "second order"], ["gradient", "the gradient"]];
const DECADES = 4;

function signedScale(points, keys) {
  const values = points.flatMap((p) => keys.map((key) => Math.abs(p[key] ?? 0))).filter(known);
  const high = Math.ceil(Math.log10(Math.max(...values, 1e-9))), unit = 10 ** (high - DECADES);
  const bend = (v) => Math.sign(v) * Math.log10(1 + Math.abs(v) / unit);
  const most = bend(10 ** high), ticks = [0];
  for (let e = high - DECADES + 1; e <= high; e++) ticks.push(10 ** e, -(10 ** e));
  return { share: (v) => (1 + bend(v) / most) / 2, ticks: ticks.sort((a, b) => a - b) };
}
const tickName = (v) => (v === 0 ? "0" : `${v < 0 ? "−" : ""}${power(Math.round(Math.log10(Math.abs(v))))}`);

// random edits have a size in numbers; those that a person asked for are called so
const isAsked = (size) => !Number.isFinite(Number(size));
const sizeName = (size) => (isAsked(size) ? plain(size) : `size ${plain(size)}`);

function editsPlot(points, key, name) {
  const told = points.filter((p) => known(p.true) && known(p[key]));
  const { share, ticks } = signedScale(told, ["true", key]);
  const along = (v) => FIELD.left + share(v) * (FIELD.right - FIELD.left), up = (v) => FIELD.bottom - share(v) * (FIELD.bottom - FIELD.top);
  const sizes = [...new Set(points.map((p) => p.size))], hue = (size) => `var(${["--hue-2", "--hue-1", "--accent", "--hue-3"][sizes.indexOf(size) % 4]})`;
  const spots = told.map((p) => ({ x: along(p[key]), y: up(p.true), text: `${plain(p.edit)}, ${sizeName(p.size)}\npredicted ${num(p[key])}, true ${num(p.true)} nats per token` }));
  const dot = (x, y, colour) => {
    const mark = svg("circle", { class: "point", cx: x, cy: y, r: 3.6 });
    mark.style.setProperty("--hue", colour);
    return mark;
  };
  const names = sizes.flatMap((size, i) => [dot(FIELD.right + 40, 40 + 24 * i, hue(size)), svg("text", { class: "label", x: FIELD.right + 54, y: 40 + 24 * i, dy: "0.34em" }, sizeName(size))]);
  const root = svg("svg", { class: "plot", viewBox: `0 0 ${PLOT.width} ${PLOT.height}`, role: "img", "aria-label": `Change of the loss by ${told.length} edits, true against predicted by ${name}` },
    ticks.flatMap((v) => [
      svg("line", { class: "grid", x1: FIELD.left, x2: FIELD.right, y1: up(v), y2: up(v) }),
      svg("text", { class: "tick", x: FIELD.left - 10, y: up(v), dy: "0.32em", "text-anchor": "end" }, tickName(v)),
      svg("text", { class: "tick", x: along(v), y: FIELD.bottom + 21, "text-anchor": "middle" }, tickName(v))]),
    svg("line", { class: "axis", x1: FIELD.left, y1: FIELD.bottom, x2: FIELD.right, y2: FIELD.top }),
    svg("text", { class: "axis-name", x: (FIELD.left + FIELD.right) / 2, y: FIELD.bottom + 44, "text-anchor": "middle" }, `predicted by ${name}, nats per token`),
    svg("text", { class: "axis-name", x: 40, y: 182, "text-anchor": "middle", transform: "rotate(-90 40 182)" }, "true, nats per token"),
    told.map((p, i) => dot(spots[i].x, spots[i].y, hue(p.size))), names);
  if (spots.length) hover(root, spots);
  return root;
}

function calledTable(table, rows) {
  const figure = (name, key, help, format) => ({ name, help, value: (r) => r[key]?.value, show: (r) => interval(r[key], format) });
  makeTable(table, "How well edits were called, by size and predictor", [
    { name: "size", text: true, value: (r) => r.size, show: (r) => plain(r.size) },
    { name: "predicted by", text: true, head: true, help: "permuted: the graph’s prediction of another edit, what is right by chance", value: (r) => r.predictor, show: (r) => plain(r.predictor) },
    figure("R²", "r2", "1 is right, 0 as good as always saying the mean, below 0 worse"),
    figure("slope", "slope", "Of the true change on the predicted: below 1 the effect is overstated"),
    figure("correlation", "correlation", "Pearson’s"),
    figure("sign right", "sign", "Share of edits; large edits nearly always hurt, so see what the permuted have", percent),
    figure("top token right", "top_token", "Share of edits for which the output that moves most, and its direction, were called right", percent),
    { name: "mean change, nats", value: (r) => r.mean_change, show: (r) => num(r.mean_change) },
    { name: "edits", value: (r) => r.n, show: (r) => count(r.n) },
  ], { rowClass: (r) => (r.predictor === "graph" ? "ours" : null) })(rows);
}

function askedTable(table, points, predictors) {
  const figure = (name, key) => ({ name, value: (r) => r[key], show: (r) => num(r[key]) });
  makeTable(table, "Edits that were asked for: change of the loss, nats per token", [
    { name: "edit", text: true, head: true, value: (r) => r.edit, show: (r) => plain(r.edit) },
    figure("true", "true"), ...predictors.map(([key, name]) => figure(name, key)),
  ], {})(points);
}

export function editsPart(facts) {
  const wrap = el("div", { class: "plot-wrap", id: "edits-plot" }), table = el("div", { class: "scroll" });
  const told_ = PREDICTORS.filter(([key]) => facts.points.some((p) => known(p[key])));
  const buttons = told_.map(([key, name]) => el("button", { type: "button", class: "port", onclick: () => show(key) }, name));
  function show(key) {
    told_.forEach(([other], i) => buttons[i].setAttribute("aria-pressed", String(other === key)));
    wrap.replaceChildren(editsPlot(facts.points, key, told_.find(([other]) => other === key)[1]));
  }
  buttons.forEach((button) => button.style.setProperty("--p", "var(--accent)"));
  if (told_.length) show(told_[0][0]);
  if (facts.rows.length) calledTable(table, facts.rows);
  const asked = facts.points.filter((p) => isAsked(p.size)), list = el("div", { class: "scroll" });
  if (asked.length) askedTable(list, asked, told_);
  return [el("div", { class: "controls", role: "group", "aria-label": "Predicted by" }, "predicted by ", el("span", { class: "ports" }, buttons)), wrap, ...[facts.rows.length && table, asked.length && list].filter(Boolean)];
}
