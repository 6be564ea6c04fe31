// The layered graph: edges on a canvas, because there may be ten thousand; nodes as SVG, because they are few.
import { countAbove, data, edgesIn, edgesOut, heaviest, isHead, kept, nodeName, portColour, ports, totalNats, weight } from "./data.js";
import { $, colour, el, svg } from "./dom.js";
import { count, known, num, percent, plain, short } from "./format.js";
import { layOut, neighbour } from "./layout.js";
import { hideTip, showTip } from "./tip.js";
import { change, fromSlider, onChange, toSlider, view, writeAddress } from "./view.js";

const ALWAYS_SHOWN = 12, NEAR = 7, MANY = 300;
// one edge that outweighs the rest may be wide; many of like weight must leave room for each other
const WIDEST = Math.max(3, Math.min(8, 8 * Math.sqrt(12 / Math.max(1, kept.slice(0, 200).reduce((sum, edge) => sum + weight(edge) / heaviest, 0)))));
let plan = null, items = [], hot = null;

// ---- edges as curves ----
const widthOf = (edge) => 0.4 + WIDEST * Math.sqrt(weight(edge) / heaviest);
// where an edge meets a node: q, k and v side by side on a head, and along a wide node towards the other end
const SPREAD = { q: -0.3, k: 0, v: 0.3 };
function meet(place, other) {
  const reach = (place.w > 100 ? 0.47 : 0.26) * place.w, wanted = (1.4 * place.w * (other.x - place.x)) / plan.width;
  return place.x + Math.max(-reach, Math.min(reach, wanted));
}
function ends(edge) {
  const a = plan.places[edge.src], b = plan.places[edge.dst];
  return [meet(a, b), a.y - a.h / 2, edge.port in SPREAD ? b.x + SPREAD[edge.port] * b.w : meet(b, a), b.y + b.h / 2];
}
// an edge straight up would run behind the nodes between its ends: it bows out, the further the longer it is
function bow(edge) {
  const a = plan.places[edge.src], b = plan.places[edge.dst];
  return Math.abs(a.x - b.x) < 24 && b.row - a.row > 1 ? 26 + (100 * (b.row - a.row)) / plan.rows.length : 0;
}
function curve(edge) {
  const [x0, y0, x1, y1] = ends(edge), middle = (y0 + y1) / 2, out = bow(edge);
  return [x0, y0, x0 + out, middle, x1 + out, middle, x1, y1];
}
// the curve's parameter at each share of the way up
const WHEN = Array.from({ length: 257 }, (_, k) => {
  let low = 0, high = 1;
  for (let step = 0; step < 24; step++) {
    const t = (low + high) / 2;
    if (t ** 3 + 1.5 * t * (1 - t) < k / 256) low = t;
    else high = t;
  }
  return low;
});

// what is drawn, the strongest first: all edges above the threshold, or the chosen node's own
function shown() {
  const visible = (edge) => view.ports.has(edge.port);
  if (view.node === null) return kept.slice(0, countAbove(view.least)).filter(visible);
  const own = [...edgesIn[view.node], ...edgesOut[view.node]].filter(visible).sort((a, b) => weight(b) - weight(a));
  const above = own.filter((edge) => weight(edge) >= view.least).length;
  return own.slice(0, Math.max(above, ALWAYS_SHOWN));
}

function stroke(pen, edge) {
  const [x0, y0, ...rest] = curve(edge);
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.bezierCurveTo(...rest);
  pen.stroke();
}
// A frame holds so many curves; the rest follow on the next ones. The strongest come first and every other is painted
// beneath what is there: as if the weakest had been painted first, without waiting for them.
const A_FRAME = 250;
let painting = 0;
function drawEdges() {
  const canvas = $("edges"), ratio = Math.min(devicePixelRatio || 1, 2), pen = canvas.getContext("2d");
  if (canvas.width !== Math.round(plan.width * ratio) || canvas.height !== Math.round(plan.height * ratio)) {
    canvas.width = Math.round(plan.width * ratio);
    canvas.height = Math.round(plan.height * ratio);
  }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.globalCompositeOperation = "destination-over";
  pen.clearRect(0, 0, plan.width, plan.height);
  const hues = new Map(ports.map((port) => [port, colour(portColour(port))])), edges = shown(), mine = ++painting;
  // few edges may stand out; many must let each other through
  const density = view.node === null ? Math.min(1, 14 / Math.sqrt(edges.length + 1)) : 1;
  const part = (from) => {
    if (mine !== painting) return;
    for (const edge of edges.slice(from, from + A_FRAME)) {
      const share = Math.sqrt(weight(edge) / heaviest);
      pen.globalAlpha = Math.min(0.9, (0.3 + 0.25 * density) * density + 0.75 * share + (view.node === null ? 0 : 0.2));
      pen.lineWidth = widthOf(edge) + (view.node === null ? 0 : 0.5);
      pen.strokeStyle = hues.get(edge.port);
      stroke(pen, edge);
    }
    if (from + A_FRAME < edges.length) requestAnimationFrame(() => part(from + A_FRAME));
    else if (view.node !== null) drawRest(pen);
  };
  part(0);
  return edges;
}
// the other edges stay as a trace, so that the node is seen in its place
function drawRest(pen) {
  pen.globalAlpha = 0.16;
  pen.strokeStyle = colour("--faint");
  pen.lineWidth = 0.8;
  for (const edge of kept.slice(0, Math.min(600, countAbove(view.least)))) stroke(pen, edge);
}

