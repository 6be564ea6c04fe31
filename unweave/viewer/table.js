// A table that sorts: columns say how to show a row and what to sort it by.
import { el } from "./dom.js";
import { known } from "./format.js";

const arrow = () => el("span", { class: "arrow", "aria-hidden": "true" });
function compare(a, b) {
  if (typeof a === "string" || typeof b === "string") return String(a).localeCompare(String(b), "en", { numeric: true });
  return (known(a) ? a : -Infinity) - (known(b) ? b : -Infinity) || 0;
}

// columns: { name, help, text (left-aligned), value(row), show(row) }; returns a function that replaces the rows
export function makeTable(place, caption, columns, { rowClass = () => null, empty = "none" } = {}) {
  let rows = [], order = null;
  const body = el("tbody");
  const heads = columns.map((column, i) => el("th", { scope: "col", class: column.text && "text" },
    el("button", { type: "button", "data-tip": column.help, "aria-description": column.help, onclick: () => sortBy(i) }, 
      column.text ? [column.name, arrow()] : [arrow(), column.name])));
  place.replaceChildren(el("table", {}, el("caption", { class: "hidden" }, caption), el("thead", {}, el("tr", {}, heads)), body));

  function sortBy(i) {
    // figures start with the largest, names with the first
    const first = columns[i].text ? 1 : -1;
    order = order?.i === i ? { i, sign: -order.sign } : { i, sign: first };
    heads.forEach((head, k) => (k === i ? head.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending") : head.removeAttribute("aria-sort")));
    draw();
  }
  function draw() {
    const sorted = order ? [...rows].sort((a, b) => order.sign * compare(columns[order.i].value(a), columns[order.i].value(b))) : rows;
    body.replaceChildren(...sorted.map((row) => el("tr", { class: rowClass(row) }, columns.map((column, i) =>
      el(column.head ? "th" : "td", { class: column.text && "text", scope: column.head && "row" }, column.show(row))))));
    if (!rows.length) body.append(el("tr", {}, el("td", { class: "text dim", colspan: columns.length }, empty)));
  }
  return (next) => { rows = next; draw(); };
}
