// Rate and distortion: divergence (log scale) against size, one line per method, with intervals.
import { data, graphs, ofEdges, unit } from "./data.js";
import { $, el, svg } from "./dom.js";
import { known, num, percent, plain, power } from "./format.js";
import { makeTable } from "./table.js";
import { hideTip, showTip } from "./tip.js";

export const PLOT = { width: 1000, height: 400, left: 74, right: 236, top: 14, bottom: 50 };
const HUES = ["--accent", "--hue-1", "--hue-2", "--hue-3", "--hue-4", "--hue-5"];
// shapes tell the lines apart where colour cannot
const SHAPES = [
  (x, y, r) => `M${x - r} ${y} a${r} ${r} 0 1 0 ${2 * r} 0 a${r} ${r} 0 1 0 ${-2 * r} 0 z`,
  (x, y, r) => `M${x - r} ${y - r} h${2 * r} v${2 * r} h${-2 * r} z`,
  (x, y, r) => `M${x} ${y - r * 1.35} L${x + r * 1.35} ${y} L${x} ${y + r * 1.35} L${x - r * 1.35} ${y} z`,
  (x, y, r) => `M${x} ${y - r * 1.2} L${x + r * 1.2} ${y + r} H${x - r * 1.2} z`,
  (x, y, r) => `M${x} ${y + r * 1.2} L${x + r * 1.2} ${y - r} H${x - r * 1.2} z`,
];

function series() {
  let baselines = 0;
  return data.rate_distortion.map((curve, i) => {
    const baseline = curve.baseline ?? i > 0;
    const index = baseline ? 1 + (baselines++ % (HUES.length - 1)) : 0;
    const points = curve.points.filter((p) => known(p.kl_nats) && known(p.size)).sort((a, b) => a.size - b.size);
    return { name: plain(curve.name), baseline, points, hue: `var(${HUES[index]})`, shape: SHAPES[index % SHAPES.length] };
  }).filter((curve) => curve.points.length);
}

function scales(lines, marked) {
  const points = [...lines.flatMap((line) => line.points), ...marked.map((row) => ({ size: row.size, kl_nats: row.kl_nats.value }))];
  const most = Math.max(...points.map((p) => p.kl_nats), 1e-9);
  // six decades below the largest a divergence is as good as none, and rounding takes over
  const floor = most * 1e-6;
  const least = Math.max(floor, Math.min(...points.map((p) => (p.kl_nats > 0 ? p.kl_nats : Infinity)), most));
  const low = Math.log10(least) - 0.12, high = Math.log10(most) + 0.12;
  const sizes = points.map((p) => p.size), spread = Math.max(...sizes) - Math.min(...sizes);
  const left = Math.min(...sizes) - 0.05 * (spread || 1), right = Math.max(...sizes) + 0.05 * (spread || 1);
  const x = (size) => PLOT.left + ((PLOT.width - PLOT.left - PLOT.right) * (size - left)) / (right - left);
  const y = (nats) => PLOT.top + ((PLOT.height - PLOT.top - PLOT.bottom) * (high - Math.max(Math.log10(Math.max(nats, floor)), low))) / (high - low);
  return { x, y, left, right, low, high, clipped: (nats) => nats < 10 ** low };
}

function ticks({ low, high, left, right }) {
  const across = [], up = [];
  const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].find((s) => (right - left) / s <= 9) ?? 1;
  for (let k = Math.ceil(left / step); k * step <= right; k++) across.push(k * step);
  const heads = high - low < 2.8 ? [1, 2, 5] : [1], skip = Math.ceil((high - low) / 8);
  for (let e = Math.floor(low); e <= high; e++) {
    for (const head of heads) if ((e % skip === 0) && Math.log10(head) + e >= low && Math.log10(head) + e <= high) up.push([head, e]);
  }
  return { across, up };
}
const tickText = (head, e) => (e >= -3 && e <= 3 ? String(Number((head * 10 ** e).toPrecision(1))) : (head === 1 ? "" : `${head}×`) + power(e));

function axes(scale) {
  const { across, up } = ticks(scale), { x, y } = scale;
  const bottom = PLOT.height - PLOT.bottom, end = PLOT.width - PLOT.right, middle = (PLOT.top + bottom) / 2;
  return [
    ...up.flatMap(([head, e]) => [
      svg("line", { class: "grid", x1: PLOT.left, x2: end, y1: y(head * 10 ** e), y2: y(head * 10 ** e) }),
      svg("text", { class: "tick", x: PLOT.left - 10, y: y(head * 10 ** e), dy: "0.32em", "text-anchor": "end" }, tickText(head, e)),
    ]),
    ...across.flatMap((size) => [
      svg("line", { class: "axis", x1: x(size), x2: x(size), y1: bottom, y2: bottom + 5 }),
      svg("text", { class: "tick", x: x(size), y: bottom + 21, "text-anchor": "middle" }, percent(size, 0)),
    ]),
    svg("line", { class: "axis", x1: PLOT.left, x2: end, y1: bottom, y2: bottom }),
    svg("text", { class: "axis-name", x: (PLOT.left + end) / 2, y: PLOT.height - 6, "text-anchor": "middle" }, ofEdges ? "share of the edges kept" : "share of the channels’ numbers stored"),
    svg("text", { class: "axis-name", x: 16, y: middle, "text-anchor": "middle", transform: `rotate(-90 16 ${middle})` }, `KL, nats per ${unit}`),
  ];
}