// ---- nodes ----
function nodeItem(node, i, top) {
  const { x, y, w, h, label } = plan.places[i];
  const item = svg("g", { class: `node ${isHead(node) ? "head" : plain(node.kind)}`, tabindex: "-1", role: "button", "data-node": i, "aria-label": nodeName(i), "aria-pressed": "false" },
    svg("rect", { x: x - w / 2, y: y - h / 2, width: w, height: h, rx: isHead(node) ? h / 2 : 5 }), label && svg("text", { x, y, dy: "0.34em" }, label));
  item.style.setProperty("--heat", `${known(node.score_nats) && top > 0 ? Math.round(46 * Math.sqrt(Math.max(0, node.score_nats) / top)) : 0}%`);
  return item;
}
function drawNodes() {
  plan = layOut(data.nodes, Math.max(420, Math.floor($("stage").clientWidth)));
  const root = $("nodes"), top = Math.max(0, ...data.nodes.map((node) => node.score_nats ?? 0));
  for (const [key, value] of [["viewBox", `0 0 ${plan.width} ${plan.height}`], ["width", plan.width], ["height", plan.height]]) root.setAttribute(key, value);
  $("edges").style.width = `${plan.width}px`;
  $("edges").style.height = `${plan.height}px`;
  items = data.nodes.map((node, i) => nodeItem(node, i, top));
  hot = svg("path", { class: "hot", visibility: "hidden" });
  const bands = plan.bands.flatMap((band, b) => [
    svg("rect", { class: b % 2 ? "band odd" : "band", x: 0, y: band.top, width: plan.width, height: band.bottom - band.top }),
    svg("text", { class: "band-name", x: 12, y: (band.top + band.bottom) / 2, dy: "0.34em" }, band.name),
  ]);
  // bands lie under the canvas: they are drawn as its background, in an SVG of their own
  $("stage").querySelector(".bands")?.remove();
  $("stage").prepend(svg("svg", { class: "bands", viewBox: `0 0 ${plan.width} ${plan.height}`, width: plan.width, height: plan.height, "aria-hidden": "true" }, bands));
  root.classList.toggle("many", items.length > MANY);
  root.replaceChildren(hot, ...items);
}

// ---- bringing the picture up to date, at most once a frame ----
let asked = false, edgesAsked = false, drawn = [];
export function redraw(part) {
  // a search marks nodes and leaves the edges as they are
  edgesAsked ||= !(part && Object.keys(part).every((name) => name === "find"));
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; update(); });
}
const drag = () => change({ least: fromSlider(Number($("threshold").value)) });
function matches() {
  const wanted = view.find.trim().toLowerCase();
  return wanted ? new Set(data.nodes.flatMap((node, i) => (node.name.toLowerCase().includes(wanted) || short(node.name).includes(wanted) ? [i] : []))) : null;
}
function update() {
  if (edgesAsked) drawn = drawEdges();
  edgesAsked = false;
  const edges = drawn, found = matches();
  const linked = new Set(view.node === null ? [] : edges.flatMap((edge) => [edge.src, edge.dst]));
  const reached = view.node ?? (items.includes(document.activeElement) ? items.indexOf(document.activeElement) : 0);
  items.forEach((item, i) => {
    item.classList.toggle("chosen", i === view.node);
    item.classList.toggle("found", Boolean(found?.has(i)));
    item.classList.toggle("faded", found ? !found.has(i) : view.node !== null && i !== view.node && !linked.has(i));
    for (const [key, value] of [["aria-pressed", String(i === view.node)], ["tabindex", i === reached ? "0" : "-1"]]) if (item.getAttribute(key) !== value) item.setAttribute(key, value);
  });
  const part = edges.reduce((sum, edge) => sum + weight(edge), 0);
  const whose = view.node === null ? "edges" : `edges of ${nodeName(view.node)}`, of = view.node === null ? ` of ${count(kept.length)}` : "";
  $("shown").textContent = found && found.size !== 1 ? `${count(found.size)} nodes found` : `${count(edges.length)}${of} ${whose}, ${percent(totalNats ? part / totalNats : 0)} of all nats`;
  hot.setAttribute("visibility", "hidden");
}
function showThreshold() {
  const text = view.least > 0 ? `${num(view.least)} nats` : "0 nats";
  $("threshold").value = toSlider(view.least);
  $("threshold").setAttribute("aria-valuetext", text);
  $("threshold-text").textContent = text;
}

