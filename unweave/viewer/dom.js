// Elements are made here and nowhere else: attributes and text nodes, never markup.
import { pieces, plain } from "./format.js";

export const $ = (id) => document.getElementById(id);

function dress(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}
export const el = (tag, attributes = {}, ...children) => dress(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => dress(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// a token as a chip that keeps to itself: isolated direction, everything unseen spelled out
export function token(text, tip) {
  const shown = pieces(text, { spaces: true }).map((piece) => (piece.mark ? el("span", { class: "mark" }, piece.text) : piece.text));
  return el("bdi", { class: "tok", dir: "ltr", "data-tip": tip }, shown.length ? shown : el("span", { class: "mark" }, "empty"));
}
export const running = (text) => el("bdi", { class: "ctx", dir: "ltr" }, pieces(text).map((piece) => (piece.mark ? el("span", { class: "mark" }, piece.text) : piece.text)));
export const chip = (port, colour) => {
  const node = el("span", { class: "port" }, plain(port));
  node.style.setProperty("--p", `var(${colour})`);
  return node;
};
// a figure with a bar before it, for a share of 0 to 1
export function bar(share, ...children) {
  const node = el("span", { class: "bar-cell" }, children);
  node.style.setProperty("--share", `${(100 * Math.max(0, Math.min(1, share || 0))).toFixed(2)}%`);
  return node;
}

// the canvas needs colours as values, not as names
const probe = el("span", { hidden: true });
document.body.append(probe);
export function colour(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}
