// What is being looked at: the chosen node, the threshold, the ports shown, the search. Parts of the page listen.
import { countAbove, data, floor, heaviest, kept, ports, weight } from "./data.js";

export const view = { node: null, least: 0, ports: new Set(ports), find: "" };
const listeners = [];
export const onChange = (listener) => { listeners.push(listener); };
export function change(part) {
  Object.assign(view, part);
  for (const listener of listeners) listener(part);
}

// the slider is 0 for every edge, then logarithmic from the lightest edge to the heaviest
const STEPS = 1000;
const decades = Math.log(heaviest / floor) || 1;
export const fromSlider = (step) => (step <= 0 ? 0 : Math.min(heaviest, floor * Math.exp((decades * step) / STEPS)));
export const toSlider = (nats) => (nats <= 0 ? 0 : Math.max(0, Math.min(STEPS, Math.round((STEPS * Math.log(nats / floor)) / decades))));

// at first the strongest edges, about as many as the eye can tell apart
const FIRST_SHOWN = 200;
const firstLeast = () => (kept.length <= FIRST_SHOWN ? 0 : weight(kept[FIRST_SHOWN - 1]));

export function writeAddress() {
  const parts = new URLSearchParams();
  if (view.node !== null) parts.set("node", data.nodes[view.node].name);
  if (countAbove(view.least) !== countAbove(firstLeast())) parts.set("min", Number(view.least.toPrecision(4)));
  history.replaceState(null, "", `#${parts}`);
}
export function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const node = data.nodes.findIndex((n) => n.name === parts.get("node"));
  const least = parts.has("min") ? Number(parts.get("min")) : firstLeast();
  change({ node: node < 0 ? null : node, least: Number.isFinite(least) ? Math.max(0, Math.min(least, heaviest)) : firstLeast() });
}
