// The text as a row of tokens, each as dark as it counts: by divergence, or by the use of a node.
import { $, el } from "../dom.js";
import { known as isNumber, num, pieces, plain, short } from "../format.js";
import { change, known, onChange, state } from "./state.js";

const sum = (rows) => rows[0]?.map((_, t) => rows.reduce((all, row) => all + (row[t] ?? 0), 0)) ?? [];
const nameOf = (k) => plain(known.facts.graphs[k].name);

// every way to colour the tokens: { key, name, values }
function paints() {
  const { runs, graphs } = known.answer, all = [];
  runs.forEach((run, r) => {
    if (run.against === null) return;
    const what = run.ablated.length ? `divergence without ${run.ablated.length === 1 ? short(run.ablated[0]) : `the ${run.ablated.length} ablated parts`}` : `divergence of ${nameOf(run.graph)} from ${nameOf(0)}`;
    all.push({ key: `kl${r}`, name: graphs.length > 1 && run.ablated.length ? `${what}, ${nameOf(run.graph)}` : what, values: run.kl_nats });
  });
  graphs.forEach((graph, k) => {
    const of = graphs.length > 1 ? `, ${nameOf(k)}` : "";
    if (graph.use && state.node in graph.use) all.push({ key: `use${k}`, name: `use of ${short(state.node)}${of}`, values: graph.use[state.node] });
    if (graph.measured) all.push({ key: `measured${k}`, name: `effect of ${short(state.node)}, measured${of}`, values: graph.measured });
    if (graph.use) all.push({ key: `all${k}`, name: `use of all nodes${of}`, values: sum(Object.values(graph.use)) });
  });
  return all;
}
function drawTokens() {
  if (!known.answer) return;
  const all = paints(), paint = all.find((one) => one.key === state.paint) ?? all[0];
  $("paint").replaceChildren(...all.map((one) => el("option", { value: one.key, selected: one === paint }, one.name)));
  const values = paint?.values ?? [], top = Math.max(0, ...values.filter(isNumber));
  $("scale").textContent = paint ? `darkest: ${num(top)} nats; sum: ${num(values.reduce((a, b) => a + (b ?? 0), 0))}` : "";
  $("tokens").replaceChildren(...known.answer.tokens.map((token, t) => {
    const marks = pieces(token.text, { spaces: true }).map((piece) => (piece.mark ? el("span", { class: "mark" }, piece.text) : piece.text));
    const item = el("bdi", { class: "token", role: "option", dir: "ltr", id: `token-${t}`, "data-token": t, "aria-selected": String(t === state.token),
      "data-tip": `token ${t}, id ${token.id}${paint ? `\n${num(values[t])} nats: ${paint.name}` : ""}` }, marks.length ? marks : el("span", { class: "mark" }, "empty"));
    item.style.setProperty("--heat", `${top > 0 && isNumber(values[t]) ? Math.round(70 * Math.sqrt(values[t] / top)) : 0}%`);
    return item;
  }));
  $("tokens").setAttribute("aria-activedescendant", state.token === null ? "" : `token-${state.token}`);
}
export function startTokens() {
  $("tokens").addEventListener("click", (event) => {
    const item = event.target.closest("[data-token]");
    if (item) change({ token: Number(item.dataset.token) });
  });
  $("paint").addEventListener("change", () => change({ paint: $("paint").value }));
  onChange(drawTokens);
}