// ---- pointing ----
function edgeAt(px, py) {
  let best = null, least = Infinity;
  for (const edge of shown()) {
    const [x0, y0, x1, y1] = ends(edge);
    if (py > Math.max(y0, y1) || py < Math.min(y0, y1) || y0 === y1) continue;
    const t = WHEN[Math.round((256 * (y0 - py)) / (y0 - y1))];
    const x = x0 + (x1 - x0) * t * t * (3 - 2 * t) + 3 * bow(edge) * t * (1 - t);
    const far = Math.max(0, Math.abs(x - px) - widthOf(edge) / 2);
    if (far < NEAR && far < least) { least = far; best = edge; }
  }
  return best;
}
function mark(edge) {
  hot.setAttribute("visibility", edge ? "visible" : "hidden");
  if (!edge) return;
  const [x0, y0, ...rest] = curve(edge);
  hot.setAttribute("d", `M${x0} ${y0} C${rest.join(" ")}`);
  hot.style.stroke = `var(${portColour(edge.port)})`;
  hot.style.strokeWidth = `${widthOf(edge) + 1.5}px`;
}
function point(event) {
  const over = event.target.closest(".node"), box = $("nodes").getBoundingClientRect();
  if (over) {
    const node = data.nodes[Number(over.dataset.node)];
    mark(null);
    return showTip(plain(node.name) + (known(node.score_nats) ? `\n${num(node.score_nats)} ± ${num(node.score_se, 2)} nats per token` : ""), event.clientX, event.clientY);
  }
  const edge = edgeAt(event.clientX - box.left, event.clientY - box.top);
  mark(edge);
  if (!edge) return hideTip();
  showTip(`${nodeName(edge.src)} → ${nodeName(edge.dst)}.${plain(edge.port)}\n${num(edge.nats)} ± ${num(edge.se, 2)} nats per token, ${edge.measured ? "measured" : "estimated"}`, event.clientX, event.clientY);
}

// ---- keys ----
function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const field = event.target.matches("input, textarea, select"), on = event.target.closest(".node");
  if (event.key === "Escape") {
    $("search").value = "";
    if (field) event.target.blur();
    const left = view.node;
    change({ node: null, find: "" });
    if (left !== null && !field) items[left].focus({ preventScroll: true });
  } else if (event.key === "/" && !field) {
    event.preventDefault();
    $("search").focus();
  } else if (event.key.startsWith("Arrow") && !field && (on || view.node !== null)) {
    event.preventDefault();
    go(neighbour(plan, on ? Number(on.dataset.node) : view.node, event.key));
  } else if ((event.key === "Enter" || event.key === " ") && on) {
    event.preventDefault();
    change({ node: Number(on.dataset.node) });
  }
}
export function go(i) {
  change({ node: i });
  items[i].focus({ preventScroll: true });
}

// ---- controls ----
function portButtons() {
  for (const port of ports) {
    const button = el("button", { type: "button", class: "port", "aria-pressed": "true", "data-tip": { q: "queries", k: "keys", v: "values", in: "inputs of MLPs and of the output" }[port],
      onclick: () => {
        const next = new Set(view.ports);
        if (!next.delete(port)) next.add(port);
        button.setAttribute("aria-pressed", String(next.has(port)));
        change({ ports: next });
      } }, plain(port));
    button.style.setProperty("--p", `var(${portColour(port)})`);
    $("ports").append(button);
  }
}
function widthLegend() {
  const samples = [1, 0.1, 0.01].map((share) => share * heaviest);
  $("widths").replaceChildren("width: ", ...samples.flatMap((nats) => {
    const sample = svg("svg", { width: 26, height: 10, "aria-hidden": "true" }, svg("line", { x1: 1, x2: 25, y1: 5, y2: 5, "stroke-width": widthOf({ nats }) }));
    return [sample, el("span", {}, `${num(nats, 2)}`)];
  }), " nats per token · shade: nats of the node");
}
function find(event) {
  if (event.key !== "Enter") return;
  const found = [...(matches() ?? [])];
  if (found.length) change({ node: found[(found.indexOf(view.node) + 1) % found.length], find: "" });
}
export function startGraph() {
  portButtons();
  widthLegend();
  drawNodes();
  $("threshold").addEventListener("input", drag);
  $("threshold").addEventListener("change", writeAddress);
  $("search").addEventListener("input", () => change({ find: $("search").value }));
  $("search").addEventListener("keydown", find);
  $("nodes").addEventListener("click", (event) => change({ node: event.target.closest(".node") ? Number(event.target.closest(".node").dataset.node) : null }));
  $("nodes").addEventListener("pointermove", point);
  $("nodes").addEventListener("pointerleave", () => { mark(null); hideTip(); });
  $("nodes").setAttribute("data-own-tip", "");
  document.addEventListener("keydown", keys);
  new ResizeObserver(() => {
    if (Math.abs($("stage").clientWidth - plan.width) < 1) return;
    drawNodes();
    redraw();
  }).observe($("stage"));
  onChange((part) => {
    if ("least" in part) showThreshold();
    if ("node" in part) writeAddress();
    redraw(part);
  });
}
