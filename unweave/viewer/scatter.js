// Attributed against measured effects of single edges, both on a log scale: a prediction that could have failed.
import { PLOT, hover } from "./curve.js";
import { data, unit } from "./data.js";
import { $, el, svg } from "./dom.js";
import { known, num, plain, power } from "./format.js";

const LOG_SPAN = 7;
const SIDE = { left: 90, right: 560, top: 14, bottom: 350 };

function spanOf(points) {
  const values = points.flatMap((p) => [p.attributed, p.measured]).filter((v) => v > 0);
  const high = Math.ceil(Math.log10(Math.max(...values, 1e-9)));
  const low = Math.max(high - LOG_SPAN, Math.floor(Math.log10(Math.min(...values, 10 ** high / 10))));
  return { low, high };
}

function backdrop({ low, high }, along, up) {
  return Array.from({ length: high - low + 1 }, (_, i) => low + i).flatMap((e) => [
    svg("line", { class: "grid", x1: SIDE.left, x2: SIDE.right, y1: up(10 ** e), y2: up(10 ** e) }),
    svg("text", { class: "tick", x: SIDE.left - 10, y: up(10 ** e), dy: "0.32em", "text-anchor": "end" }, power(e)),
    svg("text", { class: "tick", x: along(10 ** e), y: SIDE.bottom + 21, "text-anchor": "middle" }, power(e)),
  ]);
}

function keyOf() {
  return ["in the circuit", "outside it"].map((name, i) => {
    const group = svg("g", { class: "line" }, svg("circle", { class: "point", cx: SIDE.right + 40, cy: 40 + 24 * i, r: 5 }), svg("text", { class: "label", x: SIDE.right + 54, y: 40 + 24 * i, dy: "0.34em" }, name));
    group.style.setProperty("--hue", i ? "var(--hue-1)" : "var(--accent)");
    return group;
  });
}

export function startScatter() {
  const points = (data.predictions ?? []).filter((p) => known(p.attributed) && known(p.measured));
  if (!points.some((p) => p.attributed > 0 && p.measured > 0)) return;
  const span = spanOf(points), floor = 10 ** span.low;
  const share = (v) => (Math.log10(Math.max(v, floor)) - span.low) / (span.high - span.low);
  const along = (v) => SIDE.left + share(v) * (SIDE.right - SIDE.left), up = (v) => SIDE.bottom - share(v) * (SIDE.bottom - SIDE.top);
  const spots = points.map((p) => ({ x: along(p.attributed), y: up(p.measured), text: `${plain(p.edge)}\nattributed ${num(p.attributed)}, measured ${num(p.measured)} nats per ${unit}` }));
  const marks = points.map((p, i) => {
    const mark = svg("circle", { class: "point", cx: spots[i].x, cy: spots[i].y, r: 3.6 });
    mark.style.setProperty("--hue", p.kept ? "var(--accent)" : "var(--hue-1)");
    return mark;
  });
  const root = svg("svg", { viewBox: `0 0 ${PLOT.width} ${PLOT.height}`, class: "plot", role: "img", "aria-label": "Attributed against measured effects of single edges" },
    backdrop(span, along, up),
    svg("line", { class: "axis", x1: along(floor), y1: up(floor), x2: along(10 ** span.high), y2: up(10 ** span.high) }),
    svg("text", { class: "axis-name", x: (SIDE.left + SIDE.right) / 2, y: SIDE.bottom + 44, "text-anchor": "middle" }, `attributed, nats per ${unit}`),
    svg("text", { class: "axis-name", x: 22, y: 180, "text-anchor": "middle", transform: "rotate(-90 22 180)" }, `measured, nats per ${unit}`),
    marks, keyOf());
  hover(root, spots);
  $("prediction").replaceChildren(
    el("p", { class: "note" }, "Each dot is one edge ablated alone, in the whole model, on held-out prompts. On the line, the attribution is right; values below the plot lie on its border."),
    el("div", { class: "plot-wrap" }, root));
}