function drawLine(line, scale) {
  const { x, y } = scale;
  const path = line.points.map((p, i) => `${i ? "L" : "M"}${x(p.size).toFixed(1)} ${y(p.kl_nats).toFixed(1)}`).join("");
  const bars = line.points.filter((p) => known(p.low) && known(p.high))
    .map((p) => svg("path", { class: "error", d: `M${x(p.size)} ${y(p.low)} V${y(p.high)} m-4 0 h8 M${x(p.size) - 4} ${y(p.low)} h8` }));
  const marks = line.points.map((p) => svg("path", { class: scale.clipped(p.kl_nats) ? "point clipped" : "point", d: line.shape(x(p.size), y(p.kl_nats), line.baseline ? 3.6 : 4.6) }));
  const group = svg("g", { class: line.baseline ? "line baseline" : "line" }, svg("path", { class: "curve", d: path }), bars, marks);
  group.style.setProperty("--hue", line.hue);
  return group;
}

// names at the lines' right ends, moved apart where they would overlap
function labels(lines, scale) {
  const end = PLOT.width - PLOT.right, gap = 20;
  const wanted = lines.map((line) => ({ line, from: scale.y(line.points.at(-1).kl_nats), at: scale.x(line.points.at(-1).size) })).sort((a, b) => a.from - b.from);
  let last = -Infinity;
  for (const label of wanted) { label.y = Math.max(label.from, last + gap); last = label.y; }
  const over = Math.max(0, last - (PLOT.height - PLOT.bottom));
  return wanted.map(({ line, from, at, y }) => {
    const group = svg("g", { class: line.baseline ? "line baseline" : "line" },
      svg("path", { class: "leader", d: `M${at + 9} ${from} L${end + 12} ${y - over} h6` }),
      svg("path", { class: "point", d: line.shape(end + 28, y - over, 4) }),
      svg("text", { class: "label", x: end + 40, y: y - over, dy: "0.34em" }, line.name.length > 28 ? `${line.name.slice(0, 27)}…` : line.name));
    group.style.setProperty("--hue", line.hue);
    return group;
  });
}

export function hover(root, spots) {
  const ring = svg("circle", { class: "ring", r: 9, visibility: "hidden" });
  root.append(ring);
  const leave = () => { ring.setAttribute("visibility", "hidden"); hideTip(); };
  root.addEventListener("pointerleave", leave);
  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect(), unit = PLOT.width / box.width;
    const px = (event.clientX - box.left) * unit, py = (event.clientY - box.top) * unit;
    const near = spots.reduce((best, spot) => (Math.hypot(spot.x - px, spot.y - py) < Math.hypot(best.x - px, best.y - py) ? spot : best));
    if (Math.hypot(near.x - px, near.y - py) > 40) return leave();
    ring.setAttribute("cx", near.x);
    ring.setAttribute("cy", near.y);
    ring.setAttribute("visibility", "visible");
    showTip(near.text, event.clientX, event.clientY);
  });
}
const told = (name, size, kl, low, high) => `${name}\n${percent(size)} ${ofEdges ? "kept" : "stored"}: ${num(kl)} nats per ${unit}` + (known(low) && known(high) && low !== high ? `\n95% interval ${num(low)} to ${num(high)}` : "");

export function startCurve() {
  const lines = series();
  if (!lines.length) { $("rate").replaceChildren(el("p", { class: "note" }, "No curve was measured.")); return; }
  if (ofEdges) $("rate-note").textContent = "Divergence from the model on held-out prompts against the share of edges kept: the largest of several rankings, the others at their replacement. Lower and further left is better.";
  const marked = graphs.filter((row) => known(row.size) && known(row.kl_nats.value));
  const scale = scales(lines, marked);
  const spots = lines.flatMap((line) => line.points.map((p) => ({ x: scale.x(p.size), y: scale.y(p.kl_nats), text: told(line.name, p.size, p.kl_nats, p.low, p.high) })));
  const stars = marked.map((row) => {
    const spot = { x: scale.x(row.size), y: scale.y(row.kl_nats.value) };
    spots.push({ ...spot, text: told(plain(row.name), row.size, row.kl_nats.value, row.kl_nats.low, row.kl_nats.high) });
    const cramped = spot.x < PLOT.left + 90; // the axis is in the way on the left
    return svg("g", { class: "this" }, svg("circle", { cx: spot.x, cy: spot.y, r: 8.5 }), svg("text", { x: spot.x + (cramped ? 14 : -14), y: spot.y + 20, "text-anchor": cramped ? "start" : "end" }, plain(row.name)));
  });
  const root = svg("svg", { viewBox: `0 0 ${PLOT.width} ${PLOT.height}`, class: "plot", role: "img", "aria-labelledby": "rate-title rate-desc" },
    svg("title", { id: "rate-title" }, "Rate and distortion"),
    svg("desc", { id: "rate-desc" }, lines.map((line) => `${line.name}: ` + line.points.map((p) => `${num(p.kl_nats)} nats at ${percent(p.size, 0)}`).join(", ")).join(". ")),
    axes(scale), lines.toReversed().map((line) => drawLine(line, scale)), labels(lines, scale), stars);
  hover(root, spots);
  const place = el("div", { class: "scroll" });
  makeTable(place, "Divergence at each size", [
    { name: "method", text: true, value: (r) => r.line.name, show: (r) => r.line.name },
    { name: "size", value: (r) => r.point.size, show: (r) => percent(r.point.size) },
    { name: "KL, nats", value: (r) => r.point.kl_nats, show: (r) => num(r.point.kl_nats) },
    { name: "95% interval", value: (r) => r.point.low, show: (r) => `${num(r.point.low)} – ${num(r.point.high)}` },
  ])(lines.flatMap((line) => line.points.map((point) => ({ line, point }))));
  $("rate").replaceChildren(el("div", { class: "plot-wrap" }, root), el("details", {}, el("summary", {}, "The figures as a table"), place));
}
