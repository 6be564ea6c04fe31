// Modules: the partitions of the nodes by number of blocks, the boxes of one of them, and what holds it to be more than chance.
import { bandWidth, blockName, blocksOf, layOutBands, layOutBlocks } from "./blocks.js";
import { data, graphs, nodeName } from "./data.js";
import { $, el, running, svg, token } from "./dom.js";
import { count, known, num, plain, short } from "./format.js";
import { go } from "./graph.js";
import { makeTable } from "./table.js";
import { interval } from "./tables.js";
import { hideTip, showTip } from "./tip.js";

const facts = data.modules, BANDS = 200;
const state = { place: 0, open: new Set(), blocks: [], plan: null };
const partitionAt = (k) => facts.hierarchy[k];
const kindOf = (place) => (facts.significant && place === facts.chosen ? "module" : "block");
const isMeasured = () => state.place === facts.measured;
const plural = (n, one) => `${count(n)} ${one}${n === 1 ? "" : "s"}`;
const idle = facts?.idle?.length ?? 0;
// idle nodes are a block that does not count
const nBlocks = (partition) => partition.labels.reduce((most, label) => Math.max(most, label), -1) + (idle ? 0 : 1);
const saying = (test) => test.statistic === "saved_bits";
const withInterval = (x) => (known(x?.value) ? `${num(x.value)} (${num(x.low)} to ${num(x.high)})` : "n/a");
const interfaceOf = new Map((facts?.interfaces ?? []).map((row) => [`${row.src} ${row.dst}`, row]));

// ---- in words ----
export function verdict() {
  const chosen = partitionAt(facts.chosen), n = nBlocks(chosen), trivial = n === 1 || n === chosen.labels.length - idle;
  const p = facts.tests.filter(saying).reduce((most, test) => Math.max(most, test.p ?? 0), 0);
  const tested = facts.tests.some(saying) ? ` (p = ${num(p, 2)})` : "; nothing was held against a null";
  const saved = num(partitionAt(0).bits - chosen.bits);
  const strong = (text) => el("strong", {}, text);
  if (trivial) return [strong("No modules are significant"), `: no partition describes the communication between the nodes of ${plain(data.model.name)} in fewer bits than none${tested}.`];
  if (facts.significant) return [`${plain(data.model.name)} has `, strong(`${n} modules`), `: describing its communication through them saves ${saved} bits, more than in networks without modules${tested}.`];
  return [strong("No modules are significant"), `: ${n} blocks save ${saved} bits, no more than in networks without modules${tested}.`];
}
function caption(partition) {
  const n = nBlocks(partition), more = partition.bits - partitionAt(facts.chosen).bits;
  const against = state.place === facts.chosen ? "the one chosen" : Math.abs(more) < 0.05 ? "as many as the one chosen" : `${num(Math.abs(more))} ${more > 0 ? "more" : "fewer"} than the one chosen`;
  const shown = n === 1 ? "1 block: nothing is grouped apart, every node is in it" : n === partition.labels.length - idle ? `${count(n)} blocks: every node on its own` : `${count(n)} blocks`;
  return `${shown}${idle ? `, and ${plural(idle, "node")} idle` : ""} · ${num(partition.bits, 4)} bits, ${against}`;
}

