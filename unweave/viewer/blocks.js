// Where the blocks of a partition stand, by depth and the deepest on top, and the bands between them.
import { data } from "./data.js";
import { plain, short } from "./format.js";

const EDGE = 14, GAP = 16, RISE = 74, CLOSED = 46, HEAD = 34, CHIP = 24, PAD = 10, LETTER = 6.6;
const SMALL = 22, WIDEST_BAND = 20, THINNEST_BAND = 0.6, MOST_ROWS = 14, FURTHEST = 260, ARCH = 34;

// blocks[b] = { members, depth, name, text } of one partition; what is not significant is not called a module
export function blocksOf(partition, kind) {
  const blocks = [];
  partition.labels.forEach((label, i) => { (blocks[label] ??= { members: [], depth: 0 }).members.push(i); });
  blocks.forEach((block, b) => {
    block.depth = block.members.reduce((sum, i) => sum + data.nodes[i].layer, 0) / block.members.length;
    block.name = block.members.length === 1 ? short(data.nodes[block.members[0]].name) : data.modules.idle?.length && b === partition.labels[data.modules.idle[0]] ? "idle" : `${kind} ${b}`;
    block.text = contents(block);
  });
  return blocks;
}

// what a closed box says of its nodes: "layers 0–3, 12 heads, 2 MLPs"
function contents(block) {
  const nodes = block.members.map((i) => data.nodes[i]), layers = nodes.map((node) => node.layer);
  const low = Math.min(...layers), high = Math.max(...layers);
  const of = (one, many, test) => { const n = nodes.filter(test).length; return n ? `${n} ${n === 1 ? one : many}` : null; };
  const kinds = [of("head", "heads", (n) => n.kind === "head" || n.kind === "attn"), of("MLP part", "MLP parts", (n) => n.kind === "mlp" && n.name.includes(".part.")), of("MLP", "MLPs", (n) => n.kind === "mlp" && !n.name.includes(".part.")), of("other", "others", (n) => n.kind === "other")];
  const last = Math.max(...data.nodes.map((node) => node.layer));
  const ends = [nodes.some((n) => n.kind === "embed") && "input", nodes.some((n) => n.kind === "unembed") && "output"];
  const inner = layers.filter((layer) => layer >= 0 && layer < last);
  const span = !inner.length ? null : Math.min(...inner) === Math.max(...inner) ? `layer ${inner[0]}` : `layers ${Math.max(0, low)}–${Math.min(high, last - 1)}`;
  return [...ends, span, ...kinds].filter(Boolean).join(", ");
}

const cut = (text, width) => (text.length * LETTER <= width ? text : width < 4 * LETTER ? "" : `${text.slice(0, Math.floor(width / LETTER) - 1)}…`);
const chipWidth = (i) => Math.min(190, 14 + LETTER * short(data.nodes[i].name).length);

// the nodes of an open box, in lines of chips; places are within the box
function chipsOf(block, width) {
  const chips = [];
  let x = PAD, y = HEAD;
  for (const i of block.members) {
    const w = chipWidth(i);
    if (x > PAD && x + w > width - PAD) { x = PAD; y += CHIP; }
    chips.push({ i, x, y, w, label: cut(short(data.nodes[i].name), w - 8) });
    x += w + 5;
  }
  return { chips, height: y + CHIP + PAD - 4 };
}

const wanted = (block, open, most) => (open ? Math.min(most, Math.max(240, 22 * Math.sqrt(block.members.length) * 4)) : Math.min(most, Math.max(60 + LETTER * block.name.length, Math.min(320, 24 + LETTER * block.text.length))));

// rows of block numbers: blocks of like depth side by side, a row too full becomes several
function blockRows(blocks, open, width) {
  const order = blocks.map((_, b) => b).sort((a, b) => blocks[a].depth - blocks[b].depth || a - b);
  const depths = new Set(blocks.map((block) => block.depth)), span = Math.max(...depths) - Math.min(...depths);
  // nearly equal depths stand side by side: as many rows as there are layers, and not more than can be seen
  const step = depths.size <= 1 ? 1 : Math.max(span / MOST_ROWS, blocks.length > 3 ? 0.75 : 1e-9);
  const small = blocks.length > 120, rows = [];
  let start = -Infinity, room = 0;
  for (const b of order) {
    const w = small && !open.has(b) ? SMALL : wanted(blocks[b], open.has(b), width - 2 * EDGE);
    if (blocks[b].depth - start > step || room < w) {
      if (blocks[b].depth - start > step) start = blocks[b].depth;
      rows.push([]);
      room = width - 2 * EDGE;
    }
    rows.at(-1).push({ b, w });
    room -= w + (small ? 4 : GAP);
  }
  return { rows, small };
}

