// The layered graph: edges on a canvas, because there may be ten thousand; nodes as SVG, because they are few.
import { outOfRange, paint } from "./canvas.js";
import { curve, edgeNear, widthFor, widthOf } from "./curves.js";
import { countAbove, data, edgesIn, edgesOut, heaviest, isHead, kept, kinds, nats, nodeName, portColour, ports, score, totalNats, unit, weight } from "./data.js";
import { dimensionTip, inPairs, openNodes, pairStrokes } from "./dimensions.js";
import { $, colour, el, svg } from "./dom.js";
import { count, known, num, percent, plain, short } from "./format.js";
import { layOut, neighbour } from "./layout.js";
import { hideTip, showTip } from "./tip.js";
import { change, fromSlider, onChange, toSlider, view, writeAddress } from "./view.js";

const ALWAYS_SHOWN = 12, MANY = 300, TRACES = 600;
let plan = null, items = [], hot = null, veil = null, rings = null;

// ---- edges ----
// what is drawn, the strongest first: all edges above the threshold, or the chosen node's own
function shown() {
  const visible = (edge) => view.ports.has(edge.port);
  if (view.node === null) return kept.slice(0, countAbove(view.least)).filter(visible);
  const own = [...edgesIn[view.node], ...edgesOut[view.node]].filter(visible).sort((a, b) => weight(b) - weight(a));
  const above = own.filter((edge) => weight(edge) >= view.least).length;
  return own.slice(0, Math.max(above, ALWAYS_SHOWN));
}
function strokeOf(edge, density, hue) {
  const near = view.node !== null, share = Math.sqrt(Math.min(1, weight(edge) / heaviest));
  const alpha = Math.min(0.9, (0.3 + 0.25 * density) * density + 0.75 * share + (near ? 0.2 : 0));
  return { line: curve(plan, edge), alpha, width: widthOf(edge) + (near ? 0.5 : 0), colour: hue };
}
// colours by what they are for, looked up once for each theme: asking for them makes the browser work out all styles
let hues = null;
function coloursNow() {
  hues ??= new Map([...ports.map((port) => [port, colour(portColour(port))]), ["up", colour("--accent")], ["down", colour("--k")], ["faint", colour("--faint")]]);
  return hues;
}
function drawEdges() {
  const edges = shown(), opened = openNodes(plan, items, edges), tints = coloursNow();
  // few edges may stand out; many must let each other through
  const density = view.node === null ? Math.min(1, 14 / Math.sqrt(edges.length + 1)) : 1;
  // the other edges stay as a trace, so that the chosen node is seen in its place
  const traces = view.node === null ? [] : kept.slice(0, Math.min(TRACES, countAbove(view.least)));
  const strokesOf = (place) => (place < edges.length
    ? pairStrokes(plan, edges[place], opened, tints) ?? [strokeOf(edges[place], density, tints.get(edges[place].port))]
    : [{ line: curve(plan, traces[place - edges.length]), alpha: 0.16, width: 0.8, colour: tints.get("faint") }]);
  paint(plan.width, plan.height, edges.length + traces.length, strokesOf);
  return edges;
}

// ---- nodes ----
function nodeItem(node, i, top) {
  const { x, y, w, h, label } = plan.places[i];
  const item = svg("g", { class: `node ${isHead(node) ? "head" : plain(node.kind)}`, tabindex: "-1", role: "button", "data-node": i, "aria-label": nodeName(i), "aria-pressed": "false" },
    svg("rect", { x: x - w / 2, y: y - h / 2, width: w, height: h, rx: isHead(node) ? h / 2 : 5 }), label && svg("text", { x, y, dy: "0.34em" }, label));
  item.style.setProperty("--heat", heat(i, top));
  return item;
}
const heat = (i, top) => `${known(score(i)) && top > 0 ? Math.round(46 * Math.sqrt(Math.max(0, score(i)) / top)) : 0}%`;
const hottest = () => Math.max(0, ...data.nodes.map((_, i) => score(i) ?? 0));
function heatNodes() {
  const top = hottest();
  items.forEach((item, i) => item.style.setProperty("--heat", heat(i, top)));
}
function drawNodes() {
  plan = layOut(data.nodes, Math.max(420, Math.floor($("stage").clientWidth)));
  const root = $("nodes"), top = hottest();
  for (const [key, value] of [["viewBox", `0 0 ${plan.width} ${plan.height}`], ["width", plan.width], ["height", plan.height]]) root.setAttribute(key, value);
  items = data.nodes.map((node, i) => nodeItem(node, i, top));
  hot = svg("path", { class: "hot", visibility: "hidden" });
  const bands = plan.bands.flatMap((band, b) => [
    svg("rect", { class: b % 2 ? "band odd" : "band", x: 0, y: band.top, width: plan.width, height: band.bottom - band.top }),
    svg("text", { class: "band-name", x: 12, y: (band.top + band.bottom) / 2, dy: "0.34em" }, band.name),
  ]);
  // bands lie under the canvas: they are drawn as its background, in an SVG of their own
  for (const old of $("stage").querySelectorAll(".bands, .marks")) old.remove();
  veil = svg("path", { class: "veil" });
  rings = svg("path", { class: "rings" });
  $("stage").append(svg("svg", { class: "marks", viewBox: `0 0 ${plan.width} ${plan.height}`, width: plan.width, height: plan.height, "aria-hidden": "true" }, veil, rings));
  $("stage").prepend(svg("svg", { class: "bands", viewBox: `0 0 ${plan.width} ${plan.height}`, width: plan.width, height: plan.height, "aria-hidden": "true" }, bands));
  root.replaceChildren(hot, ...items);
}

