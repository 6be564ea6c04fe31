// The text page. Every string from the server is hostile: it becomes text, never markup.
import { $, el } from "../dom.js";
import { plain, short } from "../format.js";
import { startTips } from "../tip.js";
import { getGraph, getTexts, run } from "./api.js";
import { startSide } from "./side.js";
import { change, known, onChange, readAddress, state, toggleAblation, writers } from "./state.js";
import { redraw, startStrips } from "./strip.js";
import { startTokens } from "./tokens.js";

const MATTERS = ["text", "other", "ablate", "node", "measure", "only"];
function fault(error) {
  $("fault").hidden = error === null;
  $("fault").textContent = error === null ? "" : plain(error.message);
}
async function update() {
  if (!state.text) return;
  $("status").textContent = "running…";
  try {
    known.answer = await run();
    if (state.token !== null && state.token >= known.answer.tokens.length) state.token = null;
    fault(null);
    $("found").hidden = false;
    const n = known.answer.tokens.length;
    $("status").textContent = `${n} ${n === 1 ? "token" : "tokens"}`;
  } catch (error) {
    if (error.name === "AbortError") return;
    $("status").textContent = "";
    fault(error);
  }
  change({});
  document.documentElement.dataset.answered = String(Number(document.documentElement.dataset.answered ?? 0) + 1);
}

function startForm() {
  const submit = () => change({ text: $("text").value, other: $("other").value });
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  for (const field of [$("text"), $("other")]) {
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      submit();
    });
  }
  $("examples").addEventListener("change", () => {
    if ($("examples").value === "") return;
    change({ text: known.texts[Number($("examples").value)], token: null });
    $("examples").value = "";
  });
  $("only").addEventListener("change", () => change({ only: $("only").checked }));
  $("other-field").hidden = !known.facts.graphs.some((graph) => graph.resample);
  if (!known.facts.tokenizer) $("text-label").textContent = "Token ids, separated by spaces";
  const cut = (text) => (text.length > 70 ? `${text.slice(0, 69)}…` : text);
  $("examples").replaceChildren(el("option", { value: "" }, known.texts.length ? "or an example…" : "no examples; pass --data"), ...known.texts.map((text, i) => el("option", { value: i }, cut(plain(text)))));
}
function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)"), root = document.documentElement;
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  $("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    change({});
  });
  system.addEventListener("change", () => change({}));
}
function move(step) {
  const rows = writers().map((node) => node.name), at = rows.indexOf(state.node);
  change({ node: rows[at < 0 ? (step > 0 ? 0 : rows.length - 1) : Math.max(0, Math.min(rows.length - 1, at + step))] });
}
function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, textarea, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const last = (known.answer?.tokens.length ?? 0) - 1, token = state.token ?? last;
  const deeds = {
    "/": () => $("text").focus(), a: () => { if (state.node !== null) toggleAblation(state.node); }, Escape: () => change({ node: null, measure: false }),
    ArrowLeft: () => change({ token: Math.max(0, token - 1) }), ArrowRight: () => change({ token: Math.min(last, token + 1) }), ArrowUp: () => move(-1), ArrowDown: () => move(1),
  };
  const deed = deeds[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!deed || (last < 0 && event.key !== "/")) return;
  event.preventDefault();
  deed();
}
function head() {
  const names = known.facts.graphs.map((graph) => plain(graph.name));
  document.title = `${names.join(" and ")} · unweave`;
  $("title").textContent = names.join(" and ");
  $("pages").replaceChildren(el("a", { href: "/", "aria-current": "page" }, "Text"),
    ...known.facts.graphs.flatMap((graph, k) => (graph.results ? [el("a", { href: `/report/${k}` }, names.length > 1 ? `Report: ${short(graph.name)}` : "Report")] : [])));
}
async function start() {
  startTips();
  startTheme();
  try {
    known.facts = await getGraph();
    known.texts = (await getTexts()).texts;
  } catch (error) {
    fault(error);
    return;
  }
  head();
  startForm();
  startTokens();
  startStrips();
  startSide();
  onChange((part) => {
    if ("text" in part) $("text").value = state.text;
    if ("other" in part) $("other").value = state.other;
    $("only").checked = state.only;
    if (MATTERS.some((name) => name in part) || ("token" in part && state.only)) update();
  });
  document.addEventListener("keydown", keys);
  window.addEventListener("hashchange", readAddress);
  window.addEventListener("resize", redraw);
  readAddress();
  if (!state.text && known.texts.length) change({ text: known.texts[0] });
  document.documentElement.dataset.ready = "true";
}
start();