// boxes[b] = { x, y, w, h, open, chips, title, text }, y the top
export function layOutBlocks(blocks, open, width) {
  const { rows, small } = blockRows(blocks, open, width), boxes = [], rise = small ? 26 : Math.max(40, Math.min(RISE, 900 / rows.length));
  let bottom = 0;
  const above = [];
  for (const row of rows) {
    const gap = small ? 4 : GAP, used = row.reduce((sum, { w }) => sum + w + gap, -gap);
    let x = (width - used) / 2, tallest = 0;
    for (const { b, w } of row) {
      const inside = open.has(b) ? chipsOf(blocks[b], w) : null, h = inside ? inside.height : small ? 16 : CLOSED;
      boxes[b] = { x, w, h, open: Boolean(inside), chips: inside?.chips ?? [], title: small && !inside ? "" : cut(blocks[b].name, w - 34), text: small && !inside ? "" : cut(blocks[b].text, w - 16), row: above.length };
      x += w + gap;
      tallest = Math.max(tallest, h);
    }
    above.push({ row, bottom, tallest });
    bottom += tallest + rise;
  }
  // bands between boxes of the top row arch over them
  const height = bottom - rise + EDGE + ARCH;
  for (const { row, bottom: at, tallest } of above) for (const { b } of row) boxes[b].y = height - EDGE - at - (tallest + boxes[b].h) / 2;
  return { boxes, width, height, small };
}

export const bandWidth = (nats, most) => Math.max(THINNEST_BAND, WIDEST_BAND * Math.sqrt(Math.max(0, nats) / most));

// bands[k] = { band, path, w, back }: up from the top of one box to the bottom of another; those to a box below or
// beside go the other way round. A band past other rows has a lane between their boxes, where there is room. Along a
// side, bands stand in the order of where they lead.
export function layOutBands({ boxes, width, small }, bands, most) {
  const ends = new Map(), rows = [];
  for (const box of boxes) (rows[box.row] ??= { taken: [], top: Infinity, bottom: 0 }).taken.push([box.x, box.x + box.w]);
  for (const box of boxes) rows[box.row] = { ...rows[box.row], top: Math.min(rows[box.row].top, box.y), bottom: Math.max(rows[box.row].bottom, box.y + box.h) };
  const drawn = bands.map((band) => {
    const a = boxes[band.src], b = boxes[band.dst], level = a.row === b.row, back = b.row < a.row;
    const one = { band, w: bandWidth(band.nats, most), back: back || level, level, between: rows.slice(Math.min(a.row, b.row) + 1, Math.max(a.row, b.row)) };
    one.lane = small ? null : laneOf(one, (a.x + a.w / 2 + b.x + b.w / 2) / 2, width);
    for (const [key, box, top, other] of [["from", a, !back, b], ["to", b, level || back, a]]) {
      const side = `${boxes.indexOf(box)} ${top}`;
      if (!ends.has(side)) ends.set(side, []);
      ends.get(side).push({ one, key, box, top, towards: one.lane ?? other.x + other.w / 2 });
    }
    return one;
  });
  for (const side of ends.values()) spreadEnds(side);
  for (const one of drawn) one.path = curveOf(one);
  return drawn;
}
function spreadEnds(side) {
  side.sort((p, q) => p.towards - q.towards);
  const { box } = side[0], total = side.reduce((sum, end) => sum + end.one.w + 3, 0), squeeze = Math.min(1, (box.w - 8) / total);
  let x = box.x + box.w / 2 - (total * squeeze) / 2;
  for (const end of side) {
    const step = (end.one.w + 3) * squeeze;
    end.one[end.key] = { x: x + step / 2, y: end.top ? box.y : box.y + box.h };
    x += step;
  }
}
// the place nearest to the middle where nothing stands in any row between the ends; null where there is none
function laneOf({ between, w }, middle, width) {
  if (!between.length) return null;
  const taken = between.flatMap((row) => row.taken.map(([left, right]) => [left - w / 2 - 4, right + w / 2 + 4]));
  const free = (x) => x > w / 2 + 2 && x < width - w / 2 - 2 && taken.every(([left, right]) => x <= left || x >= right);
  const lane = [middle, ...taken.flat()].filter(free).sort((p, q) => Math.abs(p - middle) - Math.abs(q - middle))[0];
  if (lane === undefined || Math.abs(lane - middle) > FURTHEST) return null;
  if (w > 1.5) for (const row of between) row.taken.push([lane - w / 2, lane + w / 2]);
  return lane;
}
const bend = (x0, y0, x1, y1) => `C${x0.toFixed(1)} ${((y0 + y1) / 2).toFixed(1)} ${x1.toFixed(1)} ${((y0 + y1) / 2).toFixed(1)} ${x1.toFixed(1)} ${y1.toFixed(1)}`;
function curveOf({ from, to, level, lane, between }) {
  const start = `M${from.x.toFixed(1)} ${from.y.toFixed(1)}`, over = Math.min(from.y, to.y) - ARCH;
  if (level) return `${start} C${from.x.toFixed(1)} ${over.toFixed(1)} ${to.x.toFixed(1)} ${over.toFixed(1)} ${to.x.toFixed(1)} ${to.y.toFixed(1)}`;
  if (lane === null) return `${start} ${bend(from.x, from.y, to.x, to.y)}`;
  const low = between[0].bottom, high = between.at(-1).top, [first, last] = from.y > to.y ? [low, high] : [high, low];
  return `${start} ${bend(from.x, from.y, lane, first)} V${last.toFixed(1)} ${bend(lane, last, to.x, to.y)}`;
}
export const blockName = (block) => plain(block.name);