// ---- bringing the picture up to date, at most once a frame ----
let asked = false, edgesAsked = false, marked = true, drawn = [];
export function redraw(part) {
  // without a part it is the theme or the size that changed
  if (!part) hues = null;
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
  if (marked || found || view.node !== null || items.includes(document.activeElement)) markNodes(found, linked);
  marked = Boolean(found) || view.node !== null;
  const part = edges.reduce((sum, edge) => sum + weight(edge), 0);
  const whose = view.node === null ? "edges" : `edges of ${nodeName(view.node)}`, of = view.node === null ? ` of ${count(kept.length)}` : "";
  if (view.zoom !== "modules") $("shown").textContent = found && found.size !== 1 ? `${count(found.size)} nodes found` : `${count(edges.length)}${of} ${whose}, ${percent(totalNats ? part / totalNats : 0)} of all nats`;
  hot.setAttribute("visibility", "hidden");
}
// among many nodes, those that fade are covered and those found are ringed by one path each, on a layer of its own
function markNodes(found, linked) {
  const many = items.length > MANY, faded = (i) => (found ? !found.has(i) : view.node !== null && i !== view.node && !linked.has(i));
  const boxes = (which) => plan.places.flatMap(({ x, y, w, h }, i) => (which(i) ? [`M${(x - w / 2 - 1).toFixed(1)} ${y - h / 2 - 1}h${(w + 2).toFixed(1)}v${h + 2}h${(-w - 2).toFixed(1)}z`] : [])).join("");
  if (many) {
    veil.setAttribute("d", boxes(faded));
    rings.setAttribute("d", found ? boxes((i) => found.has(i)) : "");
  }
  const reached = view.node ?? (items.includes(document.activeElement) ? items.indexOf(document.activeElement) : 0);
  items.forEach((item, i) => {
    item.classList.toggle("chosen", i === view.node);
    if (!many) {
      item.classList.toggle("found", Boolean(found?.has(i)));
      item.classList.toggle("faded", faded(i));
    }
    for (const [key, value] of [["aria-pressed", String(i === view.node)], ["tabindex", i === reached ? "0" : "-1"]]) if (item.getAttribute(key) !== value) item.setAttribute(key, value);
  });
}
function showThreshold() {
  const text = view.least > 0 ? `${num(view.least)} nats` : "0 nats";
  $("threshold").value = toSlider(view.least);
  $("threshold").setAttribute("aria-valuetext", text);
  $("threshold-text").textContent = text;
}

// ---- pointing ----
function mark(edge) {
  hot.setAttribute("visibility", edge ? "visible" : "hidden");
  if (!edge) return;
  const [x0, y0, ...rest] = curve(plan, edge);
  hot.setAttribute("d", `M${x0} ${y0} C${rest.join(" ")}`);
  hot.style.stroke = `var(${portColour(edge.port)})`;
  hot.style.strokeWidth = `${widthOf(edge) + 1.5}px`;
}
function point(event) {
  const over = event.target.closest(".node"), box = $("nodes").getBoundingClientRect();
  if (over) {
    const i = Number(over.dataset.node);
    mark(null);
    return showTip(dimensionTip(event.target, i) ?? nodeTip(i), event.clientX, event.clientY);
  }
  const edge = edgeNear(plan, drawn, event.clientX - box.left, event.clientY - box.top);
  mark(edge);
  if (!edge) return hideTip();
  const told = view.kind === null ? `${num(edge.nats)} ± ${num(edge.se, 2)} nats per ${unit}, ${edge.measured ? "measured" : "estimated"}` : `${num(nats(edge))} nats per ${unit} on ${plain(kinds[view.kind].name)}\n${num(edge.nats)} on all data`;
  showTip(`${nodeName(edge.src)} → ${nodeName(edge.dst)}.${plain(edge.port)}\n${told}${view.zoom === "dimensions" && edge.pairs ? `\n${inPairs(edge)}` : ""}`, event.clientX, event.clientY);
}
function nodeTip(i) {
  const { score_nats: all, score_se: error } = data.nodes[i], name = nodeName(i);
  if (view.kind !== null && known(score(i))) return `${name}\n${num(score(i))} nats per ${unit} on ${plain(kinds[view.kind].name)}${known(all) ? `\n${num(all)} on all data` : ""}`;
  return name + (known(all) ? `\n${num(all)} ± ${num(error, 2)} nats per ${unit}` : "");
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
  $("widths").replaceChildren("width: ", ...samples.flatMap((worth) => {
    const sample = svg("svg", { width: 26, height: 10, "aria-hidden": "true" }, svg("line", { x1: 1, x2: 25, y1: 5, y2: 5, "stroke-width": widthFor(worth) }));
    return [sample, el("span", {}, num(worth, 2))];
  }), ` nats per ${unit} · shade: nats of the node`);
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
  document.addEventListener("scroll", () => { if (outOfRange(plan.height)) redraw(); }, { passive: true });
  new ResizeObserver(() => {
    if (Math.abs($("stage").clientWidth - plan.width) < 1) return;
    drawNodes();
    redraw();
  }).observe($("stage"));
  onChange((part) => {
    if ("least" in part) showThreshold();
    if ("node" in part || "kind" in part || "zoom" in part) writeAddress();
    if ("kind" in part) { heatNodes(); widthLegend(); }
    redraw(part);
  });
}
