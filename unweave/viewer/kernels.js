// Edges between feature maps as pictures: the kernel that one map slides over another, red adding and blue inhibiting.
import { data } from "./data.js";
import { $, el, svg } from "./dom.js";
import { known, num } from "./format.js";

// shades on either side of zero; a picture is one path per shade, however many weights it has
const SHADES = 24, PICTURE = 30;
const weightsOf = (edge) => (edge.kernel ?? []).flat().filter(known);
// one scale for all pictures of the page, the same on both sides of zero
const largest = data.edges.reduce((most, edge) => weightsOf(edge).reduce((top, w) => Math.max(top, Math.abs(w)), most), 0);
export const hasKernels = data.edges.some((edge) => edge.kernel);
export const strength = (edge) => (edge.kernel ? weightsOf(edge).reduce((top, w) => Math.max(top, Math.abs(w)), 0) : null);
const signed = (w) => (w > 0 ? `+${num(w, 2)}` : num(w, 2));

function shadePath(shade, squares) {
  const path = svg("path", { class: shade < 0 ? "cold" : "warm", d: squares.map(([x, y]) => `M${x} ${y}h1v1h-1z`).join("") });
  path.style.setProperty("--share", `${Math.round((100 * Math.abs(shade)) / SHADES)}%`);
  return path;
}
// the kernel of an edge, at most so many pixels high; what is no number is left out
export function kernelPicture(edge, side = PICTURE) {
  if (!edge.kernel) return null;
  const high = edge.kernel.length, wide = edge.kernel[0].length, pixel = Math.max(1, Math.floor(side / Math.max(high, wide))), shades = new Map();
  edge.kernel.forEach((row, y) => row.forEach((w, x) => {
    if (!known(w)) return;
    const shade = largest > 0 ? Math.round(SHADES * (w / largest)) : 0;
    shades.set(shade, [...(shades.get(shade) ?? []), [x, y]]);
  }));
  const weights = weightsOf(edge), range = weights.length ? `${signed(Math.min(...weights))} to ${signed(Math.max(...weights))}` : "no number";
  const text = `kernel of ${high} × ${wide}, weights ${range}`;
  return svg("svg", { class: "kernel", viewBox: `0 0 ${wide} ${high}`, width: wide * pixel, height: high * pixel, role: "img", "aria-label": text, "data-tip": text }, [...shades].map(([shade, squares]) => shadePath(shade, squares)));
}
export const kernelColumn = { name: "kernel", text: true, help: "What the later map slides over the earlier one: red adds, blue inhibits; sorted by the largest weight", value: (e) => -(strength(e) ?? -1), show: (e) => kernelPicture(e) };
export const kernelLegend = () => el("span", { class: "kernel-legend", "data-tip": "One scale for all kernels of the page" }, `inhibits ${signed(-largest)}`, el("span", { class: "kernel-scale" }), `adds ${signed(largest)}`);

export function startKernels() {
  if (!hasKernels) return;
  $("graph-note").textContent = "Read it from the bottom up: a node is a feature map, and an edge between two maps is a kernel, which the later one slides over the earlier. Its width is what it is worth, in nats of output per image. A click on a map shows its kernels.";
  $("edge-filter").placeholder = "Filter, e.g. conv2.map.3";
  $("kernel-legend").replaceChildren(kernelLegend());
  $("kernel-legend").hidden = false;
}