// ---- the curve of bits ----
const CURVE = { width: 300, height: 84, left: 8, right: 8, top: 12, bottom: 20 };
function curveSpots() {
  const counts = facts.hierarchy.map(nBlocks), bits = facts.hierarchy.map((partition) => partition.bits).filter(known);
  const most = Math.log(Math.max(2, ...counts)), low = Math.min(...bits), high = Math.max(...bits);
  return facts.hierarchy.map((partition, k) => ({
    x: CURVE.left + ((CURVE.width - CURVE.left - CURVE.right) * Math.log(counts[k])) / most,
    y: CURVE.height - CURVE.bottom - ((CURVE.height - CURVE.bottom - CURVE.top) * ((known(partition.bits) ? partition.bits : high) - low)) / (high - low || 1),
    n: counts[k],
  }));
}
function drawBits() {
  const spots = curveSpots(), end = CURVE.height - CURVE.bottom + 8;
  let last = -Infinity;
  const ticks = spots.filter(({ x }, k) => (k === spots.length - 1 || x - last >= 22) && (last = x) && (k === spots.length - 1 || spots.at(-1).x - x >= 18 || spots.length === 1));
  const root = svg("svg", { class: "bits", viewBox: `0 0 ${CURVE.width} ${CURVE.height}`, width: CURVE.width, height: CURVE.height, role: "img", "aria-label": `Bits by number of blocks: ${facts.hierarchy.map((p) => `${nBlocks(p)}: ${num(p.bits, 4)}`).join(", ")}` },
    svg("line", { class: "axis", x1: 0, x2: CURVE.width, y1: end, y2: end }),
    svg("path", { class: "curve", d: spots.map(({ x, y }, k) => `${k ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("") }),
    spots.map(({ x, y, n }, k) => svg("g", { class: k === facts.chosen ? "spot chosen" : "spot", "data-tip": `${plural(n, "block")}: ${num(partitionAt(k).bits, 4)} bits${k === facts.chosen ? ", the one chosen" : ""}${k === facts.measured ? "\ninterfaces and effects are measured for it" : ""}`, onclick: () => moveTo(k) },
      svg("rect", { class: "reach", x: x - 7, y: 0, width: 14, height: CURVE.height }), svg("circle", { cx: x, cy: y, r: k === facts.chosen ? 4.5 : 3 }))),
    ticks.map(({ x, n }) => svg("text", { class: "tick", x: n > 99 ? CURVE.width : x, y: CURVE.height - 1, "text-anchor": n > 99 ? "end" : "middle" }, String(n))),
    svg("circle", { class: "now", r: 7.5 }));
  $("bits").replaceChildren(root);
}
function markBits() {
  const { x, y } = curveSpots()[state.place], now = $("bits").querySelector(".now");
  now.setAttribute("cx", x);
  now.setAttribute("cy", y);
}

// ---- boxes and bands ----
function boxItem(block, b) {
  const box = state.plan.boxes[b];
  const head = svg("g", { class: "box-head", role: "button", tabindex: "0", "data-block": b, "aria-expanded": String(box.open), "aria-label": `${blockName(block)}: ${plural(block.members.length, "node")}, ${block.text}` },
    svg("rect", { class: "box", x: box.x, y: box.y, width: box.w, height: box.h, rx: state.plan.small && !box.open ? 3 : 7 }),
    box.title && svg("text", { class: "box-name", x: box.x + 10, y: box.y + 18 }, box.title),
    box.title && block.members.length > 1 && svg("text", { class: "box-sign", x: box.x + box.w - 10, y: box.y + 18, "text-anchor": "end" }, box.open ? "−" : "+"),
    box.open ? null : svg("text", { class: "box-text", x: box.x + 10, y: box.y + 35 }, box.text));
  const chips = box.chips.map(({ i, x, y, w, label }) => svg("g", { class: "inner", role: "button", tabindex: "0", "data-inner": i, "aria-label": nodeName(i) },
    svg("rect", { x: box.x + x, y: box.y + y, width: w, height: 19, rx: 4 }), svg("text", { x: box.x + x + w / 2, y: box.y + y + 13.5, "text-anchor": "middle" }, label)));
  return svg("g", {}, head, chips);
}
// the measured partition's bands are as wide as was measured; those without a measurement as wide as was estimated
function bandsNow() {
  const partition = partitionAt(state.place);
  const rows = partition.bands.map((band) => {
    const told = isMeasured() ? interfaceOf.get(`${band.src} ${band.dst}`) : null;
    return { ...band, told, nats: Math.max(0, told?.measured?.value ?? told?.nats ?? band.nats ?? 0) };
  });
  return rows.filter((band) => band.nats > 0).sort((a, b) => b.nats - a.nats).slice(0, BANDS);
}
function draw() {
  const partition = partitionAt(state.place), width = Math.max(320, Math.floor($("module-stage").clientWidth));
  state.blocks = blocksOf(partition, kindOf(state.place));
  state.plan = layOutBlocks(state.blocks, state.open, width);
  const bands = bandsNow(), most = bands[0]?.nats || 1, drawn = layOutBands(state.plan, bands, most), focused = document.activeElement?.dataset;
  const root = $("module-boxes");
  for (const [key, value] of [["viewBox", `0 0 ${width} ${state.plan.height}`], ["width", width], ["height", state.plan.height]]) root.setAttribute(key, value);
  const lines = drawn.map(({ path, w, back }, k) => {
    const line = svg("path", { class: back ? "iface back" : "iface", d: path, "data-band": k, "stroke-width": w.toFixed(2) });
    line.style.setProperty("--strength", (0.16 + 0.5 * Math.sqrt(bands[k].nats / most)).toFixed(3));
    return line;
  });
  state.bands = bands;
  root.replaceChildren(svg("g", {}, lines), ...state.blocks.map(boxItem));
  if (focused?.block !== undefined) root.querySelector(`[data-block="${Number(focused.block)}"]`)?.focus({ preventScroll: true });
  legend(bands, most);
}
function legend(bands, most) {
  const kinds = isMeasured() && bands.some((band) => band.told?.measured) ? "measured effect" : "estimated";
  $("module-shown").textContent = bands.length ? `${plural(bands.length, "interface")} shown` : "nothing crosses";
  const samples = bands.length ? [most, most / 10].flatMap((nats) => [svg("svg", { width: 26, height: 22, "aria-hidden": "true" }, svg("line", { x1: 1, x2: 25, y1: 11, y2: 11, "stroke-width": bandWidth(nats, most) })), el("span", {}, num(nats, 2))]) : [];
  const back = bands.length && $("module-boxes").querySelector(".back") ? [svg("svg", { class: "back", width: 26, height: 22, "aria-hidden": "true" }, svg("line", { x1: 1, x2: 25, y1: 11, y2: 11, "stroke-width": 4 })), el("span", {}, "to a block below or beside")] : [];
  $("module-widths").replaceChildren(...(bands.length ? ["width: ", ...samples, ` nats per token, ${kinds}`, ...back] : []));
}
function showPartition() {
  const partition = partitionAt(state.place);
  $("hierarchy").value = state.place;
  $("hierarchy").setAttribute("aria-valuetext", plural(nBlocks(partition), "block"));
  $("hierarchy-text").textContent = caption(partition);
  markBits();
  draw();
}
function moveTo(place) {
  if (place === state.place) return;
  state.place = place;
  state.open = new Set();
  showPartition();
}
function toggle(b) {
  if (state.blocks[b].members.length === 1) return toNode(state.blocks[b].members[0]);
  if (!state.open.delete(b)) state.open.add(b);
  draw();
}
function toNode(i) {
  go(i);
  $("h-graph").scrollIntoView({ block: "start" });
}

// ---- pointing and keys ----
function extremes(list) {
  return list.slice(0, 3).map((one) => `${plain([...one.context].slice(-14).join(""))}[${plain(one.token, { spaces: true })}]`).join("   ");
}
function bandText(band) {
  const name = (b) => blockName(state.blocks[b]), told = band.told, lines = [`${name(band.src)} → ${name(band.dst)}`];
  if (told?.measured) lines.push(`${withInterval(told.measured)} nats per token, measured`, `${num(told.nats)} ± ${num(told.se, 2)} estimated`);
  else lines.push(`${num(band.nats)} nats per token, estimated`);
  if (told && known(told.dimensions)) lines.push(`95% crosses in ${plural(told.dimensions, "dimension")}${known(told.measured_dimensions) ? `, measured ${count(told.measured_dimensions)}` : ""}`);
  const first = told?.directions[0];
  if (first) lines.push(`most along its first direction: ${extremes(first.highest)}`, `least: ${extremes(first.lowest)}`);
  return lines.join("\n");
}
function pointAtBlock(event) {
  const owner = event.target.closest("[data-band], [data-block], [data-inner]");
  for (const line of $("module-boxes").querySelectorAll(".iface.hot-band")) if (line !== owner) line.classList.remove("hot-band");
  if (!owner) return hideTip();
  const { band, block, inner } = owner.dataset;
  if (band !== undefined) {
    owner.classList.add("hot-band");
    return showTip(bandText(state.bands[Number(band)]), event.clientX, event.clientY);
  }
  if (inner !== undefined) return showTip(nodeName(Number(inner)), event.clientX, event.clientY);
  const b = Number(block), partition = partitionAt(state.place), effect = isMeasured() ? facts.effects.find((row) => row.blocks.length === 1 && row.blocks[0] === b) : null;
  showTip([`${blockName(state.blocks[b])}: ${plural(state.blocks[b].members.length, "node")}, ${state.blocks[b].text}`, `${num(partition.inside[b])} nats inside, ${num(partition.heard[b])} heard, ${num(partition.sent[b])} sent`, effect ? `ablated: ${withInterval(effect.nats)} nats per token` : null].filter(Boolean).join("\n"), event.clientX, event.clientY);
}
function act(event) {
  const owner = event.target.closest("[data-block], [data-inner]");
  if (!owner || (event.type === "keydown" && event.key !== "Enter" && event.key !== " ")) return;
  event.preventDefault();
  event.stopPropagation();
  hideTip();
  if (owner.dataset.inner !== undefined) toNode(Number(owner.dataset.inner));
  else toggle(Number(owner.dataset.block));
}

// ---- tables ----
const STATISTICS = { saved_bits: "bits saved", n_cut: "n-cut, relative", modularity: "modularity" };
function tests() {
  makeTable($("null-tests"), "Statistics of the search against networks without modules", [
    { name: "null", text: true, head: true, help: "How the networks without modules were made", value: (t) => t.null, show: (t) => plain(t.null) },
    { name: "statistic", text: true, help: "The best that the search found. Modules are significant where the bits saved are; the others are for comparison with the literature", value: (t) => t.statistic, show: (t) => STATISTICS[t.statistic] ?? plain(t.statistic) },
    { name: "here", value: (t) => t.value, show: (t) => num(t.value) },
    { name: "without modules", help: "Mean ± standard deviation over networks without modules", value: (t) => t.null_mean, show: (t) => `${num(t.null_mean)} ± ${num(t.null_sd, 2)}` },
    { name: "z", value: (t) => t.z, show: (t) => num(t.z) },
    { name: "p", help: "(1 + how many of them are as good or better) / (1 + how many there are)", value: (t) => t.p, show: (t) => num(t.p, 2) },
    { name: "percentile", help: "Share of the networks without modules that are worse", value: (t) => t.percentile, show: (t) => num(t.percentile) },
    { name: "n", value: (t) => t.n_null, show: (t) => count(t.n_null) },
  ], { empty: "Nothing was held against a null.", rowClass: (t) => (saying(t) ? "ours" : null) })([...facts.tests].sort((a, b) => saying(b) - saying(a)));
}
// blocks of the measured partition by name
const measuredBlocks = facts && facts.measured !== null ? blocksOf(partitionAt(facts.measured), kindOf(facts.measured)) : [];
const named = (b) => blockName(measuredBlocks[b]);
function effects() {
  makeTable($("module-effects"), "Blocks ablated alone and in pairs", [
    { name: "block", text: true, head: true, value: (r) => r.blocks.map(named).join(" + "), show: (r) => r.blocks.map(named).join(" + ") },
    { name: "effect, nats", help: "What the output loses per token when all that these nodes write is replaced by its mean; measured on held-out data", value: (r) => r.nats.value, show: (r) => interval(r.nats) },
    { name: "random sets", help: "Median effect of random sets of nodes, as many in every layer; none where the block fills its layers", value: (r) => r.random, show: (r) => (r.n_random ? num(r.random) : "none") },
    { name: "percentile", help: "Share of the random sets with a smaller effect", value: (r) => r.percentile, show: (r) => num(r.percentile) },
    { name: "interaction, nats", help: "Effect of both less their effects alone: below 0 a chain, above 0 each stands in for the other", value: (r) => r.interaction?.value, show: (r) => (r.interaction ? interval(r.interaction) : "") },
    { name: "percentile of it", help: "Share of random pairs with a smaller interaction", value: (r) => r.interaction_percentile, show: (r) => (r.interaction ? num(r.interaction_percentile) : "") },
  ], { empty: "No block was ablated: there is no partition to measure." })(facts.effects);
}
const chips = (list) => list.slice(0, 3).map((one) => el("span", { class: "passage short" }, el("span", { class: "before" }, running([...one.context].slice(-12).join(""))), token(one.token)));
function interfaces() {
  const columns = [
    { name: "from", text: true, value: (r) => named(r.src), show: (r) => named(r.src) },
    { name: "to", text: true, value: (r) => named(r.dst), show: (r) => named(r.dst) },
    { name: "edges", value: (r) => r.edges, show: (r) => count(r.edges) },
    { name: "measured, nats", help: "What the output loses per token when all these edges carry means; on held-out data", value: (r) => r.measured?.value, show: (r) => interval(r.measured) },
    { name: "estimated, nats", help: "The same to second order", value: (r) => r.nats, show: (r) => num(r.nats) },
    { name: "dimensions", help: "How many directions keep 95% of the measured effect; in brackets of the estimate", value: (r) => r.measured_dimensions ?? r.dimensions, show: (r) => (known(r.measured_dimensions) ? [count(r.measured_dimensions), el("span", { class: "ci" }, `(${count(r.dimensions)})`)] : known(r.dimensions) ? el("span", { class: "dim" }, `(${count(r.dimensions)})`) : "n/a") },
    { name: "tokens with most of its first direction", text: true, value: (r) => r.directions[0]?.nats, show: (r) => chips(r.directions[0]?.highest ?? []) },
  ].filter((column) => !column.name.startsWith("tokens") || facts.interfaces.some((r) => r.directions.length));
  makeTable($("module-interfaces"), "What crosses between the blocks", columns, { empty: "Nothing was measured: there is no partition to measure." })(facts.interfaces.slice(0, BANDS));
}
function traffic() {
  if (!facts.traffic) return;
  const { gini, hub, busiest } = facts.traffic, beside = (x) => `${num(x.value)}, by chance ${num(x.null_mean)} ± ${num(x.null_sd, 2)} (z = ${num(x.z)})`;
  $("module-traffic").replaceChildren(el("strong", {}, "How central is the traffic? "), `Gini coefficient of the nats that nodes write and read: ${beside(gini)}. Share of best routes through the busiest hub: ${beside(hub)}. Most traffic: ${busiest.slice(0, 4).map(([name, nats]) => `${short(name)} ${num(nats)}`).join(", ")} nats.`);
}

export function startModules() {
  if (!facts?.hierarchy.length) return;
  $("modules-section").hidden = false;
  // without a smaller graph to speak of, the head of the page says it already
  if (graphs.length) $("module-verdict").replaceChildren(...verdict());
  else $("module-verdict").remove();
  const slider = $("hierarchy");
  slider.max = facts.hierarchy.length - 1;
  slider.addEventListener("input", () => moveTo(Number(slider.value)));
  state.place = facts.measured ?? facts.chosen;
  const measured = facts.measured === null ? "There was no partition between one block and every node alone; nothing was measured." : facts.measured === facts.chosen ? "" : `The tables and the bands’ measured widths are of ${plural(nBlocks(partitionAt(facts.measured)), "block")}, the partition that was measured, not of the one chosen.`;
  $("module-note").textContent = measured;
  drawBits();
  tests();
  effects();
  interfaces();
  traffic();
  const root = $("module-boxes");
  root.setAttribute("data-own-tip", "");
  root.addEventListener("pointermove", pointAtBlock);
  root.addEventListener("pointerleave", hideTip);
  root.addEventListener("click", act);
  root.addEventListener("keydown", act);
  showPartition();
  let width = $("module-stage").clientWidth;
  new ResizeObserver(() => {
    if (Math.abs($("module-stage").clientWidth - width) < 1) return;
    width = $("module-stage").clientWidth;
    draw();
  }).observe($("module-stage"));
}
