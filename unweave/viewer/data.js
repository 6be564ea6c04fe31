// The report's data, and what several parts of the page derive from it.
import { known, plain } from "./format.js";

export const data = JSON.parse(document.getElementById("data").textContent);
export const kinds = data.kinds ?? [];
data.edges.forEach((edge, place) => { edge.place = place; });
// what things are worth: on all data, or on one kind of it
let kind = null;
export const nats = (edge) => (kind === null ? edge.nats : kinds[kind].edges[edge.place]);
export const score = (i) => (kind === null ? data.nodes[i].score_nats : kinds[kind].nodes[i]);
export const weight = (edge) => (known(nats(edge)) ? Math.abs(nats(edge)) : 0);
// kept edges, the strongest first, so that "worth at least x" is always a beginning of this list
export const kept = data.edges.filter((edge) => edge.kept !== false);
export let heaviest = 1;
export let floor = 1;
export let totalNats = 0;
export function setKind(place) {
  kind = place;
  kept.sort((a, b) => weight(b) - weight(a));
  heaviest = kept.length && weight(kept[0]) > 0 ? weight(kept[0]) : 1;
  const lightest = kept.reduce((least, edge) => (weight(edge) > 0 ? Math.min(least, weight(edge)) : least), heaviest);
  // a log scale over more than eight decades would waste most of the slider on nothing
  floor = Math.max(lightest, heaviest * 1e-8);
  totalNats = kept.reduce((sum, edge) => sum + weight(edge), 0);
}
setKind(null);

export const edgesIn = data.nodes.map(() => []);
export const edgesOut = data.nodes.map(() => []);
for (const edge of kept) {
  edgesOut[edge.src].push(edge);
  edgesIn[edge.dst].push(edge);
}

// how many kept edges are worth at least so many nats
export function countAbove(least) {
  let low = 0, high = kept.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (weight(kept[middle]) >= least) low = middle + 1;
    else high = middle;
  }
  return low;
}

export const ports = [...new Set(kept.map((edge) => edge.port))].sort(
  (a, b) => (("qkv".indexOf(a) + 4) % 4) - (("qkv".indexOf(b) + 4) % 4) || (a < b ? -1 : 1));
export const portColour = (port) => (["q", "k", "v"].includes(port) ? `--${port}` : "--in");
export const nodeName = (i) => plain(data.nodes[i].name);
export const isHead = (node) => node.kind === "attn" || node.kind === "head";
// a network of feature maps sees images where others read tokens
export const unit = data.nodes.some((node) => node.kind === "map") ? "image" : "token";
export const graphs = data.faithfulness.filter((row) => !row.baseline && row.name !== "original");
export const ours = graphs.find((row) => row.name === "decompiled graph") ?? graphs[0];
// sizes are shares of edges (a circuit) or of stored numbers (a compressed graph)
export const ofEdges = data.size_of === "edges";
