// Where every node stands: layer upon layer, the input at the bottom; heads in a row, the MLP above them to the right,
// in a column of its own so that the edges between MLPs can be told apart.
import { isHead } from "./data.js";
import { plain } from "./format.js";

const GUTTER = 66, MARGIN = 14, NARROWEST = 9, COLUMN = 168;
const rank = (node) => ({ embed: 0, mlp: 2, unembed: 3 })[node.kind] ?? 1;
const widest = (node) => (isHead(node) ? 54 : { mlp: 76, map: 44, embed: 440, unembed: 440 }[node.kind] ?? 120);

function rowsOf(nodes, room) {
  const rows = new Map();
  nodes.forEach((node, i) => {
    const key = `${node.layer} ${rank(node)}`;
    if (!rows.has(key)) rows.set(key, { layer: node.layer, rank: rank(node), members: [] });
    rows.get(key).members.push(i);
  });
  const inOrder = [...rows.values()].sort((a, b) => a.layer - b.layer || a.rank - b.rank);
  // a row too full to be seen becomes several
  const most = Math.max(1, Math.floor(room / NARROWEST));
  return inOrder.flatMap((row) => Array.from({ length: Math.ceil(row.members.length / most) }, (_, k) => ({ ...row, members: row.members.slice(k * most, (k + 1) * most) })));
}

function labelOf(node, width) {
  const name = plain(node.name), last = name.split(".").pop();
  if (isHead(node)) return width >= 26 ? `h${last}` : width >= 14 ? last : "";
  const text = node.kind === "mlp" ? "mlp" : ["other", "map"].includes(node.kind) ? last : name;
  return text.length * 7 + (node.kind === "map" ? 4 : 8) <= width ? text : width > 30 ? `${text.slice(0, Math.floor(width / 7) - 2)}…` : "";
}

function gaps(rows) {
  const between = Math.max(40, Math.min(96, 760 / rows.length));
  return (lower, upper) => (lower.layer === upper.layer ? Math.max(34, 0.66 * between) : between);
}
const bandName = (row, nodes) => {
  const kinds = new Set(row.members.map((i) => nodes[i].kind));
  return kinds.has("embed") ? "input" : kinds.has("unembed") ? "output" : `layer ${row.layer}`;
};

const isColumn = (row) => row.rank === 2 && row.members.length === 1;

// places[i] = { x, y, w, h, label, row, column }; bands are the layers, for the background
export function layOut(nodes, width) {
  const beside = nodes.some(isHead) && nodes.some((node) => node.kind === "mlp") ? COLUMN : 0;
  const room = width - GUTTER - MARGIN - beside, rows = rowsOf(nodes, room), gap = gaps(rows);
  let up = 0;
  const heights = rows.map((row, r) => (up += r ? gap(rows[r - 1], row) : 0));
  const height = up + 68, places = [], bands = [];
  rows.forEach((row, r) => {
    const y = height - 34 - heights[r], aside = beside && isColumn(row), step = aside ? 90 : room / row.members.length;
    const start = aside ? GUTTER + room : GUTTER;
    row.members.forEach((i, column) => {
      const w = Math.max(5, Math.min(step - (step > 30 ? 8 : 2), widest(nodes[i]))), h = w < 14 ? 16 : 24;
      places[i] = { x: start + step * (column + 0.5), y, w, h, row: r, column, label: labelOf(nodes[i], w) };
    });
    const name = bandName(row, nodes), last = bands.at(-1);
    if (last?.name === name) last.top = y - 22;
    else bands.push({ name, top: y - 22, bottom: y + 22 });
  });
  return { places, rows, bands, width, height };
}

// the node next to one, in the direction of an arrow key
export function neighbour({ places, rows }, i, key) {
  const { row, column, x } = places[i], beside = { ArrowLeft: -1, ArrowRight: 1 }[key];
  if (beside) return rows[row].members[column + beside] ?? i;
  const next = rows[row + (key === "ArrowUp" ? 1 : -1)];
  if (!next) return i;
  return next.members.reduce((best, j) => (Math.abs(places[j].x - x) < Math.abs(places[best].x - x) ? j : best));
}
